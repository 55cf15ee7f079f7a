"""A demo of each task that trains on rows: a tiny model of sums, held-out rows before and after, nothing downloaded.

usage: tasks.py pt|sft|dpo|kto|rm|seq_cls|reranker|generative_reranker|embedding [--seed 0] [--output_dir runs/demo-tasks]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from task import make_model  # noqa: E402

HELD_OUT = 400  # rows
VARIABLES = {  # of the environment
    "GENERATIVE_RERANKER_POSITIVE_TOKEN": "1",
    "GENERATIVE_RERANKER_NEGATIVE_TOKEN": "0",
    "INFONCE_TEMPERATURE": "0.02",  # sums that differ in one digit are to be far apart
}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=ROWS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo-tasks"))
    arguments = parser.parse_args()
    start, task = time.monotonic(), arguments.task
    work = arguments.output_dir.resolve() / f"{task}-seed{arguments.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    (work / "model").mkdir(parents=True)
    make_model(work / "model", arguments.seed)
    make_data(work, task, arguments.seed)
    word = "pt" if task == "pt" else "rlhf" if task in ("dpo", "kto", "rm") else "sft"
    command = [sys.executable, str(HERE.parent.parent / "rlhf" / "main.py"), word]
    command += ["--config", str(HERE / f"{task}.yaml"), "--model", str(work / "model"), "--seed", str(arguments.seed)]
    command += ["--dataset", str(work / "train.jsonl"), "--val_dataset", str(work / "held_out.jsonl")]
    command += ["--output_dir", str(work), "--run_name", "run"]
    if task == "sft":  # of a file that another demo stops when it has learnt enough
        command += ["--train_iters", "150", "--eval_steps", "50", "--save_steps", "1000"]
    print("$ megaray", *command[2:], flush=True)
    if subprocess.run(command, env=os.environ | VARIABLES).returncode:
        sys.exit(f"{task} failed: see above")
    first, *_, last = [json.loads(line) for line in open(work / "run" / "evaluations.jsonl")]
    name = METRIC.get(task, "accuracy")
    print(
        f"demo {task}: held-out {name} {first[name]:.2f} -> {last[name]:.2f} after {last['step']} steps, "
        f"{time.monotonic() - start:.0f} s, report {work / 'run' / 'report.html'}"
    )


def make_data(folder: Path, task: str, seed: int) -> None:
    """train.jsonl and held_out.jsonl, of different pairs of two-digit numbers."""
    numbers = range(10, 100)
    pairs = [(a, b) for a in numbers for b in numbers if a != b]
    rng = random.Random(seed)
    rng.shuffle(pairs)
    unordered: set[frozenset[int]] = {frozenset(pair) for pair in pairs[:HELD_OUT]}
    _write(folder / "held_out.jsonl", (ROWS[task](a, b, rng) for a, b in map(sorted, unordered)))
    _write(folder / "train.jsonl", (ROWS[task](a, b, rng) for a, b in pairs if frozenset((a, b)) not in unordered))


def text(a: int, b: int, rng: random.Random) -> Row:
    """A sum and its result, as plain text."""
    return {"messages": [answer(f"{a}+{b}={a + b}")]}


def addition(a: int, b: int, rng: random.Random) -> Row:
    """A sum, and its result as the answer."""
    return {"messages": [{"role": "user", "content": f"{a}+{b}="}, answer(a + b)]}


def judgement(a: int, b: int, rng: random.Random) -> Row:
    """The larger number as a good answer, or the smaller one as a bad one."""
    good = rng.random() < 0.5
    return {"messages": [*question(a, b, rng), answer(max(a, b) if good else min(a, b))], "label": good}


def preference(a: int, b: int, rng: random.Random) -> Row:
    """The larger number is the better answer."""
    return {"messages": [*question(a, b, rng), answer(max(a, b))], "rejected_response": str(min(a, b))}


def comparison(a: int, b: int, rng: random.Random) -> Row:
    """Class 1: the first number is the larger one."""
    a, b = rng.sample((a, b), 2)
    return {"messages": [{"role": "user", "content": f"{a}+{b}="}], "label": int(a > b)}


def ranking(a: int, b: int, rng: random.Random) -> Row:
    """The first number of the query is the relevant document, the others are three numbers that it does not name."""
    others = rng.sample([number for number in range(10, 100) if number not in (a, b)], 3)
    return {
        "messages": [{"role": "user", "content": f"{a}+{b}="}],
        "positive_messages": [[answer(a)]],
        "negative_messages": [[answer(number)] for number in others],
    }


def likeness(a: int, b: int, rng: random.Random) -> Row:
    """A sum and the same sum the other way round."""
    a, b = rng.sample((a, b), 2)
    return {
        "messages": [{"role": "user", "content": f"{a}+{b}="}],
        "positive_messages": [[{"role": "user", "content": f"{b}+{a}="}]],
    }


def question(a: int, b: int, rng: random.Random) -> list[Row]:
    a, b = rng.sample((a, b), 2)
    return [{"role": "user", "content": f"{a}+{b}="}]


def answer(content: int | str) -> Row:
    return {"role": "assistant", "content": str(content)}


ROWS: dict[str, Callable[[int, int, random.Random], Row]] = {
    "pt": text,
    "sft": addition,
    "dpo": preference,
    "kto": judgement,
    "rm": preference,
    "seq_cls": comparison,
    "reranker": ranking,
    "generative_reranker": ranking,
    "embedding": likeness,
}
METRIC = {"pt": "loss", "sft": "loss", "embedding": "recall@1", **dict.fromkeys(("dpo", "kto", "rm"), "rewards/accuracies")}


def _write(path: Path, rows: Iterable[Row]) -> None:
    with open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
