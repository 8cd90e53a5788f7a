"""Text in, chunks of text out: the chat template before the loop, the detokeniser and stop strings after it."""

from __future__ import annotations

import contextlib
import functools
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from medusa.completion import Chunk, Completion, Stats, TextOfSteps, in_order
from medusa.decoding.budget import NodeBudget
from medusa.decoding.draft import Drafter
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.sampling import GREEDY, Sampling
from medusa.decoding.scheduler import Scheduler
from medusa.decoding.slots import Slots
from medusa.decoding.stepper import Request
from medusa.decoding.times import MachineTimes, PassTimes
from medusa.errors import UsageError
from medusa.grammar.engine import Grammars
from medusa.settings import EngineSettings, takes
from medusa.steppers import Nodes, check_nodes, choose_nodes, make_drafter, make_stepper, which_tree
from medusa.text.chat_template import REFUSALS, encode_plain, render, turn_ends
from medusa.text.stream import StopStrings, check_whole

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from medusa.decoding.stepper import Constraint, Grammar, Stepper
    from medusa.engines.protocol import Backend
    from medusa.heads.module import HeadsRunner
    from medusa.models.zoo import ModelSource

__all__ = ["Chunk", "Completion", "LanguageModel", "Stats", "load", "measured_times"]

Message = Mapping[str, Any]


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
        self.slots = Slots(backend)
        self._times = MachineTimes(times)
        self._facts = dict(facts or {})
        self.stepper = self.make_stepper(drafter)
        self._references: dict[Stepper, Stepper] = {}  # for what the others do not run

    def make_stepper(self, drafter: str | Drafter, *, tree: str | None = None, nodes: Nodes | None = None) -> Stepper:
        """Another way to decode on this engine, for the argument `stepper` of `stream`: with a drafter by name or one
        of your own, and a tree and nodes that are the model's where they are not given. What is measured of this
        machine is shared."""
        if isinstance(drafter, str):
            tree = which_tree(tree, self.heads, self.backend) if tree else self.tree
            drafter = make_drafter(drafter, self.heads, tree)
        return make_stepper(self.backend, drafter, self.nodes if nodes is None else nodes, self._times)

    def stepper_for(self, requests: Sequence[Request]) -> Stepper:
        """The model's stepper, or the reference with the same drafter where that does not run all of the requests."""
        return self.stepper if all(map(self.stepper.runs, requests)) else self.reference_of(self.stepper)

    def reference_of(self, stepper: Stepper) -> Stepper:
        """The reference with the drafter of a stepper of this engine: it runs all that can be asked."""
        if stepper not in self._references:
            nodes = choose_nodes(self.nodes, stepper.drafter, self._times, self.backend)
            self._references[stepper] = ReferenceStepper(self.backend, stepper.drafter, nodes)
        return self._references[stepper]

    @functools.cached_property
    def grammars(self) -> Grammars:
        """What `constraint` takes: `lm.grammars.json_schema({...})`, `lm.grammars.json_object()`."""
        return Grammars(self.tokenizer, self.backend.vocab_size, self.eos_token_ids)

    def pass_times(self, refresh: bool = False) -> PassTimes:
        """What passes and drafts take on this machine, measured once and kept, or anew with `refresh`: then for all
        steppers of this engine, those made before as well."""
        return self._times.refresh() if refresh else self._times()

    def encode(
        self, prompt: str | Sequence[Message], *, raw: bool = False, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Token ids of a prompt.

        A string is one user turn of the chat template, or plain text where `raw` is set or the tokenizer has no
        template. A sequence of messages with `role` and `content` always needs the template, which is given `tools` as
        OpenAI's interface has them.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise UsageError("the prompt is empty: write something to answer")
            check_whole([prompt], "the prompt")
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
            text = render(self.tokenizer, prompt, answer=True, tools=tools)
        except REFUSALS as error:
            raise UsageError(f"the chat template of {self.name} refuses these messages: {error}") from None
        check_whole([text], "the conversation")
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def stream(
        self,
        prompt: str | Sequence[Message],
        sampling: Sampling | None = None,
        *,
        raw: bool = False,
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        constraint: Constraint | Grammar | None = None,
        logprobs: int | None = None,
        stepper: Stepper | None = None,
        **settings: Any,
    ) -> Iterator[Chunk]:
        """Answers a prompt, one chunk for each step. Bad arguments raise UsageError here, not at the first chunk.

        Args:
            prompt: a user's turn, or messages with `role` and `content`.
            sampling: how tokens are chosen; the default is greedy.
            raw: skip the chat template.
            max_new_tokens: the exact limit.
            stop: strings that end the text; they are not part of it.
            ignore_eos: go on after the end-of-text token.
            constraint: what the text may become: one of `grammars`, or your own.
            logprobs: `chunk.step.logprobs` then holds each token's log-probability and those of so many of the
                likeliest.
            stepper: another way to decode, made by `make_stepper`.
            settings: fields of `Sampling` by name: `temperature` (0 is greedy; above, sampling with `top_k`, `top_p`,
                `min_p` and `seed`), `repetition_penalty`, `presence_penalty`, `frequency_penalty`, `logit_bias`,
                `acceptance` ("exact" gives what plain decoding gives; "typical" is faster and lossy, above temperature
                0 only) with `epsilon` and `delta`.
        """
        text = self._text(
            prompt,
            sampling,
            raw,
            max_new_tokens,
            stop,
            ignore_eos,
            constraint=constraint,
            logprobs=logprobs,
            **settings,
        )
        return (chunk for _, chunk in self._decode([text], stepper))

    def generate(self, prompt: str | Sequence[Message], *arguments: Any, **options: Any) -> Completion:
        """The whole answer; takes the arguments of `stream`."""
        return Completion.of(self.stream(prompt, *arguments, **options))

    def stream_many(
        self,
        prompts: Sequence[str | Sequence[Message]],
        *,
        each: Sequence[Mapping[str, Any]] | None = None,
        stepper: Stepper | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, Chunk]]:
        """Answers prompts side by side, as many at once as there are slots: (which prompt, its chunk), as they come.

        Args:
            each: for each prompt, arguments of `stream` that are its own.
            options: arguments of `stream` for all.
        """
        if each is not None and len(each) != len(prompts):
            raise UsageError(f"each must hold as many sets of options as there are prompts, {len(prompts)}")
        texts = []
        for i, prompt in enumerate(prompts):
            try:
                texts.append(self._text(prompt, **{**options, **(each[i] if each else {})}))
            except UsageError as error:
                raise UsageError(f"prompt {i + 1}: {error}") from None
        return self._decode(texts, stepper)

    def generate_many(
        self, prompts: Sequence[str | Sequence[Message]], *, progress: bool = False, **options: Any
    ) -> list[Completion]:
        """The whole answers, in the order of the prompts; takes the arguments of `stream_many`. `progress` shows a bar
        on stderr."""
        with _progress_bar(len(prompts), progress) as on_end:
            return list(in_order(self.stream_many(prompts, **options), len(prompts), on_end))

    def runs_on(self) -> dict[str, object]:
        """What decides a token beside weights and seed: backend and number format."""
        return {"backend": self.backend.name, "dtype": self._facts.get("dtype")}

    def describe(self) -> dict[str, object]:
        """What is loaded, for people and for bug reports."""
        import torch
        import transformers

        import medusa

        nodes: object = self.nodes
        if isinstance(self.stepper.nodes, NodeBudget):
            nodes = f"auto (up to {self.stepper.nodes.most}; {self.stepper.nodes.expected} expected)"
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
            "drafter": self.stepper.drafter.name,
            "tree": self.tree,
            "nodes": nodes,
            "versions": {
                "medusa": medusa.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }

    def _text(
        self,
        prompt: str | Sequence[Message],
        sampling: Sampling | None = None,
        raw: bool = False,
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        *,
        constraint: Constraint | Grammar | None = None,
        logprobs: int | None = None,
        **settings: Any,
    ) -> tuple[Request, TextOfSteps]:
        """What is to be decoded and what makes characters of it. Raises UsageError for bad arguments."""
        sampling = replace(sampling or GREEDY, **settings)
        stops = StopStrings(stop)
        ids = self.encode(prompt, raw=raw)
        goes_on = isinstance(prompt, str) and (raw or not self.tokenizer.chat_template)
        return self.prepare(ids, sampling, max_new_tokens, stops, ignore_eos, constraint, logprobs, goes_on=goes_on)

    def prepare(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        max_new_tokens: int,
        stops: StopStrings,
        ignore_eos: bool = False,
        constraint: Constraint | Grammar | None = None,
        logprobs: int | None = None,
        *,
        goes_on: bool = False,
    ) -> tuple[Request, TextOfSteps]:
        """Of a prompt's tokens: what a scheduler takes, and what makes characters of its steps. The text `goes_on` from
        the prompt's, or is an answer to it. Raises UsageError, see `Request.check`."""
        ends = frozenset(() if ignore_eos else self.eos_token_ids)
        request = Request(ids, sampling, max_new_tokens, ends, constraint, logprobs)
        request.check(self.backend.max_length)
        return request, TextOfSteps(self.tokenizer, stops, ends, len(ids), ids if goes_on else ())

    def _decode(
        self, texts: Sequence[tuple[Request, TextOfSteps]], stepper: Stepper | None
    ) -> Iterator[tuple[int, Chunk]]:
        begun = time.perf_counter()
        scheduler = Scheduler(stepper or self.stepper_for([request for request, _ in texts]), self.slots)
        running = {scheduler.submit(request): (i, text) for i, (request, text) in enumerate(texts)}
        call = begun
        try:
            while not scheduler.idle:
                chunks = []
                for task, step in scheduler.step():
                    i, text = running[task]
                    chunk = text.push(step, call if step.draft is None else begun)
                    if chunk.finish_reason is not None:
                        scheduler.cancel(task)  # a stop string: the loop does not know
                    chunks.append((i, chunk))
                yield from chunks
                begun = time.perf_counter()
        finally:
            scheduler.close()


@contextlib.contextmanager
def _progress_bar(total: int, shown: bool) -> Iterator[Callable[[], object]]:
    """What is to be called whenever one of `total` texts has ended."""
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("Answering", total=total)
        yield lambda: progress.advance(bar)


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
        stepper = make_stepper(backend, HeadsDrafter(heads), DRAFTED_NODES, MachineTimes(lambda again: None))
        key["stepper"] = type(stepper).__name__  # who drafts
        if isinstance(stepper, ReferenceStepper):
            draft = stepper.draft_after
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
    source = zoo.resolve(model, progress=progress, in_place=loading.native_refusal(settings) is None)
    heads_path = zoo.find_heads(settings.heads, source)
    tokenizer_of = functools.cache(functools.partial(_load_tokenizer, source, hashed=heads_path is not None))
    if heads_path is not None and source.unknown is not None and settings.heads == "auto":
        heads_path = heads_path if loading.fit(heads_path, source, lambda: tokenizer_of()[1]) else None
    if settings.drafter == "heads" and heads_path is None:
        raise UsageError(f"there are no heads for {model}: give --heads PATH, or use --drafter ngram")
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
