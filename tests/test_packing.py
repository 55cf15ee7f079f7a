"""Packs: made once of whole rows, handed out by position, by real ms-swift; what they are where responses are sampled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.config import Config, TeacherRole
from rlhf.fit import refusal, warning
from rlhf.memory import micro_batch_tokens, shapes
from rlhf.model_folder import read_shape
from rlhf.phases import phases
from rlhf.plan import plan, render
from rlhf.resolution import resolve
from tests.model_json import TINY, write_model
from tests.test_data import dataset_cache, model, pair, started, write  # noqa: F401
from tests.test_plan import CPU

ROWS, PACK = 30, 300


def text(role: str, words: str) -> dict:
    return {"role": role, "content": words}


def row_of(task: str, i: int) -> dict:
    """Row `i`, its texts of 5 to 20 words."""
    words = " what" * (i * 7 % 16)
    question = [text("user", f"what is {i}+{i}?" + words)]
    if task == "rm":
        return pair(question[0]["content"], f"{2 * i}", "no") | {"margin": float(i)}
    if task == "seq_cls":
        return {"messages": question, "label": i % 3}
    others = [[text("assistant", f"{i + k}")] for k in range(i % 3 + 1)]
    return {"messages": question, "positive_messages": [[text("assistant", f"{2 * i}")]], "negative_messages": others}


@pytest.fixture(scope="module")
def packed(model, tmp_path_factory):  # noqa: F811
    """`packed(task, **options)`: a data worker with ROWS rows in packs of PACK tokens, and what its setup found."""
    folder = tmp_path_factory.mktemp("rows")
    options = {"seq_cls": {"num_labels": 3, "problem_type": "single_label_classification"}, "embedding": {"loss_type": "infonce"}}

    def packed(task: str, **more):
        data = [write(folder / f"{task}.jsonl", [row_of(task, i) for i in range(ROWS)])]
        settings = {"task": task, "packing": True, "packing_length": PACK, "dataset_shuffle": True} | options.get(task, {})
        return started(model, data, **settings | more)

    return packed


@pytest.mark.parametrize("task", ["rm", "seq_cls", "embedding", "reranker", "generative_reranker"])
def test_the_sequences_of_a_row_stay_together_in_a_pack(packed, task):
    worker, info = packed(task)
    plain, before = packed(task, packing=False, packing_length=None, dataset_shuffle=False)
    assert info.num_tokens == before.num_tokens and info.num_rows < ROWS / 2 and info.warnings == ()
    tokens, summary = worker.rows(0, info.num_rows)
    assert max(sum(summary.lengths[item] for row in unit for item in row) for unit in summary.units) <= PACK

    def contents(tokens, summary) -> list:
        def row_of(row):
            return [(tokens.token_ids[item].tolist(), summary.targets[item]) for item in row]

        return [row_of(row) for unit in summary.units for row in unit]

    found, wanted = contents(tokens, summary), contents(*plain.rows(0, ROWS))
    assert sorted(found) == sorted(wanted) and {len(row) for row in found} == {len(row) for row in wanted}


def test_a_position_counts_packs_and_finds_them_again(packed):
    """Packs are made once: each epoch has the same ones, in another order."""
    worker, info = packed("rm")
    epochs = [worker.rows(epoch * info.num_rows, info.num_rows)[0].token_ids for epoch in range(2)]
    again, _ = packed("rm")
    later = again.rows(info.num_rows + 1, info.num_rows - 1)  # as a resumed run asks
    rest = [ids.tolist() for ids in epochs[1]][-len(later[0].token_ids) :]
    assert [ids.tolist() for ids in later[0].token_ids] == rest and len(later[1].units) == info.num_rows - 1
    first, second = ([ids.tolist() for ids in epoch] for epoch in epochs)
    assert first != second and sorted(first) == sorted(second)


def test_a_row_longer_than_a_pack_is_one_alone_and_its_user_told(packed):
    worker, info = packed("reranker", packing_length=100, max_length=100)
    _, summary = worker.rows(0, info.num_rows)
    sizes = [(sum(summary.lengths[item] for row in unit for item in row), len(unit)) for unit in summary.units]
    longer = [count for size, count in sizes if size > 100]
    assert set(longer) == {1} and sum(count for _, count in sizes) == ROWS
    assert info.warnings == (f"{len(longer)} rows are longer than packing_length 100, all their sequences together: packs alone",)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("NPROC_PER_NODE", raising=False)
    return write_model(tmp_path, TINY | {"max_position_embeddings": 2048})


def test_full_packs_decide_whether_a_run_fits_and_longer_rows_are_warned_of(folder):
    """Of a pair's two answers each may be max_length tokens."""
    base = Config(task="rm", model=str(folder), dataset=["d"], train_iters=1, packing=True, nproc_per_node=1, micro_batch_size=2)
    config = resolve(base, read_shape(folder))
    assert (config.packing_length, micro_batch_tokens(config)) == (2048, 2 * 4096)

    def needed(length: int) -> int:
        """Bytes of a run whose longest pair is a pack."""
        fitting = replace(config, max_length=length, packing_length=2 * length)
        return phases(fitting, *shapes(fitting), 0)["train"]

    assert "phase train needs" in refusal(config, *shapes(config), needed(1024) - 1)
    assert refusal(config, *shapes(config), needed(1024)) is None
    assert "when rows are as long as max_length allows" in warning(config, *shapes(config), needed(2048) - 1)
    assert warning(config, *shapes(config), needed(2048)) is None


def test_rows_are_no_longer_than_a_pack_unless_told(folder):
    base = Config(task="sft", model=str(folder), dataset=["d"], train_iters=1, packing=True, nproc_per_node=1)
    for given, length in (({}, 2048), ({"packing_length": 512}, 512), ({"packing_length": 4096}, 2048)):
        config = resolve(replace(base, **given), read_shape(folder))
        assert (config.max_length, config.packing_length) == (length, given.get("packing_length", 2048))


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({"task": "grpo", "reward_funcs": ["format"]}, 2048),
        ({"task": "grpo", "reward_funcs": ["format"], "max_length": 100}, 612),
        ({"task": "gkd", "micro_batch_size": 4, "packing_length": 512}, 4 * 512),
        ({"task": "gkd", "lmbda": 0.0, "seq_kd": True}, 2048),
        ({"task": "gkd", "lmbda": 0.0}, None),
    ],
)
def test_responses_that_are_sampled_are_packed_at_each_step(folder, options, budget):
    base = Config(model=str(folder), dataset=["d"], train_iters=1, packing=True, nproc_per_node=1)
    config = resolve(replace(base, teacher=TeacherRole(model=str(folder)), **options), read_shape(folder))
    assert (config.packing, config.micro_batch_tokens) == (budget is None, budget)
    text = render(config, plan(config, dataset_rows=8, devices=CPU))
    unit = "responses" if config.task == "grpo" else "rows"
    line = f"global batch 16 {unit}, packed to {budget} tokens" if budget else "global batch 16 packs / DP 1 / micro batch 1 = 16"
    assert line in text
    assert resolve(config, read_shape(folder)) == config


def test_without_a_longest_length_sampled_responses_need_a_packing_length():
    base = Config(task="grpo", reward_funcs=["format"], packing=True)
    with pytest.raises(ValueError, match="packing needs --packing_length: the model does not say how long its sequences may be"):
        resolve(base)
    assert resolve(replace(base, packing_length=700)).micro_batch_tokens == 700
