"""Draws docs/demo.svg: an answer of the default model, coloured by who proposed each token.

python docs/make_picture.py
"""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

import medusa

PROMPT = "Write a Python function that returns the n-th Fibonacci number, and explain how it works."
STYLES = {"heads": "green", "ngram": "cyan", "model": "default"}


def main() -> None:
    model = medusa.load()
    text, last = Text(), None
    for last in model.stream(PROMPT, max_new_tokens=160):
        for piece, source in last.spans:
            text.append(piece, STYLES[source])
    assert last is not None
    stats = last.stats
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(Text(f'$ medusa generate "{PROMPT}" --max-new-tokens 160 --show-drafts', "bold"))
    console.print(text)
    console.print(
        Text(f"\n{stats.new_tokens} tokens in {stats.steps} steps = {stats.tokens_per_step:.1f} tokens per step", "dim")
    )
    legend = Text()
    legend.append("green: drafted by the heads", STYLES["heads"])
    legend.append(", ")
    legend.append("cyan: drafted by n-gram lookup", STYLES["ngram"])
    legend.append(", plain: decided by the model")
    console.print(legend)
    svg = console.export_svg(title="medusa")
    # Rich names a font on the web, which a page that shows the picture does not load: any monospaced one will do.
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;]*;", 'font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace;', svg)
    svg = svg.replace("<svg ", '<svg xml:space="preserve" ', 1)  # else some viewers swallow spaces between colours
    (Path(__file__).parent / "demo.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
