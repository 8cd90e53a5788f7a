"""Makes a draft model for classic speculative decoding, the baseline that needs a second, smaller model.

    python benchmarks/make_draft_model.py TEXT.jsonl --out DIR --tokens 300000

A draft must have the tokenizer of the model that it guesses for, and for SmolLM2-135M no smaller model is published. So
this one is cut out of the model itself: its first `--layers` layers, embeddings, final norm and LM head. Layers and
norm then learn, by cross-entropy on the answers' tokens, from TEXT, which the model wrote itself (`medusa distill`);
embeddings and LM head stay as they are, which saves time. The last 2% of the conversations are not learned from; on
them the draft is measured at the end.

DIR is a model like any other, for `model.generate(assistant_model=draft)`. It appears only when it is complete. How far
the training is goes to stderr; the last line on stdout is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medusa.errors import MedusaError
from medusa.models import zoo
from medusa.models.quiet import quiet
from medusa.training.data import Example, Reader
from medusa.training.features import count_rows
from medusa.training.text import cut

HELD_OUT = 0.02  # of the conversations, the last ones
BATCH_TOKENS = 512  # padding included
POOL = 128  # conversations among which those of similar length go into one batch
WARM_UP = 0.03  # of the training
CHUNK = 512  # rows whose logits are in memory at a time
COMPARED_ROWS = 1000  # of greedy text, where the draft's choice is compared with the full model's
PROGRESS_SECONDS = 10.0


def read_examples(text: str, source: zoo.ModelSource, tokenizer: Any) -> list[Example]:
    """The conversations that have an answer, cut to the model's context."""
    config = zoo.load_config(source).get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or sys.maxsize
    reader = Reader(tokenizer, source.name, config.vocab_size, lambda line: print(line, file=sys.stderr))
    examples = [cut(example, limit) for example in reader.examples([text]) if count_rows(example, limit)]
    if len(examples) < 2:
        raise MedusaError(f"{text} has too few conversations with an answer: one to learn from and one to measure with")
    return examples


def make_draft(source: zoo.ModelSource, layers: int) -> Any:
    """The model without all layers but the first ones, in float32; only what is to learn takes gradients."""
    model: Any = zoo.load_model(source, dtype=torch.float32)
    body: Any = getattr(model, "model", None)
    if not all(hasattr(body, name) for name in ("embed_tokens", "layers", "norm")) or not hasattr(model, "lm_head"):
        raise MedusaError(f"{source.name} is a {model.config.model_type}, which is not built like Llama")
    depth = len(body.layers)
    if layers >= depth:
        raise MedusaError(f"{source.name} has {depth} layers, so a draft model has 1 to {depth - 1}, not {layers}")
    body.layers = body.layers[:layers]
    for name, value in list(vars(model.config).items()):
        if isinstance(value, list) and len(value) == depth:  # such as layer_types: one entry a layer
            setattr(model.config, name, value[:layers])
    model.config.num_hidden_layers = layers
    model.requires_grad_(False)
    for part in (body.layers, body.norm):
        part.requires_grad_(True)
    some = torch.arange(1, 9)[None]
    with torch.no_grad():  # some kin scale or cap their logits, or add a bias; the training below does not
        if not torch.allclose(
            model(some).logits, F.linear(body(some).last_hidden_state, model.lm_head.weight), atol=1e-3
        ):
            raise MedusaError(
                f"{source.name} is a {model.config.model_type}, which changes its logits as Llama does not"
            )
    return model


def batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Conversations of similar length, together at most BATCH_TOKENS with padding, unless one is longer than that."""
    batch: list[Example] = []
    for example in sorted(examples, key=lambda example: len(example.token_ids)):
        if batch and len(example.token_ids) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def endless(examples: Sequence[Example], seed: int) -> Iterator[list[Example]]:
    """Batches in random order, over and over."""
    order = random.Random(seed)
    while True:
        shuffled = order.sample(examples, len(examples))
        for start in range(0, len(shuffled), POOL):
            pool = list(batches(shuffled[start : start + POOL]))
            yield from order.sample(pool, len(pool))


def num_tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.token_ids) for example in examples)


def answer_rows(model: Any, batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """(hidden states, tokens): of each place before an answer's token, what the LM head gets to see and that token.

    Padding is on the right, where causal attention does not see it, so no mask is needed.
    """
    width = max(len(example.token_ids) for example in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    learned = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, example in enumerate(batch):
        ids[row, : len(example.token_ids)] = torch.tensor(example.token_ids)
        for start, end in example.spans:
            learned[row, max(1, start) : end] = True
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(ids, use_cache=False).last_hidden_state
    return hidden[:, :-1][learned[:, 1:]], ids[learned]


def step_loss(model: Any, head: Tensor, batch: Sequence[Example]) -> float:
    """The mean cross-entropy of a batch, and its gradients. `head` is the frozen LM head in bfloat16."""
    hidden, tokens = answer_rows(model, batch)
    leaf = hidden.detach().bfloat16().requires_grad_()
    total = 0.0
    for rows, wanted in zip(leaf.split(CHUNK), tokens.split(CHUNK), strict=True):
        loss = F.cross_entropy(F.linear(rows, head).float(), wanted, reduction="sum") / len(tokens)
        loss.backward()  # of the head only, so that one chunk of logits is in memory
        total += loss.item()
    assert leaf.grad is not None
    hidden.backward(leaf.grad.to(hidden.dtype))
    return total


def train(model: Any, examples: Sequence[Example], args: argparse.Namespace) -> dict[str, Any]:
    """Trains the draft in place, until `--tokens` are read or `--minutes` are over; the schedule goes by either."""
    head = model.lm_head.weight.detach().bfloat16()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    begun = shown = time.perf_counter()
    read, steps, told, done = 0, 0, 0, 0.0
    losses: list[float] = []
    for batch in endless(examples, args.seed):
        rate = min(1.0, (done + 1e-3) / WARM_UP) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        losses.append(step_loss(model, head, batch))
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        read, steps, now = read + num_tokens(batch), steps + 1, time.perf_counter()
        done = max(read / args.tokens, (now - begun) / (60 * args.minutes) if args.minutes else 0.0)
        if now - shown >= PROGRESS_SECONDS or done >= 1:
            shown, recent = now, losses[told:]
            told = steps
            print(
                f"{read}/{args.tokens} tokens, {steps} steps, loss {sum(recent) / len(recent):.3f}, "
                f"{read / (now - begun):.0f} tokens/s, {(now - begun) * max(0.0, 1 / done - 1) / 60:.1f} min left",
                file=sys.stderr,
                flush=True,
            )
        if done >= 1:
            break
    recent = losses[-50:]
    seconds = time.perf_counter() - begun
    return {"tokens": read, "steps": steps, "seconds": round(seconds), "loss": round(sum(recent) / len(recent), 3)}


@torch.no_grad()
def choices(model: Any, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """(the model's most likely token, the text's token) at each place of an answer."""
    head = model.lm_head.weight.bfloat16()
    best, tokens = [], []
    for batch in batches(examples):
        hidden, wanted = answer_rows(model, batch)
        best += [F.linear(rows, head).argmax(-1) for rows in hidden.bfloat16().split(CHUNK)]
        tokens.append(wanted)
    return torch.cat(best), torch.cat(tokens)


def greedy(examples: Sequence[Example], text: Path) -> list[Example]:
    """Conversations with COMPARED_ROWS places to compare, of those that were written without sampling, if that is noted
    in `text`."""
    lines = text.read_bytes().splitlines()
    chosen: list[Example] = []
    for example in examples:
        line = lines[int(example.where.rpartition(" ")[2]) - 1]  # "file, line 12"
        if not json.loads(line.decode("utf-8-sig")).get("temperature"):
            chosen.append(example)
        if sum(count_rows(example, sys.maxsize) for example in chosen) >= COMPARED_ROWS:
            break
    return chosen or list(examples[:1])


def evaluate(draft: Any, source: zoo.ModelSource, held_out: Sequence[Example], text: Path) -> dict[str, Any]:
    """How often the draft's first choice is the text's token, and how often it is the full model's first choice."""
    best, tokens = choices(draft, held_out)
    compared = greedy(held_out, text)
    ours, said = choices(draft, compared)
    theirs, _ = choices(zoo.load_model(source, dtype=torch.float32), compared)
    return {
        "held_out_rows": len(tokens),
        "text_share": round((best == tokens).float().mean().item(), 4),
        "greedy_rows": len(said),
        "greedy_model_share": round((ours == theirs).float().mean().item(), 4),
        "greedy_text_share": round((ours == said).float().mean().item(), 4),
    }


def save(draft: Any, tokenizer: Any, out: Path) -> None:
    """Writes model, tokenizer and generation config beside `out`, then renames: `out` is complete or not there."""
    work = out.with_name(f".{out.name}.writing")
    shutil.rmtree(work, ignore_errors=True)
    try:
        with quiet():
            draft.to(torch.bfloat16).save_pretrained(work)
            draft.generation_config.save_pretrained(work)
            tokenizer.save_pretrained(work)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="what the model wrote, a .jsonl file of `medusa distill`")
    parser.add_argument("--out", type=Path, required=True, help="the draft model's directory; must not exist yet")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=4, help="how many of the model's layers the draft has")
    parser.add_argument("--tokens", type=int, default=300_000, help="how many to read, questions included")
    parser.add_argument("--minutes", type=float, help="train no longer than this")
    parser.add_argument("--lr", type=float, default=2e-3, help="the highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists already: delete it or name another directory")
    if args.text.suffix != ".jsonl":
        parser.error(f"{args.text} is not a .jsonl file")
    if args.layers < 1 or args.tokens < 1 or args.lr <= 0 or (args.minutes is not None and args.minutes <= 0):
        parser.error("--layers, --tokens, --minutes and --lr must be above 0")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        source = zoo.resolve(args.model)
        tokenizer = zoo.load_tokenizer(source)
        examples = read_examples(str(args.text), source, tokenizer)
        draft = make_draft(source, args.layers)
    except (MedusaError, OSError) as error:
        parser.error(str(error))
    held_out = examples[-max(1, round(HELD_OUT * len(examples))) :]
    learned = examples[: -len(held_out)]
    parameters = sum(weight.numel() for weight in draft.parameters())
    print(
        f"{len(learned)} conversations of {num_tokens(learned)} tokens to learn from, {len(held_out)} to measure with; "
        f"{args.layers} layers, {parameters / 1e6:.1f}M parameters",
        file=sys.stderr,
        flush=True,
    )
    trained = train(draft, learned, args)
    measured = evaluate(draft, source, held_out, args.text)
    save(draft, tokenizer, args.out)
    print(
        f"the draft's first choice is the text's token at {measured['text_share']:.1%} of "
        f"{measured['held_out_rows']} places"
    )
    print(
        f"it is the full model's first choice at {measured['greedy_model_share']:.1%} of "
        f"{measured['greedy_rows']} places of greedy text"
    )
    print(json.dumps({"model": args.model, "layers": args.layers, "lr": args.lr, **trained, **measured}))


if __name__ == "__main__":
    main()
