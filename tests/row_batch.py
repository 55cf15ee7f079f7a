"""The rows that tests of ranks train on (the fixtures `rows` and `source`), their splits, and what Hugging Face says of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.records import RowTokens
from tests.policy_ranks import sequence_logprobs

if TYPE_CHECKING:
    import torch

ROWS = 8
SPLITS = {1: [[[0, 1, 2], [3, 4], [5, 6, 7]]], 2: [[[0, 1, 2], [3]], [[4, 5], [6, 7]]]}  # data ranks: micro batches of each
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


def hf_logprobs(hf: Any, rows: RowTokens, **temperature: float) -> dict[int, np.ndarray]:
    """By the keys of `shards_of`, [L] each."""
    import torch

    with torch.no_grad():
        return {100 + item: sequence_logprobs(hf, ids, **temperature).numpy() for item, ids in enumerate(rows.token_ids)}


def nll(hf: Any, rows: RowTokens) -> torch.Tensor:
    """The loss of `nll_loss`: the mean over all trained tokens."""
    import torch

    total = sum(mask.sum() for mask in rows.loss_masks)
    logprobs = [sequence_logprobs(hf, ids) for ids in rows.token_ids]
    return -sum((values * torch.from_numpy(mask)).sum() for values, mask in zip(logprobs, rows.loss_masks)) / total


def gradient_norm(hf: Any) -> float:
    import torch

    return torch.nn.utils.clip_grad_norm_(hf.parameters(), float("inf")).item()


def weights_of(folder: Path, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / file)


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The same names, and bit for bit the same tensors."""
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []
