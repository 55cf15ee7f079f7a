"""The quick look at dataset files: what is refused, with the line and a right row; what is let through."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from rlhf.config import Config
from rlhf.dataset_check import check_dataset, local_file

GOOD = '{"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}], "solution": "2"}'


def check(path: Path | str, text: str | None = None, **options) -> None:
    if text is not None:
        Path(path).write_text(text)
    settings = {"task": "grpo", "reward_funcs": ["accuracy"]} | options
    check_dataset(Config(model="m", dataset=[str(path)], **settings))


def refusal(path: Path | str, text: str | None = None, **options) -> str:
    with pytest.raises(ValueError) as error:
        check(path, text, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "line, expected",
    [
        ('{"messages": [', "not JSON"),
        ("[1, 2]", "a row must be an object, not a list"),
        ('{"solution": "3"}', "neither messages nor a query: its columns are solution"),
        ('{"messages": "hello"}', "`messages` must be a list of messages, not text"),
        ('{"messages": null}', "`messages` must be a list of messages, not null"),
        ('{"messages": []}', "`messages` is an empty list"),
        ('{"messages": ["hello"]}', "message 1 of `messages` must be an object with role and content, not text"),
        ('{"messages": [{"role": "user"}]}', "message 1 of `messages` must have role and content, it has role"),
        ('{"messages": [{"role": "usr", "content": "x"}]}', "unknown role 'usr'"),
        ('{"messages": [{"role": "user", "content": 3}]}', "message 1 of `messages` must be text, not a number"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "`messages` has no user message"),
        ('{"query": ["x"]}', "`query` must be text, not a list"),
        ('{"messages": [{"role": "user", "content": "?"}]}', "needs the column `solution`, this row has messages"),
    ],
)  # fmt: skip
def test_a_bad_row_is_refused_with_its_line_and_a_right_row(tmp_path, line, expected):
    message = refusal(tmp_path / "a.jsonl", f"{GOOD}\n\n{line}\n{GOOD}\n")
    assert expected in message and "a.jsonl, line 3" in message
    assert "not JSON" in message or '{"messages": [{"role": "user"' in message


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "1+1?"}]},
        {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
        {"conversation": [{"human": "1+1?", "assistant": "2"}]},
        {"instruction": "add", "input": "1+1", "output": "2"},
        {"query": "1+1?", "response": "2"},
        {"question": "1+1?", "answer": "2"},
        {"messages": json.dumps([{"role": "user", "content": "1+1?"}])},
    ],
)
def test_the_forms_that_are_mapped_to_messages_pass(tmp_path, row):
    check(tmp_path / "a.jsonl", json.dumps(row | {"solution": "2"}))
    check(tmp_path / "a.jsonl", json.dumps(row), task="sft")


def test_columns_are_only_asked_for_by_the_functions_that_need_them(tmp_path):
    row = '{"messages": [{"role": "user", "content": "1+1?"}]}'
    check(tmp_path / "a.jsonl", row, reward_funcs=["format", "repetition"])
    assert "cosine needs" in refusal(tmp_path / "a.jsonl", row, reward_funcs=["format", "cosine"])


def test_json_arrays_and_csv_are_read(tmp_path):
    check(tmp_path / "a.json", f"[{GOOD}, {GOOD}]")
    check(tmp_path / "b.json", f"{GOOD}\n{GOOD}\n")
    assert "row 2" in refusal(tmp_path / "a.json", f'[{GOOD}, {{"solution": "2"}}]')
    cut = refusal(tmp_path / "a.json", f"[{GOOD},\n{GOOD}")
    assert f"line 2, column {len(GOOD) + 1}: not JSON" in cut
    check(tmp_path / "a.csv", "question,solution\n1+1?,2\n")
    assert "line 3" in refusal(tmp_path / "a.csv", "question,solution\n1+1?,2\n,3\n")


def test_missing_empty_and_unreadable_files_are_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "a.jsonl")
    assert "does not exist" in refusal(str(tmp_path / "a.jsonl") + "#10")
    assert "does not exist" in refusal("data/train.json")
    assert "is empty" in refusal(tmp_path / "a.jsonl", "")
    assert "has no rows" in refusal(tmp_path / "a.jsonl", "\n\n")
    (tmp_path / "b.jsonl").write_bytes(b'{"query": "\xff"}')
    assert "not UTF-8" in refusal(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match="no dataset given"):
        check_dataset(Config(model="m", dataset=[]))


def test_the_number_of_rows_after_the_name(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}\nbad\n")
    assert local_file(f"{path}#7") == (str(path), 7)
    check(f"{path}#2", dataset_shuffle=False)
    assert "line 3" in refusal(f"{path}#2", dataset_shuffle=True)  # any row may be drawn
    assert "not a positive number" in refusal(f"{path}#0")
    assert "not a positive number" in refusal(f"{path}#many")


def test_hub_ids_and_folders_are_left_alone(tmp_path):
    check("openai/gsm8k")
    check("hf::openai/gsm8k:main#500")
    check(tmp_path)


def test_a_hundred_megabytes_take_under_ten_seconds(tmp_path):
    row = json.dumps({"messages": [{"role": "user", "content": "x" * 10_000}], "solution": "2"})
    (tmp_path / "a.jsonl").write_text((row + "\n") * 10_000)
    start = time.monotonic()
    check(tmp_path / "a.jsonl")
    assert time.monotonic() - start < 10
