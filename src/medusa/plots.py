"""Pictures of a tree and of what heads know, for people; PNG or SVG by the name of the file."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medusa.errors import MedusaError
from medusa.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from medusa.decoding.tree import Tree

INK, FAINT, ACCENT = "#1f2933", "#9aa5b1", "#2563eb"


def draw_tree(tree: Tree, path: Path, title: str = "") -> None:
    """The tree from left to right: a node is labelled with its rank, and is as large as it is likely to be right."""
    places = tree_places(tree.parents, tree.ranks)
    height = max(2.5, 0.22 * (1 + max(y for _, y in places)))
    figure = new_figure(width=2.2 + 2.0 * tree.depth, height=height)
    axes = figure.subplots()
    for node in range(1, len(tree)):
        (x0, y0), (x1, y1) = places[tree.parents[node]], places[node]
        share = tree.probabilities[node]
        axes.plot([x0, x1], [y0, y1], color=ACCENT, alpha=0.25 + 0.75 * share, linewidth=0.5 + 3 * share, zorder=1)
    for node, (x, y) in enumerate(places):
        share = tree.probabilities[node]
        axes.scatter([x], [y], s=20 + 160 * share, color=INK if node == 0 else ACCENT, zorder=2)
        label = "root" if node == 0 else f"{tree.ranks[node] + 1}"
        axes.annotate(label, (x, y), xytext=(7, -3), textcoords="offset points", fontsize=7, color=INK)
    axes.set_xticks(range(tree.depth + 1), ["root", *(f"head {k}" for k in range(1, tree.depth + 1))])
    axes.set_yticks([])
    axes.set_xlim(-0.3, tree.depth + 0.4)
    axes.margins(y=0.04)
    axes.invert_yaxis()
    plain(axes, title or f"{len(tree)} nodes, {tree.expected_tokens():.2f} tokens per step expected")
    save(figure, path)


def draw_accuracy(top: Mapping[int, Sequence[float]], path: Path, title: str = "") -> None:
    """How often the true token is among the best n guesses of each head; `top[n]` has a share for each head."""
    figure = new_figure(width=5.2, height=3.2)
    axes = figure.subplots()
    for i, (n, shares) in enumerate(sorted(top.items())):
        heads = range(1, len(shares) + 1)
        axes.plot(heads, shares, marker="o", color=ACCENT, alpha=1 - 0.3 * i, label=f"top {n}")
        axes.annotate(f"{shares[0]:.2f}", (1, shares[0]), xytext=(0, 6), textcoords="offset points", fontsize=8)
    axes.set_xticks(list(heads), [f"head {k}" for k in heads])
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of positions")
    axes.legend(frameon=False)
    plain(axes, title or "The true token is among the best guesses, given the right tokens before it")
    save(figure, path)


def tree_places(parents: Sequence[int], order: Sequence[float]) -> list[tuple[float, float]]:
    """x: depth. y: leaves one below the other; a parent beside the middle of its children. Siblings come by `order`."""
    children: list[list[int]] = [[] for _ in parents]
    for node in range(1, len(parents)):
        children[parents[node]].append(node)
    places: list[tuple[float, float]] = [(0.0, 0.0)] * len(parents)
    next_leaf = 0.0

    def place(node: int, depth: int) -> float:
        nonlocal next_leaf
        below = [place(child, depth + 1) for child in sorted(children[node], key=order.__getitem__)]
        if below:
            y = (below[0] + below[-1]) / 2
        else:
            y, next_leaf = next_leaf, next_leaf + 1
        places[node] = (float(depth), y)
        return y

    place(0, 0)
    return places


def has_matplotlib() -> bool:
    """Whether there can be pictures."""
    return importlib.util.find_spec("matplotlib") is not None


def need_matplotlib() -> None:
    """Raises MedusaError where it is not installed."""
    if not has_matplotlib():
        raise MedusaError("pictures need matplotlib: pip install 'medusa-decode[eval]'")


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty picture of so many inches. Raises MedusaError without matplotlib."""
    need_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def plain(axes: Any, title: str) -> None:
    """A title at the left, and no frame but the line below."""
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.tick_params(colors=INK, labelsize=8, length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_color(FAINT)
        axes.spines[side].set_visible(side == "bottom")


def save(figure: Figure, path: Path) -> None:
    """Writes PNG or SVG by the name; the file is complete or untouched. Raises MedusaError."""
    # Without a date the same data give the same bytes.
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    try:
        with replacing(path) as scratch:
            figure.savefig(scratch, format=path.suffix.lower().lstrip("."), dpi=150, metadata=metadata)
    except (OSError, ValueError) as error:
        raise MedusaError(f"cannot draw {path}: {error}") from None
