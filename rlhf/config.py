"""The one typed configuration: every option, its type, default and one line of help.

Names and defaults are ms-swift's for Megatron; `own` marks what is ours beyond them. Each class is a group of `--help`.
Read from the command line by `rlhf/options.py`; defaults of None that depend on other options are filled in once by
`rlhf/resolution.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

TRAIN = ("sft", "rlhf")
RLHF = ("rlhf",)
SFT = ("sft",)
INFER = ("infer", "eval")  # answer with a model as it is
SAMPLES = (*RLHF, *INFER)
ENGINES = (*SAMPLES, "rollout")  # have vLLM engines
ALL = (*TRAIN, *INFER, "rollout")
DEFAULTS: dict[str, dict[str, Any]] = dict.fromkeys(  # of a task, where they are not those of training
    INFER, {"temperature": 0.0, "num_generations": 1, "max_completion_length": 2048, "dataset_shuffle": False}
)


def option(
    default: Any,
    text: str,
    *,
    tasks: tuple[str, ...] = TRAIN,
    own: bool = False,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> Any:
    """A dataclass field with its help, the tasks that use it and its bounds (least <= value <= most, above < value)."""
    metadata = {"help": text, "tasks": tasks, "own": own, "least": least, "above": above, "most": most}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


rlhf = partial(option, tasks=RLHF)
reads = partial(option, tasks=(*TRAIN, *INFER))  # of tasks that read conversations
samples = partial(option, tasks=SAMPLES)
scores = partial(option, tasks=("rlhf", "eval"))
engine = partial(option, tasks=ENGINES)
infer = partial(option, tasks=INFER)
own = partial(option, own=True)
own_rlhf = partial(option, tasks=RLHF, own=True)
own_scores = partial(scores, own=True)


@dataclass(frozen=True, kw_only=True)
class RolloutRole:
    """Rollout engines (rollout.NAME)"""

    num_engines: int | None = engine(
        None, "vLLM engines (default: colocate: ranks / vllm_tensor_parallel_size; otherwise 1)", own=True, least=1
    )


@dataclass(frozen=True, kw_only=True)
class FrozenRole:
    """Reference (reference.NAME)"""

    model: str | None = own_rlhf(None, "its model (default: the policy's)")
    tensor_model_parallel_size: int | None = own_rlhf(None, "its TP size (default: the policy's)", least=1)
    pipeline_model_parallel_size: int | None = own_rlhf(None, "its PP size (default: the policy's)", least=1)
    nproc: int | None = own_rlhf(None, "its ranks (default: the policy's)", least=1)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Model"""

    model: str | None = option(None, "model folder, or hub id", tasks=ALL)
    adapters: list[str] = infer([], "a LoRA checkpoint; its base model is taken unless --model is given")
    use_hf: bool = option(False, "take hub ids from Hugging Face (otherwise ModelScope)", tasks=ALL)
    model_type: str | None = reads(None, "ms-swift's name of the architecture (default: from config.json)")
    torch_dtype: Literal["float32", "bfloat16"] | None = option(
        None, "dtype of the weights (default: the model's own)", tasks=ALL
    )
    template: str | None = reads(None, "ms-swift's chat template (default: the model's own)")
    template_backend: Literal["swift", "jinja"] = reads("swift", "who renders the chat template")
    system: str | None = reads(None, "system prompt for conversations that have none")
    seed: int = option(42, "seed of weights, dropout and sampling", tasks=ALL)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Data"""

    dataset: list[str] = reads([], "files or hub ids, each with an optional #ROWS")
    val_dataset: list[str] = infer([], "the same as dataset")
    max_length: int | None = reads(
        None,
        "longest row, or prompt, in tokens (default: the model's limit; less max_completion_length where there are responses)",
        least=1,
    )
    truncation_strategy: Literal["delete", "left", "right"] | None = reads(
        None, "rows longer than max_length are dropped or cut (default: left for grpo, infer, eval; delete otherwise)"
    )
    loss_scale: str | None = option(
        None, "which tokens are trained: default, last_round, all, ... (default: default)", tasks=SFT
    )
    packing: bool = option(
        False, "put several rows into packs of packing_length tokens; batch sizes then count packs", tasks=SFT
    )
    packing_length: int | None = option(None, "tokens of one pack (default: max_length)", tasks=SFT, least=1)
    dataset_shuffle: bool = option(True, "shuffle the rows, by data_seed")
    data_seed: int = option(42, "seed of the order of the rows")
    dataset_num_proc: int = reads(1, "processes that read and map the dataset at the start", least=1)
    dataloader_num_workers: int = option(4, "above 0: the next batch is prepared while this one is used", least=0)
    load_from_cache_file: bool = reads(False, "reuse the dataset cache of an earlier run")


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """Parallelism and processes"""

    tensor_model_parallel_size: int = option(1, "TP: ranks that share each layer", least=1)
    pipeline_model_parallel_size: int = option(1, "PP: ranks that share the stack of layers", least=1)
    sequence_parallel: bool = option(False, "split activations along the sequence over the TP ranks (off when TP is 1)")
    use_distributed_optimizer: bool = option(True, "split the optimizer's state over the DP ranks")
    nnodes: int = own(1, "nodes with policy ranks", least=1)
    nproc_per_node: int | None = own(
        None, "policy ranks a node (default: $NPROC_PER_NODE, else all GPUs, on CPU TP*PP)", least=1
    )
    cpus_per_rank: float = own(1, "CPU cores reserved for a rank or engine without GPUs", tasks=ALL, above=0)
    call_timeout: float = own(1800, "seconds until an unanswered call ends the run", tasks=ALL, above=0)
    deterministic: bool = own(
        False, "fixed order of requests and seed of each: reruns are equal bit for bit", tasks=ALL
    )


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Batches and length of the run"""

    micro_batch_size: int = option(1, "sequences of one forward pass on one DP rank", least=1)
    global_batch_size: int = option(16, "responses (rlhf) or rows (sft) of one optimizer step, over all ranks", least=1)
    micro_batch_tokens: int | None = own(
        None, "token budget of a packed micro batch (default: micro_batch_size sequences instead)", least=1
    )
    train_iters: int | None = option(None, "optimizer steps", least=1)
    num_train_epochs: int | None = option(None, "passes over the dataset; wins over train_iters", least=1)


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """Memory and kernels"""

    recompute_granularity: Literal["selective", "full", "none"] = option(
        "selective", "activations recomputed in the backward pass"
    )
    recompute_method: Literal["uniform", "block"] | None = option(None, "which layers, for recompute_granularity full")
    recompute_num_layers: int | None = option(None, "layers of a unit, for recompute_granularity full", least=1)
    recompute_modules: list[str] = option(["core_attn"], "modules, for recompute_granularity selective")
    attention_backend: Literal["flash", "fused", "unfused", "auto"] = option(
        "flash", "attention kernel of Transformer Engine"
    )
    cross_entropy_loss_fusion: bool = option(True, "Megatron's fused vocab-parallel cross entropy")


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Optimizer"""

    lr: float | None = option(None, "learning rate (default: 1e-5, with lora 1e-4)", least=0)
    min_lr: float = option(0, "learning rate at the end of its decay", least=0)
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = option(
        "cosine", "shape of the decay"
    )
    lr_warmup_iters: int = option(0, "steps of linear warm-up", least=0)
    lr_warmup_fraction: float | None = option(None, "warm-up as a fraction of train_iters", least=0, most=1)
    weight_decay: float = option(0.1, "decoupled weight decay", least=0)
    clip_grad: float = option(1.0, "largest gradient norm (0: no clipping)", least=0)
    adam_beta1: float = option(0.9, "decay of Adam's first moment", least=0, most=1)
    adam_beta2: float = option(0.95, "decay of Adam's second moment", least=0, most=1)
    adam_eps: float = option(1e-8, "Adam's epsilon", above=0)


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """LoRA"""

    tuner_type: Literal["full", "lora"] = option("full", "train all weights, or low-rank adapters")
    lora_rank: int = option(8, "rank", least=1)
    lora_alpha: float = option(32.0, "scale, divided by the rank", above=0)
    lora_dropout: float = option(0.05, "dropout before the adapters", least=0, most=1)
    target_modules: list[str] = option(["all-linear"], "all-linear, or of linear_qkv linear_proj linear_fc1 linear_fc2")
    merge_lora: bool | None = option(None, "also save the merged model (default: save_safetensors)")


@dataclass(frozen=True, kw_only=True)
class GrpoOptions:
    """GRPO"""

    rlhf_type: Literal["dpo", "kto", "grpo", "gkd", "rm"] = rlhf("dpo", "the algorithm; grpo is supported")
    num_generations: int = scores(8, "responses a prompt", least=1)
    generation_batch_size: int | None = rlhf(
        None, "responses of one generation batch (default: global_batch_size * steps_per_generation)", least=1
    )
    steps_per_generation: int | None = rlhf(None, "steps that share a generation batch (default: 1)", least=1)
    num_iterations: int = rlhf(1, "passes over each generation batch", least=1)
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"] | None = rlhf(None, "loss (default: grpo)")
    beta: float | None = rlhf(None, "weight of the KL penalty; 0: no reference model (default: 0.04)", least=0)
    epsilon: float = rlhf(0.2, "lower clip of the ratio", least=0)
    epsilon_high: float | None = rlhf(None, "upper clip; for cispo the cap itself (default: epsilon)", least=0)
    delta: float | None = rlhf(None, "cap of the unclipped ratio (default: none)", above=0)
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] = rlhf("token", "what a ratio is of")
    advantage_estimator: Literal["grpo", "rloo", "reinforce_plus_plus"] = rlhf("grpo", "baseline of the advantages")
    scale_rewards: Literal["group", "batch", "none"] | None = rlhf(
        None, "what advantages are divided by (default: group; rloo: none; reinforce_plus_plus: batch)"
    )
    kl_in_reward: bool | None = rlhf(
        None, "KL in the reward, not the loss (default: false; rloo, reinforce_plus_plus: true)"
    )
    dynamic_sample: bool = rlhf(False, "replace groups whose rewards are all equal")
    max_resample_times: int = rlhf(3, "rounds of dynamic_sample", least=0)
    overlong_filter: bool = rlhf(False, "do not train on responses cut at max_completion_length")
    rollout_importance_sampling_mode: (
        Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None
    ) = rlhf(None, "corrects for the rollout engine's numerics (default: off)")
    rollout_importance_sampling_threshold: float = rlhf(2.0, "cap of the correction", above=0)


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """Rewards"""

    reward_funcs: list[str] = scores([], "accuracy format cosine repetition soft_overlong, or names of plug-ins")
    reward_weights: list[float] | None = scores(None, "one a function (default: 1 each)")
    external_plugins: list[str] = scores([], "Python files with reward functions")
    cosine_min_len_value_wrong: float = scores(-0.5, "cosine: wrong and empty")
    cosine_max_len_value_wrong: float = scores(0.0, "cosine: wrong and longest")
    cosine_min_len_value_correct: float = scores(1.0, "cosine: right and empty")
    cosine_max_len_value_correct: float = scores(0.5, "cosine: right and longest")
    cosine_max_len: int | None = scores(None, "cosine: the longest, in tokens (default: max_completion_length)", least=1)
    repetition_n_grams: int = scores(3, "repetition: words of an n-gram", least=1)
    repetition_max_penalty: float = scores(-1.0, "repetition: reward of nothing but repetition", most=0)
    soft_max_length: int | None = scores(
        None, "soft_overlong: longest unpunished, plus the cache (default: max_completion_length)", least=1
    )
    soft_cache_length: int | None = scores(
        None, "soft_overlong: tokens over which the punishment grows to -1 at soft_max_length", least=1
    )
    reward_workers: int = own_scores(2, "processes that run reward functions", least=1)
    reward_timeout: float = own_scores(30, "seconds for one response's score", above=0)
    reward_memory: float = own_scores(4, "GiB of address space of a reward process", above=0)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Sampling and vLLM"""

    max_completion_length: int = samples(512, "longest response, in tokens; also called max_new_tokens", least=1)
    temperature: float = samples(0.9, "of sampling, and of the logprobs in training (0, for infer and eval: greedy)", least=0)
    top_p: float = samples(1.0, "nucleus sampling", above=0, most=1)
    top_k: int = samples(-1, "sample from the k likeliest tokens (-1: all)", least=-1)
    repetition_penalty: float = samples(1.0, "of sampling", above=0)
    stop_words: list[str] = samples([], "strings that end a response")
    vllm_mode: Literal["colocate", "server"] = rlhf("colocate", "share the policy's devices, or have their own")
    rollout_name: str = option(
        "rollout", "of the engines that `megaray rollout` starts, and vllm_mode server uses", tasks=("rlhf", "rollout"), own=True
    )
    infer_backend: Literal["vllm"] = option("vllm", "who generates", tasks=(*INFER, "rollout"))
    stream: bool | None = option(None, "answers appear as they are generated (default: unless from a dataset)", tasks=("infer",))
    vllm_gpu_memory_utilization: float | None = engine(
        None, "share of a device's memory for an engine (default: 0.9; on a shared GPU what the policy leaves)", above=0, most=1
    )
    offload_model: bool | None = rlhf(
        None, "weights of policy and reference wait in host memory while engines generate on their GPUs (default: as needed)"
    )
    offload_optimizer: bool | None = rlhf(
        None, "the optimizer's state waits in host memory while engines use the policy's GPUs (default: as needed)"
    )
    vllm_tensor_parallel_size: int = engine(1, "devices of one engine", least=1)
    vllm_max_model_len: int | None = engine(
        None, "longest prompt + response, in tokens (default: the two limits together; else the model's)", least=1
    )
    vllm_max_num_seqs: int | None = engine(None, "responses an engine decodes at a time (default: vLLM's)", least=1)
    vllm_enforce_eager: bool = engine(False, "no CUDA graphs, no compilation")
    vllm_enable_prefix_caching: bool = engine(True, "share the KV cache of equal prompts")
    push_timeout: float = own_rlhf(120, "seconds for one push of weights to the engines", above=0)


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Checkpoints and logs"""

    output_dir: str | None = reads(None, "holds one folder a run (default: runs)")
    run_name: str | None = own(None, "folder under output_dir (default: task, model and time)", tasks=(*TRAIN, *INFER))
    result_path: str | None = infer(None, "infer: answers, .jsonl; eval: scores, .json (default: in the run's folder)")
    save_steps: int = option(500, "steps between checkpoints", least=1)
    save_total_limit: int | None = option(None, "checkpoints kept (default: all)", least=1)
    save_safetensors: bool = option(True, "a Hugging Face folder in each checkpoint")
    no_save_optim: bool = option(False, "checkpoints without optimizer state: smaller, cannot be resumed")
    no_save_rng: bool = option(False, "checkpoints without random-number state")
    finetune: bool = option(True, "start at step 0 with a new optimizer; resume_from_checkpoint overrides it")
    resume_from_checkpoint: str | None = option(None, "auto (the last complete one), or a checkpoint folder")
    logging_steps: int = option(5, "steps between lines on the screen", least=1)
    report_to: list[Literal["tensorboard", "wandb", "none"]] = option(
        ["tensorboard"], "tensorboard, wandb or none, beside metrics.jsonl and report.html"
    )
    log_completions: bool = rlhf(False, "write every response to completions.jsonl")


@dataclass(frozen=True, kw_only=True)
class Config(
    OutputOptions, SamplingOptions, RewardOptions, GrpoOptions, LoraOptions, OptimizerOptions, MemoryOptions,
    BatchOptions, ParallelOptions, DataOptions, ModelOptions,
):  # fmt: skip
    """Pass-through"""

    task: Literal["sft", "rlhf", "infer", "eval", "rollout"] = field(default="rlhf", metadata={"positional": True})
    rollout: RolloutRole = field(default_factory=RolloutRole)
    reference: FrozenRole = field(default_factory=FrozenRole)
    megatron: dict[str, Any] = own({}, "--megatron.NAME VALUE goes to Megatron's TransformerConfig as it is")
    vllm: dict[str, Any] = engine({}, "--vllm.NAME VALUE goes to vLLM's engine arguments as it is", own=True)
