"""scripts/gpu-check: every part in its tiny form, and a report that tells whatever happens."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gpu_check import __main__ as gpu_check
from gpu_check.__main__ import main, run_one, run_process
from gpu_check.model import join_pieces
from gpu_check.report import Options, Part, Report, all_well, read
from gpu_check.shapes import (
    SHAPES,
    TINY,
    expected_speedups,
    original_config,
    random_heads,
    random_model,
    shipped_tree,
    trained_config,
    weights_read,
)
from gpu_check.table import LINES, table
from gpu_check.tiny import write_tiny
from medusa.decoding.sampling import GREEDY
from medusa.errors import MedusaError
from medusa.settings import HeadsSettings
from medusa.training.run import DEFAULT_DRAFT_VOCAB, feature_layers

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu-check"


@pytest.fixture(autouse=True)
def found_by_children(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(Path(__file__).parents[1] / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    model, heads = write_tiny(tmp_path_factory.mktemp("tiny"))
    return str(model), str(heads)


def options(tmp_path: Path, tiny_model: tuple[str, str] | None = None, **changes: Any) -> Options:
    model, heads = tiny_model or (None, "auto")
    return Options(tmp_path / "report.json", "cpu", tiny=True, model=model, heads=heads, **changes)


def found(path: Path, name: str) -> dict[str, Any]:
    part = read(path)["parts"][name]
    assert part["errors"] == []
    assert part["status"] == "done"
    return dict(part["found"])


# --- the parts --------------------------------------------------------------------------------------------------------


def test_texts_on_the_device_are_those_of_plain_decoding(tmp_path: Path, tiny_model: tuple[str, str]) -> None:
    asked = options(tmp_path, tiny_model)
    assert run_one("correctness", asked, 300) == 0
    part = found(asked.out, "correctness")
    for of in (part["random"], {"float32": part["default"]["float32"]}):
        for drafters in of.values():
            assert set(drafters) == {"heads", "union"}
            assert all(counts["texts"] > 0 for counts in drafters.values())
    assert all(counts["identical"] == 8 for counts in part["random"]["float32"].values())
    assert part["random"]["float32"]["union"]["tokens_per_step"] > 1.1  # drafts are accepted, or nothing is checked
    assert part["random"]["float32"]["heads"]["tokens_per_step"] > 1.0


def test_a_text_that_differs_in_float32_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: tuple[str, str]
) -> None:
    from gpu_check import correct as gpu_correct

    real, calls = gpu_correct._text, []

    def wrong(*args: Any) -> tuple[list[int], int]:
        tokens, steps = real(*args)
        calls.append(tokens)
        return ([*tokens[:-1], tokens[-1] + 1] if len(calls) == 9 else tokens), steps  # the first text with heads

    monkeypatch.setattr(gpu_correct, "_text", wrong)
    monkeypatch.setattr(gpu_correct, "default_model", lambda _: None)
    asked = options(tmp_path)
    assert run_one("correctness", asked, 300) == 1
    part = read(asked.out)["parts"]["correctness"]
    assert [error["message"] for error in part["errors"]] == ["a random model in float32: only 7 of 8 texts with heads"]


def test_the_steps_own_tests_are_told_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_check import correct

    home = tmp_path / "tests"
    home.mkdir()
    (home / "test_a.py").write_text("import os\ndef test_a(): assert os.environ['MEDUSA_TEST_DEVICE'] == 'cpu'\n")
    (home / "test_b.py").write_text("def test_b(): pass\ndef test_c(): raise ValueError('wrong')\n")
    monkeypatch.setattr(correct, "TESTS", home)
    monkeypatch.setattr(correct, "OWN", ("test_a.py", "test_b.py", "test_c.py"))
    part = Part(Report(tmp_path / "report.json"), "tests", 60.0)
    correct.tests_part(part, Options(tmp_path / "report.json", "cpu"))
    part.end()
    assert part.data["status"] == "failed"
    assert [error["message"] for error in part.data["errors"]] == ["test_b.py fails on cpu"]
    assert part.data["notes"] == ["test_c.py is not there"]
    assert {name: (of["exit"], of["passed"]) for name, of in part.data["found"].items()} == {
        "test_a.py": (0, 1),
        "test_b.py": (1, 1),
    }
    assert "wrong" in "".join(part.data["found"]["test_b.py"]["last_lines"])
    assert "test_a.py: exit 0, 1 passed" in table(read(tmp_path / "report.json"))
    monkeypatch.setattr(correct, "find_spec", lambda name: None)
    again = Part(Report(tmp_path / "other.json"), "tests", 60.0)
    correct.tests_part(again, Options(tmp_path / "other.json", "cpu"))
    assert again.data["notes"] == ["the step's own tests want pytest, which is not installed"]


def test_steps_of_every_size_are_timed_and_compared(tmp_path: Path) -> None:
    asked = options(tmp_path)
    assert run_one("times", asked, 300) == 0
    part = found(asked.out, "times")
    assert part["rates"]["read_GB_per_second"] > 0
    assert part["rates"]["bfloat16_TFLOP_per_second"] > 0
    for kind, sizes in (
        ("trained", {"1", "8", "16", "32", "64"}),
        ("narrow", {"1", "64"}),
        ("original", {"1", "64"}),
    ):
        steps = part["tiny"][kind]["steps"]
        assert set(steps) == sizes
        for step in steps.values():
            assert 0 < step["ms"]["min"] <= step["ms"]["median"] <= step["ms"]["max"]
            assert step["share_of_limit"] > 0
        assert steps["64"]["to_one"] == pytest.approx(
            steps["64"]["ms"]["median"] / steps["1"]["ms"]["median"], abs=1e-3
        )
        assert steps["64"]["weights_GB"] > steps["1"]["weights_GB"]  # the heads are read too
    assert part["tiny"]["generate"]["tokens_per_second"] > 0
    assert part["tiny"]["plain_to_generate"] > 0
    assert set(part["tiny"]["trained"]["host_loop_ms"]) == {"1", "64"}
    assert set(part["tiny"]["trained"]["step_in_text_ms"]) == {"64"}


def test_every_way_of_attention_is_timed_and_agrees(tmp_path: Path) -> None:
    asked = options(tmp_path)
    assert run_one("attention", asked, 300) == 0
    for nodes in found(asked.out, "attention")["tiny"].values():
        for ways in nodes.values():
            assert set(ways) == {"expanded", "grouped", "matmul", "flex"}
            assert all(way["agrees"] and way["us"]["median"] > 0 for way in ways.values())


def test_a_model_is_measured_from_end_to_end(tmp_path: Path, tiny_model: tuple[str, str]) -> None:
    asked = options(tmp_path, tiny_model)
    assert run_one("model", asked, 300) == 0
    part = found(asked.out, "model")
    for kind in ("greedy", "sampled"):
        for name in ("plain", "heads", "ngram", "union", "auto"):
            assert part[kind][name]["tokens_per_second"] > 0
            assert part[kind][name]["decoder"] == "DeviceStepper"
    assert part["baselines"]["generate_tokens_per_second"] > 0
    assert part["baselines"]["host_loop_union_tokens_per_second"] > 0
    assert part["model"]["heads"]["kind"] == "recurrent"


def test_batches_are_measured_and_float32_texts_are_those_of_plain_decoding(
    tmp_path: Path, tiny_model: tuple[str, str]
) -> None:
    asked = options(tmp_path, tiny_model)
    assert run_one("batches", asked, 300) == 0
    part = found(asked.out, "batches")
    assert set(part["batches"]) == {"1", "2"}
    for of in part["batches"].values():
        assert set(of) == {"plain", "union 16", "union 64", "union auto"}
        assert of["plain"]["to_plain"] == 1.0
    assert all(of["identical"] == of["texts"] for of in part["float32"].values() if isinstance(of, dict))


def test_a_base_of_few_bits_is_measured_by_what_is_installed(
    tmp_path: Path, tiny_model: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch import nn

    from gpu_check import bits

    def rounded(model: nn.Module) -> None:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.data = (module.weight.data * 64).round() / 64

    monkeypatch.setattr(bits, "find_spec", lambda name: None)
    asked = options(tmp_path, tiny_model)
    assert run_one("bits", asked, 300) == 0
    part = found(asked.out, "bits")
    assert set(part) == {"int8"}  # 4 bits want a GPU, the large shape torchao
    assert set(part["int8"]) > {"plain", "union"}
    notes = read(asked.out)["parts"]["bits"]["notes"]
    assert "want torchao, which is not installed" in notes[0]
    assert "int4" in notes[1]
    monkeypatch.setattr(bits, "find_spec", lambda name: object())
    monkeypatch.setattr(bits, "in_eight_bits", rounded)
    assert run_one("bits", asked, 300) == 0
    data = read(asked.out)
    assert set(found(asked.out, "bits")["tiny"]["narrow"]["steps"]) == {"1", "64"}
    lines = table(data | {"machine": {}})
    assert "tiny in 8 bits" in lines
    assert "int8     union" in lines


def test_a_tensor_of_several_is_counted_by_what_it_holds() -> None:
    """As torchao's are, whose own type says bfloat16."""
    import torch
    from torch.testing._internal.two_tensor import TwoTensor

    from gpu_check.shapes import stored_bytes

    parts = torch.zeros(4, 8, dtype=torch.int8), torch.zeros(4, 8, dtype=torch.int8)
    assert stored_bytes(TwoTensor(*parts)) == 64
    assert stored_bytes(torch.zeros(4, 8, dtype=torch.bfloat16)) == 64


