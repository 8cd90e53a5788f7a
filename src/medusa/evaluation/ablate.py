"""Ablations: one thing is varied, everything else stays. Each gives a table, a CSV file and a picture.

All but `batch` are benchmarks (see `bench.py`) whose methods differ in that one thing, so the variants take turns on
each question and a run that was cut short continues.
"""

from __future__ import annotations

import csv
import io
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa.decoding.heads_drafter import HeadsDrafter
from medusa.decoding.tree import RankPath, Tree
from medusa.errors import UsageError
from medusa.evaluation.methods import PLAIN, MedusaMethod, Method, medusa_method
from medusa.evaluation.report import Cells, rounded
from medusa.evaluation.statistics import Figures
from medusa.files import write_whole

if TYPE_CHECKING:
    from medusa.api import LanguageModel
    from medusa.decoding.sampling import Sampling
    from medusa.evaluation.batch import Load
    from medusa.heads.module import HeadsRunner

TREE_SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
RANDOM_TREES = 2  # of each size
RANDOM_RANKS = 10  # a random tree takes guesses up to this rank
CARTESIAN = (
    (2,), (4,), (2, 2), (3, 2), (2, 2, 2), (4, 3), (3, 3, 2), (2, 2, 2, 2), (6, 4), (5, 4, 2), (4, 3, 2, 2), (10, 7),
    (8, 4, 2), (6, 4, 3), (15, 15), (6, 4, 3, 2),
)  # fmt: skip
NODE_SIZES = (1, 2, 4, 6, 8, 10, 12, 16, 24, 32, 64)
EPSILONS = (0.01, 0.03, 0.05, 0.09, 0.13, 0.17, 0.21, 0.25)
SMALL_TREE = 8  # where the number of nodes is not what is varied: a size that pays on most machines
DRAFTERS_NODES = 16
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
CREATIVE = ("writing", "roleplay")


@dataclass(frozen=True, slots=True)
class Variant:
    """A method and what was varied: values of the columns that are known before it runs."""

    method: Method
    facts: dict[str, Any]


def plain_variant(lm: LanguageModel, sampling: Sampling) -> Variant:
    return Variant(medusa_method(PLAIN, lm, sampling), {"kind": PLAIN, "nodes": 1})


def tree_variants(lm: LanguageModel, sampling: Sampling) -> list[Variant]:
    """Random and searched trees of up to 256 nodes, and Cartesian products; heads alone.

    Raises:
        UsageError: there are no heads, or they come without a tree.
    """
    heads, best = heads_and_tree(lm)
    levels = heads.config.num_heads
    trees: list[tuple[str, str, Tree]] = []  # name, kind, tree
    for size in TREE_SIZES:
        if size <= len(best):
            trees.append((f"searched {size}", "searched", best.best(size)))
        for number in range(RANDOM_TREES):
            tree = random_tree(size, levels, seed=1000 * (sampling.seed or 0) + 10 * size + number)
            trees.append((f"random {size}.{number + 1}", "random", tree))
    trees += [("x".join(map(str, top)), "Cartesian", Tree.cartesian(*top)) for top in CARTESIAN if len(top) <= levels]
    return [plain_variant(lm, sampling)] + [
        Variant(
            _with_tree(name, lm, heads, tree, sampling),
            {"kind": kind, "nodes": len(tree), "expected": _expected(tree, best)},
        )
        for name, kind, tree in trees
    ]


