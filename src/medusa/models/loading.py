"""Which backend runs a model here, and why; the model on it, and the heads beside it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from medusa.engines.native_config import UnsupportedError, is_complete, native_config
from medusa.errors import MedusaError, UsageError
from medusa.models import zoo
from medusa.settings import EngineSettings

if TYPE_CHECKING:
    from medusa.engines.native_config import NativeConfig
    from medusa.engines.protocol import Backend
    from medusa.heads.config import HeadsConfig
    from medusa.heads.module import HeadsRunner


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on a backend. `facts` describe both for people; `eos_token_ids` may be empty."""

    backend: Backend
    eos_token_ids: tuple[int, ...]
    facts: dict[str, object]


def load_backend(
    source: zoo.ModelSource, settings: EngineSettings, *, meanwhile: Callable[[], object] = lambda: None
) -> LoadedModel:
    """Loads a model on the backend that is asked for, or with `auto` on the native engine where that can run it.

    `meanwhile` (loading the tokenizer, say) is called on this thread, once or more, before the weights are loaded or
    while another thread packs them. Only this thread may import transformers: its modules import each other when they
    are first used, which fails now and then when two threads do it.

    Raises:
        UsageError: a bad argument, or one that the backend does not take.
        MedusaError: the model cannot be found, read or run.
    """
    refusal = native_refusal(settings)
    if settings.backend != "transformers" and refusal is None:
        try:
            return _load_native(source, settings, meanwhile)
        except UnsupportedError as error:
            refusal = str(error)
            if settings.progress and settings.backend == "auto":
                note = f"{source.name} runs on transformers, not on the faster native engine: {refusal}"
                print(note, file=sys.stderr, flush=True)
    if settings.backend == "native":
        raise MedusaError(f"the native backend cannot run {source.name}: {refusal}")
    reason = "asked for" if settings.backend == "transformers" else f"not native: {refusal}"
    if settings.dtype == "int4" and not settings.device.startswith("cuda"):
        raise UsageError(f"int4 needs the native backend ({reason}) or a CUDA device: take --dtype int8")
    meanwhile()
    return _load_transformers(zoo.unpacked(source, progress=settings.progress), settings, reason)


def check_heads(config: HeadsConfig, source: zoo.ModelSource) -> None:
    """Raises MedusaError for heads of a model of another shape, before any of its weights are read."""
    from medusa.heads.config import check_shape

    model = _config(source)
    if hasattr(model, "get_text_config"):
        model = model.get_text_config()
    vocab_size = getattr(model, "vocab_size", config.vocab_size)  # what is not said here, the weights show
    hidden_size = getattr(model, "hidden_size", config.hidden_size)
    check_shape(config, vocab_size, hidden_size, getattr(model, "num_hidden_layers", None))


def fit(path: Path, source: zoo.ModelSource, vocab_hash: Callable[[], str]) -> bool:
    """Whether heads are for this model, as far as its shape and tokenizer tell. Raises MedusaError: damaged heads."""
    from medusa.heads.config import check_vocabulary
    from medusa.heads.file import read_config

    config = read_config(path)
    try:
        check_heads(config, source)
        check_vocabulary(config, vocab_hash())
    except MedusaError:
        return False
    return True


def load_heads(path: Path, loaded: LoadedModel, settings: EngineSettings) -> HeadsRunner:
    """The heads saved in `path`, running where the model runs. Raises MedusaError when they do not fit its shape; its
    tokenizer is for the caller to check."""
    import torch

    from medusa.engines.native import NativeBackend
    from medusa.heads import file

    num_layers = loaded.backend.num_layers
    if isinstance(loaded.backend, NativeBackend):
        from medusa.engines.native_heads import NativeHeads

        base = loaded.backend.hollow_weights()
        # In float32 each weight of 8 bits is what it is in the file, and is packed into the same 8 bits again.
        exact = torch.float32 if file.read_config(path).weights == "int8" else torch.bfloat16
        heads = file.load_heads(path, base, num_layers=num_layers, dtype=exact)
        return NativeHeads(loaded.backend, heads)
    base = loaded.backend.base_weights()
    dtype = torch.float32 if settings.dtype == "float32" else torch.bfloat16
    # Heads only guess, so they may compute in bfloat16 beside a float32 model wherever that is the faster one.
    fast = settings.device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return file.load_heads(path, base, num_layers=num_layers, dtype=torch.bfloat16 if fast else dtype)


