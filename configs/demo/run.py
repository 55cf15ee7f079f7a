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
    sft = megaray("sft", "--run_name", "sft", "--model", str(work / "model"), "--dataset", str(work / "sft.jsonl"), *common)
    before = stopped_when_taught(sft, work / "sft")
    grpo = megaray("rlhf", "--run_name", "grpo", "--model", str(before), "--dataset", str(work / "grpo.jsonl"), *common)
    if grpo.wait():
        sys.exit("GRPO failed: see above")
    after = checkpoints(work / "grpo")[-1]
    accuracy_before, accuracy_after = answers(work / "held_out.jsonl", [before, after])
    rewards = [json.loads(line)["reward"] for line in open(work / "grpo" / "metrics.jsonl")]
    print(
        f"demo: reward {rewards[0]:.2f} -> {fmean(rewards[-10:]):.2f}, held-out {accuracy_before:.2f} -> {accuracy_after:.2f}, "
        f"{len(rewards)} steps, {time.monotonic() - start:.0f} s, checkpoint {after}, report {work / 'grpo' / 'report.html'}"
    )


def megaray(task: str, *options: str, config: str | None = None) -> subprocess.Popen:
    """One command, as a user types it, started. `config`: a file beside this one (default: that of sft, or of GRPO)."""
    config = HERE / (config or ("sft.yaml" if task == "sft" else "grpo.yaml"))
    command = [sys.executable, str(HERE.parent.parent / "rlhf" / "main.py"), task, "--config", str(config), *options]
    print("$ megaray", *command[2:], flush=True)
    return subprocess.Popen(command)


def answers(questions: Path, folders: list[Path]) -> list[float]:
    """The share of the questions that each saved model answers rightly, all models at a time."""
    script = [sys.executable, str(HERE / "answer.py"), str(questions)]
    asked = [subprocess.Popen([*script, str(folder)], stdout=subprocess.PIPE, text=True) for folder in folders]
    outputs = [process.communicate()[0] for process in asked]
    assert not any(process.returncode for process in asked), "vLLM could not load a saved model: see above"
    return [float(output.strip().splitlines()[-1]) for output in outputs]


def stopped_when_taught(sft: subprocess.Popen, run: Path) -> Path:
    """The first checkpoint seen with a loss under `LITTLE` over its last 20 steps; how soon that is depends on the seed."""
    try:
        while sft.poll() is None:
            time.sleep(0.2)
            for checkpoint in checkpoints(run)[-1:]:
                lines = (run / "metrics.jsonl").read_text().splitlines()[: step_of(checkpoint)]
                loss = fmean(json.loads(line)["loss"] for line in lines[-20:])
                if loss < LITTLE:
                    print(f"the loss is {loss:.2f}: enough of sft", flush=True)
                    return checkpoint
    finally:
        sft.terminate()  # a run can be stopped at any moment
        sft.wait()
    sys.exit("sft ended before it was good enough: see above")


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted((path for path in run.glob("checkpoint-*") if path.suffix != ".writing"), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


if __name__ == "__main__":
    main()
