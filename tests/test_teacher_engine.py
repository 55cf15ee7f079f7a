"""A teacher in vLLM engines: its likeliest tokens and their logits are Hugging Face's, and runs are those of a Megatron teacher."""

# ruff: noqa: E501 - whole messages

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import command
import numpy as np
import pytest
import ray
import torch
from test_gkd_config import CPU, folder, load
from test_gkd_runs import gkd, rows
from tiny import make_tiny_model

from actors.group import EngineGroup
from actors.rollout import ENVIRONMENT
from actors.teacher_engine import TeacherEngine, teacher_config
from rlhf.config import Config, TeacherRole
from rlhf.counts import frozen_group, teacher_engines
from rlhf.plan import plan, render
from tests.policy_ranks import as_group, hugging_face, random_rows, shards_of

VOCABULARY, PADDED, K = 512, 520, 8


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Student, and a teacher whose vocabulary is padded; heads of 32 are the smallest that vLLM has on CPU."""
    shape = {"vocab_size": PADDED, "hidden_size": 96, "num_hidden_layers": 3, "head_dim": 32}
    return {
        "student": make_tiny_model(tmp_path_factory.mktemp("student"), head_dim=32),
        "teacher": make_tiny_model(tmp_path_factory.mktemp("teacher"), seed=1, **shape),
    }


@pytest.fixture(scope="module")
def teacher(local_ray, models):
    config = Config(
        task="gkd",
        model=str(models["student"]),
        teacher=TeacherRole(model=str(models["teacher"]), backend="vllm"),
        gkd_logits_topk=K,
        lmbda=0.0,
        max_length=40,
        torch_dtype="float32",
        vllm_enforce_eager=True,
    )
    kind = ray.remote(concurrency_groups={"report": 1})(TeacherEngine)
    actor = kind.options(num_cpus=0, runtime_env={"env_vars": ENVIRONMENT}).remote(config)
    group = EngineGroup("teacher", [actor], timeout=240)
    group.setup()
    yield group
    ray.kill(actor)


def likeliest(logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logits [N, K] of the common vocabulary, of logits [N, PADDED]."""
    values, ids = logits[:, :VOCABULARY].topk(K, dim=-1)
    return ids.numpy(), values.numpy()


def centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean(1, keepdims=True)


def test_likeliest_tokens_and_logits(models, teacher):
    """Of a dataset's rows with gaps, and of sampled responses. Columns that the student lacks are left out, however likely."""
    rows = random_rows(6)
    gaps = tuple(np.where(np.arange(len(mask)) % 3 == 2, 0, mask).astype(np.float32) for mask in rows.loss_masks)
    prompt = rows.token_ids[0][:2]
    responses = replace(rows, token_ids=tuple(np.concatenate([prompt, ids[2:]]) for ids in rows.token_ids))
    sampled = as_group(responses, 2, [np.zeros(len(ids) - 2, np.float32) for ids in rows.token_ids])
    model, unknown = hugging_face(models["teacher"]), 0
    for source, sequences in ((replace(rows, loss_masks=gaps), rows.token_ids), (sampled, responses.token_ids)):
        shards = shards_of(rows, ray.put(source), [[[0, 1, 2], [5, 4, 3]]])
        (kept,) = ray.get(teacher.every_rank_refs("token_logits", shards, VOCABULARY, K))
        assert sorted(kept) == [100, 101, 102, 103, 104, 105]
        for i, token_ids in enumerate(sequences):
            trained = np.flatnonzero(source.sequence(i)[1])
            with torch.no_grad():
                logits = model(torch.from_numpy(token_ids.astype(np.int64))[None]).logits[0, trained - 1]
            ids, values = likeliest(logits)
            unknown += int((logits.topk(K).indices >= VOCABULARY).any())
            found = ray.get(kept[100 + i])
            assert (found.ids == ids).all() and found.vocab_size == VOCABULARY
            assert np.abs(centred(found.values) - centred(values)).max() <= 1e-4
    assert unknown >= 2  # sequences for which more had to be asked


