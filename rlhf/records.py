"""What travels between processes: typed, frozen, a shape per field.

Letters: P prompt tokens, R response tokens, L = P + R tokens of a sequence, n responses of a prompt, T packed tokens of a
micro batch, B sequences in it.

Token arrays stay in Ray's object store (`GroupTokens`, `RowTokens`): the controller holds references, lengths, texts and
rewards, and plans with them (`SequenceRef`, `Shard`); only training and scoring ranks read the arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import ray
    import torch


BUCKET_BYTES = 512 << 20  # of a weight push, or those of one larger tensor


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A conversation that waits for its answer."""

    index: int  # place in the seeded order of the whole run: unique, the seed of its responses
    token_ids: np.ndarray  # [P] int32
    messages: list[dict[str, Any]]  # the conversation without a trailing assistant answer
    columns: dict[str, Any]  # the dataset row's other columns (solution, ...): arguments of the reward functions


class Batch(NamedTuple):
    """Prompts that an engine starts between the same two steps, though several calls bring them."""

    id: int  # of the controller's process, never used again
    size: int  # prompts of all its calls


@dataclass(frozen=True, kw_only=True)
class GroupTokens:
    """The n responses of one prompt, as the rollout engine sampled them."""

    prompt_ids: np.ndarray  # [P] int32
    response_ids: tuple[np.ndarray, ...]  # n x [R] int32
    rollout_logprobs: tuple[np.ndarray, ...]  # n x [R] float32, after temperature, top-p and top-k

    def sequence(self, item: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Response `item` with its prompt, each [L]: ids int32, loss mask float32, rollout logprobs float32 (0 on the prompt)."""
        prompt, response = self.prompt_ids, self.response_ids[item]
        ids = np.concatenate([prompt, response])
        mask = np.concatenate([np.zeros(len(prompt), np.float32), np.ones(len(response), np.float32)])
        logprobs = np.concatenate([np.zeros(len(prompt), np.float32), self.rollout_logprobs[item]])
        return ids, mask, logprobs


@dataclass(frozen=True, kw_only=True)
class GroupSummary:
    """What the controller reads of a group; the tokens stay in the object store."""

    texts: tuple[str, ...]  # n, without special tokens
    finish_reasons: tuple[str, ...]  # n: "stop" or "length"
    response_lengths: tuple[int, ...]  # n, tokens, with the one that ended the response
    weight_version: int  # that sampled the last tokens; those before a push that came meanwhile are of older ones


@dataclass(frozen=True, kw_only=True)
class RowTokens:
    """Encoded rows of a supervised dataset."""

    token_ids: tuple[np.ndarray, ...]  # rows x [L] int32
    loss_masks: tuple[np.ndarray, ...]  # rows x [L] float32: how much the prediction of this token counts (0: not trained)

    def sequence(self, item: int) -> tuple[np.ndarray, np.ndarray, None]:
        """Row `item`: token ids [L] int32, loss mask [L] float32, no rollout logprobs."""
        return self.token_ids[item], self.loss_masks[item], None


@dataclass(frozen=True, kw_only=True)
class RowSummary:
    """What planning needs of encoded rows. Indices count the sequences of their `RowTokens`."""

    lengths: list[int]  # S: tokens of each sequence
    trained: list[int]  # S: its tokens with a loss
    targets: list[tuple[float, ...]]  # S: what its loss wants beside the tokens
    units: list[list[list[int]]]  # the sequences of each row of each unit; a unit is a row, or a pack of rows


@dataclass(frozen=True, kw_only=True)
class Group:
    """The controller's view of one prompt's responses; the tokens stay in the object store."""

    prompt: Prompt
    tokens: ray.ObjectRef  # of GroupTokens
    texts: tuple[str, ...]  # n
    finish_reasons: tuple[str, ...]  # n: "stop" or "length"
    response_lengths: tuple[int, ...]  # n
    weight_version: int  # of the policy that sampled it; with a push meanwhile: that sampled the last tokens


@dataclass(frozen=True, kw_only=True)
class SequenceRef:
    """One sequence of a training batch, by reference."""

    source: int  # index into `Shard.sources`
    item: int  # which sequence of that source
    key: int  # unique in the batch, from 0: finds its old, reference and teacher logprobs
    length: int  # L
    weight: float = 0.0  # of each of its trained tokens in the loss of the global batch
    advantage: float = 0.0
    targets: tuple[float, ...] = ()  # K


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One data-parallel rank's part of one optimizer step."""

    sources: tuple[ray.ObjectRef, ...]  # of GroupTokens or RowTokens
    micro_batches: tuple[tuple[SequenceRef, ...], ...]  # the same number on every rank
    num_tokens: int  # trained tokens of the global batch, over all ranks
    num_sequences: int  # sequences of the global batch, over all ranks


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Packed sequences on a training rank. A value at position t belongs to the prediction of token t + 1.

    The sequences of a row stand one after another. A last, unmasked sequence of weight 0 may pad T to a multiple.
    """

    token_ids: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64, from 0 in each sequence
    cu_seqlens: torch.Tensor  # [B + 1] int32
    labels: torch.Tensor  # [T] int64: the next token of the same sequence (its last position: 0, masked)
    loss_mask: torch.Tensor  # [T] float32
    weights: torch.Tensor  # [T] float32: loss = sum over t of weights * loss_mask * token loss
    advantages: torch.Tensor  # [T] float32
    sequence_ids: torch.Tensor  # [T] int64 in 0..B-1
    sequence_weights: torch.Tensor  # [B] float32: `weights` of the sequence
    keys: torch.Tensor  # [B] int64: `SequenceRef.key`; -1 for the padding
    targets: torch.Tensor  # [B, K] float32
    num_tokens: int  # of the global batch: makes metrics that are sums over tokens add up to means
    num_sequences: int  # of the global batch
    rollout_logprobs: torch.Tensor | None = None  # [T] float32
    old_logprobs: torch.Tensor | None = None  # [T] float32
    ref_logprobs: torch.Tensor | None = None  # [T] float32
    divergences: torch.Tensor | None = None  # [T] float32, with gradient: from the teacher, of each trained token
    teacher_kl: torch.Tensor | None = None  # [T] float32: KL(teacher || policy) of each trained token
    batch_values: torch.Tensor | None = None  # [S, ...] by key: what `sequence_values` gave for the whole global batch


@dataclass(frozen=True, kw_only=True)
class TokenLogits:
    """A teacher's logits at the N trained tokens of a sequence: a tensor rank's C columns, or those of the K likeliest tokens."""

    values: np.ndarray  # [N, C] in the model's dtype (bfloat16: its bits as int16), or [N, K] float32
    first_column: int  # token id of the first column
    vocab_size: int  # that both models have: columns from there on count on neither side
    ids: np.ndarray | None = None  # [N, K] int32


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """Where a policy rank sits, and what it holds."""

    rank: int
    node_ip: str
    data_rank: int
    data_size: int
    returns_logprobs: bool  # last pipeline stage, tensor rank 0


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A packed part of one weight push: where its bytes are and what they must be."""

    version: int
    index: int
    payload: Any  # transport-specific handle of the bytes, uint8 [size]
    size: int  # bytes
    names: tuple[str, ...]
    dtypes: tuple[str, ...]  # "float32", "bfloat16", ...
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]  # bytes from the start of the payload
    checksum: int  # of the payload


@dataclass(frozen=True, kw_only=True)
class PushReport:
    """What one verified weight push moved."""

    version: int
    num_tensors: int
    num_bytes: int
    num_buckets: int
    seconds: float
    gpu_gib: float | None = None  # the most that was in use on the sender's GPU


@dataclass(frozen=True, kw_only=True)
class Score:
    """One group's rewards. None: this sample could not be scored, and is excluded."""

    rewards: tuple[float | None, ...]  # n, weighted sum over the reward functions
    by_function: dict[str, tuple[float | None, ...]]  # n each
    failures: dict[str, int] = field(default_factory=dict)  # counts by kind: raised, timeout, died, bad_value
