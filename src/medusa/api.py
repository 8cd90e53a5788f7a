"""Text in, chunks of text out: the chat template before the loop, the detokeniser and stop strings after it."""

from __future__ import annotations

import copy
import functools
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from medusa.decoders import Nodes, check_nodes, make_decoder, make_drafter, which_tree
from medusa.decoding.budget import MachineTimes, NodeBudget, PassTimes
from medusa.decoding.draft import Drafter, Row
from medusa.decoding.loop import NO_TIME, FinishReason, Phases, Step, decode
from medusa.decoding.sampling import Sampling
from medusa.errors import UsageError
from medusa.settings import EngineSettings, takes
from medusa.text.chat_template import REFUSALS, encode_plain, render, turn_ends
from medusa.text.stream import Detokenizer, StopStrings

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from medusa.engines.protocol import Backend
    from medusa.heads.module import HeadsRunner
    from medusa.models.zoo import ModelSource

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Stats:
    """Running counts of one text. The first token comes from the prefill, all others from steps."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0  # forward passes after the prefill
    ttft_seconds: float = 0.0  # from the call to the first token
    decode_seconds: float = 0.0  # in the steps; waiting for whoever reads the stream is not counted
    phases: Phases = NO_TIME  # what of that went where; the rest is making text of tokens

    @property
    def decoded_tokens(self) -> int:
        """Tokens that came from steps: all but the first."""
        return max(0, self.new_tokens - 1)

    @property
    def tokens_per_step(self) -> float:
        """1.0 is plain decoding; 0.0 where no step was needed."""
        return self.decoded_tokens / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, without the prefill; 0.0 where no step was needed."""
        return self.decoded_tokens / self.decode_seconds if self.steps else 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step added.

    `spans` are pieces of text with their source, which join to `text`: "model" for what the model decided itself, the
    name of a drafter for an accepted draft. `text` never ends in half a character, so it may lag behind `token_ids`.
    """

    text: str
    spans: tuple[tuple[str, str], ...]
    token_ids: tuple[int, ...]
    stats: Stats
    finish_reason: FinishReason | None
    step: Step  # as decoded; a stop string may have cut `token_ids` shorter


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. `token_ids` include the end-of-text token if the model wrote one; `text` does not."""

    text: str
    token_ids: tuple[int, ...]
    stats: Stats
    finish_reason: FinishReason


