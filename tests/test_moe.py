"""Mixture-of-experts models against Hugging Face in float32, their experts split and whole; real Ray actors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from peft import PeftModel

from tests.policy_ranks import hugging_face, largest_difference, nll_loss, policy_config, shards_of
from tests.row_batch import (
    ROWS,
    SPLITS,
    TP2_SP,
    assert_same_weights,
    gradient_norm,
    hf_logprobs,
    nll,
    weights_of,
)
from tests.tiny import make_tiny_moe

EP2 = {"expert_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "ep2": EP2,
    "ep2-overlap": EP2 | {"overlap_grad_reduce": True, "overlap_param_gather": True, "megatron": {"bucket_size": 20000}},
    "tp2-ep2": TP2_SP | EP2,
    "tp2-etp2": TP2_SP | {"expert_tensor_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
}


@dataclass
class Reference:
    """What Hugging Face and autograd say."""

    logprobs: dict[int, np.ndarray]
    loss: float
    grad_norm: float


@dataclass
class Measured:
    """What the ranks of one layout gave."""

    logprobs: dict[int, np.ndarray]
    first: dict[str, float]
    second: dict[str, float]
    again: dict[str, float]  # the second step in a new policy that loaded the checkpoint of the first
    folder: Path  # step0, step2, again


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_moe(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(model, rows) -> Reference:
    hf = hugging_face(model)
    loss = nll(hf, rows)
    loss.backward()
    return Reference(logprobs=hf_logprobs(hf, rows), loss=loss.item(), grad_norm=gradient_norm(hf))


@pytest.fixture(scope="module")
def measured(hosts, model, source, rows, tmp_path_factory):
    """`measured(layout)`: the figures of a layout, each measured once."""
    done: dict[str, Measured] = {}

    def get(layout: str) -> Measured:
        if layout not in done:
            done[layout] = measure(hosts, layout, model, rows, source, tmp_path_factory.mktemp(layout))
        return done[layout]

    return get


def measure(hosts, layout, model, rows, source, folder) -> Measured:
    config, size = policy_config(model, **LAYOUTS[layout]), 1 if layout == "one" else 2
    group = hosts.start(config, size)
    shards = shards_of(rows, source, SPLITS[group.data_size])
    logprobs = group.logprobs(shards)
    group.call("save", str(folder / "step0"), 0)
    first = group.train_step(shards, nll_loss)
    group.call("save", str(folder / "step1"), 1)
    second = group.train_step(shards, nll_loss)
    group.call("save", str(folder / "step2"), 2)
    group = hosts.start(config, size)
    group.call("load", str(folder / "step1"))
    again = group.train_step(shards, nll_loss)
    group.call("save", str(folder / "again"), 2)
    return Measured(logprobs=logprobs, first=first, second=second, again=again, folder=folder)


SLOW = ("ep2-overlap", "tp2-etp2")
all_layouts = pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LAYOUTS]
)


@all_layouts
def test_logprobs_equal_hugging_face(measured, reference, layout):
    assert largest_difference(measured(layout).logprobs, reference.logprobs) <= 1e-5


@all_layouts
def test_loss_and_gradient_norm_equal_autograd(measured, reference, layout):
    metrics = measured(layout).first
    assert metrics["loss"] == pytest.approx(reference.loss, abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(reference.grad_norm, rel=1e-5)


@all_layouts
def test_export_of_untrained_weights_equals_the_source_exactly(measured, model, layout):
    assert_same_weights(weights_of(measured(layout).folder / "step0"), weights_of(model))


@all_layouts
def test_two_steps_equal_those_of_one_rank(measured, layout):
    """Adam's first step divides a gradient by its size: where that is near epsilon (1e-6) rounding of 1e-8 is seen 1000-fold."""
    assert measured(layout).second["grad_norm"] == pytest.approx(measured("one").second["grad_norm"], rel=1e-4)
    assert largest_difference(weights_of(measured(layout).folder / "step2"), weights_of(measured("one").folder / "step2")) <= 5e-5


@all_layouts
def test_training_continues_bit_for_bit_after_loading(measured, layout):
    result = measured(layout)
    assert result.again == result.second
    assert_same_weights(weights_of(result.folder / "again"), weights_of(result.folder / "step2"))


def test_a_checkpoint_of_split_experts_continues_under_another_layout(hosts, model, rows, source, measured):
    split = measured("tp2-ep2")
    group = hosts.start(policy_config(model, **EP2), 2)
    assert group.call("load", str(split.folder / "step1")) == [1, 1]
    assert group.train_step(shards_of(rows, source, SPLITS[2]), nll_loss) == pytest.approx(split.second, rel=1e-5)


