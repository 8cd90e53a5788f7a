"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from medusa.files import replacing, swapped_in


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path, shared=shared) as scratch:
            scratch.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    with replacing(path, shared=shared) as scratch:
        scratch.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_several_may_write_a_shared_file_at_once_and_the_last_stands(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path, shared=True) as first:
        first.write_text("first")
        with replacing(path, shared=True) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("mask", "rights"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_of_a_new_directory_have_the_rights_of_any_new_file(tmp_path: Path, mask: int, rights: int) -> None:
    """safetensors' own are for their owner alone: another user's server could not read heads or a converted model."""
    before = os.umask(mask)
    try:
        with swapped_in(tmp_path / "heads") as new:
            save_file({"a": torch.zeros(2)}, new / "heads.safetensors")
            (new / "more").mkdir()
            (new / "more" / "config.json").write_text("{}")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "heads").rglob("*") if path.is_file()]
    assert len(files) == 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {rights}
    assert [path.name for path in tmp_path.iterdir()] == ["heads"]
