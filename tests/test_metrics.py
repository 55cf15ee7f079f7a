"""The run's files: valid JSON lines, exact continuation, the progress line, TensorBoard."""

import contextlib
import json
import math
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rlhf.checkpoint import Checkpoint
from rlhf.config import Config
from rlhf.metrics import RunLog, file_offsets
from rlhf.records import Group, Prompt, Score

ROOT = Path(__file__).parent.parent


class Clock:
    """A timer whose seconds are known."""

    def __init__(self, **seconds: float):
        self.seconds = seconds

    def take_seconds(self) -> dict[str, float]:
        return dict(self.seconds)


def config(**options) -> Config:
    return Config(**{"task": "grpo", "report_to": [], "log_completions": True} | options)


def scored(step: int, texts: tuple[str, ...] = ("four", "five\u2028\n")) -> list[tuple[Group, Score]]:
    groups = []
    for index in range((step - 1) * 6, step * 6):
        prompt = Prompt(
            index=index,
            token_ids=np.arange(3, dtype=np.int32),
            messages=[{"role": "user", "content": f"question {index % 30}"}],
            columns={},
        )
        group = Group(
            prompt=prompt,
            tokens=None,
            texts=texts,
            finish_reasons=("stop", "length"),
            response_lengths=(3, 5),
            weight_version=step,
        )
        rewards = (1.0, None)
        groups.append((group, Score(rewards=rewards, by_function={"accuracy": rewards}, failures={"timeout": 1})))
    return groups


def metrics(step: int) -> dict:
    return {
        "reward": np.float32(0.5),
        "kl": math.nan if step % 3 == 0 else step / 1000,
        "loss": math.inf if step == 2 else -0.25,
        "response_tokens": 48,
        "weight_version": step,
        "seconds": {"step": 2.0},
    }


def read(file: Path) -> list[dict]:
    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in file.read_text().split("\n")[:-1]]


def run(folder: Path, first: int, last: int, *, resume: Checkpoint | None = None, **options) -> None:
    folder.mkdir(exist_ok=True)
    log = RunLog(folder, config(**options), total_steps=40, timers=[Clock(train_step=1.5, setup=9.0)], resume=resume)
    with contextlib.closing(log):
        for step in range(first, last + 1):
            log.step(step, metrics(step), scored(step))


def test_every_line_is_valid_json_and_what_is_not_finite_is_null(tmp_path):
    run(tmp_path, 1, 3)
    rows = read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["loss"] for row in rows] == [-0.25, None, -0.25]
    assert [row["kl"] for row in rows] == [0.001, 0.002, None]
    assert rows[0]["reward"] == 0.5 and rows[2]["weight_version"] == 3


def test_seconds_come_from_the_timers_and_tokens_per_second_from_them(tmp_path):
    run(tmp_path, 1, 1)
    row = read(tmp_path / "metrics.jsonl")[0]
    assert row["seconds"] == {"generate": 0.0, "score": 0.0, "logprobs": 0.0, "train": 1.5, "push": 0.0, "step": 2.0}
    assert row["tokens_per_second"] == 24.0  # 48 tokens in 2 s


def test_step_seconds_are_measured_from_one_step_to_the_next(tmp_path):
    start = time.monotonic()
    log = RunLog(tmp_path, config(), total_steps=2)
    for step in (1, 2):
        time.sleep(0.2)
        log.step(step, {})
    log.close()
    seconds = [row["seconds"]["step"] for row in read(tmp_path / "metrics.jsonl")]
    assert min(seconds) >= 0.2 and sum(seconds) <= time.monotonic() - start


def test_completions_hold_every_response_with_its_prompt_and_reward(tmp_path):
    run(tmp_path, 1, 2)
    rows = read(tmp_path / "completions.jsonl")
    assert len(rows) == 2 * 6 * 2
    assert rows[-1] == {
        "step": 2,
        "prompt_index": 11,
        "prompt": [{"role": "user", "content": "question 11"}],
        "response": "five\u2028\n",
        "reward": None,
        "by_function": {"accuracy": None},
        "finish_reason": "length",
        "response_length": 5,
        "weight_version": 2,
    }


def test_no_completions_file_unless_asked_but_samples_of_the_first_and_last_step(tmp_path):
    run(tmp_path, 1, 40, log_completions=False)
    assert not (tmp_path / "completions.jsonl").exists()
    steps = [row["step"] for row in read(tmp_path / "samples.jsonl")]
    assert steps[0] == 1 and steps[-1] == 40 and len(set(steps)) < 40


def test_a_sampled_prompt_is_sampled_again_whenever_it_comes_back(tmp_path):
    run(tmp_path, 1, 12)  # 30 prompts, 6 a step: the first step's prompts come back at steps 6 and 11
    rows = read(tmp_path / "samples.jsonl")
    first = {row["prompt"][0]["content"] for row in rows if row["step"] == 1}
    assert len(first) == 4
    for step in (6, 11):
        assert first <= {row["prompt"][0]["content"] for row in rows if row["step"] == step}


