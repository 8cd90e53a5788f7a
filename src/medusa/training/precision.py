"""In which numbers a training computes: what is asked for, or what the machine does fast."""

from __future__ import annotations

import torch

# A step of the default heads took 1.7 s in float32 and 105 s in bfloat16 on a CPU with AVX2 only, which emulates it.
SLOW = (
    "training.precision=bfloat16 is asked for, but this machine has no instructions for bfloat16: "
    "training.precision=float32 is many times as fast here"
)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 by instructions of its own, as far as torch can tell."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())  # no CPU has AMX without it


def training_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What `training.precision` (auto, bfloat16 or float32) means on `device`."""
    half = has_bfloat16(device) if precision == "auto" else precision == "bfloat16"
    return torch.bfloat16 if half else torch.float32
