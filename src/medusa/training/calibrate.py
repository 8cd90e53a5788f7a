"""From held-out text to the best tree, and from the machine's speed to its best size.

f(path) is how often all ranks on a path are right, counted jointly: the root and the N - 1 likeliest paths are the
optimal fixed tree of N nodes, which gives E(N) = 1 + the sum of their f tokens per step. A pass over N nodes takes t(N)
here, so N* = argmax E(N) / t(N).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import medusa
from medusa.decoding.times import PassTimes
from medusa.decoding.tree import Tree
from medusa.engines.protocol import Backend
from medusa.errors import MedusaError, UsageError
from medusa.files import swapped_in
from medusa.heads.config import vocabulary_hash
from medusa.heads.file import load_heads, write_config
from medusa.heads.module import Heads
from medusa.models import zoo
from medusa.plots import draw_accuracy, draw_tree, has_matplotlib
from medusa.settings import EngineSettings, TextSettings, values
from medusa.steppers import on_one_gpu
from medusa.training.accuracy import Accuracy, ranks
from medusa.training.data import Example
from medusa.training.device_features import DeviceFeatures
from medusa.training.features import LiveFeatures, longest_answer
from medusa.training.text import Reporter, read_text, slots_that_fit, write_text

PICTURES = ("tree.svg", "accuracy.svg")
DRAWN_NODES = 32  # a picture of more is hard to read
REPORTED_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 64)
SLOTS = 16
SEED = 1_000_000  # of the text, where the model writes it; training begins from 0
BATCH = 1024


@dataclass(frozen=True, slots=True)
class Size:
    """A tree of `nodes` nodes: tokens per step E(N), time of a step t(N), and how much faster than plain decoding."""

    nodes: int
    expected_tokens: float
    seconds: float
    speed_up: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured; `best` is the size of tree that is fastest here."""

    heads: Path
    accuracy: Accuracy
    best: Size
    report: tuple[str, ...]


def measure(heads: Heads, backend: Backend, examples: Sequence[Example]) -> Accuracy:
    """The heads' accuracy on texts that they have not learned from. Raises MedusaError where there is no such text."""
    levels = heads.config.num_heads
    if longest_answer(examples, backend.max_length) <= levels:
        raise MedusaError(f"every answer is shorter than the {levels + 1} tokens that {levels} heads look at")
    gpu = on_one_gpu(backend)
    rows = LiveFeatures(backend, examples) if gpu is None else DeviceFeatures(gpu, examples)
    return Accuracy.of(ranks(heads, rows.in_order(levels, BATCH)))


def sizes(accuracy: Accuracy, times: PassTimes) -> list[Size]:
    """What the best tree of each size up to 64 nodes would give; drafting counts."""
    candidates = []
    for nodes in range(1, max(REPORTED_SIZES) + 1):
        expected = accuracy.expected_tokens(nodes)
        seconds = times(nodes) + (times.draft_seconds if nodes > 1 else 0.0)
        candidates.append(Size(nodes, expected, seconds, expected / seconds * times(1)))
    return candidates


def best_size(candidates: Sequence[Size]) -> Size:
    """N*: the fastest. One node is plain decoding, which wins where no tree pays."""
    return max(candidates, key=lambda size: (size.speed_up, -size.nodes))


def draw(accuracy: Accuracy, directory: Path) -> None:
    """PICTURES; none without matplotlib, as heads are not to be lost for want of them."""
    for name in PICTURES:
        (directory / name).unlink(missing_ok=True)  # of what was measured before
    if not has_matplotlib():
        return
    tree = Tree.from_paths(dict(accuracy.tree))
    draw_tree(tree.best(DRAWN_NODES), directory / PICTURES[0])
    draw_accuracy(accuracy.top, directory / PICTURES[1])