def test_text_that_is_not_valid_unicode_does_not_stop_the_run(tmp_path):
    log = RunLog(tmp_path, config(), total_steps=1)
    log.step(1, {}, scored(1, texts=("broken \ud800 pair", "fine")))
    log.close()
    assert read(tmp_path / "completions.jsonl")[0]["response"] == "broken ? pair"
    assert "broken ? pair" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("torn", ["", '{"step": 26, "rew'])
def test_a_resumed_run_leaves_the_same_bytes_as_an_uninterrupted_one(tmp_path, torn):
    run(tmp_path / "whole", 1, 40)
    killed = tmp_path / "killed"
    run(killed, 1, 17)
    checkpoint = Checkpoint(step=17, folder=killed / "checkpoint-17", state={}, offsets=file_offsets(killed))
    first_part = Checkpoint(step=17, folder=killed, state={}, offsets=file_offsets(killed))
    run(killed, 18, 25, resume=first_part)
    with open(killed / "metrics.jsonl", "a") as file:
        file.write(torn)
    run(killed, 18, 40, resume=checkpoint)
    for name in ("metrics.jsonl", "completions.jsonl", "samples.jsonl", "report.html"):
        whole = (tmp_path / "whole" / name).read_bytes().replace(b"whole", b"killed")
        assert (killed / name).read_bytes() == whole, name


def test_a_fresh_run_in_a_used_folder_starts_its_files_anew(tmp_path):
    run(tmp_path, 1, 5)
    run(tmp_path, 1, 2)
    assert len(read(tmp_path / "metrics.jsonl")) == 2


def test_a_metrics_file_shorter_than_the_checkpoint_says_is_named(tmp_path, capsys):
    run(tmp_path, 1, 2)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    run(tmp_path, 3, 3, resume=Checkpoint(step=2, folder=tmp_path, state={}, offsets={"metrics.jsonl": size + 7}))
    assert f"{size} bytes, {size + 7} when" in capsys.readouterr().out


def test_without_a_terminal_a_line_is_printed_every_logging_steps(tmp_path, capsys):
    run(tmp_path, 1, 12)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/40", "5/40", "10/40"]
    assert "reward 0.500" in lines[1] and "loss -0.25" in lines[1] and "s/step 2" in lines[1]
    assert lines[1].endswith("ETA 1:10")  # 35 steps of 2 s


def test_lines_are_printed_when_a_batch_of_updates_steps_over_logging_steps(tmp_path, capsys):
    log = RunLog(tmp_path, config(logging_steps=5), total_steps=20)
    for step in (4, 8, 12, 16, 20):
        log.step(step, {"seconds": {"step": 8.0}})
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["4/20", "8/20", "12/20", "16/20", "20/20"]
    assert lines[0].endswith("s/step 2  ETA 0:32")


def test_on_a_terminal_one_live_line_is_rewritten(tmp_path):
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from rlhf.config import Config
from rlhf.metrics import RunLog
log = RunLog(Path({str(tmp_path)!r}), Config(report_to=[]), total_steps=9)
for step in range(1, 10): log.step(step, {{"reward": step / 10}})
log.close()
"""
    main, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    program = subprocess.Popen([sys.executable, "-c", script], stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    text = b""
    with contextlib.suppress(OSError):  # the terminal closes with the program
        while part := os.read(main, 65536):
            text += part
    assert program.wait() == 0, text
    assert b"step 9/9" in text and b"reward 0.900" in text
    assert b"\x1b[1A" in text  # the cursor goes up: lines are rewritten


def test_tensorboard_reads_the_scalars_and_drops_what_an_interrupted_run_wrote_after_its_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, config(report_to=["tensorboard"]), total_steps=4)
    for step in (1, 2, 3):
        log.step(step, {"reward": step / 4, "kl": math.nan})
    log.close()
    resumed = Checkpoint(step=2, folder=tmp_path, state={}, offsets={})
    log = RunLog(tmp_path, config(report_to=["tensorboard"]), total_steps=4, resume=resumed)
    log.step(3, {"reward": 0.875})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/reward")] == [(1, 0.25), (2, 0.5), (3, 0.875)]
    assert "seconds/step" in events.Tags()["scalars"] and "train/kl" not in events.Tags()["scalars"]


def test_the_log_imports_no_torch(tmp_path):
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from rlhf.config import Config
from rlhf.metrics import RunLog
log = RunLog(Path({str(tmp_path)!r}), Config(), total_steps=1)
log.step(1, {{"loss": 1.0}}); log.close()
assert "torch" not in sys.modules and "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_reporter_that_is_unknown_or_not_installed_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'swanlab' is not supported: choose from tensorboard, wandb, none"):
        RunLog(tmp_path, config(report_to=["swanlab"]), total_steps=1)
    with pytest.raises(ValueError, match="none stands alone"):
        RunLog(tmp_path, config(report_to=["none", "tensorboard"]), total_steps=1)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ValueError, match="pip install wandb"):
        RunLog(tmp_path, config(report_to=["wandb"]), total_steps=1)
