"""One layer's attention over N nodes and L places, in the ways there are: microseconds of each.

expanded   scaled_dot_product_attention with keys and values repeated for each head: what transformers does
grouped    the same without repeating: the heads of a group are folded into the queries, [B, KV heads, G*N, D]
matmul     grouped, as two products and a softmax
flex       FlexAttention, compiled, with a block mask
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_check.report import Options, Part
from gpu_check.shapes import SHAPES, TINY, Shape
from gpu_check.timing import free_memory, replayed, spread
from medusa.errors import shortened

NODES = (1, 8, 64)
PLACES = (512, 2048)
CALLS = 20  # in a graph, each with keys and values of its own
FLEX_NODES = (64,)  # each size takes seconds to compile
AGREE = 2e-2  # by how much results in bfloat16 may differ

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # queries [1, H, N, D], keys and values [1, K, L, D], mask [1, 1, N, L]


def expanded(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    group = queries.shape[1] // keys.shape[1]
    if group > 1:
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    return torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


def grouped(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    folded, group = _folded(queries, keys)
    wide = mask.repeat(1, 1, group, 1)
    out = torch.nn.functional.scaled_dot_product_attention(folded, keys, values, attn_mask=wide)
    return out.view(queries.shape)


def matmul(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    folded, group = _folded(queries, keys)
    scores = folded @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5 + mask.repeat(1, 1, group, 1)
    return (torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype) @ values).view(queries.shape)


def _folded(queries: Tensor, keys: Tensor) -> tuple[Tensor, int]:
    """[1, H, N, D] -> [1, K, G*N, D]: heads of one group lie side by side, so this is a view."""
    batch, heads, count, size = queries.shape
    group = heads // keys.shape[1]
    return queries.reshape(batch, keys.shape[1], group * count, size), group


def flex(allowed: Tensor, device: str, compile: bool) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention for one mask [N, L]."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(batch: Tensor, head: Tensor, query: Tensor, place: Tensor) -> Tensor:
        return allowed[query, place]

    blocks = create_block_mask(visible, B=None, H=None, Q_LEN=allowed.shape[0], KV_LEN=allowed.shape[1], device=device)
    run: Any = torch.compile(flex_attention, dynamic=False) if compile else flex_attention

    def call(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = run(queries, keys, values, block_mask=blocks, enable_gqa=True)
        return out

    return call


def tree_mask(nodes: int, places: int, device: str) -> Tensor:
    """[N, L] bool: the text, and a binary tree of nodes at its end."""
    allowed = torch.ones(nodes, places, dtype=torch.bool)
    own = torch.eye(nodes, dtype=torch.bool)
    for i in range(1, nodes):
        own[i] |= own[(i - 1) // 2]
    allowed[:, places - nodes :] = own
    return allowed.to(device)


def inputs(shape: Shape, allowed: Tensor, device: str) -> Inputs:
    """Random states of one layer in bfloat16."""
    nodes, places = allowed.shape
    kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    queries = torch.randn(1, shape.heads, nodes, shape.head_size, **kind)
    keys, values = (torch.randn(1, shape.kv_heads, places, shape.head_size, **kind) for _ in range(2))
    mask = torch.zeros(1, 1, nodes, places, **kind).masked_fill_(~allowed, torch.finfo(torch.bfloat16).min)
    return queries, keys, values, mask


def attention_part(part: Part, options: Options) -> None:
    """Every way for every size; FlexAttention last, as it may fail or take long."""
    shapes = TINY if options.tiny else {name: SHAPES[name] for name in ("7B", "1B")}
    nodes, places = ((1, 4), (32,)) if options.tiny else (NODES, PLACES)
    sizes = [(name, count, length) for name in shapes for count in nodes for length in places]
    for name, count, length in sizes:
        for way in (expanded, grouped, matmul):
            key = f"{name}/{count} nodes/{length} places/{way.__name__}"
            part.measure(key, partial(_measure, options, shapes[name], count, length, way), needs=0.5)
        free_memory(options.device)
    for name, count, length in sizes:
        if not options.tiny and (count not in FLEX_NODES or name != "7B"):
            continue
        key = f"{name}/{count} nodes/{length} places/flex"
        part.measure(key, partial(_try_flex, options, shapes[name], count, length), needs=8.0)
        free_memory(options.device)


def _try_flex(options: Options, shape: Shape, nodes: int, places: int) -> Any:
    """FlexAttention may be refused by this torch or device, which is no fault of ours."""
    try:
        return _measure(options, shape, nodes, places, None)
    except Exception as error:  # noqa: BLE001  # whatever it was is reported
        return {"refused": shortened(f"{type(error).__name__}: {error}", 300)}


@torch.inference_mode()
def _measure(options: Options, shape: Shape, nodes: int, places: int, way: Callable[..., Tensor] | None) -> Any:
    """Microseconds of a call, and whether it agrees with `expanded`."""
    device = options.device
    allowed = tree_mask(nodes, places, device)
    sets = [inputs(shape, allowed, device) for _ in range(2 if options.tiny else CALLS)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FlexAttention says that it is not compiled
        run = way or flex(allowed, device, compile=not options.tiny)
        differs = float((run(*sets[0]).float() - expanded(*sets[0]).float()).abs().max())
        seconds, graph = replayed([partial(run, *states) for states in sets], device)
    return {
        "us": spread(seconds, unit=1e6),
        "graph": graph,
        "differs_by": round(differs, 5),
        "agrees": differs < AGREE,
    }
