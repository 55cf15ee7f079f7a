"""How often trained models, and rules that know no mathematics, prefer the right solution of a held-out pair.

usage: pairs.py PAIRS.jsonl LABELLED.jsonl --base MODEL_DIR [--rm DIR] [--dpo DIR] [--kto DIR] [--result FILE.json]

Computed by transformers, not by the program that trained the models, from their saved folders. Pairs of one question share
solutions and its difficulty, so that standard errors are those of a mean over questions that are drawn independently.

Some authors are right more often than others, so whoever recognizes an author's style is right more often than chance without
reading the solution. Two shares say how much: over all pairs, and balanced, where "a right, b wrong" weighs as much as "b right,
a wrong" for any two authors. A judge that knows nothing but authors has 0.5 there.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any

MODELS = ("rm", "dpo", "kto")
BOX = r"\boxed{"
Solution = tuple[str, str]  # question, solution
Judge = Callable[[Solution], float]  # the higher the better


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A right and a wrong solution of one question, and the authors of the two."""

    right: Solution
    wrong: Solution
    authors: tuple[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out pair accuracy of trained models and of simple rules.")
    parser.add_argument("pairs", type=Path, help="held-out rows of dpo and rm, as data.py writes them")
    parser.add_argument("labelled", type=Path, help="training rows of kto: how often each author is right")
    parser.add_argument("--base", type=Path, required=True, help="what dpo and kto started from, their reference")
    for name in MODELS:
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--result", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    pairs = read(arguments.pairs)
    models = {name: folder for name in MODELS if (folder := getattr(arguments, name))}
    solutions = sorted({solution for pair in pairs for solution in (pair.right, pair.wrong)})
    judges = rules(pairs, authors(arguments.labelled)) | trained(solutions, arguments.base, models)
    weights = balance(pairs)
    found = {name: {"all": share(pairs, judge), "balanced": share(pairs, judge, weights)} for name, judge in judges.items()}
    questions = len({pair.right[0] for pair in pairs})
    print(f"{len(pairs)} held-out pairs of {questions} questions")
    print(f"{'share with the right one preferred':36}{'all pairs':>16}{'balanced':>16}")
    for name, shares in found.items():
        print(f"{name:36}" + "".join(f"{mean:9.3f} ± {error:.3f}" for mean, error in shares.values()))
    if arguments.result:
        arguments.result.write_text(json.dumps({"pairs": len(pairs), "questions": questions, "shares": found}, indent=1) + "\n")


def read(path: Path) -> list[Pair]:
    """The pairs of a file of dpo or rm rows."""
    pairs = []
    with open(path, encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            question, right = (message["content"] for message in row["messages"])
            wrong = row["rejected_response"]
            pairs.append(Pair(right=(question, right), wrong=(question, wrong), authors=tuple(row["by"])))
    return pairs


def authors(path: Path) -> dict[str, float]:
    """How often each author is right."""
    labels: dict[str, list[bool]] = defaultdict(list)
    with open(path, encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            labels[row["by"]].append(row["label"])
    return {author: fmean(found) for author, found in labels.items()}


def rules(pairs: Sequence[Pair], right: dict[str, float]) -> dict[str, Judge]:
    """Judges that do not read; `right`: how often each author is."""
    by = {solution: author for pair in pairs for solution, author in zip((pair.right, pair.wrong), pair.authors)}
    return {
        "the shorter one": lambda solution: -len(solution[1]),
        "the longer one": lambda solution: len(solution[1]),
        "a whole number as its answer": lambda solution: float(is_whole(solution[1])),
        "the author who is right more often": lambda solution: right[by[solution]],
    }


def trained(solutions: Sequence[Solution], base: Path, models: dict[str, Path]) -> dict[str, Judge]:
    """The base model's likelihoods as judges, and each model that is given."""
    before = logprobs(base, solutions)
    judges: dict[str, Judge] = {
        "sft: the likelier one": lambda solution: sum(before[solution]),
        "sft: the likelier one, a token": lambda solution: fmean(before[solution]),
    }
    for name in models:
        judges[name] = scores(models[name], solutions) if name == "rm" else rewards(logprobs(models[name], solutions), before)
    return judges


def balance(pairs: Sequence[Pair]) -> list[float]:
    """The weight of each pair: 1 / pairs of these authors this way round; 0 when there is none the other way round."""
    counts = Counter(pair.authors for pair in pairs)
    return [1 / counts[pair.authors] if counts[pair.authors[::-1]] else 0.0 for pair in pairs]


def share(pairs: Sequence[Pair], judge: Judge, weights: Sequence[float] | None = None) -> tuple[float, float]:
    """The weighted share of pairs whose right solution is judged higher, an equal one counting half, and its standard error.

    That is of a ratio of sums w x and w over Q independent questions: sqrt(Q / (Q - 1) sum_q (sum over q's pairs of w (x -
    share))^2) / sum w (Cameron and Miller 2015, "A practitioner's guide to cluster-robust inference", for a mean).
    """
    weights = weights or [1.0] * len(pairs)
    values = []
    for pair in pairs:
        better, worse = judge(pair.right), judge(pair.wrong)
        values.append(0.5 if better == worse else float(better > worse))
    total = sum(weights)
    mean = sum(weight * value for weight, value in zip(weights, values)) / total
    by_question: dict[str, float] = defaultdict(float)
    for pair, weight, value in zip(pairs, weights, values):
        by_question[pair.right[0]] += weight * (value - mean)
    count = len(by_question)
    spread = sum(deviation**2 for deviation in by_question.values()) * count / (count - 1)
    return mean, math.sqrt(spread) / total


def is_whole(solution: str) -> bool:
    """Whether a solution ends in a whole number; one that ends in none does not."""
    text = solution.rpartition(BOX)[2].rstrip("}").replace(",", "") if BOX in solution else ""
    try:
        return Fraction(text).denominator == 1
    except (ValueError, ZeroDivisionError):
        return False


def rewards(policy: dict[Solution, list[float]], reference: dict[Solution, list[float]]) -> Judge:
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


def scores(folder: Path, solutions: Sequence[Solution]) -> Judge:
    """The reward model's."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        ids = {solution: torch.tensor([encoded(tokenizer, solution)[0]]) for solution in solutions}
        return {solution: model(input_ids=tokens).logits.item() for solution, tokens in ids.items()}.__getitem__


def encoded(tokenizer: Any, solution: Solution) -> tuple[list[int], int]:
    """The tokens of question and solution, and how many of them come before the solution."""
    question, answer = ({"role": role, "content": text} for role, text in zip(("user", "assistant"), solution))
    whole = tokenizer.apply_chat_template([question, answer], return_dict=False)
    asked = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
    assert whole[: len(asked)] == asked, "the chat template puts something else before an answer than before its generation"
    return whole, len(asked)


if __name__ == "__main__":
    main()
