"""The KV cache of the transformers backend: slots in preallocated buffers, written in place.

transformers' own caches either copy everything at each step or assume that all rows of a batch have one length. Here
each row of a forward pass names its slot and its length; rows are written where they belong and read as a view.
The cache grows by doubling up to `max_length`, so a long context costs memory only when it is used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

FIRST_CAPACITY = 1024


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, each [slots, KV heads, capacity, head size]."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self.allocate(key_states), self.allocate(value_states)
        self.cache.moves += 1
        self.is_initialized = True

    def allocate(self, states: Tensor) -> Tensor:
        """An empty buffer for such states, of the cache's capacity."""
        _, heads, _, size = states.shape
        return states.new_zeros(self.cache.num_slots, heads, self.cache.capacity, size)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Writes [B, KV heads, N, head size] at the cache's cursor and returns all rows up to the used length."""
        if self.keys is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        cursor = self.cache.cursor
        return cursor.write(self.keys, key_states), cursor.write(self.values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.cursor.used, 0

    def get_seq_length(self) -> int:
        return self.cache.cursor.longest

    def get_max_length(self) -> int:
        return self.cache.max_length


class Cursor:
    """Where one forward pass writes: row b puts its N tokens into slot `slots[b]` at `lengths[b]`.

    `used` is how many places attention sees, the same for all rows; the mask hides what a row has not filled.
    `static` writes by index tensors alone, so that a compiled layer holds no number that changes from step to step.
    """

    def __init__(
        self, slots: Sequence[int], lengths: Sequence[int], tokens: int, used: int, *, static: bool = False
    ) -> None:
        self.slots, self.lengths = tuple(slots), tuple(lengths)
        self.tokens, self.used, self.static = tokens, used, static
        self.longest = max(lengths)
        first = 0 if static else self.slots[0]
        self.view = slice(first, first + len(self.slots))  # the slots, where they lie side by side
        self.consecutive = self.slots == tuple(range(self.view.start, self.view.stop))
        self._places: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def write(self, buffer: Tensor, states: Tensor) -> Tensor:
        """Stores [B, heads, N, size] and returns a view or copy [B, heads, used, size]."""
        if len(self.slots) == 1 and not self.static:
            start = self.lengths[0]
            buffer[self.slots[0], :, start : start + self.tokens] = states[0]
        else:
            rows, places = self.index(buffer.device)
            buffer[rows, :, places] = states.transpose(1, 2)  # [B, N, heads, size]
        if self.consecutive:
            return buffer[self.view, :, : self.used]
        return buffer[self.index(buffer.device)[0][:, 0], :, : self.used]

    def index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Slot [B, 1] and place [B, N] of each new token."""
        if device not in self._places:
            rows = torch.tensor(self.slots, device=device).unsqueeze(1)
            starts = torch.tensor(self.lengths, device=device).unsqueeze(1)
            self._places[device] = rows, starts + torch.arange(self.tokens, device=device)
        return self._places[device]


class DeviceCursor:
    """The same where lengths live on the device: row b is slot b and puts its N tokens at `places[b]` [B, N].

    Nothing here is a number of the host, so a pass that was captured once writes where the lengths then stand.
    """

    consecutive = True

    def __init__(self, places: Tensor, used: int, *, static: bool = False) -> None:
        self.places, self.used, self.static = places, used, static
        self.longest = used - places.shape[1]
        self._rows = torch.arange(len(places), device=places.device).unsqueeze(1)

    def write(self, buffer: Tensor, states: Tensor) -> Tensor:
        """Stores [B, heads, N, size] and returns a view [B, heads, used, size]."""
        buffer.transpose(1, 2).index_put_(self.index(buffer.device), states.transpose(1, 2))  # [B, N, heads, size]
        return buffer[: len(self.places), :, : self.used]

    def index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Slot [B, 1] and place [B, N] of each new token."""
        return self._rows.to(device), self.places.to(device)


class SlotCache(Cache):
    """One cache for all slots of a model; `cursor` is set before each forward pass."""

    def __init__(self, num_layers: int, num_slots: int, max_length: int) -> None:
        self.num_slots = num_slots
        self.max_length = max_length
        self.capacity = min(FIRST_CAPACITY, max_length)
        self.cursor: Cursor | DeviceCursor = Cursor([0], [0], 0, 0)
        self.slot_layers = [SlotLayer(self) for _ in range(num_layers)]
        self.stacks: list[Tensor] = []  # each [layers * 2, slots, KV heads, capacity, head size]
        self.moves = 0  # how often buffers came to lie elsewhere, which voids what was captured over them
        super().__init__(layers=list(self.slot_layers))

    def reserve(self, length: int) -> None:
        """Makes room for `length` places in every slot."""
        if length <= self.capacity:
            return
        while self.capacity < length:
            self.capacity *= 2
        self.capacity = min(self.capacity, max(length, self.max_length))
        self.stacks = []
        self.moves += 1
        try:
            for layer, name, rows in self._buffers():
                grown = layer.allocate(rows)
                grown[:, :, : rows.shape[2]] = rows
                setattr(layer, name, grown)
        except BaseException:  # no memory: what all layers have room for is what there is
            self.shrink(min(rows.shape[2] for *_, rows in self._buffers()))
            raise

    def shrink(self, capacity: int) -> None:
        """Gives back what is past so many places of every slot, which nothing may use."""
        self.capacity, self.stacks = capacity, []
        self.moves += 1
        for layer, name, rows in self._buffers():
            if rows.shape[2] > capacity:
                setattr(layer, name, rows[:, :, :capacity].clone())

    def clear(self, num_slots: int) -> None:
        """Forgets all and gives the memory back; there are `num_slots` slots then."""
        self.num_slots, self.capacity = num_slots, min(FIRST_CAPACITY, self.max_length)
        self.stacks = []
        self.moves += 1
        for layer in self.slot_layers:
            layer.keys = layer.values = None
            layer.is_initialized = False

    def stack(self) -> None:
        """Puts the keys and values of all layers of one shape into one piece of memory, so that rows of all of them
        are moved at once."""
        if self.stacks:
            return
        stacks: list[Tensor] = []
        shapes: dict[torch.Size, list[tuple[SlotLayer, str]]] = {}
        for layer, name, rows in self._buffers():
            shapes.setdefault(rows.shape, []).append((layer, name))
        for members in shapes.values():
            stack = torch.stack([getattr(layer, name) for layer, name in members])
            stacks.append(stack)
            for (layer, name), rows in zip(members, stack, strict=True):
                setattr(layer, name, rows)
            self.moves += 1
        self.stacks = stacks  # all of them, or none where memory ran out

    def _buffers(self) -> list[tuple[SlotLayer, str, Tensor]]:
        """The keys and values of all layers. Those that no pass has reached yet, or that share another's cache, have
        none."""
        named = [(layer, name, getattr(layer, name)) for layer in self.slot_layers for name in ("keys", "values")]
        return [(layer, name, rows) for layer, name, rows in named if rows is not None]

    def device_keep(self, lengths: Tensor, paths: Tensor) -> None:
        """Rows `paths` [B, D] after `lengths` [B] move to the places right after the lengths, in all layers that are
        stacked. What is past the end of a path is moved too and lies past the new length."""
        slots = torch.arange(len(lengths), device=lengths.device)[:, None]
        places = lengths[:, None] + torch.arange(paths.shape[1], device=lengths.device)
        for stack in self.stacks:
            rows = stack.transpose(2, 3)  # [layers * 2, slots, capacity, KV heads, head size]
            rows[:, slots, places] = rows[:, slots, lengths[:, None] + paths]

    def fill_with_noise(self, slots: int, places: int) -> None:
        """Random keys and values in the first slots: to time a pass with, as zeros may be quicker."""
        for stack in self.stacks:
            stack[:, :slots, :, :places].normal_()

    def keep(self, slot: int, start: int, path: Sequence[int]) -> None:
        """Of the rows written at `start`, those in `path` (rising) move to the front."""
        stay = 0
        while stay < len(path) and path[stay] == stay:
            stay += 1
        if stay < len(path):
            source, end = torch.tensor(path[stay:]) + start, start + len(path)
            for _, _, rows in self._buffers():
                rows[slot, :, start + stay : end] = rows[slot, :, source.to(rows.device)]

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` rows of a slot become those of another."""
        for _, _, rows in self._buffers():
            rows[target, :, :length] = rows[source, :, :length]
