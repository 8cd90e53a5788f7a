"""scripts/gpu-check: one command that checks and times Medusa on a machine with a GPU, in minutes, without a network.

Each part runs in a process of its own. It should end within its seconds, and is killed a little later; what it found
until then is in the report, and the next part runs. `--tiny` runs the same lines on a CPU in seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gpu_check.report import Options, Part, Report, all_well, error_facts, machine_facts
from gpu_check.table import table
from medusa.errors import MedusaError, UsageError

# Seconds that a part should take. Together with the starts of the processes they fit into TOTAL.
PARTS = {
    "correctness": 40,
    "tests": 50,
    "times": 85,
    "model": 45,
    "batches": 35,
    "bits": 20,
    "profile": 10,
    "attention": 20,
    "training": 45,
    "compiled": 60,
}
MODULES = {
    "correctness": "correct",
    "tests": "correct",
    "times": "shapes",
    "batches": "model",
    "compiled": "model",
}  # else by its name
OPTIONAL = ("compiled",)  # only where it is named, or with --compile
TOTAL = 355.0
GRACE = 15.0  # what a part may take past its seconds, its imports included
LEAST = 8.0  # with less than this left a part is not begun


def run_one(name: str, options: Options, seconds: float) -> int:
    """Runs a part in this process. Returns 0 where all was well."""
    report = Report(options.out)
    part = Part(report, name, seconds)
    try:
        module = importlib.import_module(f"gpu_check.{MODULES.get(name, name)}")
        getattr(module, f"{name}_part")(part, options)
    except Exception as error:  # noqa: BLE001  # a part that fails is told, and the next one runs
        part.fail(name, error)
    part.end()
    return 1 if part.data["status"] == "failed" else 0


def run_process(name: str, command: Sequence[str], path: Path, seconds: float, env: Mapping[str, str]) -> None:
    """Runs a part in a process of its own, which is killed after `seconds`; the report says how it ended."""
    log = path.with_suffix(".log")
    begun = time.perf_counter()
    killed = False
    with log.open("ab") as out:
        out.write(f"--- {name}\n".encode())
        out.flush()
        start = out.tell()
        process = subprocess.Popen(command, stdout=out, stderr=out, env=dict(env), start_new_session=True)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            killed = True
        finally:  # also for Ctrl-C; and what the part started itself ends with it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    report = Report(path)
    part = report.part(name)
    if not killed and part.get("status") not in (None, "running"):
        return
    end = f"killed after {seconds:.0f} s" if killed else f"its process ended with code {process.returncode}"
    error = error_facts(name, MedusaError(end))
    with log.open("rb") as read:
        read.seek(start)
        error["traceback"] = read.read().decode(errors="replace").splitlines()[-12:]
    part.setdefault("errors", []).append(error)
    part.setdefault("found", {})
    part["status"] = "killed" if killed else "failed"
    part["seconds"] = round(time.perf_counter() - begun, 2)
    report.save()


@contextlib.contextmanager
def stopping_with_children() -> Iterator[None]:
    """Inside, SIGTERM ends this process as Ctrl-C does, so that a part does not run on alone."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check(
    options: Options, parts: Sequence[str], limits: Mapping[str, float], total: float, env: Mapping[str, str]
) -> Report:
    """Runs the parts one after another, each in its own process with `env`, within `total` seconds."""
    begun = time.perf_counter()
    report = Report(options.out)
    report.data["machine"] = machine_facts(options.device)
    chosen = {"tiny": options.tiny, "model": options.model, "heads": options.heads}
    report.data["options"] = {**chosen, "parts": list(parts), "total_seconds": total}
    report.data["parts"].update({name: {"status": "waiting"} for name in parts})
    report.save()
    for name in parts:
        left = total - (time.perf_counter() - begun)
        if left < LEAST:
            report = Report(options.out)
            report.data["parts"][name] = {"status": "cut short", "notes": ["no time was left for it"], "found": {}}
            report.save()
            continue
        hard = min(limits[name] + GRACE, left)
        soft = min(limits[name], max(1.0, left - GRACE))
        command = [sys.executable, "-m", "gpu_check", "--only", name, "--seconds", f"{soft:.1f}"]
        command += ["--out", str(options.out), "--device", options.device, "--heads", options.heads]
        command += ["--model", options.model] if options.model is not None else []
        command += ["--tiny"] if options.tiny else []
        run_process(name, command, options.out, hard, env)
        print(f"{name}: {Report(options.out).part(name)['status']}", file=sys.stderr, flush=True)
    report = Report(options.out)
    report.data["seconds"] = round(time.perf_counter() - begun, 1)
    report.save()
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code: 0 all well, 1 something failed or was killed, 2 a bad argument."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.only is not None:
            options = Options(arguments.out, arguments.device, arguments.tiny, arguments.model, arguments.heads)
            return run_one(arguments.only, options, arguments.seconds)
        with stopping_with_children(), tempfile.TemporaryDirectory(prefix="medusa-gpu-check-") as scratch:
            parts, limits, env = _parts(arguments), _limits(arguments), _environment(arguments.tiny, Path(scratch))
            report = check(_options(arguments, Path(scratch)), parts, limits, arguments.total, env)
    except UsageError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    except MedusaError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 1
    print(table(report.data))
    return 0 if all_well(report.data) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu-check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"), help="the report (default gpu-check.json)")
    parser.add_argument("--parts", help=f"some of {','.join(PARTS)}, with commas")
    parser.add_argument("--model", help="a GGUF file or a model directory for the part `model`")
    parser.add_argument("--pieces", type=Path, help="a directory with NAME.part00, ... that are joined to the model")
    parser.add_argument("--heads", default="auto", help="heads for that model (default: those shipped for it)")
    parser.add_argument("--compile", action="store_true", help="also time steps with compiled layers")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a CPU: seconds")
    parser.add_argument("--device", help="a torch device (default cuda, with --tiny cpu)")
    parser.add_argument("--total", type=float, default=TOTAL, help=f"seconds for all parts (default {TOTAL:.0f})")
    parser.add_argument("--limit", action="append", default=[], metavar="PART=SECONDS", help="seconds for one part")
    parser.add_argument("--only", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return parser


def _parts(arguments: argparse.Namespace) -> list[str]:
    if arguments.parts is None:
        return [name for name in PARTS if name not in OPTIONAL or arguments.compile]
    parts = [name.strip() for name in arguments.parts.split(",") if name.strip()]
    if not parts or (unknown := [name for name in parts if name not in PARTS]):
        raise UsageError(f"unknown part {unknown[0] if parts else 'of no name'}: use some of {', '.join(PARTS)}")
    return list(dict.fromkeys(parts))


def _limits(arguments: argparse.Namespace) -> dict[str, float]:
    limits = {name: float(seconds) for name, seconds in PARTS.items()}
    for text in arguments.limit:
        name, _, seconds = text.partition("=")
        try:
            limit = float(seconds)
        except ValueError:
            limit = 0.0
        if name not in PARTS or not 0 < limit < math.inf:
            raise UsageError(f"{text!r} is no limit: write PART=SECONDS, such as times=120")
        limits[name] = limit
    return limits


def _environment(tiny: bool, scratch: Path) -> dict[str, str]:
    """Of the parts: no network, and one place for a converted model."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    root = Path(__file__).parents[2]
    paths = [str(root / "src"), str(root / "benchmarks"), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if importlib.util.find_spec("platformdirs") is None:
        env.setdefault("MEDUSA_CACHE", str(scratch / "cache"))
    if tiny:
        env.setdefault("OMP_NUM_THREADS", "1")  # for models this small more threads only wait for each other
    return env


def _options(arguments: argparse.Namespace, scratch: Path) -> Options:
    """What the arguments ask for, with the model where it can be loaded from; `scratch` lasts as long as the check."""
    from gpu_check.model import join_pieces

    device = arguments.device or ("cpu" if arguments.tiny else "cuda")
    if device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            raise MedusaError("there is no CUDA device here: use --tiny to try the command on a CPU")
    elif not arguments.tiny:
        raise UsageError(f"only a tiny check runs on {device}: add --tiny")
    if arguments.model is not None and arguments.pieces is not None:
        raise UsageError("give either --model or --pieces")
    if arguments.pieces is not None and not arguments.pieces.is_dir():
        raise UsageError(f"there is no directory {arguments.pieces}")
    with contextlib.suppress(FileNotFoundError):
        arguments.out.unlink()  # what an earlier check found says nothing of this one
    Report(arguments.out).save()  # a file that cannot be written is told now
    arguments.out.with_suffix(".log").unlink(missing_ok=True)
    model, heads = arguments.model, arguments.heads
    if arguments.pieces is not None:
        model = str(join_pieces(arguments.pieces, scratch))
    elif arguments.tiny and model is None:
        from gpu_check.tiny import write_tiny

        model, heads = map(str, write_tiny(scratch))
    return Options(arguments.out, device, arguments.tiny, model, heads)


if __name__ == "__main__":
    sys.exit(main())
