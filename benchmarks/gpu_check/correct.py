"""Whether what is decoded on the device is right: texts that must equal plain decoding, and the step's own tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpu_check.model import NODES as DEFAULT_NODES
from gpu_check.model import PROMPTS, default_model, device_stepper, load
from gpu_check.report import Options, Part
from gpu_check.shapes import Shape, capture_facts, random_heads, random_model, shipped_tree, trained_config
from gpu_check.timing import exact_float32, free_memory
from medusa.decoding.draft import NgramDrafter, NoDrafter, UnionDrafter
from medusa.decoding.heads_drafter import HeadsDrafter
from medusa.decoding.sampling import Sampling
from medusa.decoding.scheduler import decode
from medusa.device.stepper import DeviceStepper
from medusa.engines.transformers import TransformersBackend

if TYPE_CHECKING:
    from medusa.decoding.stepper import Stepper

TESTS = Path(__file__).parents[2] / "tests"
OWN = ("test_device_step.py", "test_device_capture.py", "test_device_talk.py")
RANDOM = Shape(4, 128, 8, 2, 256, 128)  # few tokens, so that it soon says one again
TINY_RANDOM = Shape(3, 64, 4, 2, 96, 64)
TEXTS = 8
NODES = 32


def correctness_part(part: Part, options: Options) -> None:
    exact_float32()
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        texts = part.measure(f"random/{name}", partial(_random_texts, options, dtype), needs=2.0)
        _expect(part, f"a random model in {name}", texts, strict=dtype == torch.float32)
        free_memory(options.device)
    _default_texts(part, options)


def tests_part(part: Part, options: Options) -> None:
    """The step's own tests, file by file, so that what has run is told however it ends."""
    if options.tiny:
        part.note("the step's own tests are left out in a tiny check")
        return
    if missing := [name for name in ("pytest", "hypothesis") if find_spec(name) is None]:
        part.note(f"the step's own tests want {missing[0]}, which is not installed")
        return
    for name in OWN:
        if not (TESTS / name).is_file():
            part.note(f"{name} is not there")
            continue
        tests = part.measure(name, lambda name=name: _own_tests(options, name, part.left), needs=5.0)  # type: ignore[misc]
        part.expect(tests is None or tests["exit"] == 0, f"{name} fails on {options.device}")


def _expect(part: Part, what: str, texts: dict[str, Any] | None, strict: bool) -> None:
    """In float32 every text must be that of plain decoding; in fewer bits the order of a sum may decide a tie."""
    for name, counts in (texts or {}).items():
        good = counts["identical"] == counts["texts"]
        part.expect(not counts.get("refused"), f"{what} with {name}: not captured: {counts.get('refused')}")
        part.expect(good or not strict, f"{what}: only {counts['identical']} of {counts['texts']} texts with {name}")


def _own_tests(options: Options, name: str, seconds: float) -> dict[str, Any]:
    """Exit code and last lines of a file of tests."""
    env = {**os.environ, "MEDUSA_TEST_DEVICE": options.device}
    env["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", str(TESTS / name)]
    try:
        done = subprocess.run(
            command,
            env=env,
            cwd=TESTS.parent,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=max(1.0, seconds),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        printed = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        return {"exit": -1, "passed": None, "last_lines": ["out of time", *printed.splitlines()[-15:]]}
    passed = re.search(r"(\d+) passed", done.stdout)
    return {
        "exit": done.returncode,
        "passed": int(passed.group(1)) if passed else 0,
        "last_lines": done.stdout.splitlines()[-(3 if done.returncode == 0 else 40) :],
    }


def _random_texts(options: Options, dtype: torch.dtype) -> dict[str, Any]:
    """Texts of a small random model, which soon repeats itself, so that drafts are accepted."""
    shape = TINY_RANDOM if options.tiny else RANDOM
    new_tokens = 24 if options.tiny else 96
    torch.manual_seed(0)
    model = random_model(shape, options.device, dtype, std=0.15)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name:
                parameter.mul_(0.2)  # what it says depends mostly on the last token
    config = trained_config(shape)
    backend = TransformersBackend(
        model, num_slots=1, max_length=256, feature_layers=config.feature_layers, self_check=dtype == torch.float32
    )
    heads = random_heads(config, backend, options.device, dtype)
    drafter = HeadsDrafter(heads, shipped_tree(NODES))
    plain = DeviceStepper(backend, NoDrafter(), 1)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, shape.vocab, (9 + i,), generator=generator).tolist() for i in range(TEXTS)]
    steppers = {
        "heads": DeviceStepper(backend, drafter, NODES),
        "union": DeviceStepper(backend, UnionDrafter(drafter, NgramDrafter()), NODES),
    }
    expected = [_text(plain, prompt, new_tokens)[0] for prompt in prompts]
    counts: dict[str, Any] = {}
    for name, stepper in steppers.items():
        texts = [_text(stepper, prompt, new_tokens) for prompt in prompts]
        counts[name] = {
            "texts": len(texts),
            "identical": sum(text == right for (text, _), right in zip(texts, expected, strict=True)),
            "tokens_per_step": round(sum(len(text) - 1 for text, _ in texts) / sum(steps for _, steps in texts), 3),
            "decoder": type(stepper).__name__,
            **capture_facts(stepper),
        }
    return counts


def _text(stepper: Stepper, prompt: list[int], new_tokens: int) -> tuple[list[int], int]:
    """A greedy text, and its steps after the prefill."""
    steps = list(decode(stepper, prompt, Sampling(), max_new_tokens=new_tokens))
    return [token for step in steps for token in step.tokens], max(1, len(steps) - 1)


def _default_texts(part: Part, options: Options) -> None:
    """The same with the real model, where it is at hand."""
    model = part.measure("default/model", partial(default_model, options), needs=10.0)
    if model is None:
        part.note("no model at hand: give --model or --pieces to check its texts")
        return
    for dtype in ("float32", "bfloat16"):
        texts = part.measure(f"default/{dtype}", partial(_real_texts, options, dtype), needs=8.0)
        _expect(part, f"the model in {dtype}", texts, strict=dtype == "float32")
        free_memory(options.device)


def _real_texts(options: Options, dtype: str) -> dict[str, Any]:
    lm = load(options, dtype=dtype)
    new_tokens = 12 if options.tiny else 64
    prompts = PROMPTS[:2] if options.tiny else PROMPTS[:TEXTS]

    def texts(stepper: Stepper) -> list[tuple[int, ...]]:
        return [lm.generate(prompt, max_new_tokens=new_tokens, stepper=stepper).token_ids for prompt in prompts]

    expected = texts(device_stepper(lm, "none", 1))
    counts: dict[str, Any] = {}
    for name in ("heads", "union") if lm.heads is not None else ("union",):
        stepper = device_stepper(lm, name, DEFAULT_NODES)
        same = [text == right for text, right in zip(texts(stepper), expected, strict=True)]
        counts[name] = {"texts": len(same), "identical": sum(same), "decoder": type(stepper).__name__}
    return counts
