"""Distillation on Megatron ranks against Hugging Face models with TRL's loss and ms-swift's, in float32, under several layouts.

Every case is one optimizer step of a student after the logits of a teacher. The gradient of every weight is read off that step:
Adam's first one with epsilon 1 is lr g / (|g| + 1). Hugging Face lives in this process, where mcore-bridge is never imported.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file

from rlhf.losses import gkd_loss
from tests.one_step import FLOAT64, SPLIT_BAR
from tests.policy_ranks import as_group, hugging_face, nll_loss, policy_config, random_rows, sequence_logprobs, shards_of
from tests.tiny import make_tiny_model

TEMPERATURE, LR, VOCABULARY, PADDED, K = 0.8, 100.0, 512, 520, 5
ROWS = 6
SPLITS = {  # data ranks, micro batches of each: rows
    (1, 1): [[[0, 1, 2, 3, 4, 5]]],
    (1, 2): [[[0, 1, 2], [3, 4, 5]]],
    (1, 4): [[[5], [4, 0], [1], [3, 2]]],
    (2, 1): [[[0, 1, 2]], [[3, 4, 5]]],
    (2, 2): [[[5], [3, 0]], [[1, 2], [4]]],
}
CASES = [(0.0, None, 0.0), (0.5, None, 0.0), (1.0, None, 0.3), (0.0, K, 0.0), (0.5, K, 0.3), (1.0, K, 0.0)]
ALONE: dict[str, Any] = {}
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Student and teacher, whose vocabulary is padded."""
    student = make_tiny_model(tmp_path_factory.mktemp("student"))
    shape = {"vocab_size": PADDED, "hidden_size": 48, "num_hidden_layers": 4}
    return {"student": student, "teacher": make_tiny_model(tmp_path_factory.mktemp("teacher"), seed=1, **shape)}


@pytest.fixture(scope="module")
def rows():
    """Their first 2 tokens, which are not trained, are the same."""
    rows = random_rows(ROWS)
    prompt = rows.token_ids[0][:2]
    return replace(rows, token_ids=tuple(np.concatenate([prompt, ids[2:]]) for ids in rows.token_ids))


@pytest.fixture(scope="module")
def distil(hosts, models, rows, tmp_path_factory):
    """`distil(split, student, teacher, ...)`: metrics and gradients {weight: gradient} of one step; each is made once."""
    teachers: dict[Any, list] = {}
    done: dict[Any, Any] = {}

    def frozen_logits(layout: dict[str, int], top_k: int | None) -> list[ray.ObjectRef]:
        key = (*layout.items(), top_k)
        if key not in teachers:
            config = policy_config(models["student"], task="gkd", teacher=role(models["teacher"], **layout))
            group = hosts.start(config, 2 if layout else 1, frozen="teacher")
            teachers[key] = token_logits(group, rows, top_k)
        return teachers[key]

    def run(
        ranks: int, micro_batches: int, student=ALONE, teacher=ALONE, *, beta=0.5, top_k=None, sft_alpha=0.0, source=None
    ) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        key = (ranks, micro_batches, str(student), str(teacher), beta, top_k, sft_alpha, source is None)
        if key not in done:
            refs = frozen_logits(teacher, top_k)
            folder = tmp_path_factory.mktemp("step")
            options = {"beta": beta, "gkd_logits_topk": top_k, "sft_alpha": sft_alpha, "temperature": TEMPERATURE}
            done[key] = step(hosts, models, rows, folder, (ranks, micro_batches), student | options, refs, source)
        return done[key]

    return run


def role(folder: Path | None, **sizes: int) -> SimpleNamespace:
    empty = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "nproc": None}
    return SimpleNamespace(model=folder and str(folder), **(empty | sizes))


def token_logits(group, rows, top_k: int | None, reference: bool = False) -> list[ray.ObjectRef]:
    split = SPLITS[group.data_size, 2]
    shards = shards_of(rows, ray.put(rows), split)
    calls = [
        actor.call.remote("token_logits", shards[info.data_rank], VOCABULARY, top_k, reference)
        for actor, info in zip(group.actors, group.infos)
    ]
    return [ray.put(kept) for _, kept in ray.get(calls, timeout=120)]


