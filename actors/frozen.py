"""A Megatron rank that only scores: the reference of a run that trains all weights."""

from __future__ import annotations

from actors.megatron.rank import MegatronRank
from rlhf.records import RankInfo


class Frozen(MegatronRank):
    """A model that stays as it is, with parallel sizes of its own."""

    def setup(self, master: str) -> RankInfo:
        """Join the group at `master` and build the model, without optimizer."""
        config, role = self.config, self.config.reference
        with self.doing("setup"):
            self._start(
                master,
                model=role.model or config.model,
                megatron=None if role.model else config.mcore_model,
                tensor=role.tensor_model_parallel_size or config.tensor_model_parallel_size,
                pipeline=role.pipeline_model_parallel_size or config.pipeline_model_parallel_size,
                options=config.megatron,
            )
            for parameter in self.model.module.parameters():
                parameter.requires_grad_(False)
            return self._info()
