"""A run's sampling options as vLLM's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vllm import SamplingParams

EXCLUDED = -100.0  # added to a logit: vLLM's lowest, and in float32 no probability is left
OPTIONS = ("temperature", "top_p", "top_k", "repetition_penalty", "max_completion_length", "stop_words")


def sampling_params(
    config: Any,
    overrides: Mapping[str, Any],
    *,
    n: int,
    index: int,
    special: Mapping[str, int],
    logprobs: bool,
    streamed: bool = False,
) -> SamplingParams:
    """What one prompt's n responses are sampled with.

    `overrides` of `config`'s OPTIONS, and `excluded_ids`, which are never sampled; `index`: the prompt's place in the run, its
    seed under `deterministic`; `special` tokens' ids; `logprobs`: vLLM is to hand them out; `streamed`: each output holds what
    is new, with its text.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    if unknown := set(overrides) - {*OPTIONS, "excluded_ids"}:
        raise ValueError(f"unknown sampling options {sorted(unknown)}: known are {', '.join(OPTIONS)}")
    values = {name: getattr(config, name) for name in OPTIONS} | dict(overrides)
    words = values["stop_words"] or []
    strings = [word for word in words if word not in special]  # a special token is no text: it stops by its id
    return SamplingParams(
        n=n,
        temperature=values["temperature"],
        top_p=values["top_p"],
        top_k=values["top_k"],
        repetition_penalty=values["repetition_penalty"],
        max_tokens=values["max_completion_length"],
        stop=strings or None,
        stop_token_ids=[special[word] for word in words if word in special] or None,
        include_stop_str_in_output=True,
        detokenize=streamed or bool(strings),
        logit_bias=dict.fromkeys(overrides.get("excluded_ids", ()), EXCLUDED) or None,
        seed=_seed(config.seed, index) if config.deterministic else None,
        logprobs=0 if logprobs and not streamed else None,
        flat_logprobs=True,
        output_kind=RequestOutputKind.DELTA if streamed else RequestOutputKind.FINAL_ONLY,
    )


def _seed(seed: int, index: int) -> int:
    """One seed a prompt, 62 bits; vLLM adds the response's place in its group."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> np.uint64(2))