class LanguageModel:
    """A loaded model with its tokenizer, heads and drafter; made by `medusa.load`. Serves one caller at a time."""

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        backend: Backend,
        *,
        heads: HeadsRunner | None = None,
        drafter: str = "union",
        tree: str = "auto",
        nodes: Nodes = "auto",
        times: Callable[[bool], PassTimes | None] = lambda refresh: None,
        eos_token_ids: Sequence[int] = (),
        facts: Mapping[str, object] | None = None,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.backend = backend
        self.heads = heads
        self.tree = which_tree(tree, heads, backend)
        self.nodes = nodes
        self.eos_token_ids = tuple(eos_token_ids)
        self.drafter = make_drafter(drafter, heads, self.tree)
        self._times = MachineTimes(times)  # shared with all that `with_drafter` makes of this
        self.decoder = make_decoder(backend, self.drafter, nodes, self._times)
        self._facts = dict(facts or {})

    def with_drafter(
        self, drafter: str | Drafter, *, tree: str | None = None, nodes: Nodes | None = None
    ) -> LanguageModel:
        """The same engine with another drafter, by name or one of your own; the two must not generate at the same
        time."""
        other = copy.copy(self)
        other.tree = which_tree(tree, self.heads, self.backend) if tree else self.tree
        other.nodes = self.nodes if nodes is None else nodes
        other.drafter = make_drafter(drafter, self.heads, other.tree) if isinstance(drafter, str) else drafter
        other.decoder = make_decoder(self.backend, other.drafter, other.nodes, self._times)
        return other

    def pass_times(self, refresh: bool = False) -> PassTimes:
        """What passes and drafts take on this machine, measured once and kept, or anew with `refresh`: then for all
        decoders of this engine, those made before as well."""
        return self._times.refresh() if refresh else self._times()

    def encode(self, prompt: str | Sequence[Message], *, raw: bool = False) -> list[int]:
        """Token ids of a prompt.

        A string is one user turn of the chat template, or plain text where `raw` is set or the tokenizer has no
        template. A sequence of messages with `role` and `content` always needs the template.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise UsageError("the prompt is empty: write something to answer")
            if raw or not self.tokenizer.chat_template:
                return encode_plain(self.tokenizer, prompt)
            prompt = [{"role": "user", "content": prompt}]
        if not prompt:
            raise UsageError("the conversation is empty: give at least one message")
        if raw:
            raise UsageError("raw text must be a string, not a list of messages")
        if not self.tokenizer.chat_template:
            raise UsageError(f"{self.name} has no chat template: give a plain string")
        try:
            text = render(self.tokenizer, prompt, answer=True)
        except REFUSALS as error:
            raise UsageError(f"the chat template of {self.name} refuses these messages: {error}") from None
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        raw: bool = False,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        acceptance: Literal["exact", "typical"] = "exact",
        epsilon: float = 0.09,
        delta: float = 0.3,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Iterator[Chunk]:
        """Answers a prompt, one chunk for each step. Bad arguments raise UsageError here, not at the first chunk.

        Args:
            prompt: a user's turn, or messages with `role` and `content`.
            raw: skip the chat template.
            max_new_tokens: the exact limit.
            temperature: 0 is greedy; above, sampling with `top_k`, `top_p`, `min_p` and `seed`.
            acceptance: "exact" gives what plain decoding gives; "typical" is faster and lossy (temperature > 0 only).
            stop: strings that end the text; they are not part of it.
            ignore_eos: go on after the end-of-text token.
        """
        sampling = Sampling(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            acceptance=acceptance,
            epsilon=epsilon,
            delta=delta,
        )
        stops = StopStrings(stop)
        ids = self.encode(prompt, raw=raw)
        self.decoder.check(ids, max_new_tokens)
        return self._stream(ids, sampling, stops, max_new_tokens, () if ignore_eos else self.eos_token_ids)

    def generate(self, prompt: str | Sequence[Message], **options: Any) -> Completion:
        """The whole answer; takes the options of `stream`."""
        pieces: list[str] = []
        token_ids: list[int] = []
        for chunk in self.stream(prompt, **options):
            pieces.append(chunk.text)
            token_ids.extend(chunk.token_ids)
        assert chunk.finish_reason is not None
        return Completion("".join(pieces), tuple(token_ids), chunk.stats, chunk.finish_reason)

    def runs_on(self) -> dict[str, object]:
        """What decides a token beside weights and seed: backend and number format."""
        return {"backend": self.backend.name, "dtype": self._facts.get("dtype")}

    def describe(self) -> dict[str, object]:
        """What is loaded, for people and for bug reports."""
        import torch
        import transformers

        import medusa

        nodes: object = self.nodes
        if isinstance(self.decoder.nodes, NodeBudget):
            nodes = f"auto (up to {self.decoder.nodes.most}; {self.decoder.nodes.expected} expected)"
        heads: dict[str, object] | None = None
        if self.heads is not None:
            config = self.heads.config
            heads = {
                "kind": config.kind,
                "levels": config.num_heads,
                "parameters": self.heads.num_parameters(),
                "draft_vocabulary": self.heads.lm_head_rows,
                "feature_layers": list(config.feature_layers),
                "tree_nodes": len(config.tree) + 1 if config.tree else 0,
            }
        return {
            "model": self.name,
            **self._facts,
            "hidden_size": self.backend.hidden_size,
            "layers": self.backend.num_layers,
            "vocabulary": self.backend.vocab_size,
            "context": self.backend.max_length,
            "slots": self.backend.num_slots,
            "ends_of_text": ", ".join(f"{self.tokenizer.decode([i])} ({i})" for i in self.eos_token_ids) or None,
            "heads": heads,
            "drafter": self.drafter.name,
            "tree": self.tree,
            "nodes": nodes,
            "versions": {
                "medusa": medusa.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }

    def _stream(
        self, ids: list[int], sampling: Sampling, stops: StopStrings, max_new_tokens: int, eos: Sequence[int]
    ) -> Iterator[Chunk]:
        stats = Stats(prompt_tokens=len(ids))
        detokenizer = Detokenizer(self.tokenizer)
        started = time.perf_counter()
        steps = decode(self.decoder, ids, sampling, max_new_tokens=max_new_tokens, eos_token_ids=eos)
        try:
            for step in steps:
                spans: list[tuple[str, str]] = []
                taken = 0
                source = ""
                for token, source in zip(step.tokens, step.sources, strict=True):
                    if token not in eos:  # some tokenizers give the end-of-text token a text
                        spans += stops.push(detokenizer.push(token), source)
                    taken += 1
                    if stops.hit:
                        break
                reason = "stop" if stops.hit else step.finish_reason
                if reason is not None:
                    spans += stops.push(detokenizer.flush(), source)
                    reason = "stop" if stops.hit else reason
                    spans += stops.flush()
                seconds = time.perf_counter() - started
                if stats.new_tokens == 0:
                    stats = replace(stats, ttft_seconds=seconds, new_tokens=taken)
                else:
                    stats = replace(
                        stats,
                        new_tokens=stats.new_tokens + taken,
                        steps=stats.steps + 1,
                        decode_seconds=stats.decode_seconds + seconds,
                        phases=stats.phases.plus(step.phases),
                    )
                text = "".join(piece for piece, _ in spans)
                yield Chunk(text, tuple(spans), step.tokens[:taken], stats, reason, step)
                if reason is not None:
                    return
                started = time.perf_counter()
        finally:
            steps.close()  # type: ignore[attr-defined]


def measured_times(
    backend: Backend, heads: HeadsRunner | None, facts: Mapping[str, object], *, progress: bool = False, **options: Any
) -> PassTimes | None:
    """The times of this machine, from the cache or measured now (`medusa.engines.times.measured_profile`, which takes
    the other options); None where they cannot be measured. `facts` are those of `loading.LoadedModel`."""
    from medusa.engines.times import measured_profile

    key: dict[str, object] = {name: facts.get(name) for name in _TIMING_FACTS}
    draft: Callable[[Tensor], object] | None = None
    if heads is not None:
        from medusa.decoding.heads_drafter import HeadsDrafter

        config = heads.config
        key["heads"] = [
            config.kind, config.num_heads, config.num_layers, config.mlp_width, config.tie_lm_head,
            list(config.feature_layers), heads.lm_head_rows, str(heads.dtype),
        ]  # fmt: skip
        drafter = HeadsDrafter(heads)

        def draft(features: Tensor) -> object:
            row = Row(0, [1], 1, 1, frozenset(), Sampling(), features)
            return drafter.propose([row], DRAFTED_NODES)

    found = measured_profile(backend, key, draft=draft, progress=progress, **options)
    if found is None:
        return None
    return PassTimes.measured(
        found.seconds,
        found.draft_seconds or 0.0,
        context=found.context,
        far=found.far,
        far_context=found.far_context,
    )


_TIMING_FACTS = ("parameters", "dtype", "device", "compile", "instruction_set", "threads")
DRAFTED_NODES = 12  # of the draft that is timed: levels of heads take the time, hardly their width


def _load_tokenizer(source: ModelSource, hashed: bool) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer, and the hash of its vocabulary if that is wanted."""
    from medusa.heads.config import vocabulary_hash
    from medusa.models import zoo

    tokenizer = zoo.load_tokenizer(source)
    return tokenizer, vocabulary_hash(tokenizer.get_vocab()) if hashed else ""


