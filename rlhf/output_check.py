"""Whether a run's results can be written."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rlhf.config import Config


def check_output(config: Config) -> None:
    """The run's folder can be written. Raises ValueError."""
    if config.run_name is not None and (Path(config.run_name).name != config.run_name or config.run_name in (".", "..")):
        raise ValueError(f"run_name {config.run_name!r} is a folder's name, without slashes; its place is --output_dir")
    check_writable(Path(config.output_dir))
    resume = config.resume_from_checkpoint
    if resume not in (None, "auto") and not Path(resume).is_dir():
        raise ValueError(f"resume_from_checkpoint {resume}: no such folder")


def check_writable(folder: Path) -> None:
    """Whether output_dir, or the folder it will be made in, can be written. Raises ValueError."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"output_dir {folder}: {existing} is a file")
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be written: {existing}: {error.strerror}") from None