def test_a_shape_that_a_card_has_no_room_for_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from gpu_check.shapes import fits

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24 * 10**9, 24 * 10**9))
    part = Part(Report(tmp_path / "report.json"), "times", 10.0)
    assert fits(part, SHAPES["7B"], "7B", "cuda")
    assert not fits(part, SHAPES["13B"], "13B", "cuda")
    assert part.data["notes"] == ["13B does not fit: 26 GB of weights, 24 GB free"]


def test_a_step_is_taken_apart(tmp_path: Path, tiny_model: tuple[str, str]) -> None:
    asked = options(tmp_path, tiny_model)
    assert run_one("profile", asked, 300) == 0
    part = found(asked.out, "profile")
    assert part["64 nodes"]["kernels"] > part["1 nodes"]["kernels"] > 100
    longest = [kernel["us"] for kernel in part["1 nodes"]["longest"]]
    assert longest == sorted(longest, reverse=True)


def test_a_training_is_run_in_small(tmp_path: Path, tiny_model: tuple[str, str]) -> None:
    asked = options(tmp_path, tiny_model)
    assert run_one("training", asked, 300) == 0
    part = found(asked.out, "training")["4 rows"]
    assert part["answer_tokens"] >= 250  # of the 300 written some are held out
    assert part["positions_per_second"] > 0
    assert {"Loading", "Writing text", "Training"} <= set(part["stage_seconds"])


