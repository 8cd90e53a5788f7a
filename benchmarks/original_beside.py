"""The original project's own decoding beside ours: the same model, heads, tree and prompts, on this CPU.

    python benchmarks/original_beside.py ORIGINAL --python ENV/bin/python --heads HEADS

ORIGINAL is a checkout of github.com/FasterDecoding/Medusa, of which nothing is copied or changed. HEADS are residual
heads of a Llama-like model, trained here (docs/interop.md). It needs an old transformers, so an environment of its own:

    python3.11 -m venv ENV && ENV/bin/pip install torch==2.13.0 transformers==4.35.2 'numpy<2' accelerate

What runs there is `medusa_forward` of its llm_judge/gen_model_answer_medusa.py, greedily in float32, and for plain
decoding that of gen_model_answer_baseline.py. It was written for CUDA, Vicuna and a tokenizer of that time, so

- fastchat and shortuuid, imported for prompts and for names of answers, are empty stand-ins: prompts are our token ids;
- its tokenizer is one that knows the end of text and nothing else;
- of the five heads that it always builds for checkpoints of v0.1, those that the file does not hold are dropped;
- the model's config.json is written as old versions of transformers read it (`rope_theta`, `torch_dtype`);
- two of its functions are wrapped, to note the time after the prefill and how many guesses each step accepted.

Ours is measured twice: on transformers in float32, as theirs, to compare step by step; and, without --steps-only, as it
is for users, beside plain decoding. The last line is one line of JSON; it ends with 1 if a step accepts another number
of guesses than theirs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

PROMPTS = Path(__file__).with_name("prompts.txt")


# ------------------------------------------------------------------------------------- theirs, in their environment


def stand_in(name: str, **held: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(held, __path__=[])
    sys.modules[name] = module


def script(path: Path) -> Any:
    """One of their scripts as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Watch:
    """Notes when the prefill was over, and how many guesses each step accepted."""

    def __init__(self, module: Any) -> None:
        self.begun, self.accepted = 0.0, [0]
        prefill, choose = module.initialize_medusa, module.evaluate_posterior

        def initialize_medusa(*args: Any, **kwargs: Any) -> Any:
            found = prefill(*args, **kwargs)
            self.begun, self.accepted = time.perf_counter(), []
            return found

        def evaluate_posterior(*args: Any, **kwargs: Any) -> Any:
            best, length = choose(*args, **kwargs)
            self.accepted.append(int(length))
            return best, length

        module.initialize_medusa, module.evaluate_posterior = initialize_medusa, evaluate_posterior


def theirs(job: dict[str, Any]) -> dict[str, Any]:
    """Runs in their environment."""
    import torch
    import transformers

    sys.path.insert(0, job["original"])
    torch.set_num_threads(job["threads"])
    stand_in("shortuuid")
    stand_in("fastchat")
    stand_in("fastchat.llm_judge")
    stand_in("fastchat.llm_judge.common", load_questions=None, temperature_config={})
    stand_in("fastchat.model", load_model=None, get_conversation_template=None)
    import medusa.model.medusa_model as their_model  # the original's

    tokenizer = SimpleNamespace(eos_token_id=job["eos"])
    their_model.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *args, **kwargs: tokenizer)
    model = their_model.MedusaModel.from_pretrained(job["heads"], torch_dtype=torch.float32)
    model.medusa_head, model.medusa = model.medusa_head[: job["num_heads"]], job["num_heads"]
    model.eval()
    judge = Path(job["original"], "llm_judge")
    fast, plain = script(judge / "gen_model_answer_medusa.py"), script(judge / "gen_model_answer_baseline.py")
    watch = Watch(fast)
    answers = []
    with torch.inference_mode():
        for prompt in job["prompts"]:
            ids = torch.tensor([prompt["ids"]])
            rules = (model, tokenizer, job["tree"], 0.0, 0.09, 0.3)
            said, _, _ = fast.medusa_forward(ids, *rules, max_steps=prompt["steps"])
            seconds = time.perf_counter() - watch.begun
            answer = {
                "token_ids": said[0, len(prompt["ids"]) :].tolist(),
                "accepted": watch.accepted,
                "seconds": seconds,
            }
            if job["plain_tokens"]:  # this does not tell the prefill from the rest
                begun = time.perf_counter()
                said, _, _ = plain.medusa_forward(ids, *rules, max_steps=job["plain_tokens"])
                answer["plain_seconds"] = time.perf_counter() - begun
                answer["plain_token_ids"] = said[0, len(prompt["ids"]) :].tolist()
            answers.append(answer)
    return {"transformers": transformers.__version__, "answers": answers}


