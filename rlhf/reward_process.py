"""The controller's side of a reward process: it may hang or die at any call, and is then replaced."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import ray

from rewards.calling import Failure, Outcome, Request

SETUP_ATTEMPTS = 3
LOST = ("timeout", "died")  # kinds of failure after which the process is replaced


class ScoringError(RuntimeError):
    """No sample of a step could be scored, or no worker could be started."""


class RewardProcess:
    """One reward process and its replacements; used by one thread, stopped by any."""

    def __init__(self, index: int, spawn: Callable[[int], Any], setup_timeout: float):
        self.index, self.spawn, self.setup_timeout = index, spawn, setup_timeout
        self.handle: Any = None
        self.takes_token_ids: set[str] = set()  # functions that may look at them
        self.starts = 0
        self.stopped = False
        self.lock = threading.Lock()  # a process must not be made after `stop`

    @property
    def alive(self) -> bool:
        """Is there a process, as far as known?"""
        return self.handle is not None or self.stopped

    def start(self) -> None:
        """Make a process and load its functions.

        Raises ScoringError when SETUP_ATTEMPTS have failed, or one has passed its deadline.
        """
        for attempt in range(1, SETUP_ATTEMPTS + 1):  # noqa: B007 used after it
            with self.lock:
                if self.stopped:
                    return
                self.handle = self.spawn(self.index)
                self.starts += 1
            answer = self._ask("setup", (), self.setup_timeout)
            if self.stopped:
                return
            if not isinstance(answer, Failure):
                self.takes_token_ids = answer
                return
            self._kill()
            if answer.kind == "timeout":
                break
        raise ScoringError(
            f"reward worker {self.index} could not be started ({attempt} of {SETUP_ATTEMPTS} attempts): "
            f"{answer.kind}: {answer.message}"
        )

    def call(self, request: Request, tokens: ray.ObjectRef, deadline: float) -> tuple[Outcome, ...] | Failure:
        """What the function returned within `deadline` seconds, or why it did not.

        After a failure of a kind in LOST this is no longer `alive`: `start` makes the next process.
        """
        if len(request.items) == 1 and isinstance(self._ask("ping", (), deadline), Failure):
            # It died between two calls: this sample is not to blame.
            self._kill()
            self.start()
        arguments = request, tokens if request.function in self.takes_token_ids else None
        answer = self._ask("score", arguments, deadline)
        if isinstance(answer, Failure) and answer.kind in LOST:
            self._kill()
        return answer

    def stop(self) -> None:
        """End the process, for good."""
        with self.lock:
            self.stopped = True
        self._kill()

    def _ask(self, method: str, arguments: tuple[Any, ...], deadline: float) -> Any:
        try:
            ref = getattr(self.handle, method).remote(*arguments)
            done, _ = ray.wait([ref], timeout=deadline)
            if not done:
                return Failure(kind="timeout", message=f"no answer within {deadline:g} s")
            return ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            # Not from the function itself: from loading it, or around its call.
            kind = "died" if isinstance(error.cause, MemoryError) else "raised"
            return Failure(kind=kind, message=str(error).strip().split("\n")[-1])
        except ray.exceptions.RayError as error:
            return Failure(kind="died", message=_cause_of_death(error))

    def _kill(self) -> None:
        with self.lock:
            handle, self.handle = self.handle, None
        if handle is not None:
            ray.kill(handle, no_restart=True)


def _cause_of_death(error: Exception) -> str:
    """What Ray says of a process's end, without its advice, in one line."""
    text = str(error).strip()
    detail = re.search(r"Worker exit type: (\w+) Worker exit detail: (.*?)(?:\. |$)", " ".join(text.split()))
    return f"its process ended ({detail[1]}: {detail[2]})" if detail else text.split("\n")[-1]