def heads_variants(lm: LanguageModel, sampling: Sampling) -> list[Variant]:
    """How many heads pay, and what each part of Medusa adds: a chain of best guesses, a searched tree, a dynamic one,
    n-grams; all trees of 8 nodes.

    Raises:
        UsageError: there are no heads, or they come without a tree.
    """
    heads, best = heads_and_tree(lm)
    variants = [plain_variant(lm, sampling)]

    def add(name: str, kind: str, levels: int, tree: Tree) -> None:
        method = _with_tree(f"{name}, {levels} heads", lm, heads, tree, sampling)
        variants.append(Variant(method, {"kind": kind, "heads": levels, "nodes": len(tree)}))

    for levels in range(1, best.depth + 1):
        add("chain", "chain of best guesses", levels, Tree.cartesian(*[1] * levels))
    for levels in range(1, best.depth + 1):
        shallow = {path: share for path, share in heads.config.tree if len(path) <= levels}
        add("tree", "searched tree", levels, Tree.from_paths(shallow).best(SMALL_TREE))
    for name, drafter in (("dynamic tree", "heads"), ("dynamic tree and n-grams", "union")):
        method = MedusaMethod(name, lm, lm.make_stepper(drafter, tree="dynamic", nodes=SMALL_TREE), sampling)
        variants.append(Variant(method, {"kind": name, "heads": best.depth, "nodes": SMALL_TREE}))
    return variants


def nodes_variants(lm: LanguageModel, sampling: Sampling) -> list[Variant]:
    """The drafter of `lm` with fixed numbers of nodes, and with as many as pay."""
    variants = [plain_variant(lm, sampling)]
    for nodes in (*NODE_SIZES[1:], "auto"):
        method = MedusaMethod(f"{nodes}", lm, lm.make_stepper(lm.stepper.drafter, nodes=nodes), sampling)
        variants.append(Variant(method, {"kind": "auto" if nodes == "auto" else "fixed", "nodes": nodes}))
    return variants


def drafters_variants(lm: LanguageModel, sampling: Sampling) -> list[Variant]:
    """Every drafter with 16 nodes and with as many as pay; `rubbish` is always wrong, to see what that costs."""
    names = ["ngram"] if lm.heads is None else ["ngram", "heads", "union", "rubbish"]
    if lm.heads is not None and lm.heads.config.tree:
        names.insert(1, "heads-static")
    variants = [plain_variant(lm, sampling)]
    for name in names:
        for nodes in (DRAFTERS_NODES, "auto"):
            method = replace(medusa_method(name, lm, sampling, nodes), name=f"{name}, {nodes}")
            variants.append(Variant(method, {"drafter": name, "nodes": nodes}))
    return variants


def threshold_variants(lm: LanguageModel, sampling: Sampling, baselines: Sequence[Method] = ()) -> list[Variant]:
    """Typical acceptance by its threshold, delta = sqrt(epsilon), beside exact sampling and greedy decoding, all with
    the drafter of `lm`. `plain` samples; `baselines` are others' engines."""
    exact = replace(sampling, acceptance="exact")
    variants = [
        plain_variant(lm, exact),
        Variant(MedusaMethod("greedy", lm, lm.stepper, replace(exact, temperature=0.0)), {"kind": "greedy"}),
        Variant(MedusaMethod("exact", lm, lm.stepper, exact), {"kind": "exact"}),
    ]
    for epsilon in EPSILONS:
        typical = replace(sampling, acceptance="typical", epsilon=epsilon, delta=math.sqrt(epsilon))
        method = MedusaMethod(f"typical {epsilon:g}", lm, lm.stepper, typical)
        variants.append(Variant(method, {"kind": "typical", "epsilon": epsilon, "delta": round(typical.delta, 4)}))
    return variants + [Variant(method, {"kind": method.name}) for method in baselines]


def heads_and_tree(lm: LanguageModel) -> tuple[HeadsRunner, Tree]:
    """The heads and the tree that calibration found for them. Raises UsageError without heads or tree."""
    if lm.heads is None:
        raise UsageError("this ablation is of heads, and the model has none: give --heads NAME or PATH")
    if not lm.heads.config.tree:
        raise UsageError("these heads come without a tree: run medusa calibrate first")
    return lm.heads, Tree.from_paths(dict(lm.heads.config.tree))


