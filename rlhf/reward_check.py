"""What can be wrong with rewards, and with what a policy can learn from them."""

from __future__ import annotations

from rlhf.config import Config
from rlhf.counts import reward_names


def check_rewards(config: Config) -> None:
    """There are rewards, and reward functions have what they need. Raises ValueError."""
    names = reward_names(config)
    if not names:
        model = "; or --reward_model" if config.task == "grpo" else ""
        functions = "accuracy, format, cosine, repetition, soft_overlong, or a plug-in's name"
        raise ValueError(f"--reward_funcs is missing: {functions}{model}")
    if config.reward_weights is not None and len(config.reward_weights) != len(names):
        rewards = f"{len(config.reward_funcs)} reward_funcs" + (" and a reward model" if config.reward_model else "")
        raise ValueError(f"{len(config.reward_weights)} reward_weights for {rewards}")
    if "soft_overlong" in config.reward_funcs:
        if config.soft_cache_length is None:
            raise ValueError("reward soft_overlong needs --soft_cache_length")
        if config.soft_cache_length >= config.soft_max_length:
            raise ValueError(
                f"soft_cache_length {config.soft_cache_length} must be below soft_max_length {config.soft_max_length}"
            )


def check_signal(config: Config) -> None:
    """The responses to a prompt can differ in reward, and the loss can follow. Raises ValueError."""
    if config.num_generations < 2:
        raise ValueError("num_generations 1 gives every response advantage 0: use at least 2")
    if config.temperature == 0:
        raise ValueError("temperature 0 gives a prompt's responses no difference to learn from: use 1, say")
    if config.delta is not None and config.delta <= 1 + config.epsilon_high:
        raise ValueError(
            f"delta {config.delta:g} caps the ratio at or below the clip at 1 + epsilon_high = {1 + config.epsilon_high:g}, and "
            "at 1 good responses teach nothing: give a larger one, 4 is usual"
        )
    if config.loss_type == "cispo" and config.epsilon_high < 1:
        raise ValueError(
            f"loss_type cispo caps the ratio at epsilon_high itself: {config.epsilon_high:g} would shrink every gradient; "
            "give --epsilon_high 5, say"
        )