@pytest.mark.slow
def test_a_run_is_that_of_a_megatron_teacher(models, tmp_path):
    """Half of the steps on own responses, seeded: the same losses, and the same weights but for rounding."""
    data, losses = rows(tmp_path / "rows.jsonl"), {}
    for backend in ("megatron", "vllm"):
        options = {"teacher.backend": backend, "gkd_logits_topk": K, "lmbda": 0.5, "train_iters": 4, "deterministic": "true"}
        options |= {"nproc_per_node": 1, "cpus_per_rank": 0.3, "split_dataset_ratio": 0.2, "eval_steps": 4}
        status, output = command.run(*gkd(models, data, tmp_path, backend, **options), log=tmp_path / f"{backend}.log")
        assert status == 0, output[-4000:]
        losses[backend] = [(row["loss"], row["kl"], row["grad_norm"]) for row in command.metrics(tmp_path / backend)]
    assert {row["on_policy"] for row in command.metrics(tmp_path / "vllm")} == {0, 1}
    assert losses["vllm"] == [pytest.approx(step, rel=1e-3) for step in losses["megatron"]]
    after = [json.loads((tmp_path / name / "evaluations.jsonl").read_text().splitlines()[-1])["kl"] for name in losses]
    assert after[1] == pytest.approx(after[0], rel=1e-3)


@pytest.mark.slow
def test_an_engine_that_dies_ends_the_run_in_one_line(models, tmp_path):
    options = {"teacher.backend": "vllm", "gkd_logits_topk": K, "lmbda": 0, "train_iters": 100000, "nproc_per_node": 1}
    log = tmp_path / "log"
    process = command.start(*gkd(models, rows(tmp_path / "rows.jsonl"), tmp_path, "run", **options), log=log)
    command.wait_until(lambda: len(command.metrics(tmp_path / "run")) >= 2, process, log=log)
    (engine,) = command.actors(process, "TeacherEngine")
    os.kill(engine, signal.SIGKILL)
    assert process.wait(timeout=30) == 1
    assert "error: teacher rank 0 died during `token_logits`" in log.read_text()


@pytest.fixture
def folders(tmp_path, monkeypatch) -> tuple[Path, Path]:
    for name in ("NPROC_PER_NODE", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    return folder(tmp_path / "student"), folder(
        tmp_path / "teacher", size=640, num_hidden_layers=8, max_position_embeddings=16384
    )


ENGINE = ("--teacher.backend", "vllm", "--gkd_logits_topk", "8")
SHORT = (*ENGINE, "--lmbda", "0", "--max_length", "2048")


def test_engines_have_places_of_their_own(folders):
    config = load(*folders, *SHORT, "--teacher.nproc", "4", "--teacher.tensor_model_parallel_size", "2", "--nproc_per_node", "1")
    assert teacher_engines(config) == 2 and frozen_group(config) is None
    text = render(config, plan(config, dataset_rows=40, devices=CPU))
    assert "teacher      2 x  own bundles 1-2" in text and "1 bundle of 1 CPU and 2 bundles of 2 CPU" in text


def test_engine_arguments_are_the_teachers_too(folders):
    """With lmbda 0 there is no other engine that could take them."""
    assert teacher_config(load(*folders, *SHORT, "--vllm.block_size", "32")).vllm["block_size"] == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ENGINE[:2], "teacher.backend vllm gives the likeliest tokens alone: say how many, as --gkd_logits_topk 64"),
        ((*SHORT, "--teacher.pipeline_model_parallel_size", "2"), "teacher.pipeline_model_parallel_size is for teacher.backend megatron"),
        ((*SHORT, "--teacher.nproc", "3", "--teacher.tensor_model_parallel_size", "2"), "teacher.nproc 3 is no multiple of the 2 devices of one engine"),
        ((*SHORT, "--teacher.tensor_model_parallel_size", "3"), "teacher.tensor_model_parallel_size 3 does not divide the model's 28 attention heads"),
        ((*SHORT, "--teacher.own_devices", "false"), "teacher.own_devices false is for teacher.backend megatron: a teacher's engines share no devices"),
        ((*SHORT, "--offload_teacher_model", "true"), "offload_teacher_model has nothing to act on: the teacher has devices of its own"),
        ((*ENGINE, "--lmbda", "0", "--max_length", "20000"), "sequences of up to 20000 tokens are longer than the 16384 that the teacher takes: lower max_length or vllm_max_model_len"),
    ],
)  # fmt: skip
def test_what_engines_cannot_do_is_refused(folders, options, message):
    with pytest.raises(ValueError) as caught:
        load(*folders, *options)
    assert str(caught.value) == message
