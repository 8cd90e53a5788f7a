"""Which slots of an engine are free, and which texts the free ones still hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medusa.engines.protocol import Backend


class Slots:
    """The slots of one engine, for all who decode on it.

    A slot that is given back may keep its text: a later prompt that begins alike is then read from where the two part.
    What follows has the bits that it would have after a prompt read anew, where the engine's passes of any width have.

    Args:
        kept: how many tokens free slots may hold together; the least recently used are emptied first. 0: none.
        lend: what slots in use hold of their prompts serves others too.
    """

    def __init__(self, backend: Backend, kept: int = 0, *, lend: bool = False) -> None:
        self.backend = backend
        self.kept = kept
        self.lend = lend
        self._used: dict[int, Sequence[int]] = {}  # the prompts that are read, or were, into slots
        self._free: dict[int, tuple[int, ...]] = dict.fromkeys(range(backend.num_slots), ())  # oldest use first

    @property
    def free(self) -> int:
        """How many there are."""
        return len(self._free)

    def take(self, prompt: Sequence[int]) -> tuple[int, int]:
        """A free slot, and how many of the first tokens of `prompt` it holds: never all, for the last one's logits
        decide what comes next. There must be a free one."""
        shared = {slot: _alike(text, prompt[:-1]) for slot, text in self._free.items()}
        empty = min((slot for slot, text in self._free.items() if not text), default=None)
        best = max(shared, key=shared.__getitem__)  # of equals the least recently used
        slot = best if shared[best] or empty is None else empty
        held, text = shared[slot], self._free[slot]
        lent = {used: self._lent(used, prompt) for used in self._used} if self.lend else {}
        lender = max(lent, key=lent.__getitem__, default=slot)
        if lent.get(lender, 0) > held:
            slot = next(iter(self._free)) if empty is None else empty
            self._empty(slot)
            held = lent[lender]
            self.backend.copy(lender, slot, held)
        elif not held and text:
            self.backend.release(slot)
        elif held < len(text):
            into = slot if empty is None else empty  # what is longer may be wanted again
            self.backend.copy(slot, into, held)
            slot = into
        del self._free[slot]
        self._used[slot] = prompt
        return slot, held

    def clear(self) -> None:
        """Empties all free slots."""
        for slot in list(self._free):
            self._empty(slot)

    def give_back(self, slot: int, text: Sequence[int]) -> None:
        """A slot is free again; it holds the beginning of `text`, which is kept if there is room."""
        self._used.pop(slot, None)
        self._free[slot] = tuple(text[: self.backend.length(slot)])
        held = sum(map(len, self._free.values()))
        for old, kept in list(self._free.items()):
            if held > self.kept or not kept:
                held -= len(kept)
                self._empty(old)

    def leave(self, slot: int) -> None:
        """A slot that was taken and turns out to be in use by others, who have `Slots` of their own: its text stays."""
        self._used.pop(slot, None)
        self._free[slot] = ()

    def _lent(self, slot: int, prompt: Sequence[int]) -> int:
        """How many of the first tokens of `prompt` a slot in use holds."""
        return min(_alike(self._used[slot], prompt[:-1]), self.backend.length(slot))

    def _empty(self, slot: int) -> None:
        self._free[slot] = ()
        if self.backend.length(slot):
            self.backend.release(slot)


def _alike(text: Sequence[int], prompt: Sequence[int]) -> int:
    """How many first tokens two texts share."""
    return next((i for i, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), min(len(text), len(prompt)))
