"""Checkpoints under another layout and in a new policy, LoRA, and options of a policy rank; real Ray actors."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import ray

from tests.policy_ranks import as_group, hugging_face, largest_difference, nan_loss, nll_loss, policy_config, shards_of
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
from tests.tiny import make_tiny_model

ADAPTER = "adapter_model.safetensors"
LORA = {"tuner_type": "lora", "lora_dropout": 0.05, "lr": 1e-2}


@pytest.fixture(scope="module")
def from_tp2(hosts, model, rows, source, tmp_path_factory):
    """A checkpoint of the first step under TP2 with sequence parallelism, and the second step: folder, metrics."""
    folder = tmp_path_factory.mktemp("tp2")
    group = hosts.start(policy_config(model, **TP2_SP), 2)
    shards = shards_of(rows, source, SPLITS[1])
    group.train_step(shards, nll_loss)
    group.call("save", str(folder / "step1"), 1)
    second = group.train_step(shards, nll_loss)
    group.call("save", str(folder / "step2"), 2)
    return folder, second


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"use_distributed_optimizer": True}, id="dp2"),
        pytest.param({"pipeline_model_parallel_size": 2}, id="pp2"),
        pytest.param(TP2_SP, id="tp2-sp"),
        pytest.param({}, id="one"),
    ],
)
def test_a_checkpoint_continues_under_another_layout(hosts, model, rows, source, from_tp2, tmp_path, request, layout):
    """The second step after a load differs from the uninterrupted one by rounding alone; under the same layout not at all."""
    folder, expected = from_tp2
    size = 1 if request.node.callspec.id == "one" else 2
    group = hosts.start(policy_config(model, **layout), size)
    assert group.call("load", str(folder / "step1")) == [1] * size
    metrics = group.train_step(shards_of(rows, source, SPLITS[group.data_size]), nll_loss)
    group.call("save", str(tmp_path), 2)
    weights, uninterrupted = weights_of(tmp_path), weights_of(folder / "step2")
    if layout == TP2_SP:
        assert metrics == expected
        assert_same_weights(weights, uninterrupted)
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert largest_difference(weights, uninterrupted) <= 2e-5


def test_a_run_that_goes_on_has_the_rates_that_it_is_given(hosts, model, rows, source, from_tp2, tmp_path):
    """Not the checkpoint's: a smaller step by as much, from the same moments."""
    folder, expected = from_tp2
    group = hosts.start(policy_config(model, lr=1e-4), 1)
    group.call("load", str(folder / "step1"))
    metrics = group.train_step(shards_of(rows, source, SPLITS[1]), nll_loss)
    assert metrics["lr"] == pytest.approx(expected["lr"] / 10)
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    group.call("save", str(tmp_path), 2)
    start, there, here = (weights_of(path) for path in (folder / "step1", folder / "step2", tmp_path))
    for name in start:
        np.testing.assert_allclose(10 * (here[name] - start[name]), there[name] - start[name], atol=1e-5)


def test_an_adapters_checkpoint_continues_under_another_layout(hosts, model, rows, source, tmp_path):
    """From 2 tensor ranks to 1 and to 2 stages: weights, Adam's moments and the next step differ by rounding alone."""
    shards, options = shards_of(rows, source, SPLITS[1]), LORA | {"lora_dropout": 0.0}
    group = hosts.start(policy_config(model, **options, **TP2_SP), 2)
    group.train_step(shards, nll_loss)
    group.call("save", str(tmp_path / "step1"), 1)
    steps = [group.train_step(shards, nll_loss) for _ in range(2)]
    group.call("save", str(tmp_path / "step3"), 3)
    expected = weights_of(tmp_path / "step3", ADAPTER)
    for layout in ({}, {"pipeline_model_parallel_size": 2}):
        group = hosts.start(policy_config(model, **options, **layout), 2 if layout else 1)
        group.call("load", str(tmp_path / "step1"))
        for step in steps:
            assert group.train_step(shards, nll_loss) == pytest.approx(step, rel=1e-4)
        group.call("save", str(tmp_path / f"again{len(layout)}"), 3)
        assert largest_difference(weights_of(tmp_path / f"again{len(layout)}", ADAPTER), expected) <= 1e-4


