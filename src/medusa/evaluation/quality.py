"""How good sampled texts are, without a reader: perplexity under the model itself, variety, repetition; or a judge."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medusa.engines.protocol import PlainTree
from medusa.errors import MedusaError
from medusa.evaluation.methods import first_prompt

if TYPE_CHECKING:
    from openai import OpenAI
    from torch import Tensor

    from medusa.api import LanguageModel
    from medusa.engines.protocol import Backend
    from medusa.evaluation.questions import Question

JUDGE = (
    "Rate the answer to the request below from 1 (useless) to 10 (excellent), by how helpful, correct, coherent and "
    "well written it is. Reply with the number alone.\n\nRequest:\n{request}\n\nAnswer:\n{answer}"
)


CHUNK = 32  # tokens in a pass: each costs a row of logits


def every_logits(backend: Backend, slot: int, token_ids: Sequence[int]) -> Iterator[Tensor]:
    """Logits [n, V] of each token, some in a pass, as they join the text of a slot that is not empty. `verify` makes
    them, of a tree that is a chain: `extend` makes none but the last. The next pass may overwrite them."""
    for start in range(0, len(token_ids), CHUNK):
        chunk = tuple(token_ids[start : start + CHUNK])
        logits, _ = backend.verify([slot], [PlainTree(chunk, tuple(range(-1, len(chunk) - 1)))])
        yield logits[0]
        backend.keep([slot], [range(len(chunk))])


def nats(backend: Backend, prompt: Sequence[int], answer: Sequence[int], slot: int = 0) -> float:
    """Minus the log-probability of `answer` after `prompt` under the model, at temperature 1, in nats."""
    import torch

    if not answer:
        return 0.0
    total, done = 0.0, 0
    try:
        first, _ = backend.extend(slot, prompt)
        for rows in itertools.chain([first[None]], every_logits(backend, slot, answer[:-1])):
            tokens = torch.tensor(answer[done : done + len(rows)], device=rows.device)
            total -= float(torch.log_softmax(rows.float(), dim=-1).gather(1, tokens[:, None]).sum())
            done += len(rows)
    finally:
        backend.release(slot)
    return total


def distinct(token_ids: Sequence[int], n: int = 2) -> float:
    """Share of the text's n-grams that differ from each other; 1 where nothing is said twice."""
    grams = list(zip(*(token_ids[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(token_ids: Sequence[int], n: int = 4) -> float:
    """Share of tokens that end an n-gram which stood in the text before."""
    seen: set[tuple[int, ...]] = set()
    again = 0
    for end in range(n, len(token_ids) + 1):
        gram = tuple(token_ids[end - n : end])
        again += gram in seen
        seen.add(gram)
    return again / len(token_ids) if token_ids else 0.0


def judge(client: OpenAI, model: str, request: str, answer: str) -> float:
    """A mark from 1 to 10 by another model. NaN where it gives none. Raises MedusaError: it says nothing."""
    messages: Any = [{"role": "user", "content": JUDGE.format(request=request, answer=answer)}]
    reply = client.chat.completions.create(model=model, messages=messages, temperature=0.0, max_tokens=8)
    if not reply.choices:
        raise MedusaError(f"the judge {model} gave no answer")
    number = re.search(r"\d+(?:\.\d+)?", reply.choices[0].message.content or "")
    mark = float(number.group()) if number else math.nan
    return mark if 1 <= mark <= 10 else math.nan


def measure(
    lm: LanguageModel,
    rows: Sequence[dict[str, Any]],
    questions: Mapping[str, Question],
    client: OpenAI | None = None,
    judge_model: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, float]]:
    """By method: perplexity of its first answers (over all their tokens), means of the rest.

    Args:
        rows: of `bench.run_bench`.
        questions: by id.
        client: of a judge, if there is to be one.
        on_progress: called after each question.
    """
    answers: dict[str, list[dict[str, float]]] = {}
    for number, row in enumerate(rows, 1):
        question = questions[row["question_id"]]
        prompt = first_prompt(lm, question)
        for name, answer in row["turns"][0].items():
            ids = answer["token_ids"] or []
            mark = math.nan
            if client is not None and judge_model is not None:
                mark = judge(client, judge_model, question.turns[0], answer["text"])
            measured = {
                "nats": nats(lm.backend, prompt, ids),
                "tokens": len(ids),
                "distinct_2": distinct(ids),
                "repetition": repetition(ids),
                "mark": mark,
            }
            answers.setdefault(name, []).append(measured)
        on_progress(number, len(rows))
    return {name: _means(measured) for name, measured in answers.items()}


def _means(answers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    nats, tokens = (sum(answer[name] for answer in answers) for name in ("nats", "tokens"))
    means = {"perplexity": round(math.exp(nats / max(1, tokens)), 3)}
    for name in ("distinct_2", "repetition", "mark"):
        known = [answer[name] for answer in answers if not math.isnan(answer[name])]
        if known:
            means[name] = round(sum(known) / len(known), 4)
    return means
