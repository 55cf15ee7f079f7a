"""Losses on what a head says at the last token of each sequence: tensors in, (loss, metrics) out.

Letters: B sequences of a micro batch, K values of each (a score, logits of classes, or an embedding), S sequences of the
global batch. As in `rlhf.losses`, a loss is this micro batch's share of that of the global batch, and metrics add up in the
same way. Sequences of weight 0 are padding, or repetitions, and count for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf.losses import pairs_of, share_of
from rlhf.preference_losses import reward_metrics, reward_pair_losses
from rlhf.records import MicroBatch
from rlhf.sequence_losses import (
    classification_losses,
    contrastive_losses,
    cosine_similarity_losses,
    infonce_losses,
    listwise_reranker_losses,
    online_contrastive_losses,
    pointwise_reranker_losses,
)

if TYPE_CHECKING:
    import torch

    Metrics = dict[str, torch.Tensor]

ANCHOR = 1.0  # the first target of a sequence that others of its row are compared with
PAIR_LOSSES = {
    "cosine_similarity": cosine_similarity_losses,
    "contrastive": contrastive_losses,
    "online_contrastive": online_contrastive_losses,
}


def head_outputs(outputs: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """What the head says, [B, K], as `sequence_values` takes it."""
    return outputs


def rm_loss(
    scores: torch.Tensor, batch: MicroBatch, *, center_rewards_coefficient: float | None = None
) -> tuple[torch.Tensor, Metrics]:
    """Mean over the pairs of the global batch of `reward_pair_losses`. scores [B, 1], the chosen first; target: the margin."""
    chosen, rejected = pairs_of(scores[:, 0])
    weights, _ = pairs_of(batch.sequence_weights)
    margins, _ = pairs_of(batch.targets[:, 0])
    losses = reward_pair_losses(chosen, rejected, margins, center_rewards_coefficient=center_rewards_coefficient)
    metrics = reward_metrics(chosen.detach(), rejected.detach())
    return (weights * losses).sum(), {name: (weights * values).sum() for name, values in metrics.items()}


def classification_loss(logits: torch.Tensor, batch: MicroBatch, *, problem_type: str) -> tuple[torch.Tensor, Metrics]:
    """Mean over the rows of the global batch of `classification_losses`. logits [B, K]; targets: a class, or K values."""
    weights, labels = batch.sequence_weights, batch.targets
    if problem_type == "single_label_classification":
        labels = labels[:, 0].long()
        right = logits.argmax(-1) == labels
    else:
        right = ((logits > 0) == (labels > 0.5)).all(-1)
    losses = classification_losses(logits, labels, problem_type=problem_type)
    metrics = {} if problem_type == "regression" else {"accuracy": (weights * right).sum()}
    return (weights * losses).sum(), metrics


def reranker_loss(
    scores: torch.Tensor,
    batch: MicroBatch,
    *,
    loss_type: str,
    num_documents: int,
    num_groups: int,
    num_trained_groups: int,
    temperature: float = 1.0,
    min_group_size: int = 2,
) -> tuple[torch.Tensor, Metrics]:
    """Mean over the documents ("pointwise_reranker") or the trained groups ("listwise_reranker") of the global batch.

    scores [B, 1]; target: 1 for the relevant document, with which a group begins, 0 for the others of it. `num_*`: of the
    global batch; groups of fewer than `min_group_size` documents are not trained listwise. Metrics are over all groups:
    `accuracy`, the share whose relevant document comes first, and `mrr`, the mean of 1 / its rank.
    """
    own = batch.sequence_weights != 0
    scores, labels = scores[own, 0], batch.targets[own, 0]
    if loss_type == "listwise_reranker":
        losses = listwise_reranker_losses(scores, labels, temperature=temperature, min_group_size=min_group_size)
        loss = losses.sum() / max(num_trained_groups, 1)
    else:
        loss = pointwise_reranker_losses(scores, labels).sum() / max(num_documents, 1)
    ranks = relevant_ranks(scores.detach(), labels)
    share = max(num_groups, 1)
    return loss, {"accuracy": (ranks == 1).sum() / share, "mrr": (1 / ranks).sum() / share}


def relevant_ranks(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Rank of each group's relevant document, its first, [B] -> [G]: 1 is the best; where scores are equal it is the worst."""
    groups = (labels == 1).cumsum(0) - 1
    above = (scores >= scores[labels == 1][groups]).to(scores.dtype)
    return above.new_zeros(int((labels == 1).sum())).index_add(0, groups, above)


