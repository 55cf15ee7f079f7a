"""Losses on dataset rows, by real ranks: against Hugging Face with autograd, and the same however a batch is split."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray

from rlhf.config import Config
from rlhf.data import RowBatch
from rlhf.dpo import train_dpo
from rlhf.kto import train_kto
from rlhf.records import RowSummary, RowTokens
from rlhf.sft import train_sft
from tests.one_step import FLOAT64, OneStep, assert_same_gradients
from tests.policy_ranks import hugging_face, policy_config, sequence_logprobs
from tests.tiny import make_tiny_model

PAIRS = 6
BETA = 0.3
SPLITS = [(1, 6), (1, 3), (1, 1), (2, 3), (2, 1), (1, "packs"), (2, "packs")]  # data ranks, pairs of a micro batch
PACKS = [[0, 3], [1], [2, 4], [5]]  # pairs, or rows of two sequences of theirs
TASKS = [
    ("sft", None), ("kto", "kto"), ("kto", "apo_zero_unpaired"), ("dpo", "sigmoid"), ("dpo", "ipo"), ("dpo", "bco_pair"),
    ("dpo", "aot"), ("dpo", "aot_unpaired"), ("dpo", "sft"), ("dpo", "sigmoid+rpo+ld"),
]  # fmt: skip


class StepWithReference(OneStep):
    """Its reference's logprobs were computed before, by row."""

    def __init__(self, ranks, batch: RowBatch, reference_logprobs: dict):
        super().__init__(ranks, batch)
        self.reference, self.reference_logprobs = self, reference_logprobs

    def on_shards_refs(self, method, shards, *args):
        if method == "logprobs":
            refs = [ref for shard in shards for micro_batch in shard.micro_batches for ref in micro_batch]
            return [ray.put({ref.key: self.reference_logprobs[ref.item] for ref in refs})]
        return super().on_shards_refs(method, shards, *args)


@pytest.fixture(scope="module")
def work(local_ray, tmp_path_factory):
    """A model, a reference's logprobs, and rows: pairs, each with its prompt in both sequences."""
    folder = Path(tmp_path_factory.mktemp("rows"))
    make_tiny_model(folder / "policy", seed=1)
    make_tiny_model(folder / "reference", seed=2)
    rng = np.random.default_rng(0)
    ids, masks = [], []
    for _ in range(PAIRS):
        prompt = rng.integers(3, 512, rng.integers(3, 9))
        for _ in range(2):
            response = rng.integers(3, 512, rng.integers(2, 12))
            ids.append(np.concatenate([prompt, response]).astype(np.int32))
            masks.append(np.concatenate([np.zeros(len(prompt)), np.ones(len(response))]).astype(np.float32))
    rows = RowTokens(token_ids=tuple(ids), loss_masks=tuple(masks))
    reference = hugging_face(folder / "reference")
    ref = {item: sequence_logprobs(reference, tokens, 1.0).detach().numpy() for item, tokens in enumerate(ids)}
    return SimpleNamespace(folder=folder, rows=rows, source=ray.put(rows), ref=ref)


def batch_of(work, task: str, *, packed: bool) -> RowBatch:
    """Pairs for dpo; for kto each sequence with the one after it as its mismatched one; for sft single sequences."""
    count = 2 * PAIRS
    paired = [[[2 * i, 2 * i + 1]] for i in range(PAIRS)]
    single = [[[i]] for i in range(count)]
    mismatched = [[[i, (i + 1) % count]] for i in range(count)]
    units = {"dpo": paired, "kto": mismatched, "sft": single}[task]
    if packed:
        rows = len(units) // PAIRS  # that make up a pair
        units = [[row for pair in pack for (row,) in units[pair * rows : (pair + 1) * rows]] for pack in PACKS]
    summary = RowSummary(
        lengths=[len(ids) for ids in work.rows.token_ids],
        trained=[int(mask.sum()) for mask in work.rows.loss_masks],
        targets=[(float(i % 3 != 0),) for i in range(count)],
        units=units,
    )
    return RowBatch(tokens=work.source, summary=summary)


def config_of(task: str, loss_type: str | None, count: int, micro_batch: int) -> Config:
    options = {"loss_type": loss_type}
    if loss_type == "sigmoid+rpo+ld":
        options = {"loss_type": "sigmoid", "rpo_alpha": 0.7, "ld_alpha": 0.4, "label_smoothing": 0.1}
    batch = {"global_batch_size": count, "micro_batch_size": micro_batch}
    return Config(task=task, beta=BETA, eval_steps=10, loss_scale="default", **batch, **options)


