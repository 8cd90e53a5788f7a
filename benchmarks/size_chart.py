r"""Tokens per second against the size of the model, plain and with Medusa, from runs of `medusa bench`:

    for model in smollm2-135m qwen2.5-coder-0.5b qwen2.5-coder-1.5b; do
        medusa bench --model $model --questions benchmarks/coding.jsonl --dtype int8 --methods plain,union \
            --out runs/$model
    done
    python benchmarks/size_chart.py docs/sizes.svg runs/*

Prints the sentence that the figures support: how large a model is as fast with Medusa as a smaller one without.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from medusa.errors import MedusaError
from medusa.plots import ACCENT, FAINT, new_figure, plain, save


@dataclass(frozen=True)
class Point:
    """One model of one run."""

    model: str
    billions: float  # of parameters, by the name
    machine: str
    dtype: str
    plain: float  # tokens per second
    drafted: float
    identical: bool


def read(directory: Path) -> Point:
    """Raises MedusaError: not a finished run, or one without these two methods."""
    try:
        report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
        settings, machine, overall = report["settings"], report["machine"], report["overall"]
        named = re.search(r"(\d+(?:\.\d+)?)([mb])(?![a-z])", settings["model"].lower().rpartition("/")[2])
        if named is None:
            raise MedusaError(f"{directory}: the name {settings['model']!r} does not tell the size of the model")
        union = overall["union"]
        return Point(
            re.sub(r"\.gguf$", "", settings["model"].rpartition("/")[2]),
            float(named[1]) / (1000 if named[2] == "m" else 1),
            f"{machine['processor']}, {machine['instruction_set']}, {machine['threads']} threads",
            settings["dtype"],
            overall["plain"]["tokens_per_second"],
            union["tokens_per_second"],
            union["identical"] == union["total"],
        )
    except (OSError, ValueError, KeyError) as error:
        raise MedusaError(f"{directory} is no finished run of medusa bench with plain and union ({error!r})") from None


def sentence(points: list[Point]) -> str:
    """What the largest model with Medusa is as fast as."""
    largest = points[-1]
    slower = [point for point in points[:-1] if point.plain <= largest.drafted]
    if slower:
        best = slower[0]  # the smallest
        return (
            f"{largest.model} with Medusa ({largest.drafted:.1f} tokens/s) is as fast as {best.model} without "
            f"({best.plain:.1f})."
        )
    below = points[-2]
    share = 100 * largest.drafted / below.plain
    return (
        f"{largest.model} with Medusa reaches {largest.drafted:.1f} tokens/s, {share:.0f}% of {below.model} without "
        f"({below.plain:.1f})."
    )


def draw(points: list[Point], path: Path) -> None:
    figure = new_figure(width=5.6, height=3.6)
    axes = figure.subplots()
    sizes = [point.billions for point in points]
    axes.plot(sizes, [point.plain for point in points], marker="o", color=FAINT, label="plain decoding")
    axes.plot(sizes, [point.drafted for point in points], marker="o", color=ACCENT, label="with Medusa")
    for point in points:
        axes.annotate(
            f"{point.drafted / point.plain:.2f}x", (point.billions, point.drafted), xytext=(4, 6),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes, [point.model for point in points], fontsize=8)
    axes.minorticks_off()
    low = min(point.plain for point in points)
    high = max(point.drafted for point in points)
    ticks = [tick for power in range(5) for tick in (10**power, 2 * 10**power, 5 * 10**power)]
    shown = [tick for tick in ticks if low / 2 <= tick <= high * 2]
    axes.set_yticks(shown, [str(tick) for tick in shown])
    axes.set_ylim(low / 1.5, high * 1.6)
    axes.margins(x=0.15)
    axes.set_ylabel("tokens per second")
    axes.legend(frameon=False)
    plain(axes, f"{points[0].dtype}, {points[0].machine}")
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    args = parser.parse_args()
    try:
        points = sorted((read(run) for run in args.runs), key=lambda point: point.billions)
        if len(points) < 2 or len({(point.machine, point.dtype) for point in points}) > 1:
            raise MedusaError("give two or more runs of one number format on one machine")
        draw(points, args.picture)
    except MedusaError as error:
        sys.exit(f"Error: {error}")
    for point in points:
        gain = point.drafted / point.plain
        texts = "all texts identical" if point.identical else "TEXTS DIFFER"
        print(f"{point.model:28} {point.plain:8.1f} {point.drafted:8.1f} tokens/s  {gain:.2f}x  {texts}")
    print(sentence(points))


if __name__ == "__main__":
    main()
