"""How the shipped heads of smollm2-135m were made: the model writes its own training text, then heads learn from it.

    python examples/first_heads.py distil --out text.jsonl --tokens 250000     # hours on a laptop; resumable
    python examples/first_heads.py train text.jsonl --out heads                # hidden states, training, tree

The model invents a user's turn after the chat template's user prefix, answers it (two batches of three greedy, one at
temperature 0.7), and the answer is cut where it falls into a loop. Nothing but the model is needed.
"""

from __future__ import annotations

import argparse
import collections
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from medusa.models import zoo
from medusa.models.heads import BaseWeights, Heads, HeadsConfig, save_heads, vocabulary_hash

HELD_OUT = 0.05
LAMBDA = 0.8  # the loss of head k weighs LAMBDA ** k


def until_loop(ids: list[int], window: int = 32, share: float = 0.85) -> list[int]:
    """The text up to where nearly all of its last `window` 4-grams have been seen before."""
    seen: set[tuple[int, ...]] = set()
    repeats: list[bool] = []
    for i in range(3, len(ids)):
        gram = tuple(ids[i - 3 : i + 1])
        repeats.append(gram in seen)
        seen.add(gram)
        if len(repeats) >= window and sum(repeats[-window:]) >= share * window:
            return ids[: i - window + 1]
    return ids


@torch.inference_mode()
def distil(args: argparse.Namespace) -> None:
    source = zoo.resolve(args.model)
    tokenizer = zoo.load_tokenizer(source)
    tokenizer.padding_side = "left"
    model = zoo.load_model(source, dtype=torch.bfloat16)
    eos = tokenizer.eos_token_id
    empty = tokenizer.apply_chat_template([{"role": "user", "content": "\0"}], tokenize=False)
    user_prefix = empty[: empty.index("\0")]
    rows = [json.loads(line) for line in args.out.open()] if args.out.exists() else []
    total = sum(len(row["answer_ids"]) for row in rows)
    batch = max([args.first_batch, *(row["batch"] + 1 for row in rows)])
    seen = {row["user"] for row in rows}
    while total < args.tokens:
        started = time.time()
        torch.manual_seed(batch)
        prefix = tokenizer([user_prefix] * args.batch_size, return_tensors="pt", add_special_tokens=False)
        turns = model.generate(**prefix, max_new_tokens=96, do_sample=True, temperature=1.0, top_p=0.95)
        users = []
        for turn in turns[:, prefix["input_ids"].shape[1] :].tolist():
            text = tokenizer.decode(turn[: turn.index(eos)]).strip() if eos in turn else ""
            if len(text) > 10 and text not in seen:
                seen.add(text)
                users.append(text)
        temperature = (0.0, 0.0, 0.7)[batch % 3]
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature else {}
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
            )
            for user in users
        ]
        prompts = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
        answers = model.generate(**prompts, max_new_tokens=256, **{"do_sample": False, **sampling})
        lines = []
        for user, chat, answer in zip(users, chats, answers[:, prompts["input_ids"].shape[1] :].tolist(), strict=True):
            answer = until_loop(answer[: answer.index(eos) + 1] if eos in answer else answer)
            if len(answer) >= 16:
                total += len(answer)
                row = {
                    "batch": batch,
                    "seed": batch,
                    "temperature": temperature,
                    "user": user,
                    "prompt_ids": tokenizer(chat, add_special_tokens=False)["input_ids"],
                    "answer_ids": answer,
                }
                lines.append(json.dumps(row) + "\n")
        with args.out.open("a") as file:
            file.write("".join(lines))
        print(f"batch {batch}: {len(lines)} answers, {total} tokens, {time.time() - started:.0f} s", flush=True)
        batch += 1


def feature_layers(model: torch.nn.Module) -> tuple[int, int]:
    """A third and two thirds of the way up: layers 10 and 20 of 30."""
    depth = model.config.num_hidden_layers
    return depth // 3, 2 * depth // 3


