"""configs/gsm8k: rows from files in the published format, the comparison of pairs, and the stages' configs."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

from rlhf.dataset_check import check_dataset
from rlhf.options import load_config
from tests.model_json import TINY, write_model

FOLDER = Path(__file__).parent.parent / "configs" / "gsm8k"
QUESTIONS = 20


def module(name: str):
    """One of the folder's scripts, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"gsm8k_{name}", FOLDER / f"{name}.py")
    loaded = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


data, pairs = module("data"), module("pairs")


def solution(text: str, is_correct: bool) -> dict:
    return {"is_correct": is_correct, "solution": text}


def published(number: int, *solutions: dict) -> dict:
    question, truth = f"What is {number} + 1,000?", f"{number} + 1000 = {number + 1000}\nA: {number + 1000:,}"
    return {"question": question, "ground_truth": truth} | {f"model_{i}": one for i, one in enumerate(solutions)}


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path) -> Path:
    """20 questions: 0 has no right solution, 1 no wrong one, 2 an equal right one, 3 one marked both ways, the others 1 and 2."""
    right, wrong = solution("r\nA: 1", True), [solution(f"w{i}\nA: {i}", False) for i in range(3)]
    rows = [
        published(0, *wrong),
        published(1, right, right | {"solution": "s\nA: 1"}),
        published(2, right, right, *wrong[:2]),
        published(3, right, *wrong, wrong[0] | {"is_correct": True}),
        *(published(number, right, *wrong[:2]) for number in range(4, QUESTIONS)),
    ]
    (tmp_path / "published").mkdir()
    write(tmp_path / "published" / "example_model_solutions.jsonl", rows)
    written = [{"question": f"How many are {n}?", "answer": f"{n} are <<{n}={n}>>{n}.\n#### {n}"} for n in range(5)]
    write(tmp_path / "published" / "train.jsonl", [*written, {"question": rows[7]["question"], "answer": "1\n#### 1"}])
    return tmp_path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def questions(path: Path) -> set[str]:
    return {row["messages"][0]["content"] for row in read(path)}


def test_what_is_left_out_is_counted(folder, capsys):
    counts = data.make_data(folder / "published", folder / "rows", held_out=0.25, seed=3)
    assert counts["questions without a right solution"] == counts["questions without a wrong solution"] == 1
    assert counts["solutions given twice to one question"] == 1
    assert counts["solutions marked both right and wrong, left out"] == 1
    assert counts["of them left out: question among those with models' solutions"] == 1
    assert (counts["training questions"], counts["held-out questions"]) == (15, 5)
    assert counts["training pairs"] + counts["held-out pairs"] == 18 * 2  # question 3: one right with two wrong ones
    assert counts["training labelled solutions"] + counts["held-out labelled solutions"] == 3 + 2 + 3 + 3 + 16 * 3
    assert "     1 questions without a right solution\n" in capsys.readouterr().out
    lines = {path.stem: len(read(path)) for path in (folder / "rows").iterdir()}
    assert (lines["sft"], lines["prompts"], lines["held_out_sft"]) == (5, 15, 5)
    assert (lines["pairs"], lines["held_out_pairs"]) == (counts["training pairs"], counts["held-out pairs"])
    assert lines["labelled"] == counts["training labelled solutions"]


def test_no_question_is_in_both_parts(folder):
    data.make_data(folder / "published", folder / "rows", seed=1)
    rows = folder / "rows"
    trained = set.union(*(questions(rows / f"{name}.jsonl") for name in ("sft", "pairs", "labelled", "prompts")))
    kept = set.union(*(questions(rows / f"held_out_{name}.jsonl") for name in ("sft", "pairs", "labelled", "prompts")))
    assert not trained & kept and len(kept) == 6 and len(trained) == 14 + 5
    assert questions(rows / "held_out_prompts.jsonl") == kept
    assert questions(rows / "pairs.jsonl") <= questions(rows / "labelled.jsonl") <= questions(rows / "prompts.jsonl")


def test_a_pair_is_a_right_and_a_wrong_solution_and_a_label_says_which(folder):
    data.make_data(folder / "published", folder / "rows")
    for prefix in ("", "held_out_"):
        for row in read(folder / "rows" / f"{prefix}pairs.jsonl"):
            assert row["messages"][1] == {"role": "assistant", "content": "r\n\\boxed{1}"}
            wrong, number = row["rejected_response"], int(row["rejected_response"][1])
            first = 2 if "What is 2 " in row["messages"][0]["content"] else 1  # whose solutions are the wrong ones
            assert wrong[0] == "w" and row["by"] == ["model_0", f"model_{first + number}"]
        for row in read(folder / "rows" / f"{prefix}labelled.jsonl"):
            assert row["label"] is (row["messages"][1]["content"][0] in "rs")


def test_answers_become_what_the_accuracy_reward_reads(folder):
    from rewards.accuracy import Accuracy

    data.make_data(folder / "published", folder / "rows")
    answers = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in read(folder / "rows/held_out_sft.jsonl")}
    prompts = read(folder / "rows" / "held_out_prompts.jsonl")
    texts = [answers[row["messages"][0]["content"]] for row in prompts]
    assert all(text.endswith("}") and "\\boxed{1,0" in text for text in texts)
    assert Accuracy()(texts, [row["solution"] for row in prompts]) == [1.0] * len(prompts)
    assert Accuracy()(texts, ["7"] * len(prompts)) == [0.0] * len(prompts)
    assert data.boxed("It ran on and on, A: 3 no") == "It ran on and on, A: 3 no"


