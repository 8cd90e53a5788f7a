"""What is compared: ways to decode with Medusa's own engine. Others' engines are in `baselines.py`."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from medusa.completion import Completion
from medusa.decoding.draft import MODEL
from medusa.errors import UsageError
from medusa.steppers import make_drafter

if TYPE_CHECKING:
    from torch import Tensor

    from medusa.api import LanguageModel, Message
    from medusa.decoding.sampling import Sampling
    from medusa.decoding.stepper import Step, Stepper
    from medusa.evaluation.questions import Question
    from medusa.heads.module import HeadsRunner, HeadsState, Tilt
    from medusa.steppers import Nodes

PLAIN = "plain"
PHASES = ("draft", "verify", "accept", "keep", "text")


@dataclass(slots=True)
class Measurement:
    """One answer and its counts. What a method cannot know is None.

    `new_tokens` go up to the end-of-text token, which counts. `decoded_tokens` came after the prefill (and, for others'
    engines, after what came with it), from `steps` forward passes in `decode_seconds`. `depths[d - 1]` is (steps whose
    draft was at least d deep, steps that accepted at least d drafted tokens); `drafters[name]` (nodes verified, nodes
    accepted). `peak_bytes` is the process's, which holds the weights of all methods.
    """

    text: str
    token_ids: list[int] | None
    new_tokens: int
    decoded_tokens: int
    steps: int | None
    decode_seconds: float
    ttft_seconds: float
    phases: dict[str, float] | None = None
    depths: list[list[int]] = field(default_factory=list)
    drafters: dict[str, list[int]] = field(default_factory=dict)
    peak_bytes: int | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Method(Protocol):
    """A way to answer."""

    @property
    def name(self) -> str: ...

    def answer(self, messages: Sequence[Message], max_new_tokens: int) -> Measurement: ...


@dataclass(frozen=True, slots=True)
class MedusaMethod:
    """A stepper of Medusa's."""

    name: str
    lm: LanguageModel
    stepper: Stepper
    sampling: Sampling

    def answer(self, messages: Sequence[Message], max_new_tokens: int) -> Measurement:
        peak = PeakMemory()
        prompt = prompt_of(self.lm, messages)
        chunks = list(self.lm.stream(prompt, self.sampling, max_new_tokens=max_new_tokens, stepper=self.stepper))
        answer = Completion.of(chunks)
        stats = answer.stats
        phases = dict(zip(PHASES, stats.phases, strict=False))
        phases["text"] = max(0.0, stats.decode_seconds - sum(stats.phases))
        depths, drafters = counts([chunk.step for chunk in chunks])
        return Measurement(
            text=answer.text,
            token_ids=list(answer.token_ids),
            new_tokens=stats.new_tokens,
            decoded_tokens=stats.decoded_tokens,
            steps=stats.steps,
            decode_seconds=stats.decode_seconds,
            ttft_seconds=stats.ttft_seconds,
            phases=phases,
            depths=depths,
            drafters=drafters,
            peak_bytes=peak.bytes(),
        )


def prompt_of(lm: LanguageModel, messages: Sequence[Message]) -> str | Sequence[Message]:
    """What `LanguageModel.encode` takes: a model without chat template is given the texts, to continue."""
    return messages if lm.tokenizer.chat_template else "\n\n".join(message["content"] for message in messages)


def first_prompt(lm: LanguageModel, question: Question) -> list[int]:
    """Token ids of a question's first turn."""
    return lm.encode(prompt_of(lm, [{"role": "user", "content": question.turns[0]}]))


def counts(steps: Sequence[Step]) -> tuple[list[list[int]], dict[str, list[int]]]:
    """Of the steps after the prefill: drafted and accepted by depth, and by drafter (see `Measurement`)."""
    depths: list[list[int]] = []
    drafters: dict[str, list[int]] = {}
    for step in steps:
        if step.draft is None:
            continue
        for source in step.draft.sources[1:]:
            drafters.setdefault(source, [0, 0])[0] += 1
        for node in step.path[1:]:
            drafters[step.draft.sources[node]][1] += 1
        deepest = int(max(step.draft.topology.depths))
        depths += [[0, 0] for _ in range(deepest - len(depths))]
        for depth, drafted_and_accepted in enumerate(depths[:deepest], 1):
            drafted_and_accepted[0] += 1
            drafted_and_accepted[1] += depth < len(step.path)
    drafters.pop(MODEL, None)
    return depths, drafters


def medusa_method(name: str, lm: LanguageModel, sampling: Sampling, nodes: Nodes | None = None) -> MedusaMethod:
    """One of MEDUSA_METHODS on the engine of `lm`, with its nodes or others.

    Raises:
        UsageError: heads are needed and not there; typical acceptance is wanted of greedy decoding.
    """
    if name == "typical":
        if sampling.greedy:
            raise UsageError("typical acceptance differs from exact only above temperature 0: add --temperature 0.7")
        return MedusaMethod(name, lm, lm.make_stepper("union", nodes=nodes), replace(sampling, acceptance="typical"))
    if name == "rubbish":
        if lm.heads is None:
            raise UsageError("the method rubbish misleads heads, and this model has none: give --heads NAME or PATH")
        misled: Any = MisledHeads(lm.heads)
        drafter = make_drafter("heads", misled, lm.tree)
        return MedusaMethod(name, lm, lm.make_stepper(drafter, nodes=nodes), sampling)
    # The model's own tree: on a GPU a fixed one, as plain decoding beside it is captured too.
    tree = "static" if name == "heads-static" else None
    called = {PLAIN: "none", "heads-static": "heads"}.get(name, name)
    return MedusaMethod(name, lm, lm.make_stepper(called, tree=tree, nodes=nodes), sampling)


MEDUSA_METHODS = {
    PLAIN: "no drafts; what the others are compared with",
    "heads": "Medusa heads; a tree grown at each step, on a GPU the fixed one",
    "heads-static": "Medusa heads, the fixed tree",
    "ngram": "n-grams of the text itself",
    "union": "heads and n-grams in one tree",
    "typical": "union with typical acceptance (needs a temperature)",
    "rubbish": "a control: heads that are sure of themselves and always wrong",
}


@dataclass(frozen=True, slots=True)
class MisledHeads:
    """Heads whose every guess is off by one token: what a faulty drafter does to speed, and to the text nothing."""

    heads: HeadsRunner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.heads, name)

    def guess(
        self, k: int, state: HeadsState, parents: Tensor, tokens: Tensor, count: int, tilt: Tilt | None = None
    ) -> tuple[Tensor, Tensor, HeadsState]:
        log_p, ids, state = self.heads.guess(k, state, parents, tokens, count, tilt)
        # Off by more than a few: neighbours of a token in the vocabulary are often tokens of the same kind.
        return log_p, (ids + 1009) % self.heads.config.vocab_size, state


class PeakMemory:
    """The most memory that the process held since this was made, where the system can say so."""

    def __init__(self) -> None:
        import torch

        self._since_start = True
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self._since_start = False
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

    def bytes(self) -> int:
        """Of the process, and of the GPU where there is one."""
        import torch

        device = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
        if not self._since_start:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return 1024 * int(line.split()[1]) + device
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + device
