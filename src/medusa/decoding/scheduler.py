"""Who decodes when: texts wait in a queue, enter a free slot, are read, and take part in each pass until they end.

A scheduler is driven by whoever wants its texts, one call of `step` after another; nothing runs between the calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medusa.decoding.sampling import GREEDY, Sampling
from medusa.decoding.slots import Slots
from medusa.decoding.stepper import Request
from medusa.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medusa.decoding.stepper import FinishReason, Row, Step, Stepper


@dataclass(slots=True, eq=False)
class Task:
    """One text, from the queue to its end."""

    request: Request
    row: Row | None = None  # None while it waits or is read
    slot: int = -1  # where it is read
    held: int = 0  # tokens of the prompt that its slot holds
    reused: int = 0  # of them, those that were there before

    @property
    def finish_reason(self) -> FinishReason | None:
        return None if self.row is None else self.row.finish_reason

    @property
    def new_tokens(self) -> list[int]:
        """What has been decoded so far."""
        return [] if self.row is None else self.row.tokens[self.row.prompt_tokens :]


class Scheduler:
    """Runs texts on a stepper, first come, first served. It ends by `close`, which gives all slots back.

    Args:
        slots: those of the stepper's backend, shared with other schedulers; None makes them.
        width: the most texts at once; None is one for each slot.
        piece: the most tokens of prompts that are read between two passes, so that a long prompt stops nobody for
            long; None reads each prompt at once. Where a prompt is cut does not depend on what else there is.
    """

    def __init__(
        self, stepper: Stepper, slots: Slots | None = None, width: int | None = None, piece: int | None = None
    ) -> None:
        if piece is not None and piece < 1:
            raise UsageError(f"piece must be at least 1, not {piece}")
        self.stepper = stepper
        self.slots = slots or Slots(stepper.backend)
        self._width = width or stepper.backend.num_slots
        self._piece = piece
        self._waiting: deque[Task] = deque()
        self._reading: deque[Task] = deque()  # who is read next stands first
        self._running: list[Task] = []
        self._read = 0  # tokens since the last pass

    def submit(self, request: Request) -> Task:
        """Puts a text into the queue. Raises UsageError, see `Request.check`."""
        request.check(self.stepper.backend.max_length)
        task = Task(request)
        self._waiting.append(task)
        return task

    @property
    def idle(self) -> bool:
        """Nothing waits, is read or runs."""
        return not self._waiting and not self._reading and not self._running

    @property
    def waiting(self) -> int:
        """How many texts have no slot yet."""
        return len(self._waiting)

    def __contains__(self, task: Task) -> bool:
        """Whether a text waits, is read or runs."""
        return task in self._waiting or task in self._reading or task in self._running

    @property
    def has_room(self) -> bool:
        """Whether one more text would start at once."""
        return len(self._waiting) < min(self.slots.free, self._width - self._inside)

    @property
    def _inside(self) -> int:
        return len(self._reading) + len(self._running)

    def step(self) -> list[tuple[Task, Step]]:
        """Reads a piece of a prompt, where a text has a slot to read it into, and with its last piece starts the text;
        or one forward pass for all that run, once as much was read as may be between two passes.

        Texts get slots first come, first served; those that are longer than a piece take turns. Where a prompt cannot
        be read, its text is gone and the others run on. After an error in a pass, Ctrl-C too, no text runs any more,
        and the slots of those that ran are empty; those that are being read stay.

        Raises:
            UsageError: all slots are in use by others.
        """
        enters = bool(self._waiting) and self._inside < self._width and self.slots.free > 0
        if enters or self._reading:
            pause = self._piece is not None and self._read >= self._piece and self._running
            if not pause:
                return self._read_on(self._enter() if enters else self._reading.popleft())
        if not self._running:
            last = self.stepper.backend.num_slots - 1
            which = f"slots 0 to {last} are" if last else "slot 0 is"
            raise UsageError(f"{which} in use: finish or close what is being decoded there first")
        self._read = 0
        tasks = list(self._running)
        try:
            steps = self.stepper.step([_row(task) for task in tasks])
        except BaseException:
            for task in tasks:  # what their slots hold may be half written
                self.slots.give_back(_row(task).slot, ())
            self._running.clear()
            raise
        for task in tasks:
            if task.finish_reason is not None:
                self._leave(task)
        return list(zip(tasks, steps, strict=True))

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[Task, Step]]:
        """All steps of the texts, which are asked for as slots become free, until the last has ended."""
        source = iter(requests)
        try:
            while True:
                while self.has_room and (request := next(source, None)) is not None:
                    self.submit(request)
                if self.idle:
                    return
                yield from self.step()
        finally:
            self.close()

    def cancel(self, task: Task) -> None:
        """Ends a text where it stands; one that has ended stays so."""
        if task in self._waiting:
            self._waiting.remove(task)
        elif task in self._reading:
            self._reading.remove(task)
            self.slots.give_back(task.slot, task.request.prompt)
        elif task in self._running:
            self._leave(task)

    def close(self) -> None:
        """Ends all texts."""
        for task in (*self._waiting, *self._reading, *self._running):
            self.cancel(task)

    def _enter(self) -> Task:
        """The text that has waited longest has a slot now."""
        task = self._waiting.popleft()
        task.slot, task.held = self.slots.take(task.request.prompt)
        task.reused = task.held
        return task

    def _read_on(self, task: Task) -> list[tuple[Task, Step]]:
        """Reads the next piece of a prompt; the last one comes with the first step."""
        prompt = task.request.prompt
        left = len(prompt) - task.held
        size = min(left, self._piece or left)
        if self.stepper.backend.length(task.slot) != task.held:  # somebody else's text: it is not to be emptied
            self.slots.leave(task.slot)
            raise UsageError(f"slot {task.slot} is in use: finish or close what is being decoded there first")
        try:
            if size < left:
                self.stepper.backend.extend(task.slot, prompt[task.held : task.held + size])
            else:
                task.row, step = self.stepper.start(task.slot, task.request, task.held)
        except BaseException:
            self.slots.give_back(task.slot, ())
            raise
        self._read += size
        task.held += size
        if size < left:
            self._reading.append(task)
            return []
        self._running.append(task)
        if task.finish_reason is not None:
            self._leave(task)
        return [(task, step)]

    def _leave(self, task: Task) -> None:
        self._running.remove(task)
        row = _row(task)
        self.slots.give_back(row.slot, row.tokens)


def _row(task: Task) -> Row:
    assert task.row is not None
    return task.row


def decode(
    stepper: Stepper,
    prompt: Sequence[int],
    sampling: Sampling | None = None,
    *,
    max_new_tokens: int,
    eos_token_ids: Iterable[int] = (),
) -> Iterator[Step]:
    """Decodes one text, step by step; its slot is free again when the iterator ends or is closed."""
    request = Request(prompt, sampling or GREEDY, max_new_tokens, frozenset(eos_token_ids))
    for _, step in Scheduler(stepper).run([request]):
        yield step
