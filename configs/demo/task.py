"""The demo's model, tokenizer and data: two-digit addition, one token a character, nothing downloaded.

Held-out sums use numbers that no training sum contains; none of their digits is held out more than twice in one place, so
that every digit is learned in both.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from small_model import CHAT_TEMPLATE, SPECIAL, save_model  # noqa: E402

HELD_OUT_NUMBERS = 15
HELD_OUT_SUMS = 200
CHARACTERS = "0123456789+="


def make_model(folder: Path, seed: int, *, layers: int = 4) -> None:
    """A Qwen3 model of 0.6M parameters (with 4 layers) with random weights, and its tokenizer, in Hugging Face's format."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    save_model(folder, fast, seed=seed, num_hidden_layers=layers, max_position_embeddings=64)


def make_data(folder: Path, seed: int) -> None:
    """sft.jsonl, grpo.jsonl and held_out.jsonl; the sums of the first two are disjoint as well.

    gkd.jsonl and held_out_answered.jsonl are the last two with answers.
    """
    rng = random.Random(seed)
    held_out = hold_out(rng)
    seen = [number for number in range(10, 100) if number not in held_out]
    training = [(a, b) for a in seen for b in seen]
    rng.shuffle(training)
    half = len(training) // 2
    _write(folder / "sft.jsonl", training[:half], answered=True)
    _write(folder / "grpo.jsonl", training[half:], answered=False)
    _write(folder / "gkd.jsonl", training[half:], answered=True)
    unseen = rng.sample([(a, b) for a in held_out for b in held_out], HELD_OUT_SUMS)
    _write(folder / "held_out.jsonl", unseen, answered=False)
    _write(folder / "held_out_answered.jsonl", unseen, answered=True)


def hold_out(rng: random.Random) -> list[int]:
    """HELD_OUT_NUMBERS random two-digit numbers; at most two of them have the same tens, or the same units."""
    held_out: list[int] = []
    for number in rng.sample(range(10, 100), 90):
        same_tens = sum(number // 10 == other // 10 for other in held_out)
        same_units = sum(number % 10 == other % 10 for other in held_out)
        if len(held_out) < HELD_OUT_NUMBERS and max(same_tens, same_units) < 2:
            held_out.append(number)
    return held_out


def _write(path: Path, sums: list[tuple[int, int]], *, answered: bool) -> None:
    with open(path, "w") as file:
        for a, b in sums:
            messages = [{"role": "user", "content": f"{a}+{b}="}]
            row = {"messages": messages, "solution": str(a + b)}
            if answered:
                row = {"messages": [*messages, {"role": "assistant", "content": str(a + b)}]}
            file.write(json.dumps(row) + "\n")
