"""What transformers' `generate` hands to a decoding function, read into what Medusa does.

`generate` takes well over a hundred settings. Medusa does those named here; any other that is not at its default is
refused by name, so that a setting never goes unheard.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

from medusa.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StopStringCriteria

# --- the fields of a GenerationConfig ---------------------------------------------------------------------------------

# Read here or by `generate` itself, before it calls us, which makes of them what is read below.
_DONE = {
    "max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "stop_strings", "eos_token_id", "pad_token_id", "bos_token_id",
}  # fmt: skip
# Change no text: they are for beams, assistants and encoders, which are refused by fields of their own; for caches and
# compiled passes, of which Medusa has its own; or for outputs beside the text, which need return_dict_in_generate.
_HARMLESS = {
    "early_stopping", "length_penalty", "diversity_penalty", "low_memory", "decoder_start_token_id",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
    "target_lookbehind", "max_matching_ngram_size", "use_cache", "cache_config", "max_cache_len", "compile_config",
    "disable_compile", "prefill_chunk_size", "continuous_batching_config", "renormalize_logits", "output_attentions",
    "output_hidden_states", "output_scores", "output_logits", "transformers_version",
}  # fmt: skip
# The values that mean off, beside None and False, of all other fields.
_OFF: dict[str, tuple[Any, ...]] = {
    "min_new_tokens": (0,),  # before min_length, which generate derives from it
    "min_length": (0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "guidance_scale": (1.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "cache_implementation": ("dynamic", "static", "offloaded", "offloaded_static"),  # quantized: another text
}


def refuse(name: str) -> UsageError:
    return UsageError(f"Medusa decoding does not support {name}: leave it out of generate")


def check_config(config: GenerationConfig) -> None:
    """Raises UsageError for the first field that is neither done, nor harmless, nor off.

    Fields that transformers does not know itself are left alone: old files carry many, and `generate` ignores them.
    """
    from transformers import GenerationConfig

    for name in (*_OFF, *vars(GenerationConfig())):
        value = getattr(config, name, None)
        if name in _DONE or name in _HARMLESS or name.startswith("_") or value is None or value is False:
            continue
        if value not in _OFF.get(name, ()):
            raise refuse(name)


# --- what the model would be given ------------------------------------------------------------------------------------

_HARMLESS_INPUTS = {"use_cache", "output_attentions", "output_hidden_states"}


def check_model(model: PreTrainedModel) -> None:
    """Raises UsageError where a wrapper changes what the model reads, unseen in the arguments."""
    replaced = vars(model).get("prepare_inputs_for_generation")
    of_class: Any = type(model)
    if replaced is not None and replaced != MethodType(of_class.prepare_inputs_for_generation, model):
        raise UsageError(
            "Medusa decoding does not support prompt tuning, prefix tuning and other wrappers that replace the model's "
            "prepare_inputs_for_generation: call generate without custom_generate"
        )
    for module in model.modules():  # how peft hands on what it is told for one call
        for hook in module._forward_pre_hooks.values():
            for name in ("adapter_names", "alora_offsets"):
                if isinstance(hook, functools.partial) and name in hook.keywords:
                    raise refuse(name)


def read_prompts(input_ids: Tensor, inputs: Mapping[str, Any]) -> list[list[int]]:
    """The rows without the padding on their left. UsageError: the model would be given anything but these tokens."""
    import torch

    mask, positions, cache = (inputs.get(name) for name in ("attention_mask", "position_ids", "past_key_values"))
    for name, value in inputs.items():
        known = name in ("attention_mask", "position_ids", "past_key_values") or name in _HARMLESS_INPUTS
        known = known or (name == "logits_to_keep" and isinstance(value, int))  # a tensor could leave out the last
        if not known and value is not None:
            raise refuse(name)
    if cache is not None and (getattr(cache, "_is_user_defined", False) or cache.get_seq_length() > 0):
        raise refuse("past_key_values")
    if mask is None:
        mask = torch.ones_like(input_ids)
    mask = mask.to(input_ids.device)
    if mask.shape != input_ids.shape or not bool(((mask == 1) | (mask == 0)).all()):
        raise refuse("an attention_mask of this shape or with other values than 0 and 1")
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise UsageError("attention_mask hides tokens after the first: Medusa decoding wants padding on the left only")
    if positions is not None:
        wanted = mask.long().cumsum(-1) - 1  # [B, T]; vision models have several planes [P, B, T], alike for text
        if positions.ndim < 2 or positions.shape[-1] != len(mask[0]) or positions.shape[-2] not in (1, len(mask)):
            raise refuse("position_ids of this shape")
        if bool(((positions.to(mask.device) != wanted) & (mask == 1)).any()):
            raise refuse("position_ids that do not count up from 0")
    return [row[len(row) - int(seen) :] for row, seen in zip(input_ids.tolist(), mask.sum(-1), strict=True)]


# --- logits processors and stopping criteria --------------------------------------------------------------------------

# In the order in which Sampling applies them; each with its field of Sampling and the attribute that holds it.
_PROCESSORS = {
    "RepetitionPenaltyLogitsProcessor": ("repetition_penalty", "penalty"),
    "TemperatureLogitsWarper": ("temperature", "temperature"),
    "TopKLogitsWarper": ("top_k", "top_k"),
    "TopPLogitsWarper": ("top_p", "top_p"),
    "MinPLogitsWarper": ("min_p", "min_p"),
    "LogitNormalization": ("", ""),  # a constant for each row, which changes neither the best token nor a probability
}


def read_sampling(processors: Iterable[Any], *, do_sample: bool, padding: Sequence[int]) -> dict[str, Any]:
    """Arguments of `Sampling`, from the processors themselves: some may be the caller's own.

    Raises:
        UsageError: one that Medusa does not do, or in another order, or twice, or with other options.
    """
    import transformers

    settings: dict[str, Any] = {"temperature": 1.0}
    order = list(_PROCESSORS)
    last = -1
    for step in processors:
        name = type(step).__name__
        place = order.index(name) if name in order and type(step) is getattr(transformers, name) else -1
        if place <= last:
            raise refuse(name)
        last = place
        if getattr(step, "min_tokens_to_keep", 1) != 1 and name != "TopKLogitsWarper":  # top_k has taken it in
            raise refuse(f"min_tokens_to_keep of {name}")
        if getattr(step, "filter_value", -math.inf) != -math.inf:
            raise refuse(f"filter_value of {name}")
        if name == order[0] and _ignored(step, len(padding)) != list(padding):
            raise refuse(f"prompt_ignore_length of {name}")
        field, attribute = _PROCESSORS[name]
        if field:
            settings[field] = getattr(step, attribute)
    if not do_sample:  # the filters keep the best token, whatever they are
        return {"temperature": 0.0, "repetition_penalty": settings.get("repetition_penalty", 1.0)}
    return settings


def _ignored(penalty: Any, rows: int) -> list[int]:
    """How many tokens at the start of each row the penalty leaves out."""
    ignored = penalty.prompt_ignore_length
    return ignored.tolist() if hasattr(ignored, "tolist") else [ignored or 0] * rows


@dataclass(frozen=True, slots=True)
class Stops:
    """What ends a text."""

    max_length: int  # with the prompt and its padding
    eos_token_ids: tuple[int, ...]
    strings: tuple[StopStringCriteria, ...]

    def hit(self, ids: Sequence[int]) -> bool:
        """Whether the last token completes a stop string, by transformers' own rule: the token stays in the text."""
        import torch

        return any(bool(stop(torch.tensor([ids[-stop.maximum_token_len :]]), None)[0]) for stop in self.strings)


