"""What the models of the demos and of the benchmark on CPU have in common; each brings a tokenizer of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": False,
    "bos_token_id": None,
}
SPECIAL = ["<pad>", "<user>", "<assistant>", "<end>"]  # tokens that begin the vocabularies of the demos
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_model(folder: Path, tokenizer: Any, *, seed: int, **settings: Any) -> None:
    """Write a Qwen3 model with random weights, 0.6M parameters and 256 more for each token of the vocabulary, and its tokenizer.

    `tokenizer` is transformers'; `settings` are fields of Qwen3Config that go before `SHAPE` and the tokenizer's ids.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer.save_pretrained(folder)
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(seed)
    Qwen3ForCausalLM(Qwen3Config(**(SHAPE | ids | settings))).save_pretrained(folder)