def random_tree(nodes: int, levels: int, seed: int) -> Tree:
    """Any tree: each node is the next guess of a node drawn from those that may have one more."""
    draw = random.Random(seed)
    paths: list[RankPath] = [()]
    children = [0]
    while len(paths) < nodes:
        open_nodes = [i for i, path in enumerate(paths) if len(path) < levels and children[i] < RANDOM_RANKS]
        if not open_nodes:
            break
        parent = draw.choice(open_nodes)
        paths.append((*paths[parent], children[parent]))
        children[parent] += 1
        children.append(0)
    return Tree.from_paths(paths[1:])


def _with_tree(name: str, lm: LanguageModel, heads: HeadsRunner, tree: Tree, sampling: Sampling) -> MedusaMethod:
    return MedusaMethod(name, lm, lm.make_stepper(HeadsDrafter(heads, tree), nodes=len(tree)), sampling)


def _expected(tree: Tree, best: Tree) -> float | None:
    """Tokens per step that calibration expects of a tree; None where it holds a path too rare to be stored."""
    known = dict(zip(best.paths, best.probabilities, strict=True))
    if not known.keys() >= set(tree.paths):
        return None
    return round(sum(known[path] for path in tree.paths), 3)


# --- what comes of them -----------------------------------------------------------------------------------------------


def table(
    variants: Iterable[Variant],
    figures: Callable[[str], Figures],
    extra_columns: Callable[[str], dict[str, Any]] = lambda _: {},
) -> list[dict[str, Any]]:
    """A row for each variant: what was varied, what was measured, and `extra_columns` by its name."""
    rows = []
    for variant in variants:
        name = variant.method.name
        measured = figures(name)
        low, high = measured.speedup_interval
        columns = {
            "tokens_per_second": measured.tokens_per_second,
            "tokens_per_step": measured.tokens_per_step,
            "milliseconds_per_step": measured.milliseconds_per_step,
            "overhead": measured.overhead,
            "speedup": measured.speedup,
            "speedup_low": low,
            "speedup_high": high,
            "identical": measured.identical,
            "total": measured.total,
        }
        figured = {key: rounded(value, 4) if isinstance(value, float) else value for key, value in columns.items()}
        rows.append({"variant": name, **variant.facts, **figured, **extra_columns(name)})
    return rows


def batch_rows(loads: dict[str, list[Load]]) -> list[dict[str, Any]]:
    """A row for each number of texts: throughput and latency of "medusa" and "plain", and their ratio."""
    return [
        {
            "texts": plain.rows,
            "plain_tokens_per_second": round(plain.tokens_per_second, 1),
            "medusa_tokens_per_second": round(medusa.tokens_per_second, 1),
            "speedup": round(medusa.tokens_per_second / plain.tokens_per_second, 3),
            "plain_ms_per_token": round(plain.token_milliseconds, 2),
            "medusa_ms_per_token": round(medusa.token_milliseconds, 2),
            "tokens_per_step": round(medusa.tokens_per_step, 3),
            "nodes_per_text": round(medusa.nodes / medusa.steps / medusa.rows, 2),
            "plain_ms_per_step": round(1e3 * plain.seconds / plain.steps, 2),
            "medusa_ms_per_step": round(1e3 * medusa.seconds / medusa.steps, 2),
        }
        for plain, medusa in zip(loads[PLAIN], loads["medusa"], strict=True)
    ]


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All columns that any row has. Raises MedusaError."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def cells(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> Cells:
    """`columns` (key -> title) of rows, as text."""

    def text(value: Any) -> str:
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else f"{value}"

    return [list(columns.values()), *([text(row.get(key)) for key in columns] for row in rows)]


