"""The demos, by their commands: each metric on held-out rows, before and after."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
DEMO = Path(__file__).resolve().parent.parent / "configs" / "demo"
LEARNT = 0.8  # of pairs, classes, documents, neighbours; chance is 0.5 or less
LOWER = 0.7  # of the first loss


def last_line(script: str, *arguments: str, output: Path) -> str:
    """What a demo says at its end."""
    command = [sys.executable, str(DEMO / script), *arguments, "--output_dir", str(output)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout.strip().splitlines()[-1]


def numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found, text
    return [float(number) for number in found.groups()]


@pytest.mark.parametrize("task", ["pt", "sft"])
def test_the_loss_falls_by_a_third(tmp_path, task):
    line = last_line("tasks.py", task, output=tmp_path)
    first, last = numbers(r"held-out loss ([\d.]+) -> ([\d.]+)", line)
    assert last <= LOWER * first, line


@pytest.mark.parametrize("task", ["dpo", "kto", "rm", "seq_cls", "reranker", "generative_reranker", "embedding"])
def test_held_out_rows_are_judged_rightly(tmp_path, task):
    line = last_line("tasks.py", task, output=tmp_path)
    first, last = numbers(r"held-out \S+ ([\d.]+) -> ([\d.]+)", line)
    assert last >= max(LEARNT, first + 0.2), line


def test_a_student_comes_half_way_to_its_teacher(tmp_path):
    line = last_line("distil.py", output=tmp_path)
    first, last = numbers(r"held-out KL to the teacher ([\d.]+) -> ([\d.]+)", line)
    assert last <= first / 2, line


def test_grpo_learns_to_add(tmp_path):
    line = last_line("run.py", output=tmp_path)
    reward, later, before, after = numbers(r"reward ([\d.]+) -> ([\d.]+), held-out ([\d.]+) -> ([\d.]+)", line)
    assert later >= 0.8 and later >= reward + 0.3 and after >= before + 0.2, line
