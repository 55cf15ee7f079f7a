"""Tasks on rows, experts, the optimizer in host memory and lasting engines, on GPUs and in bfloat16, by their commands."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from statistics import fmean

import command
import pytest
from cards import NEEDS_TWO
from demo_command import DEMO, demo
from tasks import METRIC, VARIABLES, make_data
from tiny import make_tiny_moe

LEARNT = {"dpo": 0.8, "kto": 0.8, "rm": 0.8, "seq_cls": 0.8, "generative_reranker": 0.8, "embedding": 0.8}


def finished(*words, log: Path, address: str, **options) -> str:
    """What a command printed that must succeed."""
    status, output = command.run(*words, log=log, address=address, **options)
    assert status == 0, output[-4000:]
    return output


def changed(words: list, **options) -> list:
    return [*words, *(word for name, value in options.items() for word in (f"--{name}", value))]


def evaluations(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", LEARNT)
def test_a_task_reaches_its_held_out_figure(gpu_ray, work, monkeypatch, task):
    """The demo of two CPU cores, word for word but for bfloat16 and, except in dpo, one rank; held-out rows as there."""
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    folder = work / f"{task}-data"
    folder.mkdir()
    make_data(folder, task, 0)
    words = ["rlhf" if task in ("dpo", "kto", "rm") else "sft", "--config", DEMO / f"{task}.yaml"]
    options = {"model": work / "model", "torch_dtype": "bfloat16", "dataset": folder / "train.jsonl"}
    options |= {"val_dataset": folder / "held_out.jsonl", "output_dir": work, "run_name": task, "report_to": "none"}
    options |= {"nproc_per_node": 2 if task == "dpo" else 1, "cpus_per_rank": 0.5}
    finished(*changed(words, **options), log=work / f"{task}.log", address=gpu_ray)
    first, *_, last = (row[METRIC.get(task, "accuracy")] for row in evaluations(work / task))
    print(task, first, last)
    assert last >= max(LEARNT[task], first + 0.2)


@pytest.mark.parametrize("teacher", ["megatron", pytest.param("vllm", marks=NEEDS_TWO)])
def test_distillation_halves_the_divergence(gpu_ray, work, taught, teacher):
    """From a random model, half of the steps on own responses: policy, teacher and engine by turns on one GPU.

    Or the teacher in an engine on a GPU of its own, which gives the likeliest tokens alone.
    """
    name = f"gkd-{teacher}"
    options = {"model": work / "model", "teacher_model": taught, "dataset": work / "gkd.jsonl", "torch_dtype": "bfloat16"}
    options |= {"val_dataset": work / "held_out_answered.jsonl", "output_dir": work, "run_name": name, "report_to": "none"}
    options |= {"vllm_gpu_memory_utilization": 0.1, "train_iters": 120}
    if teacher == "vllm":
        options |= {"teacher.backend": "vllm", "gkd_logits_topk": 16}
    words = changed(["rlhf", "--config", DEMO / "gkd.yaml"], **options)
    finished(*words, log=work / f"{name}.log", address=gpu_ray)
    first, *_, last = (row["kl"] for row in evaluations(work / name))
    print(name, first, last)
    assert last <= first / 2
    assert any(row["on_policy"] for row in command.metrics(work / name))


def test_experts_split_over_two_ranks_are_pushed_to_an_engine(gpu_ray, work):
    """GRPO of a tiny mixture of experts: rollout and policy logprobs agree after every push."""
    model = make_tiny_moe(work / "moe", head_dim=32)
    variety = "def variety(completions, **columns):\n    return [len(set(text)) for text in completions]\n"
    (work / "variety.py").write_text(variety)
    rows = [{"messages": [{"role": "user", "content": f"what is {a}+{a}?"}], "solution": "1"} for a in range(40)]
    (work / "moe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "rlhf_type": "grpo", "model": model, "dataset": work / "moe.jsonl", "external_plugins": work / "variety.py",
        "reward_funcs": "variety", "output_dir": work, "run_name": "moe-run", "num_generations": 4, "beta": 0.04,
        "max_completion_length": 12, "vllm_max_model_len": 128, "vllm_enforce_eager": "true", "reward_workers": 1,
        "template_backend": "jinja", "global_batch_size": 16, "max_length": 64, "lr": 1e-3, "report_to": "none",
        "expert_model_parallel_size": 2, "nproc_per_node": 2, "micro_batch_size": 4, "logging_steps": 1, "train_iters": 3,
        "torch_dtype": "bfloat16", "vllm_gpu_memory_utilization": 0.1, "rollout.num_engines": 2, "cpus_per_rank": 0.5,
    }  # fmt: skip
    finished(*changed(["rlhf"], **options), log=work / "moe.log", address=gpu_ray)
    rows = command.metrics(work / "moe-run")
    print("moe", [row["rollout_train_logprob_diff"] for row in rows])
    assert max(row["rollout_train_logprob_diff"] for row in rows) <= 0.03
    assert rows[2]["kl"] > 1e-4


def test_the_optimizer_in_host_memory_takes_the_same_steps(gpu_ray, work):
    """Adam on the CPU in float32 as on the GPU."""
    losses = {}
    for place in ("true", "false"):
        options = {"train_iters": 30, "save_steps": 30, "optimizer_cpu_offload": place}
        words = demo("sft", work / "model", work, f"adam-{place}", **options)
        finished(*words, log=work / f"adam-{place}.log", address=gpu_ray)
        losses[place] = [row["loss"] for row in command.metrics(work / f"adam-{place}")]
    print("adam", losses["true"][-1], losses["false"][-1])
    assert losses["true"][-1] < losses["true"][0] - 0.5
    assert losses["true"] == pytest.approx(losses["false"], rel=0.02)


def test_a_saved_adapter_answers_and_lasting_engines_serve_a_job(gpu_ray, work, taught):
    """LoRA by sft, then `infer --adapters`; then `megaray rollout`, and a GRPO job that finds its engine."""
    words = demo("sft", taught, work, "lora", train_iters=200, save_steps=200, tuner_type="lora", lora_rank=32)
    finished(*words, log=work / "lora.log", address=gpu_ray)
    words = ["infer", "--adapters", work / "lora" / "checkpoint-200", "--template_backend", "jinja", "--model_type", "qwen3"]
    options = {"val_dataset": work / "held_out.jsonl", "result_path": work / "answers.jsonl", "max_completion_length": 4}
    options |= {"vllm_gpu_memory_utilization": 0.1, "vllm_max_model_len": 32, "temperature": 0, "vllm_enforce_eager": "true"}
    finished(*changed(words, **options), log=work / "infer.log", address=gpu_ray)
    answers = [json.loads(line) for line in (work / "answers.jsonl").read_text().splitlines()]
    right = fmean(row["response"] == row["solution"] for row in answers)
    print("lora", right)
    assert len(answers) == 200 and right >= 0.4

    engine = {"vllm_gpu_memory_utilization": 0.1, "vllm_max_model_len": 32, "vllm_max_num_seqs": 512}
    engine |= {"vllm_enforce_eager": "true", "torch_dtype": "bfloat16", "model": taught}
    log = work / "rollout.log"
    offering = command.start(*changed(["rollout"], **engine), log=log, address=gpu_ray)
    try:
        command.wait_until(lambda: "ready: 1 rollout engine" in log.read_text(), offering, log=log)
        job = demo("rlhf", taught, work, "job", vllm_mode="server", train_iters=16)
        output = finished(*job, log=work / "job.log", address=gpu_ray)
        assert "using the rollout engines named" in output
        rows = command.metrics(work / "job")
        assert max(row["rollout_train_logprob_diff"] for row in rows) <= 0.03
        offering.send_signal(signal.SIGINT)
        assert offering.wait(timeout=30) in (0, 130)
    finally:
        offering.kill()