# --- what is computed -------------------------------------------------------------------------------------------------


def test_the_expected_speedup_is_published_acceptance_over_measured_overhead() -> None:
    times = {"7B": {"1": 10.0, "64": 12.5}, "13B": {"1": 10.0}}
    found = expected_speedups(times)
    assert set(found) == {"7B"}  # 13B lacks a time
    row = found["7B"][0]
    assert (row["tokens_per_step"], row["overhead"], row["speedup"]) == (3.47, 1.25, 2.776)
    assert "measured step times" in row["note"]
    assert "published" in row["note"]


def test_the_weights_that_a_step_reads_are_counted_by_hand() -> None:
    import torch

    from medusa.engines.transformers import TransformersBackend

    shape = TINY["tiny"]
    size, vocab = shape.hidden, shape.vocab
    model = random_model(shape, "cpu", torch.bfloat16)
    layer = size * size * 2 + size * shape.head_size * shape.kv_heads * 2 + 3 * size * shape.mlp + 2 * size
    of_model = 2 * (shape.layers * layer + size + vocab * size)
    assert weights_read(model, None, 0) == of_model

    trained = trained_config(shape)
    backend = TransformersBackend(model, feature_layers=trained.feature_layers, self_check=False)
    heads = random_heads(trained, backend, "cpu", torch.bfloat16)
    level = 2 * (3 * size * 2 * size) + 2 * size * size + vocab * size
    assert weights_read(model, heads, 4) == of_model + 2 * (3 * size * size + 4 * level)

    original = original_config(shape)
    backend = TransformersBackend(model, self_check=False)
    heads = random_heads(original, backend, "cpu", torch.bfloat16)
    assert weights_read(model, heads, 4) == of_model + 2 * 4 * (size * size + size + vocab * size)


