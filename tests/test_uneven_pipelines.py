"""Stages of unequal size: how layers are spread, what is refused, what a stage holds, and real ranks against Hugging Face."""

# ruff: noqa: E501 - whole messages

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.config import Config, FrozenRole
from rlhf.memory import frozen_memory, policy_memory
from rlhf.model_folder import read_shape
from rlhf.options import load_config
from rlhf.pipeline import Pipeline
from rlhf.resolution import resolve
from tests.model_json import QWEN25_7B, TINY, write_model
from tests.policy_ranks import hugging_face, largest_difference, nll_loss, policy_config, shards_of
from tests.row_batch import SPLITS, assert_same_weights, hf_logprobs, weights_of
from tests.tiny import make_tiny_model, make_tiny_moe

UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
FIRST = {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 2}  # 2 and 1 of 3 layers
LAST = {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 2}  # 1 and 2


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("NPROC_PER_NODE", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("pipeline", "layers", "stages"),
    [
        (Pipeline(size=4), 8, [2, 2, 2, 2]),
        (Pipeline(size=2, first=25), 48, [25, 23]),
        (Pipeline(size=4, last=1), 61, [20, 20, 20, 1]),
        (Pipeline(size=3, first=10, last=13), 48, [10, 25, 13]),
        (Pipeline(size=2, first=2, last=1), 3, [2, 1]),
    ],
)
def test_layers_of_the_stages(pipeline, layers, stages):
    assert pipeline.stages(layers) == stages


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--decoder_first_pipeline_num_layers 2",
            "decoder_first_pipeline_num_layers 2 needs --pipeline_model_parallel_size 2 or more",
        ),
        (
            "--pipeline_model_parallel_size 2 --decoder_last_pipeline_num_layers 6",
            "decoder_last_pipeline_num_layers 6: of the model's 6 layers 0 are left, which the other stages (1) cannot share evenly",
        ),
        (
            "--pipeline_model_parallel_size 3 --decoder_first_pipeline_num_layers 1",
            "decoder_first_pipeline_num_layers 1: of the model's 6 layers 5 are left, which the other stages (2) cannot share evenly",
        ),
        (
            "--pipeline_model_parallel_size 2 --decoder_first_pipeline_num_layers 4 --decoder_last_pipeline_num_layers 1",
            "decoder_first_pipeline_num_layers 4 and decoder_last_pipeline_num_layers 1: of the model's 6 layers 1 are left, which "
            "the other stages (0) cannot share evenly",
        ),
        (
            "--pipeline_model_parallel_size 2 --decoder_first_pipeline_num_layers 4 --recompute_granularity full "
            "--recompute_method uniform --recompute_num_layers 4",
            "recompute_num_layers 4 does not divide the 2 layers of a rank, as recompute_method uniform needs",
        ),
        (
            "--pipeline_model_parallel_size 2 --decoder_first_pipeline_num_layers 4 --recompute_granularity full "
            "--recompute_method block --recompute_num_layers 5",
            "recompute_num_layers 5 is more than the 4 layers of a rank",
        ),
    ],
)
def test_what_is_refused(tmp_path, words, message):
    write_model(tmp_path / "model", TINY | {"num_hidden_layers": 6})
    (tmp_path / "d.jsonl").write_text("{}\n")
    with pytest.raises(ValueError) as caught:
        load_config(f"sft --model model --dataset d.jsonl --train_iters 4 {words}".split())
    assert str(caught.value) == message


@pytest.fixture
def published(tmp_path):
    """A resolved GRPO run of Qwen2.5-7B in two stages, micro batches of one sequence of 2048 tokens."""

    def published(**options) -> Config:
        folder = write_model(tmp_path / "model", QWEN25_7B)
        base = Config(
            task="grpo", model=str(folder), dataset=["d"], reward_funcs=["accuracy"], train_iters=3, max_length=1536,
            pipeline_model_parallel_size=2, nproc_per_node=2,
        )  # fmt: skip
        return resolve(replace(base, **options), read_shape(folder))

    return published


