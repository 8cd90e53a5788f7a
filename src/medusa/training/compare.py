"""Several heads on the held-out text of one run: what each would give, by the rows that the run's own were measured on.

python -m medusa.training.compare RUN HEADS...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from medusa.errors import UsageError
from medusa.files import write_whole
from medusa.heads.config import vocabulary_hash
from medusa.heads.file import load_heads, read_config
from medusa.training.calibrate import measure
from medusa.training.config import load_config
from medusa.training.resume import RUN_FILE, TEXT_FILE
from medusa.training.run import feature_layers, load_model
from medusa.training.text import read_text, split

COMPARED = "compared.json"


def compare(run: Path, heads: Sequence[Path]) -> dict[str, dict[str, object]]:
    """Directory of heads -> accuracy and tokens per step; also written to RUN/compared.json.

    Raises:
        UsageError: there is no such run, or heads read other layers than its own.
        MedusaError: there are no heads, or they belong to another model.
    """
    config = load_config(run / RUN_FILE, {})
    sources = config.text.data or (str(run / TEXT_FILE),)
    text = replace(config.text, data=sources)  # written already, so one slot is enough
    lm = load_model(config.model_copy(update={"text": text}))
    _, held_out = split(read_text(sources, lm, text.max_length, print), text.held_out)
    compared, layers = {}, feature_layers(config.heads, lm.backend.num_layers)
    for directory in heads:
        if (read := read_config(directory).feature_layers) != layers:
            raise UsageError(
                f"{directory} reads layers {read}, those of {run} {layers}: compare heads that read the same"
            )
        module = load_heads(directory, lm.backend.base_weights(), vocab_hash=vocabulary_hash(lm.tokenizer.get_vocab()))
        compared[str(directory)] = measure(module, lm.backend, held_out).facts()
    write_whole(run / COMPARED, json.dumps(compared, indent=1) + "\n")
    return compared


if __name__ == "__main__":
    print(json.dumps(compare(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]), indent=1))