def test_heads_are_timed_as_medusa_train_makes_them() -> None:
    options, config = HeadsSettings(), trained_config(SHAPES["7B"])
    for name in ("kind", "num_heads", "num_layers", "tie_lm_head"):
        assert getattr(config, name) == getattr(options, name)
    assert (config.draft_vocab, config.mlp_width) == (DEFAULT_DRAFT_VOCAB, 2 * config.hidden_size)
    assert config.feature_layers == feature_layers(options, SHAPES["7B"].layers)


def test_shapes_are_those_of_the_published_models() -> None:
    billions = {name: shape.bytes / 2e9 for name, shape in SHAPES.items()}
    assert {name: round(count, 1) for name, count in billions.items()} == {
        "1B": 1.5,
        "7B": 6.7,
        "13B": 13.0,
        "33B": 32.5,
    }


@pytest.mark.parametrize("nodes", [1, 8, 16, 32, 64])
def test_the_fixed_tree_has_the_nodes_that_are_asked_for(nodes: int) -> None:
    assert len(shipped_tree(nodes)) == nodes


# --- pieces -----------------------------------------------------------------------------------------------------------


def test_pieces_are_joined_in_order_and_their_sum_is_checked(tmp_path: Path) -> None:
    pieces, target = tmp_path / "pieces", tmp_path / "target"
    pieces.mkdir()
    target.mkdir()
    data = [b"one", b"two", b"three"]
    for i, text in enumerate(data):
        (pieces / f"model.gguf.part{i:02d}").write_bytes(text)
    assert join_pieces(pieces, target).read_bytes() == b"onetwothree"
    (pieces / "model.gguf.sha256").write_text(hashlib.sha256(b"onetwothree").hexdigest() + "  model.gguf\n")
    assert join_pieces(pieces, target).name == "model.gguf"
    (pieces / "model.gguf.part01").write_bytes(b"2wo")
    with pytest.raises(MedusaError, match="do not give the sum"):
        join_pieces(pieces, target)
    assert not (target / "model.gguf").exists()


def test_a_missing_piece_is_named(tmp_path: Path) -> None:
    for i in (0, 2):
        (tmp_path / f"a.part{i:02d}").write_bytes(b"x")
    with pytest.raises(MedusaError, match=r"a\.part01 is missing"):
        join_pieces(tmp_path, tmp_path)
    (tmp_path / "b.part00").write_bytes(b"x")
    with pytest.raises(MedusaError, match="pieces of 2 files"):
        join_pieces(tmp_path, tmp_path)


