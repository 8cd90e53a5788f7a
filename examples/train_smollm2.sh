#!/usr/bin/env bash
# Heads for smollm2-135m as those that ship, from nothing but the model: examples/train_smollm2.sh [DIR]
#
# On an H100: 2.5 minutes of writing 8.6 million tokens, 1 of training, 20 GB of its memory. Those that ship were made there so, but
# that the clock ended both: writing after 140 s, training at step 3,734, where the learning rate had come down to a twentieth.
# On a GPU sums are rounded by what runs beside them, so text and heads come out a little different each time.
#
# Without a GPU a fifth of the text: on 2 cores with AVX-512 40 minutes of writing, 45 of training;
# 6 GB of disk. A run that was killed goes on when the script runs again.
set -euo pipefail
dir="${1:-smollm2-135m-run}"
bin="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)/.venv/bin"

settings=(training.distillation=1.0 text.max_length=1408)
if "$bin/python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    settings+=(engine.backend=transformers engine.device=cuda text.tokens=8600000 text.held_out=0.01
        training.batch_size=4096 training.epochs=3)
else  # in int8, because that is the fastest engine there
    settings+=(engine.dtype=int8 text.tokens=1700000 training.epochs=2)
fi
resume=()
if [[ -f "$dir/run.yaml" ]]; then resume=(--resume); fi
"$bin/medusa" train --model smollm2-135m --out "$dir" "${settings[@]}" "${resume[@]}"
