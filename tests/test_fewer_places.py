"""What a run that asks for too many GPUs or cores is told to lower: options that it has, and that would help."""

# ruff: noqa: E501 - whole messages

import pytest

from rlhf.config import Config, TeacherRole
from rlhf.fewer_places import with_less

OWN = {"task": "gkd", "nproc_per_node": 1, "lmbda": 0.0}


@pytest.mark.parametrize(
    ("options", "engines", "gpus", "cpus"),
    [
        ({"task": "sft", "nproc_per_node": 1}, 0, "add nodes", "lower cpus_per_rank, or add nodes"),
        ({"task": "sft", "nproc_per_node": 4}, 0, "lower nproc_per_node, or add nodes", "lower nproc_per_node or cpus_per_rank, or add nodes"),
        ({"task": "sft", "nproc_per_node": 1, "nnodes": 2}, 0, "lower nnodes, or add nodes", "lower nnodes or cpus_per_rank, or add nodes"),
        (
            {"task": "sft", "nproc_per_node": 4, "nnodes": 2, "tensor_model_parallel_size": 2},
            0,
            "lower nproc_per_node or nnodes, or add nodes",
            "lower nproc_per_node, nnodes or cpus_per_rank, or add nodes",
        ),
        (
            {"task": "sft", "nproc_per_node": 2, "tensor_model_parallel_size": 2},
            0,
            "lower nproc_per_node with tensor_model_parallel_size, or add nodes",
            "lower nproc_per_node with tensor_model_parallel_size or cpus_per_rank, or add nodes",
        ),
        (
            {"task": "sft", "nproc_per_node": 4, "tensor_model_parallel_size": 2, "expert_model_parallel_size": 4},
            0,
            "lower nproc_per_node with expert_model_parallel_size, or add nodes",
            "lower nproc_per_node with expert_model_parallel_size or cpus_per_rank, or add nodes",
        ),
        (
            {"task": "export", "nproc_per_node": 2, "pipeline_model_parallel_size": 2},
            0,
            "lower pipeline_model_parallel_size, or add nodes",
            "lower pipeline_model_parallel_size or cpus_per_rank, or add nodes",
        ),
        (
            {"task": "grpo", "nproc_per_node": 2, "vllm_mode": "server", "vllm_tensor_parallel_size": 2},
            3,
            "lower nproc_per_node, rollout.num_engines or vllm_tensor_parallel_size, or add nodes",
            "lower nproc_per_node, rollout.num_engines, vllm_tensor_parallel_size or cpus_per_rank, or add nodes",
        ),
        ({"task": "grpo", "nproc_per_node": 1, "vllm_mode": "server"}, 1, "add nodes", "lower cpus_per_rank, or add nodes"),
        ({"task": "grpo", "nproc_per_node": 2}, 0, "lower nproc_per_node, or add nodes", "lower nproc_per_node or cpus_per_rank, or add nodes"),
        ({"task": "infer"}, 2, "lower rollout.num_engines, or add nodes", "lower rollout.num_engines or cpus_per_rank, or add nodes"),
        (
            OWN | {"teacher": TeacherRole(model="t", own_devices=True, nproc=4)},
            0,
            "lower teacher.nproc, or add nodes",
            "lower teacher.nproc or cpus_per_rank, or add nodes",
        ),
        (
            OWN | {"teacher": TeacherRole(model="t", own_devices=True, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)},
            0,
            "lower teacher.tensor_model_parallel_size or teacher.pipeline_model_parallel_size, or add nodes",
            "lower teacher.tensor_model_parallel_size, teacher.pipeline_model_parallel_size or cpus_per_rank, or add nodes",
        ),
        (
            OWN | {"teacher": TeacherRole(model="t", backend="vllm", nproc=2, tensor_model_parallel_size=2)},
            0,
            "lower teacher.nproc with teacher.tensor_model_parallel_size, or add nodes",
            "lower teacher.nproc with teacher.tensor_model_parallel_size or cpus_per_rank, or add nodes",
        ),
    ],
)  # fmt: skip
def test_what_is_told_to_be_lowered(options, engines, gpus, cpus):
    config = Config(model="m", **options)
    assert with_less(config, "GPU", engine_places=engines) == gpus
    assert with_less(config, "CPU", engine_places=engines) == cpus
