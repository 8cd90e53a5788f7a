"""Draws docs/demo.svg: an answer of the default model, coloured by who proposed each token.

python docs/make_picture.py
"""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from rich.text import Text

import medusa

PROMPT = "Write a Python function that returns the n-th Fibonacci number, and explain how it works."
STYLES = {"heads": "bold green", "ngram": "bold cyan", "model": "default"}


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
    console.save_svg(str(Path(__file__).parent / "demo.svg"), title="medusa")


if __name__ == "__main__":
    main()
