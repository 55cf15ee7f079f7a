"""`make demo`: teach a tiny model to add a little (sft), then GRPO until it is good; then ask it sums it has never seen.

usage: run.py [--seed 0] [--output_dir runs/demo]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

LITTLE = 0.41  # sft loss at which about a third of sampled answers is right
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from task import make_data, make_model  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    arguments = parser.parse_args()
    start = time.monotonic()
    work = arguments.output_dir.resolve() / f"seed{arguments.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    (work / "model").mkdir(parents=True)
    make_model(work / "model", arguments.seed)
    make_data(work, arguments.seed)
    common = ["--output_dir", str(work), "--seed", str(arguments.seed), "--data_seed", str(arguments.seed)]
    megaray("sft", "--run_name", "sft", "--model", str(work / "model"), "--dataset", str(work / "sft.jsonl"), *common)
    before = taught_a_little(work / "sft")
    megaray("rlhf", "--run_name", "grpo", "--model", str(before), "--dataset", str(work / "grpo.jsonl"), *common)
    after = checkpoints(work / "grpo")[-1]
    accuracy_before, accuracy_after = answers(work / "held_out.jsonl", [before, after])
    rewards = [json.loads(line)["reward"] for line in open(work / "grpo" / "metrics.jsonl")]
    print(
        f"demo: reward {rewards[0]:.2f} -> {fmean(rewards[-10:]):.2f}, held-out {accuracy_before:.2f} -> {accuracy_after:.2f}, "
        f"{len(rewards)} steps, {time.monotonic() - start:.0f} s, checkpoint {after}, report {work / 'grpo' / 'report.html'}"
    )


def megaray(task: str, *options: str) -> None:
    """One command, as a user types it."""
    config = HERE / ("sft.yaml" if task == "sft" else "grpo.yaml")
    command = [sys.executable, str(HERE.parent.parent / "rlhf" / "main.py"), task, "--config", str(config), *options]
    print("$ megaray", *command[2:], flush=True)
    subprocess.run(command, check=True)


def answers(questions: Path, folders: list[Path]) -> list[float]:
    """The share of the questions that each saved model answers rightly, all models at a time."""
    script = [sys.executable, str(HERE / "answer.py"), str(questions)]
    asked = [subprocess.Popen([*script, str(folder)], stdout=subprocess.PIPE, text=True) for folder in folders]
    outputs = [process.communicate()[0] for process in asked]
    assert not any(process.returncode for process in asked), "vLLM could not load a saved model: see above"
    return [float(output.strip().splitlines()[-1]) for output in outputs]


def taught_a_little(run: Path) -> Path:
    """The first checkpoint with a loss under `LITTLE` over its last steps: how soon depends on the seed."""
    losses = [row["loss"] for row in map(json.loads, open(run / "metrics.jsonl"))]
    taught = [path for path in checkpoints(run) if fmean(losses[step_of(path) - 20 : step_of(path)]) < LITTLE]
    return (taught or checkpoints(run)[-1:])[0]


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted(run.glob("checkpoint-*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


if __name__ == "__main__":
    main()
