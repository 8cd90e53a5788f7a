"""The one thread that owns the model: jobs come in, steps go out.

    engine = Engine(lm, settings, metrics)
    engine.submit([job])            # from any thread; QueueFullError where too many wait
    engine.cancel(job)              # its slot is free before the next step
    engine.close()                  # ends when the last job has

A job is one text. It tells of each chunk, or of the error that ended it, through `tell`, which is called on this thread
and must not wait. Jobs with different drafters cannot share a pass: each drafter has a scheduler of its own over the
same slots, and they take turns.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from medusa.completion import Chunk
from medusa.decoding.scheduler import Scheduler, Task
from medusa.decoding.slots import Slots
from medusa.errors import MedusaError
from medusa.serve.errors import ClosingError, DeadlineError, QueueFullError
from medusa.serve.queue import FairQueue

if TYPE_CHECKING:
    from medusa.api import LanguageModel
    from medusa.completion import TextOfSteps
    from medusa.decoding.stepper import Request, Step, Stepper
    from medusa.serve.metrics import Metrics
    from medusa.serve.settings import ServerSettings

log = logging.getLogger("medusa.serve")


@dataclass(eq=False)
class Job:
    """One text that is wanted. `request.sampling` has a seed, so that the text can be said again.

    `leader` is a job with the same prompt: this one waits until that has read it, and does not read it again.
    """

    request: Request
    text: TextOfSteps
    tell: Callable[[Chunk | Exception], None]
    drafter: str = ""  # "": the model's own
    client: str = ""
    name: str = ""  # of the request, for the log
    leader: Job | None = None
    reused: int = 0  # tokens of the prompt that were not read anew; known with the first chunk
    queued: float = field(default_factory=time.monotonic)
    begun: float = field(default_factory=time.perf_counter)
    told: float = 0.0  # when the last chunk was
    ended: bool = False
    task: Task | None = None
    followers: list[Job] = field(default_factory=list)
    said: list[int] = field(default_factory=list)
    again: list[int] = field(default_factory=list)  # what is said again, and was told already
    trial: bool = False  # it runs by itself, for an error ended a pass that it took part in


class Engine:
    """See above."""

    def __init__(self, lm: LanguageModel, settings: ServerSettings, metrics: Metrics) -> None:
        self.lm = lm
        self.slots = Slots(lm.backend, kept=settings.cached_tokens, lend=True)
        self._settings = settings
        self._metrics = metrics
        self._width = min(settings.slots, lm.backend.num_slots)
        self._inbox: SimpleQueue[tuple[str, Job | None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._unfinished = 0  # jobs taken on and not ended
        self._of_client: Counter[str] = Counter()  # the same, by client
        self._closing = False
        self._aborted = False
        self.died = False
        self._steppers: dict[str, Stepper] = {"": lm.stepper}
        self._schedulers: deque[Scheduler] = deque()  # whose turn it is stands first
        self._of: dict[str, Scheduler] = {}  # drafter -> its scheduler
        self._waiting: FairQueue[Job] = FairQueue()
        self._retrying: deque[Job] = deque()
        self._running: dict[Task, tuple[Job, Scheduler]] = {}
        self._alive = time.monotonic()  # when the last step ended, or work came
        self._thread = threading.Thread(target=self._run, name="medusa-engine", daemon=True)
        self._thread.start()

    # --- from any thread ----------------------------------------------------------------------------------------------

    def submit(self, jobs: Sequence[Job]) -> None:
        """Takes on all of the jobs or none.

        Raises:
            QueueFullError, ClosingError.
        """
        with self._lock:
            if self._closing:
                raise ClosingError
            if not self._has_room(jobs):
                raise QueueFullError
            if not self._unfinished:
                self._alive = time.monotonic()
            self._unfinished += len(jobs)
            self._of_client.update(job.client for job in jobs)
            for job in jobs:  # within the lock, so that none comes after the end
                self._inbox.put(("submit", job))

    def _has_room(self, jobs: Sequence[Job]) -> bool:
        """For so many jobs of one client. Where others have filled the queue, a client that has less than its share of
        it is let in all the same, until twice as many wait."""
        room, count = self._width + self._settings.max_queue, self._unfinished + len(jobs)
        if count <= room:
            return True
        client = jobs[0].client
        share = room // len({client, *self._of_client})
        return count <= 2 * room and self._of_client[client] + len(jobs) <= share

    def cancel(self, job: Job) -> None:
        """Ends a job, which tells nothing more; one that has ended stays so."""
        self._inbox.put(("cancel", job))

    def close(self, wait: float | None = None) -> None:
        """Takes on nothing more, and waits until all jobs have ended, or so many seconds."""
        self.refuse()
        self._inbox.put(("close", None))
        self._thread.join(wait)

    def abort(self, wait: float) -> bool:
        """Ends after the step that is under way, whatever is left; False: that takes longer than so many seconds."""
        self.refuse()
        self._aborted = True
        self._inbox.put(("close", None))
        self._thread.join(wait)
        return not self._thread.is_alive()

    def refuse(self) -> None:
        """Takes on nothing more."""
        with self._lock:
            self._closing = True

    @property
    def unfinished(self) -> int:
        return self._unfinished

    def trouble(self) -> str | None:
        """Why the engine takes no jobs, or does not get on with them."""
        if self.died:
            return "the engine has died"
        if self._closing:
            return "the server is ending"
        stalled = time.monotonic() - self._alive
        if self._unfinished and stalled > self._settings.stall:
            return f"no step has ended for {stalled:.0f} seconds"
        return None

    # --- the engine's own thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._receive():
                self._give_up_late_ones()
                self._start_waiting_ones()
                self._step()
                self._look()
        except BaseException as error:
            log.critical("the engine has died", exc_info=error)
            self.died = True
            self.refuse()
            self._fail_all()
            raise

    def _fail_all(self) -> None:
        """Nobody is to wait for ever."""
        while not self._inbox.empty():
            what, job = self._inbox.get()
            if job is not None and what == "submit":
                self._waiting.push(job)
        for job in [*self._waiting.jobs(), *self._retrying, *(job for job, _ in self._running.values())]:
            for one in (job, *job.followers):
                one.ended = True
                self._tell(one, MedusaError("the engine has died"))
        self._unfinished = 0
        self._of_client.clear()

    def _receive(self) -> bool:
        """Takes what has come, and waits for it where there is nothing to do. False: it is time to end."""
        while True:
            idle = not self._unfinished
            if self._aborted or (idle and self._closing):
                return False
            if idle:  # what was cancelled last is not to be shown until another comes
                self._look()
            try:
                what, job = self._inbox.get(block=idle)
            except Empty:
                return True
            if job is None:
                continue
            if what == "cancel":
                self._end(job)
            elif job.leader is None or job.leader.said or job.leader.ended:
                self._waiting.push(job)
            else:
                job.leader.followers.append(job)

    def _look(self) -> None:
        self._metrics.look(self.slots, self._unfinished - len(self._running), len(self._running))

    def _give_up_late_ones(self) -> None:
        latest = time.monotonic() - self._settings.deadline
        running = [job for job, _ in self._running.values()]
        for job in [*running, *self._waiting.jobs(), *self._retrying]:
            if job.queued < latest:
                self._fail(job, DeadlineError())

    def _start_waiting_ones(self) -> None:
        while self._retrying or len(self._waiting):
            promised = sum(scheduler.waiting for scheduler in self._schedulers)
            if len(self._running) >= self._width or self.slots.free <= promised:
                return
            job = self._retrying.popleft() if self._retrying else self._waiting.pop()
            try:
                scheduler = self._scheduler_for(job)
                job.task = scheduler.submit(job.request)
            except Exception as error:  # noqa: BLE001  # whatever it is, it is this job's alone
                self._fail(job, error)
                continue
            self._running[job.task] = job, scheduler
            if scheduler not in self._schedulers:
                self._schedulers.append(scheduler)

    def _scheduler_for(self, job: Job) -> Scheduler:
        stepper = self._steppers.get(job.drafter)
        if stepper is None:
            stepper = self._steppers[job.drafter] = self.lm.make_stepper(job.drafter)
        key = job.drafter
        if not stepper.runs(job.request):
            stepper = self.lm.reference_of(stepper)
            key = f"the reference {job.drafter}"
        if job.trial:
            return Scheduler(stepper, self.slots, 1, self._settings.piece)
        if key not in self._of:
            self._of[key] = Scheduler(stepper, self.slots, self._width, self._settings.piece)
        return self._of[key]

    def _step(self) -> None:
        """One step of the scheduler whose turn it is."""
        if not self._schedulers:
            return
        scheduler = self._schedulers.popleft()
        begun = time.perf_counter()
        try:
            steps = scheduler.step()
        except Exception as error:  # noqa: BLE001  # the engine goes on without those whom it hit
            self._recover(scheduler, error)
            steps = []
        self._alive = time.monotonic()
        for task, step in steps:
            if task in self._running:
                self._say(self._running[task][0], step, begun)
        if not scheduler.idle:
            self._schedulers.append(scheduler)

    def _say(self, job: Job, step: Step, begun: float) -> None:
        assert job.task is not None
        if job.again:
            told = min(len(job.again), len(step.tokens))
            if list(step.tokens[:told]) != job.again[:told]:
                self._fail(job, MedusaError("the text cannot be taken up where an error has cut it"))
                return
            del job.again[:told]
            if told == len(step.tokens):
                return
            step = _without_first(step, told)
        first = not job.said
        job.said += step.tokens
        job.reused = job.task.reused if first else job.reused
        try:
            chunk = job.text.push(step, job.begun if first else begun)
        except Exception as error:  # noqa: BLE001
            self._fail(job, error)
            return
        self._metrics.step(job, step, first)
        for follower in job.followers:
            self._waiting.push(follower, first=True)
        job.followers.clear()
        if chunk.finish_reason is not None:
            self._metrics.done(job, chunk)
            self._end(job)
        self._tell(job, chunk)

    def _recover(self, scheduler: Scheduler, error: Exception) -> None:
        """An error in reading a prompt is that job's. One in a pass of several is anyone's: each of them begins anew by
        itself, and who is hit again fails. What they have told already they say again, and it is not told twice."""
        lost = [job for task, (job, its) in self._running.items() if its is scheduler and task not in scheduler]
        if len(lost) <= 1:
            for job in lost or [job for job, its in self._running.values() if its is scheduler]:
                self._fail(job, error)
            return
        log.error("a pass of %d answers failed; each goes on by itself", len(lost), exc_info=error)
        for job in lost:
            assert job.task is not None
            del self._running[job.task]
            job.task, job.trial, job.again = None, True, list(job.said)
            self._retrying.append(job)

    def _fail(self, job: Job, error: Exception) -> None:
        if job.ended:
            return
        if not isinstance(error, DeadlineError):
            log.error("an answer failed", exc_info=error, extra={"request": job.name})
        self._metrics.failed(error)
        self._end(job)
        self._tell(job, error)

    def _end(self, job: Job) -> None:
        """Frees what a job holds; nothing more is told of it."""
        if job.ended:
            return
        job.ended = True
        if job.task is not None:
            _, scheduler = self._running.pop(job.task)
            scheduler.cancel(job.task)
        elif not self._waiting.remove(job):
            if job in self._retrying:
                self._retrying.remove(job)
            elif job.leader is not None and job in job.leader.followers:
                job.leader.followers.remove(job)
        for follower in job.followers:  # they read the prompt themselves
            self._waiting.push(follower, first=True)
        job.followers.clear()
        with self._lock:
            self._unfinished -= 1
            self._of_client[job.client] -= 1
            if not self._of_client[job.client]:
                del self._of_client[job.client]

    def _tell(self, job: Job, event: Chunk | Exception) -> None:
        job.told = time.monotonic()
        try:
            job.tell(event)
        except RuntimeError:  # whose loop has ended: nobody listens any more
            self._end(job)


def _without_first(step: Step, count: int) -> Step:
    """The step without so many of its tokens."""
    logprobs = None if step.logprobs is None else step.logprobs[count:]
    return replace(step, tokens=step.tokens[count:], sources=step.sources[count:], logprobs=logprobs)