@pytest.mark.slow
def test_optimizer_state_of_split_experts_is_refused_on_one_rank(hosts, model, rows, source, measured):
    folder = str(measured("ep2").folder / "step1")
    with pytest.raises(ValueError, match="parallel_size above 1, the run has expert_model_parallel_size 1.*no_load_optim"):
        hosts.start(policy_config(model), 1).call("load", folder)
    group = hosts.start(policy_config(model, no_load_optim=True), 1)
    group.call("load", folder)
    resumed = group.train_step(shards_of(rows, source, SPLITS[1]), nll_loss)
    assert resumed["loss"] == pytest.approx(measured("ep2").second["loss"], abs=1e-6)
    assert resumed["lr"] == 1e-3  # the schedule started again


@pytest.mark.parametrize("layout", [{}, EP2, TP2_SP | EP2], ids=["one", "ep2", "tp2-ep2"])
def test_router_losses_have_the_gradient_and_the_value_of_autograd(hosts, model, rows, source, layout):
    """Weighted 0.5 and 0.01, with one micro batch a data rank: means over each one's tokens, then over ranks by their tokens."""
    size = 2 if layout else 1
    group = hosts.start(policy_config(model, moe_aux_loss_coeff=0.5, moe_z_loss_coeff=0.01, **layout), size)
    split = {1: [[list(range(ROWS))]], 2: [[[0, 1, 2]], [[3, 4, 5, 6, 7]]]}[group.data_size]
    metrics = group.train_step(shards_of(rows, source, split), nll_loss)
    hf = hugging_face(model)
    loss = nll(hf, rows)
    balancing, z_loss = [], []
    total = sum(map(len, rows.token_ids))
    for (items,) in split:
        aux, z = router_losses(hf, [rows.token_ids[item] for item in items])
        share = sum(len(rows.token_ids[item]) for item in items) / total
        loss = loss + share * (0.5 * aux.sum() + 0.01 * z.sum())
        balancing.append(aux.mean().item())
        z_loss.append(z.mean().item())
    loss.backward()
    assert metrics["grad_norm"] == pytest.approx(gradient_norm(hf), rel=1e-4)
    assert metrics["load_balancing_loss"] == pytest.approx(np.mean(balancing), rel=1e-5)
    assert metrics["z_loss"] == pytest.approx(np.mean(z_loss), rel=1e-5)


def test_router_losses_do_not_grow_with_the_number_of_micro_batches(hosts, model, rows):
    """The same four rows in one micro batch, and in two of equal content: with a loss of 0 the gradient is the routers' alone."""
    half = [0, 1]
    ids, masks = ([values[item] for item in half * 2] for values in (rows.token_ids, rows.loss_masks))
    rows = type(rows)(token_ids=tuple(ids), loss_masks=tuple(masks))
    norms = []
    for split in ([[[0, 1, 2, 3]]], [[[0, 1], [2, 3]]]):
        group = hosts.start(policy_config(model, moe_aux_loss_coeff=0.5), 1)
        norms.append(group.train_step(shards_of(rows, ray.put(rows), split), zero_loss)["grad_norm"])
    assert norms[0] > 1e-4
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_saved_folder_loads_in_transformers(hosts, model, rows, source, measured):
    """With the logprobs that the policy has."""
    folder = measured("ep2").folder
    group = hosts.start(policy_config(model, **EP2), 2)
    group.call("load", str(folder / "step2"))
    logprobs = group.logprobs(shards_of(rows, source, SPLITS[2]))
    assert largest_difference(logprobs, hf_logprobs(hugging_face(folder / "step2"), rows)) <= 1e-5


@pytest.mark.parametrize(
    "layout",
    [pytest.param({}, id="one"), pytest.param(EP2, id="ep2"), pytest.param(TP2_SP | EP2, id="tp2-ep2", marks=pytest.mark.slow)],
)
def test_lora(hosts, model, rows, source, tmp_path, layout):
    config = policy_config(model, tuner_type="lora", lora_dropout=0.05, lr=1e-2, **layout)
    size = 2 if layout else 1
    group = hosts.start(config, size)
    shards = shards_of(rows, source, SPLITS[group.data_size])
    base = group.logprobs(shards)
    first = group.train_step(shards, nll_loss)
    group.call("save", str(tmp_path / "step1"), 1)
    adapted, without = group.logprobs(shards), group.logprobs(shards, True)
    second = group.train_step(shards, nll_loss)
    assert second["loss"] < first["loss"]
    assert largest_difference(adapted, base) > 0.01
    assert all(np.array_equal(without[key], base[key]) for key in base)
    merged = hugging_face(tmp_path / "step1" / "merged")
    assert largest_difference(adapted, hf_logprobs(merged, rows)) <= 1e-5
    in_peft = PeftModel.from_pretrained(hugging_face(model), tmp_path / "step1")
    assert largest_difference(adapted, hf_logprobs(in_peft, rows)) <= 1e-5
    adapter = weights_of(tmp_path / "step1", "adapter_model.safetensors")
    assert any(".experts.7.down_proj.lora_B" in name and tensor.abs().max() > 0 for name, tensor in adapter.items())
    group = hosts.start(config, size)
    group.call("load", str(tmp_path / "step1"))
    assert group.train_step(shards, nll_loss) == second


