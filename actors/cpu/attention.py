"""Attention over packed sequences in plain torch, with the interface of Transformer Engine's `DotProductAttention`.

Letters: T packed tokens, B sequences, L tokens of the longest sequence of a group, H query heads, G key heads, D head size.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

PADDING_LIMIT = 1.25  # padded attention area of a group over its real area, beyond which the group is split


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Sequences of similar length, each group padded at the end to its longest; causality hides the padding."""

    shapes: tuple[tuple[int, int], ...]  # (B, L) of each group
    gather: torch.Tensor | None  # [sum of B * L] int64: which token fills each padded place; None: tokens are in place
    scatter: torch.Tensor | None  # [T] int64: where each token sits among the padded places


def group_by_length(lengths: np.ndarray) -> Groups:
    """Split sequences of `lengths` [B] into groups of similar length.

    One kernel call for each sequence is ten times slower than one call for 256 sequences of 24 tokens.
    """
    if (lengths == lengths[0]).all():
        return Groups(shapes=((len(lengths), int(lengths[0])),), gather=None, scatter=None)
    starts = np.cumsum(lengths) - lengths
    order = np.argsort(-lengths, kind="stable")
    shapes, gather, scatter, offset = [], [], np.empty(lengths.sum(), np.int64), 0
    for members in _split(order, lengths):
        count, longest = len(members), int(lengths[members[0]])
        column = np.arange(longest)
        real = column < lengths[members, None]  # [B, L]
        tokens = starts[members, None] + np.where(real, column, 0)  # padding repeats the first token: nothing reads it
        gather.append(tokens.ravel())
        scatter[tokens[real]] = offset + np.flatnonzero(real)
        shapes.append((count, longest))
        offset += count * longest
    return Groups(shapes=tuple(shapes), gather=torch.from_numpy(np.concatenate(gather)), scatter=torch.from_numpy(scatter))


def _split(order: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Cut `order` (longest first) where a group's padded area would pass `PADDING_LIMIT` times its real one."""
    groups, first, area = [], 0, 0
    for i, sequence in enumerate(order):
        length = int(lengths[sequence])
        area += length * length
        longest = int(lengths[order[first]])
        if (i - first + 1) * longest * longest > PADDING_LIMIT * area and longest * longest * (i - first + 1) > 2**16:
            groups.append(order[first:i])
            first, area = i, length * length
    groups.append(order[first:])
    return groups


class DotProductAttention(torch.nn.Module):
    """Causal self-attention in the packed format ("thd"), grouped query heads, optional sliding window."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        attention_dropout: float = 0.0,
        softmax_scale: float | None = None,
        cp_group: Any = None,
        window_size: tuple[int, int] | None = None,
        **_: Any,
    ):
        super().__init__()
        if cp_group is not None:
            raise NotImplementedError("context parallelism needs Transformer Engine")
        self.dropout, self.softmax_scale, self.window_size = attention_dropout, softmax_scale, window_size
        flash, unfused = (os.environ.get(f"NVTE_{name}_ATTN", "1") == "1" for name in ("FLASH", "UNFUSED"))
        if not flash and not unfused:
            raise ValueError("attention_backend fused has no CPU kernel: choose flash, unfused or auto")
        self.backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH] if flash else [SDPBackend.MATH]

    def forward(
        self,
        query: torch.Tensor,  # [T, H, D]
        key: torch.Tensor,  # [T, G, D]
        value: torch.Tensor,  # [T, G, D]
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: str = "padding_causal",
        qkv_format: str = "thd",
        cu_seqlens_q: torch.Tensor | None = None,  # [B + 1] int32
        **_: Any,
    ) -> torch.Tensor:  # [T, H * D]
        if qkv_format != "thd" or "causal" not in attn_mask_type or attention_mask is not None:
            raise NotImplementedError(f"attention of {qkv_format} with mask {attn_mask_type}: only packed causal sequences")
        groups = _groups_of(cu_seqlens_q)
        if groups.gather is not None:
            query, key, value = (x.index_select(0, groups.gather) for x in (query, key, value))
        sizes = [count * length for count, length in groups.shapes]
        parts = zip(groups.shapes, *(x.split(sizes) for x in (query, key, value)))
        outputs = [self._attend(*tensors, count, length) for (count, length), *tensors in parts]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return output if groups.scatter is None else output.index_select(0, groups.scatter)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, count: int, length: int) -> torch.Tensor:
        """[B * L, heads, D] each, to [B * L, H * D]."""
        query, key, value = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (query, key, value))
        window = None
        if self.window_size is not None and self.window_size[0] >= 0:
            distance = torch.arange(length)[:, None] - torch.arange(length)
            window = (distance >= 0) & (distance <= self.window_size[0])
        with sdpa_kernel(self.backends):
            output = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=window,
                is_causal=window is None,
                dropout_p=self.dropout if self.training else 0.0,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return output.transpose(1, 2).reshape(count * length, -1)


_last: tuple[torch.Tensor, Groups] | None = None


def _groups_of(cu_seqlens: torch.Tensor) -> Groups:
    """The groups of a micro batch, planned once for all its layers (which share one tensor object)."""
    global _last
    if _last is None or _last[0] is not cu_seqlens:
        _last = cu_seqlens, group_by_length(np.diff(cu_seqlens.numpy()).astype(np.int64))
    return _last[1]
