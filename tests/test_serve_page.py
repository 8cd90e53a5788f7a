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


def luminance(colour: str) -> float:
    """Of #rrggbb, as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def over(ground: str, colour: str, opacity: float) -> str:
    """The colour that a part of another one gives."""
    mixed = [
        round((1 - opacity) * int(ground[i : i + 2], 16) + opacity * int(colour[i : i + 2], 16)) for i in (1, 3, 5)
    ]
    return "#" + "".join(f"{part:02x}" for part in mixed)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_stand_out_from_their_grounds(theme: str) -> None:
    css = (PAGE / "style.css").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)
    )
    colours = light if theme == "light" else dark
    assert light.keys() == dark.keys()
    grounds = [colours[name] for name in ("ground", "raised", "sunk")]
    for ground in grounds:
        for text in ("text", "muted", "accent", "bad"):
            assert contrast(colours[text], ground) >= 4.5, (text, ground)
        assert contrast(colours["edge"], ground) >= 3
    assert contrast(colours["on-accent"], colours["accent"]) >= 4.5
    assert contrast(colours["bad"], colours["bad-ground"]) >= 4.5
    fullest = float(re.findall(r"FULLEST\] = \[[\d.]+, ([\d.]+)\]", (PAGE / "treeview.js").read_text("utf-8"))[0])
    for drafter in ("heads", "ngram", "grammar", "other"):
        for text in ("text", "accent"):  # a link may be drafted too
            assert contrast(colours[text], colours[drafter]) >= 4.5, (text, drafter)
        assert contrast(colours[f"{drafter}-line"], colours[drafter]) >= 3
        assert contrast(colours["text"], over(colours["raised"], colours[f"{drafter}-line"], fullest)) >= 4.5
    assert contrast(colours["text"], over(colours["raised"], colours["muted"], fullest)) >= 4.5
