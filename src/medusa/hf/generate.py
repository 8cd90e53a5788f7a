"""transformers' own `generate`, decoded by Medusa:

    model.generate(**inputs, custom_generate=medusa.custom_generate(heads="path/to/heads"), max_new_tokens=100)

`generate` prepares inputs and settings as ever and hands them to the function made here; `settings.py` reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from medusa.api import measured_times
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.sampling import Sampling
from medusa.decoding.scheduler import decode
from medusa.decoding.times import MachineTimes, PassTimes
from medusa.errors import UsageError
from medusa.hf.settings import (
    Stops,
    check_arguments,
    check_config,
    check_model,
    read_prompts,
    read_sampling,
    read_stops,
    withheld,
)
from medusa.steppers import Nodes, choose_nodes, make_drafter

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    from medusa.decoding.stepper import Stepper
    from medusa.engines.transformers import TransformersBackend
    from medusa.heads.module import Heads


def custom_generate(
    *,
    heads: str | Path | None = None,
    drafter: str = "union",
    nodes: Nodes = "auto",
    seed: int | None = None,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **typical: Any,
) -> Callable[..., Tensor]:
    """Makes a function for the `custom_generate` argument of transformers' `generate`.

    Args:
        heads: a directory of saved heads; without one the n-gram drafter works alone.
        drafter, nodes: see `medusa.load`.
        seed: of sampling, for the first row of a batch; the others have those that follow. Without one torch's decides.
        streamer, tokenizer: for `generate`'s own arguments of these names, where they cannot be given to it.
        typical: `acceptance`, `epsilon`, `delta`, see `LanguageModel.stream`.

    The returned function raises UsageError for settings that Medusa does not do (beam search and the like). It keeps
    what it has built for a model, so use one function for many calls.
    """
    return _CustomGenerate(heads, drafter, nodes, seed, streamer, tokenizer, typical)


@dataclass(slots=True)
class _Built:
    """What is kept of a model between two calls.

    It must not hold the model, which would then never be freed, and nothing that a change of the weights makes wrong.
    The backend is made anew for each call and runs the live model. Kept are the result of the self-check, which
    depends on the model's layers and not on their weights; the heads, which may hold copies of embeddings and LM head;
    and the times of passes. `facts` is all that these depend on: when it changes, they are made anew.
    """

    facts: tuple[object, ...]
    heads: Heads | None
    times: dict[tuple[object, ...], PassTimes] = field(default_factory=dict)  # by what they depend on besides


@dataclass(eq=False)
class _CustomGenerate:
    """The arguments of `custom_generate`, and what is kept of each model that it was called with."""

    heads: str | Path | None
    drafter: str
    nodes: Nodes
    seed: int | None
    streamer: BaseStreamer | None
    tokenizer: PreTrainedTokenizerBase | None
    typical: dict[str, Any]
    built: WeakKeyDictionary[PreTrainedModel, _Built] = field(default_factory=WeakKeyDictionary)

    # `stop_strings` is named so that `generate` leaves it to us: with them in its own settings it would ask for a
    # tokenizer, which it drops where it has a callable.
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        generation_config: GenerationConfig,
        stop_strings: str | list[str] | None = None,
        **inputs: Any,
    ) -> Tensor:
        arguments = withheld(self)
        for name in ("streamer", "tokenizer", "synced_gpus"):  # should a later transformers hand them on
            if (value := inputs.pop(name, None)) is not None:
                arguments[name] = value
        theirs = arguments.get("streamer")  # has been given the prompt by generate
        streamers = [streamer for streamer in (theirs, self.streamer) if streamer is not None]
        try:
            if len(streamers) > 1:
                raise UsageError("there are two streamers: give one to generate or to custom_generate, not to both")
            if streamers and len(input_ids) > 1:
                raise UsageError(f"a streamer takes one text, not {len(input_ids)}: give generate one prompt at a time")
            if streamers and theirs is None:
                streamers[0].put(input_ids.cpu())
            check_arguments(arguments)
            check_config(generation_config)
            check_model(model)
            tokenizer = arguments.get("tokenizer", self.tokenizer)
            stops = read_stops(inputs.pop("stopping_criteria", ()), stop_strings, tokenizer)
            return self._generate(model, input_ids, generation_config, stops, inputs, *streamers)
        finally:
            for streamer in streamers:  # after an error too: whoever reads must not wait for more
                streamer.end()

    def _generate(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        config: GenerationConfig,
        stops: Stops,
        inputs: dict[str, Any],
        streamer: BaseStreamer | None = None,
    ) -> Tensor:
        import torch

        processors = inputs.pop("logits_processor", ())
        prompts = read_prompts(input_ids, inputs)
        width = input_ids.shape[1]
        settings = read_sampling(
            processors, do_sample=bool(config.do_sample), padding=[width - len(prompt) for prompt in prompts]
        )
        # Each row has a seed of its own: rows that are asked alike are to be different samples.
        first = self.seed or 0
        if self.seed is None and config.do_sample:
            first = int(torch.randint(2**53, ()))  # by torch's generator, so that its seed counts
        seeds = [first, *((first + i) % 2**64 for i in range(1, len(prompts)))]
        samplings = [Sampling(**settings, seed=seed, **self.typical) for seed in seeds]
        limit = max(1, stops.max_length - width)  # generate always says one token
        stepper = self._make_stepper(model, max(map(len, prompts)) + limit)

        def say(prompt: list[int], padding: list[int], sampling: Sampling, limit: int, stops: Stops) -> list[int]:
            """The tokens of a text, up to the one that ends it. `padding` came before the prompt."""
            ids = [*padding, *prompt]
            steps = decode(stepper, prompt, sampling, max_new_tokens=limit, eos_token_ids=stops.eos_token_ids)
            with closing(steps):  # type: ignore[type-var]
                for token in chain.from_iterable(step.tokens for step in steps):
                    ids.append(token)
                    if streamer is not None:
                        streamer.put(torch.tensor([token]))
                    if stops.hit(ids):
                        break
            return ids[len(padding) + len(prompt) :]

        paddings = [row[: width - len(prompt)] for row, prompt in zip(input_ids.tolist(), prompts, strict=True)]
        rows = [say(*texts, limit, stops) for texts in zip(prompts, paddings, samplings, strict=True)]
        longest = max(map(len, rows))
        filler = _filler(config, stops)
        for prompt, sampling, row in zip(prompts, samplings, rows, strict=True):
            missing = longest - len(row)
            if missing and filler is None:  # as generate does: without end tokens a row continues until all have ended
                row += say(prompt + row, [], sampling, missing, Stops(stops.max_length, (), ()))
            elif filler is not None:
                row += [filler] * missing
        return torch.cat([input_ids, torch.tensor(rows, device=input_ids.device)], dim=-1)

    def _make_stepper(self, model: PreTrainedModel, positions: int) -> Stepper:
        """A stepper for texts of up to `positions` tokens. UsageError: the model's context is shorter."""
        import torch

        from medusa.engines.protocol import DEFAULT_MAX_LENGTH
        from medusa.engines.transformers import TransformersBackend, check_tree_attention
        from medusa.heads.file import load_heads, read_config

        layers = read_config(self.heads).feature_layers if self.heads else ()
        backend = TransformersBackend(
            model,
            max_length=positions if positions > DEFAULT_MAX_LENGTH else None,
            feature_layers=layers,
            self_check=False,
        )
        if positions > backend.max_length:
            raise UsageError(
                f"max_length, or max_new_tokens after the prompt, reaches {positions} tokens, past the context of "
                f"{backend.max_length}: ask for fewer"
            )
        facts = _facts(model, backend, self.heads)
        built = self.built.get(model)
        if built is None or built.facts != facts:
            check_tree_attention(backend)
            heads = load_heads(self.heads, backend.base_weights(), dtype=model.dtype) if self.heads else None
            built = self.built[model] = _Built(facts, heads)

        timed = {
            "parameters": model.num_parameters(),
            "dtype": str(model.dtype),
            "device": str(model.device),
            "threads": torch.get_num_threads(),
        }

        def times(refresh: bool) -> PassTimes:
            key = tuple(timed.values())
            if refresh or key not in built.times:
                built.times[key] = measured_times(backend, built.heads, timed) or PassTimes.typical()
            return built.times[key]

        proposer = make_drafter(self.drafter, built.heads)
        return ReferenceStepper(backend, proposer, choose_nodes(self.nodes, proposer, MachineTimes(times), backend))


