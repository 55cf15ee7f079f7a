"""The folder of a run: where it is, the options it was started with, and the checkpoints that are complete in it."""

from __future__ import annotations

import errno
import json
import os
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf.config import ALL, Config

COMPLETE = re.compile(r"checkpoint-(\d+)")
ARGS = "args.json"


def run_folder(config: Config) -> Path:
    """The folder of this run, made if need be; `write_args` is to follow once nothing refuses the run.

    `output_dir/run_name`; without a name that of the run to resume, or a new one called by task, model and time.
    Raises ValueError when it cannot be written, or holds a run that is not to be resumed.
    """
    asked = config.resume_from_checkpoint
    source = None if asked is None else _newest_run(config) if asked == "auto" else run_of(Path(asked))
    if config.run_name is None and source is not None:
        folder = source
    else:
        folder = Path(config.output_dir, config.run_name or _default_name(config)).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = sorted({*folder.glob("metrics.jsonl"), *complete(folder)})
        if used and asked != "auto" and folder != source:
            continued = "continue it with --resume_from_checkpoint auto, or " if config.task in ALL else ""
            raise ValueError(f"{folder} already holds a run ({used[-1].name}): {continued}choose another --run_name")
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


def write_args(folder: Path, config: Config) -> None:
    """Leave the options in the run's folder, instead of those that it was started with before. ValueError when it cannot."""
    try:
        write_json(folder / ARGS, asdict(config))
    except OSError as error:
        raise _unwritable(folder, error) from error


def complete(run: Path) -> list[Path]:
    """Folders named checkpoint-N, by N."""
    folders = [path for path in run.glob("checkpoint-*") if COMPLETE.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """N of checkpoint-N."""
    return int(COMPLETE.fullmatch(folder.name)[1])


def run_of(folder: Path) -> Path:
    """The run of a checkpoint folder, or the run folder itself."""
    return folder.absolute().parent if COMPLETE.fullmatch(folder.name) else folder.absolute()


def write_json(file: Path, value: Any) -> None:
    """Replace the file by a complete one."""
    draft = file.with_name(f".{file.name}.draft")
    draft.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    draft.replace(file)


def _unwritable(folder: Path, error: OSError) -> ValueError:
    return ValueError(f"cannot write to the run folder {folder}: {error.strerror}: choose another --output_dir")


def _default_name(config: Config) -> str:
    return f"{config.task}-{Path(config.model).name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _newest_run(config: Config) -> Path | None:
    """The newest run folder in output_dir of the same task and model, one with a checkpoint if there is any."""
    runs = []
    for args in Path(config.output_dir).absolute().glob(f"*/{ARGS}"):
        try:
            saved = json.loads(args.read_text(encoding="utf-8"))
        except ValueError:
            print(f"warning: {args} is not JSON: this run is passed over")
            continue
        if all(saved.get(name) == getattr(config, name) for name in ("task", "model")):
            runs.append(args)
    newest = max(runs, key=lambda args: (bool(complete(args.parent)), args.stat().st_mtime), default=None)
    return newest.parent if newest else None