def one_step(work, policy, task: str, loss_type: str | None, micro_batch: int | str) -> StepWithReference:
    packed = micro_batch == "packs"
    batch = batch_of(work, task, packed=packed)
    step = StepWithReference(policy, batch, work.ref)
    loop = {"sft": train_sft, "dpo": train_dpo, "kto": train_kto}[task]
    count = 1 if packed else micro_batch if task == "dpo" else 2 * micro_batch
    config = config_of(task, loss_type, len(batch.summary.units), count)
    loop(config, step, log=step, checkpoints=step, start=1, total=2)
    return step


@pytest.fixture(scope="module")
def measured(work, hosts):
    """{(task, loss type): {split: the step}}"""
    results = {pair: {} for pair in TASKS}
    for size in (1, 2):
        policy = hosts.start(policy_config(work.folder / "policy", task="dpo", **FLOAT64), size)
        for data_size, micro_batch in SPLITS:
            if data_size == size:
                for pair in TASKS:
                    results[pair][data_size, micro_batch] = one_step(work, policy, *pair, micro_batch)
    return results


@pytest.mark.parametrize("pair", TASKS, ids=lambda pair: pair[1] or pair[0])
def test_loss_and_gradients_do_not_depend_on_the_split(measured, pair):
    first, *others = measured[pair].values()
    assert len({str(step.split) for step in (first, *others)}) == len(SPLITS)
    for other in others:
        assert other.metrics == pytest.approx(first.metrics, abs=1e-6)
    assert_same_gradients(step.gradients for step in (first, *others))


@pytest.mark.parametrize("pair", TASKS, ids=lambda pair: pair[1] or pair[0])
def test_loss_and_gradient_norm_are_those_of_hugging_face(work, measured, pair):
    import torch

    task, loss_type = pair
    model = hugging_face(work.folder / "policy")
    loss = expected_loss(work, task, loss_type, partial(response_logprobs, work, model))
    loss.backward()
    norm = torch.cat([parameter.grad.ravel() for parameter in model.parameters()]).norm().item()
    for step in measured[pair].values():
        assert step.metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert step.gradient_norm() == pytest.approx(norm, rel=1e-4)


def response_logprobs(work, model, item: int):
    """[R]"""
    tokens, mask = work.rows.token_ids[item], work.rows.loss_masks[item]
    return sequence_logprobs(model, tokens, 1.0)[int((mask == 0).sum()) :]


def expected_loss(work, task: str, loss_type: str | None, logprobs):
    """The losses by their definitions, sequence by sequence."""
    import torch

    def reference(item):
        return torch.tensor(work.ref[item][int((work.rows.loss_masks[item] == 0).sum()) :])

    items = range(2 * PAIRS)
    own, ref = [logprobs(item) for item in items], [reference(item) for item in items]
    if task == "sft":
        return -torch.cat(own).mean()
    ratio = torch.stack([a.sum() - b.sum() for a, b in zip(own, ref)])
    sigmoid = torch.sigmoid
    if task == "kto":
        mismatched = torch.stack([ratio[(i + 1) % len(ratio)] for i in items]).detach()
        kl = mismatched.mean().clamp(min=0) if loss_type == "kto" else 0.0
        sign = torch.tensor([1.0 if i % 3 else -1.0 for i in items])
        return (1 - sigmoid(sign * BETA * (ratio - kl))).mean()
    chosen, rejected = ratio[0::2], ratio[1::2]
    log_sigmoid = torch.nn.functional.logsigmoid
    lengths = torch.tensor([float(len(a)) for a in own])
    if loss_type == "sigmoid":
        return -log_sigmoid(BETA * (chosen - rejected)).mean()
    if loss_type == "ipo":
        return ((chosen / lengths[0::2] - rejected / lengths[1::2] - 1 / (2 * BETA)) ** 2).mean()
    if loss_type == "bco_pair":
        delta = BETA * ratio.detach().mean()
        return -(log_sigmoid(BETA * chosen - delta) + log_sigmoid(delta - BETA * rejected)).mean()
    if loss_type == "aot":
        policy = torch.stack([a.sum() for a in own])
        base = torch.stack([b.sum() for b in ref])
        ours = (policy[0::2] - policy[1::2]).sort().values
        return -log_sigmoid(BETA * (ours - (base[0::2] - base[1::2]).sort().values)).mean()
    if loss_type == "aot_unpaired":
        return -log_sigmoid(BETA * (chosen.sort().values - rejected.sort().values)).mean()
    nll = -torch.cat(own[0::2]).mean()
    if loss_type == "sft":
        return nll
    margins = []
    for i in range(0, 2 * PAIRS, 2):
        shared = min(len(own[i]), len(own[i + 1]))
        differences = [a - b for a, b in zip(own[i : i + 2], ref[i : i + 2])]
        c, r = (difference[:shared].sum() + 0.4 * difference[shared:].sum() for difference in differences)
        margins.append(BETA * (c - r))
    margin = torch.stack(margins)
    return -(0.9 * log_sigmoid(margin) + 0.1 * log_sigmoid(-margin)).mean() + 0.7 * nll
