"""Steps of Llama models of published shapes with random weights: what verifying N nodes costs on this device.

Weights are made on the device, so that a model of 65 GB stands in seconds. What cannot be told from random weights is
how many guesses come true: for that `expected_speedups` takes published figures, and says so.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import medusa
from gpu_check.report import Options, Part
from gpu_check.timing import device_rates, free_memory, spread, wait
from medusa.decoding.draft import Drafter, NgramDrafter, NoDrafter
from medusa.decoding.heads_drafter import HeadsDrafter
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.sampling import Sampling
from medusa.decoding.stepper import Request
from medusa.decoding.tree import Tree
from medusa.device.stepper import DeviceStepper
from medusa.engines.transformers import TransformersBackend
from medusa.heads.config import HeadsConfig
from medusa.heads.file import read_config
from medusa.heads.module import Heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from medusa.decoding.stepper import Stepper

NODES = (1, 8, 16, 32, 64)
CONTEXT = 512  # tokens before the step
PROMPT, ANSWER = 128, 64  # of transformers' generate
SHIPPED = Path(medusa.__file__).parent / "heads" / "smollm2-135m"
DRAFT_VOCAB = 8192


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def bytes(self) -> int:
        """Of all weights in bfloat16, but for the norms."""
        attention = 2 * self.hidden * (self.hidden + self.kv_heads * self.head_size)
        return 2 * (self.layers * (attention + 3 * self.hidden * self.mlp) + 2 * self.vocab * self.hidden)

    def config(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_size,
            vocab_size=self.vocab,
            max_position_embeddings=2048,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
            tie_word_embeddings=False,
        )


SHAPES = {
    "1B": Shape(16, 2048, 32, 8, 8192, 128256),
    "7B": Shape(32, 4096, 32, 32, 11008, 32000),
    "13B": Shape(40, 5120, 40, 40, 13824, 32000),
    "33B": Shape(60, 6656, 52, 52, 17920, 32000),
}
TINY = {"tiny": Shape(3, 64, 4, 2, 96, 512)}

# Tokens per step on MT-bench as published for Vicuna-7B's heads, and where. None for larger ones is at hand.
PUBLISHED = (
    (3.47, "Medusa-2 on Vicuna-7B, arXiv 2401.10774"),
    (2.31, "Medusa-1 on Vicuna-7B, Spec-Bench"),
)
VICUNAS = ("7B", "13B", "33B")


@contextlib.contextmanager
def building(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Whatever is made inside stands on `device` in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def stir(module: nn.Module, std: float = 0.02) -> None:
    """Random matrices; norms stay as they are."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim >= 2:
            parameter.normal_(std=std)


def random_model(shape: Shape, device: str, dtype: torch.dtype, std: float = 0.02) -> PreTrainedModel:
    """A model of this shape, made where it runs."""
    from transformers import LlamaForCausalLM

    config = shape.config()
    config._attn_implementation = "sdpa"
    with building(device, dtype):
        model: PreTrainedModel = LlamaForCausalLM(config)
    stir(model, std)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.eval()
    return model