def native_refusal(settings: EngineSettings) -> str | None:
    """Why the native engine is not taken, whatever the model."""
    if settings.backend == "transformers":
        return "asked for"
    from medusa.engines.native import native_module

    if settings.device != "cpu":
        return f"it runs on the CPU, not on {settings.device}"
    if settings.compile:
        return "--compile is for transformers"
    if native_module() is None:
        return "it is not installed (pip install ./native)"
    return None


def _load_native(source: zoo.ModelSource, settings: EngineSettings, meanwhile: Callable[[], object]) -> LoadedModel:
    from medusa.engines.native import NativeBackend

    config = _config(source)
    native = native_config(config)
    directory = zoo.local_directory(source)
    with (
        _weights(source, native, directory) as weights,
        _bar(f"Packing {source.name}", settings.progress) as on_progress,
        ThreadPoolExecutor(1) as background,
    ):
        packing = background.submit(
            NativeBackend,
            native,
            weights,
            dtype=settings.dtype,
            num_slots=settings.num_slots,
            max_length=settings.max_length,
            feature_layers=settings.feature_layers,
            threads=settings.threads,
            on_progress=on_progress,
        )
        meanwhile()
        backend = packing.result()
    facts: dict[str, object] = {
        "architecture": (config.architectures or [config.model_type])[0],
        "location": str(source.gguf or source.location),
        "parameters": backend.parameters,
        "dtype": settings.dtype,
        "device": "cpu",
        "backend": backend.name,
        "backend_reason": "asked for" if settings.backend == "native" else "it can run this model here",
        "instruction_set": backend.engine.isa,
        "threads": backend.engine.threads,
    }
    return LoadedModel(backend, _eos(directory, config.eos_token_id), facts)


@contextlib.contextmanager
def _weights(source: zoo.ModelSource, config: NativeConfig, directory: Path) -> Iterator[Mapping[str, Any]]:
    """The tensors of a model, while they are packed."""
    if source.gguf is None:
        from medusa.engines.native import Checkpoint

        yield Checkpoint(directory)
        return
    from medusa.models.gguf_weights import GgufWeights

    weights = GgufWeights(source.gguf, config)
    with weights.passing():
        yield weights


def _config(source: zoo.ModelSource) -> Any:
    """The model's configuration, without the help of transformers where its file is complete."""
    path = Path(source.location) / "config.json"
    with contextlib.suppress(OSError, ValueError):  # whatever is wrong with it, transformers' loader says it better
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and is_complete(data):
            return SimpleNamespace(**data)
    return zoo.load_config(source)


def _load_transformers(source: zoo.ModelSource, settings: EngineSettings, reason: str) -> LoadedModel:
    import torch

    from medusa.engines.int8 import quantise
    from medusa.engines.transformers import TransformersBackend

    dtype = torch.float32 if settings.dtype == "float32" else torch.bfloat16
    # On CUDA bitsandbytes reads weights in few bits; elsewhere the model is read whole and then made smaller.
    bits = {"int8": 8, "int4": 4}.get(settings.dtype) if settings.device.startswith("cuda") else None
    network = zoo.load_model(source, dtype=dtype, device=settings.device, bits=bits)
    parameters = sum(p.numel() for p in network.parameters())
    if settings.dtype == "int8" and bits is None:
        quantise(network)
    backend = TransformersBackend(
        network,
        num_slots=settings.num_slots,
        max_length=settings.max_length,
        feature_layers=settings.feature_layers,
        compile=settings.compile,
    )
    facts: dict[str, object] = {
        "architecture": type(network).__name__,
        "location": source.location,
        "parameters": parameters,
        "dtype": settings.dtype,
        "device": str(network.device),
        "backend": backend.name,
        "backend_reason": reason,
        "compile": settings.compile,
        "threads": torch.get_num_threads(),
    }
    eos = network.generation_config.eos_token_id if network.generation_config is not None else None
    return LoadedModel(backend, as_token_ids(eos), facts)


def as_token_ids(eos: int | Sequence[int] | None) -> tuple[int, ...]:
    """The end-of-text tokens of a generation config, which has none, one or a list."""
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def _eos(directory: Path, of_model: int | Sequence[int] | None) -> tuple[int, ...]:
    """What transformers' generation config would hold: that of the file, or else of the model's configuration."""
    with contextlib.suppress(FileNotFoundError):
        path = directory / "generation_config.json"
        try:
            return as_token_ids(json.loads(path.read_text(encoding="utf-8")).get("eos_token_id"))
        except ValueError:
            raise MedusaError(f"{path} is not valid JSON: get the file again") from None
    return as_token_ids(of_model)


@contextlib.contextmanager
def _bar(title: str, progress: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; nothing elsewhere. Yields on_progress(done, total)."""
    if not (progress and sys.stderr.isatty()):
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)