# --- whatever happens -------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from pathlib import Path
from gpu_check.report import Part, Report
part = Part(Report(Path(sys.argv[1])), "times", 60.0)
part.set("7B/steps/1", 6.5)
print("about to hang", flush=True)
time.sleep(600)
"""
DEAD = """
import os, signal, sys
from pathlib import Path
from gpu_check.report import Part, Report
part = Part(Report(Path(sys.argv[1])), "times", 60.0)
part.set("7B/steps/1", 6.5)
os.kill(os.getpid(), signal.SIGSEGV)
"""


@pytest.mark.parametrize(
    ("script", "status", "told"), [(SLOW, "killed", "killed after"), (DEAD, "failed", f"code -{int(signal.SIGSEGV)}")]
)
def test_a_part_that_is_killed_or_dies_leaves_what_it_had(tmp_path: Path, script: str, status: str, told: str) -> None:
    path = tmp_path / "report.json"
    run_process("times", [sys.executable, "-c", script, str(path)], path, 6.0, os.environ)
    part = read(path)["parts"]["times"]
    assert part["status"] == status
    assert part["found"] == {"7B": {"steps": {"1": 6.5}}}
    assert told in part["errors"][0]["message"]
    assert not all_well(read(path))
    if status == "killed":
        assert part["errors"][0]["traceback"] == ["about to hang"]


PARENT = "import subprocess, sys; c = subprocess.Popen(['sleep', '600']); print(c.pid, flush=True); c.wait()"


def test_a_killed_part_takes_its_children_with_it(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    run_process("times", [sys.executable, "-c", PARENT], path, 2.0, os.environ)
    assert_gone(int(path.with_suffix(".log").read_text().split()[-1]))


def test_a_check_that_is_told_to_stop_takes_its_part_with_it(tmp_path: Path) -> None:
    path, log = tmp_path / "report.json", tmp_path / "report.log"
    script = (
        "import os, sys; from pathlib import Path; from gpu_check import __main__ as gpu_check\n"
        "with gpu_check.stopping_with_children():\n"
        " gpu_check.run_process('times', [sys.executable, '-c', sys.argv[2]], Path(sys.argv[1]), 60.0, os.environ)\n"
    )
    check = subprocess.Popen([sys.executable, "-c", script, str(path), PARENT])
    while not (log.is_file() and (log.read_text().split() or [""])[-1].isdigit()):
        assert check.poll() is None
        time.sleep(0.02)
    check.terminate()
    assert check.wait(timeout=20) == 128 + signal.SIGTERM
    assert_gone(int(log.read_text().split()[-1]))


def assert_gone(child: int) -> None:
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.is_file() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("the child still runs")


def test_a_failing_part_is_recorded_and_the_next_one_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report.json"
    _in_this_process(monkeypatch)
    arguments = ["--tiny", "--parts", "model,attention", "--model", str(tmp_path / "nowhere"), "--out", str(out)]
    assert main(arguments) == 1
    parts = read(out)["parts"]
    assert parts["model"]["status"] == "failed"
    assert parts["model"]["errors"][0]["type"] == "MedusaError"
    assert "nowhere" in parts["model"]["errors"][0]["message"]
    assert any("MedusaError" in line for line in parts["model"]["errors"][0]["traceback"])
    assert parts["attention"]["status"] == "done"
    assert "nowhere" in capsys.readouterr().out


def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str, command: list[str], path: Path, seconds: float, env: dict[str, str]) -> None:
        main(command[command.index("--only") :])

    monkeypatch.setattr(gpu_check, "run_process", run)


def test_a_check_leaves_signals_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _in_this_process(monkeypatch)
    before = signal.getsignal(signal.SIGTERM)
    main(["--tiny", "--parts", "training", "--model", "x", "--total", "1", "--out", str(tmp_path / "report.json")])
    assert signal.getsignal(signal.SIGTERM) == before


def test_no_part_is_begun_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _in_this_process(monkeypatch)
    out = tmp_path / "report.json"
    assert main(["--tiny", "--parts", "training", "--model", "x", "--total", "1", "--out", str(out)]) == 0
    assert read(out)["parts"]["training"]["status"] == "cut short"


def test_a_measurement_is_left_out_when_too_little_time_is_left(tmp_path: Path) -> None:
    part = Part(Report(tmp_path / "report.json"), "times", 10.0)
    assert part.measure("a", lambda: 1, needs=20.0) is None
    assert part.measure("b/c", lambda: 2) == 2
    part.end()
    data = read(tmp_path / "report.json")["parts"]["times"]
    assert (data["left_out"], data["found"], data["status"]) == (["a"], {"b": {"c": 2}}, "cut short")


def test_an_error_in_a_measurement_does_not_end_its_part(tmp_path: Path) -> None:
    part = Part(Report(tmp_path / "report.json"), "times", 10.0)
    assert part.measure("a", lambda: 1 / 0) is None
    part.measure("b", lambda: 2)
    part.end()
    data = read(tmp_path / "report.json")["parts"]["times"]
    assert data["errors"][0]["where"] == "a"
    assert data["errors"][0]["type"] == "ZeroDivisionError"
    assert (data["found"], data["status"]) == ({"b": 2}, "failed")


def test_the_report_is_whole_after_every_measurement(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    part = Part(Report(path), "times", 10.0)
    for i in range(3):
        part.measure(f"x/{i}", lambda i=i: i)  # type: ignore[misc]
        assert json.loads(path.read_text())["parts"]["times"]["found"]["x"][str(i)] == i
        assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_the_table_names_the_card_and_is_short(tmp_path: Path) -> None:
    errors = [{"where": "w", "type": "T", "message": "m" * 999, "traceback": []}] * 9
    step = {"ms": {"median": 6.5}, "share_of_limit": 0.9}
    data: dict[str, Any] = {
        "machine": {
            "name": "NVIDIA H100 80GB HBM3",
            "memory_GB": 85.0,
            "driver": "580.1",
            "versions": {"torch": "2.11"},
        },
        "parts": {
            "times": {
                "status": "failed",
                "errors": errors,
                "found": {f"{i}B": {"trained": {"steps": {"1": step}}} for i in range(99)},
            }
        },
    }
    lines = table(data).splitlines()
    assert "NVIDIA H100 80GB HBM3" in lines[0]
    assert "580.1" in lines[0]
    assert "torch 2.11" in lines[0]
    assert len(lines) == LINES
    assert "more: see the report" in lines[-1]
    assert "times: w: T: mmm" in lines[2]
    assert all(len(line) <= 150 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--parts", "times,nonsense"], "unknown part nonsense"),
        (["--limit", "times=soon"], "no limit"),
        (["--limit", "other=3"], "no limit"),
        (["--model", "a", "--pieces", "b"], "either --model or --pieces"),
        (["--pieces", "/nowhere"], "no directory"),
    ],
)
def test_a_bad_argument_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert main(["--tiny", "--out", str(tmp_path / "r.json"), *arguments]) == 2
    assert told in capsys.readouterr().err


def test_a_whole_check_on_a_cpu_must_be_tiny(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--out", str(tmp_path / "r.json")]) == 2
    assert "--tiny" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tiny", "--out", str(tmp_path / "no" / "r.json")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_the_script_runs_parts_in_processes_of_their_own(tmp_path: Path, tiny_model: tuple[str, str]) -> None:
    out = tmp_path / "report.json"
    env = {**os.environ, "PYTHON": sys.executable}
    env.pop("PYTHONPATH", None)
    model, heads = tiny_model
    command = [
        str(SCRIPT),
        "--tiny",
        "--parts",
        "training,attention",
        "--out",
        str(out),
        "--model",
        model,
        "--heads",
        heads,
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read(out)["machine"]["name"] in done.stdout.splitlines()[0]
    assert read(out)["parts"]["attention"]["status"] == "done"
    assert read(out)["machine"]["versions"]["torch"] in done.stdout


def test_the_cache_of_a_model_that_is_timed_grows_no_more(tmp_path: Path, tiny_model: tuple[str, str]) -> None:
    from gpu_check import model as gpu_model

    lm = gpu_model.load(options(tmp_path, tiny_model))
    backend: Any = lm.backend
    before = backend.capacity
    lm.generate("x" * 100, max_new_tokens=150)
    assert backend.capacity == before == backend.max_length + backend.max_nodes


def test_every_drafter_has_said_the_longest_text_before_it_is_timed(
    tmp_path: Path, tiny_model: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_check import model as gpu_model
    from medusa.api import LanguageModel

    asked = options(tmp_path, tiny_model)
    lm = gpu_model.load(asked)
    calls: list[tuple[str, str, int, bool]] = []
    real = LanguageModel.generate

    def watched(self: LanguageModel, prompt: Any, sampling: Any, **settings: Any) -> Any:
        name = settings["stepper"].drafter.name
        calls.append((name, prompt, settings["max_new_tokens"], settings.get("ignore_eos", False)))
        return real(self, prompt, sampling, **settings)

    monkeypatch.setattr(LanguageModel, "generate", watched)
    gpu_model.texts_of(Part(Report(asked.out), "model", 60.0), lm, ["a", "bbb", "cc"], 6, GREEDY)
    assert calls[:4] == [(name, "bbb", 6, True) for name in ("none", "heads", "ngram", "union")]
