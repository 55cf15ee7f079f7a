"""A Megatron rank that only scores: the reference of a run that trains all weights, or a reward model."""

from __future__ import annotations

from typing import Any, Literal

from actors.megatron.rank import MegatronRank
from rlhf.heads import LANGUAGE_MODEL, SCORE
from rlhf.records import RankInfo


class Frozen(MegatronRank):
    """A model that stays as it is. A reference may have parallel sizes of its own."""

    def __init__(
        self, config: Any, *, rank: int, world_size: int, role: Literal["reference", "reward_model"] = "reference"
    ):
        super().__init__(config, rank=rank, world_size=world_size)
        self.role = role

    def setup(self, master: str) -> RankInfo:
        """Join the group at `master` and build the model, without optimizer."""
        config, own = self.config, self.config.reference
        is_reference = self.role == "reference"
        with self.doing("setup"):
            self._start(
                master,
                model=(own.model or config.model) if is_reference else config.reward_model,
                tensor=is_reference and own.tensor_model_parallel_size or config.tensor_model_parallel_size,
                pipeline=is_reference and own.pipeline_model_parallel_size or config.pipeline_model_parallel_size,
                options=config.megatron,
                head=LANGUAGE_MODEL if is_reference else SCORE,
            )
            for parameter in self.model.module.parameters():
                parameter.requires_grad_(False)
            return self._info()
