"""A teacher's logits on their way to the student's ranks, and what the student makes of them.

Only trained tokens count. Each tensor rank of the teacher puts its own columns of a sequence into Ray's object store, the rows
of one sequence an object; a student's rank fetches what its micro batch and its columns need, when it is at that micro batch.
So the two may be split in different ways. With `gkd_logits_topk` one rank keeps the likeliest of all columns.

Letters: T packed tokens, N trained tokens, C columns of the vocabulary on one tensor rank, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.megatron.logprobs import next_token_logprobs
from actors.megatron.micro_batch import PackedMicroBatch
from rlhf.distillation_losses import generalized_jsd, top_k_jsd
from rlhf.records import TokenLogits

if TYPE_CHECKING:
    import torch
    from ray import ObjectRef

    LogitRefs = dict[int, ObjectRef]  # key of a sequence: its TokenLogits, from one tensor rank


class TensorRanks:
    """The reduction over the tensor ranks that `distillation_losses.VocabReduce` asks for."""

    def max(self, x: torch.Tensor) -> torch.Tensor:
        return self._reduced(x, "MAX")

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return self._reduced(x, "SUM")

    def _reduced(self, x: torch.Tensor, operation: str) -> torch.Tensor:
        import torch.distributed as dist
        from megatron.core import parallel_state

        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            dist.all_reduce(x, op=getattr(dist.ReduceOp, operation), group=parallel_state.get_tensor_model_parallel_group())
        return x


def keep_logits(logits: torch.Tensor, packed: PackedMicroBatch, *, vocab_size: int, top_k: int | None) -> LogitRefs:
    """The teacher's side: put the logits [1, T, C] of trained tokens into the object store.

    All columns in the model's own dtype; or the `top_k` largest of a token with their ids, by one tensor rank alone.
    """
    import ray
    from megatron.core import parallel_state

    positions = trained_positions(packed)
    rows = logits.squeeze(0).index_select(0, positions)
    first = first_column(rows)
    ids = None
    if top_k is not None:
        rows, ids = likeliest(rows, top_k, first=first, vocab_size=vocab_size)
        if parallel_state.get_tensor_model_parallel_rank():
            return {}
        first, ids = 0, ids.int().cpu().numpy()
    owners = packed.batch.sequence_ids[positions].cpu().numpy()
    ends = np.cumsum(np.bincount(owners, minlength=len(packed.sequences)))[:-1]
    bits = bits_of(rows)
    kept: LogitRefs = {}
    for i, (sequence, part) in enumerate(zip(packed.sequences, np.split(bits, ends))):
        own_ids = None if ids is None else np.split(ids, ends)[i]
        kept[sequence.key] = ray.put(TokenLogits(values=part, first_column=first, vocab_size=vocab_size, ids=own_ids))
    return kept


def likeliest(rows: torch.Tensor, count: int, *, first: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest logits of each token over all tensor ranks, and their ids, [N, K] each: float32 and int64."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    own = rows[:, : max(vocab_size - first, 0)].float()
    values, ids = own.topk(min(count, own.shape[1]), dim=-1)
    values = torch.nn.functional.pad(values, (0, count - values.shape[1]), value=float("-inf"))
    ids = torch.nn.functional.pad(ids + first, (0, count - ids.shape[1]), value=-1)
    size = parallel_state.get_tensor_model_parallel_world_size()
    if size == 1:
        return values, ids
    group = parallel_state.get_tensor_model_parallel_group()
    everywhere = []
    for tensor in (values, ids):
        parts = [torch.empty_like(tensor) for _ in range(size)]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        everywhere.append(torch.cat(parts, dim=-1))
    values, places = everywhere[0].topk(count, dim=-1)
    return values, everywhere[1].gather(-1, places)


class Comparison:
    """The student's side: its logits beside the teacher's."""

    def __init__(self, config: Any, refs: Sequence[ObjectRef], *, vocab_size: int):
        """`refs`: what the ranks of the teacher gave for the global batch; `vocab_size`: of the student."""
        import ray

        self.config, self.vocab_size, self.reduce = config, vocab_size, TensorRanks()
        self.parts: list[LogitRefs] = [part for part in ray.get(list(refs)) if part is not None]

    def compare(self, logits: torch.Tensor, packed: PackedMicroBatch) -> tuple[torch.Tensor | None, PackedMicroBatch]:
        """Logprobs [T] where they have a use, else None; and the micro batch with its divergences from the teacher.

        logits [1, T, C], with gradient. Of sampled tokens the logprobs are those at the sampling temperature, without gradient,
        to be compared with the engine's; of a dataset's those at temperature 1, with gradient, for `sft_alpha`.
        """
        positions, batch = trained_positions(packed), packed.batch
        rows = logits.squeeze(0).index_select(0, positions)
        divergences, kl = self._divergences(rows, self._fetched(packed))

        def everywhere(values: torch.Tensor) -> torch.Tensor:  # [N] -> [T]
            return values.new_zeros(len(batch.token_ids)).index_add(0, positions, values)

        packed = replace(packed, batch=replace(batch, divergences=everywhere(divergences), teacher_kl=everywhere(kl)))
        sampled = batch.rollout_logprobs is not None
        if not sampled and not self.config.sft_alpha:
            return None, packed
        own = (rows.detach() if sampled else rows).clone()  # which the cross entropy overwrites
        logprobs = next_token_logprobs(
            own[None],
            batch.labels[positions],
            temperature=self.config.temperature if sampled else 1.0,
            vocab_size=self.vocab_size,
            fused=self.config.cross_entropy_loss_fusion,
        )
        return everywhere(logprobs), packed

    def _divergences(self, rows: torch.Tensor, teacher: list[list[TokenLogits]]) -> tuple[torch.Tensor, torch.Tensor]:
        """[N] each: the divergence that is trained on, and KL(teacher || student), without gradient."""
        config, first, vocab_size = self.config, first_column(rows), teacher[0][0].vocab_size
        options = {
            "vocab_size": vocab_size, "temperature": config.temperature, "first_column": first, "reduce": self.reduce,
        }  # fmt: skip
        if config.gkd_logits_topk:
            ids, values = top_k_rows([parts[0] for parts in teacher], rows)

            def divergence(student: torch.Tensor, beta: float) -> torch.Tensor:
                return top_k_jsd(student, ids, values, beta=beta, **options)
        else:
            columns = range(first, max(first, min(first + rows.shape[1], vocab_size)))
            values = teacher_rows(teacher, columns, rows)

            def divergence(student: torch.Tensor, beta: float) -> torch.Tensor:
                return generalized_jsd(student, values, beta=beta, **options)

        trained = divergence(rows, config.beta)
        return trained, trained.detach() if config.beta == 0 else divergence(rows.detach(), 0)

    def _fetched(self, packed: PackedMicroBatch) -> list[list[TokenLogits]]:
        """What the tensor ranks of the teacher kept of each sequence."""
        import ray

        keys = [sequence.key for sequence in packed.sequences]
        refs = [[part[key] for part in self.parts if key in part] for key in keys]
        fetched = iter(ray.get([ref for row in refs for ref in row]))
        return [[next(fetched) for _ in row] for row in refs]


def trained_positions(packed: PackedMicroBatch) -> torch.Tensor:
    """[N] int64: places in the micro batch that predict a trained token."""
    return packed.batch.loss_mask.nonzero().squeeze(1)


def first_column(rows: torch.Tensor) -> int:
    """Token id of the first of this tensor rank's columns [N, C]."""
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_rank() * rows.shape[1]