LAYER = 3584 * (3584 + 2 * 512) + (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944 + 2 * 3584  # parameters
KEPT = 4 * 3584 + 2 * (3584 + 512) + 512 + 3584 + 3 * 18944  # numbers a token
MATRIX = 152064 * 3584


def test_memory_is_that_of_the_fullest_stage(published):
    shape = read_shape(Path(published().model))
    config = published(decoder_first_pipeline_num_layers=20)
    memory = policy_memory(config, shape)
    assert memory.weights == 2 * (20 * LAYER + MATRIX)
    assert memory.gradients == 2 * memory.weights
    assert memory.activations == 2048 * 2 * 20 * KEPT * 2  # the first stage has two micro batches
    late = policy_memory(published(decoder_last_pipeline_num_layers=20), shape)
    assert late.weights == 2 * (20 * LAYER + MATRIX + 3584)
    assert late.activations == 2048 * (20 * KEPT * 2 + 152064 * 14)  # the last one has one and the logits: more than 2 x 8 layers
    adapters = 8 * (3584 + 3584 + 2 * 512)
    lora = policy_memory(published(decoder_first_pipeline_num_layers=20, tuner_type="lora", target_modules=["linear_qkv"]), shape)
    assert lora.gradients == 4 * 20 * adapters


def test_a_reference_has_the_policys_stages_unless_its_own_are_given(published):
    config = published(decoder_first_pipeline_num_layers=20, beta=0.04)
    shape = read_shape(Path(config.model))
    assert frozen_memory(config, shape).weights == 2 * (20 * LAYER + MATRIX)
    for own in (FrozenRole(model=config.model), FrozenRole(model=config.model, pipeline_model_parallel_size=2)):
        assert frozen_memory(replace(config, reference=own), shape).weights == 2 * (14 * LAYER + MATRIX + 3584)
    one = FrozenRole(pipeline_model_parallel_size=1)
    assert frozen_memory(replace(config, reference=one), shape).weights == 2 * 7_615_616_512


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(make_tiny_model, UNIFORM, id="dense"),
        pytest.param(make_tiny_moe, {"moe_aux_loss_coeff": 1e-2}, id="experts", marks=pytest.mark.slow),
    ],
)
def test_a_run_in_uneven_stages_equals_hugging_face_and_continues_in_others(hosts, rows, source, tmp_path, make, options):
    """Two stages of 2 and 1 layers; then one rank, and stages of 1 and 2, go on from the first step's checkpoint."""
    model = make(tmp_path / "model", num_hidden_layers=3)
    shards = shards_of(rows, source, SPLITS[1])
    group = hosts.start(policy_config(model, temperature=1.0, **options, **FIRST), 2)
    found = group.logprobs(shards)
    hf = hugging_face(model)
    assert largest_difference(found, hf_logprobs(hf, rows, temperature=1.0)) <= 2e-5
    group.call("save", str(tmp_path / "step0"), 0)
    assert_same_weights(weights_of(tmp_path / "step0"), weights_of(model))
    group.train_step(shards, nll_loss)
    group.call("save", str(tmp_path / "step1"), 1)
    second = group.train_step(shards, nll_loss)
    group.call("save", str(tmp_path / "step2"), 2)
    weights = weights_of(tmp_path / "step2")
    for name, layout in {"one": {}, "last": LAST}.items():
        group = hosts.start(policy_config(model, temperature=1.0, **options, **layout), 2 if layout else 1)
        group.call("load", str(tmp_path / "step1"))
        assert group.train_step(shards, nll_loss) == pytest.approx(second, rel=1e-5)
        group.call("save", str(tmp_path / name), 2)
        assert largest_difference(weights_of(tmp_path / name), weights) <= 2e-5


def test_a_reference_scores_in_uneven_stages(hosts, rows, source, tmp_path):
    model = make_tiny_model(tmp_path / "model", num_hidden_layers=3)
    shards = shards_of(rows, source, SPLITS[1])
    group = hosts.start(policy_config(model, temperature=1.0, **LAST), 2, frozen="reference")
    assert largest_difference(group.logprobs(shards), hf_logprobs(hugging_face(model), rows, temperature=1.0)) <= 1e-5
