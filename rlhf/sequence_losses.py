"""Losses of embedding, reranking and sequence classification: tensors in, one value for each item out.

Letters: N anchors (queries), M candidates (documents), P pairs, B sequences, G groups of documents, K classes, D hidden,
V vocabulary. The loss of a step is the mean of the values over its global batch, where a docstring does not say "sum".
Names and defaults of options are those of ms-swift's environment variables (INFONCE_TEMPERATURE is `temperature` here).
No model, no config, no communication; torch is imported inside the functions that need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


def infonce_losses(
    anchors: torch.Tensor,
    candidates: torch.Tensor,
    positive_of: torch.Tensor,
    *,
    wanted: torch.Tensor | None = None,
    temperature: float = 0.1,
    anchor_of: torch.Tensor | None = None,
    mask_fake_negative: bool = False,
    fake_neg_margin: float = 0.1,
    include_qq: bool = False,
    include_dd: bool = False,
) -> torch.Tensor:
    """Cross entropy of each wanted anchor's positive among its candidates, [W] (InfoNCE, van den Oord et al. 2018, eq. 4).

    anchors [N, D], candidates [M, D]: embeddings, compared by dot product (of unit vectors: the cosine) / temperature.
    positive_of [N] int64: the row of each anchor's positive in candidates. wanted [W] int64: rows of anchors; None: all.

    anchor_of None (INFONCE_USE_BATCH): every candidate counts for every anchor. DEPENDS ON THE WHOLE BATCH: give the
    anchors and candidates of all data-parallel ranks, those of other ranks without gradient; gradients then add up over
    the ranks. anchor_of [M] int64: a candidate counts for that anchor only, and the batch may be split by anchor.

    The rest needs the whole batch (Qwen3-Embedding, Zhang et al. 2025, eq. 1). mask_fake_negative drops candidates (and
    anchors) whose product with the anchor exceeds its positive's by more than fake_neg_margin. include_qq adds the other
    anchors as negatives, include_dd the products of the positive with all candidates but itself (never masked).
    """
    import torch
    from torch.nn.functional import cross_entropy

    everyone = torch.arange(len(anchors), device=anchors.device)
    rows = (everyone if wanted is None else wanted)[:, None]  # [W, 1]
    queries, positive_of = anchors[rows[:, 0]], positive_of[rows[:, 0]]
    scores = queries @ candidates.T  # [W, M]
    if anchor_of is not None:
        if mask_fake_negative or include_qq or include_dd:
            raise ValueError("mask_fake_negative, include_qq and include_dd need in-batch negatives: leave out anchor_of")
        return cross_entropy(_hidden(scores, anchor_of != rows) / temperature, positive_of, reduction="none")
    ceiling = scores.detach().gather(1, positive_of[:, None]) + fake_neg_margin
    compared = [scores]
    if include_qq:
        compared.append(_hidden(queries @ anchors.T, everyone == rows))
    if mask_fake_negative:
        compared = [_hidden(block, block > ceiling) for block in compared]
    if include_dd:
        own = torch.arange(len(candidates), device=anchors.device) == positive_of[:, None]
        compared.append(_hidden(candidates[positive_of] @ candidates.T, own))
    return cross_entropy(torch.cat(compared, dim=1) / temperature, positive_of, reduction="none")


def cosine_similarity_losses(first: torch.Tensor, second: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Squared error of the cosine of each pair, [P]. first, second [P, D]; labels [P], wanted cosines."""
    return (1 - _cosine_distances(first, second) - labels) ** 2


def contrastive_losses(first: torch.Tensor, second: torch.Tensor, labels: torch.Tensor, *, margin: float = 0.5) -> torch.Tensor:
    """Contrastive loss of each pair, [P] (Hadsell et al. 2006, eq. 4): (y d^2 + (1 - y) max(0, margin - d)^2) / 2.

    first, second [P, D]; d = 1 - cosine; labels y [P]: 1 for a pair that belongs together, 0 for one that does not.
    """
    distances = _cosine_distances(first, second)
    return 0.5 * (labels * distances**2 + (1 - labels) * (margin - distances).relu() ** 2)


def online_contrastive_losses(
    first: torch.Tensor, second: torch.Tensor, labels: torch.Tensor, *, margin: float = 0.5
) -> torch.Tensor:
    """Contrastive loss of the hard pairs, 0 for the others, [P]; the loss of the step is the SUM over its global batch.

    As sentence-transformers' OnlineContrastiveLoss: a negative pair (label 0) is hard if it is closer than the farthest
    positive one (closer than the mean negative, where there is at most one positive); a positive pair (label 1) if it is
    farther than the nearest negative (than the mean positive, where there is at most one negative). Hard positives cost
    d^2, hard negatives max(0, margin - d)^2, d = 1 - cosine. DEPENDS ON THE WHOLE BATCH: give all pairs of the global
    batch. first, second [P, D]; labels [P].
    """
    distances = _cosine_distances(first, second)
    positive, negative = labels == 1, labels == 0
    positives, negatives = distances.detach()[positive], distances.detach()[negative]
    farthest = positives.max() if len(positives) > 1 else negatives.mean()
    nearest = negatives.min() if len(negatives) > 1 else positives.mean()
    hard_positive = positive & (distances > nearest)
    hard_negative = negative & (distances < farthest)
    return hard_positive * distances**2 + hard_negative * (margin - distances).relu() ** 2


def pointwise_reranker_losses(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy of each document, [B]. scores [B]: logits; labels [B]: 1 relevant, 0 not."""
    from torch.nn.functional import binary_cross_entropy_with_logits

    return binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), reduction="none")


def listwise_reranker_losses(
    scores: torch.Tensor, labels: torch.Tensor, *, temperature: float = 1.0, min_group_size: int = 2
) -> torch.Tensor:
    """Cross entropy of the relevant document in each group, [G]; the loss of the step is the mean over groups.

    scores [B]: logits. labels [B]: a group is a document with label 1 and those with label 0 up to the next 1. Documents
    before the first 1 and groups of fewer than min_group_size documents do not count, so G may be 0. A batch may be split
    between groups; divide by the groups of the global batch (ListNet with one relevant document, Cao et al. 2007).
    """
    import torch

    starts = labels.eq(1).nonzero().flatten().tolist()
    groups = [scores[start:end] for start, end in zip(starts, [*starts[1:], len(scores)]) if end - start >= min_group_size]
    if not groups:
        return scores[:0]
    return torch.stack([(group / temperature).logsumexp(0) - group[0] / temperature for group in groups])


def classification_losses(logits: torch.Tensor, labels: torch.Tensor, *, problem_type: str) -> torch.Tensor:
    """Loss of each sequence, [B], from logits [B, K] (Hugging Face's sequence classification).

    single_label_classification: cross entropy; labels [B], class ids. multi_label_classification: mean over classes of the
    binary cross entropy; labels [B, K] of 0 and 1. regression: mean over outputs of the squared error; labels [B, K], or
    [B] where K is 1.
    """
    from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

    match problem_type:
        case "single_label_classification":
            return cross_entropy(logits, labels.flatten(), reduction="none")
        case "multi_label_classification":
            return binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(-1)
        case "regression":
            return ((logits - labels.view_as(logits)) ** 2).mean(-1)
    raise ValueError(f"problem_type {problem_type!r}: choose {', '.join(PROBLEM_TYPES)}")


def _cosine_distances(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """1 - cosine of each pair, [P, D], [P, D] -> [P]."""
    from torch.nn.functional import cosine_similarity

    return 1 - cosine_similarity(first, second)


def _hidden(scores: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(where, float("-inf"))