def step(hosts, models, rows, folder, split, options, refs, source) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    settings = {"lr": LR, "lr_decay_style": "constant", "weight_decay": 0.0, "clip_grad": 0.0, "adam_eps": 1.0}
    ranks = split[0] * options.get("tensor_model_parallel_size", 1) * options.get("pipeline_model_parallel_size", 1)
    group = hosts.start(policy_config(models["student"], task="gkd", **settings, **options), ranks)
    loss = partial(gkd_loss, sft_alpha=options["sft_alpha"])
    shards = shards_of(rows, ray.put(rows if source is None else source), SPLITS[split])
    metrics = group.train_step(shards, loss, None, None, None, refs)
    group.call("save", str(folder), 1)
    before, after = (load_file(path / "model.safetensors") for path in (models["student"], folder))
    moved = {name: (before[name].double() - after[name].double()) / LR for name in before}
    return metrics, {name: step / (1 - step.abs()) for name, step in moved.items()}


@pytest.fixture(scope="module")
def expected(models, rows):
    """`expected(beta, top_k, sft_alpha)`: loss, KL(teacher || student) and gradients of Hugging Face's models."""
    from swift.rlhf_trainers.gkd_loss import TeacherOutput
    from swift.rlhf_trainers.gkd_loss import gkd_loss as swift_loss
    from trl.experimental.gkd import GKDTrainer

    student, teacher = hugging_face(models["student"]), hugging_face(models["teacher"])

    def divergence(own, other, labels, beta, top_k) -> torch.Tensor:
        """Summed over the trained tokens."""
        if top_k is None:
            temperature = {"temperature": TEMPERATURE, "reduction": "sum"}
            return GKDTrainer.generalized_jsd_loss(own[None], other[None], labels[None], beta, **temperature)
        logprobs, ids = other.log_softmax(-1).topk(top_k)
        output = TeacherOutput(topk_logprobs=logprobs[None], topk_indices=ids[None], labels=labels[None])
        return swift_loss(own[None], output, labels[None], beta, TEMPERATURE)[0]

    def of(beta: float, top_k: int | None, sft_alpha: float) -> tuple[float, float, dict[str, torch.Tensor]]:
        total, kl, count = torch.zeros(()), 0.0, sum(mask.sum() for mask in rows.loss_masks)
        for ids, mask in zip(rows.token_ids, rows.loss_masks):
            tokens = torch.from_numpy(ids.astype(np.int64))
            own = student(input_ids=tokens[None]).logits[0]
            with torch.no_grad():
                other = teacher(input_ids=tokens[None]).logits[0, :, :VOCABULARY]
            labels = torch.where(torch.from_numpy(mask) != 0, tokens, -100)
            labels = torch.cat([labels[1:], torch.tensor([-100])])
            total = total + divergence(own, other, labels, beta, top_k) / count
            kl += divergence(own.detach(), other, labels, 0.0, top_k).item() / count
            cross_entropy = torch.nn.functional.cross_entropy(own, labels, ignore_index=-100, reduction="sum")
            total = total + sft_alpha * cross_entropy / count
        student.zero_grad()
        total.backward()
        return total.item(), kl, {name: parameter.grad.double() for name, parameter in student.named_parameters()}

    return of


def largest(gradients: dict[str, torch.Tensor]) -> float:
    return max(gradient.abs().max().item() for gradient in gradients.values())


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest of any weight, in units of the largest gradient."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one) / largest(other)


@pytest.mark.parametrize(("beta", "top_k", "sft_alpha"), CASES)
def test_loss_and_gradients_equal_those_of_trl_and_ms_swift(distil, expected, beta, top_k, sft_alpha):
    loss, kl, gradients = expected(beta, top_k, sft_alpha)
    metrics, ours = distil(1, 2, beta=beta, top_k=top_k, sft_alpha=sft_alpha)
    assert largest(gradients) > 1e-3
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["kl"] == pytest.approx(kl, abs=1e-5)
    assert difference(ours, gradients) <= 1e-5
    if sft_alpha:
        assert metrics["jsd_loss"] + sft_alpha * metrics["sft_loss"] == pytest.approx(metrics["loss"], abs=1e-6)


