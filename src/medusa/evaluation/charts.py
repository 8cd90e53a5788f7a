"""Charts of a benchmark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa.evaluation.methods import PHASES, PLAIN
from medusa.plots import FAINT, INK, new_figure, plain, save

if TYPE_CHECKING:
    from medusa.evaluation.report import Report

COLOURS = ("#2563eb", "#059669", "#d97706", "#9333ea", "#dc2626", "#0891b2", "#65a30d", "#be185d", "#475569")


def draw_report(report: Report, out: Path, kind: str = "svg") -> list[Path]:
    """speedup, phases and acceptance; those for which there is nothing are left out. Raises MedusaError."""
    charts = {"speedup": draw_speedup, "phases": draw_phases, "acceptance": draw_acceptance}
    return [path for name, draw in charts.items() if draw(report, path := out / f"{name}.{kind}")]


def draw_speedup(report: Report, path: Path) -> bool:
    """Bars by category with their intervals, all questions first."""
    methods = [name for name in report.methods if name != PLAIN]
    if not methods:
        return False
    groups = {"all": report.overall, **(report.by_category if len(report.by_category) > 1 else {})}
    width = 0.8 / len(methods)
    bars = len(methods) * len(groups)
    canvas = new_figure(width=min(9.5, 2.5 + 0.3 * bars + 0.3 * len(groups)), height=3.6)
    axes = canvas.subplots()
    for i, name in enumerate(methods):
        measured = [of_group[name] for of_group in groups.values()]
        centres = [j + (i - (len(methods) - 1) / 2) * width for j in range(len(groups))]
        heights = [figures.speedup for figures in measured]
        reach = [
            [max(0.0, figures.speedup - figures.speedup_interval[0]) for figures in measured],
            [max(0.0, figures.speedup_interval[1] - figures.speedup) for figures in measured],
        ]
        axes.bar(centres, heights, 0.9 * width, color=COLOURS[i % len(COLOURS)], label=name)
        axes.errorbar(centres, heights, reach, fmt="none", ecolor=INK, elinewidth=0.8, alpha=0.7)
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    slanted: dict[str, Any] = {"rotation": 30, "ha": "right"} if len(groups) > 1 else {}
    axes.set_xticks(range(len(groups)), list(groups), **slanted)
    axes.set_ylabel("times as fast as plain decoding", fontsize=8)
    return _finish(canvas, axes, f"Speed-up by category, {len(report.rows)} questions; lines: 95% intervals", path)


def draw_phases(report: Report, path: Path) -> bool:
    """Where the milliseconds of a step go, one bar a method."""
    phases_of = {name: figures.phases for name, figures in report.overall.items() if figures.phases is not None}
    if not phases_of:
        return False
    canvas = new_figure(width=6.4, height=1.2 + 0.36 * len(phases_of))
    axes = canvas.subplots()
    for row, phases in enumerate(phases_of.values()):
        left = 0.0
        for i, phase in enumerate(PHASES):
            axes.barh(row, phases[phase], 0.7, left=left, color=COLOURS[i], label=phase if row == 0 else None)
            left += phases[phase]
        axes.annotate(f"{left:.1f}", (left, row), xytext=(4, -3), textcoords="offset points", fontsize=8, color=INK)
    axes.set_yticks(range(len(phases_of)), list(phases_of))
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("milliseconds per step", fontsize=8)
    return _finish(canvas, axes, "Where the time of a step goes", path)


def draw_acceptance(report: Report, path: Path) -> bool:
    """How often a draft was right up to each depth."""
    methods = {name: figures.reached for name, figures in report.overall.items() if figures.reached}
    if not methods:
        return False
    canvas = new_figure(width=5.6, height=3.2)
    axes = canvas.subplots()
    for i, (name, shares) in enumerate(methods.items()):
        depths = range(1, len(shares) + 1)
        axes.plot(depths, shares, marker="o", markersize=4, color=COLOURS[i % len(COLOURS)], label=name)
    axes.set_xticks(range(1, max(map(len, methods.values())) + 1))
    axes.set_ylim(0, 1)
    axes.set_xlabel("drafted tokens accepted in a step, at least", fontsize=8)
    axes.set_ylabel("share of steps", fontsize=8)
    return _finish(canvas, axes, "How far drafts are right", path)


@dataclass(frozen=True, slots=True)
class Curves:
    """One panel: curves of (x, y) points by name.

    `log`: x by powers of two. `joined`: the curves whose points are joined by a line; None: all. `levels`: values that
    do not depend on x, as dashed lines. `base`: a dotted line at this height.
    """

    series: Mapping[str, Sequence[tuple[float, float]]]
    title: str
    x: str
    y: str
    log: bool = False
    joined: Sequence[str] | None = None
    levels: Mapping[str, float | None] = field(default_factory=dict)
    base: float | None = None


def draw_curves(panels: Sequence[Curves], path: Path) -> None:
    """Panels side by side, with one legend. Raises MedusaError."""
    canvas = new_figure(width=4.4 * len(panels), height=3.8)
    labels: dict[str, Any] = {}
    for axes, panel in zip(canvas.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        names = [*panel.series, *panel.levels]
        colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
        for name, points in panel.series.items():
            xs, ys = zip(*points, strict=True)
            line = "-" if panel.joined is None or name in panel.joined else "none"
            (labels[name],) = axes.plot(xs, ys, marker="o", markersize=4, linestyle=line, color=colour[name])
        for name, value in panel.levels.items():
            if value is not None:
                labels[name] = axes.axhline(value, color=colour[name], linewidth=1, linestyle="--")
        if panel.base is not None:
            axes.axhline(panel.base, color=INK, linewidth=0.8, linestyle=":")
        if panel.log:
            axes.set_xscale("log", base=2)
            ticks = sorted({2 ** math.ceil(math.log2(x)) for points in panel.series.values() for x, _ in points})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        else:
            axes.locator_params(axis="x", nbins=6, integer=panel.x == "heads")
        axes.set_xlabel(panel.x, fontsize=8)
        axes.set_ylabel(panel.y, fontsize=8)
        axes.grid(axis="y", color=FAINT, alpha=0.3, linewidth=0.6)
        plain(axes, panel.title)
        if panel.log:
            axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    _legend(canvas, list(labels.values()), list(labels), columns=5)
    save(canvas, path)


def _finish(canvas: Any, axes: Any, title: str, path: Path) -> bool:
    handles, labels = axes.get_legend_handles_labels()
    _legend(canvas, handles, labels, columns=6)
    plain(axes, title)
    save(canvas, path)
    return True


def _legend(canvas: Any, handles: Sequence[Any], labels: Sequence[str], columns: int) -> None:
    """Below the axes, where it hides nothing."""
    if labels:
        ncols = min(columns, len(labels))
        canvas.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False, fontsize=8)
