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
    drawn: list[Path] = []
    for name, draw in (("speedup", draw_speedup), ("phases", draw_phases), ("acceptance", draw_acceptance)):
        path = out / f"{name}.{kind}"
        if draw(report, path):
            drawn.append(path)
    return drawn


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
        found = [some[name] for some in groups.values()]
        at = [j + (i - (len(methods) - 1) / 2) * width for j in range(len(groups))]
        heights = [one.speedup for one in found]
        reach = [
            [max(0.0, one.speedup - one.speedup_interval[0]) for one in found],
            [max(0.0, one.speedup_interval[1] - one.speedup) for one in found],
        ]
        axes.bar(at, heights, 0.9 * width, color=COLOURS[i % len(COLOURS)], label=name)
        axes.errorbar(at, heights, reach, fmt="none", ecolor=INK, elinewidth=0.8, alpha=0.7)
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xticks(
        range(len(groups)),
        list(groups),
        rotation=30 if len(groups) > 1 else 0,
        ha="right" if len(groups) > 1 else "center",
    )
    axes.set_ylabel("times as fast as plain decoding", fontsize=8)
    _legend(canvas, axes)
    plain(axes, f"Speed-up by category, {len(report.rows)} questions; lines: 95% intervals")
    save(canvas, path)
    return True


def draw_phases(report: Report, path: Path) -> bool:
    """Where the milliseconds of a step go, one bar a method."""
    found = {name: one.phases for name, one in report.overall.items() if one.phases is not None}
    if not found:
        return False
    canvas = new_figure(width=6.4, height=1.2 + 0.36 * len(found))
    axes = canvas.subplots()
    for row, phases in enumerate(found.values()):
        left = 0.0
        for i, phase in enumerate(PHASES):
            axes.barh(row, phases[phase], 0.7, left=left, color=COLOURS[i], label=phase if row == 0 else None)
            left += phases[phase]
        axes.annotate(f"{left:.1f}", (left, row), xytext=(4, -3), textcoords="offset points", fontsize=8, color=INK)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("milliseconds per step", fontsize=8)
    _legend(canvas, axes)
    plain(axes, "Where the time of a step goes")
    save(canvas, path)
    return True


def draw_acceptance(report: Report, path: Path) -> bool:
    """How often a draft was right up to each depth."""
    methods = {name: one.reached for name, one in report.overall.items() if one.reached}
    if not methods:
        return False
    canvas = new_figure(width=5.6, height=3.2)
    axes = canvas.subplots()
    for i, (name, shares) in enumerate(methods.items()):
        axes.plot(
            range(1, len(shares) + 1), shares, marker="o", markersize=4, color=COLOURS[i % len(COLOURS)], label=name
        )
    axes.set_xticks(range(1, max(map(len, methods.values())) + 1))
    axes.set_ylim(0, 1)
    axes.set_xlabel("drafted tokens accepted in a step, at least", fontsize=8)
    axes.set_ylabel("share of steps", fontsize=8)
    _legend(canvas, axes)
    plain(axes, "How far drafts are right")
    save(canvas, path)
    return True


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
    canvas.legend(
        list(labels.values()),
        list(labels),
        loc="outside lower center",
        ncols=min(5, len(labels)),
        frameon=False,
        fontsize=8,
    )
    save(canvas, path)


def _legend(canvas: Any, axes: Any) -> None:
    """Below the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        canvas.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False, fontsize=8)