@pytest.mark.parametrize("top_k", [None, K])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 1), (1, 4), (2, 1), (2, 2)])
def test_gradients_do_not_depend_on_how_the_batch_is_split(distil, ranks, micro_batches, top_k):
    metrics, gradients = distil(1, 2, FLOAT64, top_k=top_k)
    split_metrics, split_gradients = distil(ranks, micro_batches, FLOAT64, top_k=top_k)
    assert split_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
    assert largest(gradients) > 1e-3
    assert difference(split_gradients, gradients) <= SPLIT_BAR


@pytest.mark.parametrize("top_k", [None, K])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [(TP2, {}), ({}, TP2), (TP2, TP2), ({}, PP2), (PP2, {}), ({}, {"nproc": 2})],
    ids=["student TP2", "teacher TP2", "both TP2", "teacher PP2", "student PP2", "teacher DP2"],
)
def test_gradients_do_not_depend_on_how_the_models_are_split(distil, student, teacher, top_k):
    metrics, gradients = distil(1, 2, top_k=top_k)
    split_metrics, split_gradients = distil(1, 2, student, teacher, top_k=top_k)
    assert split_metrics["loss"] == pytest.approx(metrics["loss"], rel=2e-6)
    assert split_metrics["kl"] == pytest.approx(metrics["kl"], rel=2e-6)
    assert difference(split_gradients, gradients) <= 2e-6


def test_sampled_responses_are_rows_whose_logprobs_are_compared_with_the_engines(distil, models, rows):
    student = hugging_face(models["student"])
    with torch.no_grad():
        logprobs = [sequence_logprobs(student, ids, TEMPERATURE)[2:].numpy() + 0.01 for ids in rows.token_ids]
    metrics, gradients = distil(1, 2)
    sampled_metrics, sampled_gradients = distil(1, 2, source=as_group(rows, 2, logprobs))
    assert sampled_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
    assert difference(sampled_gradients, gradients) <= 1e-6
    assert sampled_metrics["rollout_train_logprob_diff"] == pytest.approx(0.01, abs=1e-5)


def test_a_policy_with_an_adapter_is_its_own_teacher(hosts, models, rows):
    config = policy_config(models["student"], task="gkd", tuner_type="lora", lr=1e-2, temperature=TEMPERATURE)
    group = hosts.start(config, 1)
    shards = shards_of(rows, ray.put(rows), SPLITS[1, 2])
    before = token_logits(group, rows, None, reference=True)
    assert group.train_step(shards, gkd_loss, None, None, None, before)["loss"] == pytest.approx(0, abs=1e-7)
    group.train_step(shards, nll_loss)
    after = token_logits(group, rows, None, reference=True)
    for key, logits in ray.get(before[0]).items():
        assert np.array_equal(ray.get(logits).values, ray.get(ray.get(after[0])[key]).values)
    (metrics,) = group.on_shards("evaluate", shards, gkd_loss, None, None, None, after)
    assert metrics["loss"] > 1e-4 and metrics["kl"] > metrics["loss"]


def test_only_trained_tokens_are_kept_in_the_models_dtype(hosts, models, rows):
    """[N, V] of 2 bytes in bfloat16; of the 5 likeliest 4 bytes for each id and each logit."""
    config = policy_config(models["student"], task="gkd", torch_dtype="bfloat16", teacher=role(models["teacher"], **TP2))
    group = hosts.start(config, 2, frozen="teacher")
    trained = int(sum(mask.sum() for mask in rows.loss_masks))
    parts = [ray.get(list(ray.get(part).values())) for part in token_logits(group, rows, None)]
    assert [sum(kept.values.nbytes for kept in part) for part in parts] == [2 * trained * PADDED // 2] * 2
    assert [part[0].first_column for part in parts] == [0, PADDED // 2]
    first, second = [ray.get(list(ray.get(part).values())) for part in token_logits(group, rows, K)]
    assert sum(kept.values.nbytes + kept.ids.nbytes for kept in first) == 8 * K * trained and second == []