def test_recomputation_counts_router_losses_once(hosts, model, rows, source):
    shards, results = shards_of(rows, source, SPLITS[1]), []
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    for options in ({"recompute_granularity": "none"}, full, {"recompute_modules": ["core_attn", "moe"]}):
        group = hosts.start(policy_config(model, moe_aux_loss_coeff=0.5, moe_z_loss_coeff=0.01, **options), 1)
        results.append(group.train_step(shards, nll_loss))
    assert results[1] == pytest.approx(results[0], rel=1e-6)
    assert results[2] == pytest.approx(results[0], rel=1e-6)


def test_experts_with_a_capacity_pass_tokens_by(hosts, model, rows, source, reference):
    """8 experts, 2 a token: at factor 4 an expert has room for every token, at 0.5 for an eighth of them."""
    padded = {"moe_expert_capacity_factor": 4.0, "moe_pad_expert_input_to_capacity": True}
    group = hosts.start(policy_config(model, **padded), 1)
    losses = {"padded": group.train_step(shards_of(rows, source, SPLITS[1]), nll_loss)["loss"]}
    for name, options in {
        "roomy": {"moe_expert_capacity_factor": 4.0},
        "tight": {"moe_expert_capacity_factor": 0.5},
        "position": {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "position"},
        "fp64": {"moe_router_dtype": "fp64"},
    }.items():
        group = hosts.start(policy_config(model, **EP2, **options), 2)
        losses[name] = group.train_step(shards_of(rows, source, SPLITS[2]), nll_loss)["loss"]
    for name in ("padded", "roomy", "fp64"):
        assert losses[name] == pytest.approx(reference.loss, abs=1e-6)
    assert abs(losses["tight"] - reference.loss) > 1e-3
    assert abs(losses["position"] - losses["tight"]) > 1e-4


@pytest.mark.parametrize("layout", [EP2, TP2_SP | EP2], ids=["ep2", "tp2-ep2"])
def test_a_shared_expert(hosts, rows, source, tmp_path, layout):
    """Qwen2-MoE: a gated expert beside the others, biases of queries, keys and values, router weights that do not add to 1."""
    model = make_tiny_moe(
        tmp_path / "model", family="Qwen2Moe", shared_expert_intermediate_size=48, norm_topk_prob=False, qkv_bias=True
    )
    hf = hugging_face(model)
    group = hosts.start(policy_config(model, **layout), 2)
    shards = shards_of(rows, source, SPLITS[group.data_size])
    assert largest_difference(group.logprobs(shards), hf_logprobs(hf, rows)) <= 1e-5
    group.call("save", str(tmp_path / "saved"), 0)
    assert_same_weights(weights_of(tmp_path / "saved"), weights_of(model))
    nll(hf, rows).backward()
    assert group.train_step(shards, nll_loss)["grad_norm"] == pytest.approx(gradient_norm(hf), rel=1e-5)


def zero_loss(logprobs, batch):
    return 0 * logprobs.sum(), {}


def router_losses(hf, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each layer, over the tokens of all rows: E * sum of f * P, and the mean of logsumexp(logits)^2; [layers] both."""
    results = [hf(input_ids=torch.from_numpy(ids.astype(np.int64))[None], output_router_logits=True) for ids in rows]
    aux, z = [], []
    for logits in (torch.cat(parts) for parts in zip(*(result.router_logits for result in results))):
        experts, probs = logits.shape[-1], logits.softmax(-1)
        chosen = torch.zeros_like(probs).scatter(1, probs.topk(hf.config.num_experts_per_tok).indices, 1)
        aux.append(experts * (chosen.mean(0) / hf.config.num_experts_per_tok * probs.mean(0)).sum())
        z.append(logits.logsumexp(-1).square().mean())
    return torch.stack(aux), torch.stack(z)
