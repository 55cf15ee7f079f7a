"""Losses of embedding, reranking and classification against ms-swift's and Hugging Face's own; values and gradients."""

import math
from types import SimpleNamespace

import pytest
import torch

from rlhf.sequence_losses import (
    classification_losses,
    contrastive_losses,
    cosine_similarity_losses,
    infonce_losses,
    listwise_reranker_losses,
    online_contrastive_losses,
    pointwise_reranker_losses,
)

EXACT = dict(rtol=0, atol=1e-10)  # float64
HIDDEN = 6
EQUAL, UNEQUAL = [2, 2, 2, 2], [1, 3, 2, 4]  # negatives of each of four anchors


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit_rows(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(normal(rows, HIDDEN, seed=seed), dim=-1).requires_grad_()


def ms_swift_loss(name: str, outputs: object, labels: torch.Tensor) -> torch.Tensor:
    from swift.loss import loss_map

    return loss_map[name](args=None, trainer=None)(outputs, labels)


def assert_same_loss_and_gradient(ours: torch.Tensor, theirs: torch.Tensor, *inputs: torch.Tensor) -> None:
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-10)
    for our, their in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs)):
        assert their.abs().max() > 1e-6  # there is a gradient to compare
        torch.testing.assert_close(our, their, **EXACT)


