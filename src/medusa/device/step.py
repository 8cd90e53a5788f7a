"""The Medusa step, whole: draft a fixed tree, verify it in one pass, accept a path, keep it.

`medusa_step` is one function of tensors. It waits for nothing and asks the host nothing, so it can be captured once as
a CUDA graph and replayed for every step. Rows that are idle are computed too: what they write lies past what their slot
holds, whoever filled it. Plain decoding is the same step for a tree of the root alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medusa.decoding.heads_drafter import HeadsDrafter
from medusa.device import accept
from medusa.device.noise import compiled_gumbel_noise, gumbel_noise
from medusa.device.shape import FixedShape
from medusa.device.slots import Needs, Slots
from medusa.engines.kv_cache import DeviceCursor
from medusa.engines.transformers import TransformersBackend
from medusa.heads.module import HeadsRunner, Tilt

# Columns of what the host sends: 1 or 0, how deep a draft may be, tokens in the cache, and the chain.
ACTIVE, ROOM, LENGTH, CHAIN = 0, 1, 2, 3


def medusa_step(
    backend: TransformersBackend,
    heads: HeadsRunner | None,
    shape: FixedShape,
    slots: Slots,
    sent: Tensor,
    used: int,
    needs: Needs,
) -> Tensor:
    """One step of B rows, which are the first slots.

    Args:
        heads: None where the tree is the root alone.
        slots: read, and changed to what holds after the step.
        sent: int64 [B, 3 + C] from the host; -1 in the chain is no token.
        used: places that attention looks at: all lengths + N fit.
        needs: of the rows.

    Returns:
        int64 [B, 2 + N]: the last accepted node, the next root, and the tokens of the draft.
    """
    batch = len(sent)
    active, room = sent[:, ACTIVE].bool(), sent[:, ROOM]
    lengths = sent[:, LENGTH]

    # draft
    noise = None
    if needs.exact:
        # The root is the token at position `lengths`; what follows a node at depth d is the token at lengths + 1 + d.
        ahead = lengths[:, None] + 1 + torch.arange(shape.depth + 1, device=lengths.device)
        noise_of = compiled_gumbel_noise() if backend.compiled and backend.on_gpu else gumbel_noise
        noise = noise_of(slots.seeds[:batch, None].expand_as(ahead), ahead, backend.vocab_size)  # [B, D + 1, V]
    guessed = draft(heads, slots.features[:batch], slots.roots[:batch], shape, slots, noise)
    drafted = torch.cat([guessed, sent[:, CHAIN : CHAIN + shape.chain]], dim=1)  # [B, N]
    tokens = drafted.clamp_min(0)

    # verify
    depths = shape.depths.expand(batch, -1)
    places = lengths[:, None] + torch.arange(len(shape), device=lengths.device)
    masks = backend.masks.make_on_device(lengths, depths, shape.ancestors, used)
    positions = (lengths[:, None] + depths).clamp_max(backend.max_length - 1)  # past it there is nothing to accept
    logits, features = backend.device_pass(
        tokens, positions, masks, DeviceCursor(places, used, static=backend.compiled)
    )

    # accept
    scores = None
    if needs.penalty:
        logits = accept.penalised(logits, tokens, shape, slots)
    if needs.exact or needs.typical:
        scores = logits.float() / slots.setting("temperature", batch).float()
        scores = accept.filtered(scores, slots) if needs.filters else scores
    chosen = accept.choose(logits, scores, shape, slots, noise)  # [B, N]
    right = chosen[:, shape.above] == drafted  # this token is what plain decoding has here
    best = depths.double()  # the deepest accepted node is kept
    if needs.typical:
        assert scores is not None
        likely, log_p = accept.likely(scores, tokens, shape, slots)
        typical = slots.typical[:batch, None]
        right = torch.where(typical, likely & (drafted >= 0), right)
        best = torch.where(typical, best + log_p.clamp_min(-1e6) * 1e-9, best)  # among equals the likeliest
    right[:, 0] = True
    right = right & (depths <= room[:, None])
    accepted = ~(~right[:, None, :] & shape.ancestors).any(-1)  # all of its path is right
    last = torch.where(accepted, best, -torch.inf).argmax(-1)  # [B]
    row = torch.arange(batch, device=last.device)
    following = chosen[row, last]

    # keep
    path = shape.paths[last]  # [B, D + 1]
    backend.cache.device_keep(lengths, path)
    if needs.penalty:
        new = torch.cat([tokens.gather(1, path), following[:, None]], dim=1)
        slots.seen[:batch] |= torch.zeros_like(slots.seen[:batch]).scatter_(1, new, True) & active[:, None]
    slots.roots[:batch] = torch.where(active, following, slots.roots[:batch])
    slots.features[:batch] = torch.where(active[:, None], features[row, last], slots.features[:batch])
    return torch.cat([last[:, None], following[:, None], drafted], dim=1)


def draft(
    heads: HeadsRunner | None,
    features: Tensor,
    roots: Tensor,
    shape: FixedShape,
    slots: Slots,
    noise: Tensor | None,
) -> Tensor:
    """The tokens [B, M] of the heads' tree, from the features [B, F*H] of the last token and the root [B]. Rows of
    `slots` that draw by `noise` [B, D + 1, V] are drafted for by it."""
    tokens = roots[:, None]
    if heads is None:
        return tokens
    parents, drafted = torch.zeros_like(tokens), [tokens]
    state = heads.begin(features.to(heads.dtype))
    for k, level in enumerate(shape.levels, start=1):
        tilt = None if noise is None else tilted(heads, slots, noise[:, k - 1])
        _, top, state = heads.guess(k, state, parents, tokens, level.width, tilt)  # [B, M or 1, width]
        tokens = top.expand(-1, tokens.shape[1], -1)[:, level.places, level.ranks]
        parents = level.places.expand(len(roots), -1)
        drafted.append(tokens)
    return torch.cat(drafted, dim=1)[:, shape.order]


def tilted(heads: HeadsRunner, slots: Slots, noise: Tensor) -> Tilt:
    """How the guesses of a level are ranked, by the noise [B, V] of its position: see `HeadsDrafter`."""
    batch, exact = len(noise), slots.exact[: len(noise)]
    factors = HeadsDrafter.sureness / slots.setting("temperature", batch).flatten().float()
    drawn = noise if heads.draft_ids is None else noise[:, heads.draft_ids]
    return Tilt(
        torch.where(exact, factors, 1.0),
        torch.where(exact[:, None], HeadsDrafter.sureness * drawn.float(), 0.0),
    )
