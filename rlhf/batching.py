"""From sequences to the micro batches of every data-parallel rank.

Invariants: each sequence stands in exactly one micro batch; every rank gets the same number of micro batches, none of them
empty; no micro batch of several sequences exceeds its limit (sequences, or tokens); the plan is a pure function of the
lengths. Where there are fewer sequences than places, a sequence is repeated with weight 0: it costs time and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import Any, Literal

import numpy as np

from rlhf.config import Config
from rlhf.data import RowBatch
from rlhf.records import Group, SequenceRef, Shard

Bin = list[int]  # positions of the sequences of one micro batch


def pack(
    lengths: Sequence[int], *, data_size: int, max_sequences: int | None = None, max_tokens: int | None = None
) -> list[list[Bin]]:
    """Positions of `lengths` (tokens each) as [data rank][micro batch][sequence].

    Exactly one limit is given. Ranks get nearly equal token counts, by longest-first assignment. A sequence longer than
    `max_tokens` makes a micro batch alone.
    """
    assert (max_sequences is None) != (max_tokens is None) and lengths
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    most = ceil(len(lengths) / data_size) if max_sequences is not None else len(lengths)
    ranks = _spread(order, lengths, data_size, most)
    if max_sequences is not None:
        count = max(ceil(len(rank) / max_sequences) for rank in ranks)
        plan = [_spread(rank, lengths, count, max_sequences) for rank in ranks]
    else:
        plan = [_first_fit(rank, lengths, max_tokens) for rank in ranks]
        count = max(len(bins) for bins in plan)
    return [_exactly(bins, count) for bins in plan]


def make_shards(
    units: Sequence[Sequence[SequenceRef]],
    sources: Sequence[Any],
    *,
    trained_tokens: int,
    data_size: int,
    max_units: int | None,
    max_tokens: int | None,
) -> list[Shard]:
    """One shard a data rank for one optimizer step.

    units: sequences that stay together in a micro batch (one response, or the rows of one pack) and count as one against
    `max_units`; their `source` indexes `sources` (object references).
    """
    lengths = [sum(sequence.length for sequence in unit) for unit in units]
    plan = pack(lengths, data_size=data_size, max_sequences=max_units, max_tokens=max_tokens)
    seen: set[int] = set()
    shards = []
    for bins in plan:
        used: dict[int, int] = {}  # source in `sources` -> source in this shard
        micro_batches = []
        for positions in bins:
            micro_batch = []
            for position in positions:
                for sequence in units[position]:
                    here = used.setdefault(sequence.source, len(used))
                    micro_batch.append(replace(sequence, source=here, weight=0.0 if position in seen else sequence.weight))
                seen.add(position)
            micro_batches.append(tuple(micro_batch))
        shards.append(
            Shard(
                sources=tuple(sources[source] for source in used),
                micro_batches=tuple(micro_batches),
                num_tokens=trained_tokens,
                num_sequences=sum(len(unit) for unit in units),
            )
        )
    return shards


def token_weights(
    loss_type: str, token_counts: Sequence[int], counted: Sequence[bool], *, max_completion_length: int
) -> list[float]:
    """Weight of each trained token of every sequence of a global batch, so that the loss is the weighted sum over tokens.

    "grpo": mean over a sequence, then over sequences. "bnpo", "dapo", "cispo": mean over all counted tokens of the batch.
    "dr_grpo": sum over tokens / (sequences x max_completion_length) (Liu et al. 2025). A sequence that is not counted
    (could not be scored, or cut off under `overlong_filter`) weighs 0 but stays in the number of sequences.
    """
    num_sequences = len(token_counts)
    num_tokens = sum(count for count, use in zip(token_counts, counted) if use)
    if loss_type == "grpo":
        weights = [1 / (count * num_sequences) if count else 0.0 for count in token_counts]
    elif loss_type in ("bnpo", "dapo", "cispo"):
        weights = [1 / max(num_tokens, 1)] * num_sequences
    elif loss_type == "dr_grpo":
        weights = [1 / (num_sequences * max_completion_length)] * num_sequences
    else:
        raise ValueError(f"loss_type {loss_type!r}: choose grpo, bnpo, dr_grpo, dapo or cispo")
    return [weight if use else 0.0 for weight, use in zip(weights, counted)]


def group_shards(
    groups: Sequence[Group],
    advantages: Sequence[Sequence[float | None]],
    config: Config,
    *,
    data_size: int,
    seed: int,
    steps: int | None = None,
) -> list[list[Shard]]:
    """The training batches of one generation: [optimizer step][data rank].

    The responses are split into `steps` (default: `steps_per_generation`) global batches, at random (by `seed`) when there
    are several, so that no step sees only some of the prompts. `key` counts responses over the generation.
    """
    responses = [(g, item) for g, group in enumerate(groups) for item in range(len(group.texts))]
    order = np.arange(len(responses))
    steps = steps or config.steps_per_generation
    if steps > 1:
        order = np.random.default_rng(seed).permutation(order)
    batches = []
    for part in np.array_split(order, steps):
        chosen = [(int(key), *responses[key]) for key in part]
        counts = [groups[g].response_lengths[item] for _, g, item in chosen]
        counted = [
            advantages[g][item] is not None and not (config.overlong_filter and groups[g].finish_reasons[item] == "length")
            for _, g, item in chosen
        ]
        weights = token_weights(config.loss_type, counts, counted, max_completion_length=config.max_completion_length)
        sequences = [
            SequenceRef(
                source=g,
                item=item,
                key=key,
                length=len(groups[g].prompt.token_ids) + count,
                weight=weight,
                advantage=advantages[g][item] or 0.0,
            )
            for (key, g, item), count, weight in zip(chosen, counts, weights)
        ]
        batches.append(
            make_shards(
                [(sequence,) for sequence in sequences],
                [group.tokens for group in groups],
                trained_tokens=sum(count for count, use in zip(counts, counted) if use),
                data_size=data_size,
                max_units=None if config.micro_batch_tokens else config.micro_batch_size,
                max_tokens=config.micro_batch_tokens,
            )
        )
    return batches


def response_shards(groups: Sequence[Group], config: Config, *, data_size: int) -> list[Shard]:
    """The shards of one step on all responses of the groups; the loss is the mean over their tokens. Keys count responses."""
    responses = [(g, item, length) for g, group in enumerate(groups) for item, length in enumerate(group.response_lengths)]
    trained_tokens = sum(length for _, _, length in responses)
    units = [
        [
            SequenceRef(
                source=g,
                item=item,
                key=key,
                length=len(groups[g].prompt.token_ids) + length,
                weight=1 / max(trained_tokens, 1),
            )
        ]
        for key, (g, item, length) in enumerate(responses)
    ]
    return make_shards(
        units,
        [group.tokens for group in groups],
        trained_tokens=trained_tokens,
        data_size=data_size,
        max_units=None if config.micro_batch_tokens else config.micro_batch_size,
        max_tokens=config.micro_batch_tokens,
    )


def row_shards(batch: RowBatch, config: Config, *, data_size: int, weigh: Literal["tokens", "rows"]) -> list[Shard]:
    """The shards of one step on dataset rows, a row's sequences side by side in one micro batch.

    The loss is the mean over the trained tokens of the global batch, or over its rows.
    """
    summary = batch.summary
    trained_tokens = batch.trained_tokens
    weight = 1 / max(trained_tokens if weigh == "tokens" else batch.num_rows, 1)
    keys = {sequence: key for key, sequence in enumerate(batch.sequences)}
    units = [
        [
            SequenceRef(
                source=0,
                item=sequence,
                key=keys[sequence],
                length=summary.lengths[sequence],
                weight=weight,
                targets=summary.targets[sequence],
            )
            for row in unit
            for sequence in row
        ]
        for unit in summary.units
    ]
    return make_shards(
        units,
        [batch.tokens],
        trained_tokens=trained_tokens,
        data_size=data_size,
        max_units=None if config.micro_batch_tokens else config.micro_batch_size,
        max_tokens=config.micro_batch_tokens,
    )


def _spread(order: Sequence[int], lengths: Sequence[int], count: int, most: int) -> list[Bin]:
    """Longest first into the bin with the fewest tokens that holds fewer than `most` sequences."""
    bins: list[Bin] = [[] for _ in range(count)]
    tokens = [0] * count
    for i in order:
        best = min((b for b in range(count) if len(bins[b]) < most), key=lambda b: (tokens[b], b))
        bins[best].append(i)
        tokens[best] += lengths[i]
    return bins


def _first_fit(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[Bin]:
    """First-fit decreasing: few bins of at most `max_tokens`."""
    bins: list[Bin] = []
    room: list[int] = []
    for i in order:
        best = next((b for b, left in enumerate(room) if left >= lengths[i]), None)
        if best is None:
            bins.append([])
            room.append(max(max_tokens, lengths[i]))
            best = len(bins) - 1
        bins[best].append(i)
        room[best] -= lengths[i]
    return bins


def _exactly(bins: list[Bin], count: int) -> list[Bin]:
    """`count` bins without empty ones: bins with most sequences are halved; then a sequence is repeated."""
    bins = [b for b in bins if b]
    while len(bins) < count:
        largest = max(range(len(bins)), key=lambda b: len(bins[b])) if bins else None
        if largest is not None and len(bins[largest]) > 1:
            half = len(bins[largest]) // 2
            bins.append(bins[largest][half:])
            bins[largest] = bins[largest][:half]
        elif bins:
            bins.append([bins[0][0]])
        else:
            bins.append([0])
    return bins
