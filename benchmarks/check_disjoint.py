"""Checks that training text and benchmark prompts have nothing in common: no 13 words in a row of any benchmark turn.

    python benchmarks/check_disjoint.py TEXT.jsonl QUESTIONS.jsonl

TEXT is what `medusa distill` wrote, or any file of conversations that `medusa train --data` takes; QUESTIONS are lines
with `turns` and perhaps `reference`, like MT-bench's. Words are compared in lower case without punctuation. Ends with 1
if there is anything in common.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

N = 13


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def grams(text: str) -> Iterator[tuple[str, ...]]:
    found = words(text)
    return (tuple(found[i : i + N]) for i in range(len(found) - N + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("questions", type=Path)
    args = parser.parse_args()
    asked: dict[tuple[str, ...], str] = {}
    questions = [json.loads(line) for line in args.questions.open(encoding="utf-8")]
    for question in questions:
        for text in (*question["turns"], *question.get("reference", ())):
            asked |= dict.fromkeys(grams(text), str(question.get("question_id", "")))
    common, rows, compared = 0, 0, 0
    for number, line in enumerate(args.text.open(encoding="utf-8"), start=1):
        rows += 1
        for message in json.loads(line)["messages"]:
            for gram in grams(message["content"]):
                compared += 1
                if gram in asked:
                    common += 1
                    print(f"line {number} shares with question {asked[gram]}: {' '.join(gram)}")
    print(
        json.dumps(
            {
                "rows": rows,
                "compared": compared,
                "questions": len(questions),
                "benchmark_grams": len(asked),
                "common": common,
            }
        )
    )
    sys.exit(common > 0)


if __name__ == "__main__":
    main()
