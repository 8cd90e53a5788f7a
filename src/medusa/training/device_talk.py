"""Conversations side by side on one device, hundreds of them: what `talk.talk_in_slots` does, without waiting.

All texts stand in one table of tokens on the device, row b of it in slot b. A step feeds each row the token at its
position and writes the next one, which is either given already (a prompt is fed token by token, while others write) or
chosen there and then. Nothing in a step depends on the host, so on CUDA it is one graph. The host looks at the table
every few steps, while the device is at the next ones; what a row wrote past its end is overwritten.

Sampling is by the Gumbel-max trick with noise that depends on (seed, position, token) alone, so that a conversation is
the same whichever others run beside it, but for rounding. It is not the noise of `decoding/sampling.py`, and a token is
drawn from the best 512 at most: of a flat distribution whose `top_p` would keep more, the rest is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from medusa.decoding.sampling import Sampling
from medusa.decoding.stepper import Request
from medusa.device import capture
from medusa.device.capture import Captured, changing_rope
from medusa.device.noise import signed
from medusa.engines.flash_attention import FlashAttention
from medusa.engines.kv_cache import DeviceCursor
from medusa.engines.protocol import Backend
from medusa.engines.transformers import TransformersBackend
from medusa.errors import UsageError
from medusa.steppers import on_one_gpu
from medusa.training.talk import LoopWatch, Reply, Talk, Transcript, Turn, next_turn

STEPS = 8  # between two looks
BUCKET = 128  # attention sees a multiple of so many places
CANDIDATES = 512  # tokens that one is drawn from, at the most


def runs_on_device(backend: Backend) -> TransformersBackend | None:
    """The backend, where conversations run on its device; None where they run by `talk_in_slots`. Tells people where a
    GPU is not used so."""
    gpu = on_one_gpu(backend)
    if gpu is None or not (reason := refusal(gpu)):
        return gpu
    _warn(f"conversations run one pass at a time, not as one graph on the device: {reason}")
    return None


def _warn(text: str) -> None:
    """What makes a GPU slower than it could be."""
    print(text, file=sys.stderr, flush=True)


def refusal(backend: TransformersBackend) -> str:
    """Why a step of this model cannot be the same kernels each time; "" if it can."""
    if backend.compiled:
        return "its layers are compiled one by one"
    return changing_rope(backend.model)


# --- on the device ----------------------------------------------------------------------------------------------------


class Edit(NamedTuple):
    """A row as it continues: fed from `position` on, of a text whose tokens from there on are `tokens`."""

    row: int
    position: int
    tokens: list[int]
    sampling: Sampling


class Look(NamedTuple):
    """Tokens [B, STEPS] on their way to the host."""

    tokens: Tensor
    arrived: torch.cuda.Event | None

    def wait(self) -> list[list[int]]:
        if self.arrived is not None:
            self.arrived.synchronize()
        rows: list[list[int]] = self.tokens.tolist()
        return rows


class DeviceRows:
    """The table: B texts, one in each slot, and how each continues. The backend is nobody else's meanwhile."""

    def __init__(self, backend: TransformersBackend) -> None:
        size, device = backend.num_slots, backend.device
        self._backend, self._device = backend, device
        self._last = backend.max_length - 1  # the last token of a text is never fed
        backend.cache.reserve(backend.max_length)  # not stacked, which takes twice the memory
        self._steps = Captured(device, refused=capture.refusal(backend.model))
        self.tokens = torch.zeros(size, backend.max_length + 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(size, dtype=torch.int64, device=device)  # of the token that is fed next
        self.known = torch.zeros_like(self.position)  # so many tokens of the text are given
        self.moving = torch.zeros_like(self.position)  # 0: nobody needs the row
        self.seed = torch.zeros_like(self.position)
        self.temperature = torch.zeros(size, dtype=torch.float32, device=device)
        self.top_p = torch.ones_like(self.temperature)
        self._ahead = torch.arange(1, STEPS + 1, device=device)
        self._straight = torch.zeros_like(self.position)[:, None]  # a text is a tree of one node a pass
        self._itself = torch.ones(1, 1, dtype=torch.bool, device=device)
        self.flash = FlashAttention(backend, self.position)
        self._graphs_refused = False  # and people know
        if self.flash.refused and device.type == "cuda":
            _warn(f"conversations attend by masks, not by flash attention: {self.flash.refused}")

    @torch.inference_mode()
    def write(self, edits: list[Edit], idle: list[int]) -> None:
        """Rows that are fed anew, and such as nobody needs any more."""
        if idle:
            self.moving[self._sent(np.array(idle))] = 0
        if not edits:
            return
        rows = self._sent(np.array([edit.row for edit in edits]))
        counts = [len(edit.tokens) for edit in edits]
        where = np.repeat([edit.row for edit in edits], counts)
        places = np.concatenate([np.arange(e.position, e.position + n) for e, n in zip(edits, counts, strict=True)])
        values = np.array([token for edit in edits for token in edit.tokens])
        self.tokens[self._sent(where), self._sent(places)] = self._sent(values)
        positions = np.array([edit.position for edit in edits])
        self.position[rows] = self._sent(positions)
        self.known[rows] = self._sent(positions + np.array(counts))
        self.seed[rows] = self._sent(np.array([signed(edit.sampling.seed or 0) for edit in edits]))
        self.temperature[rows] = self._sent(np.array([e.sampling.temperature for e in edits], dtype=np.float32))
        self.top_p[rows] = self._sent(np.array([e.sampling.top_p for e in edits], dtype=np.float32))
        self.moving[rows] = 1

    def _sent(self, values: np.ndarray) -> Tensor:
        """On the device, without a wait for what it is at."""
        tensor = torch.from_numpy(values)
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor

    @torch.inference_mode()
    def run(self, reach: int) -> Look:
        """STEPS steps, in which rows come no further than to `reach` places; the tokens after those that rows stood at.
        On CUDA this returns before they are done."""
        used = min(-(-reach // BUCKET) * BUCKET, self._backend.capacity)
        begin = self.position.clone()
        with self.flash.used():
            for _ in range(STEPS):
                self._steps.run(used, lambda: self.step(used), self._standing)
        if self._steps.refused and not self._graphs_refused:
            self._graphs_refused = True
            _warn(f"the steps of conversations run one by one, not as a graph: {self._steps.refused}")
        written = self.tokens.gather(1, (begin[:, None] + self._ahead).clamp_max_(self._last + 1))
        if self._device.type != "cuda":
            return Look(written, None)
        host, arrived = torch.empty(written.shape, dtype=written.dtype, pin_memory=True), torch.cuda.Event()
        host.copy_(written, non_blocking=True)
        arrived.record(torch.cuda.current_stream(self._device))
        return Look(host, arrived)

    def _standing(self) -> Callable[[], None]:
        """Takes back what a step that was run to warm up has changed: what it wrote is written once more."""
        before = self.position.clone()

        def back() -> None:
            self.position.copy_(before)

        return back

    def step(self, used: int) -> Tensor:
        """One token further, in all rows that move."""
        at = self.position[:, None]
        fed = self.tokens.gather(1, at)
        masks = self._backend.masks.make_on_device(self.position, self._straight, self._itself, used)
        logits, _ = self._backend.device_pass(fed, at, masks, DeviceCursor(at, used))
        chosen = choose(logits[:, -1], self.temperature, self.top_p, self.seed, self.position + 1)
        after = at + 1
        free = (after >= self.known[:, None]) & (self.moving[:, None] > 0)
        self.tokens.scatter_(1, after, torch.where(free, chosen[:, None], self.tokens.gather(1, after)))
        return self.position.add_(self.moving).clamp_max_(self._last)


def choose(logits: Tensor, temperature: Tensor, top_p: Tensor, seed: Tensor, place: Tensor) -> Tensor:
    """The next token of each row [B] from logits [B, V]: the best where the temperature is 0, else one drawn. `place`
    [B] is where in its text it will stand."""
    best = logits.argmax(-1)
    scale = torch.where(temperature > 0, temperature, 1.0)[:, None]
    values, ids = logits.topk(min(CANDIDATES, logits.shape[-1]), dim=-1)  # in order
    scores = values.float() / scale
    mass = (scores - (logits.float() / scale).logsumexp(-1, keepdim=True)).exp()
    better = mass.cumsum(-1) - mass
    dropped = (better >= top_p[:, None]) & (top_p[:, None] < 1)
    dropped[:, 0] = False
    noisy = (scores.double() + gumbel(seed, place, ids)).masked_fill(dropped, -torch.inf)
    drawn = ids.gather(1, noisy.argmax(-1, keepdim=True)).squeeze(1)
    return torch.where(temperature > 0, drawn, best)


def gumbel(seed: Tensor, place: Tensor, ids: Tensor) -> Tensor:
    """Gumbel noise [B, C] for tokens `ids` [B, C] of rows whose `seed` and `place` are [B]: a function of the three."""
    words = _mixed(_mixed(_mixed(seed) + place)[:, None] + ids)
    uniform = ((_shifted(words, 12)).double() + 0.5) * 2.0**-52  # in (0, 1), both ends excluded
    return -torch.log(-torch.log(uniform))


def _mixed(words: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014) after one step of its counter."""
    words = words + (0x9E3779B97F4A7C15 - 2**64)
    words = (words ^ _shifted(words, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    words = (words ^ _shifted(words, 27)) * (0x94D049BB133111EB - 2**64)
    return words ^ _shifted(words, 31)


def _shifted(words: Tensor, by: int) -> Tensor:
    """To the right, zeros coming in: 64-bit words are signed here."""
    return (words >> by) & ((1 << (64 - by)) - 1)


# --- on the host ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Text:
    """A conversation under way, in one turn of it."""

    number: int
    talk: Talk
    tokens: list[int]
    begin: int  # of what the model writes in this turn
    limit: int  # tokens of it
    ends: frozenset[int]
    position: int  # where the row will stand when the next steps begin
    watch: LoopWatch = field(default_factory=LoopWatch)

    def add(self, tokens: list[int]) -> Reply | None:
        """Adds what the model wrote, up to where the turn ends; the whole reply then."""
        for token in tokens:
            self.tokens.append(token)
            looped = self.watch.push(token)
            count = len(self.tokens) - self.begin
            reason = "stop" if token in self.ends else "length" if count >= self.limit else "loop" if looped else ""
            if reason:
                return Reply(self.tokens[self.begin :], reason)
        return None


def talk_on_device(
    backend: TransformersBackend,
    talks: Iterable[tuple[int, Talk]],
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Iterator[tuple[int, Transcript]]:
    """As `talk_in_slots`; `on_tokens` is called after each few steps.

    Raises:
        UsageError: a turn asks for more than temperature and top-p, or has no room; see `Request.check`.
    """
    table = DeviceRows(backend)
    last = backend.max_length - 1
    queue = iter(talks)
    free = list(range(backend.num_slots))[::-1]
    running: dict[int, _Text] = {}
    edits: list[Edit] = []
    ended: list[tuple[int, Transcript]] = []

    def take_turn(slot: int, number: int, talk: Talk, before: list[int], reply: Reply | None) -> None:
        """Starts the conversation's next turn, or ends it."""
        turn = next_turn(talk, reply)
        if isinstance(turn, Transcript):
            running.pop(slot, None)
            free.append(slot)
            ended.append((number, turn))
            return
        fed = max(0, len(before) - 1)  # what stands before the last token is in the cache
        tokens = [*(before[:-1] if turn.drop_last else before), *turn.tokens]
        Request(tokens, turn.sampling, turn.max_new_tokens).check(backend.max_length)
        position = min(fed, len(tokens) - 1)
        limit = min(turn.max_new_tokens, backend.max_length - len(tokens))
        running[slot] = _Text(number, talk, tokens, len(tokens), limit, turn.ends, position)
        edits.append(Edit(slot, position, tokens[position:], _checked(turn)))

    flight: tuple[Look, dict[int, tuple[_Text, int]]] | None = None
    while True:
        while free and (item := next(queue, None)) is not None:
            take_turn(free.pop(), *item, [], None)
            yield from ended  # at once: there may be no end of conversations that are over before they begin
            ended.clear()
        table.write(edits, free)
        edits.clear()
        ahead = None
        if running:
            look = table.run(min(last, max(text.position for text in running.values()) + STEPS - 1) + 1)
            ahead = look, {slot: (text, text.position) for slot, text in running.items()}
            for text in running.values():
                text.position = min(last, text.position + STEPS)
        if flight is not None:
            rows, count = flight[0].wait(), 0
            for slot, (text, position) in flight[1].items():
                if running.get(slot) is not text:
                    continue  # it ended in the steps before, and what it wrote since is nobody's
                before = len(text.tokens)
                reply = text.add(rows[slot][max(0, text.begin - 1 - position) :])
                count += len(text.tokens) - before
                if reply is not None:
                    take_turn(slot, text.number, text.talk, text.tokens, reply)
            on_tokens(count)
            yield from ended
            ended.clear()
        if ahead is None and not running:
            return
        flight = ahead


def _checked(turn: Turn) -> Sampling:
    """How a turn samples. Raises UsageError for what the device does not do."""
    sampling = turn.sampling.seeded()
    if sampling.top_k or sampling.min_p or sampling.adjusts:
        raise UsageError("on a device conversations are sampled by temperature and top_p alone")
    return sampling
