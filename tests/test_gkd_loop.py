"""The order of the loop, with stand-ins that only write down what is asked of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import ray

from rlhf.config import Config, TeacherRole
from rlhf.data import RowBatch
from rlhf.gkd import train_gkd
from rlhf.records import Group, Prompt, RowSummary
from tests.tiny import make_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("model")))


class StandIn:
    """Every role in one; `calls` is what was asked, in order."""

    data_size, version, epoch, position, evaluation_rows = 1, 0, 0.0, 0, 3

    def __init__(self, name: str = ""):
        self.name, self.calls, self.logged = name, [], []

    def next_batch(self, count: int) -> RowBatch:
        prompts = [
            Prompt(index=self.position + i, token_ids=np.zeros(3, np.int32), messages=[], columns={}) for i in range(count)
        ]
        self.position += count
        return self._rows(count, position=self.position - count, prompts=prompts)

    def evaluation_batch(self, count: int) -> RowBatch:
        self.calls.append("held-out rows")
        return self._rows(count)

    @staticmethod
    def _rows(count: int, **options) -> RowBatch:
        units = [[[i]] for i in range(count)]
        summary = RowSummary(lengths=[9] * count, trained=[4] * count, targets=[()] * count, units=units)
        return RowBatch(tokens=None, summary=summary, **options)

    def push(self, policy):
        self.calls.append("push")
        self.version += 1

    def generate(self, prompts, n, sampling):
        self.calls.append("generate")
        for prompt in reversed(prompts):
            yield Group(
                prompt=prompt, tokens=None, texts=("",) * n, finish_reasons=("stop",) * n, response_lengths=(5,) * n,
                weight_version=self.version,
            )  # fmt: skip

    def metrics(self):
        return {"weight_version": self.version}

    def every_rank_refs(self, method, shards, vocabulary, top_k, without_adapter):
        self.calls.append(f"{self.name} {method} {shards[0].num_tokens}" + " without adapter" * without_adapter)
        return ["logits"]

    def on_shards(self, method, shards, loss, old, ref, values, teacher):
        alpha = getattr(loss, "keywords", {}).get("sft_alpha")
        self.calls.append(f"{method} {shards[0].num_tokens} alpha {alpha} {teacher}")
        return [{"loss": 3.0 if shards[0].num_tokens == 4 else 0.0}]

    def step(self, step, metrics, sampled):
        self.calls.append(f"log {step}")
        self.logged.append((metrics, sampled))

    def evaluation(self, step, metrics):
        self.calls.append(f"log evaluation {step} {metrics}")

    def save_if_due(self, step, policy, state):
        self.calls.append(f"save {step} {state}")

    def state(self):
        return {"position": self.position}


@pytest.fixture
def run(folder, monkeypatch):
    """`run(...)`: the calls of a run, and what was logged."""
    monkeypatch.setattr(ray, "get", lambda value: value)  # prompts stand for the reference to them

    def run(total: int, *, own_teacher: bool = False, **options) -> StandIn:
        settled = {"global_batch_size": 2, "micro_batch_size": 2, "beta": 0.5, "eval_steps": 9, "sft_alpha": 0.1, "model": folder}
        config = Config(task="gkd", teacher=TeacherRole(model=folder), **(settled | options))
        it, teacher = StandIn("policy"), StandIn("teacher")
        teacher.calls = it.calls
        roles = SimpleNamespace(
            policy=it, data=it, rollout=it if config.lmbda else None, teacher=None if own_teacher else teacher
        )
        train_gkd(config, roles, log=it, checkpoints=it, start=1, total=total)
        return it

    return run


def test_a_step_on_own_responses_pushes_samples_asks_the_teacher_and_updates(run):
    it = run(2, lmbda=1.0)
    assert it.calls[:6] == [
        "push", "generate", "teacher token_logits 10", "train_step 10 alpha None ['logits']", "log 2", "held-out rows"
    ]  # fmt: skip
    assert it.calls[-1] == "save 2 {'position': 2, 'weight_version': 1}"
    metrics, sampled = it.logged[0]
    assert (metrics["on_policy"], metrics["response_length"], metrics["tokens"], metrics["weight_version"]) == (1, 5, 16, 1)
    assert [group.prompt.index for group, _ in sampled] == [0, 1]


def test_a_step_on_rows_asks_the_teacher_and_adds_the_cross_entropy(run):
    it = run(2, lmbda=0.0)
    assert it.calls[:3] == ["teacher token_logits 8", "train_step 8 alpha 0.1 ['logits']", "log 2"]
    assert it.calls[-1] == "save 2 {'position': 2}"
    assert it.logged[0] == ({"tokens": 18, "loss": 0.0, "on_policy": 0, "epoch": 0.0}, None)


def test_held_out_rows_are_never_sampled_and_a_global_batch_at_a_time(run):
    """Of 3 rows with 4 trained tokens each, 2 and 1."""
    calls = run(2, lmbda=1.0).calls
    start = calls.index("held-out rows")
    assert calls[start + 1 : start + 6] == [
        "teacher token_logits 8", "evaluate 8 alpha 0.1 ['logits']",
        "teacher token_logits 4", "evaluate 4 alpha 0.1 ['logits']", "log evaluation 2 {'loss': 1.0}",
    ]  # fmt: skip


def test_a_policy_with_an_adapter_is_asked_without_it(run):
    assert run(2, lmbda=0.0, own_teacher=True).calls[0] == "policy token_logits 8 without adapter"