@takes(EngineSettings)
def load(settings: EngineSettings) -> LanguageModel:
    """Loads a model, its heads and a backend.

    Args:
        {settings}

    Raises:
        UsageError: a bad argument. MedusaError: a model or heads that cannot be used.
    """
    check_nodes(settings.nodes)

    from medusa.models import loading, zoo

    if settings.threads is not None:
        import torch

        torch.set_num_threads(settings.threads)
    from medusa.heads.config import check_vocabulary
    from medusa.heads.file import read_config

    model, progress = settings.model, settings.progress
    source = zoo.resolve(model, progress=progress)
    heads_path = zoo.find_heads(settings.heads, source)
    if settings.drafter == "heads" and heads_path is None:
        raise UsageError(f"there are no heads for {model}: give --heads PATH, or use --drafter ngram")
    tokenizer_of = functools.cache(functools.partial(_load_tokenizer, source, hashed=heads_path is not None))
    if heads_path is not None:  # what their config tells is checked first: to pack the weights may take long
        config = read_config(heads_path)
        loading.check_heads(config, source)
        if settings.heads != "auto":  # the others fit its tokenizer, which is read while weights are packed
            check_vocabulary(config, tokenizer_of()[1])
        settings = replace(settings, feature_layers=config.feature_layers)
    loaded = loading.load_backend(source, settings, meanwhile=tokenizer_of)
    runner = None if heads_path is None else loading.load_heads(heads_path, loaded, settings)
    tokenizer, vocab_hash = tokenizer_of()
    if runner is not None:
        check_vocabulary(runner.config, vocab_hash)
    # A chat must end where its turn ends, even where one of these names another end of text.
    ends = (*loaded.eos_token_ids, *loading.as_token_ids(tokenizer.eos_token_id), *turn_ends(tokenizer))
    return LanguageModel(
        model,
        tokenizer,
        loaded.backend,
        heads=runner,
        drafter=settings.drafter,
        tree=settings.tree,
        nodes=settings.nodes,
        times=lambda refresh: measured_times(loaded.backend, runner, loaded.facts, refresh=refresh, progress=progress),
        eos_token_ids=tuple(dict.fromkeys(ends)),
        facts={**loaded.facts, "heads_path": str(heads_path) if heads_path else None},
    )