def embedding_loss(
    embeddings: torch.Tensor,
    batch: MicroBatch,
    *,
    loss_type: str,
    in_batch: bool = False,
    mrl_dims: Mapping[int, float] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, Metrics]:
    """infonce, cosine_similarity, contrastive: mean over the rows of the global batch; online_contrastive: sum over them.

    embeddings [B, K], unit vectors. A row is an anchor, its positive and, for infonce, negatives; targets: `ANCHOR` or 0, and
    the row's label. `in_batch`: infonce compares an anchor with the candidates of all rows. That and online_contrastive need
    `batch.batch_values` (what `embedding_values` gave): the whole global batch is compared, embeddings of other micro batches
    as constants, so gradients are those of the undivided batch (GradCache, Gao et al. 2021). With it `recall@1` is the share
    of anchors, of rows that belong together, to which no candidate of the batch is nearer than their positive. Without gradient
    only this micro batch's anchors are compared; with it all are, for other anchors' losses move this micro batch's candidates.

    `mrl_dims` {D: weight}: the weighted sum of the losses of embeddings cut to their first D numbers and normalised again
    (Matryoshka representation learning, Kusupati et al. 2022, eq. 1); a recall is of whole ones.
    """
    import torch

    own = batch.sequence_weights != 0
    share = batch.sequence_weights[own & (batch.targets[:, 0] == ANCHOR)].sum()
    values = embedding_values(embeddings, batch)[own]
    whole = batch.batch_values is not None
    assert whole or not in_batch and loss_type != "online_contrastive", f"{loss_type} needs the embeddings of the whole batch"
    everything = batch.batch_values.index_put((batch.keys[own],), values) if whole else values
    anchors, candidates, positive_of, anchor_of, labels = _compared(everything)
    own_rows = every_row = torch.arange(len(anchors), device=anchors.device)
    if whole:
        is_own = torch.zeros(len(everything), dtype=torch.bool, device=anchors.device).index_fill(0, batch.keys[own], True)
        own_rows = every_row[is_own[_is_anchor(everything)]]
    all_rows = loss_type == "online_contrastive" or in_batch and values.requires_grad
    rows = every_row if all_rows else own_rows

    def losses_of(anchors: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        if loss_type == "infonce":
            owner = None if in_batch else anchor_of
            return infonce_losses(anchors, candidates, positive_of, wanted=rows, anchor_of=owner, **options)
        return PAIR_LOSSES[loss_type](anchors[rows], candidates[positive_of[rows]], labels[rows])

    if mrl_dims:
        losses = sum(weight * losses_of(cut(anchors, dim), cut(candidates, dim)) for dim, weight in mrl_dims.items())
    else:
        losses = losses_of(anchors, candidates)
    if all_rows:
        loss = share_of(losses.sum() if loss_type == "online_contrastive" else losses.mean(), share)
    else:
        loss = losses.sum() * share / max(len(losses), 1)
    if not whole:
        return loss, {}
    related = labels > 0.5
    hits = nearest_is_positive(anchors[own_rows].detach(), candidates.detach(), positive_of[own_rows]) & related[own_rows]
    return loss, {"recall@1": hits.sum() / related.sum().clamp(min=1)}


def cut(embeddings: torch.Tensor, dim: int) -> torch.Tensor:
    """[B, K] -> [B, dim]: the first numbers of each, as unit vectors."""
    from torch.nn.functional import normalize

    return normalize(embeddings[:, :dim], dim=-1)


def embedding_values(embeddings: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Embeddings with the two targets of each sequence, [B, K] -> [B, K + 2]: what the loss needs of the whole batch."""
    import torch

    return torch.cat([embeddings, batch.targets[:, :2]], dim=1)


def nearest_is_positive(anchors: torch.Tensor, candidates: torch.Tensor, positive_of: torch.Tensor) -> torch.Tensor:
    """Whether no candidate is nearer than the positive, by dot product; anchors [N, K], candidates [M, K] -> [N]."""
    scores = anchors @ candidates.T
    return (scores <= scores.gather(1, positive_of[:, None])).all(1)


def _is_anchor(values: torch.Tensor) -> torch.Tensor:
    return values[:, -2] == ANCHOR


def _compared(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[S, K + 2], rows one after another -> anchors [N, K], candidates [M, K], positive_of [N], anchor_of [M], labels [N]."""
    is_anchor = _is_anchor(values)
    starts = is_anchor.nonzero()[:, 0]
    row_of = is_anchor.cumsum(0) - 1
    embeddings, labels = values[:, :-2], values[:, -1]
    return embeddings[is_anchor], embeddings[~is_anchor], starts - row_of[starts], row_of[~is_anchor], labels[is_anchor]
