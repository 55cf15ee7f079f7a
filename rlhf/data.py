"""The controller's side of the data: batches by position from the data worker, the next one fetched ahead."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray

from actors.group import LongWait, first_line

if TYPE_CHECKING:
    from rlhf.records import Prompt, RowSummary


class DataFailure(RuntimeError):
    """The data worker died, or did not answer before its deadline."""


@dataclass(frozen=True, kw_only=True)
class RowBatch:
    """Rows of a dataset: the tokens stay in the object store."""

    tokens: ray.ObjectRef  # of RowTokens
    summary: RowSummary
    position: int = 0  # of the first, in the order of the run
    prompts: ray.ObjectRef | None = None  # of list[Prompt], one a row, where the policy may answer them itself

    @property
    def num_rows(self) -> int:
        """Rows, also when they are packed."""
        return sum(len(unit) for unit in self.summary.units)

    @property
    def sequences(self) -> list[int]:
        """The sequences of all rows, in order."""
        return [sequence for unit in self.summary.units for row in unit for sequence in row]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(self.summary.lengths[sequence] for sequence in self.sequences)

    @property
    def trained_tokens(self) -> int:
        """Tokens with a loss of all rows."""
        return sum(self.summary.trained[sequence] for sequence in self.sequences)

    def parts(self, size: int) -> list[RowBatch]:
        """The same units, `size` at a time."""
        units = self.summary.units
        starts = range(0, len(units), size)
        return [replace(self, summary=replace(self.summary, units=units[start : start + size])) for start in starts]

    def only(self, place: int) -> RowBatch:
        """The same rows, each with its sequence number `place` alone."""
        units = [[[row[place]] for row in unit] for unit in self.summary.units]
        return replace(self, summary=replace(self.summary, units=units))


class _Stream:
    """Consecutive batches of one method of the data worker.

    `position` counts the prompts or rows (packs) taken since the start of the first epoch; it is all that a resumed run
    has to restore. Set it at any time: a batch fetched ahead for another position is dropped.
    """

    method: str
    num_returns = 1

    def __init__(
        self,
        worker: Any,
        *,
        num_rows: int,
        timeout: float,
        position: int = 0,
        ahead: bool = True,
        evaluation_rows: int = 0,
    ):
        """`worker`: handle of a DataWorker that is set up; `num_rows` of one epoch; `timeout` in seconds."""
        self.worker, self.num_rows, self.timeout = worker, num_rows, timeout
        self.position, self.ahead, self.evaluation_rows = position, ahead, evaluation_rows
        self._fetched: tuple[int, int, list[ray.ObjectRef]] | None = None

    @property
    def epoch(self) -> float:
        """Epochs taken so far."""
        return self.position / self.num_rows

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps of it."""
        return {"position": self.position, "num_rows": self.num_rows}

    def _next(self, count: int) -> list[ray.ObjectRef]:
        if self._fetched is not None and self._fetched[:2] == (self.position, count):
            refs = self._fetched[2]
        else:
            refs = self._call(self.position, count)
        self._fetched = None
        self._wait(refs)
        self.position += count
        if self.ahead:
            self._fetched = self.position, count, self._call(self.position, count)
        return refs

    def _call(self, start: int, count: int) -> list[ray.ObjectRef]:
        refs = getattr(self.worker, self.method).remote(start, count)
        return list(refs) if self.num_returns > 1 else [refs]

    def _wait(self, refs: list[ray.ObjectRef]) -> None:
        call = f"`{self.method}` at position {self.position}"
        try:
            with LongWait(f"the data worker's `{self.method}`", self._report) as news:
                news.get(refs[-1], time.monotonic() + self.timeout)  # the small one: it comes with the others, as an error does
        except ray.exceptions.GetTimeoutError:
            late = f"the data worker did not finish {call} within {self.timeout:.0f} s; it reports: {self._report()}"
            raise DataFailure(late) from None
        except ray.exceptions.RayActorError as error:
            raise DataFailure(f"the data worker died during {call}: {first_line(error)}") from error

    def _report(self) -> str:
        try:
            return ray.get(self.worker.report.remote(), timeout=5)
        except ray.exceptions.RayError as error:
            return f"no answer ({type(error).__name__})"


class PromptStream(_Stream):
    """Prompts in the seeded order of the run."""

    method = "prompts"

    def next_batch(self, count: int) -> list[Prompt]:
        """The next `count` prompts.

        Raises:
            DataFailure: no answer before the deadline, or the worker died.
        """
        return ray.get(self._next(count)[0])

    def batch_at(self, start: int, count: int) -> list[Prompt]:
        """The prompts at positions start .. start + count - 1; the stream stays where it is."""
        refs = self._call(start, count)
        self._wait(refs)
        return ray.get(refs[0])


class RowStream(_Stream):
    """Encoded rows, or packs of rows, in the seeded order of the run."""

    method, num_returns = "rows", 2

    def next_batch(self, count: int) -> RowBatch:
        """The next `count` units: rows, or packs of rows.

        Raises:
            DataFailure: no answer before the deadline, or the worker died.
        """
        tokens, *prompts, summary = self._next(count)
        return RowBatch(
            tokens=tokens,
            summary=ray.get(summary),
            position=self.position - count,
            prompts=prompts[0] if prompts else None,
        )

    def evaluation_batch(self, count: int) -> RowBatch:
        """The first `count` units of the rows to evaluate on."""
        refs = list(self.worker.rows.remote(0, count, True))
        self._wait(refs)
        return RowBatch(tokens=refs[0], summary=ray.get(refs[1]))


class PromptedRowStream(RowStream):
    """The same with the prompts of the rows; both of one position."""

    method, num_returns = "prompted_rows", 3
