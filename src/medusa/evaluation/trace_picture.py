"""The picture of a trace; PNG or SVG by the name of the file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa.decoding.draft import MODEL
from medusa.errors import MedusaError, UsageError
from medusa.evaluation.trace import SHARE, Trace, TracedStep
from medusa.plots import FAINT, INK, need_matplotlib, new_figure, save, tree_places

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURES = (".svg", ".png")

# Of a drafter: strong for what was accepted, pale for the inside of its box.
_COLOURS = {"heads": ("#15803d", "#dcfce7"), "ngram": ("#0369a1", "#cfeefb")}
_OTHER = ("#9333ea", "#f3e8ff")
_OWN = (INK, "#e4e7eb")
_GREY = "#7b8794"

# In points, which are the units of the picture.
_TEXT, _SMALL, _HEADING = 8.0, 6.0, 8.5
_PAD, _ROW, _COLUMN, _TITLE, _MARGIN, _GAP = 4.0, 19.0, 18.0, 20.0, 12.0, 26.0
_HEADER = 40.0


def check_picture(path: Path) -> None:
    """Raises UsageError for a name that no picture can have, MedusaError without matplotlib."""
    if path.suffix.lower() not in PICTURES:
        raise UsageError(f"cannot draw {path}: the name must end in {' or '.join(PICTURES)}")
    if not path.parent.is_dir():
        raise UsageError(f"cannot draw {path}: there is no directory {path.parent}")
    need_matplotlib()


@dataclass
class _Box:
    """A node. `x` is its left edge, `y` its middle, counted downwards; both are known once the sizes of all are."""

    label: str
    source: str
    accepted: bool
    share: str = ""
    parent: int = -1
    depth: int = 0
    x: float = 0.0
    y: float = 0.0

    @functools.cached_property
    def label_width(self) -> float:
        return _width(self.label, _TEXT, self.accepted) + 2 * _PAD

    @functools.cached_property
    def width(self) -> float:
        return self.label_width + (_width(self.share, _SMALL, False) + 3 if self.share else 0)


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    boxes: Sequence[_Box]
    width: float
    height: float


def draw_trace(trace: Trace, path: Path, *, steps: int = 6) -> None:
    """One panel for each of the first `steps` steps (0 is all): the tree from left to right, accepted nodes in colour.

    Raises:
        UsageError: the name is no picture's.
        MedusaError: there is nothing to draw, no matplotlib, or the file cannot be written.
    """
    check_picture(path)
    shown = trace.steps[: steps or None]
    if not shown:
        raise MedusaError("there is no step to draw: the text ended with its first token")
    panels = [_panel(step) for step in shown]
    columns = _columns(panels)
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    widths = [max(row[c].width for row in rows if c < len(row)) for c in range(columns)]
    heights = [max(panel.height for panel in row) for row in rows]
    heading = f"{len(shown)} of {len(trace.steps)} steps; {trace.tokens_per_step:.2f} tokens per step in the whole text"
    if any(len(step.nodes) > 1 for step in shown):
        heading += f" (% is {SHARE})"
    legend = _legend(shown)
    legend_width = sum(box.width + 14 for box in legend)
    width = 2 * _MARGIN + max(sum(widths) + _GAP * (columns - 1), _width(heading, _HEADING, True), legend_width)
    height = 2 * _MARGIN + _HEADER + sum(heights) + _GAP / 2 * (len(rows) - 1)

    figure = new_figure(width / 72, height / 72, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    _write(axes, _MARGIN, _MARGIN + 5, heading, _HEADING, INK, bold=True)
    x = _MARGIN
    for box in legend:
        _draw_box(axes, box, x, _MARGIN + 24)
        x += box.width + 14
    y = _MARGIN + _HEADER
    for row, row_height in zip(rows, heights, strict=True):
        x = _MARGIN
        for panel, column_width in zip(row, widths, strict=False):
            _draw_panel(axes, panel, x, y)
            x += column_width + _GAP
        y += row_height + _GAP / 2
    save(figure, path)


def _legend(steps: Sequence[TracedStep]) -> list[_Box]:
    """The boxes that explain the colours."""
    drafters = {node.source for step in steps for node in step.nodes[1:]}
    boxes = [_Box(drawable(f"accepted, from {source}"), source, True) for source in sorted(drafters)]
    if drafters:
        boxes.append(_Box("rejected", "", False))
    return [*boxes, _Box("decided by the model", MODEL, True)]


def _columns(panels: Sequence[_Panel]) -> int:
    """So many panels side by side that the picture is not much higher than wide."""
    widest, total = max(panel.width for panel in panels), sum(panel.height for panel in panels)
    columns = 1
    while columns < len(panels) and total / columns > 1.2 * columns * widest:
        columns += 1
    return columns


def _panel(step: TracedStep) -> _Panel:
    """Places the boxes of one tree; the token that the model decided hangs on the last accepted node."""
    boxes = [
        _Box(
            drawable(node.label),
            node.source,
            node.accepted,
            f"{100 * node.probability:.0f} %" if i else "",
            node.parent,
            node.depth,
        )
        for i, node in enumerate(step.nodes)
    ]
    if step.own is not None:
        last = step.path[-1]
        boxes.append(_Box(drawable(step.own.label), MODEL, True, "", last, step.nodes[last].depth + 1))
    left = [0.0]  # edge of each column
    for depth in range(max(box.depth for box in boxes) + 1):
        left.append(left[-1] + max(box.width for box in boxes if box.depth == depth) + _COLUMN)
    # Siblings: the likeliest first, the model's own last.
    order = [*(-node.probability for node in step.nodes), 1.0]
    for box, (_, row) in zip(boxes, tree_places([box.parent for box in boxes], order), strict=True):
        box.x, box.y = left[box.depth], _TITLE + _ROW * (row + 0.5)
    title = drawable(step.summary(phases=False))
    height = max(box.y for box in boxes) + _ROW / 2
    return _Panel(title, boxes, max(left[-1] - _COLUMN, _width(title, _HEADING, False)), height)


def _draw_panel(axes: Axes, panel: _Panel, x: float, y: float) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    _write(axes, x, y + _TITLE / 2 - 3, panel.title, _HEADING, INK)
    for box in panel.boxes:
        if box.parent >= 0:
            above = panel.boxes[box.parent]
            start, end = (x + above.x + above.width, y + above.y), (x + box.x, y + box.y)
            # Bends within the gap before the child, so that no line runs through a wider box of its parent's column.
            bend = max(start[0], end[0] - _COLUMN)
            middle = (bend + end[0]) / 2
            points = [start, (bend, start[1]), (middle, start[1]), (middle, end[1]), end]
            codes = [Curve.MOVETO, Curve.LINETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]
            strong = _colours(box.source)[0] if box.accepted else FAINT
            line = PathPatch(
                Curve(points, codes), fill=False, edgecolor=strong, linewidth=1.8 if box.accepted else 0.7,
                zorder=2 if box.accepted else 1, linestyle=_dashes(box),
            )  # fmt: skip
            axes.add_patch(line)
    for box in panel.boxes:
        _draw_box(axes, box, x, y)


def _draw_box(axes: Axes, box: _Box, x: float, y: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    strong, pale = _colours(box.source)
    x, y = x + box.x, y + box.y
    frame = FancyBboxPatch(
        (x + 2, y - 5), box.width - 4, 10, boxstyle="round,pad=2,rounding_size=3", zorder=3,
        facecolor=pale if box.accepted else "white", edgecolor=strong if box.accepted else FAINT,
        linewidth=1.2 if box.accepted else 0.7, linestyle=_dashes(box),
    )  # fmt: skip
    axes.add_patch(frame)
    _write(axes, x + _PAD, y, box.label, _TEXT, strong if box.accepted else _GREY, bold=box.accepted)
    if box.share:
        # A rejected node keeps a trace of its drafter's colour here.
        _write(axes, x + box.label_width - 1, y + 0.5, box.share, _SMALL, strong)


def _dashes(box: _Box) -> Any:
    """Dashed: a token that the model decided, and that nobody drafted."""
    return (0, (2.5, 1.5)) if box.source == MODEL and box.parent >= 0 else "solid"


def _colours(source: str) -> tuple[str, str]:
    return _OWN if source == MODEL else _COLOURS.get(source, _OTHER) if source else (_GREY, "white")


def _write(axes: Axes, x: float, y: float, text: str, size: float, colour: str, *, bold: bool = False) -> None:
    axes.text(
        x, y, text, color=colour, va="center_baseline", parse_math=False, zorder=4, fontproperties=_font(size, bold)
    )  # fmt: skip


# --- text that can be drawn -------------------------------------------------------------------------------------------


def drawable(text: str) -> str:
    """The text with a box for each character that the font of the pictures lacks."""
    known = _characters()
    return "".join(c if ord(c) in known else "\u25a1" for c in text)


@functools.cache
def _characters() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    # A character must be in both: accepted nodes are bold.
    return frozenset.intersection(
        *(frozenset(get_font(findfont(_font(_TEXT, bold))).get_charmap()) for bold in (False, True))
    )


def _font(size: float, bold: bool) -> Any:
    from matplotlib.font_manager import FontProperties

    # Comes with matplotlib, so pictures look alike everywhere.
    return FontProperties(family="DejaVu Sans", size=size, weight="bold" if bold else "normal")


@functools.cache
def _measure() -> Callable[..., tuple[float, float, float]]:
    from matplotlib.textpath import TextToPath

    return TextToPath().get_text_width_height_descent


def _width(text: str, size: float, bold: bool) -> float:
    """In points, and a little more: bold letters are drawn wider than they are measured. `$` is no mathematics."""
    return _measure()(text, _font(size, bold), ismath=False)[0] * (1.05 if bold else 1.0)
