"""A tiny model, dense or with experts, with a byte-level BPE tokenizer and a chat template.

Made with transformers and tokenizers alone.
"""

from __future__ import annotations

from pathlib import Path

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SETTINGS = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


def make_tiny_model(folder: Path, *, seed: int = 0, family: str = "Qwen3", **config_overrides) -> Path:
    """Save a random model (about 0.2M float32 parameters) and its tokenizer into `folder`; returns `folder`.

    `config_overrides` are fields of the config of transformers' `family`. Norms and biases are random too, so that a swapped
    or lost one shows.
    """
    import transformers

    config = getattr(transformers, f"{family}Config")(**(SETTINGS | config_overrides))
    return _save(getattr(transformers, f"{family}ForCausalLM"), config, folder, seed)


def make_tiny_moe(folder: Path, *, family: str = "Qwen3Moe", seed: int = 0, **config_overrides) -> Path:
    """As `make_tiny_model`, with 8 experts, of which each token takes 2."""
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    return make_tiny_model(folder, family=family, seed=seed, **(experts | config_overrides))


def _save(kind, config, folder: Path, seed: int) -> Path:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                else:
                    parameter.normal_(0, 0.08)
            if config.tie_word_embeddings:
                model.tie_weights()
    model.save_pretrained(folder)
    make_tokenizer(config.vocab_size).save_pretrained(folder)
    return folder


def make_tokenizer(vocab_size: int = 512):
    """Byte-level BPE with 3 special tokens; the end of a turn `<|im_end|>` (id 2) ends a response."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["what is 1+2? the answer is 3. user assistant system"] * 10, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast
