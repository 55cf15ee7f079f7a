"""A reward model as a reward of GRPO: scores against Hugging Face, their place among the rewards, and a run with it alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import command
import pytest
import ray
import torch
from tiny import make_tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from actors.data import DataWorker
from actors.frozen import Frozen
from actors.group import RankGroup
from actors.reward import RewardWorker
from rlhf.config import Config
from rlhf.data import DataFailure
from rlhf.model_reward import ModelReward
from rlhf.records import Group, Prompt
from rlhf.scoring import Scorer

ANSWERS = [("3", "the answer is 4"), ("", "what is the answer? " * 30)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("policy"), head_dim=32)  # the smallest that vLLM has on CPU


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory) -> Path:
    """With another tokenizer, and other lengths, than the policy's."""
    folder = tmp_path_factory.mktemp("models")
    base = make_tiny_model(folder / "base", seed=1, vocab_size=300, max_position_embeddings=64)
    hf = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    hf.save_pretrained(folder / "score")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "score")
    return folder / "score"


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "tp2"])
def model_reward(request, local_ray, policy, reward_model):
    config = Config(
        task="grpo", model=str(policy), reward_model=str(reward_model), reward_funcs=["format"], reward_weights=[1.0, 2.0],
        template_backend="jinja", torch_dtype="float32", micro_batch_size=2, tensor_model_parallel_size=request.param,
        sequence_parallel=request.param > 1, offload_model=False,
    )  # fmt: skip
    kind, encoder = (ray.remote(concurrency_groups={"report": 1})(kind) for kind in (Frozen, DataWorker))
    actors = [
        kind.options(num_cpus=1).remote(config, rank=rank, world_size=request.param, role="reward_model")
        for rank in range(request.param)
    ]
    ranks = RankGroup("reward model", actors, timeout=120)
    ranks.setup()
    worker = encoder.options(num_cpus=0).remote(config)
    yield ModelReward(ranks, worker, config)
    for actor in [*actors, worker]:
        ray.kill(actor)


def groups() -> list[Group]:
    return [
        Group(
            prompt=Prompt(index=i, token_ids=None, messages=[{"role": "user", "content": f"what is 1+{i}?"}], columns={}),
            tokens=ray.put(None),
            texts=texts,
            finish_reasons=("stop",) * len(texts),
            response_lengths=(1,) * len(texts),
            weight_version=1,
        )
        for i, texts in enumerate(ANSWERS)
    ]


def expected(folder: Path) -> list[list[float]]:
    """Of the last 64 tokens of each conversation, by the reward model's own tokenizer and chat template."""
    hf = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for group in groups():
        scores.append([])
        for text in group.texts:
            messages = [*group.prompt.messages, {"role": "assistant", "content": text}]
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)[:, -64:]
            scores[-1].append(hf(input_ids=ids).logits.item())
    return scores


def test_scores_are_hugging_faces_and_come_after_the_functions(model_reward, reward_model):
    config = model_reward.config
    scorer = Scorer(lambda index: ray.remote(RewardWorker).options(num_cpus=0).remote(config), config)
    try:
        scorer.model = model_reward
        scored = scorer.score(iter(groups()), step=0)
    finally:
        scorer.close()
    for (_, score), values in zip(scored, expected(reward_model)):
        assert list(score.by_function) == ["format", "score"]
        assert score.by_function["score"] == pytest.approx(values, abs=1e-5)
        functions = score.by_function["format"]
        assert score.rewards == pytest.approx([function + 2 * value for function, value in zip(functions, values)], abs=1e-5)


@pytest.mark.parametrize(("killed", "message"), [(True, "died at the responses"), (False, "did not encode .* within 0.01 s")])
def test_a_data_worker_that_does_not_answer_ends_the_run_by_name(local_ray, policy, reward_model, killed, message):
    config = Config(task="grpo", model=str(policy), reward_model=str(reward_model), template_backend="jinja", call_timeout=0.01)
    worker = ray.remote(concurrency_groups={"report": 1})(DataWorker).options(num_cpus=0).remote(config)
    if killed:
        ray.get(worker.report.remote())
        ray.kill(worker)
        config = replace(config, call_timeout=60)
    with pytest.raises(DataFailure, match=f"the data worker {message}"):
        ModelReward(None, worker, config).score(groups())
    ray.kill(worker)


@pytest.mark.slow
def test_a_run_learns_from_a_reward_model_alone(policy, reward_model, tmp_path):
    """With dynamic_sample, which generates again after the reward model has scored."""
    rows = tmp_path / "rows.jsonl"
    lines = [{"messages": [{"role": "user", "content": f"what is {a}+{a}?"}]} for a in range(40)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {
        "rlhf_type": "grpo", "model": policy, "dataset": rows, "reward_model": reward_model, "template_backend": "jinja",
        "output_dir": tmp_path, "run_name": "run", "num_generations": 4, "global_batch_size": 16, "micro_batch_size": 4,
        "max_completion_length": 8, "max_length": 64, "train_iters": 3, "lr": 1e-3, "beta": 0.0, "vllm_enforce_eager": "true",
        "dynamic_sample": "true", "nproc_per_node": 1, "deterministic": "true",
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    status, output = command.run("rlhf", *words, log=tmp_path / "log")
    assert status == 0, output[-4000:]
    metrics = command.metrics(tmp_path / "run")
    assert len(metrics) == 3
    for row in metrics:
        assert row["reward/score"] == pytest.approx(row["reward"]) and row["unscored"] == 0 and row["reward_std"] > 0
