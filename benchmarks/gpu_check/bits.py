"""A base of few bits: texts of the real model in 8 and 4 bits, and steps of a large shape in 8.

The real model is read as `medusa.load` reads it, by whichever library is there. Random weights of the large shape are
made in bfloat16 and then packed by torchao, layer by layer.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

from torch import nn

from gpu_check.model import PROMPTS, has_model, load, texts_of
from gpu_check.report import Options, Part
from gpu_check.shapes import random_shape_steps
from gpu_check.timing import free_memory
from medusa.decoding.sampling import GREEDY
from medusa.errors import UsageError

LARGE = "33B"
DTYPES = ("int8", "int4")


def bits_part(part: Part, options: Options) -> None:
    if find_spec("torchao") is None:
        part.note("steps of a large shape in 8 bits want torchao, which is not installed")
    else:
        name = "tiny" if options.tiny else LARGE
        part.attempt(name, partial(random_shape_steps, part, options, name, in_eight_bits), needs=10.0)
        free_memory(options.device)
    if not has_model(part, options):
        return
    for dtype in DTYPES:
        part.measure(dtype, partial(_texts, part, options, dtype), needs=8.0)
        free_memory(options.device)


def in_eight_bits(model: nn.Module) -> None:
    """Packs the layers' products; embeddings and LM head stay, as in transformers' loading."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")


def _texts(part: Part, options: Options, dtype: str) -> dict[str, Any] | None:
    """Plain and with drafts. Nothing where the library for it is not there."""
    try:
        lm = load(options, dtype=dtype)
    except UsageError as error:
        part.note(str(error))
        return None
    prompts, tokens = (PROMPTS[:1], 8) if options.tiny else (PROMPTS[:4], 128)
    return texts_of(part, lm, prompts, tokens, GREEDY, ("plain", "union"))
