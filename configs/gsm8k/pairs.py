"""How often trained models, and rules that know no mathematics, prefer the right solution of a held-out pair.

usage: pairs.py PAIRS.jsonl --base MODEL_DIR [--rm DIR] [--dpo DIR] [--kto DIR] [--result FILE.json]

Computed by transformers, not by the program that trained the models, from their saved folders. Pairs of one question share
solutions and its difficulty, so that standard errors are those of a mean over questions that are drawn independently.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

BOX = r"\boxed{"
Solution = tuple[str, str]  # question, solution
Pair = tuple[Solution, Solution]  # right, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out pair accuracy of trained models and of simple rules.")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--base", type=Path, required=True, help="what dpo and kto started from, their reference")
    for name in ("rm", "dpo", "kto"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--result", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    pairs = read(arguments.pairs)
    found = judged(pairs, arguments.base, {name: getattr(arguments, name) for name in ("rm", "dpo", "kto")})
    questions = len({right[0] for right, _ in pairs})
    print(f"{len(pairs)} held-out pairs of {questions} questions")
    print(f"{'prefers the right solution':36}{'share':>8}{'std error':>11}")
    for name, values in found.items():
        print(f"{name:36}{values['accuracy']:8.3f}{values['std_error']:11.3f}")
    if arguments.result:
        arguments.result.write_text(json.dumps({"pairs": len(pairs), "questions": questions, "judges": found}, indent=1) + "\n")


def read(path: Path) -> list[Pair]:
    """The pairs of a file of dpo or rm rows."""
    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    texts = [[message["content"] for message in row["messages"]] + [row["rejected_response"]] for row in rows]
    return [((question, right), (question, wrong)) for question, right, wrong in texts]


def judged(pairs: Sequence[Pair], base: Path, trained: dict[str, Path | None]) -> dict[str, dict[str, float]]:
    """Accuracy and standard error of each rule and each model that is given."""
    solutions = sorted({solution for pair in pairs for solution in pair})
    before = logprobs(base, solutions)
    judges: dict[str, Callable[[Solution], float]] = {
        "the shorter one": lambda solution: -len(solution[1]),
        "the longer one": lambda solution: len(solution[1]),
        "a whole number as its answer": lambda solution: float(is_whole(solution[1])),
        "the likelier one, sft model": lambda solution: sum(before[solution]),
        "the likelier one a token, sft model": lambda solution: sum(before[solution]) / len(before[solution]),
    }
    for name in ("dpo", "kto"):
        if trained.get(name):
            judges[name] = rewards(logprobs(trained[name], solutions), before)
    if trained.get("rm"):
        judges["rm"] = scores(trained["rm"], solutions).__getitem__
    return {name: accuracy(pairs, judge) for name, judge in judges.items()}


def accuracy(pairs: Sequence[Pair], judge: Callable[[Solution], float]) -> dict[str, float]:
    """The share of pairs whose right solution is judged higher, an equal one counting half, and its standard error.

    That is of a ratio of sums over Q independent questions: sqrt(Q / (Q - 1) sum_q (sum of x - mean over q's pairs)^2) / pairs
    (Cameron and Miller 2015, "A practitioner's guide to cluster-robust inference", for a mean).
    """
    values = []
    for right, wrong in pairs:
        better, worse = judge(right), judge(wrong)
        values.append(0.5 if better == worse else float(better > worse))
    mean = sum(values) / len(values)
    by_question: dict[str, float] = defaultdict(float)
    for (right, _), value in zip(pairs, values):
        by_question[right[0]] += value - mean
    count = len(by_question)
    spread = sum(deviation**2 for deviation in by_question.values()) * count / max(count - 1, 1)
    return {"accuracy": mean, "std_error": math.sqrt(spread) / len(values)}


def is_whole(solution: str) -> bool:
    """Whether a solution ends in a whole number; one that ends in none does not."""
    text = solution.rpartition(BOX)[2].rstrip("}").replace(",", "") if BOX in solution else ""
    try:
        return Fraction(text).denominator == 1
    except (ValueError, ZeroDivisionError):
        return False


def rewards(policy: dict[Solution, list[float]], reference: dict[Solution, list[float]]) -> Callable[[Solution], float]:
    """The implicit reward of dpo and kto, without its factor beta."""
    return lambda solution: sum(policy[solution]) - sum(reference[solution])


def logprobs(folder: Path, solutions: Sequence[Solution]) -> dict[Solution, list[float]]:
    """Of each token of each solution, with the one that ends it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    with torch.inference_mode():
        for solution in solutions:
            ids, asked = encoded(tokenizer, solution)
            logits = model(input_ids=torch.tensor([ids])).logits[0, asked - 1 : -1]
            tokens = torch.tensor(ids[asked:])
            found[solution] = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()
    return found


def scores(folder: Path, solutions: Sequence[Solution]) -> dict[Solution, float]:
    """The reward model's."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        ids = {solution: torch.tensor([encoded(tokenizer, solution)[0]]) for solution in solutions}
        return {solution: model(input_ids=tokens).logits.item() for solution, tokens in ids.items()}


def encoded(tokenizer: Any, solution: Solution) -> tuple[list[int], int]:
    """The tokens of question and solution, and how many of them come before the solution."""
    question, answer = ({"role": role, "content": text} for role, text in zip(("user", "assistant"), solution))
    whole = tokenizer.apply_chat_template([question, answer], return_dict=False)
    asked = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
    assert whole[: len(asked)] == asked, "the chat template puts something else before an answer than before its generation"
    return whole, len(asked)


if __name__ == "__main__":
    main()
