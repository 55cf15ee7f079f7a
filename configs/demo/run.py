"""`make demo`: teach a tiny model to add a little (sft), then GRPO until it is good; then ask it sums it has never seen.

usage: run.py [--seed 0] [--output_dir runs/demo]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

LITTLE = 0.41  # sft loss at which about a third of sampled answers is right
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from task import make_data, make_model  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Demo:
    """A folder with the data and a new model, and the commands that work on them."""

    folder: Path
    seed: int
    started: float  # by time.monotonic()

    def megaray(self, task: str, run: str, *options: str | Path, config: str) -> subprocess.Popen:
        """One command, as a user types it, started. `config`: a file beside this one."""
        given = ["--config", HERE / config, "--output_dir", self.folder, "--run_name", run]
        given += ["--seed", self.seed, "--data_seed", self.seed]
        command = [sys.executable, *map(str, [HERE.parent.parent / "rlhf" / "main.py", task, *given, *options])]
        print("$ megaray", *command[2:], flush=True)
        return subprocess.Popen(command)

    def taught(self) -> Path:
        """A checkpoint of the model after a little sft."""
        data = self.folder / "sft.jsonl"
        sft = self.megaray("sft", "sft", "--model", self.folder / "model", "--dataset", data, config="sft.yaml")
        return stopped_when_taught(sft, self.folder / "sft")

    def seconds(self) -> float:
        return time.monotonic() - self.started


def main() -> None:
    demo = begin()
    folder, before = demo.folder, demo.taught()
    if demo.megaray("rlhf", "grpo", "--model", before, "--dataset", folder / "grpo.jsonl", config="grpo.yaml").wait():
        sys.exit("GRPO failed: see above")
    after = checkpoints(folder / "grpo")[-1]
    accuracy_before, accuracy_after = answers(folder / "held_out.jsonl", [before, after])
    rewards = [json.loads(line)["reward"] for line in open(folder / "grpo" / "metrics.jsonl")]
    print(
        f"demo: reward {rewards[0]:.2f} -> {fmean(rewards[-10:]):.2f}, held-out {accuracy_before:.2f} -> {accuracy_after:.2f}, "
        f"{len(rewards)} steps, {demo.seconds():.0f} s, checkpoint {after}, report {folder / 'grpo' / 'report.html'}"
    )


def begin(name: str = "") -> Demo:
    """Read the command line; make the model and the data in a new folder, whose name begins with `name`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    arguments = parser.parse_args()
    started = time.monotonic()
    folder = arguments.output_dir.resolve() / f"{name}seed{arguments.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    (folder / "model").mkdir(parents=True)
    make_model(folder / "model", arguments.seed)
    make_data(folder, arguments.seed)
    return Demo(folder=folder, seed=arguments.seed, started=started)


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