_OF_A_STEP = {"tokens_per_step": "tokens/step", "milliseconds_per_step": "ms/step", "overhead": "overhead"}
_INTERVAL = {"speedup_low": "from", "speedup_high": "to"}
COLUMNS = {
    "tree": {"variant": "tree", "nodes": "nodes", "expected": "expected", **_OF_A_STEP, "speedup": "speed-up"},
    "heads": {"variant": "variant", "nodes": "nodes", **_OF_A_STEP, "speedup": "speed-up"},
    "nodes": {"variant": "nodes", **_OF_A_STEP, "speedup": "speed-up", **_INTERVAL},
    "drafters": {
        "variant": "drafter, nodes", **_OF_A_STEP, "speedup": "speed-up", **_INTERVAL, "identical": "identical",
    },
    "threshold": {
        "variant": "variant", "tokens_per_step": "tokens/step", "speedup": "speed-up",
        "perplexity": "perplexity", "distinct_2": "distinct-2", "repetition": "repetition", "mark": "mark",
    },
    "batch": {
        "texts": "texts", "plain_tokens_per_second": "plain tokens/s", "medusa_tokens_per_second": "Medusa tokens/s",
        "speedup": "speed-up", "plain_ms_per_token": "plain ms/token", "medusa_ms_per_token": "Medusa ms/token",
        "tokens_per_step": "tokens/step", "nodes_per_text": "nodes/text",
    },
}  # fmt: skip

# The panels of each picture: (column of y, title, label of y).
_STEPS = ("tokens_per_step", "Acceleration", "tokens per step")
_SPEED = ("speedup", "Speed", "times as fast as plain decoding")
PANELS = {
    "tree": (_STEPS, _SPEED),
    "heads": (_STEPS, _SPEED),
    "nodes": (_STEPS, _SPEED),
    "threshold": (_STEPS, ("perplexity", "Perplexity under the model", "perplexity")),
    "batch": (
        ("tokens_per_second", "Throughput", "tokens per second, all texts"),
        ("ms_per_token", "Latency", "milliseconds per token of one text"),
    ),
}


def draw(kind: str, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The picture of an ablation. Raises MedusaError."""
    from medusa.evaluation.charts import Curves, draw_curves

    def points(name: str, x: str, y: str) -> list[tuple[float, float]]:
        of_kind = [row for row in rows if row.get("kind") == name and isinstance(row.get(x), (int, float))]
        return sorted((float(row[x]), float(row[y])) for row in of_kind if row.get(y) is not None)

    def by_kind(kinds: Sequence[str], x: str, y: str) -> dict[str, list[tuple[float, float]]]:
        return {name: series for name in kinds if (series := points(name, x, y))}

    def level(name: str, y: str) -> float | None:
        return next((row[y] for row in rows if row.get("kind") == name), None)

    def panel(y: str, title: str, label: str) -> Curves:
        nodes, base = "nodes verified in a step", 1.0 if y == "speedup" else None
        if kind == "tree":
            series = by_kind(("searched", "Cartesian", "random"), "nodes", y)
            return Curves(series, title, nodes, label, log=True, joined=("searched",), base=base)
        if kind == "heads":
            series = by_kind(("chain of best guesses", "searched tree"), "heads", y)
            levels = {name: level(name, y) for name in ("dynamic tree", "dynamic tree and n-grams")}
            return Curves(series, title, "heads", label, levels=levels, base=base)
        if kind == "nodes":
            series = {"fixed": [(1.0, 1.0), *points("fixed", "nodes", y)]}
            return Curves(series, title, nodes, label, log=True, levels={"auto": level("auto", y)}, base=base)
        if kind == "threshold":
            others = [row for row in rows if row.get("kind") != "typical" and row["variant"] != PLAIN]
            levels = {row["variant"]: row.get(y) for row in others}
            series = {"typical": points("typical", "epsilon", y)}
            return Curves(series, title, "epsilon (delta is its root)", label, levels=levels)
        series = {name: [(row["texts"], row[f"{name.lower()}_{y}"]) for row in rows] for name in ("Medusa", "plain")}
        return Curves(series, title, "texts at once", label, log=True)

    draw_curves([panel(*measure) for measure in PANELS[kind]], path)
