"""A stepper whose steps run whole on the device: `device/step.py`, captured for a few batch sizes and trees.

What the host does in a step: it sends how deep each draft may be and what the n-gram drafter proposes, replays the
graph, waits once, and reads which node was accepted, the next root and the draft.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from medusa.decoding.draft import MODEL, Draft, Drafter, NgramDrafter, NoDrafter, UnionDrafter
from medusa.decoding.heads_drafter import HeadsDrafter
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.stepper import Phases, Request, Row, Step
from medusa.device.capture import Captured, refusal
from medusa.device.nodes import NodesByTime
from medusa.device.shape import ROOT, FixedShape
from medusa.device.slots import Needs, Slots
from medusa.device.step import ACTIVE, CHAIN, LENGTH, medusa_step
from medusa.engines.protocol import MAX_NODES
from medusa.engines.transformers import TransformersBackend
from medusa.errors import UsageError

LONGEST_CHAIN = 8  # of the n-gram drafter
SIZES = (1, 8, 16, 32, 64)  # nodes that "auto" chooses from; a graph for each
CHAIN_GAIN = 0.8  # tokens that the n-gram drafter adds to a step, until it is known better


class DeviceStepper(ReferenceStepper):
    """See `Stepper`; for a transformers backend that has all of its model on one device.

    Args:
        drafter: none, heads with a fixed tree, n-grams, or a union of the two.
        nodes: of the tree, root and chain included; "auto" chooses among `SIZES` at each step.
        graphs: capture steps as CUDA graphs; of no effect on other devices.

    Raises:
        UsageError: a drafter that the step does not know, or more nodes than the backend takes.
    """

    backend: TransformersBackend

    def __init__(
        self, backend: TransformersBackend, drafter: Drafter, nodes: int | Literal["auto"], *, graphs: bool = True
    ) -> None:
        self._heads, self._ngrams = parts(drafter)
        super().__init__(backend, drafter, 1 if nodes == "auto" else nodes)
        self._budget: NodesByTime | None = None
        self._shapes: dict[int, FixedShape] = {}
        if nodes == "auto" and not isinstance(drafter, NoDrafter):
            self._budget = NodesByTime({n: self._gain(n) for n in SIZES}, self._measure)
        device = backend.device
        size = backend.hidden_size * (1 + len(backend.feature_layers))
        self._slots = Slots(backend.num_slots, backend.vocab_size, size, backend.model.dtype, device)
        self.captured = Captured(device, graphs, refusal(backend.model))
        self._moves = -1
        self._needs = Needs()
        pinned = device.type == "cuda"
        shape = backend.num_slots, CHAIN + LONGEST_CHAIN
        self._sent = torch.zeros(shape, dtype=torch.int64, pin_memory=pinned)
        self._table = self._sent.numpy()  # the same memory: rows of plain numbers are written faster so
        self._sent_on_device = self._sent.to(device) if pinned else self._sent
        self._read = torch.zeros(backend.num_slots * (2 + MAX_NODES), dtype=torch.int64, pin_memory=pinned)

    # --- as of any stepper --------------------------------------------------------------------------------------------

    def runs(self, request: Request) -> bool:
        return request.constraint is None and request.logprobs is None and not request.sampling.adjusts_output

    def start(self, slot: int, request: Request, held: int = 0) -> tuple[Row, Step]:
        if not self.runs(request):
            raise UsageError(
                "a step on the device knows no constraint, logprobs, bias nor penalty of output: use the reference"
            )
        return super().start(slot, request, held)

    def step(self, rows: Sequence[Row]) -> list[Step]:
        begun = time.perf_counter()
        batch = self._padded(max(row.slot for row in rows) + 1)
        self._needs = Needs.of(rows)
        nodes = self.nodes if self._budget is None else self._budget.choose(batch)
        assert isinstance(nodes, int)
        shape = self._shape(nodes)
        chains = self._send(rows, shape)
        drafted = time.perf_counter()
        out = self._run(batch, shape).tolist()
        verified = time.perf_counter()
        steps, gained = [], 0
        phases = Phases(drafted - begun, verified - drafted)
        for row in rows:
            last, following, *tokens = out[row.slot]
            path = shape.path_list[last]
            added = row.extend((*(tokens[node] for node in path[1:]), following))
            self.backend.set_length(row.slot, len(row.tokens) - 1)
            gained += len(path) - 1
            draft = self._drafted(shape, tokens, chains[row.slot])
            steps.append(Step.of(draft, path, added, row.finish_reason, phases))
        if self._budget is not None:
            self._budget.learn(nodes, gained / len(rows))
        return steps

    @torch.inference_mode()
    def _begin(self, slot: int, request: Request, logits: Tensor, features: Tensor) -> tuple[Row, Step]:
        row, step = super()._begin(slot, request, logits, features)
        self._slots.begin(row)
        self._ready(row.prompt_tokens + row.max_new_tokens + MAX_NODES)
        return row, step

    # --- the step -----------------------------------------------------------------------------------------------------

    def _send(self, rows: Sequence[Row], shape: FixedShape) -> dict[int, Draft | None]:
        """Writes what the host sends to the step. Returns what the n-gram drafter proposes for each slot."""
        self._table[:, ACTIVE] = 0
        self._send_lengths()
        chains: dict[int, Draft | None] = dict.fromkeys(row.slot for row in rows)
        if shape.chain and self._ngrams is not None:
            proposed = self._ngrams.propose(rows, shape.chain + 1)
            chains = {row.slot: draft for row, draft in zip(rows, proposed, strict=True)}
        for row in rows:
            chain = chains[row.slot]
            tokens = () if chain is None else chain.tokens[1:]
            self._table[row.slot, :LENGTH] = 1, row.room
            self._table[row.slot, CHAIN:] = [*tokens, *[-1] * (LONGEST_CHAIN - len(tokens))]
        return chains

    def _send_lengths(self) -> None:
        """Of all slots: the others may be somebody else's, whose text must stay as it is."""
        self._table[:, LENGTH] = [self.backend.length(slot) for slot in range(self.backend.num_slots)]

    @torch.inference_mode()
    def _run(self, batch: int, shape: FixedShape) -> Tensor:
        """One step of the first `batch` slots, by what was sent: int64 [batch, 2 + N] on the host."""
        longest = max(self.backend.length(slot) for slot in range(batch))
        self._ready(longest + len(shape))
        used = min(bucket(longest + len(shape)), self.backend.capacity)
        if self._sent_on_device is not self._sent:
            self._sent_on_device[:batch].copy_(self._sent[:batch], non_blocking=True)
        heads = self._heads.heads if self._heads is not None and shape.levels else None
        needs, slots, sent = self._needs, self._slots, self._sent_on_device[:batch]

        def function() -> Tensor:
            return medusa_step(self.backend, heads, shape, slots, sent, used, needs)

        out = self.captured.run((batch, len(shape), shape.chain, used, needs), function, slots.saved)
        if out.device.type != "cuda":
            return out
        read = self._read[: out.numel()].view_as(out)
        read.copy_(out, non_blocking=True)
        torch.cuda.current_stream(out.device).synchronize()
        return read

    def _ready(self, places: int) -> None:
        """Room for so many places. Where the cache has moved, by this or another stepper, all graphs are void."""
        self.backend.reserve(places)
        if self.backend.cache.moves != self._moves:
            self.captured.clear()
            self._moves = self.backend.cache.moves

    def _padded(self, rows: int) -> int:
        """Rows are computed in powers of two, so that few graphs serve all batches."""
        return min(1 << (rows - 1).bit_length(), self.backend.num_slots)

    def _drafted(self, shape: FixedShape, tokens: Sequence[int], chain: Draft | None) -> Draft:
        """What was verified, for people and pictures: without places of the chain that held no token."""
        tree, source = shape.tree, self._heads.name if self._heads is not None else MODEL
        links = () if chain is None else chain.probabilities[1:]
        count = len(tree) + len(links)
        return Draft(
            (tokens[0], *tokens[1:count]),
            shape.parents[:count],
            (*tree.probabilities, *links),
            (MODEL, *[source] * (len(tree) - 1), *[NgramDrafter.name] * len(links)),
        )

    # --- trees and times ----------------------------------------------------------------------------------------------

    def _shape(self, nodes: int) -> FixedShape:
        if nodes not in self._shapes:
            chain = 0 if self._ngrams is None else min(LONGEST_CHAIN, self._ngrams.length, nodes - 1)
            tree = ROOT
            if self._heads is not None:
                assert self._heads.tree is not None
                chain = min(chain, nodes // 2)
                tree = self._heads.tree.best(nodes - chain)
            self._shapes[nodes] = FixedShape(tree, chain, self.backend.device)
        return self._shapes[nodes]

    def _gain(self, nodes: int) -> float:
        """Tokens that a tree of so many nodes should add to a step."""
        shape = self._shape(nodes)
        return shape.tree.expected_tokens() - 1 + CHAIN_GAIN * shape.chain / LONGEST_CHAIN

    def time_step(self, batch: int, nodes: int, context: int, repeats: int = 20) -> float:
        """Median seconds of one whole step of `batch` rows after texts of `context` tokens, by the clock of the host.
        Slots must be free; what they then hold is noise.

        Raises:
            UsageError: slots that are in use or not there, or a context that does not fit.
        """
        if batch > self.backend.num_slots or any(self.backend.length(slot) for slot in range(batch)):
            raise UsageError(f"there are not {batch} free slots")
        if not 0 < context < self.backend.max_length:
            raise UsageError(f"the context must be from 1 to {self.backend.max_length - 1}, not {context}")
        try:
            if not self.backend.cache.stacks:  # the first pass makes the buffers, and a step is captured over them
                self.backend.extend(0, [0])
                self.backend.release(0)
            self._ready(context + nodes)
            with torch.inference_mode():
                self.backend.cache.fill_with_noise(batch, context)
                self._slots.features[:batch].normal_()
            for slot in range(batch):
                self.backend.set_length(slot, context)
            return self._measure(batch, nodes, repeats)
        finally:
            for slot in range(batch):
                self.backend.release(slot)

    def _measure(self, batch: int, nodes: int, repeats: int = 7) -> float:
        """Steps in which no row takes part: they take as long, and change nothing."""
        before = self._sent.clone()
        shape, seconds = self._shape(nodes), []
        self._sent.zero_()
        self._send_lengths()
        for number in range(repeats + 2):
            begun = time.perf_counter()
            self._run(batch, shape)
            if number >= 2:
                seconds.append(time.perf_counter() - begun)
        self._sent.copy_(before)
        return statistics.median(seconds)


def parts(drafter: Drafter) -> tuple[HeadsDrafter | None, NgramDrafter | None]:
    """What a drafter is made of. Raises UsageError for one that the step does not know."""
    if isinstance(drafter, NoDrafter):
        return None, None
    pieces: tuple[Drafter, ...] = drafter.drafters if isinstance(drafter, UnionDrafter) else (drafter,)
    heads = [part for part in pieces if isinstance(part, HeadsDrafter)]
    ngrams = [part for part in pieces if isinstance(part, NgramDrafter)]
    if len(heads) > 1 or len(ngrams) > 1 or len(heads) + len(ngrams) < len(pieces):
        raise UsageError(f"a step on the device drafts with heads and n-grams, not with {drafter.name}")
    if heads and heads[0].tree is None:
        raise UsageError("a step on the device needs heads with a fixed tree: use --tree static")
    return heads[0] if heads else None, ngrams[0] if ngrams else None


def bucket(places: int) -> int:
    """Places that attention looks at: a multiple of 256, and past 1,024 of a quarter of the power of two below."""
    step = max(256, 1 << max(0, (places - 1).bit_length() - 3))
    return -(-places // step) * step