# ------------------------------------------------------------------------------------------------------------- ours


def old_config(config: dict[str, Any]) -> dict[str, Any]:
    """A model's config.json with the names that transformers 4 knows. Raises ValueError: rotary embeddings that the
    original does not compute."""
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"the original knows no rotary embeddings of the type {rope['rope_type']}")
    return {
        **config,
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        "torch_dtype": config.get("dtype", config.get("torch_dtype")),
    }


def their_directories(room: Path, model: Path, exported: Path) -> Path:
    """The model and the heads as the original loads them; returns the heads. Weights are linked, not copied."""
    base, heads = room / "base", room / "heads"
    base.mkdir()
    heads.mkdir()
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(old_config(config)), encoding="utf-8")
    for weights in [*model.glob("*.safetensors"), *model.glob("*.safetensors.index.json")]:
        (base / weights.name).symlink_to(weights.resolve())
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    (heads / "config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}), encoding="utf-8")
    (heads / "medusa_lm_head.pt").symlink_to((exported / "medusa_lm_head.pt").resolve())
    return heads


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Index of the first that differs, as far as both go."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)


def our_answers(
    lm: Any, prompts: Sequence[str], tokens: int, stepper: Any, *, warm: bool = True
) -> list[dict[str, Any]]:
    if warm:
        list(lm.stream(prompts[0], max_new_tokens=16, stepper=stepper))
    answers = []
    for prompt in prompts:
        chunks = list(lm.stream(prompt, max_new_tokens=tokens, stepper=stepper))
        steps = [chunk.step for chunk in chunks if chunk.step.draft is not None]
        answers.append(
            {
                "prompt": lm.encode(prompt),
                "token_ids": [token for chunk in chunks for token in chunk.token_ids],
                "accepted": [len(step.path) - 1 for step in steps],
                "seconds": chunks[-1].stats.decode_seconds,
            }
        )
    return answers


def speed(answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    tokens, steps = (
        sum(sum(a["accepted"]) + len(a["accepted"]) for a in answers),
        sum(len(a["accepted"]) for a in answers),
    )
    return {"a step": tokens / max(1, steps), "tokens/s": tokens / sum(a["seconds"] for a in answers)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path, help="a checkout of the original project")
    parser.add_argument("--python", type=Path, required=True, help="the interpreter of its environment")
    parser.add_argument("--heads", type=Path, required=True, help="residual heads trained here")
    parser.add_argument("--model", default="smollm2-135m", help="theirs (default %(default)s)")
    parser.add_argument("--tree", default="mc_sim_7b_63", help="of its medusa_choices.py (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer (default %(default)s)")
    parser.add_argument("--count", type=int, default=5, help="prompts (default %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every engine (default %(default)s)")
    parser.add_argument("--steps-only", action="store_true", help="compare steps and texts, and leave out the times")
    options = parser.parse_args()

    from medusa.decoding.tree import Tree
    from medusa.interop.choices import read_choices, with_probabilities

    prompts = [line for line in PROMPTS.read_text(encoding="utf-8").splitlines() if line][: options.count]
    choices = read_choices(options.original / "medusa" / "model" / "medusa_choices.py", options.tree)
    tree = Tree.from_paths(dict(with_probabilities(choices)))
    ours = exact_answers(options, prompts, tree)
    found = their_answers(options, [list(path) for path in choices], ours)
    same_steps, same_texts = [], []
    for mine, other in zip(ours, found["answers"], strict=True):
        # The limit of tokens cuts our last step short, and not theirs.
        same_steps.append(first_difference(mine["accepted"][:-1], other["accepted"]) is None)
        same_texts.append(first_difference(mine["token_ids"], other["token_ids"]) is None)
    rows = {
        f"theirs, {options.tree}": speed(found["answers"]),
        "ours, transformers in float32, the same tree": speed(ours),
    }
    if not options.steps_only:
        tokens = sum(len(answer["plain_token_ids"]) for answer in found["answers"])
        seconds = sum(answer["plain_seconds"] for answer in found["answers"])
        plain = {"a step": 1.0, "tokens/s": tokens / seconds}
        rows |= {"theirs, plain, with the prefill": plain, **for_users(options, prompts, tree)}
    print(f"{options.model}, {len(prompts)} prompts, {options.tokens} tokens, transformers {found['transformers']}")
    for name, row in rows.items():
        print(f"{name:46} {row['a step']:6.3f} a step {row['tokens/s']:8.1f} tokens/s")
    print(f"texts of theirs and ours equal: {sum(same_texts)} of {len(prompts)}; every step too: {sum(same_steps)}")
    print(json.dumps({"same_texts": same_texts, "same_steps": same_steps, "runs": rows}))
    return 0 if all(same_steps) and all(same_texts) else 1


def exact_answers(options: argparse.Namespace, prompts: Sequence[str], tree: Any) -> list[dict[str, Any]]:
    """Ours in their arithmetic: float32 all through."""
    import torch

    from medusa.api import LanguageModel
    from medusa.decoding.heads_drafter import HeadsDrafter
    from medusa.engines.transformers import TransformersBackend
    from medusa.heads.file import load_heads
    from medusa.models import zoo

    torch.set_num_threads(options.threads)
    source = zoo.unpacked(zoo.resolve(options.model))
    backend = TransformersBackend(zoo.load_model(source, dtype=torch.float32), max_length=1024)
    heads = load_heads(options.heads, backend.base_weights(), dtype=torch.float32)
    ends = zoo.load_config(source).eos_token_id
    lm = LanguageModel(
        options.model,
        zoo.load_tokenizer(source),
        backend,
        heads=heads,
        drafter="none",
        eos_token_ids=[ends] if isinstance(ends, int) else ends,
    )
    stepper = lm.make_stepper(HeadsDrafter(heads, tree), nodes=len(tree))
    return our_answers(lm, prompts, options.tokens, stepper, warm=not options.steps_only)


def their_answers(
    options: argparse.Namespace, choices: Sequence[Sequence[int]], ours: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """As many steps of theirs as we took."""
    import medusa
    from medusa.models import zoo

    source = zoo.unpacked(zoo.resolve(options.model))
    with tempfile.TemporaryDirectory() as temporary:
        room = Path(temporary)
        exported = medusa.export_heads(options.heads, "fasterdecoding", room / "export", model=options.model)
        job = {
            "original": str(options.original.resolve()),
            "heads": str(their_directories(room, zoo.local_directory(source), exported.directory)),
            "num_heads": exported.num_heads,
            "tree": choices,
            "threads": options.threads,
            "eos": zoo.load_config(source).eos_token_id,
            "plain_tokens": 0 if options.steps_only else options.tokens,
            "prompts": [{"ids": answer["prompt"], "steps": len(answer["accepted"])} for answer in ours],
        }
        asked, said = room / "job.json", room / "result.json"
        asked.write_text(json.dumps(job), encoding="utf-8")
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        clean |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
        command = [options.python, Path(__file__).resolve(), "--theirs", asked, said]
        subprocess.run(command, env=clean, stdout=sys.stderr, check=True)
        found: dict[str, Any] = json.loads(said.read_text(encoding="utf-8"))
    return found


def for_users(options: argparse.Namespace, prompts: Sequence[str], tree: Any) -> dict[str, dict[str, float]]:
    """Ours on the fastest backend in its number format."""
    import medusa
    from medusa.decoding.heads_drafter import HeadsDrafter

    lm = medusa.load(options.model, heads=str(options.heads), drafter="heads", threads=options.threads)
    static = lm.make_stepper(HeadsDrafter(lm.heads, tree), nodes=len(tree))
    return {
        "ours, plain": speed(our_answers(lm, prompts, options.tokens, lm.make_stepper("none"))),
        "ours, the same tree": speed(our_answers(lm, prompts, options.tokens, static)),
        "ours, the same heads, a tree of our own": speed(our_answers(lm, prompts, options.tokens, lm.stepper)),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--theirs"]:
        asked, said = map(Path, sys.argv[2:])
        said.write_text(json.dumps(theirs(json.loads(asked.read_text(encoding="utf-8")))), encoding="utf-8")
    else:
        sys.exit(main())
