"""A GGUF file -> its tokenizer and configuration (`describe`), and a directory of bf16 safetensors beside them
(`convert`), or the reason why it is refused.

To convert it, transformers unpacks the file, and leaves out what it does not know. So the file is read first: each
tensor, and each key of its metadata that changes the computation, is taken over, or the file is refused and the message
names it.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medusa.errors import MedusaError, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROPE_FREQUENCIES = "rope_freqs.weight"
# Without these llama.cpp takes what follows from other keys, and so does transformers.
_OPTIONAL = {"vocab_size", "rope.freq_base", "rope.dimension_count"}
_THETA = 10_000.0  # where the file does not say
# Read here, as transformers does not read them of every architecture.
_NUMBERS = {
    "rope.freq_base", "rope.dimension_count", "attention.key_length", "attention.value_length", "rope.scale_linear",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}  # fmt: skip
# Nobody reads these: with these values they change nothing.
_NEUTRAL = {
    "attention.causal": True, "expert_count": 0, "expert_used_count": 0, "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0, "rope.scaling.attn_factor": 1.0, "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}  # fmt: skip
# transformers' name of an architecture, where it is another one.
_FAMILIES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss", "minimax-m2": "minimax_m2"}
# Of the tokenizer: taken over by transformers, or of no effect on a text. Others are in `_check_tokenizer`.
_TOKENIZER = {
    "model", "pre", "tokens", "scores", "token_type", "merges", "token_type_count", "precompiled_charsmap",
    "add_bos_token", "add_eos_token", "add_space_prefix", "add_sep_token", "remove_extra_whitespaces",
}  # fmt: skip
_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
# How byte-level vocabularies split a text before they merge: those that transformers knows, and those of GPT-2.
_GPT2_SPLIT = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"}
_DIGITS_SPLIT = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself. `metadata` holds numbers, texts and lists of these; `tensors` name -> shape;
    `frequencies` the divisors of the rotary embedding's frequencies [head size / 2], where it has such a tensor."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]
    frequencies: np.ndarray | None

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own, such as "block_count"."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def refuse(self, what: str) -> MedusaError:
        return MedusaError(f"{self.path} cannot be run as it is: {what}; use another file of this model")


def read_header(path: Path) -> Header:
    """Reads and checks all but the weights. Raises MedusaError: the file is damaged, one of several, no language model,
    or holds what would be left out."""
    from medusa.models.gguf_reader import open_reader

    reader = open_reader(path)
    metadata, tensors = reader.metadata, {tensor.name: tensor for tensor in reader.tensors}
    frequencies = np.array(tensors[ROPE_FREQUENCIES].data) if ROPE_FREQUENCIES in tensors else None
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
    header = Header(path, metadata, shapes, frequencies)
    if not isinstance(metadata.get("general.architecture"), str):
        raise MedusaError(f"{path} is damaged or cut short (it does not say its architecture): get the file again")
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise header.refuse(f"it is of the type {kind}, not a model")
    if (parts := metadata.get("split.count", 0)) > 1:
        raise MedusaError(
            f"{path} is one of {parts} parts of a model: join them first "
            "(llama-gguf-split --merge FIRST-PART WHOLE-FILE) and name the whole file"
        )
    _check_keys(header)
    _check_tokenizer(header)
    return header


def _check_keys(header: Header) -> None:
    """Raises MedusaError for a key of the architecture that is missing, or that nobody reads."""
    from gguf import MODEL_ARCH_NAMES
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

    arch = header.architecture
    configs: Any = GGUF_TO_TRANSFORMERS_MAPPING["config"]
    if not (mapping := configs.get(_FAMILIES.get(arch, arch))):
        raise header.refuse(f"transformers does not read the architecture {arch}")
    read = {key for key, name in mapping.items() if name is not None and name != -1}
    for key in sorted(read | _NUMBERS):
        value = header.get(key)
        if value is None:
            if key in read - _OPTIONAL:
                raise header.refuse(f"its metadata lack {arch}.{key}")
        elif isinstance(value, list):
            raise header.refuse(f"{arch}.{key} is another for each layer")
        elif not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= 0:
            raise header.refuse(f"{arch}.{key} is {shortened(value, 40)}, not a number from 0")
    known = read | _NUMBERS | {"rope.scaling.type", "rope.scaling.finetuned"}
    others = {*MODEL_ARCH_NAMES.values(), "adapter", "clip"} - {arch}
    for name, value in header.metadata.items():
        space, _, key = name.partition(".")
        if space in others:
            raise header.refuse(f"it holds {name}, which belongs to something else than {arch}")
        if space != arch or key in known or _NEUTRAL.get(key) == value:
            continue
        if key == "attention.sliding_window" and (value == 0 or value >= header.get("context_length", 0)):
            continue  # as wide as the context: no window
        raise header.refuse(f"it holds {name} = {shortened(value, 40)}, which would be left out")


def _check_tokenizer(header: Header) -> None:
    """Raises MedusaError where transformers would make other tokens of a text than the file says."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    metadata = header.metadata
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise header.refuse("it holds no tokens (tokenizer.ggml.tokens)")
    for name, value in metadata.items():
        key = name.removeprefix("tokenizer.ggml.")
        if key == name:
            continue
        if not key.endswith("token_id"):
            if key not in _TOKENIZER:
                raise header.refuse(f"it holds {name}, which would be left out")
        elif not 0 <= value < len(tokens):
            raise header.refuse(f"{name} is {value}, but there are {len(tokens)} tokens")
    # What transformers does for each kind of vocabulary, whatever the file says.
    space = kind == "llama" and not header.architecture.startswith("gemma")
    for key, does in (("add_space_prefix", space), ("remove_extra_whitespaces", False), ("add_sep_token", False)):
        wanted = metadata.get(f"tokenizer.ggml.{key}")
        if wanted is not None and bool(wanted) != does and kind != "t5":
            raise header.refuse(f"tokenizer.ggml.{key} is {wanted}, which would be left out")
    split = metadata.get("tokenizer.ggml.pre")
    if kind == "gpt2" and split not in {*GGUF_PRE_TOKENIZER_SPLITS, *_GPT2_SPLIT, *_DIGITS_SPLIT}:
        what = "does not say how its vocabulary splits a text" if split is None else f"splits texts as {split} does"
        raise header.refuse(f"it {what} (tokenizer.ggml.pre), which nothing here knows")


