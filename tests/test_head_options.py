"""Commands of the tasks with a head: the task that an option names, defaults from the model, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlhf.config import Config
from rlhf.counts import reward_names
from rlhf.heads import head_of
from rlhf.memory import GIB, policy_memory, reward_model_memory, shapes
from rlhf.options import load_config
from rlhf.phases import RANK_CONTEXT, holdings
from rlhf.plan import plan, render
from rlhf.resolution import resolve
from tests.model_json import QWEN25_7B, TINY, write_model
from tests.test_plan import CPU

CLASSES = {**TINY, "architectures": ["Qwen3ForSequenceClassification"]}
LABELS = {"id2label": {"0": "bad", "1": "so", "2": "good"}, "problem_type": "multi_label_classification"}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    for name in ("NPROC_PER_NODE", "RAY_JOB_CONFIG_JSON_ENV_VAR", "MEGARAY_OUTPUT_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "m", TINY)
    write_model(tmp_path / "classes", CLASSES | LABELS)
    write_model(tmp_path / "score", CLASSES | {"id2label": {"0": "LABEL_0"}})
    write_model(tmp_path / "vectors", {**TINY, "architectures": ["Qwen3Model"]})
    (tmp_path / "d.jsonl").write_text("{}\n")
    return tmp_path


def config_of(words: str) -> Config:
    return load_config([*words.split(), "--dataset", "d.jsonl", "--train_iters", "2"])


@pytest.mark.parametrize(
    ("words", "task", "head", "loss"),
    [
        ("rlhf --rlhf_type rm --model m", "rm", ("seq_cls", 1, None), None),
        ("sft --task_type seq_cls --model m --num_labels 3", "seq_cls", ("seq_cls", 3, "single_label_classification"), None),
        ("sft --task_type seq_cls --model m --num_labels 1", "seq_cls", ("seq_cls", 1, "regression"), None),
        ("sft --task_type seq_cls --model classes", "seq_cls", ("seq_cls", 3, "multi_label_classification"), None),
        ("sft --task_type reranker --model score", "reranker", ("seq_cls", 1, None), "pointwise_reranker"),
        ("sft --task_type embedding --model vectors", "embedding", ("embedding", None, None), "infonce"),
        (
            "sft --task_type generative_reranker --model m --loss_type listwise_reranker",
            "generative_reranker",
            ("generative_reranker", None, None),
            "listwise_reranker",
        ),
        ("sft --task_type causal_lm --model m", "sft", ("causal_lm", None, None), None),
    ],
)
def test_the_task_and_its_head(words, task, head, loss):
    config = config_of(words)
    found = head_of(config)
    assert (config.task, config.loss_type) == (task, loss)
    assert (found.kind, found.num_labels, found.problem_type) == head


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sft --task_type seq_cls --model m", "--num_labels is missing: the number of classes, or 1 for a regression"),
        (
            "sft --task_type seq_cls --model classes --num_labels 2",
            "ends in a head of 3 labels, seq_cls is to have 2: give --num_labels 3, or the model",
        ),
        ("rlhf --rlhf_type rm --model classes", "a head of 3 labels, rm is to have 1: give the model that it was made from"),
        ("sft --model classes", "no output layer for tokens (it is a ...ForSequenceClassification), which sft needs"),
        ("sft --task_type generative_reranker --model vectors", "(it is a ...Model), which generative_reranker needs"),
        ("sft --task_type embeding --model m", "--task_type embeding: choose from causal_lm, seq_cls, embedding, reranker,"),
        ('sft --task_type embedding --model m --mrl_dims {"65":1}', "mrl_dims 65: 1: embeddings have 64 numbers, weights"),
        ("sft --task_type embedding --model m --mrl_dims 64", "--mrl_dims takes pairs such as {1: 2}, not '64'"),
        ('sft --task_type embedding --model m --mrl_dims {"half":1}', "--mrl_dims takes a whole number, not 'half'"),
        ("sft --task_type embedding --model m --loss_type sigmoid", "loss_type 'sigmoid' of embedding: choose from infonce,"),
        ("sft --model m --num_labels 2", "--num_labels is not used by sft; it belongs to seq_cls"),
        ("sft --task_type reranker --model m --packing true --packing_length 9 --max_length 10", "packing_length 9 is less than"),
        ("rlhf --rlhf_type dpo --model m --center_rewards_coefficient 1", "--center_rewards_coefficient is not used by dpo"),
        (
            "sft --task_type seq_cls --model m --num_labels 1 --problem_type single_label_classification",
            "num_labels 1 leaves single_label_classification nothing to learn",
        ),
        ("rlhf --rlhf_type grpo --model m --reward_model classes", "classes has a head of 3 labels: a reward is one number"),
        ("rlhf --rlhf_type grpo --model m --reward_model m", "m has no head of scores: a reward is one number"),
        ("rlhf --rlhf_type grpo --model m --reward_model nowhere", "--reward_model nowhere: no such folder"),
        (
            "rlhf --rlhf_type grpo --model m --reward_model score --reward_funcs format --reward_weights 1",
            "1 reward_weights for 1 reward_funcs and a reward model",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(words, message):
    with pytest.raises(ValueError) as caught:
        config_of(words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("task", ["infer", "rollout"])
def test_engines_refuse_a_model_that_does_not_write(task):
    with pytest.raises(ValueError, match=f"no output layer for tokens .*ForSequenceClassification.*which {task} needs"):
        load_config([task, "--model", "classes"])


def test_a_reward_model_alone_is_a_reward():
    config = config_of("rlhf --rlhf_type grpo --model m --reward_model score --reward_weights 2")
    assert config.reward_funcs == [] and config.reward_model.endswith("score")


def test_dimensions_of_embeddings_are_read_as_ms_swift_reads_them(folder):
    words = "sft --task_type embedding --model m --dataset d.jsonl --train_iters 2"
    assert load_config([*words.split(), "--mrl_dims", '{"32": 1.0, "64": 0.5}']).mrl_dims == {32: 1.0, 64: 0.5}
    (folder / "c.yaml").write_text("mrl_dims: {32: 1, 64: 0.5}")
    assert load_config([*words.split(), "--config", "c.yaml"]).mrl_dims == {32: 1.0, 64: 0.5}


def test_a_reward_model_is_named_by_its_folder_or_its_run(folder):
    score = CLASSES | {"id2label": {"0": "LABEL_0"}}
    for run in ("rm", "format"):
        write_model(folder / run / "checkpoint-80", score)
    base = "rlhf --rlhf_type grpo --model m --reward_funcs format --reward_model"
    assert reward_names(config_of(f"{base} score")) == ["format", "score"]
    assert reward_names(config_of(f"{base} rm/checkpoint-80")) == ["format", "rm"]
    with pytest.raises(ValueError, match="are both named format: rename the folder"):
        config_of(f"{base} format/checkpoint-80")


def test_a_variable_is_kept_with_the_run(monkeypatch):
    monkeypatch.setenv("INFONCE_TEMPERATURE", "0.05")
    assert config_of("sft --task_type embedding --model m").environment == {"INFONCE_TEMPERATURE": "0.05"}
    monkeypatch.setenv("INFONCE_TEMPERATURE", "-1")
    with pytest.raises(ValueError, match="INFONCE_TEMPERATURE=-1 in the environment must be above 0"):
        config_of("sft --task_type embedding --model m")


def test_a_model_with_a_head_has_no_output_matrix(folder):
    """Of an untied vocabulary of 152,064 x 3,584."""
    model = write_model(folder / "7b", QWEN25_7B)
    sizes = {}
    for task in ("sft", "rm", "embedding"):
        config = Config(task=task, model=str(model), dataset=["d"], train_iters=1, max_length=1024, nproc_per_node=1)
        shape, _ = shapes(config)
        sizes[task] = policy_memory(resolve(config, shape), shape).weights
    assert sizes["sft"] - sizes["rm"] == 152_064 * 3_584 * 2 and sizes["rm"] == sizes["embedding"]


def test_a_reward_model_is_counted_and_shown(folder):
    model = write_model(folder / "7b", QWEN25_7B)
    score = {**QWEN25_7B, "architectures": ["Qwen2ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    reward_model = write_model(folder / "rm7b", score)
    base = Config(
        task="grpo", model=str(model), dataset=["d"], reward_funcs=["format"], train_iters=1, beta=0.0, nproc_per_node=1,
        offload_model=True, offload_optimizer=True, vllm_gpu_memory_utilization=0.3, max_length=1024, tuner_type="lora",
    )  # fmt: skip
    shape, _ = shapes(base)
    without, config = resolve(base, shape), resolve(replace(base, reward_model=str(reward_model)), shape)
    weights = reward_model_memory(config).weights
    assert weights == (shape.num_parameters() - 152_064 * 3_584) * 2
    before, after = holdings(without, shape, None, 80 * GIB), holdings(config, shape, None, 80 * GIB)
    assert after["train"]["reward model weights"] == weights and "reward model weights" not in after["generate"]
    assert after["train"]["contexts"] - before["train"]["contexts"] == RANK_CONTEXT
    text = render(config, plan(config, dataset_rows=8, devices=CPU))
    assert "reward model 1 x  with the policy, bundle 0" in text
