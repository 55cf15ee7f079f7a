"""Megatron checkpoints of models with a head, against what the same run writes for transformers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from actors.weights.checkpoint_names import tensor_shapes
from rlhf.checkpoint import Checkpoints
from rlhf.config import Config
from rlhf.options import load_config
from tests.policy_ranks import largest_difference, policy_config, random_rows
from tests.row_batch import assert_same_weights, weights_of
from tests.test_export import exporter
from tests.test_heads import LOSSES, SEQUENCES, config_of, even_split, head_shards, outputs, values_of
from tests.tiny import make_tiny_model

TASKS = ["rm", "seq_cls", "embedding", "generative_reranker"]
ROWS = random_rows(SEQUENCES)
RECORDED = ("task", "model", "mcore_model", "num_labels", "problem_type", "tuner_type", "lora_rank", "lora_alpha")
TP2 = {"tensor_model_parallel_size": 2}


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.delenv("NPROC_PER_NODE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def megatron(hosts, model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("megatron") / "tiny-mcore"
    exporter(hosts, "--model", model, "--to_mcore").call("save_megatron", str(folder))
    return folder


def convert(hosts, checkpoint: Path, output: Path) -> Path:
    """`--to_hf` by two tensor ranks."""
    readers = exporter(hosts, "--mcore_model", checkpoint, "--to_hf", "--tensor_model_parallel_size", 2)
    readers.call("save_hugging_face", str(output))
    return output


def described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def shards_for(task: str) -> list[Any]:
    return head_shards(ROWS, ray.put(ROWS), task, even_split(task, 1, 2))


def found(group: Any, task: str) -> np.ndarray:
    by_key = values_of(group, shards_for(task), outputs)[0]
    return np.stack([by_key[key] for key in range(SEQUENCES)])


def trained(hosts, output: Path, config: SimpleNamespace) -> Path:
    """A checkpoint after 2 steps of a run with this config on one rank, written as a run writes it."""
    group = hosts.start(config, 1)
    if config.task in ("rm", "seq_cls", "generative_reranker"):
        for _ in range(2):
            group.train_step(shards_for(config.task), next(iter(LOSSES[config.task].values())))
    output.mkdir()
    checkpoints = Checkpoints(output, Config(**{name: getattr(config, name) for name in RECORDED}))
    return checkpoints.save(2, SimpleNamespace(on_all=group.call), {})


@pytest.mark.parametrize("task", TASKS)
def test_a_head_starts_from_a_language_models_checkpoint_as_from_the_model(hosts, model, megatron, task):
    for layout in ({}, TP2):
        group = hosts.start(config_of(megatron, task, mcore_model=str(megatron), **layout), 2 if layout else 1)
        from_megatron = found(group, task)
        expected = found(hosts.start(config_of(model, task, **layout), 2 if layout else 1), task)
        assert np.array_equal(from_megatron, expected)
        assert np.ptp(expected) > 1e-3


@pytest.mark.parametrize("task", [task if task == "rm" else pytest.param(task, marks=pytest.mark.slow) for task in TASKS])
def test_a_checkpoint_without_safetensors_is_started_from_and_converted_with_its_head(hosts, model, tmp_path, task):
    complete = trained(hosts, tmp_path / "with", config_of(model, task))
    without = trained(hosts, tmp_path / "without", config_of(model, task, save_safetensors=False))
    assert not list(without.glob("*.safetensors"))
    result = convert(hosts, without, tmp_path / "hf")
    ours, theirs = ({name.removeprefix("model."): tensor for name, tensor in weights_of(of).items()} for of in (result, complete))
    assert_same_weights(ours, theirs)
    assert described(result) == described(without) == described(complete)
    assert tensor_shapes(without) == tensor_shapes(complete)
    exporter(hosts, "--model", complete, "--to_mcore").call("save_megatron", str(tmp_path / "back"))
    for source in (without, tmp_path / "back"):
        again = hosts.start(config_of(source, task, mcore_model=str(source), seed=7), 1)
        from_megatron = found(again, task)
        assert np.array_equal(from_megatron, found(hosts.start(config_of(complete, task), 1), task))


def test_an_adapter_and_the_head_trained_with_it_are_merged_into_the_base(hosts, model, megatron, tmp_path):
    lora = {"tuner_type": "lora", "lr": 1e-2, "mcore_model": str(megatron)}
    complete = trained(hosts, tmp_path / "with", config_of(megatron, "rm", **lora))
    without = trained(hosts, tmp_path / "without", config_of(megatron, "rm", save_safetensors=False, **lora))
    folder = convert(hosts, without, tmp_path / "hf")
    result, body = weights_of(folder), weights_of(model)
    assert largest_difference(result, weights_of(complete / "merged")) <= 1e-6
    assert largest_difference({name: body.get(name, result[name]) for name in result}, result) > 1e-3
    assert described(folder) == described(complete / "merged")


def test_what_a_head_cannot_do_is_refused_by_name(hosts, model, tmp_path):
    folder = trained(hosts, tmp_path / "rm", config_of(model, "rm", save_safetensors=False))
    with pytest.raises(ray.exceptions.RayTaskError, match=r"has no output layer for tokens \(it is a checkpoint of seq_cls\)"):
        hosts.start(policy_config(model, mcore_model=str(folder)), 1)
    with pytest.raises(ray.exceptions.RayTaskError, match="ends in a head of 1 labels, the model is to have 3"):
        hosts.start(config_of(model, "seq_cls", mcore_model=str(folder)), 1)
    (tmp_path / "d.jsonl").write_text("{}\n")
    for words, message in {
        f"sft --mcore_model {folder} --dataset d.jsonl --train_iters 1": "has no output layer for tokens",
        f"export --mcore_model {folder} --to_hf --test_convert_precision": "logits of language models, this is seq_cls",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_config(words.split())
    (tmp_path / "adapter").mkdir()
    settings = {"base_model_name_or_path": str(model), "task_type": "SEQ_CLS"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match="--merge_lora is for language models"):
        load_config("export --adapters adapter --merge_lora".split())