def read_stops(
    criteria: Iterable[Any], stop_strings: str | list[str] | None, tokenizer: PreTrainedTokenizerBase | None
) -> Stops:
    """Reads the criteria themselves: some may be the caller's own. UsageError: one that Medusa does not do."""
    from transformers import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

    lengths: list[int] = []
    ends: list[int] = []
    strings: list[StopStringCriteria] = []
    for step in criteria:
        if type(step) is MaxLengthCriteria:
            lengths.append(step.max_length)
        elif type(step) is EosTokenCriteria:
            ends += step.eos_token_id.reshape(-1).tolist()
        elif type(step) is StopStringCriteria:
            strings.append(step)
        else:
            raise refuse(type(step).__name__)
    if stop_strings is not None:
        if tokenizer is None:
            raise UsageError("stop_strings need the model's tokenizer: give generate tokenizer=")
        if not stop_strings or not all([stop_strings] if isinstance(stop_strings, str) else stop_strings):
            raise UsageError("stop_strings must be strings of at least one character")
        strings.append(StopStringCriteria(tokenizer, stop_strings))
    return Stops(min(lengths), tuple(ends), tuple(strings))


# --- what generate does not hand on -----------------------------------------------------------------------------------

_REFUSED_ARGUMENTS = ("assistant_model", "negative_prompt_ids", "negative_prompt_attention_mask", "synced_gpus")


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises UsageError for arguments that Medusa does not do; `arguments` are those of `withheld`."""
    for name in _REFUSED_ARGUMENTS:
        value = arguments.get(name)
        if value is not None and value is not False:
            raise refuse(name)


def withheld(function: Callable[..., Any]) -> dict[str, Any]:
    """Arguments of `generate` that it keeps from `function`, its `custom_generate`; to be called by that directly.

    transformers (5.23) hands a callable neither the streamer nor the tokenizer, and without the first its reader would
    wait for ever. So they are looked up where they are: in the arguments of `generate`, and for the tokenizer, which
    `generate` drops before anything else, in those of the wrappers around it (torch.no_grad for one). A frame counts
    only if it was given this very function as `custom_generate`. Other frames are not looked into: Python before 3.13
    would keep their variables alive.
    """
    arguments: dict[str, Any] = {}
    frame = inspect.currentframe()
    for _ in range(2):  # over this function and its caller
        frame = frame and frame.f_back
    while frame is not None and not {"custom_generate", "kwargs"}.isdisjoint(frame.f_code.co_varnames):
        variables = frame.f_locals
        for given in (variables, variables.get("kwargs")):
            if isinstance(given, Mapping) and given.get("custom_generate") is function:
                for name in ("streamer", "tokenizer", *_REFUSED_ARGUMENTS):
                    if given.get(name) is not None:
                        arguments.setdefault(name, given[name])
        frame = frame.f_back
    return arguments