def _facts(model: PreTrainedModel, backend: TransformersBackend, heads: str | Path | None) -> tuple[object, ...]:
    """What `_Built` depends on. A weight's version counts the changes made to it in place, as training does.

    Heads read a weight that changes unseen (through `.data`) as it is, or a copy of it as it was. Neither can change
    a text: heads only guess.
    """
    facts: tuple[object, ...] = (
        model.dtype,
        model.device,
        model.training,  # dropout fails the self-check
        getattr(model.config, "_attn_implementation", None),
        tuple(type(module) for module in model.modules()),  # adapters are layers
    )
    if heads is None:
        return facts
    from medusa.heads.file import CONFIG_FILE, WEIGHTS_FILE

    files = tuple(
        (path.stat().st_mtime_ns, path.stat().st_size, path.stat().st_ino)
        for path in (Path(heads) / CONFIG_FILE, Path(heads) / WEIGHTS_FILE)
        if path.exists()
    )
    base = backend.base_weights()
    weights = tuple(
        (id(weight), weight.data_ptr(), None if weight.is_inference() else weight._version)
        for weight in (base.embedding, base.lm_head)
    )
    return (*facts, files, weights)


def _filler(config: GenerationConfig, stops: Stops) -> int | None:
    """What fills a row that ended before others; None where there are no end tokens, and so nothing fills."""
    if not stops.eos_token_ids:
        return None
    return stops.eos_token_ids[0] if config.pad_token_id is None else int(config.pad_token_id)
