"""Whole runs of tasks with a head by their command, on two ranks: killed and resumed, and evaluated on held-out rows."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import command
import pytest
from safetensors.numpy import load_file
from tiny import make_tiny_model

TIMES = ("seconds", "tokens_per_second")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def asked(a: int, text: str) -> dict:
    messages = [{"role": "user", "content": f"what is {a}+{a}?"}]
    return {
        "rm": {"messages": [*messages, {"role": "assistant", "content": text}], "rejected_response": "no answer"},
        "embedding": {"messages": messages, "positive_messages": [[{"role": "user", "content": text}]]},
    }


def arguments(task: str, model: Path, folder: Path, name: str, **more) -> list:
    rows = folder / f"{task}.jsonl"
    rows.write_text("".join(json.dumps(asked(a, f"{2 * a} is the answer")[task]) + "\n" for a in range(40)))
    options = {
        "model": model, "dataset": rows, "split_dataset_ratio": 0.2, "template_backend": "jinja", "output_dir": folder,
        "run_name": name, "global_batch_size": 8, "micro_batch_size": 2, "train_iters": 5, "save_steps": 2, "eval_steps": 2,
        "lr": 1e-3, "nproc_per_node": 2, "cpus_per_rank": 0.5, "deterministic": "true", "report_to": "none", "logging_steps": 1,
    }  # fmt: skip
    words = [word for key, value in (options | more).items() for word in (f"--{key}", value)]
    return ["rlhf", "--rlhf_type", "rm", *words] if task == "rm" else ["sft", "--task_type", task, *words]


def lines(file: Path) -> list[dict]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def test_a_killed_reward_model_goes_on_bit_for_bit(model, tmp_path):
    """On packs of two pairs or more, of which it sees some a second time."""
    packs = {"packing": "true", "packing_length": 200, "global_batch_size": 4}
    status, output = command.run(*arguments("rm", model, tmp_path, "whole", **packs), log=tmp_path / "whole.log")
    assert status == 0, output
    words, log = arguments("rm", model, tmp_path, "killed", **packs), tmp_path / "killed.log"
    process = command.start(*words, log=log)
    command.wait_until(lambda: len(command.metrics(tmp_path / "killed")) >= 3, process, log=log)
    process.send_signal(signal.SIGKILL)
    process.wait()
    status, output = command.run(*words, "--resume_from_checkpoint", "auto", log=log)
    assert status == 0, output
    for file in ("metrics.jsonl", "evaluations.jsonl"):
        assert lines(tmp_path / "killed" / file) == lines(tmp_path / "whole" / file)
    evaluations, steps = (lines(tmp_path / "whole" / name) for name in ("evaluations.jsonl", "metrics.jsonl"))
    assert [row["step"] for row in evaluations] == [0, 2, 4, 5] and "rewards/accuracies" in evaluations[0]
    assert steps[-1]["epoch"] > 1 and all(400 < row["tokens"] <= 800 for row in steps)
    weights = [load_file(tmp_path / name / "checkpoint-5" / "model.safetensors") for name in ("whole", "killed")]
    assert weights[0]["score.weight"].shape == (1, 64)
    for tensor, value in weights[0].items():
        assert value.tobytes() == weights[1][tensor].tobytes(), tensor


def test_embeddings_are_evaluated_among_all_held_out_rows(model, tmp_path, monkeypatch):
    monkeypatch.setenv("INFONCE_TEMPERATURE", "0.05")
    status, output = command.run(*arguments("embedding", model, tmp_path, "run"), log=tmp_path / "run.log")
    assert status == 0, output
    evaluations = lines(tmp_path / "run" / "evaluations.jsonl")
    assert [row["step"] for row in evaluations] == [0, 2, 4, 5]
    assert all((8 * row["recall@1"]) % 1 == pytest.approx(0, abs=1e-6) for row in evaluations)  # of 8 held-out rows
    assert json.loads((tmp_path / "run" / "args.json").read_text())["environment"] == {"INFONCE_TEMPERATURE": "0.05"}
