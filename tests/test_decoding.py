"""Texts of sampled tokens are those of the tokenizer's own `batch_decode`."""

import random

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vllm.tokenizers.hf import maybe_make_thread_pool

from actors.decoding import decode_batch
from tests.tiny import make_tiny_model


class Shouting(PreTrainedTokenizerFast):
    """Has its own way of decoding."""

    def _decode(self, *arguments, **options) -> str:
        return super()._decode(*arguments, **options).upper()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("change", ["none", "clean_up", "own"])
def test_the_texts_are_those_of_batch_decode(folder, pooled, change) -> None:
    kind = Shouting if change == "own" else AutoTokenizer
    tokenizer = kind.from_pretrained(folder)
    tokenizer.clean_up_tokenization_spaces = change == "clean_up"
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    if pooled:
        tokenizer = maybe_make_thread_pool(tokenizer)
    draw = random.Random(0)
    spaced = [tokenizer.convert_tokens_to_ids("a"), *tokenizer(" . ,", add_special_tokens=False)["input_ids"]]
    ids = [[draw.randrange(len(tokenizer)) for _ in range(draw.randrange(60))] for _ in range(40)] + [spaced]
    texts = decode_batch(tokenizer, ids)
    assert texts == tokenizer.batch_decode(ids, skip_special_tokens=True)
    if change == "own":
        assert texts[-1].startswith("A")
    else:
        assert texts[-1] == ("a.," if change == "clean_up" else "a . ,")