def test_a_row_in_another_format_is_named_by_its_line(folder):
    write(folder / "published" / "train.jsonl", [{"question": "q", "answer": "a\n#### 1"}, {"question": "q", "response": "a"}])
    with pytest.raises(ValueError, match=r"train.jsonl, line 2: not a row as published, it lacks 'answer'"):
        data.make_data(folder / "published", folder / "rows")


def pair(question: str, right: int, wrong: int, authors: tuple[str, str] = ("a", "b")):
    """Solutions of so many characters."""
    return pairs.Pair(right=(question, "x" * right), wrong=(question, "y" * wrong), authors=authors)


def length(one: tuple[str, str]) -> float:
    return len(one[1])


def test_the_standard_error_knows_that_pairs_of_a_question_belong_together():
    """Questions with 3, 1 and 1 pairs, of which 3, 0 and a half are right: mean 0.7, sums of deviations 0.9, -0.7, -0.2."""
    found = [*[pair("one", 3, 1)] * 3, pair("two", 1, 2), pair("three", 2, 2)]
    expected = math.sqrt((0.9**2 + 0.7**2 + 0.2**2) * 3 / 2) / 5
    assert pairs.share(found, length) == pytest.approx((0.7, expected))
    alone = [pair(str(i), 1, 2 * (i % 2)) for i in range(10)]  # one a question: that of a mean of halves
    assert pairs.share(alone, length) == pytest.approx((0.5, math.sqrt(0.25 / 9)))


def test_who_knows_only_authors_has_half_of_the_balanced_pairs(tmp_path):
    """b is right three times, a once, against each other; no solution of b is right against a wrong one of c."""
    ways = [("b", "a")] * 3 + [("a", "b"), ("c", "b")]
    found = [pair(str(number), 10 + number, 20 + number, authors) for number, authors in enumerate(ways)]
    labels = [{"by": author, "label": label} for author, label in (("a", True), ("a", False), ("b", True), ("c", False))]
    write(tmp_path / "labelled.jsonl", labels)
    right = pairs.authors(tmp_path / "labelled.jsonl")
    assert right == {"a": 0.5, "b": 1.0, "c": 0.0}
    judge = pairs.rules(found, right)["the author who is right more often"]
    assert pairs.balance(found) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1, 0])
    assert pairs.share(found, judge)[0] == pytest.approx(3 / 5)
    assert pairs.share(found, judge, pairs.balance(found))[0] == pytest.approx(1 / 2)
    reader = lambda one: one[1][0] == "x"  # noqa: E731 who knows which is right
    assert pairs.share(found, reader, pairs.balance(found)) == (1.0, 0.0)


def test_what_ends_in_a_whole_number():
    whole = ["so\n\\boxed{18}", "\\boxed{1,800}", "\\boxed{4/2}", "\\boxed{3.0}"]
    assert all(map(pairs.is_whole, whole))
    assert not any(map(pairs.is_whole, ["\\boxed{2.5}", "\\boxed{1/2}", "\\boxed{x}", "18", "\\boxed{1/0}"]))


def test_a_solution_is_read_digit_by_digit_and_ends_with_its_token(folder):
    from transformers import AutoTokenizer

    data.make_data(folder / "published", folder / "rows")
    module("model").make_model(folder / "model", folder / "rows" / "sft.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids, asked = pairs.encoded(tokenizer, ("How many are 42?", "42 are <<42=42>>42.\n\\boxed{42}"))
    assert tokenizer.decode(ids[:asked]) == "<user>How many are 42?<end><assistant>"
    assert tokenizer.decode(ids[asked:]) == "42 are <<42=42>>42.\n\\boxed{42}<end>" and ids[-1] == tokenizer.eos_token_id
    assert [tokenizer.decode(id) for id in ids].count("4") == 6
    found = pairs.logprobs(folder / "model", [("q", "1 + 1")])
    assert len(found["q", "1 + 1"]) == len(tokenizer("1 + 1<end>").input_ids)


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "kto", "grpo"])
def test_each_stage_has_a_valid_config_and_its_rows(stage, folder, monkeypatch):
    for name in ("NPROC_PER_NODE", "RAY_JOB_CONFIG_JSON_ENV_VAR", "MEGARAY_OUTPUT_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(folder)
    data.make_data(folder / "published", folder / "rows")
    write_model(folder / "sft", TINY)
    score = {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    write_model(folder / "rm" / "checkpoint-80", TINY | score)
    rows = {"rm": "pairs", "dpo": "pairs", "kto": "labelled", "grpo": "prompts"}.get(stage, stage)
    words = ["sft" if stage == "sft" else "rlhf", "--config", str(FOLDER / f"{stage}.yaml"), "--model", "sft"]
    words += ["--dataset", f"rows/{rows}.jsonl"]
    words += ["--reward_model", "rm/checkpoint-80"] if stage == "grpo" else ["--val_dataset", f"rows/held_out_{rows}.jsonl"]
    config = load_config(words)
    check_dataset(config)
    assert config.task == stage and config.nproc_per_node == 2 and config.train_iters < config.save_steps
