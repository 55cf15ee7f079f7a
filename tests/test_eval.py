"""`megaray eval`: its table and files say what the reward functions say to the responses that it saved."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import fmean, stdev

import command
import pytest
from tiny import make_tiny_model

from rlhf.evaluation import statistics, summary
from rlhf.records import Group, Prompt, Score

PLUGIN = """
def letters(completions, **columns):
    return [len(set(text)) / 10 for text in completions]

def even(completions, solution, **columns):
    return [None if int(row) % 3 == 0 else float(len(text) % 2 == 0) for text, row in zip(completions, solution)]
"""


def test_a_mean_has_the_standard_error_of_the_prompts_means():
    """Means 2, 4 and 9 of the prompts: their standard deviation is sqrt(13), over sqrt(3) prompts."""
    found = statistics([[1.0, 3.0], [4.0, None], [9.0, 9.0]])
    assert found["mean"] == pytest.approx(26 / 5) and found["count"] == 5
    assert found["std_error"] == pytest.approx(math.sqrt(13 / 3))
    assert statistics([[1.0, 2.0]]) == {"mean": 1.5, "std_error": None, "count": 2}
    assert statistics([[None], [None]]) == {"mean": None, "std_error": None, "count": 0}


def test_what_could_not_be_scored_is_counted():
    prompt = Prompt(index=0, token_ids=None, messages=[], columns={})
    group = Group(
        prompt=prompt,
        tokens=None,
        texts=("a", "b"),
        finish_reasons=("stop", "length"),
        response_lengths=(3, 8),
        weight_version=0,
    )
    score = Score(rewards=(1.0, None), by_function={"f": (1.0, None)}, failures={"raised": 1})
    found = summary([(group, score)])
    assert (found["response_length"], found["share_cut"], found["failures"]) == (5.5, 0.5, {"raised": 1})
    assert found["rewards"]["f"] == {"mean": 1.0, "std_error": None, "count": 1}


def test_table_and_files_agree_with_the_functions_on_the_saved_responses(tmp_path: Path):
    model = make_tiny_model(tmp_path / "model", head_dim=32)
    rows = [{"messages": [{"role": "user", "content": f"what is {a}+{a}?"}], "solution": str(a)} for a in range(10)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "plugin.py").write_text(PLUGIN)
    given = {
        "model": model, "dataset": tmp_path / "data.jsonl", "external_plugins": tmp_path / "plugin.py",
        "result_path": tmp_path / "out" / "scores.json", "template_backend": "jinja", "temperature": 2.0,
        "num_generations": 3, "max_new_tokens": 64, "deterministic": "true", "vllm_max_model_len": 256,
        "vllm_enforce_eager": "true", "reward_workers": 1,
    }  # fmt: skip
    arguments = [word for name, value in given.items() for word in (f"--{name}", value)]
    arguments += ["--reward_funcs", "letters", "even", "--reward_weights", 1, 0.5]
    status, output = command.run("eval", *arguments, log=tmp_path / "log")
    assert status == 0, output

    saved = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert [row["prompt_index"] for row in saved] == [place for place in range(10) for _ in range(3)]
    assert [row["solution"] for row in saved] == [str(place) for place in range(10) for _ in range(3)]
    functions: dict = {}
    exec(PLUGIN, functions)
    texts, solutions = [row["response"] for row in saved], [row["solution"] for row in saved]
    assert len(set(texts)) > 15  # sampled, not repeated
    by_hand = {"letters": functions["letters"](texts), "even": functions["even"](texts, solution=solutions)}
    total = [one + 0.5 * (other or 0) for one, other in zip(by_hand["letters"], by_hand["even"])]
    for name, values in by_hand.items():
        assert [row["rewards"][name] for row in saved] == values
    assert [row["reward"] for row in saved] == pytest.approx(total)

    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    for name, values in [*by_hand.items(), ("weighted sum", total)]:
        told = found["reward"] if name == "weighted sum" else found["rewards"][name]
        known = [value for value in values if value is not None]
        groups = [values[place : place + 3] for place in range(0, 30, 3) if None not in values[place : place + 3]]
        means = [fmean(group) for group in groups]
        error = stdev(means) / math.sqrt(len(means))
        assert told == pytest.approx({"mean": fmean(known), "std_error": error, "count": len(known)})
        line = re.search(rf"{name} +([\d.]+) +([\d.]+) +(\d+)", output)
        assert line, output
        assert [float(line[1]), float(line[2]), int(line[3])] == [round(fmean(known), 4), round(error, 4), len(known)]
    assert (found["prompts"], found["responses"], found["temperature"]) == (10, 30, 2.0)
    assert found["response_length"] == pytest.approx(fmean(row["response_length"] for row in saved))
    assert found["share_cut"] == sum(row["finish_reason"] == "length" for row in saved) / 30
    assert 0 < found["share_cut"] < 1
    assert f"30 responses to 10 prompts: {found['response_length']:.1f} tokens on average" in output