def trained_config(shape: Shape) -> HeadsConfig:
    """Heads as `medusa train` makes them where nothing else is asked for (a test says so: to ask its configuration
    would take a library that need not be there)."""
    return HeadsConfig(
        hidden_size=shape.hidden,
        vocab_size=shape.vocab,
        kind="recurrent",
        draft_vocab=0 if shape.vocab <= DRAFT_VOCAB else DRAFT_VOCAB,
        mlp_width=2 * shape.hidden,
        feature_layers=(shape.layers // 3, 2 * shape.layers // 3),
    )


def original_config(shape: Shape) -> HeadsConfig:
    """Heads as the paper's: five, each with an LM head of its own."""
    return HeadsConfig(
        hidden_size=shape.hidden, vocab_size=shape.vocab, kind="residual", num_heads=5, tie_lm_head=False
    )


def narrow_config(shape: Shape) -> HeadsConfig:
    """The same with a block an eighth as wide: that of a large model costs as much as some of its layers."""
    return replace(trained_config(shape), mlp_width=shape.hidden // 4)


def random_heads(config: HeadsConfig, backend: TransformersBackend, device: str, dtype: torch.dtype) -> Heads:
    """Heads for a model with random weights."""
    count = config.draft_vocab
    with building(device, dtype):
        ids = torch.arange(count, device=device) * (config.vocab_size // count) if count else None
        heads = Heads(config, backend.base_weights(), ids).to(device, dtype)
    stir(heads)
    return heads.eval()


def shipped_tree(nodes: int) -> Tree:
    """The `nodes` best nodes of the fixed tree that the default model's heads come with."""
    return Tree.from_paths(dict(read_config(SHIPPED).tree)).best(nodes)


def weights_read(model: PreTrainedModel, heads: Heads | None, depth: int) -> int:
    """Bytes of weights that a step reads: of the model all but its embeddings, of the heads what each of `depth` levels
    computes with."""
    embedding: Any = model.get_input_embeddings()
    lm_head: Any = model.get_output_embeddings()
    size = sum(map(stored_bytes, model.parameters()))
    if lm_head.weight is not embedding.weight:
        size -= embedding.weight.numel() * embedding.weight.element_size()
    if heads is None or depth == 0:
        return size
    width = heads.embedding.element_size()
    config = heads.config
    if config.feature_layers:
        size += heads.project.weight.numel() * width
    if config.kind == "recurrent":
        size += depth * sum(p.numel() for p in heads.block.parameters()) * width
    else:
        size += sum(p.numel() for block in list(heads.blocks)[:depth] for p in block.parameters()) * width
    return size + depth * heads.lm_head_rows * config.hidden_size * width


def stored_bytes(tensor: Any) -> int:
    """What a tensor takes in memory. One that torchao has packed says bfloat16, and holds whole numbers and scales."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(stored_bytes(getattr(tensor, name)) for name in names)
    return int(tensor.numel() * tensor.element_size())


def expected_speedups(times: Mapping[str, Mapping[str, float]]) -> dict[str, list[dict[str, Any]]]:
    """Published tokens per step / (t(64) / t(1)), for the shapes that are there; `times[shape][nodes]` in any unit."""
    speedups: dict[str, list[dict[str, Any]]] = {}
    for name in VICUNAS:
        by_nodes = times.get(name, {})
        if not by_nodes.get("1") or not by_nodes.get("64"):
            continue
        overhead = by_nodes["64"] / by_nodes["1"]
        speedups[name] = [
            {
                "speedup": round(tokens / overhead, 3),
                "overhead": round(overhead, 3),
                "tokens_per_step": tokens,
                "note": f"computed from measured step times and published acceptance ({source})",
            }
            for tokens, source in PUBLISHED
        ]
    return speedups


def capture_facts(stepper: Stepper) -> dict[str, Any]:
    """How many graphs a stepper holds, in what memory, and why it has none where the device refused."""
    if not isinstance(stepper, DeviceStepper):
        return {}
    captured = stepper.captured
    return {"graphs": len(captured), "graphs_MB": round(captured.bytes / 1e6, 1), "refused": captured.refused}


def step_seconds(stepper: DeviceStepper, nodes: int, context: int, repeats: int, rounds: int = 3) -> list[float]:
    """Medians of a step of one text, one for each of `rounds`."""
    return [stepper.time_step(1, nodes, context, repeats) for _ in range(rounds)]


def loop_seconds(stepper: Stepper, context: int, repeats: int, rounds: int = 3) -> list[float]:
    """The same of any stepper, in the middle of a text: with a DeviceStepper, what the host does is counted too."""
    prompt = [(7919 * i + 13) % stepper.backend.vocab_size for i in range(context)]
    longest = stepper.backend.max_length - context - 1
    row, _ = stepper.start(0, Request(prompt, Sampling(), max_new_tokens=longest))
    seconds: list[float] = []
    try:
        stepper.step([row])
        while len(seconds) < rounds * repeats and row.finish_reason is None:
            begun = time.perf_counter()
            stepper.step([row])
            seconds.append(time.perf_counter() - begun)
    finally:
        stepper.finish(row)
    return [statistics.median(seconds[i::rounds]) for i in range(min(rounds, len(seconds)))]


def generate_rate(model: PreTrainedModel, device: str, prompt: int, answer: int) -> dict[str, float]:
    """Tokens a second of transformers' own greedy `generate`, with and without what the prompt takes."""
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), device=device)
    mask = torch.ones_like(ids)

    def run(count: int) -> float:
        wait(device)
        begun = time.perf_counter()
        model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False)  # type: ignore[operator, unused-ignore]
        wait(device)
        return time.perf_counter() - begun

    run(min(4, answer))
    first = min(run(1) for _ in range(2))
    whole = run(answer)
    return {
        "tokens_per_second": round((answer - 1) / max(1e-9, whole - first), 2),
        "with_the_prompt": round(answer / whole, 2),
        "prompt_ms": round(1e3 * first, 2),
    }


