"""Whether a model ends in what its task needs, and a reward model in one score. Each error is a ValueError of one line."""

from __future__ import annotations

from pathlib import Path

from rlhf.config import Config
from rlhf.counts import reward_names
from rlhf.heads import head_of
from rlhf.model_folder import ModelShape, check_files, read_shape


def check_head(config: Config, shape: ModelShape) -> None:
    """The policy of a resolved config. Raises ValueError."""
    head = head_of(config)
    if head.kind == "seq_cls":
        if shape.num_labels not in (None, head.num_labels):
            raise ValueError(
                f"{config.model} ends in a head of {shape.num_labels} labels, {config.task} is to have {head.num_labels}: "
                + (f"give --num_labels {shape.num_labels}, or " if config.task == "seq_cls" else "give ")
                + "the model that it was made from"
            )
    elif shape.ending not in ("ForCausalLM", "Model" if head.kind == "embedding" else None):
        raise ValueError(f"{config.model} has no output layer for tokens (it is a ...{shape.ending}), which {config.task} needs")
    if config.problem_type == "single_label_classification" and config.num_labels == 1:
        raise ValueError("num_labels 1 leaves single_label_classification nothing to learn: a yes or no has --num_labels 2")
    for dim, weight in (config.mrl_dims or {}).items():
        if not 1 <= dim <= shape.hidden_size or weight <= 0:
            raise ValueError(f"mrl_dims {dim}: {weight:g}: embeddings have {shape.hidden_size} numbers, weights are above 0")
    if config.loss_type == "online_contrastive" and config.global_batch_size < 2:
        raise ValueError("loss_type online_contrastive compares the pairs of a batch: global_batch_size must be 2 or more")


def check_reward_model(config: Config, *, weights: bool) -> ModelShape:
    """The sizes of the reward model; `weights` false: its folder need not hold any. Raises ValueError."""
    folder = Path(config.reward_model)
    shape = read_shape(folder)
    if shape.num_labels != 1:
        kind = f"a head of {shape.num_labels} labels" if shape.num_labels else "no head of scores"
        raise ValueError(f"reward_model {folder} has {kind}: a reward is one number; `rlhf --rlhf_type rm` trains such a model")
    if weights:
        check_files(folder)
    name = reward_names(config)[-1]
    if name in config.reward_funcs:
        raise ValueError(f"reward_model {folder} and a reward function are both named {name}: rename the folder")
    return shape
