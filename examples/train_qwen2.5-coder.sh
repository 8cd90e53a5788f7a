#!/usr/bin/env bash
# Heads for Qwen2.5-Coder-Instruct as those that ship, from nothing but the model: examples/train_qwen2.5-coder.sh 0.5b|1.5b [DIR]
#
# Those that ship were made so on 2 cores of an Intel Xeon with AVX-512 and AMX: 64 conversations at a time are written at 250
# tokens/s by the 1.5b and 480 by the 0.5b, and heads learn from 1,200 and 1,800 positions/s. So it takes some 65 and 35
# minutes. More text would make them better. Disk: 6 GB for 1.5b, 3 GB for 0.5b. A run that was killed goes on when the script
# runs again.
set -euo pipefail
size="${1:?0.5b or 1.5b}"
dir="${2:-qwen2.5-coder-$size-run}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

case "$size" in
    0.5b) settings=(text.tokens=532000) ;;
    1.5b) settings=(text.tokens=569000) ;;
    *) echo "give 0.5b or 1.5b, not $size" >&2; exit 2 ;;
esac
settings+=(engine.dtype=int8 engine.slots=64 heads.mlp_width=1024 heads.weights=int8)
settings+=(training.batch_size=512 training.distillation=1.0 training.epochs=3)
"$root/scripts/get-model" "qwen2.5-coder-$size"
resume=()
if [[ -f "$dir/run.yaml" ]]; then resume=(--resume); fi
"$root/.venv/bin/medusa" train --model "qwen2.5-coder-$size" --out "$dir" "${settings[@]}" "${resume[@]}"
