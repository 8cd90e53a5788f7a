"""Matrices of heads in 8 bits on disk: each group of 64 inputs of an output has a scale, in bfloat16.

The native engine packs in just this way, so what it makes of such a file is what the file holds.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64
SCALES = ".scales"


def packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each matrix [O, I] as int8, and `<name>.scales` [O, I / 64] beside it; all else as it is."""
    out = {}
    for name, tensor in tensors.items():
        if not _is_matrix(tensor):
            out[name] = tensor
            continue
        groups = _grouped(tensor.float())  # [O, I / 64, 64]
        scales = (groups.abs().amax(-1) / 127).to(torch.bfloat16)
        inverse = torch.where(scales > 1e-30, 1 / scales.float(), 0.0).unsqueeze(-1)
        whole = (groups * inverse).round().clamp(-127, 127).to(torch.int8)
        out[name] = whole.flatten(1)[:, : tensor.shape[1]].contiguous()
        out[name + SCALES] = scales
    return out


def unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse, matrices in float32, which holds every product. Scales that fit no matrix stay as they are."""
    out, used = {}, set()
    for name, tensor in tensors.items():
        scales = tensors.get(name + SCALES)
        if scales is None or tensor.dtype != torch.int8 or tensor.ndim != 2:
            out[name] = tensor
        elif scales.shape == (tensor.shape[0], -(-tensor.shape[1] // GROUP)):
            values = _grouped(tensor.float()) * scales.float().unsqueeze(-1)
            out[name] = values.flatten(1)[:, : tensor.shape[1]].contiguous()
            used.add(name + SCALES)
    return {name: tensor for name, tensor in out.items() if name not in used}


def other_matrix(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a matrix that is not in 8 bits, or has no scales."""
    for name, tensor in sorted(tensors.items()):
        is_packed = tensor.dtype == torch.int8 and name + SCALES in tensors
        if tensor.ndim == 2 and not is_packed and not name.endswith(SCALES):
            return name
    return None


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim == 2


def _grouped(matrix: Tensor) -> Tensor:
    """[O, I] -> [O, I / 64, 64], the last group filled with zeros."""
    filled = F.pad(matrix, (0, -matrix.shape[1] % GROUP))
    return filled.reshape(len(matrix), -1, GROUP)
