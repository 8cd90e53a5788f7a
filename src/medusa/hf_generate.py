"""transformers' own `generate`, decoded by Medusa:

    model.generate(**inputs, custom_generate=medusa.custom_generate(heads="path/to/heads"), max_new_tokens=100)

`generate` prepares inputs and settings as ever and hands them to the function made here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from medusa.decoding.budget import MachineTimes, PassTimes
from medusa.decoding.loop import Decoder, decode
from medusa.decoding.sampling import Sampling
from medusa.errors import UsageError
from medusa.generation import Nodes, choose_nodes, make_drafter, measured_times
from medusa.models.loading import as_token_ids

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel

# What changes the text and this loop does not do; each with the value that means off.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "sequence_bias": (None,),
    "guidance_scale": (None, 1.0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
    "min_new_tokens": (None, 0),  # before min_length, which generate derives from it
    "min_length": (None, 0),
    "max_time": (None,),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
    "return_dict_in_generate": (None, False),
}
# What `generate` makes of the settings that are supported. Anything else in its lists is the caller's own.
_KNOWN_STEPS = {
    "EosTokenCriteria",
    "LogitNormalization",
    "MaxLengthCriteria",
    "MinPLogitsWarper",
    "RepetitionPenaltyLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
}


def custom_generate(
    *,
    heads: str | Path | None = None,
    drafter: str = "union",
    nodes: Nodes = "auto",
    seed: int | None = None,
    **typical: Any,
) -> Callable[..., Tensor]:
    """Makes a function for the `custom_generate` argument of transformers' `generate`.

    Args:
        heads: a directory of saved heads; without one the n-gram drafter works alone.
        drafter, nodes: see `medusa.load`.
        seed: of sampling.
        typical: `acceptance`, `epsilon`, `delta`, see `LanguageModel.stream`.

    The returned function raises UsageError for settings that Medusa does not do (beam search and the like).
    """

    # Measured once, even where no profile can be kept; by what may change between two calls.
    known: WeakKeyDictionary[PreTrainedModel, dict[tuple[object, ...], PassTimes]] = WeakKeyDictionary()

    def generate(
        model: PreTrainedModel, input_ids: Tensor, *, generation_config: GenerationConfig, **inputs: Any
    ) -> Tensor:
        import torch

        from medusa.models.heads import load_heads, read_config
        from medusa.models.transformers_backend import TransformersBackend

        for name, off in _UNSUPPORTED.items():
            if getattr(generation_config, name, None) not in off:
                raise UsageError(f"Medusa decoding does not support {name}: leave it out of generate")
        for step in (*(inputs.get("logits_processor") or ()), *(inputs.get("stopping_criteria") or ())):
            if type(step).__name__ not in _KNOWN_STEPS:
                raise UsageError(f"Medusa decoding does not support {type(step).__name__}: leave it out of generate")
        layers = read_config(heads).feature_layers if heads else ()
        backend = TransformersBackend(model, feature_layers=layers)
        loaded = load_heads(heads, backend.base_weights(), dtype=model.dtype) if heads else None

        facts = {
            "parameters": model.num_parameters(),
            "dtype": str(model.dtype),
            "device": str(model.device),
            "threads": torch.get_num_threads(),
        }

        def times(refresh: bool) -> PassTimes:
            measured, key = known.setdefault(model, {}), tuple(facts.values())
            if key not in measured:
                measured[key] = measured_times(backend, loaded, facts) or PassTimes.typical()
            return measured[key]

        proposer = make_drafter(drafter, loaded)
        decoder = Decoder(backend, proposer, choose_nodes(nodes, proposer, MachineTimes(times), backend))
        sampling = Sampling(
            temperature=(generation_config.temperature or 1.0) if generation_config.do_sample else 0.0,
            top_k=(generation_config.top_k or 0) if generation_config.do_sample else 0,
            top_p=(generation_config.top_p or 1.0) if generation_config.do_sample else 1.0,
            min_p=(generation_config.min_p or 0.0) if generation_config.do_sample else 0.0,
            repetition_penalty=generation_config.repetition_penalty or 1.0,
            seed=seed,
            **typical,
        )
        ends = as_token_ids(generation_config.eos_token_id)
        pad = generation_config.pad_token_id
        filler = pad if isinstance(pad, int) else ends[0] if ends else 0
        mask = inputs.get("attention_mask")
        rows: list[list[int]] = []
        for i, row in enumerate(input_ids.tolist()):
            prompt = row if mask is None else [t for t, m in zip(row, mask[i].tolist(), strict=True) if m]
            limit = generation_config.max_length - len(row)  # generate has set max_length from max_new_tokens
            steps = decode(decoder, prompt, sampling, max_new_tokens=limit, eos_token_ids=ends)
            rows.append([*row, *(token for step in steps for token in step.tokens)])
        longest = max(map(len, rows))
        padded = [row + [filler] * (longest - len(row)) for row in rows]
        return torch.tensor(padded, device=input_ids.device)

    return generate
