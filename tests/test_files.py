"""Files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from medusa.files import replacing


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
