"""Soft overlong punishment (DAPO, https://arxiv.org/abs/2503.14476, equation 13)."""

from __future__ import annotations

from typing import Any


class SoftOverlong:
    """0 up to `soft_max_length - soft_cache_length` tokens, then falling by 1 over each `soft_cache_length` tokens.

    Options, in tokens: soft_max_length (default max_completion_length), soft_cache_length.
    """

    def __init__(self, config: Any):
        self.max_length = config.max_completion_length if config.soft_max_length is None else config.soft_max_length
        if config.soft_cache_length is None:
            raise ValueError("reward function 'soft_overlong' needs soft_cache_length (tokens, below soft_max_length)")
        if not 0 < config.soft_cache_length < self.max_length:
            raise ValueError(
                f"soft_cache_length is {config.soft_cache_length}; it must be above 0 and below soft_max_length "
                f"({self.max_length})"
            )
        self.cache_length = config.soft_cache_length

    def __call__(self, completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        free = self.max_length - self.cache_length
        return [min((free - len(ids)) / self.cache_length, 0.0) for ids in completion_ids]
