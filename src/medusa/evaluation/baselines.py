"""Others' ways to decode: transformers' generate, with prompt lookup or a draft model; any OpenAI-compatible server."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from medusa.decoding.sampling import GREEDY
from medusa.errors import MedusaError, UsageError
from medusa.evaluation.methods import Measurement, PeakMemory, prompt_of
from medusa.remote import lacks_thoughts

if TYPE_CHECKING:
    import torch
    from openai import OpenAI
    from transformers import PreTrainedModel

    from medusa.api import LanguageModel, Message
    from medusa.decoding.sampling import Sampling

BASELINES = {
    "transformers": "transformers' generate",
    "lookup": "transformers' generate with prompt lookup",
    "assisted": "speculative decoding: transformers' generate with --draft-model",
    "server": "the OpenAI-compatible server at --baseline-url",
}
LOOKUP_TOKENS = 10  # transformers' own default and the usual choice


class Watch:
    """A streamer that notes when transformers has its first tokens and how many, so that the prefill is left out."""

    def __init__(self) -> None:
        self.calls = 0
        self.first_seconds = 0.0
        self.first_tokens = 0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:  # the first call brings the prompt
            self.first_seconds, self.first_tokens = time.perf_counter(), value.numel()

    def end(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class TransformersMethod:
    """`generate` of a model that transformers loaded. `options` are arguments of it; `lm` gives prompts and text."""

    name: str
    network: PreTrainedModel
    lm: LanguageModel
    sampling: Sampling
    options: dict[str, Any] = field(default_factory=dict)

    def answer(self, messages: Sequence[Message], max_new_tokens: int) -> Measurement:
        import torch

        peak = PeakMemory()
        ids = self.lm.encode(prompt_of(self.lm, messages))
        prompt = torch.tensor([ids], device=self.network.device)
        sampled = not self.sampling.greedy
        names = ("temperature", "top_p", "top_k", "min_p")
        filters = {name: getattr(self.sampling, name) if sampled else None for name in names}
        if sampled:
            torch.manual_seed(self.sampling.seed or 0)
        watch, passes = Watch(), 0

        def count(*_: object) -> None:
            nonlocal passes
            passes += 1

        generate: Any = self.network.generate
        hook = self.network.register_forward_pre_hook(count)
        begun = time.perf_counter()
        try:
            out: Any = generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_new_tokens,
                eos_token_id=list(self.lm.eos_token_ids) or None,
                pad_token_id=self.lm.eos_token_ids[0] if self.lm.eos_token_ids else None,
                streamer=watch,
                do_sample=sampled,
                # Said, or the model's own generation config would decide, and not for Medusa.
                repetition_penalty=self.sampling.repetition_penalty,
                **filters,
                **self.options,
            )
        finally:
            hook.remove()
        ended = time.perf_counter()
        tokens = _to_end(out[0, len(ids) :].tolist(), self.lm.eos_token_ids)
        return Measurement(
            text=str(self.lm.tokenizer.decode(tokens, skip_special_tokens=True)),
            token_ids=tokens,
            new_tokens=len(tokens),
            decoded_tokens=max(0, len(tokens) - watch.first_tokens),
            steps=passes - 1,
            decode_seconds=ended - watch.first_seconds,
            ttft_seconds=watch.first_seconds - begun,
            peak_bytes=peak.bytes(),
        )


def _to_end(tokens: list[int], eos: Sequence[int]) -> list[int]:
    """Up to the first end-of-text token, which stays."""
    end = next((i for i, token in enumerate(tokens) if token in eos), len(tokens) - 1)
    return tokens[: end + 1]


@dataclass(frozen=True, slots=True)
class ServerMethod:
    """A server with the OpenAI interface, asked for one answer at a time, streamed."""

    name: str
    client: OpenAI
    model: str
    lm: LanguageModel
    sampling: Sampling

    def answer(self, messages: Sequence[Message], max_new_tokens: int) -> Measurement:
        sent: Any = [dict(message) for message in messages]
        seed = self.sampling.seed
        texts: list[str] = []
        new_tokens = None
        begun = time.perf_counter()
        first = last = 0.0
        chosen = {name: getattr(self.sampling, name) for name in ("top_k", "min_p", "repetition_penalty")}
        said = {name: value for name, value in chosen.items() if value != getattr(GREEDY, name)}
        for event in self.client.chat.completions.create(
            model=self.model,
            messages=sent,
            max_tokens=max_new_tokens,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            seed=None if seed is None else seed % 2**31,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=said or None,
        ):
            if event.usage is not None:
                new_tokens = event.usage.completion_tokens
            delta = event.choices[0].delta if event.choices else None
            if lacks_thoughts(delta):
                raise MedusaError(
                    f"the server takes thoughts out of {self.model}'s answers and counts their tokens: turn its "
                    "reasoning parser off"
                )
            piece = (delta.content or "") if delta is not None else ""
            if piece:
                last = time.perf_counter()
                first = first or last
                texts.append(piece)
        text = "".join(texts)
        if not new_tokens:  # a server that does not count: its text in the model's own tokens
            new_tokens = len(self.lm.tokenizer(text, add_special_tokens=False)["input_ids"])
        return Measurement(
            text=text,
            token_ids=None,
            new_tokens=new_tokens,
            decoded_tokens=max(0, new_tokens - 1),
            steps=None,
            # Where all of it came at once, how long it took is known no better.
            decode_seconds=last - (first if len(texts) > 1 else begun),
            ttft_seconds=first - begun if texts else time.perf_counter() - begun,
        )


@dataclass(frozen=True, slots=True)
class BaselineOptions:
    """Where the baselines are found; `dtype` and `device` are those of Medusa's own engine."""

    model: str
    dtype: str
    device: str
    draft_model: str | None = None
    url: str | None = None
    served_model: str | None = None


@dataclass
class Baselines:
    """Loads what the baselines need, once; closed by `stack`."""

    lm: LanguageModel
    options: BaselineOptions
    sampling: Sampling
    stack: ExitStack

    def method(self, name: str) -> TransformersMethod | ServerMethod:
        """One of BASELINES.

        Raises:
            UsageError: it lacks an option. MedusaError: a model or server cannot be used.
        """
        options = self.options
        if name == "server":
            if not options.url:
                raise UsageError("the method server needs --baseline-url URL")
            from medusa.remote import openai_client

            client = self.stack.enter_context(openai_client(options.url))
            return ServerMethod(name, client, options.served_model or options.model, self.lm, self.sampling)
        if name == "assisted":
            if not options.draft_model:
                raise UsageError("the method assisted needs --draft-model MODEL")
            arguments: dict[str, Any] = {"assistant_model": self._draft(options.draft_model)}
        else:
            arguments = {"prompt_lookup_num_tokens": LOOKUP_TOKENS} if name == "lookup" else {}
        return TransformersMethod(name, self.network, self.lm, self.sampling, arguments)

    @cached_property
    def network(self) -> PreTrainedModel:
        """The model in transformers, shared by its methods; in bfloat16 where Medusa's engine has fewer bits."""
        return self._load(self.options.model)

    def _draft(self, name: str) -> PreTrainedModel:
        draft = self._load(name)
        if draft.config.get_text_config().vocab_size != self.network.config.get_text_config().vocab_size:
            raise MedusaError(f"the draft model {name} has another vocabulary than {self.options.model}")
        return draft

    def _load(self, name: str) -> PreTrainedModel:
        import torch

        from medusa.models import zoo

        dtype = torch.float32 if self.options.dtype == "float32" else torch.bfloat16
        return zoo.load_model(zoo.resolve(name), dtype=dtype, device=self.options.device)
