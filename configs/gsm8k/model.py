"""A tiny model and tokenizer for GSM8K, made from nothing but the training texts.

usage: model.py rows/sft.jsonl FOLDER [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from small_model import CHAT_TEMPLATE, SPECIAL, save_model  # noqa: E402

VOCABULARY = 2048
LONGEST = 2048  # tokens: more than any published solution has


def main() -> None:
    parser = argparse.ArgumentParser(description="A tiny random model, and a tokenizer of the rows' texts.")
    parser.add_argument("rows", type=Path, help="sft.jsonl of data.py")
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_model(arguments.folder, arguments.rows, seed=arguments.seed)


def make_model(folder: Path, rows: Path, *, seed: int = 0) -> None:
    """A Qwen3 model of 1.1M parameters with random weights, and a byte-level BPE of the texts of `rows`, one token a digit."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    with open(rows, encoding="utf-8") as lines:
        texts = [message["content"] for line in lines for message in json.loads(line)["messages"]]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    save_model(folder, fast, seed=seed, vocab_size=VOCABULARY, max_position_embeddings=LONGEST)


if __name__ == "__main__":
    main()