def times_part(part: Part, options: Options) -> None:
    """How fast the device is, and the steps of each shape."""
    device = options.device
    rates = part.measure("rates", partial(device_rates, device, options.tiny))
    free_memory(device)
    limit = rates["read_GB_per_second"] * 1e9 if rates else None
    names = list(TINY) if options.tiny else ["7B", "1B", "13B", "33B"]
    for name in names:
        part.measure(name, partial(_shape_times, part, options, name, limit), needs=5.0)
        free_memory(device)
    _record_speedups(part)


def compiled_times(part: Part, options: Options) -> None:
    """Steps with compiled layers, for few sizes, since each takes a while to compile."""
    for name in list(TINY) if options.tiny else ["7B", "1B"]:
        part.measure(name, partial(_compiled_times, part, options, name), needs=20.0)
        free_memory(options.device)


def _shape_times(part: Part, options: Options, name: str, limit: float | None) -> None:
    shape = (TINY if options.tiny else SHAPES)[name]
    device, dtype = options.device, torch.bfloat16
    if not fits(part, shape, name, device):
        return
    begun = time.perf_counter()
    model = random_model(shape, device, dtype)
    wait(device)
    part.set(f"{name}/build_seconds", round(time.perf_counter() - begun, 2))
    prompt, answer = (16, 8) if options.tiny else (PROMPT, ANSWER)
    # Before a backend takes the model: its attention must be transformers' own.
    part.measure(f"{name}/generate", partial(generate_rate, model, device, prompt, answer), needs=3.0)
    _steps(part, options, f"{name}/trained", model, trained_config(shape), limit)
    plain_ms = part.get(f"{name}/trained/steps/1/ms/median")
    generate = part.get(f"{name}/generate/tokens_per_second")
    if plain_ms and generate:
        part.set(f"{name}/plain_to_generate", round(1e3 / plain_ms / generate, 3))
    _record_speedups(part)
    if options.tiny or name == "7B":
        _steps(part, options, f"{name}/narrow", model, narrow_config(shape), limit, (1, 64))
        _steps(part, options, f"{name}/original", model, original_config(shape), limit, (1, 64))


def random_shape_steps(part: Part, options: Options, name: str, pack: Callable[[nn.Module], None]) -> None:
    """Steps of 1 and 64 nodes of a shape whose weights `pack` has made smaller."""
    shape = (TINY if options.tiny else SHAPES)[name]
    if not fits(part, shape, name, options.device):
        return
    limit = device_rates(options.device, options.tiny)["read_GB_per_second"] * 1e9
    free_memory(options.device)
    model = random_model(shape, options.device, torch.bfloat16)
    pack(model)
    free_memory(options.device)
    _steps(part, options, f"{name}/narrow", model, narrow_config(shape), limit, (1, 64))


def fits(part: Part, shape: Shape, name: str, device: str) -> bool:
    """Whether the device has room for the shape in bfloat16, and a tenth more for what decoding takes; noted if not."""
    if not device.startswith("cuda"):
        return True
    free, _ = torch.cuda.mem_get_info(device)
    good = 1.1 * shape.bytes <= free
    if not good:
        part.note(f"{name} does not fit: {shape.bytes / 1e9:.0f} GB of weights, {free / 1e9:.0f} GB free")
    return good


def _effort(options: Options) -> tuple[int, int, int]:
    """Tokens before a step, repeats, rounds."""
    return (24, 2, 2) if options.tiny else (CONTEXT, 20, 3)


