"""Rows for heads and embeddings: token ids as ms-swift's own template encodes whole rows, and what each loss gets beside them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from actors.head_rows import class_targets, head_rows
from tests.test_data import dataset_cache, model, started, write  # noqa: F401

QUERY = [{"role": "system", "content": "be short"}, {"role": "user", "content": "what is 1+2?"}]
ROWS = {
    "rm": {
        "messages": [*QUERY, {"role": "assistant", "content": "3"}],
        "rejected_response": "the answer is 4",
        "margin": 0.5,
    },
    "seq_cls": {"messages": QUERY, "label": 2},
    "embedding": {
        "messages": QUERY,
        "positive_messages": [[{"role": "user", "content": "3"}]],
        "negative_messages": [[{"role": "user", "content": "4"}], [{"role": "user", "content": "the answer"}]],
    },
    "reranker": {
        "messages": QUERY,
        "positive_messages": [[{"role": "assistant", "content": "3"}]],
        "negative_messages": [[{"role": "assistant", "content": "4"}], [{"role": "assistant", "content": "the answer"}]],
    },
}
TARGETS = {
    "rm": [(0.5,), (0.5,)],
    "seq_cls": [(2.0,)],
    "embedding": [(1.0, 1.0)] + [(0.0, 1.0)] * 3,
    "reranker": [(1.0,), (0.0,), (0.0,)],
}
OPTIONS = {
    "seq_cls": {"num_labels": 3, "problem_type": "single_label_classification"},
    "embedding": {"loss_type": "infonce"},
    "rm": {"loss_scale": "last_round"},
}


def swift_ids(model: Path, task: str) -> list[list[int]]:  # noqa: F811
    from swift.model import get_processor
    from swift.template import get_template

    kinds = {"rm": ("seq_cls", 1), "seq_cls": ("seq_cls", 3)}
    kind, labels = kinds.get(task, (task, None))
    processor = get_processor(str(model), model_type="qwen3", task_type=kind, num_labels=labels, download_model=False)
    scale = OPTIONS.get(task, {}).get("loss_scale", "default")
    template = get_template(processor, None, None, template_type="chatml", loss_scale=scale)
    template.set_mode("rlhf" if task == "rm" else "train")
    template.config = SimpleNamespace(problem_type="single_label_classification")
    found = template.encode(ROWS[task])
    if task == "embedding":
        return [found["anchor_input_ids"], found["positive_input_ids"], *found["negative_input_ids"]]
    if task == "rm":
        return [found["chosen_input_ids"], found["rejected_input_ids"]]
    return found["input_ids"] if task == "reranker" else [found["input_ids"]]


@pytest.mark.parametrize("task", ROWS)
def test_texts_are_encoded_as_ms_swift_encodes_the_row(model, tmp_path, task):  # noqa: F811
    options = {"task": task, "template_backend": "swift", "template": "chatml"} | OPTIONS.get(task, {})
    worker, _ = started(model, [write(tmp_path / "a.jsonl", [ROWS[task]])], **options)
    tokens, summary = worker.rows(0, 1)
    assert [ids.tolist() for ids in tokens.token_ids] == swift_ids(model, task)
    assert summary.targets == TARGETS[task] and summary.units == [[list(range(len(TARGETS[task])))]]


def test_the_tokenizers_own_chat_template_ends_a_question_where_the_answer_begins(model, tmp_path):  # noqa: F811
    worker, _ = started(model, [write(tmp_path / "a.jsonl", [ROWS["reranker"]])], task="reranker")
    tokens, _ = worker.rows(0, 1)
    decoded = started(model, [write(tmp_path / "b.jsonl", [ROWS["embedding"]])], task="embedding", loss_type="infonce")[0]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    question = "<|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\nwhat is 1+2?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokens.token_ids[0]) == question + "3<|im_end|>\n"
    assert tokenizer.decode(decoded.rows(0, 1)[0].token_ids[0]) == question


def test_rows_that_cannot_be_used_are_left_out_and_counted(model, tmp_path):  # noqa: F811
    def row(label, text="x"):
        return {"messages": [{"role": "user", "content": text}], "label": label}

    rows = [row(0), row(2), row(3), row(-1), row(1, " ")]
    _, info = started(model, [write(tmp_path / "a.jsonl", rows)], task="seq_cls", **OPTIONS["seq_cls"])
    assert info.num_rows == 2 and info.dropped == {"with a label out of range": 2, "with an empty text": 1}
    with pytest.raises(ValueError, match="no row of .* is left: of 1, 1 with a label out of range"):
        started(model, [write(tmp_path / "b.jsonl", [row(7)])], task="seq_cls", **OPTIONS["seq_cls"])


@pytest.mark.parametrize(
    "label, kind, labels, expected",
    [
        (1, "single_label_classification", 3, (1.0,)),
        ([1], "single_label_classification", 3, "with a label of the wrong kind"),
        (1.5, "single_label_classification", 3, "with a label of the wrong kind"),
        (3, "single_label_classification", 3, "with a label out of range"),
        ("1", "single_label_classification", 3, "with a label of the wrong kind"),
        ([0, 2], "multi_label_classification", 3, (1.0, 0.0, 1.0)),
        ([], "multi_label_classification", 2, (0.0, 0.0)),
        ([0, 3], "multi_label_classification", 3, "with a label out of range"),
        (0.25, "regression", 1, (0.25,)),
        ([0.25, 1], "regression", 2, (0.25, 1.0)),
        ([0.25], "regression", 2, "with a label out of range"),
        (float("nan"), "regression", 1, "with a label of the wrong kind"),
        (None, "regression", 1, "without a label"),
    ],
)
def test_labels(label, kind, labels, expected):
    assert class_targets(label, problem_type=kind, num_labels=labels) == expected


def config(task: str, **options):
    return SimpleNamespace(**({"task": task, "environment": {}, "loss_type": None, "data_seed": 42} | options))


def texts(*words: str) -> list[list[dict]]:
    return [[{"role": "assistant", "content": word}] for word in words]


def test_of_many_documents_some_are_drawn_the_same_each_time():
    row = {"messages": QUERY, "positive_messages": texts(*"ab"), "negative_messages": texts(*map(str, range(9)))}
    few = config("reranker", environment={"MAX_NEGATIVE_SAMPLES": "3", "MAX_POSITIVE_SAMPLES": "2"})
    drawn = head_rows(row, few)
    assert [target for _, (target,) in drawn] == [1, 0, 0, 0, 1, 0, 0, 0] and drawn == head_rows(row, few)
    words = [messages[-1]["content"] for messages, _ in drawn]
    assert words[0] == "a" and words[4] == "b" and set(words[1:4]) != set(words[5:8]) and len(set(words[1:4])) == 3
    assert len(head_rows(row, config("reranker"))) == 1 + 7
    assert words != [messages[-1]["content"] for messages, _ in head_rows(row, config(**(vars(few) | {"data_seed": 43})))]


def test_hard_negatives_are_the_first_ones_or_repeated():
    row = {"messages": QUERY, "positive_messages": texts("yes"), "negative_messages": texts("a", "b")}
    for count, expected in ((1, ["a"]), (3, ["a", "b", "a"])):
        hard = config("embedding", loss_type="infonce", environment={"INFONCE_HARD_NEGATIVES": str(count)})
        assert [messages[-1]["content"] for messages, _ in head_rows(row, hard)][2:] == expected
    assert head_rows(row | {"negative_messages": []}, hard) == "without a negative text"


@pytest.mark.parametrize("loss_type, label, expected", [
    ("contrastive", 1, [(1.0, 1.0), (0.0, 1.0)]),
    ("contrastive", 0.5, "with a label out of range"),
    ("cosine_similarity", 0.5, [(1.0, 0.5), (0.0, 0.5)]),
    ("cosine_similarity", None, "without a label"),
])  # fmt: skip
def test_losses_of_pairs_take_the_rows_label(loss_type, label, expected):
    row = {"messages": QUERY, "positive_messages": texts("yes"), "negative_messages": texts("no"), "label": label}
    found = head_rows(row, config("embedding", loss_type=loss_type))
    assert (found if isinstance(found, str) else [targets for _, targets in found]) == expected
