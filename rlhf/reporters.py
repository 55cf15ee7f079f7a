"""Where a run's metrics are shown while it runs: the terminal, TensorBoard, W&B."""

from __future__ import annotations

import os
import secrets
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.config import Config

REPORTERS = ("tensorboard", "wandb", "none")
# name in the progress line: metric, format
PROGRESS = {
    "reward": ("reward", ".3f"),
    "length": ("response_length", ".1f"),
    "kl": ("kl", ".3g"),
    "loss": ("loss", ".4g"),
    "accuracy": ("rewards/accuracies", ".3f"),
    "right": ("accuracy", ".3f"),
    "recall": ("recall@1", ".3f"),
    "grad": ("grad_norm", ".3g"),
    "lr": ("lr", ".2e"),
    "tok/s": ("tokens_per_second", ",.0f"),
}


def check_reporters(names: Sequence[str]) -> None:
    """Raises ValueError for a name of `report_to` that is unknown, or whose package is not installed."""
    for name in names:
        if name not in REPORTERS:
            raise ValueError(f"report_to {name!r} is not supported: choose from {', '.join(REPORTERS)}")
    if "none" in names and len(names) > 1:
        raise ValueError(f"report_to {' '.join(names)}: none stands alone")
    if "wandb" in names:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise ValueError(f"report_to wandb: {error}: `pip install wandb`, or leave wandb out") from error


class Progress:
    """A live line on a terminal; elsewhere a plain line every `logging_steps`."""

    def __init__(self, total_steps: int, logging_steps: int, last_step: int = 0):
        from rich.console import Console

        self.total_steps, self.logging_steps = total_steps, logging_steps
        self._console, self._live = Console(), None
        self._paces: deque[float] = deque(maxlen=20)  # seconds a step, of the last calls
        self._last_step, self._printed = last_step, False

    def show(self, step: int, row: Mapping[str, Any]) -> None:
        """Show a finished step."""
        every, last = self.logging_steps, self._last_step
        self._paces.append(row["seconds"]["step"] / (step - last))
        self._last_step = step
        text = self.text(step, row)
        if self._console.is_terminal:
            self._show_live(step, text)
        elif not self._printed or step // every > last // every or step >= self.total_steps:
            self._printed = True
            print(f"step {step}/{self.total_steps}  {text}", flush=True)

    def evaluation(self, step: int, row: Mapping[str, Any]) -> None:
        """A line of its own: held-out metrics are few."""
        parts = [f"{name} {value:.4g}" for name, value in row.items() if name != "step" and isinstance(value, float)]
        self._console.print(f"evaluation after step {step}/{self.total_steps}  {'  '.join(parts)}", highlight=False)

    def text(self, step: int, row: Mapping[str, Any]) -> str:
        """The step's main metrics, its seconds and the time that is left."""
        parts = [f"{name} {row[key]:{form}}" for name, (key, form) in PROGRESS.items() if row.get(key) is not None]
        left = int(fmean(self._paces) * max(self.total_steps - step, 0))
        eta = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}" if left >= 3600 else f"{left // 60}:{left % 60:02}"
        return "  ".join([*parts, f"s/step {self._paces[-1]:.3g}", f"ETA {eta}"])

    def _show_live(self, step: int, text: str) -> None:
        from rich.console import Group
        from rich.live import Live
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(self.total_steps, step, width=40)
        line.add_row(Text(f"step {step}/{self.total_steps}", style="bold"), bar)
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        self._live.update(Group(line, Text(text)), refresh=True)

    def close(self) -> None:
        """Leave the last line on the screen."""
        if self._live is not None:
            self._live.stop()


class TensorBoard:
    """Event files, written without torch or TensorFlow."""

    def __init__(self, folder: Path, first_step: int):
        """Points at `first_step` and later that an interrupted run left are told to be void."""
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer, self._event = EventFileWriter(str(folder)), event_pb2.Event
        if first_step > 1:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.add_event(self._event(wall_time=time.time(), step=first_step, session_log=start))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars `train/NAME` and `seconds/PHASE`."""
        event = self._event(wall_time=time.time(), step=step)
        for name, value in values.items():
            if name != "step":
                event.summary.value.add(tag=name if "/" in name else f"train/{name}", simple_value=value)
        self._writer.add_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A W&B run named as the run folder; its project is WANDB_PROJECT, else "megaray"."""

    def __init__(self, folder: Path, config: Config, first_step: int):
        """From step 1 a new W&B run, later the one that the run folder remembers."""
        import wandb

        known = folder / "wandb-id"
        if first_step == 1 or not known.exists():
            known.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "megaray"),
            name=folder.name,
            id=known.read_text(),
            resume="allow",
            dir=str(folder),
            config=asdict(config),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({name: value for name, value in values.items() if name != "step"}, step=step)

    def close(self) -> None:
        self._run.finish()
