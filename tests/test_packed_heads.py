"""Losses with a head on packs, through their loops and real ranks: those of Hugging Face, and of the same rows alone."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf.classification import train_classification
from rlhf.config import Config
from rlhf.data import RowBatch
from rlhf.embedding import train_embedding
from rlhf.records import RowSummary
from rlhf.reranker import train_reranker
from rlhf.reward_model import train_reward_model
from tests.one_step import FLOAT64, OneStep, assert_same_gradients
from tests.test_heads import ROWS_OF, config_of, expected, headed, rows  # noqa: F401

pytestmark = pytest.mark.slow
LOOPS = {"rm": train_reward_model, "seq_cls": train_classification, "embedding": train_embedding, "pairs": train_embedding}
CASES = {  # of tests.test_heads: how a run is told to have this loss
    ("rm", "rm"): {"center_rewards_coefficient": 0.1},
    ("seq_cls", "single"): {"problem_type": "single_label_classification", "num_labels": 3},
    ("reranker", "pointwise_reranker"): {"loss_type": "pointwise_reranker"},
    ("reranker", "listwise_reranker"): {"loss_type": "listwise_reranker"},
    ("embedding", "infonce"): {"environment": {"INFONCE_INCLUDE_QQ": "true", "INFONCE_INCLUDE_DD": "true"}},
    ("embedding", "infonce-mrl"): {
        "environment": {"INFONCE_INCLUDE_QQ": "true", "INFONCE_INCLUDE_DD": "true"},
        "mrl_dims": {16: 1.0, 48: 0.5},
    },
    ("embedding", "infonce-own"): {"environment": {"INFONCE_USE_BATCH": "false", "INFONCE_TEMPERATURE": "0.5"}},
    ("pairs", "online_contrastive"): {"loss_type": "online_contrastive"},
}


def batch_of(rows, source, task: str, packs: list[list[int]]) -> RowBatch:  # noqa: F811
    """`packs` name rows of ROWS_OF[task]."""
    targets, starts = ROWS_OF[task], np.cumsum([0, *map(len, ROWS_OF[task])])
    summary = RowSummary(
        lengths=[len(ids) for ids in rows.token_ids],
        trained=[0] * len(rows.token_ids),
        targets=[target for row in targets for target in row],
        units=[[list(range(starts[row], starts[row + 1])) for row in pack] for pack in packs],
    )
    return RowBatch(tokens=source, summary=summary)


def uneven_packs(count: int) -> list[list[int]]:
    """Row 1 alone, the others in three packs, none of neighbours alone."""
    return [[0, *range(4, count, 2)], [1], [2], [3, *range(5, count, 2)]]


def one_step(ranks, rows, source, task: str, options: dict, packs: list[list[int]]) -> OneStep:  # noqa: F811
    batch = batch_of(rows, source, task, packs)
    kind = "embedding" if task == "pairs" else task
    config = Config(task=kind, global_batch_size=len(packs), eval_steps=10, **({"loss_type": "infonce"} | options))
    step = OneStep(ranks, batch)
    LOOPS.get(task, train_reranker)(config, step, log=step, checkpoints=step, start=1, total=2)
    return step


@pytest.fixture(scope="module")
def measured(hosts, headed, rows, source):  # noqa: F811
    """{(task, loss): [the step on rows alone, on packs, on packs over two ranks]}"""
    found = {case: [] for case in CASES}
    for task in dict.fromkeys(task for task, _ in CASES):
        for size in (1, 2):
            ranks = hosts.start(config_of(headed[task], task, **FLOAT64), size)
            count = len(ROWS_OF[task])
            for case, options in CASES.items():
                if case[0] == task:
                    splits = [[[row] for row in range(count)]] * (size == 1) + [uneven_packs(count)]
                    found[case] += [one_step(ranks, rows, source, task, options, packs) for packs in splits]
    return found


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_loss_and_gradients_of_packs_are_those_of_their_rows(measured, expected, case):  # noqa: F811
    """Loss and norm by Hugging Face and torch alone."""
    alone, packed, over_two = measured[case]
    count = len(ROWS_OF[case[0]])
    sequences = [len(ROWS_OF[case[0]][0]) * len(pack) for pack in uneven_packs(count)]
    assert sorted(packed.split[0]) == sorted(sequences) and [len(micro_batches) for micro_batches in over_two.split] == [2, 2]
    assert (packed.metrics["loss"], packed.gradient_norm()) == pytest.approx(expected[case], rel=2e-5)
    for step in (packed, over_two):
        assert step.metrics == pytest.approx(alone.metrics, abs=1e-6)
    assert_same_gradients(step.gradients for step in measured[case])
