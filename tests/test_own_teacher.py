"""A Megatron teacher with devices of its own: where it sits, what it holds, and runs equal to those on the policy's devices."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import command
import pytest
from test_gkd_config import CPU, GIB, folder, load
from test_gkd_runs import evaluations, gkd, models, rows, run  # noqa: F401 a fixture
from test_tensor_parallel_runs import workers

from rlhf.cluster import Cluster
from rlhf.counts import policy_ranks, teacher_places
from rlhf.fit import refusal
from rlhf.memory import frozen_memory, shapes
from rlhf.model_folder import read_shape
from rlhf.phases import offloaded, phases
from rlhf.plan import plan, render
from rlhf.resolution import resolve

OWN = ("--teacher.own_devices", "true")


@pytest.fixture
def folders(tmp_path, monkeypatch) -> tuple[Path, Path]:
    for name in ("NPROC_PER_NODE", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    return folder(tmp_path / "student"), folder(tmp_path / "teacher", num_hidden_layers=8)


@pytest.mark.parametrize(
    ("options", "places", "line"),
    [
        ("", [1], "teacher      1 x  own bundle 2"),  # after the policy's and an engine's
        ("--teacher.tensor_model_parallel_size 2 --teacher.pipeline_model_parallel_size 4", [1] * 8, "own bundles 2-9"),
        ("--teacher.nproc 4 --teacher.tensor_model_parallel_size 2", [1] * 4, "own bundles 2-5"),
    ],
)
def test_its_places_follow_those_of_policy_and_engines(folders, options, places, line):
    config = load(*folders, *OWN, "--vllm_mode", "server", "--nproc_per_node", "1", *options.split())
    assert teacher_places(config) == places
    text = render(config, plan(config, dataset_rows=40, devices=CPU))
    assert line in text and f"{2 + len(places)} bundles of 1 CPU" in text


def test_the_policy_gets_the_gpus_that_are_left(folders):
    config = load(*folders, *OWN, "--teacher.tensor_model_parallel_size", "4", "--vllm_mode", "server")
    unset = replace(config, nproc_per_node=None)
    assert policy_ranks(resolve(unset, gpus_per_node=8)) == 8 - 4 - 1
    engines = replace(unset, teacher=replace(config.teacher, backend="vllm", own_devices=None, nproc=None))
    assert policy_ranks(resolve(engines, gpus_per_node=8)) == 8 - 4 - 1


def test_its_gpus_hold_it_alone_and_the_policys_do_not(folders):
    """In bfloat16: 2 bytes a weight, and a context of 3 GiB."""
    config = load(*folders, *OWN, "--max_length", "512", "--nproc_per_node", "1", "--torch_dtype", "bfloat16")
    shape, teacher = shapes(config)
    config = replace(config, vllm_gpu_memory_utilization=0.3, offload_model=True, offload_optimizer=False)
    peaks, without = phases(config, shape, teacher, 140 * GIB), phases(config, shape, None, 140 * GIB)
    scores = frozen_memory(config, teacher).activations
    assert peaks == without | {"teacher": 2 * teacher.num_parameters() + scores + 3 * GIB}
    assert offloaded(config, shape, teacher) == offloaded(config, shape, None)


def test_a_teacher_too_large_for_its_gpus_is_told_to_split(folders, tmp_path):
    large = folder(tmp_path / "large", num_hidden_layers=80, hidden_size=8192, intermediate_size=29568, num_attention_heads=64)
    options = "--nproc_per_node 1 --torch_dtype bfloat16 --lmbda 0 --tuner_type lora".split()
    config = load(folders[0], large, *OWN, "--teacher.nproc", "1", "--teacher.tensor_model_parallel_size", "1", *options)
    text = refusal(config, *shapes(config), 100 * GIB)
    weights = 2 * read_shape(large).num_parameters() / GIB
    assert f"phase teacher needs about {weights + 3:.1f} GiB" in text and "teacher weights" in text
    assert text.endswith("; give teacher.tensor_model_parallel_size 2, teacher.nproc 2") and "\n" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--teacher.nproc 2", "teacher.nproc 2 is more than the 1 policy ranks whose places it shares; give it its own by "
         "--teacher.own_devices true"),
        ("--teacher.own_devices true --teacher.nproc 3 --teacher.tensor_model_parallel_size 2",
         "teacher: 3 ranks is no multiple of its TP 2 x PP 1 = 2"),
        ("--teacher.own_devices true --offload_teacher_model true",
         "offload_teacher_model has nothing to act on: the teacher has devices of its own"),
        ("--teacher.own_devices true --teacher.pipeline_model_parallel_size 8 --seq_kd true",
         "seq_kd answers in engines on the devices of one copy of the teacher, TP x PP: 8 does not divide the model's 28 "
         "attention heads"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(folders, options, message):
    with pytest.raises(ValueError) as caught:
        load(*folders, *options.split())
    assert str(caught.value) == message


def test_a_policy_that_is_its_own_teacher_has_no_devices_for_it(folders):
    with pytest.raises(ValueError, match="teacher.own_devices has nothing to act on: with LoRA the policy itself is the teacher"):
        load(folders[0], folders[0], "--tuner_type", "lora", *OWN)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("--teacher.own_devices true --teacher.nproc 8", "1 policy ranks + 8 places of the teacher need 9 x 1 CPU = 9"),
        ("--teacher.backend vllm --gkd_logits_topk 8 --teacher.nproc 8 --max_length 512",
         "1 policy ranks + 8 places of the teacher need 9 x 1 CPU = 9"),
    ],
)  # fmt: skip
def test_too_few_devices_are_one_line(local_ray, folders, options, wanted):
    config = load(*folders, "--nproc_per_node", "1", "--lmbda", "0", *options.split())
    with pytest.raises(ValueError) as caught:
        Cluster(config, policy_ranks=1, num_engines=0).__enter__()
    end = "the cluster has 8: lower teacher.nproc or cpus_per_rank, or add nodes"
    assert str(caught.value) == f"{wanted}, {end}"


def losses(folder: Path) -> list[tuple[float, ...]]:
    """Of every step, and of the held-out rows."""
    held_out = [row["kl"] for row in evaluations(folder)]
    return [(row["loss"], row["kl"], row["grad_norm"]) for row in command.metrics(folder)] + [(kl,) for kl in held_out]


LAYOUTS = {
    "all columns": {"data": {"teacher.nproc": 2}, "pipeline": {"teacher.pipeline_model_parallel_size": 2}},  # the policy has DP 1
    "top k": {"tensor": {"teacher.tensor_model_parallel_size": 2}},
}


@pytest.mark.slow
@pytest.mark.parametrize("logits", LAYOUTS)
def test_a_run_is_that_of_a_teacher_on_the_policys_devices(models, tmp_path, logits):  # noqa: F811
    """Only rounding differs where the teacher's layers are split; its micro batches are others than the policy's."""
    options = {"lmbda": 0, "train_iters": 3, "split_dataset_ratio": 0.2, "eval_steps": 3, "nproc_per_node": 1}
    options |= {"gkd_logits_topk": 20} if logits == "top k" else {"micro_batch_size": 1, "micro_batch_tokens": 90}
    data = rows(tmp_path / "rows.jsonl")
    run(*gkd(models, data, tmp_path, "shared", **options), log=tmp_path / "shared.log")
    expected = losses(tmp_path / "shared")
    assert len(expected) == 5 and expected[0][1] > 0.1
    for name, layout in LAYOUTS[logits].items():
        own = options | {"teacher.own_devices": "true"} | layout
        run(*gkd(models, data, tmp_path, name, **own), log=tmp_path / f"{name}.log")
        found = losses(tmp_path / name)
        assert found[0] == pytest.approx(expected[0], abs=1e-6), name
        assert found == [pytest.approx(step, rel=1e-5) for step in expected], name  # Adam divides by what rounding changed


@pytest.mark.slow
def test_beside_engines_that_share_the_policys_devices_a_run_on_own_responses_is_the_same(models, tmp_path):  # noqa: F811
    options = {"lmbda": 1, "train_iters": 3, "deterministic": "true", "nproc_per_node": 1, "split_dataset_ratio": 0.2}
    data = rows(tmp_path / "rows.jsonl")
    for name, layout in {"shared": {}, "own": {"teacher.own_devices": "true", "teacher.nproc": 2}}.items():
        run(*gkd(models, data, tmp_path, name, **options, **layout), log=tmp_path / f"{name}.log")
    assert losses(tmp_path / "own") == [pytest.approx(step, abs=1e-6) for step in losses(tmp_path / "shared")]


@pytest.mark.slow
def test_the_teacher_answers_on_its_own_places(models, tmp_path):  # noqa: F811
    """The same responses as on the policy's one place, by an engine on its own two."""
    options = {"lmbda": 0, "seq_kd": "true", "train_iters": 2, "deterministic": "true", "gkd_logits_topk": 8, "nproc_per_node": 1}
    wide = {"teacher.tensor_model_parallel_size": 2}
    layouts = {"shared": {}, "engines": wide | {"teacher.backend": "vllm"}, "ranks": wide | {"teacher.own_devices": "true"}}
    data, answers = rows(tmp_path / "rows.jsonl", answered=False), {}
    for name, layout in layouts.items():
        log = tmp_path / f"{name}.log"
        process = command.start(*gkd(models, data, tmp_path, name, **options, **layout), log=log)
        command.wait_until(lambda: command.actors(process, "RolloutEngine"), process, log=log)
        if layout:
            command.wait_until(lambda: len(workers(process)) == 2, process, log=log)
            assert command.actors(process, "RolloutEngine") and not command.actors(process, "TeacherEngine")
        assert command.ended(process, log=log)[0] == 0, log.read_text()[-4000:]
        lines = (tmp_path / name / "teacher_responses.jsonl").read_text().splitlines()
        answers[name] = sorted((row["position"], row["token_ids"]) for row in map(json.loads, lines))
    assert len(answers["shared"]) == 2 * 8
    for name in ("engines", "ranks"):
        same = sum(ours == theirs for ours, theirs in zip(answers[name], answers["shared"]))
        assert same >= 14, name  # rounding of a split model may turn a draw
