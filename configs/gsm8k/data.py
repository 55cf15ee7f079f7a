"""GSM8K's published files as rows for every stage: right and wrong solutions of four models, split by question.

usage: data.py DATA FOLDER [--held_out 0.3] [--seed 0]

DATA is a folder with `example_model_solutions.jsonl` and `train.jsonl`, as `grade_school_math/data` of
https://github.com/openai/grade-school-math has them (MIT license). FOLDER gets

    sft.jsonl                       question and written solution of train.jsonl
    pairs.jsonl                     dpo, rm: a right and a wrong solution of one question; `by`: who wrote the two
    labelled.jsonl                  kto: a solution and whether it is right; `by`: who wrote it
    prompts.jsonl                   grpo: question and answer, the questions of pairs.jsonl and labelled.jsonl
    held_out_*.jsonl                the same of questions that none of those has

A solution's last line, `A: 18` in one file and `#### 18` in the other, becomes `\\boxed{18}`, which the reward function
`accuracy` reads. What is left out is counted.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SOLUTIONS, TRAIN = "example_model_solutions.jsonl", "train.jsonl"
ANSWER_LINE = re.compile(r"\n(?:A:|####)[ ]*(\S[^\n]*?)\s*$")
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description="GSM8K's published files as rows for every stage.")
    parser.add_argument("data", type=Path, help=f"folder with {SOLUTIONS} and {TRAIN}")
    parser.add_argument("folder", type=Path, help="where the rows go")
    parser.add_argument("--held_out", type=float, default=0.3, help="share of the questions that is kept from training")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_data(arguments.data, arguments.folder, held_out=arguments.held_out, seed=arguments.seed)


def make_data(data: Path, folder: Path, *, held_out: float = 0.3, seed: int = 0) -> dict[str, int]:
    """Write all files into `folder` and print what became of the published rows; returns those counts.

    `held_out`: the share of the questions of the solutions' file that is kept from training. Raises ValueError for a row
    that is not in the published format.
    """
    solved, written = _read(data / SOLUTIONS, _solved), _read(data / TRAIN, _written)
    by_question = {row["question"]: row for row in solved}  # a question that comes twice counts once
    training, kept = split(list(by_question), held_out, seed)
    folder.mkdir(parents=True, exist_ok=True)
    fresh = [row for row in written if row["question"] not in by_question]
    counts = Counter({
        "questions with models' solutions": len(by_question),
        "of them given twice": len(solved) - len(by_question),
        "written solutions": len(written),
        "of them left out: question among those with models' solutions": len(written) - len(fresh),
    })  # fmt: skip
    _write(folder / "sft.jsonl", (conversation(row["question"], row["written"]) for row in fresh))
    for prefix, questions in (("", training), ("held_out_", kept)):
        rows = [by_question[question] for question in questions]
        pairs = [pair for row in rows for pair in pairs_of(row, counts)]
        labelled = [one for row in rows for one in labelled_of(row)]
        _write(folder / f"{prefix}pairs.jsonl", pairs)
        _write(folder / f"{prefix}labelled.jsonl", labelled)
        _write(folder / f"{prefix}prompts.jsonl", map(prompt, rows))
        if prefix:
            _write(folder / f"{prefix}sft.jsonl", (conversation(row["question"], row["written"]) for row in rows))
        name = "held-out" if prefix else "training"
        counts[f"{name} questions"], counts[f"{name} pairs"] = len(rows), len(pairs)
        counts[f"{name} labelled solutions"] = len(labelled)
    for name, count in counts.items():
        print(f"{count:6,} {name}")
    return dict(counts)


def split(questions: list[str], held_out: float, seed: int) -> tuple[list[str], list[str]]:
    """Questions to train on, and the `held_out` share of them that is kept; each in random order."""
    shuffled = random.Random(seed).sample(questions, len(questions))
    count = round(held_out * len(questions))
    if not 0 < count < len(questions):
        raise ValueError(f"held_out {held_out} of {len(questions)} questions is {count}: both parts need one")
    return shuffled[count:], shuffled[:count]


def pairs_of(row: Row, counts: Counter[str]) -> list[Row]:
    """Every right solution of a question with every wrong one; equal texts count once. `counts` gets what is left out."""
    right, wrong = distinct(row, True), distinct(row, False)
    counts["solutions given twice to one question"] += len(row["solutions"]) - len(right) - len(wrong)
    both = right.keys() & wrong.keys()
    counts["solutions marked both right and wrong, left out"] += len(both)
    counts["questions without a right solution"] += not right.keys() - both
    counts["questions without a wrong solution"] += not wrong.keys() - both
    return [
        conversation(row["question"], good) | {"rejected_response": bad, "by": [right[good], wrong[bad]]}
        for good in right
        for bad in wrong
        if not both & {good, bad}
    ]


def labelled_of(row: Row) -> list[Row]:
    """Every solution of a question once, with its label; none that is marked both right and wrong."""
    right, wrong = distinct(row, True), distinct(row, False)
    return [
        conversation(row["question"], text) | {"label": label, "by": author}
        for label, ours, others in ((True, right, wrong), (False, wrong, right))
        for text, author in ours.items()
        if text not in others
    ]


def distinct(row: Row, label: bool) -> dict[str, str]:
    """The solutions of a question that are marked so, each with the first model that wrote it."""
    found: dict[str, str] = {}
    for author, text, is_right in row["solutions"]:
        if is_right is label:
            found.setdefault(text, author)
    return found


def prompt(row: Row) -> Row:
    """A question, and its answer as a number."""
    answer = ANSWER_LINE.search(row["ground_truth"])[1].replace(",", "")
    return {"messages": [{"role": "user", "content": row["question"]}], "solution": answer}


def conversation(question: str, solution: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]}


def boxed(solution: str) -> str:
    """The last line `A: 18` or `#### 18` as `\\boxed{18}`; a solution without one, which ran to no end, as it is."""
    return ANSWER_LINE.sub(lambda found: f"\n\\boxed{{{found[1]}}}", solution)


def _solved(row: Row) -> Row:
    truth = row["ground_truth"]
    models = {name: value for name, value in row.items() if isinstance(value, dict)}
    if not models or not ANSWER_LINE.search(truth):
        raise KeyError("solutions by models, and a ground_truth with an answer")
    solutions = [(name, boxed(model["solution"]), bool(model["is_correct"])) for name, model in models.items()]
    return {"question": row["question"], "ground_truth": truth, "written": boxed(truth), "solutions": solutions}


def _written(row: Row) -> Row:
    return {"question": row["question"], "written": boxed(row["answer"])}


def _read(path: Path, read: Any) -> list[Row]:
    with open(path, encoding="utf-8") as lines:
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(read(json.loads(line)))
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a row as published, it lacks {error}") from None
    return rows


def _write(path: Path, rows: Iterable[Row]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
