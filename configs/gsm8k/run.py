"""`make gsm8k`: real preferences. sft, then rm, dpo and kto on right and wrong solutions, then GRPO with the reward model.

usage: run.py DATA [--output_dir runs/gsm8k] [--seed 0] [--stages sft rm dpo kto pairs grpo eval]

DATA: a folder with GSM8K's published files, see data.py. Stages that are complete in the output folder are passed over, so
that a run that was stopped goes on where it was. docs/gsm8k.md says what comes out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from data import make_data  # noqa: E402
from model import make_model  # noqa: E402

FILES = {"sft": "sft", "rm": "pairs", "dpo": "pairs", "kto": "labelled", "grpo": "prompts"}  # of rows, by training stage
STAGES = ("sft", "rm", "dpo", "kto", "pairs", "grpo", "eval")
ENDS = 3  # generations at each end of GRPO that are compared


def main() -> None:
    parser = argparse.ArgumentParser(description="GSM8K's preferences: sft, rm, dpo, kto, then GRPO with the reward model.")
    parser.add_argument("data", type=Path, help="folder with example_model_solutions.jsonl and train.jsonl")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gsm8k"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    arguments = parser.parse_args()
    start, work = time.monotonic(), arguments.output_dir.resolve() / f"seed{arguments.seed}"
    if not (work / "model").exists():
        make_data(arguments.data, work / "data", seed=arguments.seed)
        make_model(work / "model.making", work / "data" / "sft.jsonl", seed=arguments.seed)
        (work / "model.making").rename(work / "model")
    for stage in filter(arguments.stages.__contains__, STAGES):
        began = time.monotonic()
        if stage == "pairs":
            compare(work)
        elif stage == "eval":
            answer(work)
        else:
            train(stage, work, arguments.seed)
        print(f"{stage}: {time.monotonic() - began:.0f} s", flush=True)
    for line in summary(work):
        print(line)
    print(f"gsm8k: {time.monotonic() - start:.0f} s; reports are {work}/*/report.html")


def train(stage: str, work: Path, seed: int) -> None:
    """One training command, unless its last checkpoint is there; what a stopped one has left is removed first."""
    if checkpoint(work, stage).exists():
        return
    shutil.rmtree(work / stage, ignore_errors=True)
    rows = FILES[stage]
    model = work / "model" if stage == "sft" else checkpoint(work, "sft")
    options = {"config": HERE / f"{stage}.yaml", "model": model, "dataset": work / "data" / f"{rows}.jsonl"}
    if stage == "grpo":
        options["reward_model"] = checkpoint(work, "rm")
    else:
        options["val_dataset"] = work / "data" / f"held_out_{rows}.jsonl"
    options |= {"output_dir": work, "run_name": stage, "seed": seed, "data_seed": seed}
    megaray("sft" if stage == "sft" else "rlhf", options)


def compare(work: Path) -> None:
    """Held-out pair accuracies, by transformers, into pairs.json."""
    options = {"base": checkpoint(work, "sft"), "result": work / "pairs.json"}
    options |= {name: checkpoint(work, name) for name in ("rm", "dpo", "kto")}
    execute([HERE / "pairs.py", work / "data" / "held_out_pairs.jsonl", work / "data" / "labelled.jsonl"], options)


def answer(work: Path) -> None:
    """Answers of the policy before and after GRPO to the held-out questions, sampled as in training."""
    for stage in ("sft", "grpo"):
        megaray("eval", {
            "model": checkpoint(work, stage), "dataset": work / "data" / "held_out_prompts.jsonl", "reward_funcs": "accuracy",
            "template_backend": "jinja", "torch_dtype": "float32", "max_new_tokens": 192, "vllm_max_model_len": 448,
            "vllm_enforce_eager": "true", "temperature": 1.0, "num_generations": 8, "result_path": work / f"eval_{stage}.json",
        })  # fmt: skip


def megaray(task: str, options: dict[str, Any]) -> None:
    """One command, as a user types it."""
    execute([HERE.parent.parent / "rlhf" / "main.py", task], options)


def execute(command: list[Any], options: dict[str, Any]) -> None:
    words = [str(word) for word in [*command, *(word for name, value in options.items() for word in (f"--{name}", value))]]
    print("$ python", *words, flush=True)
    if subprocess.run([sys.executable, *words]).returncode:
        sys.exit(f"{words[0]} failed: see above")


def checkpoint(work: Path, stage: str) -> Path:
    """The last checkpoint of a training stage."""
    return work / stage / f"checkpoint-{yaml.safe_load((HERE / f'{stage}.yaml').read_text())['train_iters']}"


def summary(work: Path) -> list[str]:
    """One line a stage, of the files that it left."""
    lines = []
    for stage in ("sft", "rm", "dpo", "kto"):
        if evaluations := read(work / stage / "evaluations.jsonl"):
            names = [name for name in ("loss", "rewards/accuracies") if name in evaluations[0]]
            ends = (f"{name} {evaluations[0][name]:.3f} -> {evaluations[-1][name]:.3f}" for name in names)
            lines.append(f"{stage:5} held-out {', '.join(ends)} after {evaluations[-1]['step']} steps")
    if metrics := read(work / "grpo" / "metrics.jsonl"):
        names = [name for name in metrics[0] if name.startswith("reward/")]
        ends = (
            f"{name} {fmean(row[name] for row in metrics[:ENDS]):.3f} -> {fmean(row[name] for row in metrics[-ENDS:]):.3f}"
            for name in [*names, "response_length"]
        )
        lines.append(f"grpo  {', '.join(ends)} (the first and last {ENDS} generations)")
    for stage in ("sft", "grpo"):
        if (path := work / f"eval_{stage}.json").exists():
            found = json.loads(path.read_text())["rewards"]["accuracy"]
            text = f"{found['mean']:.4f} ± {found['std_error']:.4f} of {found['count']}"
            lines.append(f"eval  {stage}: right {text} answers to held-out questions")
    return lines


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