def _backend(
    model: PreTrainedModel, config: HeadsConfig, context: int, *, compile: bool = False
) -> TransformersBackend:
    return TransformersBackend(
        model,
        num_slots=1,
        max_length=context + 256,
        feature_layers=config.feature_layers,
        compile=compile,
        self_check=False,
    )


def _steps(
    part: Part,
    options: Options,
    key: str,
    model: PreTrainedModel,
    config: HeadsConfig,
    limit: float | None,
    sizes: Sequence[int] = NODES,
) -> None:
    """Steps of every size with heads of one kind."""
    device = options.device
    context, repeats, rounds = _effort(options)
    backend = _backend(model, config, context)
    heads = random_heads(config, backend, device, torch.bfloat16)

    def measure(nodes: int, drafter: Drafter, tree: Tree | None) -> dict[str, Any]:
        stepper = DeviceStepper(backend, drafter, nodes)
        ms = spread(step_seconds(stepper, nodes, context, repeats, rounds))
        captured = capture_facts(stepper)
        part.expect(not captured["refused"], f"{key}, {nodes} nodes: not captured: {captured['refused']}")
        facts: dict[str, Any] = {"ms": ms, **captured}
        if one_node := part.get(f"{key}/steps/1/ms/median"):
            facts["to_one"] = round(ms["median"] / one_node, 3)
        size = weights_read(model, heads if tree else None, tree.depth if tree else 0)
        facts["weights_GB"] = round(size / 1e9, 4)
        if limit:
            facts["share_of_limit"] = round(size / limit / (ms["median"] / 1e3), 4)
        return facts

    part.measure(f"{key}/steps/1", partial(measure, 1, NoDrafter(), None), needs=1.0)
    for nodes in reversed(sizes[1:]):  # 64 first: it matters most
        tree = shipped_tree(nodes)
        part.measure(f"{key}/steps/{nodes}", partial(measure, nodes, HeadsDrafter(heads, tree), tree), needs=1.0)
    if not key.endswith("/trained"):
        return

    def on_the_host(nodes: int, drafter: Drafter) -> dict[str, float]:
        return spread(loop_seconds(ReferenceStepper(backend, drafter, nodes), context, repeats // 2, 2))

    part.measure(f"{key}/with_ngrams/9", partial(measure, 9, NgramDrafter(), None), needs=1.0)  # its longest chain
    part.measure(f"{key}/host_loop_ms/1", partial(on_the_host, 1, NoDrafter()), needs=3.0)
    drafter = HeadsDrafter(heads, shipped_tree(64))
    whole = DeviceStepper(backend, drafter, 64)
    part.measure(f"{key}/step_in_text_ms/64", lambda: spread(loop_seconds(whole, context, repeats // 2, 2)), needs=2.0)
    part.measure(f"{key}/host_loop_ms/64", partial(on_the_host, 64, drafter), needs=3.0)


def _compiled_times(part: Part, options: Options, name: str) -> None:
    shape = (TINY if options.tiny else SHAPES)[name]
    context, repeats, rounds = _effort(options)
    config = narrow_config(shape)
    model = random_model(shape, options.device, torch.bfloat16)
    backend = _backend(model, config, context, compile=True)
    heads = random_heads(config, backend, options.device, torch.bfloat16)
    for nodes in (1, 64):
        drafter: Drafter = NoDrafter() if nodes == 1 else HeadsDrafter(heads, shipped_tree(nodes))

        def measure(nodes: int = nodes, drafter: Drafter = drafter) -> dict[str, Any]:
            begun = time.perf_counter()
            stepper = DeviceStepper(backend, drafter, nodes)
            step_seconds(stepper, nodes, context, 1, 1)
            first = time.perf_counter() - begun
            ms = spread(step_seconds(stepper, nodes, context, repeats, rounds))
            return {"ms": ms, "first_seconds": round(first, 2)}

        part.measure(f"{name}/steps/{nodes}", measure, needs=10.0)


def _record_speedups(part: Part) -> None:
    times = {}
    for name in SHAPES:
        steps = part.get(f"{name}/trained/steps") or {}
        times[name] = {nodes: step["ms"]["median"] for nodes, step in steps.items()}
    if speedups := expected_speedups(times):
        part.set("expected_speedups", speedups)
