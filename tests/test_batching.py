import random

import numpy as np
import pytest

from rlhf.batching import make_shards, pack, response_shards, token_weights
from rlhf.config import Config
from rlhf.records import Group, Prompt, SequenceRef


@pytest.mark.parametrize("limit", [{"max_sequences": 3}, {"max_tokens": 40}])
@pytest.mark.parametrize("data_size", [1, 2, 3])
def test_every_sequence_is_packed_once_and_ranks_get_equally_many_micro_batches(limit, data_size):
    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.randint(1, 40) for _ in range(rng.randint(1, 30))]
        plan = pack(lengths, data_size=data_size, **limit)
        assert len(plan) == data_size
        assert len({len(bins) for bins in plan}) == 1
        assert all(b for bins in plan for b in bins)
        placed = [i for bins in plan for b in bins for i in b]
        assert set(placed) == set(range(len(lengths)))
        for b in (b for bins in plan for b in bins):
            assert len(b) <= limit.get("max_sequences", 10**9)
            assert sum(lengths[i] for i in b) <= limit.get("max_tokens", 10**9)
        for bins in plan:  # a sequence is repeated only on a rank with fewer sequences than micro batches
            here = [i for b in bins for i in b]
            assert len(here) == max(len(set(here)), len(bins))


def test_tokens_are_spread_evenly_over_data_ranks():
    rng = random.Random(1)
    lengths = [rng.randint(10, 1000) for _ in range(256)]
    totals = [sum(lengths[i] for b in bins for i in b) for bins in pack(lengths, data_size=4, max_tokens=4096)]
    assert max(totals) - min(totals) < 0.01 * sum(totals)


def test_a_sequence_over_the_token_budget_makes_a_micro_batch_alone():
    assert pack([10, 41, 20], data_size=1, max_tokens=40) == [[[1], [2, 0]]]


def test_a_repeated_sequence_has_weight_zero_so_the_loss_is_unchanged():
    units = [[SequenceRef(source=0, item=0, key=0, length=5, weight=0.5)]]
    shards = make_shards(units, ["ref"], trained_tokens=5, data_size=3, max_units=1, max_tokens=None)
    assert [s.micro_batches[0][0].weight for s in shards] == [0.5, 0.0, 0.0]


def test_a_shard_carries_only_the_sources_it_needs():
    units = [[SequenceRef(source=i, item=0, key=i, length=10)] for i in range(4)]
    shards = make_shards(units, ["a", "b", "c", "d"], trained_tokens=1, data_size=2, max_units=1, max_tokens=None)
    assert sorted(ref for shard in shards for ref in shard.sources) == ["a", "b", "c", "d"]
    for shard in shards:
        for (sequence,) in shard.micro_batches:
            assert shard.sources[sequence.source] == "abcd"[sequence.key]


def test_token_weights_follow_each_loss_type():
    counts, counted = [2, 3, 5], [True, True, False]
    weights = {t: token_weights(t, counts, counted, max_completion_length=8) for t in ("grpo", "dapo", "bnpo", "dr_grpo")}
    assert weights["grpo"] == pytest.approx([1 / 6, 1 / 9, 0])  # mean of the sequence, then over 3 sequences
    assert weights["dapo"] == weights["bnpo"] == pytest.approx([1 / 5, 1 / 5, 0])  # 2 + 3 counted tokens
    assert weights["dr_grpo"] == pytest.approx([1 / 24, 1 / 24, 0])  # 3 sequences x 8 tokens


def test_every_token_of_the_responses_weighs_the_same():
    lengths = [(3, 5), (2,), (10,)]
    groups = [
        Group(
            prompt=Prompt(index=i, token_ids=np.zeros(4, np.int32), messages=[], columns={}), tokens=f"tokens {i}",
            texts=("",) * len(own), finish_reasons=("stop",) * len(own), response_lengths=own, weight_version=1,
        )
        for i, own in enumerate(lengths)
    ]  # fmt: skip
    shards = response_shards(groups, Config(task="gkd", micro_batch_size=1), data_size=2)
    placed = [(shard.sources[ref.source], ref) for shard in shards for batch in shard.micro_batches for ref in batch]
    assert sorted((source, ref.item, ref.key, ref.length) for source, ref in placed) == [
        ("tokens 0", 0, 0, 7), ("tokens 0", 1, 1, 9), ("tokens 1", 0, 2, 6), ("tokens 2", 0, 3, 14)
    ]  # fmt: skip
    assert {ref.weight for _, ref in placed} == {1 / 20}
    assert {(shard.num_tokens, shard.num_sequences) for shard in shards} == {(20, 4)}
