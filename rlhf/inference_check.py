"""What can be found wrong with infer, eval and rollout before anything is loaded or started; `validation` is for training."""

from __future__ import annotations

from pathlib import Path

from rlhf.config import INFER, Config
from rlhf.effect_check import check_effects
from rlhf.engine_check import check_engines
from rlhf.engine_options import check_engine_options
from rlhf.head_check import check_head
from rlhf.model_folder import check_files, read_shape
from rlhf.output_check import check_output
from rlhf.reward_check import check_rewards

RESULTS = {"infer": ".jsonl", "eval": ".json"}


def check_parsed(config: Config) -> None:
    """What does not depend on the model. Raises ValueError."""
    if config.model is None:
        adapter = ", or --adapters CHECKPOINT" if config.task in INFER else ""
        raise ValueError(f"--model is missing: a model folder, or a hub id such as Qwen/Qwen2.5-7B-Instruct{adapter}")
    if config.task == "eval" and not (config.dataset or config.val_dataset):
        raise ValueError("--dataset is missing: files (.jsonl) or hub ids")
    if config.dataset and config.val_dataset:
        raise ValueError("give --dataset or --val_dataset, not both: they mean the same here")
    if config.num_generations > 1 and config.temperature == 0 and config.task == "eval":
        raise ValueError(f"{config.num_generations} responses at temperature 0 would be equal: give --temperature too")
    if config.result_path is not None and not config.result_path.endswith(RESULTS[config.task]):
        rows = "; every response goes into a .jsonl beside it" if config.task == "eval" else ""
        raise ValueError(f"--result_path {config.result_path} must end in {RESULTS[config.task]}{rows}")
    if "/" in config.rollout_name or not config.rollout_name:
        raise ValueError(f"rollout_name {config.rollout_name!r} is a name, without slashes")
    check_effects(config)


def validate(config: Config) -> None:
    """A resolved config whose `model` is a local folder. Raises ValueError."""
    folder = Path(config.model)
    shape, limit = read_shape(folder), config.vllm_max_model_len
    check_files(folder)
    check_head(config, shape)
    check_engines(config, shape)
    check_engine_options(config)
    if limit and config.max_length and config.max_length >= limit:
        raise ValueError(f"a prompt of max_length {config.max_length} leaves no room to answer: an engine holds {limit} tokens")
    if config.task == "eval":
        check_rewards(config)
    if config.task in INFER:
        check_output(config)
