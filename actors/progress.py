"""What an actor is doing now, for the error that must say where a run got stuck."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """The current phase of an actor's one working thread."""

    def __init__(self) -> None:
        self.phase, self.since, self.thread = "idle", time.monotonic(), 0

    @contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        """Name the phase for the length of a block; phases nest."""
        outer = self.phase
        self.phase, self.since, self.thread = phase, time.monotonic(), threading.get_ident()
        try:
            yield
        finally:
            self.phase, self.since = outer, time.monotonic()

    def report(self) -> str:
        """The phase, for how long, and the innermost Python frames of the working thread."""
        text = f"{self.phase} for {time.monotonic() - self.since:.1f} s"
        frame = sys._current_frames().get(self.thread)
        if self.phase == "idle" or frame is None:
            return text
        frames = traceback.extract_stack(frame)[-3:]
        return text + ", at " + " < ".join(f"{f.name} ({f.filename.rsplit('/', 1)[-1]}:{f.lineno})" for f in reversed(frames))
