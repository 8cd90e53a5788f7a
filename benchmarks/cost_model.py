"""What a step should take, from a few numbers of the machine and the model; and how far that is from what was measured.

    python benchmarks/cost_model.py                         # predicted beside measured: the table of docs/scaling.md
    python benchmarks/cost_model.py --parameters 7 --bandwidth 3020 --tflops 791 --overhead 2 --price 2 --rows 1 16 256
    python benchmarks/cost_model.py --figure docs/cost.svg

A pass reads the weights and the keys and values of all rows, and multiplies every weight with every token. It takes the
longer of the two, for they go on side by side, and something that does not depend on either:

    t = max((weights + rows * positions * kv) / bandwidth, rows * nodes * macs / compute) + overhead

The model knows nothing of prefill, of kernels that take rows in lumps, of several devices' talk, nor of other programs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

# Tokens per step by nodes: the union on 20 questions, SmolLM2-135M (docs/results.md, "Nodes"). Yours will differ.
EXPECTED = {1: 1.0, 2: 1.62, 4: 2.31, 6: 2.69, 8: 2.95, 10: 3.11, 12: 3.18, 16: 3.28, 24: 3.40, 32: 3.47, 64: 3.62}


@dataclass(frozen=True, slots=True)
class Machine:
    """bandwidth: bytes a second; compute: multiply-adds a second (half of the FLOP/s) that its kernels reach;
    overhead: seconds of a pass that depend on neither."""

    bandwidth: float
    compute: float
    overhead: float = 0.0


@dataclass(frozen=True, slots=True)
class Model:
    """weights: bytes that a pass reads; macs: multiply-adds for a token, the number of parameters that take part;
    kv: bytes of keys and values of one position."""

    weights: float
    macs: float
    kv: float = 0.0


def pass_seconds(machine: Machine, model: Model, rows: int = 1, nodes: int = 1, positions: float = 0.0) -> float:
    """Of one pass over `nodes` tokens of each of `rows` texts, after so many positions of each."""
    reading = (model.weights + rows * positions * model.kv) / machine.bandwidth
    return max(reading, rows * nodes * model.macs / machine.compute) + machine.overhead


def tokens_per_second(rows: int, expected: float, seconds: float) -> float:
    """Of all texts together, where a step takes so long and gives each `expected` tokens."""
    return rows * expected / seconds


def cost_of_a_million(price_of_an_hour: float, rate: float) -> float:
    """Of a million tokens, in the currency of the price, at `rate` tokens a second."""
    return price_of_an_hour / (rate * 3600 / 1e6)


def free_tokens(machine: Machine, model: Model) -> float:
    """How many tokens a pass takes before arithmetic is longer than reading the weights: rows times nodes up to here
    cost nothing more, and what is beyond them is paid for."""
    return model.weights / machine.bandwidth * machine.compute / model.macs


def best_nodes(machine: Machine, model: Model, rows: int, draft: float = 0.0, positions: float = 0.0) -> int:
    """The size of a tree that gives the most tokens a second; 1 is plain decoding, which has no draft."""

    def rate(nodes: int) -> float:
        seconds = pass_seconds(machine, model, rows, nodes, positions) + (draft if nodes > 1 else 0.0)
        return tokens_per_second(rows, EXPECTED[nodes], seconds)

    return max(EXPECTED, key=rate)


# --- what was measured ----------------------------------------------------------------------------------------------

PARAMETERS = 134.5e6  # SmolLM2-135M, its tied LM head counted once
KV = 30 * 2 * 3 * 64 * 2  # layers, keys and values, heads, size, bytes of bfloat16
POSITIONS = 150  # of a text while it was measured, where that was not noted: on a CPU it matters little


@dataclass(frozen=True, slots=True)
class Point:
    """A step that was measured, in seconds, of `size` texts or nodes. One that `fits` gave the model a number, and
    proves nothing."""

    series: str
    size: int
    measured: float
    predicted: float
    fits: bool = False

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def points() -> Iterator[Point]:
    """All that is in docs/native.md, docs/results.md and docs/decisions.md and says enough to be predicted."""
    yield from _passes()
    yield from _batches()
    yield from _gpu()


def _passes() -> Iterator[Point]:
    """docs/native.md, "What a pass costs": 200 positions, memory measured at 38 GB/s, and what reading takes at that.
    The overhead comes from one token in bfloat16, arithmetic from 16 tokens in each format."""
    limits = {"float32": 14.4, "bfloat16": 7.1, "int8": 3.6, "int4": 2.6}
    measured = {
        "float32": {1: 15.9, 4: 17.2, 8: 18.1, 12: 21.0, 16: 27.9},
        "bfloat16": {1: 8.3, 4: 8.8, 8: 9.2, 12: 10.4, 16: 13.9},
        "int8": {1: 4.5, 4: 4.6, 8: 5.1, 12: 6.7, 16: 8.8},
        "int4": {1: 3.5, 4: 3.6, 8: 5.3, 12: 8.0, 16: 9.7},
    }
    # docs/decisions.md, "Plain decoding, 24 rows at once": tokens a second by texts, of another day.
    rates = {"bfloat16": {8: 1029, 16: 1076, 32: 1267}, "int8": {8: 1467, 16: 1632, 24: 1781, 32: 1892, 48: 1890}}
    bandwidth = 38e9
    overhead = (measured["bfloat16"][1] - limits["bfloat16"]) / 1e3 - 200 * KV / bandwidth
    for dtype, times in measured.items():
        model = Model(limits[dtype] / 1e3 * bandwidth, PARAMETERS, KV)
        machine = Machine(bandwidth, 16 * PARAMETERS / (times[16] / 1e3 - overhead), overhead)
        for nodes, ms in times.items():
            predicted = pass_seconds(machine, model, 1, nodes, 200)
            fits = nodes == 16 or (dtype, nodes) == ("bfloat16", 1)
            yield Point(f"EPYC, {dtype}, nodes", nodes, ms / 1e3, predicted, fits)
        for rows, rate in rates.get(dtype, {}).items():
            predicted = pass_seconds(machine, model, rows, 1, 200)
            yield Point(f"the same from there, {dtype}, texts", rows, rows / rate, predicted)


def xeon() -> tuple[Machine, Model]:
    """Of docs/results.md, in bfloat16: bandwidth and arithmetic come from one text and from 32 ("Texts at once"), the
    overhead is the EPYC's."""
    overhead = 1.1e-3
    model = Model(2 * PARAMETERS, PARAMETERS, KV)
    bandwidth = (model.weights + POSITIONS * KV) / (9.89e-3 - overhead)
    return Machine(bandwidth, 32 * PARAMETERS / (51.90e-3 - overhead), overhead), model


