"""What Prometheus reads: by the names of the field, after our prefix."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from medusa.serve.errors import DeadlineError

if TYPE_CHECKING:
    from medusa.completion import Chunk
    from medusa.decoding.slots import Slots
    from medusa.decoding.stepper import Step
    from medusa.serve.engine import Job

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0)
_BETWEEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
LOOK_SECONDS = 0.25


class Metrics:
    """One server's. Counted on the engine's thread, read from any."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._looked = 0.0

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"medusa_{name}", what, labels, registry=self.registry)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(f"medusa_{name}", what, registry=self.registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"medusa_{name}", what, buckets=buckets, registry=self.registry)

        self.drafts = counter("spec_decode_num_drafts", "Drafts that were verified.")
        self.draft_tokens = counter("spec_decode_num_draft_tokens", "Tokens that were drafted.")
        self.accepted = counter("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.")
        self.per_pos = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Accepted tokens by their place in the draft.", "position"
        )
        self.by_drafter = counter("generated_tokens", "Tokens by who proposed them; model: nobody did.", "drafter")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = counter("prefix_cache_hit_tokens", "Those of them that were not read anew.")
        self.cache_hits = counter("prefix_cache_hits", "Answers whose prompt was not read whole.")
        self.cache_queries = counter("prefix_cache_queries", "Answers that have begun.")
        self.finished = counter("requests_finished", "Answers that have ended.", "reason")
        self.responses = counter("http_responses", "Responses by status.", "status")
        self.running = gauge("requests_running", "Answers that are decoded or whose prompt is read.")
        self.waiting = gauge("requests_waiting", "Answers that wait for a slot.")
        self.kv_use = gauge("kv_cache_usage_ratio", "Share of the positions of all slots that hold a token.")
        self.ttft = histogram("time_to_first_token_seconds", "From a request to its first token.", _SECONDS)
        self.between = histogram("inter_token_seconds", "Between tokens, those of one step taken alike.", _BETWEEN)
        self.whole = histogram("request_seconds", "From a request to the end of its answer.", _SECONDS)

    def step(self, job: Job, step: Step, first: bool) -> None:
        """A step of a job; it has not been told yet."""
        now = time.monotonic()
        if first:
            prompt = len(job.request.prompt)
            self.ttft.observe(now - job.queued)
            self.prompt_tokens.inc(prompt)
            self.cached_tokens.inc(job.reused)
            self.cache_queries.inc()
            self.cache_hits.inc(job.reused > 0)
        else:
            self.between.observe((now - job.told) / len(step.tokens))
        for source in step.sources:
            self.by_drafter.labels(source).inc()
        if step.draft is not None and len(step.draft) > 1:
            self.drafts.inc()
            self.draft_tokens.inc(len(step.draft) - 1)
            accepted = len(step.path) - 1
            self.accepted.inc(accepted)
            for position in range(accepted):
                self.per_pos.labels(str(position)).inc()

    def done(self, job: Job, chunk: Chunk) -> None:
        self.finished.labels(chunk.finish_reason).inc()
        self.whole.observe(time.monotonic() - job.queued)

    def failed(self, error: Exception) -> None:
        self.finished.labels("deadline" if isinstance(error, DeadlineError) else "error").inc()

    def look(self, slots: Slots, waiting: int, running: int) -> None:
        """On the engine's thread, between its steps; the slots are counted now and then."""
        self.waiting.set(max(0, waiting))
        self.running.set(running)
        if running and time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        backend = slots.backend
        held = sum(backend.length(slot) for slot in range(backend.num_slots))
        self.kv_use.set(held / (backend.num_slots * backend.max_length))

    def text(self) -> bytes:
        return generate_latest(self.registry)
