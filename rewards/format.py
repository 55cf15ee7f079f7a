"""Does the completion think first and then answer?"""

from __future__ import annotations

import re

THINK_THEN_ANSWER = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>(?![\s\S])", re.DOTALL)


def think_then_answer(completions: list[str]) -> list[float]:
    """1.0 where the whole completion is `<think>...</think>` and then `<answer>...</answer>`, else 0.0."""
    return [1.0 if THINK_THEN_ANSWER.match(text) else 0.0 for text in completions]
