"""From a shard's references to packed tensors on this rank, and from packed logprobs back to sequences.

Letters: T packed tokens, B sequences, L tokens of one sequence. Sequences stand one after another without padding between
them; a last sequence of token 0, which nothing trains on, pads T to a multiple where sequence parallelism needs one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.records import GroupTokens, MicroBatch, RowTokens, SequenceRef, Shard

if TYPE_CHECKING:
    import torch

Logprobs = Mapping[int, np.ndarray]  # key of a sequence: [L] float32, entry t belongs to token t


@dataclass(frozen=True, kw_only=True)
class PackedMicroBatch:
    """A micro batch with what only the model needs."""

    sequences: tuple[SequenceRef, ...]  # without the padding
    batch: MicroBatch
    max_length: int  # L of the longest sequence

    def model_inputs(self) -> dict[str, Any]:
        """Arguments of the model's forward, tokens [1, T]."""
        from megatron.core.packed_seq_params import PackedSeqParams

        cu_seqlens = self.batch.cu_seqlens
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=self.max_length,
            max_seqlen_kv=self.max_length,
        )
        return {
            "input_ids": self.batch.token_ids[None],
            "position_ids": self.batch.position_ids[None],
            "attention_mask": None,
            "packed_seq_params": packed,
        }


def pack_micro_batches(
    shard: Shard,
    sources: list[GroupTokens | RowTokens],
    *,
    device: torch.device,
    multiple: int = 1,
    old: Logprobs | None = None,
    ref: Logprobs | None = None,
    batch_values: Mapping[int, np.ndarray] | None = None,
) -> list[PackedMicroBatch]:
    """Every micro batch of `shard`, whose `sources` were fetched.

    `old` and `ref` hold logprobs by sequence key, `batch_values` the values of all sequences of the global batch.
    """
    import torch

    whole = None
    if batch_values is not None:
        whole = torch.from_numpy(np.stack([batch_values[key] for key in range(len(batch_values))])).to(device)
    return [
        _pack(sequences, shard, sources, device=device, multiple=multiple, old=old, ref=ref, batch_values=whole)
        for sequences in shard.micro_batches
    ]


def _pack(
    sequences: tuple[SequenceRef, ...],
    shard: Shard,
    sources: list[GroupTokens | RowTokens],
    *,
    device: torch.device,
    multiple: int,
    old: Logprobs | None,
    ref: Logprobs | None,
    batch_values: torch.Tensor | None,
) -> PackedMicroBatch:
    import torch

    parts = [sources[sequence.source].sequence(sequence.item) for sequence in sequences]
    lengths = [len(ids) for ids, _, _ in parts]
    planned = [sequence.length for sequence in sequences]
    assert lengths == planned, f"sequences have lengths {lengths}, planned were {planned}"
    real = sum(lengths)
    padding = -real % multiple if real else multiple
    if padding:
        lengths.append(padding)
    layout = _Layout(np.asarray(lengths, np.int64), real)

    def per_sequence(values: list[Any], padding: Any, dtype: type = np.float32) -> np.ndarray:
        return np.array(values + [padding] * (len(lengths) - len(values)), dtype)

    def move(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    def next_logprobs(logprobs: Logprobs | None) -> torch.Tensor | None:
        if logprobs is None:
            return None
        return move(layout.shifted([logprobs[sequence.key] for sequence in sequences], np.float32))

    weights = per_sequence([sequence.weight for sequence in sequences], 0)
    advantages = per_sequence([sequence.advantage for sequence in sequences], 0)
    no_targets = [0.0] * len(sequences[0].targets)
    has_rollout = bool(parts) and parts[0][2] is not None
    ids = layout.joined([ids for ids, _, _ in parts], np.int64)
    batch = MicroBatch(
        token_ids=move(ids),
        position_ids=move(layout.positions()),
        cu_seqlens=move(np.concatenate([[0], layout.ends]).astype(np.int32)),
        labels=move(layout.shifted([ids], np.int64)),
        loss_mask=move(layout.shifted([mask for _, mask, _ in parts], np.float32)),
        weights=move(np.repeat(weights, layout.lengths)),
        advantages=move(np.repeat(advantages, layout.lengths)),
        sequence_ids=move(np.repeat(np.arange(len(lengths)), layout.lengths)),
        sequence_weights=move(weights),
        keys=move(per_sequence([sequence.key for sequence in sequences], -1, np.int64)),
        targets=move(per_sequence([sequence.targets for sequence in sequences], no_targets)),
        num_tokens=shard.num_tokens,
        num_sequences=shard.num_sequences,
        rollout_logprobs=move(layout.shifted([part[2] for part in parts], np.float32)) if has_rollout else None,
        old_logprobs=next_logprobs(old),
        ref_logprobs=next_logprobs(ref),
        batch_values=batch_values,
    )
    return PackedMicroBatch(sequences=sequences, batch=batch, max_length=max(lengths))


class _Layout:
    """Where sequences stand in the packed tokens."""

    def __init__(self, lengths: np.ndarray, real: int):
        self.lengths, self.real, self.ends = lengths, real, np.cumsum(lengths)

    def positions(self) -> np.ndarray:
        """[T] int64, from 0 in each sequence."""
        return np.arange(self.ends[-1]) - np.repeat(self.ends - self.lengths, self.lengths)

    def joined(self, parts: list[np.ndarray], dtype: type) -> np.ndarray:
        """One array [T] of the sequences' arrays; 0 on the padding."""
        packed = np.zeros(self.ends[-1], dtype)
        if parts:
            np.concatenate(parts, out=packed[: sum(map(len, parts))], casting="same_kind")
        return packed

    def shifted(self, parts: list[np.ndarray], dtype: type) -> np.ndarray:
        """As `joined`, moved from each token to the position that predicts it; 0 at the last position of each sequence."""
        packed = np.roll(self.joined(parts, dtype), -1)
        packed[self.ends - 1] = 0
        return packed


def split_logprobs(packed: PackedMicroBatch, logprobs: np.ndarray) -> dict[int, np.ndarray]:
    """Packed logprobs [T] of the next tokens as {sequence key: [L] of its own tokens, the first 0}."""
    moved = np.roll(logprobs.astype(np.float32, copy=False), 1)
    result, start = {}, 0
    for sequence in packed.sequences:
        moved[start] = 0
        result[sequence.key] = moved[start : start + sequence.length]
        start += sequence.length
    return result


def fetch_sources(shard: Shard) -> list[GroupTokens | RowTokens]:
    """The arrays that the shard refers to, from the object store."""
    import ray

    return ray.get(list(shard.sources))


def fetch_by_key(references: list[Any] | None) -> dict[int, np.ndarray] | None:
    """The union of the ranks' results of `logprobs` or `sequence_values`."""
    import ray

    if references is None:
        return None
    merged: dict[int, np.ndarray] = {}
    for part in ray.get(list(references)):
        merged.update(part or {})
    return merged
