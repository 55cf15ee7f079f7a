"""A penalty for saying the same again: repeated n-grams of words (https://arxiv.org/abs/2502.03373)."""

from __future__ import annotations

from typing import Any


class Repetition:
    """`repetition_max_penalty` times the share of the completion's n-grams that occurred before.

    Options: repetition_n_grams (words), repetition_max_penalty (a reward, at most 0).
    """

    def __init__(self, config: Any):
        self.size, self.max_penalty = config.repetition_n_grams, config.repetition_max_penalty
        if self.size < 1:
            raise ValueError(f"repetition_n_grams is {self.size}; it must be at least 1")
        if self.max_penalty > 0:
            raise ValueError(f"repetition_max_penalty is {self.max_penalty}; a penalty must not be above 0")

    def __call__(self, completions: list[str]) -> list[float]:
        return [self._reward(text.lower().split()) for text in completions]

    def _reward(self, words: list[str]) -> float:
        ngrams = list(zip(*(words[start:] for start in range(self.size))))
        if not ngrams:
            return 0.0
        return (1 - len(set(ngrams)) / len(ngrams)) * self.max_penalty
