"""Rows without a column that their task needs: refused before anything starts, with the task, the line and a right row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.config import Config
from rlhf.dataset_check import check_dataset

ASKED = {"messages": [{"role": "user", "content": "?"}]}
ANSWERED = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
TEXTS = [[{"role": "user", "content": "!"}]]


def refusal(folder: Path, rows: list[dict], **options) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError) as error:
        check_dataset(Config(model="m", dataset=[str(path)], **options))
    return str(error.value)


@pytest.mark.parametrize(
    "options, right, wrong, expected",
    [
        ({"task": "dpo"}, {**ANSWERED, "rejected_response": "x"}, ANSWERED, "dpo needs the column `rejected_response` or"),
        ({"task": "rm"}, {**ANSWERED, "rejected_messages": TEXTS[0]}, ANSWERED, "rm needs the column `rejected_response` or"),
        ({"task": "dpo"}, {**ANSWERED, "rejected_response": "x"}, {**ASKED, "rejected_response": "x"}, "dpo needs an answer"),
        ({"task": "kto"}, {**ANSWERED, "label": False}, ANSWERED, "kto needs the column `label`, this row has messages"),
        ({"task": "seq_cls"}, {**ASKED, "label": 0}, {**ASKED, "Label": None}, "seq_cls needs the column `label`"),
        ({"task": "embedding"}, {**ASKED, "positive_messages": TEXTS}, ASKED, "embedding needs the column `positive_messages`"),
        (
            {"task": "embedding", "loss_type": "contrastive"},
            {**ASKED, "positive_messages": TEXTS, "label": 0},
            {**ASKED, "positive_messages": TEXTS},
            "embedding needs the column `label`",
        ),
        (
            {"task": "reranker"},
            {**ASKED, "positive_messages": TEXTS, "negative_messages": TEXTS},
            {**ASKED, "positive_messages": TEXTS, "negative_messages": []},
            "reranker needs the column `negative_messages`",
        ),
        ({"task": "sft"}, ANSWERED, {"label": 1}, "neither messages nor a query"),
        ({"task": "pt"}, {"text": "abc"}, {"label": 1}, "neither messages nor a query"),
    ],
)
def test_a_row_without_a_needed_column_is_refused_with_its_line_and_a_right_row(tmp_path, options, right, wrong, expected):
    message = refusal(tmp_path, [right, wrong], **options)
    assert expected in message and "rows.jsonl, line 2" in message and "\n" not in message
    example = json.loads(message.split("a right row: ")[1])
    path = tmp_path / "right.jsonl"
    path.write_text(json.dumps(example))
    check_dataset(Config(model="m", dataset=[str(path)], **options))


def test_held_out_rows_are_looked_at_too(tmp_path):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text(json.dumps({**ANSWERED, "label": True}))
    bad.write_text(json.dumps(ANSWERED))
    with pytest.raises(ValueError, match="bad.jsonl, line 1: kto needs"):
        check_dataset(Config(model="m", task="kto", dataset=[str(good)], val_dataset=[str(bad)]))
