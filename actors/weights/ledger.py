"""What a weight push has delivered, and if it is exactly the model: nothing missing, unknown, twice, misshapen."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from actors.weights.checkpoint_names import CheckpointTensors
from rlhf.records import Bucket


class PushError(RuntimeError):
    """A weight push that was refused or got lost. The engines refuse to generate until a complete one arrives."""


class PushLedger:
    """The receiving side's record of one push after the other."""

    def __init__(self, tensors: CheckpointTensors):
        self.tensors = tensors
        self.latest: int | None = None  # the highest version ever begun
        self.given_up = 0  # pushes up to this version are refused
        self.open: int | None = None  # the version now arriving
        self.received: set[str] = set()

    def begin(self, version: int) -> None:
        """Open a push. A version may be sent again after a failed push, until it is given up; an older one is refused."""
        if version <= self.given_up:
            raise PushError(f"push of version {version} refused: its sender has given it up")
        if self.latest is not None and version < self.latest:
            raise PushError(f"push of version {version} refused: version {self.latest} has already been sent")
        self.latest, self.open, self.received = version, version, set()

    def admit(self, bucket: Bucket) -> list[str]:
        """Check a bucket before any of its bytes is loaded; the names in it that are to be loaded."""
        self._check_version(bucket.version)
        for name, shape in zip(bucket.names, bucket.shapes, strict=True):
            if name in self.received:
                raise PushError(f"tensor {name!r} was sent twice in the push of version {bucket.version}")
            wanted = self.tensors.required.get(name)
            if wanted is None and name not in self.tensors.redundant:
                raise PushError(f"unknown tensor {name!r} in the push of version {bucket.version}{self._nearest(name)}")
            if wanted is not None and shape != wanted:
                raise PushError(f"tensor {name!r} has shape {shape} in version {bucket.version}, the model {wanted}")
            self.received.add(name)
        return [name for name in bucket.names if name not in self.tensors.redundant]

    def finish(self, version: int, names: Iterable[str]) -> int:
        """Close a push whose sender says it sent `names`; the number of tensors received."""
        self._check_version(version)
        lost, missing = sorted(set(names) - self.received), sorted(self.tensors.required.keys() - self.received)
        if lost or missing:
            what = "sent but not received" if lost else "missing"
            listed = ", ".join((lost or missing)[:5])
            raise PushError(f"push of version {version}: {len(lost or missing)} tensors {what}: {listed}")
        self.open = None
        return len(self.received)

    def fail(self) -> None:
        """Close a push that went wrong: its remaining buckets are refused."""
        self.open = None

    def give_up(self, version: int) -> bool:
        """Refuse what may still come of the push of `version`; whether it was the last one that began."""
        self.given_up = max(self.given_up, version)
        if self.open == version:
            self.open = None
        return self.latest == version

    def _check_version(self, version: int) -> None:
        if version != self.open:
            now = "no push is open" if self.open is None else f"version {self.open} is being pushed"
            raise PushError(f"part of the push of version {version} refused: {now}")

    def _nearest(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.tensors.required.keys() - self.received, n=1)
        return f" (still missing: {near[0]!r})" if near else ""
