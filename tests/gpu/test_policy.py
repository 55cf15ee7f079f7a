"""Megatron ranks on GPUs, in bfloat16 with Transformer Engine, against Hugging Face in float32 on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import ray
from policy_ranks import hugging_face, nll_loss, policy_config, random_rows, sequence_logprobs, shards_of, start_hosts
from tiny import make_tiny_model

ROWS = 8
SPLITS = {1: [[[0, 1, 2], [3, 4], [5, 6, 7]]], 2: [[[0, 1, 2], [3]], [[4, 5], [6, 7]]]}
LAYOUTS = {
    "one": {},
    "tp2-sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {"use_distributed_optimizer": True},
}
MEAN_LOGPROB = 0.025  # mean difference of a token's logprob: bfloat16 has 8 bits
GRAD_NORM = 0.005  # relative


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=256, intermediate_size=512, head_dim=64)


@pytest.fixture(scope="module")
def hosts(gpu_ray):
    hosts = start_hosts(2, gpus=1)
    yield hosts
    for actor in hosts.actors:
        ray.kill(actor)


@pytest.fixture(scope="module")
def expected(model):
    """Logprobs by key, and the gradient norm of their mean over trained tokens."""
    rows, hf = random_rows(ROWS), hugging_face(model)
    logprobs = {100 + item: sequence_logprobs(hf, rows.token_ids[item]) for item in range(ROWS)}
    total = sum(mask.sum() for mask in rows.loss_masks)
    loss = sum(-(value * value.new_tensor(rows.loss_masks[key - 100])).sum() for key, value in logprobs.items()) / total
    loss.backward()
    norm = sum(float(parameter.grad.square().sum()) for parameter in hf.parameters()) ** 0.5
    return {key: value.detach().numpy() for key, value in logprobs.items()}, norm


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_and_gradient_norm_are_those_of_hugging_face(hosts, model, expected, layout):
    rows, (logprobs, norm) = random_rows(ROWS), expected
    config = policy_config(model, torch_dtype="bfloat16", **LAYOUTS[layout])
    group = hosts.start(config, 1 if layout == "one" else 2)
    shards = shards_of(rows, ray.put(rows), SPLITS[group.data_size])
    measured = group.logprobs(shards)
    differences = np.concatenate([np.abs(measured[key] - logprobs[key])[1:] for key in logprobs])
    first = group.train_step(shards, nll_loss)
    print(f"{layout}: logprobs {differences.mean():.5f}, {differences.max():.5f}, norm {first['grad_norm'] / norm - 1:.5f}")
    assert differences.mean() <= MEAN_LOGPROB
    assert first["grad_norm"] == pytest.approx(norm, rel=GRAD_NORM)
    assert group.train_step(shards, nll_loss)["loss"] < first["loss"]


@pytest.mark.parametrize("layout", ["one", "dp2"])
def test_a_policy_that_left_its_gpu_goes_on_bit_for_bit(hosts, model, layout):
    rows = random_rows(ROWS)
    source = ray.put(rows)

    def run(offload: bool) -> list:
        options = {"offload_model": offload, "offload_optimizer": offload}
        config = policy_config(model, torch_dtype="bfloat16", deterministic=True, **LAYOUTS[layout], **options)
        group = hosts.start(config, 1 if layout == "one" else 2)
        shards = shards_of(rows, source, SPLITS[group.data_size])
        results = [group.train_step(shards, nll_loss)["grad_norm"]]
        if offload:
            group.call("leave_device", True)
            assert set(ray.get(group.actors[0].bytes_held.remote()).values()) == {0}
            group.call("enter_device")
        return [*results, group.train_step(shards, nll_loss)["grad_norm"], group.train_step(shards, nll_loss)["loss"]]

    assert run(False) == run(True)
