"""A Megatron rank that converts: it reads a model in one format, writes it in the other, and computes logits to compare."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actors.megatron.rank import MegatronRank
from rlhf.heads import converted_head
from rlhf.records import RankInfo, RowTokens, SequenceRef, Shard

if TYPE_CHECKING:
    import torch

    from actors.megatron.micro_batch import PackedMicroBatch

ENVIRONMENT = {"NVIDIA_TF32_OVERRIDE": "0"}  # float32 on a GPU is float32: a comparison is about the weights


class Exporter(MegatronRank):
    """A model without optimizer. Methods are collectives: the controller calls them on every rank.

    Letters: T tokens, V vocabulary.
    """

    def setup(self, master: str) -> RankInfo:
        """Join the group at `master` and read the model, an adapter merged into its base."""
        with self.doing("setup"):
            self._start(master, head=converted_head(self.config))
            return self._info()

    def save_megatron(self, folder: str) -> None:
        """Write a Megatron checkpoint of the model."""
        from actors.megatron.checkpoint import save_model

        with self.doing("save_megatron"):
            save_model(self.model, Path(folder), rank=self.rank)

    def save_hugging_face(self, folder: str) -> None:
        """Write a Hugging Face folder of the model."""
        from actors.megatron.checkpoint import save_weights

        with self.doing("save_hugging_face"):
            save_weights(self.model, Path(folder), rank=self.rank)

    def read_megatron(self, folder: str) -> None:
        """Replace the weights by those of a checkpoint that `save_megatron` wrote."""
        from actors.megatron.checkpoint import load_model

        with self.doing("read_megatron"):
            load_model(self.model, Path(folder))

    def compute_in(self, dtype: str) -> None:
        """From now on compute with the weights, which keep their values, in this dtype."""
        from actors.megatron.model import build_model

        with self.doing(f"compute_in {dtype}"):
            if dtype == self.model.dtype_name:
                return
            config, sizes = replace(self.config, torch_dtype=dtype), self.model.sizes
            other = build_model(config, config.model, sizes, self.platform, self.model_options, self.model.head)
            other.module.load_state_dict(self.model.module.state_dict())
            self.model, self.module = other, other.module

    def logits(self, token_ids: np.ndarray) -> np.ndarray | None:
        """[T] int32 -> [T, V] float32; None on ranks that return no results."""
        from actors.megatron.forward_backward import run_micro_batches
        from actors.megatron.micro_batch import pack_micro_batches

        length = len(token_ids)
        row = RowTokens(token_ids=(token_ids,), loss_masks=(np.zeros(length, np.float32),))
        sequence = SequenceRef(source=0, item=0, key=0, length=length)
        shard = Shard(sources=(), micro_batches=((sequence,),), num_tokens=length, num_sequences=1)
        with self.doing("logits"):
            batches = pack_micro_batches(shard, [row], device=self.platform.device, multiple=self.multiple)
            computed = run_micro_batches(self.module, batches, self._whole_logits, backward=False)
            return computed[0][:length].cpu().numpy() if computed and self._info().returns_logprobs else None

    def _whole_logits(self, logits: torch.Tensor, _: PackedMicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The schedule wants a loss, which nothing uses, and the logits [T, V] of all tensor ranks."""
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        whole = gather_from_tensor_model_parallel_region(logits)[0, :, : self.model.vocab_size]
        return whole.new_zeros(()), whole.float()
