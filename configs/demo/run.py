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
    before = last_checkpoint(work / "sft")
    megaray("rlhf", "--run_name", "grpo", "--model", str(before), "--dataset", str(work / "grpo.jsonl"), *common)
    after = last_checkpoint(work / "grpo")
    questions = work / "held_out.jsonl"
    result = subprocess.run(
        [sys.executable, str(HERE / "answer.py"), str(questions), str(before), str(after)],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    accuracy_before, accuracy_after = json.loads(result.stdout.strip().splitlines()[-1])
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


def last_checkpoint(run: Path) -> Path:
    """The newest checkpoint folder of a run."""
    return max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


if __name__ == "__main__":
    main()
