"""The texts of sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def decode_batch(tokenizer: Any, ids: Sequence[list[int]]) -> list[str]:
    """What the tokenizer's `batch_decode` gives without special tokens.

    That of `transformers` holds Python's lock all the while. Where it would only pass every row to the `tokenizers` library,
    that gets all rows at once, and other threads go on meanwhile.
    """
    from transformers import PreTrainedTokenizerFast

    plain = getattr(type(tokenizer), "_decode", None) is PreTrainedTokenizerFast._decode
    if not plain or tokenizer.clean_up_tokenization_spaces:
        return tokenizer.batch_decode(ids, skip_special_tokens=True)
    return tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=True)
