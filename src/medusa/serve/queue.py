"""Who is next: clients take turns, and each one's jobs keep their order. Used by one thread."""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar


class _Owned(Protocol):
    @property
    def client(self) -> str: ...


T = TypeVar("T", bound=_Owned)


class FairQueue(Generic[T]):
    """A queue in which who asks for much does not keep others waiting."""

    def __init__(self) -> None:
        self._of: dict[str, deque[T]] = {}  # client -> jobs; whose turn it is stands first

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def jobs(self) -> list[T]:
        return [job for jobs in self._of.values() for job in jobs]

    def push(self, job: T, *, first: bool = False) -> None:
        """`first`: before the client's other jobs."""
        jobs = self._of.setdefault(job.client, deque())
        (jobs.appendleft if first else jobs.append)(job)

    def pop(self) -> T:
        client, jobs = next(iter(self._of.items()))
        del self._of[client]
        job = jobs.popleft()
        if jobs:
            self._of[client] = jobs  # behind all others
        return job

    def remove(self, job: T) -> bool:
        """Whether it was there."""
        jobs = self._of.get(job.client, deque())
        if job not in jobs:
            return False
        jobs.remove(job)
        if not jobs:
            del self._of[job.client]
        return True
