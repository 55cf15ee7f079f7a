"""`make demo-gkd`: a little sft makes a teacher that adds; a smaller student then learns what the teacher would say.

usage: distil.py [--seed 0] [--output_dir runs/demo]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from run import begin, checkpoints  # noqa: E402
from task import make_model  # noqa: E402


def main() -> None:
    demo = begin("gkd-")
    folder, teacher = demo.folder, demo.taught()
    make_model(folder / "student", demo.seed, layers=2)
    models = ["--model", folder / "student", "--teacher_model", teacher]
    data = ["--dataset", folder / "gkd.jsonl", "--val_dataset", folder / "held_out_answered.jsonl"]
    if demo.megaray("rlhf", "gkd", *models, *data, config="gkd.yaml").wait():
        sys.exit("distillation failed: see above")
    run = folder / "gkd"
    first, *_, last = (json.loads(line)["kl"] for line in open(run / "evaluations.jsonl"))
    steps = [json.loads(line) for line in open(run / "metrics.jsonl")]
    own = sum(step["on_policy"] for step in steps)
    print(
        f"demo: held-out KL to the teacher {first:.2f} -> {last:.2f} ({1 - last / first:.0%} lower), {len(steps)} steps, {own} "
        f"on own responses, {demo.seconds():.0f} s, checkpoint {checkpoints(run)[-1]}, report {run / 'report.html'}"
    )


if __name__ == "__main__":
    main()
