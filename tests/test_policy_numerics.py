"""Megatron ranks against Hugging Face in float32, under every layout of one or two ranks.

Two Ray actors build one policy after another. For each layout one script is run (`measure`), and the tests read its figures.
The Hugging Face model lives in this process, where mcore-bridge is never imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from tests.policy_ranks import (
    hugging_face,
    largest_difference,
    policy_config,
    random_rows,
    ratio_loss,
    sequence_logprobs,
    shards_of,
)
from tests.row_batch import assert_same_weights, weights_of

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "one-unfused": {
        "cross_entropy_loss_fusion": False,
        "attention_backend": "unfused",
        "recompute_granularity": "none",
    },
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2-unfused": {"tensor_model_parallel_size": 2, "cross_entropy_loss_fusion": False},
    "tp2-sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "tp2-recompute": {
        "tensor_model_parallel_size": 2,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {"use_distributed_optimizer": False},
    "dp2-distributed-optimizer": {"use_distributed_optimizer": True},
}
ROWS = 9
# data ranks x micro batches x rows: two ways to cut the same batch
SPLITS = {
    1: ([[[0, 1, 2], [3, 4], [5, 6, 7, 8]]], [[[8, 0], [1], [2, 3, 4, 5, 6, 7]]]),
    2: ([[[0, 1, 2], [3, 4]], [[5, 6, 7], [8]]], [[[7], [0, 2, 4]], [[1, 3, 5], [6, 8]]]),
}


@dataclass
class Reference:
    """What Hugging Face and torch say."""

    logprobs: dict[int, np.ndarray]
    old: dict[int, np.ndarray]
    ref: dict[int, np.ndarray]
    loss: float
    grad_norm: float
    max_ratio: float
    weights: dict[str, torch.Tensor]  # after one AdamW step


@dataclass
class Measured:
    """What the ranks of one layout gave."""

    infos: list[Any]
    logprobs: dict[int, np.ndarray]
    first: dict[str, float]
    second: dict[str, float]
    second_again: dict[str, float]  # after loading the checkpoint of the first step
    second_split: dict[str, float]  # the same, with other micro batches
    folder: Path  # step0, step1, step2, again: checkpoints


@pytest.fixture(scope="module")
def rows():
    return random_rows(ROWS)


@pytest.fixture(scope="module")
def advantages() -> np.ndarray:
    return np.random.default_rng(1).normal(size=ROWS)


@pytest.fixture(scope="module")
def reference(model, rows, advantages) -> Reference:
    """Logprobs, gradient and one AdamW step of `ratio_loss` in Hugging Face and torch alone."""
    hf = hugging_face(model)
    generator = np.random.default_rng(2)
    logprobs, old, ref = {}, {}, {}
    total = sum(mask.sum() for mask in rows.loss_masks)
    loss, max_ratio = torch.zeros(()), 0.0
    for item in range(ROWS):
        value = sequence_logprobs(hf, rows.token_ids[item])
        logprobs[100 + item] = value.detach().numpy()
        noise = generator.normal(0, 0.2, (2, len(value))).astype(np.float32)
        old[100 + item], ref[100 + item] = logprobs[100 + item] + noise
        mask = torch.from_numpy(rows.loss_masks[item])
        ratio = (value - torch.from_numpy(old[100 + item])).exp()
        loss = loss - (mask * ratio).sum() * float(advantages[item]) / total
        loss = loss - 0.1 * (mask * (value - torch.from_numpy(ref[100 + item]))).sum() / total
        max_ratio = max(max_ratio, (ratio * mask).max().item())
    loss.backward()
    decayed = [parameter for parameter in hf.parameters() if parameter.dim() > 1]
    plain = [parameter for parameter in hf.parameters() if parameter.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-6)
    grad_norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0).item()
    optimizer.step()
    weights = {name: parameter.detach() for name, parameter in hf.named_parameters()}
    return Reference(
        logprobs=logprobs, old=old, ref=ref, loss=loss.item(), grad_norm=grad_norm, max_ratio=max_ratio, weights=weights
    )


@pytest.fixture(scope="module")
def measured(hosts, model, rows, source, advantages, reference, tmp_path_factory):
    """`measured(layout)`: the figures of a layout, each measured once."""
    done: dict[str, Measured] = {}

    def get(layout: str) -> Measured:
        if layout not in done:
            folder = tmp_path_factory.mktemp(layout)
            done[layout] = measure(hosts, layout, model, rows, source, advantages, reference, folder)
        return done[layout]

    return get


def measure(hosts, layout, model, rows, source, advantages, reference, folder) -> Measured:
    config = policy_config(model, **LAYOUTS[layout])
    group = hosts.start(config, 1 if layout.startswith("one") else 2)
    old, ref = [ray.put(reference.old)], [ray.put(reference.ref)]
    split, other = (shards_of(rows, source, ways, advantages) for ways in SPLITS[group.data_size])

    def step(shards) -> dict[str, float]:
        return group.train_step(shards, ratio_loss, old, ref)

    logprobs = group.logprobs(split)
    group.call("save", str(folder / "step0"), 0)
    first = step(split)
    group.call("save", str(folder / "step1"), 1)
    second = step(split)
    group.call("save", str(folder / "step2"), 2)
    assert group.call("load", str(folder / "step1")) == [1] * len(group.actors)
    second_again = step(split)
    group.call("save", str(folder / "again"), 2)
    group.call("load", str(folder / "step1"))
    second_split = step(other)
    return Measured(
        infos=group.infos,
        logprobs=logprobs,
        first=first,
        second=second,
        second_again=second_again,
        second_split=second_split,
        folder=folder,
    )


all_layouts = pytest.mark.parametrize("layout", LAYOUTS)


@all_layouts
def test_logprobs_equal_hugging_face(measured, reference, layout):
    assert largest_difference(measured(layout).logprobs, reference.logprobs) <= 1e-5


@all_layouts
def test_loss_and_gradient_norm_equal_autograd(measured, reference, layout):
    metrics = measured(layout).first
    assert metrics["loss"] == pytest.approx(reference.loss, abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(reference.grad_norm, rel=1e-5)


@all_layouts
def test_metrics_add_up_over_micro_batches_and_ranks(measured, reference, layout):
    metrics = measured(layout).first
    assert metrics["tokens"] == pytest.approx(1, abs=1e-6)
    assert metrics["max_ratio"] == pytest.approx(reference.max_ratio, rel=1e-5)
    assert metrics["lr"] == 1e-3


@all_layouts
def test_one_step_equals_torch_adamw(measured, reference, layout):
    """Adam's first step divides a gradient by its size: where that is near epsilon (1e-6) rounding of 1e-8 is seen 1000-fold."""
    stepped = weights_of(measured(layout).folder / "step1")
    assert largest_difference(stepped, reference.weights) <= 2e-5
    moved = max(float((reference.weights[name] - weight).abs().max()) for name, weight in stepped.items())
    assert moved <= 2e-5


@all_layouts
def test_export_of_untrained_weights_equals_the_source_exactly(measured, model, layout):
    assert_same_weights(weights_of(measured(layout).folder / "step0"), weights_of(model))


@all_layouts
def test_loss_is_unchanged_by_splitting_the_batch(measured, layout):
    result = measured(layout)
    assert result.second_split["loss"] == pytest.approx(result.second["loss"], abs=1e-6)
    assert result.second_split["grad_norm"] == pytest.approx(result.second["grad_norm"], rel=1e-5)


@all_layouts
def test_training_continues_bit_for_bit_after_loading(measured, layout):
    result = measured(layout)
    assert result.second_again == result.second
    assert_same_weights(weights_of(result.folder / "again"), weights_of(result.folder / "step2"))


@all_layouts
def test_ranks_know_their_place(measured, layout):
    infos = measured(layout).infos
    replicas = 2 if layout.startswith("dp2") else 1
    assert sorted({info.data_rank for info in infos}) == list(range(replicas))
    assert sum(info.returns_logprobs for info in infos) == replicas
