"""More tensor ranks than key-value heads: ranks share a head, and are Hugging Face's model all the same."""

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file

from tests.policy_ranks import (
    hugging_face,
    largest_difference,
    nll_loss,
    policy_config,
    random_rows,
    sequence_logprobs,
    shards_of,
)
from tests.tiny import make_tiny_model

ROWS = random_rows(6)
SPLIT = [[[0, 1, 2], [3, 4, 5]]]
TP2 = {"tensor_model_parallel_size": 2}


def hf_logprobs(model) -> dict[int, np.ndarray]:
    with torch.no_grad():
        return {100 + item: sequence_logprobs(model, ids).numpy() for item, ids in enumerate(ROWS.token_ids)}


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param("Qwen3", TP2 | {"sequence_parallel": True}, id="norms-of-queries-and-keys"),
        pytest.param("Qwen2", TP2, id="biases"),
    ],
)
def test_a_step_is_that_of_torch(hosts, tmp_path, family, layout):
    model = make_tiny_model(tmp_path / "model", family=family, num_key_value_heads=1)
    hf = hugging_face(model)
    total = sum(mask.sum() for mask in ROWS.loss_masks)
    values = [sequence_logprobs(hf, ids) for ids in ROWS.token_ids]
    loss = -sum((torch.from_numpy(mask) * value).sum() for mask, value in zip(ROWS.loss_masks, values)) / total
    loss.backward()
    groups = [
        {"params": [weight for weight in hf.parameters() if weight.dim() > 1], "weight_decay": 0.1},
        {"params": [weight for weight in hf.parameters() if weight.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-6)
    norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0).item()
    expected = hf_logprobs(hf)
    optimizer.step()

    group = hosts.start(policy_config(model, **layout), 2)
    shards = shards_of(ROWS, ray.put(ROWS), SPLIT)
    assert largest_difference(group.logprobs(shards), expected) <= 1e-5
    metrics = group.train_step(shards, nll_loss)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    group.call("save", str(tmp_path / "step1"), 1)
    stepped = load_file(tmp_path / "step1" / "model.safetensors")
    for name, weight in hf.named_parameters():
        assert float((weight.detach() - stepped[name]).abs().max()) <= 2e-5, name


def test_an_adapter_merges_into_the_model_that_was_trained(hosts, tmp_path):
    model = make_tiny_model(tmp_path / "model", num_key_value_heads=1)
    group = hosts.start(policy_config(model, tuner_type="lora", lr=1e-2, **TP2), 2)
    shards = shards_of(ROWS, ray.put(ROWS), SPLIT)
    base = group.logprobs(shards)
    group.train_step(shards, nll_loss)
    adapted = group.logprobs(shards)
    group.call("save", str(tmp_path / "step1"), 1)
    assert largest_difference(adapted, base) > 0.01
    assert largest_difference(adapted, hf_logprobs(hugging_face(tmp_path / "step1" / "merged"))) <= 1e-5

    group = hosts.start(policy_config(model, tuner_type="lora", lr=1e-2), 1)
    group.call("load", str(tmp_path / "step1"))
    assert largest_difference(group.logprobs(shards), adapted) <= 1e-5