class NotInPlaceError(MedusaError):
    """The file can only be converted; the message is the reason."""


def describe(path: Path, target: Path, name: str, on_step: Callable[[str], None]) -> None:
    """Writes into `target` what `convert` does, but for the weights: tokenizer, configuration, ends of texts.

    Raises:
        NotInPlaceError: the native engine does not run this kind of model, or not out of such a file.
        MedusaError: the file is refused (see `read_header`), or a tensor is missing or would be left out.
    """
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerFast
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    from medusa.engines.native_config import UnsupportedError, native_config
    from medusa.models.gguf_weights import PAIRED, incomplete, shapes_in_file

    on_step("reading the tokenizer")
    header = read_header(path)
    if header.architecture not in PAIRED:
        raise NotInPlaceError(f"files of {header.architecture} are not read in place")
    config: Any = _config(header)
    _complete(config, header)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = torch.bfloat16
    config.name_or_path = name
    try:
        native = native_config(config)
    except UnsupportedError as error:
        raise NotInPlaceError(str(error)) from None
    shapes = shapes_in_file(header.architecture, native)
    if missing := sorted(shapes.keys() - header.tensors.keys()):
        raise incomplete(path, missing)
    if others := sorted(header.tensors.keys() - shapes.keys() - {ROPE_FREQUENCIES}):
        raise header.refuse(f"it holds the tensor {others[0]}, which would be left out")
    for tensor, shape in shapes.items():
        if (held := header.tensors[tensor]) != shape:
            raise header.refuse(f"{tensor} is {list(held)}, but by its metadata {list(shape)}")
    loader: Any = TOKENIZER_MAPPING.get(type(config), PreTrainedTokenizerFast)
    tokenizer = loader.from_pretrained(path.parent, gguf_file=path.name)
    _split_digits(header, tokenizer)
    generation: Any = GenerationConfig.from_model_config(config)
    generation.eos_token_id = _ends(header)
    on_step("writing")
    target.mkdir(parents=True, exist_ok=True)
    for part in (config, generation, tokenizer):
        part.save_pretrained(target)
    _generalise_tokenizer(target)


def _generalise_tokenizer(directory: Path) -> None:
    """Saves a tokenizer anew as one of the general class, which loads without a search for its class. Some classes add
    parts of their own when they are loaded, and these are in it then."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "TokenizersBackend"}
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(header: Header) -> PreTrainedConfig:
    """As transformers reads it, which takes many seconds where the vocabulary is large."""
    from transformers import AutoConfig
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

    mapping: Any = GGUF_TO_TRANSFORMERS_MAPPING["config"]
    values: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in header.tensors}
    for name, value in header.metadata.items():
        space, _, key = name.partition(".")
        if (field := mapping.get(space, {}).get(key, -1)) not in (None, -1):
            values[field] = value
    values.setdefault("vocab_size", len(header.metadata["tokenizer.ggml.tokens"]))
    config: PreTrainedConfig = AutoConfig.for_model(**values)
    return config


def _ends(header: Header) -> list[int] | None:
    """The tokens that end a text."""
    ends = [header.metadata.get(f"tokenizer.ggml.{key}") for key in _END_TOKENS]
    return list(dict.fromkeys(end for end in ends if end is not None)) or None


def convert(path: Path, target: Path, name: str, on_step: Callable[[str], None]) -> None:
    """De-quantises `path` into `target`: tokenizer, configuration and bf16 safetensors.

    bf16 holds all that a file of 8 bits or fewer has to give, in half the memory of float32. transformers speaks as its
    settings say (see `quiet.py`).

    Args:
        name: of the model, for its configuration.
        on_step: called with what is being done.

    Raises:
        MedusaError: the file is refused (see `read_header`), or a tensor is missing or would be left out.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The reader shows a bar of its own that no setting turns off.
    with contextlib.redirect_stderr(io.StringIO()):
        on_step("reading the tokenizer")
        header = read_header(path)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        _split_digits(header, tokenizer)
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        _complete(config, header)
        on_step("unpacking the weights")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            config=config,
            gguf_file=path.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        model, report = loaded
        _check_tensors(header, model, report)
        # The weights are plain now; left in place, these two would mark them as packed and refuse to save.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.config.name_or_path = name
        model.generation_config.eos_token_id = _ends(header)
        on_step("writing")
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _split_digits(header: Header, tokenizer: Any) -> None:
    """Vocabularies that take digits one by one: transformers would split as GPT-2 does."""
    kind, split = (header.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind == "gpt2" and split in _DIGITS_SPLIT:
        from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )


def _complete(config: PreTrainedConfig, header: Header) -> None:
    """Puts into a configuration what transformers leaves out of it. Raises MedusaError for what does not fit in."""
    c: Any = config
    head_dim: int = header.get("attention.key_length", c.hidden_size // c.num_attention_heads)
    keys = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    sizes = {key: header.get(key, head_dim) for key in keys}
    if set(sizes.values()) != {head_dim}:
        listed = ", ".join(f"{key} {value}" for key, value in sizes.items())
        raise header.refuse(f"the sizes of a head differ ({listed})")
    if hasattr(c, "head_dim"):
        c.head_dim = head_dim
    elif head_dim != c.hidden_size // c.num_attention_heads:
        raise header.refuse(f"its heads have {head_dim} numbers (attention.key_length), which {c.model_type} cannot")
    if header.architecture == "llama" and getattr(c, "sliding_window", None):
        c.sliding_window = None  # a default of transformers' class for a file called mistral
    if getattr(c, "rope_parameters", None):
        c.rope_parameters = _rope(header, head_dim)


def _rope(header: Header, head_dim: int) -> dict[str, Any]:
    """The rotary embedding as transformers is told of it."""
    theta = float(header.get("rope.freq_base", _THETA))
    kind = header.get("rope.scaling.type")
    factor = header.get("rope.scaling.factor", header.get("rope.scale_linear"))
    kind = kind or ("linear" if factor not in (None, 0, 1) else "none")
    if header.frequencies is not None:
        if kind != "none":
            raise header.refuse(f"it holds {ROPE_FREQUENCIES} and a rope.scaling.type, {kind}, besides")
        return {**_llama3(header, theta, head_dim), "rope_theta": theta}
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if not isinstance(factor, (int, float)) or not factor >= 1:
        raise header.refuse(f"its rope.scaling.type is {kind}, but the factor is {factor}")
    if kind not in ("linear", "yarn"):
        raise header.refuse(f"its rotary embedding is scaled by {kind}, which is not known")
    settings: dict[str, Any] = {"rope_type": kind, "factor": float(factor), "rope_theta": theta}
    if kind == "yarn":
        original = header.get("rope.scaling.original_context_length", header.get("context_length"))
        settings["original_max_position_embeddings"] = int(original)
        for name in ("beta_fast", "beta_slow"):
            if (value := header.get(f"rope.scaling.yarn_{name}")) is not None:
                settings[name] = float(value)
    return settings


def _llama3(header: Header, theta: float, head_dim: int) -> dict[str, Any]:
    """Files of Llama 3.1 and later hold the divisors of the frequencies themselves. They follow from four numbers, of
    which the model's makers have always chosen the same two; the other two are found here."""
    divisors = np.asarray(header.frequencies, dtype=np.float64).reshape(-1)
    lengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)  # of the waves
    low, high, factor = 1.0, 4.0, float(divisors.max())
    if divisors.shape == lengths.shape and factor > 1:
        for original in (2**power for power in range(5, 21)):
            smooth = (original / lengths - low) / (high - low)
            middle = 1 / ((1 - smooth) / factor + smooth)
            wanted = np.where(lengths < original / high, 1.0, np.where(lengths > original / low, factor, middle))
            if np.allclose(divisors, wanted, rtol=1e-4):
                factors = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
                return {"rope_type": "llama3", **factors, "original_max_position_embeddings": original}
    if np.all(divisors == 1):
        return {"rope_type": "default"}
    raise header.refuse(f"{ROPE_FREQUENCIES} holds other numbers than those of Llama 3")


def _check_tensors(header: Header, model: Any, report: Mapping[str, Any]) -> None:
    """Raises MedusaError for a tensor that is not there, and for one that transformers has left out."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    from medusa.models.gguf_weights import incomplete

    missing = sorted({*report["missing_keys"], *(str(key) for key in report.get("mismatched_keys", ()))})
    if missing:
        raise incomplete(header.path, missing)
    processor: Any = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)
    taken = get_gguf_hf_weights_map(model, processor(config=model.config.to_dict()))
    for name in header.tensors:
        if name not in taken and re.sub(r"\.(weight|bias)$", "", name) not in taken and name != ROPE_FREQUENCIES:
            raise header.refuse(f"it holds the tensor {name}, which would be left out")
