#!/usr/bin/env bash
# What docs/results.md shows down to "Texts at once": benchmarks/results.sh QUESTIONS.jsonl DIR [DRAFT_MODEL]
#
# QUESTIONS are MT-bench's (`question.jsonl`), DIR takes a directory for each run. DRAFT_MODEL, for speculative decoding,
# is made by benchmarks/make_draft_model.py; without one that baseline is left out. About 75 minutes on 2 cores with
# nothing beside it; a run that was cut short goes on when the script runs again.
set -euo pipefail
questions="$1" dir="$2" draft="${3:-}"
medusa="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)/.venv/bin/medusa"
mkdir -p "$dir"

measure() { # NAME ARGUMENTS...
    local out="$dir/$1" resume=()
    shift
    if [[ -f "$out/done" ]]; then return; fi
    if [[ -f "$out/run.json" ]]; then resume=(--resume); fi
    "$medusa" "$@" --out "$out" "${resume[@]}"
    touch "$out/done"
}

measure greedy bench --questions "$questions" --max-new-tokens 256
measure sampled bench --questions "$questions" --max-new-tokens 256 --temperature 0.7 --methods plain,union,typical
# As on a machine without AMX, where there is AVX-512, and on one without that.
if MEDUSA_NATIVE_ISA=avx512_bf16 "$medusa" info >/dev/null 2>&1; then
    MEDUSA_NATIVE_ISA=avx512_bf16 measure greedy-avx512 bench --questions "$questions" --max-new-tokens 256
fi
MEDUSA_NATIVE_ISA=avx2 measure greedy-avx2 bench --questions "$questions" --max-new-tokens 256
MEDUSA_NATIVE_ISA=avx2 measure sampled-avx2 bench --questions "$questions" --max-new-tokens 256 --temperature 0.7 \
    --methods plain,union

others="transformers,lookup${draft:+,assisted}" draft_model=()
if [[ -n "$draft" ]]; then draft_model=(--draft-model "$draft"); fi

measure ablate-batch ablate batch
measure ablate-drafters ablate drafters
measure ablate-nodes ablate nodes
measure ablate-heads ablate heads
measure ablate-threshold ablate threshold "${draft_model[@]}"
measure ablate-threshold-heads ablate threshold --drafter heads

measure baselines bench --questions "$questions" --limit 16 --max-new-tokens 128 --methods "plain,union,$others" \
    "${draft_model[@]}"
measure baselines-sampled bench --questions "$questions" --limit 16 --max-new-tokens 128 --temperature 0.7 \
    --methods "plain,union,typical,transformers${draft:+,assisted}" "${draft_model[@]}"

measure ablate-tree ablate tree
