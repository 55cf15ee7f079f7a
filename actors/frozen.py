"""A Megatron rank that only scores: the reference of a run that trains all weights, the teacher, or a reward model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from actors.megatron.rank import MegatronRank
from rlhf.config import FrozenRole
from rlhf.heads import LANGUAGE_MODEL, SCORE
from rlhf.records import RankInfo


class Frozen(MegatronRank):
    """A model that stays as it is. A reference or teacher may have parallel sizes of its own."""

    trains = False

    def __init__(
        self, config: Any, *, rank: int, world_size: int, role: Literal["reference", "teacher", "reward_model"] = "reference"
    ):
        super().__init__(config, rank=rank, world_size=world_size)
        self.role = role

    def setup(self, master: str) -> RankInfo:
        """Join the group at `master` and build the model, without optimizer."""
        config, scores = self.config, self.role == "reward_model"
        own = FrozenRole(model=config.reward_model) if scores else getattr(config, self.role)
        with self.doing("setup"):
            self._start(master, head=SCORE if scores else LANGUAGE_MODEL, role=own)
            for parameter in self.model.module.parameters():
                parameter.requires_grad_(False)
            if self.waits:
                self.leave_weights()
            return self._info()

    @property
    def waits(self) -> bool:
        """Whether it is in host memory but while it scores."""
        return self.role == "teacher" and self.config.offload_teacher_model

    @contextmanager
    def weights_here(self) -> Iterator[None]:
        """The weights are on the device meanwhile."""
        if self.waits:
            self.patiently(self.weights.come_back)
        yield
        if self.waits:
            self.leave_weights()

    def come_back(self) -> None:
        """Undo `offload`. A model that waits elsewhere between its calls stays there."""
        if not self.waits:
            super().come_back()