def test_saved_folder_loads_in_transformers(from_tp2, model):
    folder, _ = from_tp2
    from transformers import AutoTokenizer

    loaded = hugging_face(folder / "step2")
    assert_same_weights(dict(loaded.named_parameters()), weights_of(folder / "step2"))
    assert AutoTokenizer.from_pretrained(folder / "step2").chat_template == AutoTokenizer.from_pretrained(model).chat_template
    assert json.loads((folder / "step2" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("layout", [pytest.param({}, id="one"), pytest.param(TP2_SP, id="tp2-sp")])
def test_lora(hosts, model, rows, source, tmp_path, layout):
    size = 2 if layout else 1
    group = hosts.start(policy_config(model, **LORA, **layout), size)
    shards = shards_of(rows, source, SPLITS[1])
    base = group.logprobs(shards)
    first = group.train_step(shards, nll_loss)
    group.call("save", str(tmp_path / "step1"), 1)
    adapted, without = group.logprobs(shards), group.logprobs(shards, True)
    second = group.train_step(shards, nll_loss)
    group.call("save", str(tmp_path / "step2"), 2)

    assert first["loss"] > second["loss"]
    assert largest_difference(adapted, base) > 0.01
    assert_same(without, base)  # also bit for bit after the merge and its undoing
    hf = hugging_face(model)
    assert largest_difference(base, hf_logprobs(hf, rows)) <= 1e-5
    merged = hugging_face(tmp_path / "step1" / "merged")
    assert largest_difference(adapted, hf_logprobs(merged, rows)) <= 1e-5
    settings = json.loads((tmp_path / "step1" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(model)  # what infer and eval take when only the adapter is given
    from peft import PeftModel

    in_peft = PeftModel.from_pretrained(hf, tmp_path / "step1")
    assert largest_difference(adapted, hf_logprobs(in_peft, rows)) <= 1e-5

    group = hosts.start(policy_config(model, **LORA, **layout), size)  # weights, Adam and dropout come from the file
    assert group.call("load", str(tmp_path / "step1")) == [1] * size
    assert group.train_step(shards, nll_loss) == second
    group.call("save", str(tmp_path / "again"), 2)
    assert_same_weights(*(weights_of(tmp_path / name, ADAPTER) for name in ("again", "step2")))


def test_bfloat16_is_near_float32_and_continues_bit_for_bit(hosts, model, rows, source, tmp_path):
    """bfloat16 keeps 8 bits of a weight: logprobs of about -6 are off by a few hundredths."""
    config = policy_config(model, torch_dtype="bfloat16", deterministic=True, **TP2_SP)
    group = hosts.start(config, 2)
    shards = shards_of(rows, source, SPLITS[1])
    expected = hf_logprobs(hugging_face(model), rows)
    difference = [np.abs(values - expected[key]) for key, values in group.logprobs(shards).items()]
    assert np.concatenate(difference).mean() <= 0.03
    first = group.train_step(shards, nll_loss)
    group.call("save", str(tmp_path / "step1"), 1)
    second = group.train_step(shards, nll_loss)
    assert second["loss"] < first["loss"]
    assert json.loads((tmp_path / "step1" / "config.json").read_text())["dtype"] == "bfloat16"
    group = hosts.start(config, 2)
    group.call("load", str(tmp_path / "step1"))
    assert group.train_step(shards, nll_loss) == second


def test_rollout_logprobs_are_compared_with_the_policys(hosts, model, rows):
    """Responses of one prompt as GroupTokens, whose rollout logprobs are off by known amounts."""
    prompt = 4
    ids = tuple(np.concatenate([rows.token_ids[0][:prompt], ids[prompt:]]) for ids in rows.token_ids)
    masks = tuple(np.r_[np.zeros(prompt), np.ones(len(one) - prompt)].astype(np.float32) for one in ids)
    rows = replace(rows, token_ids=ids, loss_masks=masks)
    truth = hf_logprobs(hugging_face(model), rows)
    off = [np.full(len(one) - prompt, 0.01 * (item + 1), np.float32) for item, one in enumerate(ids)]
    rollout = [truth[100 + item][prompt:] + off[item] for item in range(ROWS)]
    group = hosts.start(policy_config(model, clip_grad=0.0, lr_warmup_fraction=0.5), 1)
    metrics = group.train_step(shards_of(rows, ray.put(as_group(rows, prompt, rollout)), SPLITS[1]), nll_loss)
    assert metrics["rollout_train_logprob_diff"] == pytest.approx(np.concatenate(off).mean(), abs=1e-5)
    assert metrics["max_rollout_train_logprob_diff"] == pytest.approx(0.08, abs=1e-5)
    assert metrics["entropy"] == pytest.approx(
        -np.concatenate([truth[100 + item][prompt:] for item in range(ROWS)]).mean(), rel=1e-5
    )
    assert metrics["count"] == sum(mask.sum() for mask in masks)
    assert metrics["grad_norm"] > 0  # measured without clipping too
    assert metrics["lr"] == 0  # the first of 5 warm-up steps


def test_learning_rate_follows_warm_up_and_cosine(hosts, model, rows, source):
    config = policy_config(model, train_iters=None, lr_warmup_fraction=0.25, min_lr=1e-4)
    group = hosts.start(config, 1)
    group.call("schedule", 8)
    shards = shards_of(rows, source, SPLITS[1])
    rates = [group.train_step(shards, nll_loss)["lr"] for _ in range(6)]
    cosine = [1e-4 + 9e-4 * 0.5 * (1 + np.cos(np.pi * k / 6)) for k in range(4)]
    assert rates == pytest.approx([0, 5e-4, *cosine], rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "size", "layout"),
    [
        pytest.param({"tie_word_embeddings": True}, 2, {"pipeline_model_parallel_size": 2}, id="tied-pp2"),
        pytest.param({"tie_word_embeddings": True}, 2, {"tensor_model_parallel_size": 2}, id="tied-tp2"),
        pytest.param({"vocab_size": 511}, 2, {"tensor_model_parallel_size": 2}, id="odd-vocabulary-tp2"),
        pytest.param({"vocab_size": 511}, 2, TP2_SP | {"cross_entropy_loss_fusion": False}, id="odd-vocabulary-unfused"),
    ],
)
def test_other_vocabularies(hosts, rows, tmp_path, overrides, size, layout):
    """Tied embeddings, and a vocabulary that tensor parallelism has to pad: logprobs, gradient norm and export are right."""
    model = make_tiny_model(tmp_path / "model", **overrides)
    rows = replace(rows, token_ids=tuple(np.minimum(ids, 510) for ids in rows.token_ids))
    hf = hugging_face(model)
    group = hosts.start(policy_config(model, **layout), size)
    shards = shards_of(rows, ray.put(rows), SPLITS[1])
    assert largest_difference(group.logprobs(shards), hf_logprobs(hf, rows)) <= 1e-5
    group.call("save", str(tmp_path / "saved"), 0)
    assert_same_weights(weights_of(tmp_path / "saved"), weights_of(model))
    nll(hf, rows).backward()
    assert group.train_step(shards, nll_loss)["grad_norm"] == pytest.approx(gradient_norm(hf), rel=1e-5)


def test_a_frozen_reference_has_its_own_sizes(hosts, model, rows, source):
    config = policy_config(model, tensor_model_parallel_size=2)
    config.reference.tensor_model_parallel_size = 1
    group = hosts.start(config, 2, frozen="reference")
    assert group.data_size == 2
    logprobs = group.logprobs(shards_of(rows, source, SPLITS[2]))
    assert largest_difference(logprobs, hf_logprobs(hugging_face(model), rows)) <= 1e-5


def test_what_no_save_leaves_out(hosts, model, rows, source, tmp_path):
    group = hosts.start(policy_config(model, no_save_optim=True, no_save_rng=True, save_safetensors=False), 1)
    shards = shards_of(rows, source, SPLITS[1])
    group.train_step(shards, nll_loss)
    group.call("save", str(tmp_path), 1)
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= {"mcore", "config.json", "tokenizer.json", "tensors.json"}
    assert not [name for name in written if name.endswith(".safetensors")]
    second = group.train_step(shards, nll_loss)
    group = hosts.start(policy_config(model), 1)
    group.call("load", str(tmp_path))
    resumed = group.train_step(shards, nll_loss)
    assert resumed["loss"] == second["loss"]
    assert resumed["lr"] == 1e-3  # the schedule started again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_backend": "local"}, "attention_backend local"),
        ({"lr_warmup_iters": 10}, "warm-up of 10 steps .* 10 steps"),
        ({"tensor_model_parallel_size": 3}, "1 ranks do not divide"),
    ],
)
def test_wrong_options_are_refused(hosts, model, options, message):
    with pytest.raises(ValueError, match=message):
        hosts.start(policy_config(model, **options), 1)


def test_a_loss_that_is_not_finite_names_the_step(hosts, model, rows, source):
    group = hosts.start(policy_config(model), 1)
    with pytest.raises(FloatingPointError, match="optimizer step 1, policy rank 0: loss nan"):
        group.train_step(shards_of(rows, source, SPLITS[1]), nan_loss)


def assert_same(a: dict[int, np.ndarray], b: dict[int, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[key], b[key]) for key in a)
