"""What leaves a device and comes back is bit for bit what it was; real Ray actors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray
import torch
from safetensors.torch import load_file

from tests.policy_ranks import nll_loss, policy_config, shards_of
from tests.row_batch import ROWS, SPLITS

VOCABULARY = 512
LAYOUTS = {
    "dp2": {"use_distributed_optimizer": True},
    "dp2-whole-optimizer": {"use_distributed_optimizer": False},
    "tp2-bf16": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "torch_dtype": "bfloat16"},
    "tp2-lora": {"tensor_model_parallel_size": 2, "tuner_type": "lora", "lr": 1e-2},
}


def host_bytes(group) -> list[int]:
    """Host memory that each rank keeps for its optimizer's state."""
    return ray.get([actor.host_bytes.remote() for actor in group.actors])


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow) if name == "tp2-bf16" else name for name in LAYOUTS]
)
def test_a_policy_that_left_its_device_goes_on_bit_for_bit(hosts, model, rows, source, tmp_path, layout):
    def run(offload: bool) -> tuple[list, dict]:
        options = {"offload_model": offload, "offload_optimizer": offload}
        group = hosts.start(policy_config(model, deterministic=True, **LAYOUTS[layout], **options), 2)
        shards = shards_of(rows, source, SPLITS[group.data_size])
        reserved = []
        if offload:  # before the optimizer has moments
            group.call("leave_device", True)
            reserved = host_bytes(group)
            group.call("enter_device")
        results = [group.train_step(shards, nll_loss)]
        before = ray.get(group.actors[0].bytes_held.remote())
        if offload:
            group.call("leave_device", False)
            during = ray.get(group.actors[0].bytes_held.remote())
            assert during["weights"] == before["weights"] > 0 and during["gradients"] == during["optimizer"] == 0
            assert reserved == host_bytes(group), "the moments did not fit the memory that was reserved for them"
            group.call("leave_device", True)
            group.call("leave_device", True)  # again: nothing happens
            assert ray.get(group.actors[0].bytes_held.remote())["weights"] == 0
            group.call("enter_device")
            assert ray.get(group.actors[0].bytes_held.remote()) == before
        results += [group.logprobs(shards), group.train_step(shards, nll_loss)]
        folder = tmp_path / str(offload)
        group.call("save", str(folder), 2)
        file = folder / ("adapter_model.safetensors" if "lora" in layout else "model.safetensors")
        return results, load_file(file)

    (first, scored, second), weights = run(False)
    (first_again, scored_again, second_again), weights_again = run(True)
    assert (first, second) == (first_again, second_again)
    assert all((scored[key] == scored_again[key]).all() for key in scored)
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 2}])
def test_a_teacher_that_waits_in_host_memory_gives_the_same_logits_again_and_again(hosts, model, rows, source, layout):
    """It comes for its logits alone, also where others are let in on its device and out again."""
    shards = shards_of(rows, source, SPLITS[1])
    role = SimpleNamespace(model=str(model), pipeline_model_parallel_size=None, nproc=None)

    def group_of(offload: bool):
        role.tensor_model_parallel_size = layout.get("tensor_model_parallel_size")
        config = policy_config(model, task="gkd", teacher=role, offload_teacher_model=offload, offload_model=True)
        return hosts.start(config, 1 + bool(layout), frozen="teacher")

    def held(group) -> list[int]:
        return ray.get([actor.weight_bytes.remote() for actor in group.actors])

    def logits(group) -> list[bytes]:
        parts = group.call("token_logits", shards[0], VOCABULARY, None)
        return [value.values.tobytes() for _, part in parts for value in ray.get(list(part.values()))]

    stays = group_of(False)
    expected, whole = logits(stays), held(stays)
    assert min(whole) > 0 and len(expected) == ROWS * len(whole)
    group = group_of(True)
    assert held(group) == [0] * len(whole)
    for _ in range(2):
        assert logits(group) == expected
        assert held(group) == [0] * len(whole)
        group.call("leave_device", True)
        group.call("enter_device")
        assert held(group) == [0] * len(whole)
