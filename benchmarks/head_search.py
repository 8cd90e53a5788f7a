"""Which heads are the best for their bytes: trains variants on one set of hidden states and prints a table.

    python benchmarks/head_search.py TEXT.jsonl --work DIR            # resumable: each variant is one file in DIR

Every variant sees the same conversations (those of `medusa distill`), in one epoch, with the settings of `medusa train`
except for what its name says. Tokens per step are those of the best fixed tree on held-out conversations; the time of a
step is that of the union drafter's drafting, measured apart (`medusa bench`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import medusa
from medusa.heads.config import HeadsConfig
from medusa.heads.module import Heads
from medusa.settings import OptimiserSettings
from medusa.training.accuracy import Accuracy, ranks
from medusa.training.data import Example
from medusa.training.features import Batch
from medusa.training.stored_features import FeatureCache, FeatureStore
from medusa.training.text import frequent_tokens, split
from medusa.training.trainer import EVALUATION_ROWS, Trainer

LAYERS = (5, 10, 15, 20, 25)  # kept on disk; a variant reads some of them, and the final state
NODES = (4, 8, 16, 64)

BASE = {"kind": "recurrent", "num_heads": 4, "mlp_width": 1024, "draft_vocab": 8192, "layers": (10, 20)}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "residual": {"kind": "residual", "mlp_width": 0, "layers": ()},
    "gated MLP": {"kind": "residual", "mlp_width": 1024, "layers": ()},
    "gated MLP, middle layers": {"kind": "residual", "mlp_width": 1024},
    "sequential": {"kind": "sequential", "mlp_width": 768},
    "no middle layers": {"layers": ()},
    "layers 15, 25": {"layers": (15, 25)},
    "layers 20, 25": {"layers": (20, 25)},
    "layers 5, 10, 15, 20, 25": {"layers": LAYERS},
    "width 1536": {"mlp_width": 1536},
    "width 2048": {"mlp_width": 2048},
    "draft vocabulary 4,096": {"draft_vocab": 4096},
    "draft vocabulary 16,384": {"draft_vocab": 16384},
    "two heads": {"num_heads": 2},
    "six heads": {"num_heads": 6},
    "distillation 1": {"distillation": 1.0},
    "distillation 0.5": {"distillation": 0.5},
    "learning rate 2e-3": {"learning_rate": 2e-3},
    "batch 256": {"batch_size": 256},
    "lambda 1": {"lambda_": 1.0},
}


class Columns:
    """Rows of a cache with the features of some layers only."""

    def __init__(self, cache: FeatureCache, layers: tuple[int, ...], size: int) -> None:
        self.cache, self.num_rows = cache, cache.num_rows
        places = [LAYERS.index(layer) for layer in layers] + [len(LAYERS)]
        self.columns = torch.cat([torch.arange(i * size, (i + 1) * size) for i in places])

    def batches(self, *args: Any, **options: Any) -> Iterator[Batch]:
        return self._cut(self.cache.batches(*args, **options))

    def in_order(self, *args: Any) -> Iterator[Batch]:
        return self._cut(self.cache.in_order(*args))

    def _cut(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        return (replace(batch, features=batch.features[:, self.columns]) for batch in batches)


def run(
    name: str, changes: dict[str, Any], work: Path, lm: Any, learned: list[Example], held_out: list[Example]
) -> dict[str, Any]:
    options = {**BASE, **changes}
    training = OptimiserSettings(
        epochs=1,
        save_every=10**9,
        **{key: options[key] for key in ("distillation", "learning_rate", "batch_size", "lambda_") if key in options},
    )
    base = lm.backend.base_weights()
    vocab, size = base.embedding.shape
    ids = frequent_tokens(learned, vocab, options["draft_vocab"], lm.eos_token_ids)
    torch.manual_seed(0)
    config = HeadsConfig(
        hidden_size=size,
        vocab_size=vocab,
        kind=options["kind"],
        num_heads=options["num_heads"],
        draft_vocab=options["draft_vocab"],
        mlp_width=options["mlp_width"],
        feature_layers=options["layers"],
    )
    heads = Heads(config, base, ids)
    store = FeatureStore(work / "features")
    train = Columns(FeatureCache(store, learned, size), options["layers"], size)
    held = Columns(FeatureCache(store, held_out, size), options["layers"], size)
    started = time.perf_counter()

    def tell(progress: Any) -> None:
        if progress.step % 50 == 0:
            shown = " ".join(f"{loss:.2f}" for loss in progress.losses)
            print(
                f"  {name}: {progress.step}/{progress.steps} {shown} {progress.positions_per_second:.0f}/s", flush=True
            )

    trainer = Trainer(
        heads,
        base.lm_head[ids],
        train,
        held,
        training,
        work / "checkpoints" / name,
        accelerator=Accelerator(cpu=True),
        facts={},
        on_progress=tell,
    )
    trainer.run()
    accuracy = Accuracy.of(ranks(heads, held.in_order(config.num_heads, EVALUATION_ROWS)))
    return {
        "name": name,
        "parameters": heads.num_parameters(),
        "top1": accuracy.top[1],
        "tokens_per_step": {n: round(accuracy.expected_tokens(n), 3) for n in NODES},
        "seconds": round(time.perf_counter() - started),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--conversations", type=int, default=1000)
    parser.add_argument("--only", nargs="*", help="names of variants")
    args = parser.parse_args()
    rows = [json.loads(line) for line, _ in zip(args.text.open(), range(args.conversations), strict=False)]
    examples = [Example(tuple(row["token_ids"]), tuple(map(tuple, row["labels"])), "") for row in rows]
    learned, held_out = split(examples, 0.1)
    lm = medusa.load(args.model, heads="none", drafter="none", dtype="int8", feature_layers=LAYERS, progress=False)
    started = time.perf_counter()
    FeatureStore(args.work / "features", {"layers": LAYERS}).read_missing(lm.backend, examples)
    print(f"hidden states of {len(examples)} conversations, {time.perf_counter() - started:.0f} s", flush=True)
    for name in args.only or VARIANTS:
        path = args.work / f"{name.replace(' ', '-')}.json"
        if not path.exists():
            path.write_text(json.dumps(run(name, VARIANTS[name], args.work, lm, learned, held_out)))
        found = json.loads(path.read_text())
        top1 = " ".join(f"{share:.2f}" for share in found["top1"])
        expected = " ".join(f"{value:.3f}" for value in found["tokens_per_step"].values())
        print(f"{name:26} {found['parameters'] / 1e6:5.1f}M  {top1:30} {expected}  {found['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
