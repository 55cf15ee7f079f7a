"""Where an error comes from: a ValueError of our own code is a message for the user, another one may be a bug."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.exceptions import RayTaskError

FOLDERS = [Path(__file__).resolve().parent.parent / name for name in ("actors", "rewards", "rlhf")]


def is_ours(error: BaseException) -> bool:
    """Whether the innermost frame of its traceback is in this project."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return _is_in_project(frame.f_code.co_filename)


def is_ours_in_actor(error: RayTaskError) -> bool:
    """As `is_ours`, of an error in an actor: its traceback has come as text, at whose end is the error's own."""
    files = re.findall(r'^ *File "(.+)", line \d+, in ', str(error).removesuffix(str(error.cause)), re.MULTILINE)
    return bool(files) and _is_in_project(files[-1])


def _is_in_project(file: str) -> bool:
    path = Path(file).resolve()
    return any(path.is_relative_to(folder) for folder in FOLDERS)