def calibrate_heads(
    engine: EngineSettings, *, data: Sequence[str], tokens: int, out: Path | None, reporter: Reporter
) -> Calibration:
    """Measures heads on text, and the machine with them; stores tree and pictures.

    Args:
        engine: the model, and heads, which are calibrated in place, or a copy of them in `out`.
        data: texts; without any the model writes `tokens` tokens of answers, other ones than those for training.

    Raises:
        UsageError: there are no such heads. MedusaError: nothing to measure on, or the heads cannot be written.
    """
    source = zoo.resolve(engine.model, in_place=True)
    directory = zoo.find_heads(engine.heads, source)
    if directory is None:
        raise UsageError(f"there are no heads for {engine.model}: give --heads PATH")
    if out is not None and out.absolute() == directory.absolute():
        out = None
    target = out or directory
    check_target(target, new=out is not None)
    reporter.stage("Loading")
    text = TextSettings(tokens=tokens, seed=SEED)
    shape = zoo.load_config(source).get_text_config()
    slots, length = slots_that_fit(shape, SLOTS, text.max_length, engine.device, engine.dtype)
    engine = replace(engine, heads=str(directory), drafter="none", num_slots=slots, max_length=length, progress=False)
    lm = medusa.load(**values(engine))
    module = load_heads(
        directory,
        lm.backend.base_weights(),
        vocab_hash=vocabulary_hash(lm.tokenizer.get_vocab()),
        num_layers=lm.backend.num_layers,
    )
    with tempfile.TemporaryDirectory() as scratch:
        if not data:
            data = [str(Path(scratch) / "text.jsonl")]
            write_text(text, lm, Path(data[0]), reporter)
        reporter.stage("Measuring the heads")
        examples = read_text(data, lm, text.max_length, reporter.say)
    accuracy = measure(module, lm.backend, examples)
    reporter.stage("Measuring this machine")
    times = lm.pass_times(refresh=True)
    module.config = replace(module.config, tree=accuracy.tree)
    try:
        if out is None:
            write_config(module.config, target)
        else:  # the weights as they lie in the file, and what tells how they came about
            with swapped_in(out) as new:
                for path in directory.iterdir():
                    if path.is_file():
                        shutil.copyfile(path, new / path.name)
                write_config(module.config, new)
        draw(accuracy, target)
    except OSError as error:
        raise MedusaError(f"cannot write {target}: {error.strerror}; name another directory with --out") from None
    return Calibration(target, accuracy, best_size(sizes(accuracy, times)), speed_report(accuracy, times))


def check_target(directory: Path, *, new: bool) -> None:
    """Raises, as saving would in the end, where heads cannot be written. Nothing that is there is replaced."""
    if new and directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UsageError(f"{directory} is there already: name a new directory with --out")
    nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not os.access(nearest, os.W_OK):
        raise MedusaError(f"cannot write {directory}: permission denied; name another directory with --out")


def speed_report(accuracy: Accuracy, times: PassTimes) -> tuple[str, ...]:
    """A table of what trees of some sizes cost and give here, and which of all is best."""
    candidates = sizes(accuracy, times)
    best = best_size(candidates)
    counted = "drafting counted" if times.draft_seconds else "drafting not counted"
    shown = [size for size in candidates if size.nodes in REPORTED_SIZES or size is best]
    table = (
        ("Nodes", [f"{size.nodes}" for size in shown]),
        ("Tokens per step", [f"{size.expected_tokens:.2f}" for size in shown]),
        ("Time of a step, ms", [f"{1e3 * size.seconds:.1f}" for size in shown]),
        ("Faster than plain", [f"{size.speed_up:.2f}x" for size in shown]),
    )
    lines = [f"{title:18}" + "".join(f"{value:>7}" for value in values) for title, values in table]
    if best.nodes > 1:
        lines.append(
            f"Best here, with heads alone and a fixed tree: {best.nodes} nodes, {best.speed_up:.2f}x ({counted})."
        )
    else:
        lines.append("No tree pays here: plain decoding is as fast.")
    return tuple(lines)
