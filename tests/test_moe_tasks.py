"""Heads on mixture-of-experts models, and frozen models that have experts where the policy has none, against Hugging Face."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.policy_ranks import hugging_face, largest_difference, policy_config, random_rows, shards_of
from tests.row_batch import hf_logprobs
from tests.test_heads import (
    LOSSES,
    SEQUENCES,
    config_of,
    even_split,
    head_shards,
    hugging_face_model,
    hugging_face_outputs,
    outputs,
    values_of,
    written_out,
)
from tests.tiny import make_tiny_model, make_tiny_moe

EP2 = {"expert_model_parallel_size": 2}
LAYOUTS = {
    "ep2": EP2,
    "tp2-ep2": EP2 | {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_moe(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows():
    return random_rows(SEQUENCES)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("task", "loss"), [("rm", "rm"), ("embedding", "infonce-own")])
def test_a_head_above_experts(hosts, model, rows, source, tmp_path, task, loss, layout):
    group = hosts.start(config_of(model, task, **LAYOUTS[layout]), 2)
    shards = head_shards(rows, source, task, even_split(task, group.data_size, 2))
    found = {key: value for part in values_of(group, shards, outputs) for key, value in part.items()}
    group.call("save", str(tmp_path), 0)
    hf = hugging_face_model(tmp_path, task)
    expected = hugging_face_outputs(hf, task, rows)
    np.testing.assert_allclose(np.stack([found[key] for key in range(SEQUENCES)]), expected.detach(), atol=1e-5)
    value = written_out(loss, task, expected)
    value.backward()
    norm = torch.stack([(parameter.grad**2).sum() for parameter in hf.parameters() if parameter.grad is not None]).sum().sqrt()
    metrics = group.train_step(shards, LOSSES[task][loss])
    assert (metrics["loss"], metrics["grad_norm"]) == pytest.approx((value.item(), norm.item()), rel=2e-5)


@pytest.mark.parametrize(("policy", "frozen"), [("moe", "dense"), ("dense", "moe")])
def test_only_models_with_experts_split_them(hosts, model, rows, source, tmp_path, policy, frozen):
    """One rank of a frozen model beside a policy whose experts are split over two, and the other way round."""
    folders = {"moe": model, "dense": make_tiny_model(tmp_path / "dense")}
    role = SimpleNamespace(
        model=str(folders[frozen]), tensor_model_parallel_size=None, pipeline_model_parallel_size=None, nproc=1
    )
    config = policy_config(folders[policy], reference=role, **(EP2 if policy == "moe" else {}))
    group = hosts.start(config, 1, frozen="reference")
    shards = shards_of(rows, source, [[[*range(6)], [*range(6, SEQUENCES)]]])
    assert largest_difference(group.logprobs(shards), hf_logprobs(hugging_face(folders[frozen]), rows)) <= 1e-5
