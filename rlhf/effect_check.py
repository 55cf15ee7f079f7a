"""Options that act only beside others: one that was given and would have no effect is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from rlhf.config import DEFAULTS, LOSSES, SAMPLED, Config, reads_prompts, streams
from rlhf.counts import samples, teacher_places
from rlhf.preference_losses import PLAIN_RATIO_LOSS_TYPES, SMOOTHED_LOSS_TYPES


@dataclass(frozen=True, kw_only=True)
class Need:
    """What `options`, by the names they are typed with, need to have an effect."""

    options: str
    met: Callable[[Config], bool]  # of a parsed config, whose loss_type is filled in
    lack: str  # after "has no effect"; {NAME} is the value of that option
    give: str  # what would give it one


def uses(name: str) -> Callable[[Config], bool]:
    """Whether a reward function is used. A plug-in may read the options of one that is built in, or take its name."""
    return lambda config: name in config.reward_funcs or bool(config.external_plugins)


def answers_prompts(config: Config) -> bool:
    """Whether engines answer a task's prompts: all tasks with such options but gkd on the dataset's own answers."""
    return config.task != "gkd" or reads_prompts(config)


def trains_on_responses(config: Config) -> bool:
    """Whether there are rollout engines: in all tasks with such options but gkd on rows alone."""
    return config.task != "gkd" or samples(config)


NEEDS = (
    # What is trained, and how
    Need(
        options="lora_rank lora_alpha lora_dropout target_modules modules_to_save merge_lora",
        met=lambda config: config.tuner_type == "lora",
        lack="without LoRA, where all weights are trained",
        give="--tuner_type lora",
    ),
    Need(
        options="recompute_method recompute_num_layers",
        met=lambda config: config.recompute_granularity == "full",
        lack="with recompute_granularity {recompute_granularity}",
        give="--recompute_granularity full",
    ),
    Need(
        options="recompute_modules",
        met=lambda config: config.recompute_granularity == "selective",
        lack="with recompute_granularity {recompute_granularity}",
        give="--recompute_granularity selective",
    ),
    Need(
        options="optimizer_offload_fraction",
        met=lambda config: config.optimizer_cpu_offload,
        lack="without optimizer_cpu_offload",
        give="--optimizer_cpu_offload true",
    ),
    Need(
        options="min_lr",
        met=lambda config: config.lr_decay_style != "constant",
        lack="with lr_decay_style constant",
        give="--lr_decay_style cosine",
    ),
    Need(
        options="no_load_optim no_load_rng",
        met=lambda config: config.resume_from_checkpoint is not None,
        lack="without a run to continue",
        give="--resume_from_checkpoint auto",
    ),
    # Rows
    Need(
        options="packing_length",
        met=lambda config: config.packing,
        lack="without packing",
        give="--packing true",
    ),
    Need(
        options="eval_steps eval_iters",
        met=lambda config: bool(config.val_dataset or config.split_dataset_ratio),
        lack="without held-out rows",
        give="--val_dataset FILE or --split_dataset_ratio 0.02",
    ),
    # Preferences
    Need(
        options="label_smoothing",
        met=lambda config: config.loss_type in SMOOTHED_LOSS_TYPES,
        lack="with loss_type {loss_type}",
        give=f"another loss_type: {', '.join(SMOOTHED_LOSS_TYPES)}",
    ),
    Need(
        options="f_divergence_type",
        met=lambda config: config.loss_type not in PLAIN_RATIO_LOSS_TYPES,
        lack="with loss_type {loss_type}",
        give=f"another loss_type than {', '.join(PLAIN_RATIO_LOSS_TYPES)}",
    ),
    Need(
        options="f_alpha_divergence_coef",
        met=lambda config: config.f_divergence_type == "alpha_divergence",
        lack="with f_divergence_type {f_divergence_type}",
        give="--f_divergence_type alpha_divergence",
    ),
    Need(
        options="discopop_tau",
        met=lambda config: config.loss_type == "discopop",
        lack="with loss_type {loss_type}",
        give="--loss_type discopop",
    ),
    Need(
        options="ld_alpha reference_free",
        met=lambda config: config.loss_type != "sft",
        lack="with loss_type sft, the cross entropy of whole chosen answers",
        give="another loss_type",
    ),
    # Distillation
    Need(
        options="seq_kd sft_alpha",
        met=lambda config: config.lmbda < 1,
        lack="with lmbda 1, where all responses are the policy's own",
        give="a lower --lmbda",
    ),
    # GRPO
    Need(
        options="epsilon",
        met=lambda config: config.loss_type != "cispo" or config.epsilon_high is None,
        lack="with loss_type cispo and an epsilon_high, which caps the ratio",
        give="another loss_type",
    ),
    Need(
        options="delta",
        met=lambda config: config.loss_type != "cispo",
        lack="with loss_type cispo, whose cap is epsilon_high",
        give="another loss_type",
    ),
    Need(
        options="max_resample_times",
        met=lambda config: config.dynamic_sample,
        lack="without dynamic_sample",
        give="--dynamic_sample true",
    ),
    Need(
        options="rollout_importance_sampling_threshold",
        met=lambda config: config.rollout_importance_sampling_mode is not None,
        lack="without rollout_importance_sampling_mode",
        give="--rollout_importance_sampling_mode token_truncate",
    ),
    # Rewards
    Need(
        options="external_plugins reward_workers reward_timeout reward_memory",
        met=lambda config: bool(config.reward_funcs),
        lack="without reward functions",
        give="--reward_funcs",
    ),
    Need(
        options="cosine_min_len_value_wrong cosine_max_len_value_wrong cosine_min_len_value_correct "
        "cosine_max_len_value_correct cosine_max_len",
        met=uses("cosine"),
        lack="without the reward function cosine",
        give="--reward_funcs cosine",
    ),
    Need(
        options="repetition_n_grams repetition_max_penalty",
        met=uses("repetition"),
        lack="without the reward function repetition",
        give="--reward_funcs repetition",
    ),
    Need(
        options="soft_max_length soft_cache_length",
        met=uses("soft_overlong"),
        lack="without the reward function soft_overlong",
        give="--reward_funcs soft_overlong",
    ),
    # Engines
    Need(
        options="rollout.num_engines rollout.engines_per_device vllm_mode vllm_gpu_memory_utilization offload_model "
        "offload_optimizer push_timeout log_completions",
        met=trains_on_responses,
        lack="with lmbda 0, where the policy samples no responses",
        give="--lmbda 0.5",
    ),
    Need(
        options="rollout.num_engines",
        met=lambda config: config.task != "infer" or not streams(config),
        lack="with streamed answers, which come one after another",
        give="--dataset with --stream false",
    ),
    Need(
        options="rollout_name",
        met=lambda config: config.task not in SAMPLED or config.vllm_mode == "server",
        lack="with vllm_mode colocate, whose engines are the run's own",
        give="--vllm_mode server",
    ),
    Need(
        options="offload_model offload_optimizer rollout.engines_per_device",
        met=lambda config: config.vllm_mode == "colocate",
        lack="with vllm_mode server, where no GPU is shared",
        give="--vllm_mode colocate",
    ),
    Need(
        options="max_completion_length top_p top_k repetition_penalty stop_words vllm_max_model_len vllm_max_num_seqs",
        met=answers_prompts,
        lack="with lmbda 0 and without seq_kd, where no responses are sampled",
        give="--lmbda 0.5 or --seq_kd true",
    ),
    Need(
        options="vllm_tensor_parallel_size",
        met=lambda config: trains_on_responses(config) or config.seq_kd and not teacher_places(config),
        lack="with lmbda 0, unless seq_kd has engines on the policy's devices",
        give="--lmbda 0.5",
    ),
    Need(
        options="vllm_enforce_eager vllm_enable_prefix_caching vllm",
        met=lambda config: answers_prompts(config) or config.teacher.backend == "vllm",
        lack="with lmbda 0, without seq_kd and with a Megatron teacher, where there are no engines",
        give="--lmbda 0.5, --seq_kd true or --teacher.backend vllm",
    ),
)


def check_effects(config: Config) -> None:
    """Check a parsed config, before `resolve` fills in what was not given. Raises ValueError.

    An option counts as given when its value is not the default: the default asks for nothing, nor does false where
    the default is left open.
    """
    default = Config(task=config.task, **DEFAULTS.get(config.task, {}))
    config = replace(config, loss_type=config.loss_type or LOSSES.get(config.task, (None,))[0])
    for need in NEEDS:
        for name in need.options.split():
            value, usual = (attrgetter(name)(each) for each in (config, default))
            if value != usual and not (usual is None and value is False) and not need.met(config):
                lack = need.lack.format(**vars(config))
                raise ValueError(f"--{_typed(name, value)} has no effect {lack}: leave it out, or give {need.give}")


def _typed(name: str, value: Any) -> str:
    """How the option, or the first of a section's, is typed."""
    return f"{name}.{next(iter(value))}" if isinstance(value, dict) else name
