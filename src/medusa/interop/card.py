"""The model card of an export: what the heads are, their tree, how to run them, what differs from running them here."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from medusa.decoding.tree import Tree
from medusa.heads.config import HeadsConfig
from medusa.interop.choices import CHOICES_FILE, with_probabilities

FILE = "README.md"
MARK = "Written by `medusa export`."
PICTURES = ("tree.svg", "accuracy.svg")
_DRAWN = 16  # nodes of the tree in the text


@dataclass(frozen=True, slots=True)
class Facts:
    """What a card tells."""

    to: str
    base_model: str
    config: HeadsConfig
    lm_heads: str
    shared: bool


def write(facts: Facts, pictures: Sequence[str] = ()) -> str:
    """The text of README.md. `pictures`: files that lie beside it."""
    config = facts.config
    title = facts.base_model or "a model"
    front = ["---", "library_name: medusa", "tags:", "- medusa", "- speculative-decoding"]
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", facts.base_model, re.ASCII):  # a Hub id, not a path
        front.append(f"base_model: {facts.base_model}")
    rows = [
        ("kind", config.kind),
        ("heads", f"{config.num_heads}, for the tokens t+2 to t+{config.num_heads + 1}"),
        ("layers of a head", str(config.num_layers)),
        ("LM heads", facts.lm_heads),
        ("hidden size, vocabulary", f"{config.hidden_size}, {config.vocab_size}"),
        ("tree", _tree(facts) if config.tree else "none"),
    ]
    if config.feature_layers:
        rows.append(("layers read", ", ".join(map(str, config.feature_layers)) + ", and the last hidden state"))
    parts = [
        *front,
        "---",
        "",
        f"# Medusa heads for {title}",
        "",
        "They guess the tokens to come; the model verifies the guesses in one pass, so its greedy text stays the same.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        *_figures(config),
        "## Usage",
        "",
        *_usage(facts),
        "",
        *(line for note in notes(facts) for line in (f"- {note}",)),
        "",
    ]
    if config.tree:
        parts += ["## Tree", "", "```", *draw(config), "```", ""]
    parts += [line for name in pictures for line in (f"![{name.partition('.')[0]}]({name})", "")]
    return "\n".join([*parts, MARK, ""])


def draw(config: HeadsConfig) -> list[str]:
    """The likeliest nodes of the tree, one a line: ranks from 1, and how often the whole path was right."""
    tree = Tree.from_paths(dict(config.tree))
    best = tree.best(_DRAWN + 1)
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(best.parents[1:], start=1):
        children.setdefault(parent, []).append(node)
    # Those of a tree that came without any are made up, see `with_probabilities`.
    measured = dict(config.tree) != dict(with_probabilities(path for path, _ in config.tree))
    lines = ["root"]

    def below(node: int, margin: str) -> None:
        last = children.get(node, [])
        for child in last:
            end = child == last[-1]
            name = f"head {len(best.paths[child])}, guess {best.ranks[child] + 1}"
            share = f": {best.probabilities[child]:.0%}" if measured else ""
            lines.append(f"{margin}{'└' if end else '├'}─ {name}{share}")
            below(child, margin + ("   " if end else "│  "))

    below(0, "")
    if len(best) < len(tree):
        lines.append(f"and {len(tree) - len(best)} less likely ones")
    return lines


def notes(facts: Facts) -> tuple[str, ...]:
    """What differs from running the heads here."""
    config, found = facts.config, []
    serves_vllm = facts.to == "vllm" or (facts.to in ("tgi", "tensorrt-llm") and not facts.shared)
    if serves_vllm:
        found.append("vLLM verifies a chain of the best guess of each head, no tree: fewer tokens a step than here")
    if facts.to not in ("hf", "fasterdecoding") and not facts.shared:
        found.append("one directory for vLLM, TGI and TensorRT-LLM")
    if config.tie_lm_head and not facts.shared and facts.to not in ("hf", "fasterdecoding"):
        found.append(f"the model's LM head is in the file {config.num_heads} times, because the layout wants that")
    if config.weights == "int8" and facts.to != "hf":
        found.append("the heads were kept in 8 bits, and are written in bfloat16")
    return tuple(found)


def _figures(config: HeadsConfig) -> list[str]:
    """How often the guesses were right on held-out text, where training measured it."""
    held_out = config.training.get("held_out")
    if not isinstance(held_out, dict):
        return []
    lines = [f"| {name.replace('_', ' ')} | {_figure(value)} |" for name, value in held_out.items()]
    return ["On held-out text:", "", "| | |", "|---|---|", *lines, ""]


def _figure(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_figure(v)} with {k} nodes" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_figure, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _tree(facts: Facts) -> str:
    where = "config.json" if facts.to == "hf" else CHOICES_FILE
    return f"{len(facts.config.tree)} nodes and the root, in `{where}`"


def _usage(facts: Facts) -> list[str]:
    config, base = facts.config, facts.base_model or "MODEL"
    choices = [list(path) for path, _ in sorted(config.tree, key=lambda item: (len(item[0]), item[0]))]
    spec = {"method": "medusa", "model": "DIR", "num_speculative_tokens": config.num_heads}
    commands = {
        "vllm": f"vllm serve {base} --speculative-config '{json.dumps(spec)}'",
        "tgi": f"text-generation-launcher --model-id DIR --speculate {config.num_heads}",
        "tensorrt-llm": (
            f"python convert_checkpoint.py --model_dir {base} --medusa_model_dir DIR --num_medusa_heads "
            f"{config.num_heads}\n# and when it runs: --medusa_choices "
            + (f'"{json.dumps(choices[:4])[:-1]}, ...]", the whole of {CHOICES_FILE}' if choices else '"[[0], [0, 0]]"')
        ),
        "fasterdecoding": "python -m medusa.inference.cli --model DIR",
        "hf": "model.generate(**inputs, custom_generate=DIR, trust_remote_code=True)  # pip install medusa-decode",
    }
    wanted = [facts.to]
    if facts.to in ("vllm", "tgi", "tensorrt-llm") and not facts.shared:
        wanted = ["vllm", "tgi", "tensorrt-llm"]
    lines = ["DIR is this directory.", "", "```", *(commands[name] for name in wanted), "```"]
    back = f"medusa generate PROMPT --model {base} --heads " + ("DIR" if facts.to == "hf" else "HEADS")
    if facts.to != "hf":
        back = f"medusa import DIR --model {base} --out HEADS\n{back}"
    return [*lines, "", "With Medusa itself:", "", "```", *back.split("\n"), "```"]