def groups_of(negatives: list[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Where anchors and candidates are among ms-swift's rows, each anchor's positive, and each candidate's anchor."""
    starts = [sum(negatives[:i]) + 2 * i for i in range(len(negatives))]
    candidates = [row for start, n in zip(starts, negatives) for row in range(start + 1, start + 2 + n)]
    positives = [candidates.index(start + 1) for start in starts]
    return starts, candidates, positives, [i for i, n in enumerate(negatives) for _ in range(n + 1)]


def infonce(rows: torch.Tensor, negatives: list[int], *, in_batch: bool = True, **options) -> torch.Tensor:
    anchors, candidates, positives, owners = groups_of(negatives)
    anchor_of = None if in_batch else torch.tensor(owners)
    return infonce_losses(rows[anchors], rows[candidates], torch.tensor(positives), anchor_of=anchor_of, **options)


def infonce_of_ms_swift(monkeypatch, rows: torch.Tensor, negatives: list[int], **settings: object) -> torch.Tensor:
    for name, value in settings.items():
        monkeypatch.setenv(f"INFONCE_{name}", str(value))
    labels = torch.tensor([label for n in negatives for label in [1] + n * [0]])  # a row less than a group: no anchor
    return ms_swift_loss("infonce", {"last_hidden_state": rows}, labels)


@pytest.mark.parametrize("negatives", [EQUAL, UNEQUAL], ids=["equal groups", "unequal groups"])
@pytest.mark.parametrize("in_batch", [True, False], ids=["in-batch negatives", "own negatives"])
def test_infonce_equals_that_of_ms_swift(monkeypatch, negatives, in_batch):
    rows = unit_rows(sum(negatives) + 8)
    theirs = infonce_of_ms_swift(monkeypatch, rows, negatives, USE_BATCH=in_batch)
    ours = infonce(rows, negatives, in_batch=in_batch)
    assert ours.shape == (4,)
    assert_same_loss_and_gradient(ours.mean(), theirs, rows)


@pytest.mark.parametrize("negatives", [EQUAL, UNEQUAL], ids=["equal groups", "unequal groups"])
@pytest.mark.parametrize("mask_fake_negative", [False, True])
@pytest.mark.parametrize("include_qq", [False, True])
@pytest.mark.parametrize("include_dd", [False, True])
def test_infonce_options_equal_those_of_ms_swift(monkeypatch, negatives, mask_fake_negative, include_qq, include_dd):
    rows = unit_rows(sum(negatives) + 8)
    theirs = infonce_of_ms_swift(
        monkeypatch, rows, negatives, TEMPERATURE=0.3, MASK_FAKE_NEGATIVE=mask_fake_negative, FAKE_NEG_MARGIN=0.05,
        INCLUDE_QQ=include_qq, INCLUDE_DD=include_dd,
    )  # fmt: skip
    options = dict(temperature=0.3, include_qq=include_qq, include_dd=include_dd)
    ours = infonce(rows, negatives, mask_fake_negative=mask_fake_negative, fake_neg_margin=0.05, **options)
    assert_same_loss_and_gradient(ours.mean(), theirs, rows)
    if mask_fake_negative:
        assert not torch.allclose(ours, infonce(rows, negatives, **options))  # something was masked


def test_infonce_with_own_negatives_adds_up_over_parts_of_the_batch():
    anchors, candidates, positives, owners = groups_of(UNEQUAL)
    rows = unit_rows(18)
    first = infonce(rows[: candidates[5] + 1], UNEQUAL[:2], in_batch=False)
    second = infonce(rows[anchors[2] :], UNEQUAL[2:], in_batch=False)
    torch.testing.assert_close(torch.cat([first, second]), infonce(rows, UNEQUAL, in_batch=False), **EXACT)


def test_infonce_gradients_add_up_over_ranks_that_each_hold_part_of_the_batch():
    rows = unit_rows(16)
    whole = torch.autograd.grad(infonce(rows, EQUAL, include_qq=True).mean(), rows)[0]
    parts = []
    for own in (slice(0, 8), slice(8, 16)):
        seen = rows.detach().clone()
        mine = rows.detach()[own].requires_grad_()
        seen[own] = mine
        parts.append(torch.autograd.grad(infonce(seen, EQUAL, include_qq=True).mean(), mine)[0])
    torch.testing.assert_close(torch.cat(parts), whole, **EXACT)


def test_infonce_options_of_the_whole_batch_are_refused_with_own_negatives():
    with pytest.raises(ValueError, match="need in-batch negatives: leave out anchor_of"):
        infonce(unit_rows(16), EQUAL, in_batch=False, include_qq=True)


PAIR_LABELS = torch.tensor([1, 0, 0, 1, 1, 0, 0, 1])


@pytest.mark.parametrize(
    "name, losses, labels, reduce",
    [
        ("cosine_similarity", cosine_similarity_losses, torch.linspace(-1, 1, 8, dtype=torch.float64), torch.mean),
        ("contrastive", contrastive_losses, PAIR_LABELS, torch.mean),
        ("online_contrastive", online_contrastive_losses, PAIR_LABELS, torch.sum),
        ("online_contrastive", online_contrastive_losses, torch.tensor([1, 0, 0, 0, 0, 0, 0, 0]), torch.sum),
        ("online_contrastive", online_contrastive_losses, torch.tensor([1, 1, 1, 0, 1, 1, 1, 1]), torch.sum),
        ("online_contrastive", online_contrastive_losses, torch.ones(8), torch.sum),
        ("online_contrastive", online_contrastive_losses, torch.zeros(8), torch.sum),
    ],
    ids=["cosine", "contrastive", "online", "online, one positive", "online, one negative", "online, positives", "negatives"],
)
def test_losses_of_pairs_equal_those_of_ms_swift(name, losses, labels, reduce):
    rows = normal(16, HIDDEN, seed=1)  # not of unit length
    rows[1::2] += rows[0::2] * 0.6  # some pairs come close
    rows.requires_grad_()
    theirs = ms_swift_loss(name, {"last_hidden_state": rows}, labels)
    ours = losses(rows[0::2], rows[1::2], labels)
    assert ours.shape == (8,)
    assert_same_loss_and_gradient(reduce(ours), theirs, rows)


def test_online_contrastive_loss_written_out():
    """Pairs at an angle to the first axis: distances .1 .4 (positive), .2 .7 (negative); hard ones are .4 and .2."""
    cosines = torch.tensor([0.9, 0.6, 0.8, 0.3], dtype=torch.float64)
    first = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(4, 2)
    second = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)
    losses = online_contrastive_losses(first, second, torch.tensor([1, 1, 0, 0]))
    assert losses.tolist() == pytest.approx([0, 0.4**2, (0.5 - 0.2) ** 2, 0], abs=1e-12)


def test_mean_losses_of_pairs_add_up_over_parts_of_the_batch():
    first, second = unit_rows(8, seed=2), unit_rows(8, seed=3)
    for losses in (cosine_similarity_losses, contrastive_losses):
        parts = [losses(first[part], second[part], PAIR_LABELS[part]) for part in (slice(0, 3), slice(3, 8))]
        torch.testing.assert_close(torch.cat(parts), losses(first, second, PAIR_LABELS), **EXACT)


RELEVANT = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 0])  # a stray document, then groups of 3, 1, 2 and 4


