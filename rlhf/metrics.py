"""What a run shows and keeps of each step: progress, metrics.jsonl, evaluations.jsonl, completions.jsonl, samples.jsonl,
TensorBoard, W&B.

The files only grow, a line at a time, and `file_offsets` says how far: a resumed run cuts them back to its checkpoint's
offsets, and then writes what the uninterrupted run would have written. A value that is not finite is written as null.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlhf.report import write_report
from rlhf.reporters import Progress, TensorBoard, WandB, check_reporters

if TYPE_CHECKING:
    from rlhf.checkpoint import Checkpoint
    from rlhf.config import Config
    from rlhf.records import Group, Score

METRICS, COMPLETIONS, SAMPLES, EVALUATIONS = FILES = (
    "metrics.jsonl", "completions.jsonl", "samples.jsonl", "evaluations.jsonl"
)  # fmt: skip
ALWAYS = ("generate", "score", "logprobs", "train", "push")  # phases of GRPO that are there also when they took no time
PHASE_OF_METHOD = {
    "next_batch": "data",
    "generate": "generate",
    "score": "score",
    "logprobs": "logprobs",
    "token_logits": "logprobs",
    "sequence_values": "logprobs",
    "train_step": "train",
    "evaluate": "evaluate",
    "push": "push",
    "switch": "switch",
    "save": "save",
}
MILESTONES = 20  # about so many steps of a run leave samples and renew the report
SAMPLED_GROUPS = 4  # of each such step
SAMPLED_RESPONSES = 4  # of each such group
SAMPLED_CHARACTERS = 4000  # of each such response


class Timer(Protocol):
    """What measures its own calls: the actor groups, the rollout engines, the scorer, the data stream."""

    def take_seconds(self) -> dict[str, float]:
        """Seconds waited in each method since the last call of this."""


class RunLog:
    """The record of one run in its folder. Close it, also when the run fails (`contextlib.closing`)."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        *,
        total_steps: int,
        timers: Sequence[Timer] = (),
        constants: Mapping[str, float] | None = None,
        resume: Checkpoint | None = None,
    ):
        """Make it just before the first step: the first step's seconds count from here. `constants` are metrics of every step.

        Raises ValueError for a reporter that is unknown or not installed.
        """
        check_reporters(config.report_to)
        self.folder, self.config, self.total_steps, self.timers = folder, config, total_steps, timers
        self.constants = dict(constants or {})
        cut_back(folder, resume.offsets if resume else {})
        self._last_step = resume.step if resume else 0
        self._followed = _sampled_prompts(folder / SAMPLES)
        self._progress = Progress(total_steps, config.logging_steps, self._last_step)
        self._reporters: list[TensorBoard | WandB] = []
        if "tensorboard" in config.report_to:
            self._reporters.append(TensorBoard(folder / "tensorboard", self._last_step + 1))
        if "wandb" in config.report_to:
            self._reporters.append(WandB(folder, config, self._last_step + 1))
        self._since = time.monotonic()
        self._take_seconds()

    def step(self, step: int, metrics: Mapping[str, Any], groups: Sequence[tuple[Group, Score]] | None = None) -> None:
        """Record a finished step; `step` counts from 1 and may advance by more than one.

        Adds `seconds` {phase: seconds} from the timers, `step` among them, and `tokens_per_second` from the metric
        `response_tokens` or `tokens`.
        """
        row: dict[str, Any] = {"step": step, **metrics, **self.constants}
        row["seconds"] = self._take_seconds() | row.get("seconds", {})
        tokens = row.get("response_tokens", row.get("tokens"))
        if tokens is not None and "tokens_per_second" not in row:
            row["tokens_per_second"] = tokens / row["seconds"]["step"]
        row = _plain(row)
        self._append(METRICS, [row])
        for reporter in self._reporters:
            reporter.log(step, dict(_flat(row)))
        if groups and self.config.log_completions:
            self._append(COMPLETIONS, _completions(step, groups))
        milestone = self._is_milestone(step)
        if groups:
            self._sample(step, groups, milestone)
        self._progress.show(step, row)
        if milestone:
            write_report(self.folder)
        self._last_step = step

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record metrics of the held-out rows after `step` steps."""
        row = _plain({"step": step, **metrics})
        self._append(EVALUATIONS, [row])
        for reporter in self._reporters:
            reporter.log(step, {f"evaluation/{name}": value for name, value in row.items() if name != "step"})
        self._progress.evaluation(step, row)

    def close(self) -> None:
        """Write report.html and close what is open."""
        self._progress.close()
        for reporter in self._reporters:
            reporter.close()
        write_report(self.folder)

    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        with open(self.folder / name, "a", encoding="utf-8", errors="replace") as file:  # a lone surrogate becomes "?"
            file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False, default=str) + "\n" for row in rows)

    def _take_seconds(self) -> dict[str, float]:
        """Seconds of each phase since the last call of this, and of all since then (`step`)."""
        seconds = dict.fromkeys(ALWAYS if self.config.task == "grpo" else ("train",), 0.0)
        for timer in self.timers:
            for method, waited in timer.take_seconds().items():
                if method in PHASE_OF_METHOD:
                    phase = PHASE_OF_METHOD[method]
                    seconds[phase] = seconds.get(phase, 0.0) + waited
        now = time.monotonic()
        seconds["step"], self._since = now - self._since, now
        return seconds

    def _is_milestone(self, step: int) -> bool:
        """The first step, the last one, and about `MILESTONES` between them."""
        every = max(1, self.total_steps // MILESTONES)
        return self._last_step == 0 or step >= self.total_steps or step // every > self._last_step // every

    def _sample(self, step: int, groups: Sequence[tuple[Group, Score]], milestone: bool) -> None:
        """Keep a few groups of some steps, and every later group of a prompt that was kept in the first of them."""
        kept = [pair for pair in groups if _prompt_key(pair[0].prompt.messages) in self._followed]
        if milestone:
            indices = {group.prompt.index for group, _ in kept}
            others = [pair for pair in groups if pair[0].prompt.index not in indices]
            kept += others[: max(0, SAMPLED_GROUPS - len(kept))]
        rows = _completions(step, kept, limit=SAMPLED_RESPONSES)
        self._append(SAMPLES, (row | {"response": row["response"][:SAMPLED_CHARACTERS]} for row in rows))
        if not self._followed:
            self._followed = {_prompt_key(group.prompt.messages) for group, _ in kept}


def file_offsets(folder: Path) -> dict[str, int]:
    """Bytes of each file that the steps so far have written, and that are now on the disk."""
    offsets = {}
    for name in FILES:
        if (folder / name).exists():
            with open(folder / name, "rb") as file:
                os.fsync(file.fileno())
                offsets[name] = file.seek(0, os.SEEK_END)
    return offsets


def cut_back(folder: Path, offsets: Mapping[str, int]) -> None:
    """Cut the run's files to these sizes in bytes, one that is not named to 0; says when one holds less than that."""
    for name in FILES:
        file, offset = folder / name, offsets.get(name, 0)
        size = file.stat().st_size if file.exists() else 0
        if size > offset:
            os.truncate(file, offset)
        elif size < offset:
            print(f"warning: {file} has {size} bytes, {offset} when the checkpoint was saved: it lacks earlier steps")


def _completions(step: int, groups: Sequence[tuple[Group, Score]], limit: int | None = None) -> Iterable[dict[str, Any]]:
    """A row for each response, at most `limit` of each group."""
    for group, score in groups:
        for i in range(len(group.texts))[:limit]:
            yield {
                "step": step,
                "prompt_index": group.prompt.index,
                "prompt": group.prompt.messages,
                "response": group.texts[i],
                "reward": _plain(score.rewards[i]),
                "by_function": {name: _plain(values[i]) for name, values in score.by_function.items()},
                "finish_reason": group.finish_reasons[i],
                "response_length": group.response_lengths[i],
                "weight_version": group.weight_version,
            }


def _plain(value: Any) -> Any:
    """Python numbers, None for those that are not finite; also inside mappings."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value


def _prompt_key(messages: Any) -> str:
    return json.dumps(messages, ensure_ascii=False, sort_keys=True, default=str)


def _sampled_prompts(file: Path) -> set[str]:
    """Keys of the prompts that the first sampled step kept."""
    if not file.exists():
        return set()
    with open(file, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return {_prompt_key(row["prompt"]) for row in rows if row["step"] == rows[0]["step"]}
