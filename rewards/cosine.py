"""Accuracy, scaled by length along a cosine (https://arxiv.org/abs/2502.03373, equation 1)."""

from __future__ import annotations

import math
from typing import Any

from rewards.accuracy import Accuracy


class Cosine:
    """A right answer earns less the longer it is, a wrong one loses less the longer it is.

    Options: cosine_min_len_value_correct and _wrong (reward at 0 tokens), cosine_max_len_value_correct and _wrong (a
    reward at `cosine_max_len` tokens; default max_completion_length).
    """

    def __init__(self, config: Any):
        self.correct = config.cosine_min_len_value_correct, config.cosine_max_len_value_correct
        self.wrong = config.cosine_min_len_value_wrong, config.cosine_max_len_value_wrong
        self.max_len = config.max_completion_length if config.cosine_max_len is None else config.cosine_max_len
        if self.max_len < 1:
            raise ValueError(f"cosine_max_len is {self.max_len} tokens; it must be at least 1")
        self.accuracy = Accuracy(config)

    def warm_up(self) -> None:
        """As `Accuracy.warm_up`."""
        self.accuracy.warm_up()

    def __call__(self, completions: list[str], solution: list[Any], completion_ids: list[list[int]]) -> list[float]:
        accuracies = self.accuracy(completions, solution)
        return [self._reward(len(ids), right=value >= 1) for ids, value in zip(completion_ids, accuracies, strict=True)]

    def _reward(self, length: int, *, right: bool) -> float:
        at_zero, at_max = self.correct if right else self.wrong
        return at_max + (at_zero - at_max) * (1 + math.cos(math.pi * length / self.max_len)) / 2