def _batches() -> Iterator[Point]:
    """docs/results.md, "Texts at once" and "Nodes". What a draft takes comes from two nodes."""
    machine, model = xeon()
    for rows, ms in {1: 9.89, 2: 10.35, 4: 11.30, 8: 14.96, 16: 27.29, 32: 51.90}.items():
        predicted = pass_seconds(machine, model, rows, 1, POSITIONS)
        yield Point("Xeon, bfloat16, texts", rows, ms / 1e3, predicted, rows in (1, 32))
    draft = 11.5e-3 - pass_seconds(machine, model, 1, 2, POSITIONS)
    for nodes, ms in {2: 11.5, 4: 12.4, 6: 13.4, 8: 15.8, 12: 20.8, 16: 27.7, 32: 49.8, 64: 96.6}.items():
        predicted = pass_seconds(machine, model, 1, nodes, POSITIONS) + draft
        yield Point("Xeon, bfloat16, nodes of the union", nodes, ms / 1e3, predicted, nodes == 2)


def _gpu() -> Iterator[Point]:
    """docs/results.md, "On a GPU": 3.02 TB/s and 791 TFLOP/s measured, 1,480 kernels of 2.2 microseconds counted."""
    model = Model(2 * PARAMETERS, PARAMETERS, KV)
    machine = Machine(3.02e12, 791e12 / 2, 1480 * 2.2e-6)
    for what, rows, nodes, seconds in (
        ("a text, plain", 1, 1, 3.27e-3),
        ("a text, nodes of heads", 1, 64, 4.48e-3),
        ("texts, sampled", 1024, 1, 1024 / 73_500),
    ):
        predicted = pass_seconds(machine, model, rows, nodes, POSITIONS)
        yield Point(f"H100, bfloat16, {what}", max(rows, nodes), seconds, predicted)


