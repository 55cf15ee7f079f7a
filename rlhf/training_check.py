"""What can be wrong with how a policy is trained: its optimizer, what is computed again in the backward pass, its adapter."""

from __future__ import annotations

from rlhf.config import LINEAR_LAYERS, Config
from rlhf.heads import head_of
from rlhf.model_folder import ModelShape
from rlhf.pipeline import policy_pipeline

LORA_MODULES = ("all-linear", *LINEAR_LAYERS)
WHOLE_MODULES = ("word_embeddings", "output_layer")
RECOMPUTE_MODULES = ("core_attn", "layernorm", "mlp")
EXPERT_RECOMPUTE_MODULES = ("core_attn", "layernorm", "moe")


def check_training(config: Config, shape: ModelShape) -> None:
    """Check a resolved config. Raises ValueError."""
    _check_optimizer(config)
    _check_recompute(config, shape)
    _check_lora(config, shape)


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
    if not config.finetune and config.resume_from_checkpoint is None:
        raise ValueError("--finetune false continues a run: say which, by --resume_from_checkpoint auto or a checkpoint folder")


def _check_recompute(config: Config, shape: ModelShape) -> None:
    if config.recompute_granularity == "full":
        if config.recompute_method is None or config.recompute_num_layers is None:
            raise ValueError("recompute_granularity full also needs --recompute_method uniform and --recompute_num_layers 1")
        stages, unit = policy_pipeline(config).stages(shape.num_layers), config.recompute_num_layers
        if unit > max(stages):
            raise ValueError(f"recompute_num_layers {unit} is more than the {max(stages)} layers of a rank")
        uneven = [layers for layers in stages if layers % unit]
        if config.recompute_method == "uniform" and uneven:
            raise ValueError(
                f"recompute_num_layers {unit} does not divide the {uneven[0]} layers of a rank, as recompute_method uniform needs"
            )
        return
    choices = EXPERT_RECOMPUTE_MODULES if shape.experts else RECOMPUTE_MODULES
    for name in config.recompute_modules:
        if name not in choices:
            raise ValueError(f"recompute_modules {name!r}: choose from {', '.join(choices)}")


def _check_lora(config: Config, shape: ModelShape) -> None:
    if config.tuner_type != "lora":
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
