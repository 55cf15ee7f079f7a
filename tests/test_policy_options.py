"""Overlapped communication, modules that are trained whole beside adapters, and continuing without a part of the state."""

from __future__ import annotations

import numpy as np
import pytest

from tests.policy_ranks import hugging_face, largest_difference, nll_loss, policy_config, shards_of
from tests.row_batch import SPLITS, TP2_SP, hf_logprobs, weights_of

NO_CLIPPING = {"clip_grad": 1e6}  # the norm sums in the order of the buckets, and its rounding would be in every update
SMALL_BUCKETS = {"bucket_size": 20000}  # parameters: about a tenth of the model
WHOLE = {"tuner_type": "lora", "lr": 1e-2, "modules_to_save": ["word_embeddings", "output_layer"]}


@pytest.mark.parametrize(
    ("options", "overlapped"),
    [
        pytest.param({}, {"overlap_grad_reduce": True, "overlap_param_gather": True}, id="distributed"),
        pytest.param({"use_distributed_optimizer": False}, {"overlap_grad_reduce": True}, id="whole"),
        pytest.param({"tuner_type": "lora", "lr": 1e-2}, {"overlap_grad_reduce": True, "overlap_param_gather": True}, id="lora"),
    ],
)
def test_overlapping_changes_no_number(hosts, model, source, rows, tmp_path, options, overlapped):
    """Three steps on two data ranks, two micro batches each, in several buckets; logprobs and checkpoints right after updates."""
    results = []
    for name, extra in (("plain", {}), ("overlapped", overlapped | {"megatron": SMALL_BUCKETS})):
        group = hosts.start(policy_config(model, **NO_CLIPPING, **options, **extra), 2)
        shards = shards_of(rows, source, SPLITS[2])
        steps = [group.train_step(shards, nll_loss) for _ in range(2)]
        group.call("save", str(tmp_path / name / "2"), 2)
        steps.append(group.train_step(shards, nll_loss))
        logprobs = group.logprobs(shards)
        group.call("save", str(tmp_path / name / "3"), 3)
        results.append((steps, logprobs))
    (plain, logprobs), (other, logprobs_again) = results
    for step, again in zip(plain, other):
        assert again == pytest.approx(step, rel=1e-6)
    assert largest_difference(logprobs, logprobs_again) <= 1e-6
    merged = "merged" if "tuner_type" in options else "."
    for number in "23":
        a, b = (weights_of(tmp_path / name / number / merged) for name in ("plain", "overlapped"))
        assert largest_difference(a, b) <= 1e-6


def test_weights_of_an_overlapped_gather_leave_the_device_and_are_pushed_complete(hosts, model, source, rows, tmp_path):
    """`leave_device` takes weights away while they would still be on their way."""
    overlapped = {"overlap_grad_reduce": True, "overlap_param_gather": True, "megatron": SMALL_BUCKETS}
    saved = []
    for name, extra in (("plain", {}), ("overlapped", overlapped)):
        group = hosts.start(policy_config(model, offload_model=True, **extra), 2)
        group.train_step(shards_of(rows, source, SPLITS[2]), nll_loss)
        group.call("leave_device", True)
        group.call("enter_device")
        group.call("save", str(tmp_path / name), 1)
        saved.append(weights_of(tmp_path / name))
    assert largest_difference(*saved) <= 1e-6


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({}, id="one"),
        pytest.param(TP2_SP, id="tp2-sp", marks=pytest.mark.slow),
        pytest.param({"pipeline_model_parallel_size": 2}, id="pp2"),
    ],
)
def test_modules_to_save_are_trained_whole(hosts, model, rows, source, tmp_path, layout):
    """Embeddings and output layer move with the adapters, come back from a checkpoint, and are in what PEFT reads."""
    config, size = policy_config(model, **WHOLE, **layout), 2 if layout else 1
    group = hosts.start(config, size)
    shards = shards_of(rows, source, SPLITS[1])
    base = group.logprobs(shards)
    first = group.train_step(shards, nll_loss)
    group.call("save", str(tmp_path / "step1"), 1)
    adapted, without = group.logprobs(shards), group.logprobs(shards, True)
    second = group.train_step(shards, nll_loss)
    assert second["loss"] < first["loss"]
    assert all(np.array_equal(without[key], base[key]) for key in base)
    hf = hugging_face(model)
    merged = weights_of(tmp_path / "step1" / "merged")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert (merged[name] - hf.get_parameter(name)).abs().max() > 1e-3
    assert largest_difference(adapted, hf_logprobs(hugging_face(tmp_path / "step1" / "merged"), rows)) <= 1e-5
    from peft import PeftModel

    assert largest_difference(adapted, hf_logprobs(PeftModel.from_pretrained(hf, tmp_path / "step1"), rows)) <= 1e-5
    group = hosts.start(config, size)
    group.call("load", str(tmp_path / "step1"))
    assert group.train_step(shards, nll_loss) == second


def test_continuing_without_optimizer_or_random_states(hosts, model, rows, source, tmp_path):
    """The second step of an adapter: dropout draws other numbers without the random states, Adam starts anew without its own."""
    options = {"tuner_type": "lora", "lora_dropout": 0.3, "lr": 1e-2}
    group = hosts.start(policy_config(model, **options), 1)
    shards = shards_of(rows, source, SPLITS[1])
    group.train_step(shards, nll_loss)
    group.call("save", str(tmp_path / "one"), 1)
    second, third = (group.train_step(shards, nll_loss) for _ in range(2))
    resumed = {}
    for name in ("no_load_optim", "no_load_rng"):
        group = hosts.start(policy_config(model, **options, **{name: True}), 1)
        assert group.call("load", str(tmp_path / "one")) == [1]
        resumed[name] = [group.train_step(shards, nll_loss) for _ in range(2)]
    assert resumed["no_load_optim"][0]["loss"] == second["loss"]
    assert resumed["no_load_optim"][0]["lr"] > second["lr"]  # the schedule starts again
    assert resumed["no_load_optim"][1]["loss"] != third["loss"]
    assert resumed["no_load_rng"][0]["loss"] != second["loss"]
    assert resumed["no_load_rng"][0]["lr"] == second["lr"]
