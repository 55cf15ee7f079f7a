"""The model and prompts of the CPU comparison, made here: nothing is downloaded.

The end token has an id beyond the model's vocabulary, and no special token ends a turn: every response has full length.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from small_model import save_model

VOCABULARY = 512


def make_model(folder: Path) -> None:
    """Qwen3, hidden 128, 4 layers, 4 heads (2 key heads), vocabulary 512, random float32 weights; a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["what is 1+2? the answer is 3. user assistant system"] * 10, trainer)
    filler = [f"<|unused{i}|>" for i in range(VOCABULARY - tokenizer.get_vocab_size())]
    tokenizer.add_special_tokens([*filler, "<|im_end|>"])
    assert tokenizer.token_to_id("<|im_end|>") == VOCABULARY
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    save_model(folder, fast, seed=0, vocab_size=VOCABULARY, eos_token_id=None, max_position_embeddings=2048)


def make_prompts(path: Path, count: int = 512) -> None:
    """`count` questions as GRPO rows."""
    rng = random.Random(0)
    with open(path, "w") as file:
        for _ in range(count):
            question = f"what is {rng.randint(1, 99)}+{rng.randint(1, 99)}?"
            file.write(json.dumps({"messages": [{"role": "user", "content": question}]}) + "\n")
