"""Heads to and from the Hub: what is uploaded runs in transformers as it lies there, and what is fetched is checked.

No code is fetched: of a repository only weights, configuration and the card.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from medusa.errors import MedusaError, UsageError, first_sentence
from medusa.files import swapped_in
from medusa.heads.file import WEIGHTS_FILE, read_config, read_tensors
from medusa.interop import card, importing
from medusa.interop.exporting import export_heads, is_export

FETCHED = ("*.json", "*.safetensors", "medusa_lm_head.pt", card.FILE, *card.PICTURES)


@dataclass(frozen=True, slots=True)
class Pulled:
    """What was fetched. `layout`: "Medusa" for heads that run as they are, else whose they are."""

    directory: Path
    layout: str
    num_heads: int


def push(heads: str | Path, repository: str, *, model: str | None = None, private: bool = False) -> str:
    """Uploads heads, with their card and the folder that transformers runs, or an export as it is; returns the address.

    Args:
        heads: a directory of heads or of an export, or the name of shipped heads.
        repository: owner/name; it is made where there is none.
        model: the Hub id of the model they belong to, where they do not name it.

    Raises:
        UsageError: a bad name, or heads that name a directory of this machine as their model. MedusaError: the Hub
            refuses or cannot be reached.
    """
    _check_repository(repository)
    with TemporaryDirectory(prefix="medusa-push-") as room, _explained(repository):
        from huggingface_hub import HfApi

        folder = Path(heads).expanduser()
        if is_export(folder) and model is not None:
            raise UsageError(f"{folder} is an export, which is pushed as it is: export anew with --model {model}")
        if not is_export(folder):
            folder = Path(room) / "heads"
            made = export_heads(heads, "hf", folder, model=model)
            config = read_config(made.directory)
            if not config.base_model or Path(config.base_model).expanduser().is_dir():
                named = config.base_model or "nothing"
                raise UsageError(f"others cannot find the model that these heads name ({named}): give --model HUB-ID")
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Medusa heads", ignore_patterns=[".*"]
        )
        return str(getattr(done, "repo_url", None) or f"https://huggingface.co/{repository}")


def pull(repository: str, out: str | Path | None = None, *, revision: str | None = None, force: bool = False) -> Pulled:
    """Fetches heads, ours or another project's, into `out`, else NAME here; the directory appears whole or not at all.

    Raises:
        UsageError: a bad name, or something is there already. MedusaError: the Hub has no such heads or cannot be
            reached, or what it has is damaged.
    """
    _check_repository(repository)
    directory = Path(repository.partition("/")[2] if out is None else out).expanduser()
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        ours = (directory / WEIGHTS_FILE).is_file() or is_export(directory)
        if not (force and ours):
            raise UsageError(f"{directory} is there already: give another --out" + (", or --force" if ours else ""))
    with swapped_in(directory) as new:
        with _explained(repository):
            from huggingface_hub import snapshot_download

            snapshot_download(repository, revision=revision, local_dir=new, allow_patterns=list(FETCHED))
        shutil.rmtree(new / ".cache", ignore_errors=True)  # how far the download was
        if (new / WEIGHTS_FILE).is_file():
            config = read_config(new)
            read_tensors(new, config)
            return Pulled(directory, "Medusa", config.num_heads)
        found = importing.read(new)
        return Pulled(directory, found.layout, found.num_heads)


def _check_repository(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII):
        raise UsageError(f"{name!r} is no repository of the Hub: give owner/name")


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Whatever goes wrong at the Hub leaves as one sentence."""
    from huggingface_hub import errors

    try:
        yield
    except MedusaError:
        raise
    except (errors.LocalTokenNotFoundError, errors.GatedRepoError) as error:
        raise MedusaError(
            f"the Hub wants to know who asks for {repository}: run `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise MedusaError(
            f"the Hub has no {repository}, or it is private: check the name, or run `hf auth login`"
        ) from error
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError, ValueError) as error:
        raise MedusaError(f"the Hub did not do it ({repository}): {first_sentence(error)}") from error
