"""Whole runs of a mixture-of-experts model by their command, with real Ray, Megatron and vLLM."""

from __future__ import annotations

import json

import command
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import make_tiny_moe

COMMON = {
    "template_backend": "jinja", "global_batch_size": 16, "max_length": 64, "lr": 1e-3, "report_to": "none", "cpus_per_rank": 0.5,
    "expert_model_parallel_size": 2, "moe_aux_loss_coeff": 1e-2, "micro_batch_size": 4, "logging_steps": 1, "train_iters": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_moe(tmp_path_factory.mktemp("model"), head_dim=32)  # the smallest that vLLM has on CPU


def words(options: dict) -> list:
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def rows(path, **columns) -> str:
    lines = []
    for a in range(40):
        turns = [{"role": "user", "content": f"what is {a}+{a}?"}]
        if not columns:
            turns.append({"role": "assistant", "content": str(2 * a)})
        lines.append(json.dumps({"messages": turns} | columns))
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.slow
def test_grpo_pushes_split_experts_to_vllm(model, tmp_path):
    """The engine's logprobs are the policy's after each push, of updated weights too."""
    plugin = tmp_path / "variety.py"
    plugin.write_text("def variety(completions, **columns):\n    return [len(set(text)) / 10 for text in completions]\n")
    options = COMMON | {
        "rlhf_type": "grpo", "model": model, "dataset": rows(tmp_path / "data.jsonl", solution="1"), "external_plugins": plugin,
        "reward_funcs": "variety", "output_dir": tmp_path, "run_name": "grpo", "num_generations": 4, "beta": 0.04,
        "max_completion_length": 12, "vllm_max_model_len": 128, "vllm_enforce_eager": "true", "reward_workers": 1,
        "rollout.num_engines": 1,
    }  # fmt: skip
    status, output = command.run("rlhf", *words(options), log=tmp_path / "log")
    assert status == 0, output
    metrics = command.metrics(tmp_path / "grpo")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert max(row["max_rollout_train_logprob_diff"] for row in metrics) < 1e-4
    assert min(row["load_balancing_loss"] for row in metrics) >= 1 and metrics[2]["kl"] > 1e-4
    old, new = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "grpo" / "checkpoint-3"))
    name = "model.layers.1.mlp.experts.7.down_proj.weight"
    assert np.abs(old[name] - new[name]).max() > 1e-4


@pytest.mark.slow
def test_sft_with_adapters(model, tmp_path):
    options = COMMON | {
        "model": model, "dataset": rows(tmp_path / "data.jsonl"), "output_dir": tmp_path, "run_name": "sft", "tuner_type": "lora",
        "lr": 1e-2, "overlap_grad_reduce": "true", "overlap_param_gather": "true", "packing": "true", "global_batch_size": 2,
        "micro_batch_size": 1,
    }  # fmt: skip
    status, output = command.run("sft", *words(options), log=tmp_path / "log")
    assert status == 0, output
    losses = [row["loss"] for row in command.metrics(tmp_path / "sft")]
    assert losses[2] < losses[0]
    assert (tmp_path / "sft" / "checkpoint-3" / "merged" / "model.safetensors").exists()
