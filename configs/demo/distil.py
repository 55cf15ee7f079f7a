"""`make demo-gkd`: a little sft makes a teacher that adds; a smaller student then learns what the teacher would say.

usage: distil.py [--seed 0] [--output_dir runs/demo]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from run import checkpoints, megaray, stopped_when_taught  # noqa: E402
from task import make_data, make_model  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    arguments = parser.parse_args()
    start = time.monotonic()
    work = arguments.output_dir.resolve() / f"gkd-seed{arguments.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    for name, layers in (("model", 4), ("student", 2)):
        (work / name).mkdir(parents=True)
        make_model(work / name, arguments.seed, layers=layers)
    make_data(work, arguments.seed)
    common = ["--output_dir", str(work), "--seed", str(arguments.seed), "--data_seed", str(arguments.seed)]
    data = ["--dataset", str(work / "gkd.jsonl"), "--val_dataset", str(work / "held_out_answered.jsonl")]
    sft = megaray("sft", "--run_name", "sft", "--model", str(work / "model"), "--dataset", str(work / "sft.jsonl"), *common)
    teacher = stopped_when_taught(sft, work / "sft")
    models = ["--model", str(work / "student"), "--teacher_model", str(teacher)]
    if megaray("rlhf", "--run_name", "gkd", *models, *data, *common, config="gkd.yaml").wait():
        sys.exit("distillation failed: see above")
    run = work / "gkd"
    first, *_, last = (json.loads(line)["kl"] for line in open(run / "evaluations.jsonl"))
    steps = [json.loads(line) for line in open(run / "metrics.jsonl")]
    own = sum(step["on_policy"] for step in steps)
    print(
        f"demo: held-out KL to the teacher {first:.2f} -> {last:.2f} ({1 - last / first:.0%} lower), {len(steps)} steps, {own} "
        f"on own responses, {time.monotonic() - start:.0f} s, checkpoint {checkpoints(run)[-1]}, report {run / 'report.html'}"
    )


if __name__ == "__main__":
    main()
