"""A Megatron rank that only scores: the reference of a run that trains all weights, or the teacher."""

from __future__ import annotations

from typing import Any

from actors.megatron.rank import MegatronRank
from rlhf.records import RankInfo


class Frozen(MegatronRank):
    """A model that stays as it is, with parallel sizes of its own."""

    def __init__(self, config: Any, *, rank: int, world_size: int, role: str):
        """`role`: the section of the config that says which model, and how it is split: reference or teacher."""
        super().__init__(config, rank=rank, world_size=world_size)
        self.role = role

    def setup(self, master: str) -> RankInfo:
        """Join the group at `master` and build the model, without optimizer."""
        config, role = self.config, getattr(self.config, self.role)
        with self.doing("setup"):
            self._start(
                master,
                model=role.model or config.model,
                tensor=role.tensor_model_parallel_size or config.tensor_model_parallel_size,
                pipeline=role.pipeline_model_parallel_size or config.pipeline_model_parallel_size,
                options=config.megatron,
            )
            for parameter in self.model.module.parameters():
                parameter.requires_grad_(False)
            return self._info()