def bits_of(rows: torch.Tensor) -> np.ndarray:
    """The rows as numpy has them: bfloat16, which it lacks, as the int16 of the same bits."""
    import torch

    rows = rows.detach().contiguous().cpu()
    return (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).numpy()


def _tensor(values: np.ndarray) -> torch.Tensor:
    """Undoes `bits_of`."""
    import torch

    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor


def teacher_rows(sequences: Sequence[Sequence[TokenLogits]], columns: range, like: torch.Tensor) -> torch.Tensor:
    """The teacher's logits for these columns [N, columns], on the device of `like`, from the parts of each sequence."""
    kind = _tensor(sequences[0][0].values).dtype
    result = like.new_empty((sum(len(parts[0].values) for parts in sequences), len(columns)), dtype=kind)
    row = 0
    for parts in sequences:
        for part in parts:
            count, width = part.values.shape
            first, last = max(columns.start, part.first_column), min(columns.stop, part.first_column + width)
            if first < last:
                here = slice(first - columns.start, last - columns.start)
                there = slice(first - part.first_column, last - part.first_column)
                result[row : row + count, here].copy_(_tensor(part.values[:, there]))
        row += len(parts[0].values)
    return result


def top_k_rows(sequences: Sequence[TokenLogits], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 and logits float32 of the teacher's likeliest tokens, [N, K] each, on the device of `like`."""
    import torch

    ids, values = (np.concatenate([getattr(part, name) for part in sequences]) for name in ("ids", "values"))
    return torch.from_numpy(ids).to(like.device).long(), torch.from_numpy(values).to(like.device)
