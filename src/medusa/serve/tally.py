"""What has come of the answers to one request: texts, ends and counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from medusa.decoding.draft import MODEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from medusa.completion import Chunk
    from medusa.serve.jobs import Answers
    from medusa.serve.schema import Detail


@dataclass
class Choice:
    """One answer."""

    text: str = ""
    chunks: list[Chunk] = field(default_factory=list)  # kept where their log-probabilities are wanted
    tokens: int = 0
    steps: int = 0
    finish_reason: str | None = None


class Tally:
    """Counts chunks as they come."""

    def __init__(self, answers: Answers, tokenizer: PreTrainedTokenizerBase) -> None:
        self.answers = answers
        self.choices = [Choice() for _ in answers.jobs]
        self._tokenizer = tokenizer
        self._drafted = 0
        self._decoded = 0
        self._by: Counter[str] = Counter()

    def push(self, index: int, chunk: Chunk) -> None:
        choice = self.choices[index]
        choice.text += chunk.text
        choice.tokens, choice.steps = chunk.stats.new_tokens, chunk.stats.steps
        choice.finish_reason = chunk.finish_reason
        if chunk.step.logprobs is not None:
            choice.chunks.append(chunk)
        self._by.update(chunk.step.sources[: len(chunk.token_ids)])
        if chunk.step.draft is not None:
            self._drafted += len(chunk.step.draft) - 1
            self._decoded += len(chunk.token_ids)

    @property
    def new_tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)

    def usage(self) -> dict[str, Any]:
        """Of chats and completions."""
        prompt = self.answers.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.new_tokens,
            "total_tokens": prompt + self.new_tokens,
            "prompt_tokens_details": {"cached_tokens": self.answers.reused_tokens},
        }

    def medusa(self, detail: Detail | None) -> dict[str, Any]:
        """{"medusa": how the answers were decoded}, where that is asked for. The seed gives them again."""
        if detail is None:
            return {}
        steps = sum(choice.steps for choice in self.choices)
        told = {
            "steps": steps,
            "tokens_per_step": round(self._decoded / steps, 4) if steps else 0.0,
            "drafted": self._drafted,
            "accepted": sum(count for source, count in self._by.items() if source != MODEL),
            "by_drafter": dict(self._by),
            "seed": self.answers.wanted.sampling.seed,
        }
        return {"medusa": told}

    def step(self, chunk: Chunk, detail: Detail | None) -> dict[str, Any]:
        """{"medusa": who proposed each piece of a chunk's text, and the draft of its step}, where asked for."""
        if detail not in ("spans", "tree"):
            return {}
        told: dict[str, Any] = {"spans": [list(span) for span in chunk.spans], "tokens": len(chunk.token_ids)}
        draft = chunk.step.draft
        if detail == "tree" and draft is not None:
            told["tree"] = {
                "tokens": [self._tokenizer.decode([token]) for token in draft.tokens],
                "parents": list(draft.parents),
                "probabilities": [round(float(p), 4) for p in draft.probabilities],
                "sources": list(draft.sources),
                "path": list(chunk.step.path),
            }
        return {"medusa": told}
