#!/usr/bin/env bash
# Heads for Qwen2.5-Coder-Instruct as those that ship, from nothing but the model: examples/train_qwen2.5-coder.sh 0.5b|1.5b [DIR]
#
# Those that ship were made so on 2 cores of an Intel Xeon with AVX-512 and AMX, beside much else, in some two hours; the
# numbers of tokens are what found time there, and more would make them better. Disk: 1 GB for 0.5b, 2 GB for 1.5b. A run
# that was killed goes on when the script runs again.
set -euo pipefail
size="${1:?0.5b or 1.5b}"
dir="${2:-qwen2.5-coder-$size-run}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

case "$size" in
    0.5b) settings=(text.tokens=130000 training.batch_size=256) ;;
    1.5b) settings=(text.tokens=180000 training.batch_size=512) ;;
    *) echo "give 0.5b or 1.5b, not $size" >&2; exit 2 ;;
esac
settings+=(engine.dtype=int8 heads.mlp_width=1024 heads.weights=int8 training.distillation=1.0 training.epochs=3)
"$root/scripts/get-model" "qwen2.5-coder-$size"
resume=()
if [[ -f "$dir/run.yaml" ]]; then resume=(--resume); fi
"$root/.venv/bin/medusa" train --model "qwen2.5-coder-$size" --out "$dir" "${settings[@]}" "${resume[@]}"
