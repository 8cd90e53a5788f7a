"""Weight-only int8: each linear layer's weights as int8 with one scale per output channel.

Activations stay in bfloat16, so tokens share no scale. On a CPU torch's packed kernel multiplies the int8 weights as
they are; elsewhere they are widened for each product, which saves memory only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """Stands in for an `nn.Linear` of weight [out, in]."""

    packed: Tensor  # [out, in] int8
    scale: Tensor  # [out]

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.float().abs().amax(dim=1).clamp_min(1e-12) / 127
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", torch.round(weight.float() / scale[:, None]).to(torch.int8))
        self.register_buffer("scale", scale.to(weight.dtype))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The rounded weights [out, in] in the dtype of the activations."""
        return self.packed.to(self.scale.dtype) * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            rows = x.reshape(-1, self.in_features).contiguous()
            out = torch._weight_int8pack_mm(rows, self.packed, self.scale).view(*x.shape[:-1], self.out_features)
        else:
            out = F.linear(x, self.packed.to(x.dtype)) * self.scale
        return out if self.bias is None else out + self.bias


def quantise(model: nn.Module) -> None:
    """Replaces every linear layer of `model` in place. A tied LM head is untied: the embeddings keep their dtype."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
