"""The page's own code, in Node: Markdown with hostile inputs, the stream, what is kept, the tree."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parent / "src" / "medusa" / "serve" / "page"
MOST_LINES = 450
OLDEST = (20, 19)  # reads our modules without a package.json beside them


def test_the_page_passes_its_tests_in_node() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs Node.js")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    if tuple(int(part) for part in version.strip().lstrip("v").split(".")[:2]) < OLDEST:
        pytest.skip(f"needs Node.js {'.'.join(map(str, OLDEST))} or newer, not {version.strip()}")
    files = sorted(map(str, (HERE / "page").glob("*.test.mjs")))
    ran = subprocess.run([node, "--test", *files], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    passed = re.search(r"^\S+ pass (\d+)$", ran.stdout, re.MULTILINE)
    assert passed, ran.stdout[-2000:]
    assert int(passed[1]) > 50


def test_no_file_of_the_page_is_long() -> None:
    lengths = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in PAGE.iterdir()}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_the_page_sets_no_markup_and_names_no_other_host() -> None:
    for file in PAGE.iterdir():
        text = file.read_text(encoding="utf-8")
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser", " style="):
            assert word not in text, file.name
        if file.suffix != ".js":
            assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:)?//", text), file.name
