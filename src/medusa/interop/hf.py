"""For transformers: our own files, and a folder `custom_generate` that runs them.

    model.generate(**inputs, custom_generate="user/heads", trust_remote_code=True)

transformers runs `custom_generate/generate.py` of that directory or Hub id, and nothing else of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medusa.heads.file import CONFIG_FILE, WEIGHTS_FILE

FOLDER = "custom_generate"


def files(heads: Path) -> dict[str, Any]:
    """What lies in the directory: name -> a file to be copied, or a text."""
    return {
        CONFIG_FILE: heads / CONFIG_FILE,
        WEIGHTS_FILE: heads / WEIGHTS_FILE,
        f"{FOLDER}/generate.py": GENERATE,
        f"{FOLDER}/requirements.txt": "medusa-decode\n",
    }


GENERATE = '''\
"""Medusa decoding: the text of `model.generate`, in fewer passes, with the heads beside this folder.

    model.generate(**inputs, custom_generate="user/heads", trust_remote_code=True)

Needs `pip install medusa-decode`. Further arguments: `heads` (another directory), `drafter`, `nodes`, `seed`,
`acceptance`, `epsilon`, `delta`, as `medusa.custom_generate` takes them.
"""

import inspect
import os
from functools import lru_cache

try:
    import medusa
except ImportError:
    raise ImportError("this model's custom_generate needs Medusa: pip install medusa-decode") from None

_SETTINGS = ("drafter", "nodes", "seed", "acceptance", "epsilon", "delta")
_OF_THE_HUB = ("revision", "token", "cache_dir", "local_files_only")


def generate(model, heads=None, **arguments):
    settings = {name: arguments.pop(name) for name in _SETTINGS if name in arguments}
    of_the_hub = {name: arguments.pop(name) for name in _OF_THE_HUB if name in arguments}
    decode = _decoder(_directory(heads or _asked_for(), of_the_hub), tuple(sorted(settings.items())))
    given = {name: value for name, value in arguments.items() if value is not None}
    return model.generate(**given, custom_generate=decode)


@lru_cache(maxsize=8)  # it keeps what it has built for a model
def _decoder(directory, settings):
    return medusa.custom_generate(heads=directory, **dict(settings))


def _asked_for():
    """The directory or Hub id that `generate` was given: it hands on a copy of this file, but not where it was."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "generate" and isinstance(frame.f_locals.get("custom_generate"), str):
            return frame.f_locals["custom_generate"]
        frame = frame.f_back
    raise ValueError("give the directory of the heads: model.generate(..., heads=DIRECTORY)")


def _directory(name, of_the_hub):
    if os.path.isdir(name):
        return os.path.abspath(name)
    from huggingface_hub import snapshot_download

    return snapshot_download(name, allow_patterns=["config.json", "heads.safetensors"], **of_the_hub)
'''