def scores_of(labels: torch.Tensor) -> torch.Tensor:
    return normal(len(labels), 1, seed=4).requires_grad_()


def test_pointwise_reranker_loss_equals_that_of_ms_swift():
    scores = scores_of(RELEVANT)
    ours = pointwise_reranker_losses(scores.squeeze(-1), RELEVANT)
    assert ours.shape == (11,)
    theirs = ms_swift_loss("pointwise_reranker", SimpleNamespace(logits=scores), RELEVANT)
    assert_same_loss_and_gradient(ours.mean(), theirs, scores)


@pytest.mark.parametrize("min_group_size, groups", [(1, 4), (2, 3), (3, 2), (9, 0)])
def test_listwise_reranker_loss_equals_that_of_ms_swift(monkeypatch, min_group_size, groups):
    monkeypatch.setenv("LISTWISE_RERANKER_TEMPERATURE", "0.6")
    monkeypatch.setenv("LISTWISE_RERANKER_MIN_GROUP_SIZE", str(min_group_size))
    scores = scores_of(RELEVANT)
    ours = listwise_reranker_losses(scores.squeeze(-1), RELEVANT, temperature=0.6, min_group_size=min_group_size)
    assert ours.shape == (groups,)
    theirs = ms_swift_loss("listwise_reranker", SimpleNamespace(logits=scores), RELEVANT)
    if groups:
        assert_same_loss_and_gradient(ours.mean(), theirs, scores)
    else:
        assert ours.sum().item() == theirs.item() == 0
        assert not torch.autograd.grad(ours.sum(), scores)[0].any()  # still part of the graph


def test_listwise_reranker_losses_add_up_over_parts_of_the_batch():
    scores = scores_of(RELEVANT).squeeze(-1)
    parts = [listwise_reranker_losses(scores[part], RELEVANT[part]) for part in (slice(0, 5), slice(5, 11))]
    torch.testing.assert_close(torch.cat(parts), listwise_reranker_losses(scores, RELEVANT), **EXACT)


@pytest.mark.parametrize(
    "problem_type, classes, labels",
    [
        ("single_label_classification", 3, torch.tensor([0, 2, 1, 1, 0])),
        ("multi_label_classification", 3, (normal(5, 3, seed=7) > 0).double()),
        ("regression", 1, normal(5, seed=8)),
        ("regression", 3, normal(5, 3, seed=9)),
    ],
)
def test_classification_loss_equals_that_of_hugging_face(problem_type, classes, labels):
    from transformers.loss.loss_utils import ForSequenceClassificationLoss

    logits = normal(5, classes, seed=10).requires_grad_()
    ours = classification_losses(logits, labels, problem_type=problem_type)
    assert ours.shape == (5,)
    config = SimpleNamespace(problem_type=problem_type, num_labels=classes)
    assert_same_loss_and_gradient(ours.mean(), ForSequenceClassificationLoss(labels, logits, config), logits)
    parts = [classification_losses(logits[p], labels[p], problem_type=problem_type) for p in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(torch.cat(parts), ours, **EXACT)


def test_an_unknown_problem_type_is_refused_by_name():
    with pytest.raises(ValueError, match="problem_type 'ranking': choose single_label_classification, multi_label"):
        classification_losses(torch.zeros(1, 1), torch.zeros(1), problem_type="ranking")


def test_infonce_written_out():
    """Two anchors on the axes, three candidates; by the definition, at temperature .5."""
    anchors = torch.eye(2)
    candidates = torch.tensor([[0.8, 0.6], [0.0, 1.0], [0.6, -0.8]])
    first, second = infonce_losses(anchors, candidates, torch.tensor([0, 1]), temperature=0.5).tolist()
    assert first == pytest.approx(-1.6 + math.log(math.exp(1.6) + 1 + math.exp(1.2)), abs=1e-6)
    assert second == pytest.approx(-2.0 + math.log(math.exp(1.2) + math.exp(2) + math.exp(-1.6)), abs=1e-6)
