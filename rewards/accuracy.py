"""Is the answer mathematically equal to the dataset's `solution`? Parsed and compared by math-verify."""

from __future__ import annotations

import functools
import logging
import re
import threading
from decimal import Decimal
from typing import Any

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?")
PARSE_SECONDS = 5  # for one expression; as math-verify's own default


class Accuracy:
    """1.0 where the completion's answer equals the solution, else 0.0.

    An answer in `<answer>` tags may be a bare expression; without tags it must be in `\\boxed{}`, or announced as
    math-verify knows it ("the final answer is $...$"). Semantics of ms-swift's `MathAccuracy`, with two differences: a
    completion that is nothing but a number is that answer; and a solution that math-verify cannot parse raises, where a
    reward of 0 would hide a broken dataset or installation.
    """

    def __init__(self, config: Any = None):
        self.solution = functools.lru_cache(maxsize=1024)(_parse_solution)

    def warm_up(self) -> None:
        """Import math-verify and its parsers: seconds that must not count against the first completions' deadlines."""
        from math_verify import parse, verify

        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would warn of every call without a deadline
        expression = parse(r"\boxed{\frac{1}{2}}", parsing_timeout=None)
        if not verify(expression, expression, timeout_seconds=None):
            raise RuntimeError("math-verify does not work here: it does not find 1/2 equal to itself")

    def __call__(self, completions: list[str], solution: list[Any]) -> list[float]:
        return [self._reward(text, str(answer)) for text, answer in zip(completions, solution, strict=True)]

    def _reward(self, text: str, solution: str) -> float:
        from math_verify import verify

        number = _number(text)
        if number is not None and (wanted := _number(solution)) is not None:
            return float(number == wanted)
        gold = self.solution(solution)
        seconds = _seconds()
        return float(verify(gold, _parse_completion(text, seconds), timeout_seconds=seconds))


def _number(text: str) -> Decimal | None:
    """The value of a text that is a decimal number and nothing else."""
    text = text.strip()
    return Decimal(text.replace(",", "")) if NUMBER.fullmatch(text) else None


def _parse_solution(solution: str) -> list[Any]:
    from math_verify import parse

    tagged = ANSWER.search(solution)
    text = tagged.group(1).strip() if tagged else solution
    gold = parse(text, extraction_mode="first_match", parsing_timeout=_seconds())
    if not gold:
        raise ValueError(f"math-verify finds no expression in the solution {solution[:80]!r}")
    return gold


def _parse_completion(text: str, seconds: int | None) -> list[Any]:
    from math_verify import parse

    tagged = ANSWER.search(text)
    if tagged:
        return parse(tagged.group(1).strip(), extraction_mode="first_match", parsing_timeout=seconds)
    return parse(text, extraction_config=[_untagged()], extraction_mode="first_match", parsing_timeout=seconds)


@functools.cache
def _untagged() -> Any:
    """How an answer is found in a completion without `<answer>` tags."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig

    normalization = NormalizationConfig(nits=False, malformed_operators=False, basic_latex=True, boxed=True, units=True)
    return LatexExtractionConfig(normalization_config=normalization, boxed_match_priority=0, try_extract_without_anchor=False)


def _seconds() -> int | None:
    """math-verify's own deadline. It uses SIGALRM and would raise in any thread but the main one."""
    return PARSE_SECONDS if threading.current_thread() is threading.main_thread() else None
