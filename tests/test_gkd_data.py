"""What gkd reads of a dataset: rows, prompts of the same positions, and the teacher's responses to them. Real ms-swift."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import ray

from rlhf.config import Config
from rlhf.records import Group, GroupTokens, Prompt
from rlhf.teacher_responses import FILE, complete_responses
from tests.tiny import make_tokenizer


@pytest.fixture(scope="module", autouse=True)
def dataset_cache(tmp_path_factory):
    """Keep ms-swift's dataset cache out of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELSCOPE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer().save_pretrained(folder)
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def question(i: int) -> dict:
    return {"role": "user", "content": f"what is {i}+{i}?"}


def started(model: Path, folder: Path, *, answered: bool = True, **options):
    """A data worker in this process, of 10 rows, and what it found."""
    from actors.data import DataWorker

    answers = [[{"role": "assistant", "content": str(2 * i)}] if answered else [] for i in range(10)]
    rows = [{"messages": [question(i), *answers[i]], "level": i} for i in range(10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    defaults = {"model": str(model), "model_type": "qwen3", "template_backend": "jinja", "dataset": [str(folder / "rows.jsonl")]}
    worker = DataWorker(Config(task="gkd", **(defaults | options)))
    return worker, worker.setup()


def texts(tokenizer, sequences) -> list[str]:
    return [tokenizer.decode(ids) for ids in sequences]


def conversation(i: int, answer: str = "") -> str:
    return f"<|im_start|>user\nwhat is {i}+{i}?<|im_end|>\n<|im_start|>assistant\n{answer}"


def test_rows_and_prompts_of_a_position_are_of_the_same_row(model, tokenizer, tmp_path):
    worker, info = started(model, tmp_path, lmbda=0.5)
    assert info.num_rows == 10
    order = np.random.default_rng([42, 0]).permutation(10).tolist()
    tokens, prompts, summary = worker.prompted_rows(3, 4)
    levels = [prompt.columns["level"] for prompt in prompts]
    assert len(set(levels)) == 4 and sorted(order) == list(range(10))
    assert texts(tokenizer, tokens.token_ids) == [conversation(i, f"{2 * i}<|im_end|>\n") for i in levels]
    assert texts(tokenizer, [prompt.token_ids for prompt in prompts]) == [conversation(i) for i in levels]
    assert [prompt.messages for prompt in prompts] == [[question(i)] for i in levels]
    assert [prompt.index for prompt in prompts] == [3, 4, 5, 6]
    trained = [ids[mask != 0] for ids, mask in zip(tokens.token_ids, tokens.loss_masks)]
    assert texts(tokenizer, trained) == [f"{2 * i}<|im_end|>" for i in levels]
    assert summary.units == [[[0]], [[1]], [[2]], [[3]]]


def test_without_steps_on_own_responses_there_are_no_prompts(model, tmp_path):
    packed, info = started(model, tmp_path, lmbda=0.0, packing=True, packing_length=128)
    tokens, summary = packed.rows(0, info.num_rows)
    assert len(tokens.token_ids) == 10 and info.num_rows < 10


def test_rows_without_answers_serve_when_every_response_is_the_policys_own(model, tokenizer, tmp_path):
    worker, info = started(model, tmp_path, answered=False, lmbda=1.0)
    assert info.num_rows == 10
    prompts = worker.prompted_rows(0, 10)[1]
    assert sorted(texts(tokenizer, [prompt.token_ids for prompt in prompts])) == sorted(conversation(i) for i in range(10))
    with pytest.raises(ValueError, match="no row of .* is left: of 10, 10 without a token to train on"):
        started(model, tmp_path, answered=False, lmbda=0.5)


def test_held_out_rows_have_their_answers_also_when_training_rows_are_prompts(model, tokenizer, tmp_path):
    worker, info = started(model, tmp_path, lmbda=1.0, split_dataset_ratio=0.2)
    assert (info.num_rows, info.evaluation_rows) == (8, 2)
    tokens, summary = worker.rows(0, 2, True)
    assert all("<|im_end|>\n<|im_start|>assistant\n" in text for text in texts(tokenizer, tokens.token_ids))
    assert all(count > 0 for count in summary.trained)


def test_the_teachers_responses_take_the_place_of_answers_in_every_epoch(model, tokenizer, tmp_path):
    worker, info = started(model, tmp_path, lmbda=0.0, seq_kd=True)
    prompts = worker.prompts(0, 10)
    said = {prompt.index: tokenizer(f"{prompt.columns['level']}!<|im_end|>")["input_ids"] for prompt in prompts}
    worker.adopt({position: np.array(ids, np.int32) for position, ids in said.items()})
    tokens, summary = worker.rows(0, 20)
    expected = [conversation(prompt.columns["level"], f"{prompt.columns['level']}!<|im_end|>") for prompt in prompts]
    found = texts(tokenizer, tokens.token_ids)
    assert found[:10] == expected and sorted(found[10:]) == sorted(expected)
    assert summary.trained == [len(said[position]) for position in range(10)] + summary.trained[10:]
    assert summary.lengths == [len(ids) for ids in tokens.token_ids]
    for ids, mask, count in zip(tokens.token_ids, tokens.loss_masks, summary.trained):
        assert mask.tolist() == [0.0] * (len(ids) - count) + [1.0] * count


def test_the_teacher_is_asked_only_for_what_is_missing(local_ray, tmp_path):
    asked: list[int] = []

    def prompts(start: int, count: int, shift: int = 0) -> list[Prompt]:
        places = range(start, start + count)
        return [Prompt(index=i, token_ids=np.array([i + shift, 7], np.int32), messages=[question(i)], columns={}) for i in places]

    def generate(missing: list[Prompt], n: int):
        asked.extend(prompt.index for prompt in missing)
        for prompt in reversed(missing):  # in any order
            ids = np.array([prompt.index, 100], np.int32)
            tokens = GroupTokens(prompt_ids=prompt.token_ids, response_ids=(ids,), rollout_logprobs=(np.zeros(2, np.float32),))
            yield Group(
                prompt=prompt, tokens=ray.put(tokens), texts=("yes\u2028no",), finish_reasons=("stop",), response_lengths=(2,),
                weight_version=0,
            )  # fmt: skip

    way = {"teacher.model": "/teacher", "temperature": 0.9}
    first = complete_responses(tmp_path, prompts, generate, count=3, way=way)
    assert {position: ids.tolist() for position, ids in first.items()} == {i: [i, 100] for i in range(3)}
    lines = (tmp_path / FILE).read_text().split("\n")
    (tmp_path / FILE).write_text("\n".join(lines[:2]) + "\n" + lines[2][:20])  # killed while it wrote position 0
    again = complete_responses(tmp_path, prompts, generate, count=5, way=way)
    assert asked == [0, 1, 2, 0, 3, 4]
    assert {position: ids.tolist() for position, ids in again.items()} == {i: [i, 100] for i in range(5)}
    with pytest.raises(ValueError, match="holds responses to other prompts"):
        complete_responses(tmp_path, lambda start, count: prompts(start, count, shift=1), generate, count=2, way=way)
    with pytest.raises(ValueError, match="by another teacher or sampling .* with the same .* teacher.model, temperature"):
        complete_responses(tmp_path, prompts, generate, count=2, way=way | {"teacher.model": "/other"})
