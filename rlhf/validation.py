"""What can be found wrong before anything is loaded or started.

Each is a ValueError of one line, with the numbers and the way to mend it. Reads JSON files only. Datasets and reward
functions have checks of their own, in `rlhf.dataset_check` and `rewards.loading`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rlhf.config import LOSSES, Config
from rlhf.counts import (
    compares,
    data_ranks,
    frozen_group,
    model_ranks,
    policy_ranks,
    reward_names,
    rollout_engines,
    samples,
)
from rlhf.distillation_check import check_distillation
from rlhf.engine_options import check_engine_options
from rlhf.expert_checks import check_expert_sizes, check_experts, expert_notes
from rlhf.head_check import check_head, check_reward_model
from rlhf.heads import head_of
from rlhf.megatron_folder import check_described
from rlhf.model_folder import ModelShape, check_files, read_shape

LORA_MODULES = ("all-linear", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
WHOLE_MODULES = ("word_embeddings", "output_layer")
RECOMPUTE_MODULES = ("core_attn", "layernorm", "mlp")
EXPERT_RECOMPUTE_MODULES = ("core_attn", "layernorm", "moe")


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
            raise ValueError(
                "give --micro_batch_size or --micro_batch_tokens, not both: each sets what a micro batch holds"
            )
        if config.packing:
            raise ValueError("give --packing or --micro_batch_tokens, not both: each packs rows without padding")
    if config.val_dataset and config.split_dataset_ratio:
        raise ValueError("give --val_dataset or --split_dataset_ratio, not both: each says what to evaluate on")
    if config.packing_length is not None and not config.packing:
        raise ValueError("--packing_length needs --packing true")


def validate(config: Config, *, weights: bool = True) -> list[str]:
    """Check a resolved config whose `model` is a local folder; the notes to show its user. Raises ValueError.

    `weights` false: the folder need not hold weights and tokenizer.
    """
    shape = read_shape(Path(config.model))
    if weights:
        check_files(Path(config.model), weights=config.mcore_model is None)
        check_described(Path(config.model))
    _check_parallel(config, shape)
    _check_batches(config)
    _check_optimizer(config)
    _check_recompute(config, shape)
    _check_lora(config, shape)
    if config.task == "grpo":
        check_rewards(config)
        _check_grpo(config)
    if config.task == "gkd":
        check_distillation(config, shape)
        if weights and config.seq_kd:  # engines read the teacher, and read safetensors alone
            check_files(Path(config.teacher.model))
    if samples(config):
        _check_rollout(config, shape)
    _check_loss(config)
    check_head(config, shape)
    for name in ("reference", "teacher"):
        _check_frozen(config, name)
    if config.reward_model is not None:
        reward_shape = check_reward_model(config, weights=weights)
        tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
        check_layout(reward_shape, tensor, pipeline, "reward_model: ")
        ranks = policy_ranks(config)
        check_expert_sizes(config, reward_shape, tensor=tensor, pipeline=pipeline, ranks=ranks, prefix="reward_model: ")
    check_output(config)
    check_engine_options(config)
    return _notes(config, shape)


def _check_parallel(config: Config, shape: ModelShape) -> None:
    check_layout(shape, config.tensor_model_parallel_size, config.pipeline_model_parallel_size)
    check_experts(config, shape)
    ranks, each = policy_ranks(config), model_ranks(config)
    if ranks % each:
        raise ValueError(
            f"{config.nnodes} nodes x {config.nproc_per_node} ranks = {ranks} policy ranks is no multiple of "
            f"tensor_model_parallel_size {config.tensor_model_parallel_size} x pipeline_model_parallel_size "
            f"{config.pipeline_model_parallel_size} = {each}: set --nproc_per_node (or NPROC_PER_NODE)"
        )


def check_layout(shape: ModelShape, tensor_size: int, pipeline_size: int, prefix: str = "") -> None:
    """Whether a model can be split that way. Raises ValueError."""
    name = f"{prefix}tensor_model_parallel_size {tensor_size}"
    if shape.num_heads % tensor_size:
        raise ValueError(f"{name} does not divide the model's {shape.num_heads} attention heads")
    if shape.num_kv_heads % tensor_size and tensor_size % shape.num_kv_heads:
        raise ValueError(
            f"{name} neither divides nor is a multiple of the model's {shape.num_kv_heads} key-value heads"
        )
    if shape.ffn_size % tensor_size:
        kind = "shared_expert_intermediate_size" if shape.experts else "intermediate_size"
        raise ValueError(f"{name} does not divide the model's {kind} {shape.ffn_size}")
    if shape.num_layers % pipeline_size:
        name = f"{prefix}pipeline_model_parallel_size {pipeline_size}"
        raise ValueError(f"{name} does not divide the model's {shape.num_layers} layers")


def _check_batches(config: Config) -> None:
    batch, micro, copies = config.global_batch_size, config.micro_batch_size, data_ranks(config)
    if config.micro_batch_tokens is None and batch % (micro * copies):
        raise ValueError(
            f"global_batch_size {batch} must be a multiple of micro_batch_size {micro} x {copies} data-parallel ranks "
            f"= {micro * copies} (ranks {policy_ranks(config)} / TP*PP {model_ranks(config)} = {copies})"
        )
    if batch < copies:
        raise ValueError(
            f"global_batch_size {batch} is less than the {copies} data-parallel ranks: each needs a sequence"
        )
    if config.task == "grpo" and config.generation_batch_size % config.num_generations:
        raise ValueError(
            f"global_batch_size {batch} x steps_per_generation {config.steps_per_generation} = "
            f"{config.generation_batch_size} responses is no multiple of num_generations {config.num_generations}: "
            "prompts a generation must be a whole number"
        )
    updates = config.steps_per_generation * config.num_iterations if config.task == "grpo" else 1
    if config.num_train_epochs is None and config.train_iters and config.train_iters % updates:
        raise ValueError(
            f"train_iters {config.train_iters} is no multiple of steps_per_generation {config.steps_per_generation} x "
            f"num_iterations {config.num_iterations} = {updates} optimizer steps a generation"
        )
    if config.max_length and config.packing_length and config.packing_length < config.max_length:
        raise ValueError(
            f"packing_length {config.packing_length} is less than max_length {config.max_length}: a row must fit"
        )


def _check_optimizer(config: Config) -> None:
    if config.min_lr > config.lr:
        raise ValueError(f"min_lr {config.min_lr:g} is greater than lr {config.lr:g}")
    if config.lr_warmup_iters and config.lr_warmup_fraction is not None:
        raise ValueError("give --lr_warmup_iters or --lr_warmup_fraction, not both")
    if config.num_train_epochs is None and config.lr_warmup_iters >= config.train_iters:
        raise ValueError(f"lr_warmup_iters {config.lr_warmup_iters} must be less than train_iters {config.train_iters}")
    if config.overlap_param_gather and not (config.overlap_grad_reduce and config.use_distributed_optimizer):
        raise ValueError("overlap_param_gather needs --overlap_grad_reduce true and --use_distributed_optimizer true")
    if config.optimizer_cpu_offload and not config.use_distributed_optimizer:
        raise ValueError("optimizer_cpu_offload needs --use_distributed_optimizer true")
    if config.optimizer_cpu_offload and config.offload_optimizer:
        raise ValueError("give --optimizer_cpu_offload or --offload_optimizer, not both: each moves the optimizer's state")
    if config.optimizer_offload_fraction != 1 and not config.optimizer_cpu_offload:
        raise ValueError(f"optimizer_offload_fraction {config.optimizer_offload_fraction:g} needs --optimizer_cpu_offload true")
    if not config.finetune and config.resume_from_checkpoint is None:
        raise ValueError(
            "--finetune false continues a run: say which, by --resume_from_checkpoint auto or a checkpoint folder"
        )


def _check_recompute(config: Config, shape: ModelShape) -> None:
    if config.recompute_granularity == "full":
        if config.recompute_method is None or config.recompute_num_layers is None:
            raise ValueError(
                "recompute_granularity full also needs --recompute_method uniform and --recompute_num_layers 1"
            )
        stage = shape.num_layers // config.pipeline_model_parallel_size
        if config.recompute_num_layers > stage:
            raise ValueError(
                f"recompute_num_layers {config.recompute_num_layers} is more than the {stage} layers of a rank"
            )
        return
    given = {"recompute_method": config.recompute_method, "recompute_num_layers": config.recompute_num_layers}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} is for recompute_granularity full, not {config.recompute_granularity}")
    choices = EXPERT_RECOMPUTE_MODULES if shape.experts else RECOMPUTE_MODULES
    for name in config.recompute_modules:
        if name not in choices:
            raise ValueError(f"recompute_modules {name!r}: choose from {', '.join(choices)}")


def _check_lora(config: Config, shape: ModelShape) -> None:
    if config.tuner_type != "lora":
        if config.modules_to_save:
            raise ValueError("modules_to_save is for tuner_type lora: full training trains and saves all modules")
        return
    for name in config.modules_to_save:
        if name not in WHOLE_MODULES:
            raise ValueError(f"modules_to_save {name!r}: choose from {', '.join(WHOLE_MODULES)}")
    has_output = head_of(config).has_output_matrix
    if "output_layer" in config.modules_to_save and not has_output:
        raise ValueError(f"modules_to_save output_layer: a model for {config.task} has none, its head is always trained")
    if config.modules_to_save and shape.tied_embeddings and has_output:
        raise ValueError(f"modules_to_save {config.modules_to_save[0]}: the model's input and output embeddings are one matrix")
    for name in config.target_modules:
        if name not in LORA_MODULES:
            raise ValueError(
                f"target_modules {name!r}: choose from {', '.join(LORA_MODULES)} "
                "(linear_qkv: q, k and v; linear_proj: o; linear_fc1: gate and up; linear_fc2: down)"
            )


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
        if config.soft_cache_length > config.soft_max_length:
            raise ValueError(
                f"soft_cache_length {config.soft_cache_length} is more than soft_max_length {config.soft_max_length}"
            )


def _check_grpo(config: Config) -> None:
    if config.num_generations < 2:
        raise ValueError("num_generations 1 gives every response advantage 0: use at least 2")
    if config.temperature == 0:
        raise ValueError("temperature 0 gives a prompt's responses no difference to learn from: use 1, say")
    if config.loss_type == "cispo" and config.epsilon_high < 1:
        raise ValueError(
            f"loss_type cispo caps the ratio at epsilon_high itself: {config.epsilon_high:g} would shrink every gradient; "
            "give --epsilon_high 5, say"
        )


def check_engines(config: Config, shape: ModelShape) -> None:
    """What every task with engines needs. Raises ValueError."""
    if config.truncation_strategy == "right":
        raise ValueError("truncation_strategy right would cut the question's end: use left or delete")
    if config.top_k == 0:
        raise ValueError("top_k 0 leaves no token: use -1 for all")
    if config.vllm_tensor_parallel_size > 1:
        raise ValueError("vllm_tensor_parallel_size above 1 is not supported yet: raise rollout.num_engines instead")
    limit = config.vllm_max_model_len
    if limit and shape.max_length and limit > shape.max_length:
        raise ValueError(f"vllm_max_model_len {limit} is more than the model's limit of {shape.max_length} tokens")


def _check_rollout(config: Config, shape: ModelShape) -> None:
    check_engines(config, shape)
    if config.vllm_mode == "server" and (config.offload_model or config.offload_optimizer):
        raise ValueError("offload_model and offload_optimizer are for vllm_mode colocate: in server mode no GPU is shared")
    limit = config.vllm_max_model_len or shape.max_length
    if limit and config.max_length and config.max_length >= limit:
        raise ValueError(
            f"a prompt of max_length {config.max_length} leaves an engine no room to answer: it holds {limit} tokens; lower "
            "max_length or raise vllm_max_model_len"
        )
    if limit and config.max_completion_length >= limit:
        name = "the model's limit" if limit == shape.max_length else "vllm_max_model_len"
        given = f"max_completion_length {config.max_completion_length}"
        raise ValueError(f"{given} leaves no room for a prompt: {name} is {limit} tokens")
    ranks, engines, each = policy_ranks(config), rollout_engines(config), config.vllm_tensor_parallel_size
    if config.vllm_mode == "colocate" and (engines == 0 or engines * each > ranks):
        raise ValueError(
            f"vllm_mode colocate has {ranks} policy ranks to share; "
            f"{max(engines, 1)} engines x vllm_tensor_parallel_size {each} need {max(engines, 1) * each}"
        )


def _check_loss(config: Config) -> None:
    known = LOSSES.get(config.task)
    if known is None:
        return
    if config.loss_type not in known:
        raise ValueError(f"loss_type {config.loss_type!r} of {config.task}: choose from {', '.join(known)}")
    if config.f_alpha_divergence_coef != 0.5 and config.f_divergence_type != "alpha_divergence":
        raise ValueError("f_alpha_divergence_coef needs --f_divergence_type alpha_divergence")
    if config.discopop_tau != 0.05 and config.loss_type != "discopop":
        raise ValueError("discopop_tau needs --loss_type discopop")
    if config.task in ("dpo", "kto") and not config.beta:
        raise ValueError(f"beta 0 would make {config.task} learn nothing: it scales the rewards; 0.1 is usual")
    if config.task == "kto" and config.loss_type == "kto" and config.global_batch_size < 2:
        raise ValueError("loss_type kto pairs each prompt with another row's response: global_batch_size must be 2 or more")


def _check_frozen(config: Config, name: str) -> None:
    """`name`: reference or teacher."""
    role = getattr(config, name)
    given = [option for option, value in vars(role).items() if value is not None]
    if frozen_group(config) != name:
        idle = given if name == "reference" else given[1:]  # that the teacher is the policy itself, its model says
        if idle:
            lora = f"with LoRA the policy itself is the {name}, its adapter disabled"
            why = lora if config.task == "gkd" or compares(config) else "the loss compares with no reference"
            raise ValueError(f"--{name}.{idle[0]} has nothing to act on: {why}")
        return
    if not given:
        return
    folder = Path(role.model).expanduser() if role.model else Path(config.model)
    tensor = role.tensor_model_parallel_size or config.tensor_model_parallel_size
    pipeline = role.pipeline_model_parallel_size or config.pipeline_model_parallel_size
    shape = read_shape(folder)
    check_layout(shape, tensor, pipeline, f"{name}.")
    ranks = role.nproc or policy_ranks(config)
    if ranks > policy_ranks(config):
        raise ValueError(f"{name}.nproc {ranks} is more than the {policy_ranks(config)} policy ranks whose places it shares")
    if ranks % (tensor * pipeline):
        raise ValueError(
            f"{name}: {ranks} ranks is no multiple of its TP {tensor} x PP {pipeline} = {tensor * pipeline}"
        )
    check_expert_sizes(config, shape, tensor=tensor, pipeline=pipeline, ranks=ranks, prefix=f"{name}: ")


def check_output(config: Config) -> None:
    """The run's folder can be written. Raises ValueError."""
    if config.run_name is not None and (
        Path(config.run_name).name != config.run_name or config.run_name in (".", "..")
    ):
        raise ValueError(f"run_name {config.run_name!r} is a folder's name, without slashes; its place is --output_dir")
    check_writable(Path(config.output_dir))
    resume = config.resume_from_checkpoint
    if resume not in (None, "auto") and not Path(resume).is_dir():
        raise ValueError(f"resume_from_checkpoint {resume}: no such folder")


def check_writable(folder: Path) -> None:
    """Whether output_dir, or the folder it will be made in, can be written. Raises ValueError."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"output_dir {folder}: {existing} is a file")
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be written: {existing}: {error.strerror}") from None


def _notes(config: Config, shape: ModelShape) -> list[str]:
    notes = expert_notes(config, shape)
    if (config.overlap_grad_reduce or config.overlap_param_gather) and data_ranks(config) == 1:
        notes.append("overlap_grad_reduce and overlap_param_gather have no effect: there is one data-parallel rank")
    if config.num_train_epochs is not None and config.train_iters is not None:
        notes.append(
            f"num_train_epochs {config.num_train_epochs} sets the length of the run; "
            f"train_iters {config.train_iters} is not used"
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
    if samples(config) and config.max_length and shape.max_length:
        longest, limit = config.max_length + config.max_completion_length, config.vllm_max_model_len or shape.max_length
        if longest > limit and config.max_length < shape.max_length:
            notes.append(
                f"max_length {config.max_length} + max_completion_length {config.max_completion_length} = {longest} "
                f"exceeds the {limit} tokens an engine holds: the longest prompts get shorter responses"
            )
    return notes
