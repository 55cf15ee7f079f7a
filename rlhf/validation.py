"""What can be found wrong before anything is loaded or started.

Each is a ValueError of one line, with the numbers and the way to mend it. Reads JSON files only. Datasets and reward
functions have checks of their own, in `rlhf.dataset_check` and `rewards.loading`.
"""

from __future__ import annotations

from pathlib import Path

from rlhf.config import LOSSES, Config
from rlhf.counts import data_ranks, model_ranks, policy_ranks, samples, updates
from rlhf.distillation_check import check_distillation
from rlhf.effect_check import check_effects
from rlhf.engine_check import check_rollout, check_teacher_engines
from rlhf.engine_options import check_engine_options
from rlhf.expert_checks import expert_notes
from rlhf.head_check import check_head, check_reward_model
from rlhf.layout_check import check_frozen, check_policy_layout, check_reward_layout
from rlhf.megatron_folder import check_described
from rlhf.model_folder import ModelShape, check_files, read_shape
from rlhf.output_check import check_output
from rlhf.reward_check import check_rewards, check_signal
from rlhf.training_check import check_training


def check_parsed(config: Config) -> None:
    """What does not depend on the model: the parts that `resolve` relies on. Raises ValueError."""
    if config.model is None and config.mcore_model is None:
        raise ValueError("--model is missing: a model folder, or a hub id such as Qwen/Qwen2.5-7B-Instruct")
    if config.task == "gkd" and config.teacher.model is None:
        raise ValueError("--teacher_model is missing: the folder or hub id of the model to learn from")
    if not config.dataset:
        raise ValueError("--dataset is missing: files (.jsonl) or hub ids")
    if config.train_iters is None and config.num_train_epochs is None:
        raise ValueError("give --train_iters or --num_train_epochs: the run has no length")
    if config.micro_batch_tokens is not None:
        if config.micro_batch_size != 1:
            raise ValueError("give --micro_batch_size or --micro_batch_tokens, not both: each sets what a micro batch holds")
        if config.packing:
            raise ValueError("give --packing or --micro_batch_tokens, not both: each packs rows without padding")
    if config.val_dataset and config.split_dataset_ratio:
        raise ValueError("give --val_dataset or --split_dataset_ratio, not both: each says what to evaluate on")
    known = LOSSES.get(config.task, ())
    if config.loss_type not in (None, *known):
        raise ValueError(f"loss_type {config.loss_type!r} of {config.task}: choose from {', '.join(known)}")
    check_effects(config)


def validate(config: Config, *, weights: bool = True) -> list[str]:
    """Check a resolved config whose `model` is a local folder; the notes to show its user. Raises ValueError.

    `weights` false: the folder need not hold weights and tokenizer.
    """
    shape = read_shape(Path(config.model))
    if weights:
        check_files(Path(config.model), weights=config.mcore_model is None)
        check_described(Path(config.model))
    check_policy_layout(config, shape)
    _check_batches(config)
    check_training(config, shape)
    if config.task == "grpo":
        check_rewards(config)
        check_signal(config)
    if config.task == "gkd":
        check_distillation(config, shape)
        if weights and config.seq_kd:  # engines read the teacher, and read safetensors alone
            check_files(Path(config.teacher.model))
        if config.seq_kd:
            check_teacher_engines(config, read_shape(Path(config.teacher.model)))
    if samples(config):
        check_rollout(config, shape)
    _check_loss(config)
    check_head(config, shape)
    for name in ("reference", "teacher"):
        check_frozen(config, name)
    if config.reward_model is not None:
        check_reward_layout(config, check_reward_model(config, weights=weights))
    check_output(config)
    check_engine_options(config)
    return _notes(config, shape)


def _check_batches(config: Config) -> None:
    batch, micro, copies = config.global_batch_size, config.micro_batch_size, data_ranks(config)
    if config.micro_batch_tokens is None and batch % (micro * copies):
        raise ValueError(
            f"global_batch_size {batch} must be a multiple of micro_batch_size {micro} x {copies} data-parallel ranks "
            f"= {micro * copies} (ranks {policy_ranks(config)} / TP*PP {model_ranks(config)} = {copies})"
        )
    if batch < copies:
        raise ValueError(f"global_batch_size {batch} is less than the {copies} data-parallel ranks: each needs a sequence")
    if config.task == "grpo" and config.generation_batch_size % config.num_generations:
        raise ValueError(
            f"global_batch_size {batch} x steps_per_generation {config.steps_per_generation} = "
            f"{config.generation_batch_size} responses is no multiple of num_generations {config.num_generations}: "
            "prompts a generation must be a whole number"
        )
    if config.num_train_epochs is None and config.train_iters and config.train_iters % updates(config):
        raise ValueError(
            f"train_iters {config.train_iters} is no multiple of steps_per_generation {config.steps_per_generation} x "
            f"num_iterations {config.num_iterations} = {updates(config)} optimizer steps a generation"
        )
    if config.max_length and config.packing_length and config.packing_length < config.max_length:
        raise ValueError(f"packing_length {config.packing_length} is less than max_length {config.max_length}: a row must fit")


def _check_loss(config: Config) -> None:
    if config.task in ("dpo", "kto") and not config.beta:
        raise ValueError(f"beta 0 would make {config.task} learn nothing: it scales the rewards; 0.1 is usual")
    if config.task == "kto" and config.loss_type == "kto" and config.global_batch_size < 2:
        raise ValueError("loss_type kto pairs each prompt with another row's response: global_batch_size must be 2 or more")
    if config.task == "dpo" and config.loss_type == "robust" and config.label_smoothing == 0.5:
        raise ValueError("loss_type robust: with label_smoothing 0.5 the preferences say nothing; choose one below")


def _notes(config: Config, shape: ModelShape) -> list[str]:
    notes = expert_notes(config, shape)
    if (config.overlap_grad_reduce or config.overlap_param_gather) and data_ranks(config) == 1:
        notes.append("overlap_grad_reduce and overlap_param_gather have no effect: there is one data-parallel rank")
    if config.num_train_epochs is not None and config.train_iters is not None:
        notes.append(
            f"num_train_epochs {config.num_train_epochs} sets the length of the run; train_iters {config.train_iters} is not used"
        )
    if config.no_save_optim:
        notes.append("no_save_optim: this run cannot be resumed from its checkpoints")
    if samples(config) and (config.top_p < 1 or config.top_k > 0 or config.repetition_penalty != 1):
        notes.append(
            "top_p, top_k and repetition_penalty change what is sampled, not the policy's logprobs: "
            "rollout_train_logprob_diff and importance weights contain the difference"
        )
    if config.kl_in_reward and not config.beta:
        notes.append("kl_in_reward has no effect with beta 0")
    of_ratio = config.delta is not None or config.importance_sampling_level != "token"
    if config.task == "grpo" and of_ratio and updates(config) == 1:
        notes.append(
            "delta and importance_sampling_level have no effect with one optimizer step a generation, when the policy is still "
            "what it was sampled from: steps_per_generation or num_iterations above 1 makes them matter"
        )
    if samples(config) and config.max_length and shape.max_length:
        longest, limit = config.max_length + config.max_completion_length, config.vllm_max_model_len or shape.max_length
        if longest > limit and config.max_length < shape.max_length:
            notes.append(
                f"max_length {config.max_length} + max_completion_length {config.max_completion_length} = {longest} "
                f"exceeds the {limit} tokens an engine holds: the longest prompts get shorter responses"
            )
    return notes