@torch.inference_mode()
def hidden_states(model: torch.nn.Module, rows: list[dict], num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [T, F*H] of every position whose next 1 + K tokens belong to the answer, and those tokens [T, 1 + K]."""
    features, targets = [], []
    for n, row in enumerate(rows):
        ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
        start, count = len(row["prompt_ids"]) - 1, len(row["answer_ids"]) - num_heads
        if count < 1:
            continue
        states = model.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        wanted = torch.cat([states[i][0] for i in (*feature_layers(model), -1)], dim=-1)
        features.append(wanted[start : start + count].clone())
        targets.append(ids[0, start + 1 :].unfold(0, num_heads + 1, 1)[:count].clone())
        if n % 100 == 0:
            print(f"hidden states of {n}/{len(rows)} answers", flush=True)
    return torch.cat(features), torch.cat(targets)


def draft_labels(heads: Heads, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens [T, K] as ids of the draft vocabulary; -100 for those outside it."""
    table = torch.full((heads.config.vocab_size,), -100)
    table[heads.draft_ids] = torch.arange(len(heads.draft_ids))
    return table[tokens]


@torch.inference_mode()
def ranks(heads: Heads, features: torch.Tensor, targets: torch.Tensor, deepest: int = 64) -> torch.Tensor:
    """Rank of the true token at each level, given the true tokens before it: [T, K], `deepest` where it is lower."""
    found = []
    for x, y in zip(features.split(1024), targets.split(1024), strict=True):
        labels = draft_labels(heads, y[:, 1:])
        per_level = []
        with torch.autocast("cpu", torch.bfloat16):
            logits = heads(x, y[:, :-1])
        for k, level in enumerate(logits):
            level = level.float()
            label = labels[:, k]
            value = level.gather(1, label.clamp_min(0)[:, None])
            rank = (level > value).sum(1).clamp_max(deepest)
            per_level.append(torch.where(label < 0, deepest, rank))
        found.append(torch.stack(per_level, 1))
    return torch.cat(found)


def best_tree(rank_table: torch.Tensor, nodes: int = 64, deepest: int = 64) -> list[tuple[tuple[int, ...], float]]:
    """The rank paths that are right most often, jointly counted, with how often."""
    count: collections.Counter[tuple[int, ...]] = collections.Counter()
    for row in rank_table.tolist():
        for depth in range(1, len(row) + 1):
            if row[depth - 1] >= deepest:
                break
            count[tuple(row[:depth])] += 1
    best = sorted(count.items(), key=lambda item: (-item[1], len(item[0]), item[0]))[: nodes - 1]
    return [(path, round(n / len(rank_table), 5)) for path, n in best]


def train(args: argparse.Namespace) -> None:
    source = zoo.resolve(args.model)
    tokenizer = zoo.load_tokenizer(source)
    model = zoo.load_model(source, dtype=torch.bfloat16)
    rows = [json.loads(line) for path in args.text for line in path.open()]
    held = [row for i, row in enumerate(rows) if i % round(1 / HELD_OUT) == 0]
    kept = [row for i, row in enumerate(rows) if i % round(1 / HELD_OUT)]
    features, targets = hidden_states(model, kept, args.num_heads)
    held_features, held_targets = hidden_states(model, held, args.num_heads)
    print(f"{len(features)} positions to learn from, {len(held_features)} held out", flush=True)

    frequency = torch.bincount(targets.flatten(), minlength=model.config.vocab_size)
    frequency[tokenizer.eos_token_id] += 10**9  # always in the draft vocabulary
    draft_ids = frequency.argsort(descending=True, stable=True)[: args.draft_vocab].sort().values
    config = HeadsConfig(
        hidden_size=model.config.hidden_size,
        vocab_size=model.config.vocab_size,
        kind=args.kind,
        num_heads=args.num_heads,
        draft_vocab=args.draft_vocab,
        mlp_width=args.mlp_width,
        feature_layers=feature_layers(model),
        base_model=source.hub_id or source.name,
        vocab_hash=vocabulary_hash(tokenizer.get_vocab()),
        training={
            "script": "examples/first_heads.py",
            "tokens": int(sum(len(row["answer_ids"]) for row in rows)),
            "epochs": args.epochs,
            "seed": 0,
        },
    )
    torch.manual_seed(0)
    base = BaseWeights(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    heads = Heads(config, base, draft_ids)
    labels = draft_labels(heads, targets[:, 1:])
    weights = LAMBDA ** torch.arange(args.num_heads)
    steps = args.epochs * (len(features) // args.batch_size)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps, pct_start=0.05)
    step, started = 0, time.time()
    for epoch in range(args.epochs):
        for batch in torch.randperm(len(features)).split(args.batch_size):
            if len(batch) < args.batch_size:
                continue
            with torch.autocast("cpu", torch.bfloat16):
                logits = heads(features[batch], targets[batch, :-1])
            losses = torch.stack([F.cross_entropy(level.float(), labels[batch, k]) for k, level in enumerate(logits)])
            (losses * weights).sum().backward()
            torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            if step % 20 == 0:
                shown = " ".join(f"{loss:.2f}" for loss in losses.tolist())
                print(
                    f"epoch {epoch} step {step}/{steps} loss {shown} {time.time() - started:.0f} s",
                    flush=True,
                )
        table = ranks(heads, held_features, held_targets)
        top1 = " ".join(f"{x:.3f}" for x in (table == 0).float().mean(0).tolist())
        tree = best_tree(table)
        expected = {n: round(1 + sum(f for _, f in tree[: n - 1]), 2) for n in (4, 8, 16, 64)}
        print(f"epoch {epoch}: top-1 {top1}; tokens per step by nodes {expected}", flush=True)
        facts = {**config.training, "held_out_top1": top1, "held_out_tokens_per_step": expected}
        object.__setattr__(heads.config, "tree", tuple(tree))
        object.__setattr__(heads.config, "training", facts)
        save_heads(heads, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("distil")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--tokens", type=int, default=250_000)
    one.add_argument("--batch-size", type=int, default=96)
    one.add_argument("--first-batch", type=int, default=0, help="number (and seed) of the first batch")
    one.set_defaults(run=distil)
    two = commands.add_parser("train")
    two.add_argument("text", type=Path, nargs="+")
    two.add_argument("--out", type=Path, required=True)
    two.add_argument("--kind", default="recurrent")
    two.add_argument("--num-heads", type=int, default=4)
    two.add_argument("--mlp-width", type=int, default=1024)
    two.add_argument("--draft-vocab", type=int, default=8192)
    two.add_argument("--epochs", type=int, default=3)
    two.add_argument("--batch-size", type=int, default=512)
    two.add_argument("--learning-rate", type=float, default=1e-3)
    two.set_defaults(run=train)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