def table() -> list[str]:
    """Of docs/scaling.md: a line for each series, what the model was fitted to in brackets."""
    lines = ["| machine, format, sizes | | predicted ms | measured ms | error |", "|---|---|---|---|---|"]
    for series, group in groupby(points(), lambda point: point.series):
        found = list(group)
        columns = (
            [str(point.size) for point in found],
            [f"({point.predicted * 1e3:.1f})" if point.fits else f"{point.predicted * 1e3:.1f}" for point in found],
            [f"{point.measured * 1e3:.1f}" for point in found],
            [f"{point.error:+.0%}" for point in found if not point.fits],
        )
        lines.append(f"| {series} | {' | '.join(', '.join(column) for column in columns)} |")
    return lines


# --- what yours may do ----------------------------------------------------------------------------------------------


def outlook(machine: Machine, model: Model, rows: Sequence[int], positions: float, price: float) -> list[str]:
    lines = [
        "| texts at once | plain tokens/s | a million costs | best nodes | Medusa tokens/s | a million costs |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for count in rows:
        nodes = best_nodes(machine, model, count, positions=positions)
        plain, drafted = (
            tokens_per_second(count, EXPECTED[n], pass_seconds(machine, model, count, n, positions)) for n in (1, nodes)
        )
        lines.append(
            f"| {count} | {plain:,.0f} | {cost_of_a_million(price, plain):.3f} | {nodes} | {drafted:,.0f} | "
            f"{cost_of_a_million(price, drafted):.3f} |"
        )
    return lines


def figure(path: Path) -> None:
    """Tokens a second against texts at once, as far as 80 GB hold them, by what was measured on the H100; for models of
    the shapes of Llama 3 and Qwen 2.5."""
    from medusa.plots import new_figure, save

    rows = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    machine = Machine(3.02e12, 791e12 / 2, 2e-3)
    drawn = new_figure(width=7, height=4.2)
    axes = drawn.subplots()
    for number, (name, size, kv) in enumerate(
        (("1B", 1.24e9, 32_768), ("8B", 8.0e9, 131_072), ("32B", 32.5e9, 262_144))
    ):
        model = Model(2 * size, size, kv)
        for drafts in (False, True):
            rates = []
            fitting = [count for count in rows if model.weights + 1000 * count * model.kv < 80e9]
            for count in fitting:
                nodes = best_nodes(machine, model, count, positions=1000) if drafts else 1
                seconds = pass_seconds(machine, model, count, nodes, 1000)
                rates.append(tokens_per_second(count, EXPECTED[nodes], seconds))
            label = f"{name}, {'best tree' if drafts else 'plain'}"
            axes.plot(fitting, rates, "-" if drafts else "--", color=f"C{number}", label=label, linewidth=1.5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(rows, [str(count) for count in rows])
    axes.set_xlabel("texts at once")
    axes.set_ylabel("tokens/s, predicted")
    axes.set_title("3.0 TB/s, 791 TFLOP/s, 80 GB, bfloat16, after 1,000 positions", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(drawn, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, help="of the model that take part in a token, in billions")
    parser.add_argument("--bytes", type=float, default=2, help="of a weight: 2 is bfloat16, 1 int8, 0.56 int4")
    parser.add_argument("--kv", type=float, default=131_072, help="bytes of keys and values of a position")
    parser.add_argument("--positions", type=float, default=1000, help="of each text, on average")
    parser.add_argument("--bandwidth", type=float, default=3020, help="GB/s that the machine reads")
    parser.add_argument("--tflops", type=float, default=791, help="that its products reach")
    parser.add_argument("--overhead", type=float, default=2, help="milliseconds of a pass that depend on neither")
    parser.add_argument("--price", type=float, default=1.0, help="of the machine for an hour")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--figure", type=Path)
    chosen = parser.parse_args()
    if chosen.figure is not None:
        figure(chosen.figure)
    elif chosen.parameters is None:
        print("\n".join(table()))
    else:
        size = chosen.parameters * 1e9
        model = Model(size * chosen.bytes, size, chosen.kv)
        machine = Machine(chosen.bandwidth * 1e9, chosen.tflops * 1e12 / 2, chosen.overhead / 1e3)
        print(f"free tokens in a pass: {free_tokens(machine, model):.0f}")
        print("\n".join(outlook(machine, model, chosen.rows, chosen.positions, chosen.price)))


if __name__ == "__main__":
    main()
