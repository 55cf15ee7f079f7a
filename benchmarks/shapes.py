"""Models of real shapes with random weights, made where they are used: speed does not depend on what a model has learnt."""

from __future__ import annotations

import json
import random
from pathlib import Path

VOCABULARY = 151_936
SHAPES = {  # Qwen2.5: hidden size, feed-forward size, heads, key-value heads, tied embeddings
    "1.5B": (1536, 8960, 12, 2, True),
    "7B": (3584, 18944, 28, 4, False),
}


def make_model(folder: Path, shape: str) -> int:
    """Write bfloat16 weights made on the GPU, and a byte tokenizer; the number of parameters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(f"unused{i}" for i in range(len(alphabet), VOCABULARY))]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=names[-1], pad_token=names[-2])
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    fast.save_pretrained(folder)
    hidden, feed_forward, heads, kv_heads, tied = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=28,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
        rope_theta=1e6,
        eos_token_id=VOCABULARY - 1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    return model.num_parameters()


def make_prompts(path: Path, tokens: int, count: int = 512) -> None:
    """`count` GRPO rows of random letters, `tokens` tokens each with the template's own."""
    rng = random.Random(0)
    with open(path, "w") as file:
        for _ in range(count):
            text = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=tokens - 1))
            file.write(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n")
