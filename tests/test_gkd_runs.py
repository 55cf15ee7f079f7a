"""Whole distillations by their command, with real Ray, Megatron and vLLM: on rows, on own responses, killed and resumed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import command
import pytest
from safetensors.numpy import load_file
from tiny import make_tiny_model

pytestmark = pytest.mark.slow
TIMES = ("seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Student, and a teacher of another size with a padded vocabulary; heads of 32 are the smallest that vLLM has on CPU."""
    shape = {"vocab_size": 520, "hidden_size": 96, "num_hidden_layers": 4, "head_dim": 32}
    return {
        "student": make_tiny_model(tmp_path_factory.mktemp("student"), head_dim=32),
        "teacher": make_tiny_model(tmp_path_factory.mktemp("teacher"), seed=1, **shape),
    }


def rows(path: Path, *, answered: bool = True) -> Path:
    answers = [[{"role": "assistant", "content": f"the answer is {2 * a}"}] if answered else [] for a in range(40)]
    lines = [{"messages": [{"role": "user", "content": f"what is {a}+{a}?"}, *answers[a]]} for a in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def gkd(models: dict[str, Path], data: Path, output: Path, name: str, **options) -> list:
    """A small command; `options` replace these."""
    defaults = {
        "rlhf_type": "gkd", "model": models["student"], "teacher_model": models["teacher"], "dataset": data,
        "template_backend": "jinja", "output_dir": output, "run_name": name, "global_batch_size": 8, "micro_batch_size": 4,
        "max_length": 64, "lr": 3e-3, "report_to": "none", "logging_steps": 1, "cpus_per_rank": 0.5,
    }  # fmt: skip
    sampled = options.get("lmbda") != 0 or "seq_kd" in options
    if sampled:
        defaults |= {"max_completion_length": 12, "vllm_max_model_len": 128}
    if sampled or options.get("teacher.backend") == "vllm":
        defaults |= {"vllm_enforce_eager": "true"}
    return ["rlhf", *(word for name, value in (defaults | options).items() for word in (f"--{name}", value))]


def run(*arguments, log: Path) -> list[dict]:
    """The steps of a run that must succeed."""
    status, output = command.run(*arguments, log=log)
    assert status == 0, output[-4000:]
    return command.metrics(log.with_suffix(""))


def evaluations(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def test_a_student_comes_nearer_on_held_out_rows_without_engines(models, tmp_path):
    """The teacher is split over two ranks, the student is not, and waits in host memory between its logits."""
    options = {"lmbda": 0, "train_iters": 12, "split_dataset_ratio": 0.2, "eval_steps": 12, "sft_alpha": 0.1, "lr": 1e-2}
    options |= {"nproc_per_node": 2, "teacher.tensor_model_parallel_size": 2, "offload_teacher_model": "true"}
    steps = run(*gkd(models, rows(tmp_path / "rows.jsonl"), tmp_path, "rows", **options), log=tmp_path / "rows.log")
    assert [step["on_policy"] for step in steps] == [0] * 12
    assert "weight_version" not in steps[0] and "response_length" not in steps[0]
    for step in steps:
        assert step["jsd_loss"] + 0.1 * step["sft_loss"] == pytest.approx(step["loss"], abs=1e-6)
    before, after = evaluations(tmp_path / "rows")
    assert (before["step"], after["step"]) == (0, 12)
    assert after["kl"] < 0.8 * before["kl"]


def test_a_killed_run_on_own_responses_continues_bit_for_bit(models, tmp_path):
    options = {"lmbda": 1, "deterministic": "true", "train_iters": 5, "save_steps": 2, "nproc_per_node": 1, "gkd_logits_topk": 20}
    data = rows(tmp_path / "prompts.jsonl", answered=False)
    whole = run(*gkd(models, data, tmp_path, "whole", **options), log=tmp_path / "whole.log")
    assert [step["on_policy"] for step in whole] == [1] * 5
    assert [step["weight_version"] for step in whole] == [1, 2, 3, 4, 5]
    assert all(step["rollout_train_logprob_diff"] < 1e-4 for step in whole)
    assert all(8 <= step["response_tokens"] <= 96 for step in whole)
    assert whole[0]["tokens"] > whole[0]["response_tokens"]
    arguments, log = gkd(models, data, tmp_path, "killed", **options), tmp_path / "killed.log"
    process = command.start(*arguments, log=log)
    command.wait_until(lambda: len(command.metrics(tmp_path / "killed")) >= 3, process, log=log)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = run(*arguments, "--resume_from_checkpoint", "auto", log=log)
    assert [without_times(step) for step in killed] == [without_times(step) for step in whole]
    weights = [load_file(tmp_path / name / "checkpoint-5" / "model.safetensors") for name in ("whole", "killed")]
    for tensor, value in weights[0].items():
        assert value.tobytes() == weights[1][tensor].tobytes(), tensor


def test_steps_on_own_and_on_the_teachers_responses_alternate_by_the_draw(models, tmp_path):
    """One file of the teacher's responses: a resumed run asks for no more of them, and draws as the whole run would have."""
    from rlhf.config import Config
    from rlhf.gkd import is_on_policy

    options = {"lmbda": 0.5, "seq_kd": "true", "train_iters": 4, "save_steps": 4, "tuner_type": "lora", "nproc_per_node": 1}
    arguments = gkd(models, rows(tmp_path / "prompts.jsonl", answered=False), tmp_path, "mixed", **options)
    run(*arguments, log=tmp_path / "mixed.log")
    file = tmp_path / "mixed" / "teacher_responses.jsonl"
    content = file.read_text()
    assert sorted(json.loads(line)["position"] for line in content.splitlines()) == list(range(4 * 8))
    further = ["--train_iters", 5, "--resume_from_checkpoint", "auto"]
    steps = run(*arguments, *further, log=tmp_path / "mixed.log")
    assert file.read_text().startswith(content) and len(file.read_text().splitlines()) == 5 * 8
    drawn = [is_on_policy(Config(task="gkd", lmbda=0.5), position) for position in range(0, 5 * 8, 8)]
    assert [step["on_policy"] for step in steps] == [int(own) for own in drawn] and len(set(drawn)) == 2


def without_times(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in TIMES}
