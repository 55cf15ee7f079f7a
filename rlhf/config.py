"""The one typed configuration: every option, its type, default and one line of help.

Names and defaults are ms-swift's for Megatron; `own` marks what is ours beyond them. Each class is a group of `--help`.
Read from the command line by `rlhf/options.py`; defaults of None that depend on other options are filled in once by
`rlhf/resolution.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

from rlhf.preference_losses import DPO_LOSS_TYPES, KTO_LOSS_TYPES, FDivergence

GRPO = ("grpo",)
SCORED = ("grpo", "eval")  # tasks with rewards
SAMPLED = ("grpo", "gkd")  # tasks that train on responses of rollout engines
TEXTS = ("pt", "sft", "dpo", "kto", "gkd")  # tasks whose dataset says which tokens are trained
REFERRED = ("grpo", "dpo", "kto")  # tasks with a reference
PAIRED = ("dpo", "rm")  # tasks whose rows are two answers to one question
RERANKERS = ("reranker", "generative_reranker")  # tasks that score documents for a query
HEADED = ("rm", "seq_cls", *RERANKERS, "embedding")  # tasks on what the model says at a sequence's last token
ROWS = ("pt", "sft", "dpo", "kto", "gkd", *HEADED)  # tasks that train on the dataset's rows
INFER = ("infer", "eval")  # tasks that answer with a model as it is
EXPORT = ("export",)
ANSWERING = (*SAMPLED, *INFER)  # tasks with responses
ENGINES = (*ANSWERING, "rollout")  # tasks with rollout engines
TrainingTask = Literal["pt", "sft", "dpo", "kto", "rm", "gkd", "grpo", "seq_cls", "reranker", "generative_reranker", "embedding"]
Task = Literal[TrainingTask, "infer", "eval", "rollout", "export"]
ALL: tuple[TrainingTask, ...] = get_args(TrainingTask)  # tasks that train
EVERY: tuple[Task, ...] = get_args(Task)
READING = (*ALL, *INFER)  # tasks with a dataset
RUNNING = (*READING, "rollout")  # all but conversions
DEFAULTS: dict[str, dict[str, Any]] = dict.fromkeys(  # of a task, where they are not those of training
    INFER, {"temperature": 0.0, "num_generations": 1, "max_completion_length": 2048, "dataset_shuffle": False}
)

GRPO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
EMBEDDING_LOSSES = ("infonce", "cosine_similarity", "contrastive", "online_contrastive")
RERANKER_LOSSES = ("pointwise_reranker", "listwise_reranker")
LOSSES = {  # of each task that has a choice, the default first
    "grpo": GRPO_LOSSES,
    "dpo": DPO_LOSS_TYPES,
    "kto": KTO_LOSS_TYPES,
    "embedding": EMBEDDING_LOSSES,
    "reranker": RERANKER_LOSSES,
    "generative_reranker": RERANKER_LOSSES,
}
LINEAR_LAYERS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")  # Megatron's names, of what may have an adapter


def option(
    default: Any,
    text: str,
    *,
    tasks: tuple[str, ...] = ALL,
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


rows = partial(option, tasks=ROWS)
grpo = partial(option, tasks=GRPO)
sampled = partial(option, tasks=SAMPLED)
dpo = partial(option, tasks=("dpo",))
kto = partial(option, tasks=("kto",))
seq_cls = partial(option, tasks=("seq_cls",))
gkd = partial(option, tasks=("gkd",))
reads = partial(option, tasks=READING)
answers = partial(option, tasks=ANSWERING)
engine = partial(option, tasks=ENGINES)
scores = partial(option, tasks=SCORED)
infer = partial(option, tasks=INFER)
own = partial(option, own=True)
own_sampled = partial(option, tasks=SAMPLED, own=True)
own_referred = partial(option, tasks=REFERRED, own=True)
own_gkd = partial(option, tasks=("gkd",), own=True)
export = partial(option, tasks=EXPORT)
common = partial(option, tasks=(*ALL, *EXPORT))
own_common = partial(common, own=True)
own_scores = partial(scores, own=True)


def reads_prompts(config: Any) -> bool:
    """Whether rows are read as prompts: some of their answers are sampled."""
    return config.task in ("grpo", *INFER) or config.task == "gkd" and (config.lmbda > 0 or config.seq_kd)


def streams(config: Any) -> bool:
    """Whether infer shows answers as they are generated."""
    return not (config.dataset or config.val_dataset) if config.stream is None else config.stream


def reads_answers(config: Any) -> bool:
    """Whether the answers in the rows are trained on."""
    return config.task not in ("grpo", *INFER) and not (config.task == "gkd" and (config.lmbda == 1 or config.seq_kd))


@dataclass(frozen=True, kw_only=True)
class RolloutRole:
    """Rollout engines (rollout.NAME)"""

    num_engines: int | None = engine(
        None,
        "vLLM engines (default: colocate: ranks / vllm_tensor_parallel_size x engines_per_device; otherwise 1)",
        own=True,
        least=1,
    )
    engines_per_device: int = own_sampled(
        1, "colocate: engines that share each of the policy's devices, which one of a small model leaves idle", least=1
    )


@dataclass(frozen=True, kw_only=True)
class FrozenRole:
    """Reference (reference.NAME)"""

    model: str | None = own_referred(None, "its model (default: the policy's)")
    tensor_model_parallel_size: int | None = own_referred(None, "its TP size (default: the policy's)", least=1)
    pipeline_model_parallel_size: int | None = own_referred(None, "its PP size (default: the policy's)", least=1)
    nproc: int | None = own_referred(None, "its ranks (default: the policy's)", least=1)


@dataclass(frozen=True, kw_only=True)
class TeacherRole(FrozenRole):
    """Teacher (teacher.NAME)"""

    model: str | None = own_gkd(None, "its model; --teacher_model is the same option")
    backend: Literal["megatron", "vllm"] | None = own_gkd(
        None, "what gives its logits: Megatron ranks, or vLLM engines on devices of their own (default: megatron)"
    )
    tensor_model_parallel_size: int | None = own_gkd(None, "its TP size (default: the policy's)", least=1)
    pipeline_model_parallel_size: int | None = own_gkd(None, "its PP size (default: the policy's)", least=1)
    own_devices: bool | None = own_gkd(None, "devices of its own, not the policy's by turns (default: of backend vllm alone)")
    nproc: int | None = own_gkd(
        None, "its ranks, or devices of its engines (default: the policy's; of its own devices those of one copy)", least=1
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Model"""

    model: str | None = option(None, "model folder, or hub id", tasks=EVERY)
    mcore_model: str | None = common(None, "folder with a Megatron checkpoint of the model, instead of model")
    adapters: list[str] = option(
        [],
        "infer, eval: a LoRA checkpoint, whose base is taken unless model is given; export: an adapter for merge_lora",
        tasks=(*INFER, *EXPORT),
    )
    use_hf: bool = option(False, "take hub ids from Hugging Face (otherwise ModelScope)", tasks=EVERY)
    model_type: str | None = reads(None, "ms-swift's name of the architecture (default: from config.json)")
    torch_dtype: Literal["float32", "bfloat16"] | None = option(
        None, "dtype of the weights (default: the model's own)", tasks=EVERY
    )
    template: str | None = reads(None, "ms-swift's chat template (default: the model's own)")
    template_backend: Literal["swift", "jinja"] = reads("swift", "who renders the chat template")
    system: str | None = reads(None, "system prompt for conversations that have none")
    seed: int = option(42, "seed of weights, dropout and sampling", tasks=RUNNING)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Data"""

    dataset: list[str] = reads([], "files or hub ids, each with an optional #ROWS")
    max_length: int | None = reads(
        None,
        "longest row, or prompt, in tokens (default: the model's limit, or a pack; with engines: less max_completion_length)",
        least=1,
    )
    truncation_strategy: Literal["delete", "left", "right"] | None = reads(
        None, "rows longer than max_length are dropped or cut (default: left for grpo, infer, eval; delete otherwise)"
    )
    loss_scale: str | None = option(
        None,
        "which tokens are trained: default, last_round, all, ... (default: sft: default; pt: all; else last_round)",
        tasks=TEXTS,
    )
    packing: bool = option(
        False,
        "put rows into packs of packing_length tokens, once; batch sizes then count packs (where responses are sampled: "
        "micro_batch_tokens is packing_length x micro_batch_size, and batch sizes count responses)",
    )
    packing_length: int | None = option(
        None, "tokens of one pack; a longer row is one alone (default: max_length, with responses: of both)", least=1
    )
    val_dataset: list[str] = option(
        [], "files or hub ids to evaluate on, every eval_steps; infer, eval: the same as dataset", tasks=(*ROWS, *INFER)
    )
    split_dataset_ratio: float = rows(0.0, "share of the rows kept from training, to evaluate on", least=0, most=0.9)
    dataset_shuffle: bool = option(True, "shuffle the rows, by data_seed")
    data_seed: int = option(42, "seed of the order of the rows")
    dataset_num_proc: int = reads(1, "processes that read and map the dataset at the start", least=1)
    dataloader_num_workers: int = option(4, "above 0: the next batch is prepared while this one is used", least=0)
    load_from_cache_file: bool = reads(False, "reuse the dataset cache of an earlier run")


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """Parallelism and processes"""

    tensor_model_parallel_size: int = common(1, "TP: ranks that share each layer", least=1)
    pipeline_model_parallel_size: int = common(1, "PP: ranks that share the stack of layers", least=1)
    decoder_first_pipeline_num_layers: int | None = common(
        None, "layers of the first stage; those that are not named share the rest evenly (default: as the others)", least=1
    )
    decoder_last_pipeline_num_layers: int | None = common(None, "layers of the last stage (default: as the others)", least=1)
    sequence_parallel: bool = option(False, "split activations along the sequence over the TP ranks (off when TP is 1)")
    expert_model_parallel_size: int = option(1, "EP: ranks that share the experts of each layer", least=1)
    expert_tensor_parallel_size: int = option(1, "ranks that share each expert", least=1)
    use_distributed_optimizer: bool = option(True, "split the optimizer's state over the DP ranks")
    overlap_grad_reduce: bool = option(False, "sum gradients over the DP ranks during the backward pass")
    overlap_param_gather: bool = option(False, "gather updated weights from the DP ranks during the forward pass")
    nnodes: int = own(1, "nodes with policy ranks", least=1)
    nproc_per_node: int | None = own(
        None, "policy ranks a node (default: $NPROC_PER_NODE, else all GPUs, on CPU those of one model)", least=1
    )
    cpus_per_rank: float = own(1, "CPU cores reserved for a rank or engine without GPUs", tasks=EVERY, above=0)
    call_timeout: float = own(1800, "seconds until an unanswered call ends the run", tasks=EVERY, above=0)
    deterministic: bool = own(False, "fixed order of requests and seed of each: reruns are equal bit for bit", tasks=RUNNING)


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Batches and length of the run"""

    micro_batch_size: int = option(
        1, "responses or rows (a pair, a query with its documents, is one) of one forward pass on one DP rank", least=1
    )
    global_batch_size: int = option(16, "responses (grpo), pairs (dpo, rm) or rows of an optimizer step, on all ranks", least=1)
    micro_batch_tokens: int | None = own(
        None, "token budget of a packed micro batch (default: micro_batch_size sequences instead)", least=1
    )
    train_iters: int | None = option(None, "optimizer steps", least=1)
    num_train_epochs: int | None = option(None, "passes over the dataset; wins over train_iters", least=1)
    eval_steps: int | None = rows(None, "steps between evaluations (default: save_steps)", least=1)
    eval_iters: int = rows(-1, "global batches of an evaluation (-1: all rows)", least=-1)


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """Memory and kernels"""

    recompute_granularity: Literal["selective", "full", "none"] = option(
        "selective", "activations recomputed in the backward pass"
    )
    recompute_method: Literal["uniform", "block"] | None = option(None, "which layers, for recompute_granularity full")
    recompute_num_layers: int | None = option(None, "layers of a unit, for recompute_granularity full", least=1)
    recompute_modules: list[str] = option(["core_attn"], "modules, for recompute_granularity selective")
    attention_backend: Literal["flash", "fused", "unfused", "auto"] | None = option(
        None, "attention kernel of Transformer Engine (default: flash; without GPUs torch's)"
    )
    cross_entropy_loss_fusion: bool = option(True, "Megatron's fused vocab-parallel cross entropy")
    gradient_accumulation_fusion: bool | None = option(
        None, "add weight gradients inside the matrix products (default: on GPUs where apex is installed)"
    )
    optimizer_cpu_offload: bool = option(False, "keep and update the optimizer's state in host memory; needs GPUs")
    optimizer_offload_fraction: float = option(1.0, "of the state that optimizer_cpu_offload moves", above=0, most=1)


@dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """Mixture of experts"""

    moe_aux_loss_coeff: float = option(0.0, "weight of the load-balancing loss", least=0)
    moe_z_loss_coeff: float | None = option(None, "weight of the loss on the size of router logits (default: none)", least=0)
    moe_expert_capacity_factor: float | None = option(
        None, "most tokens of an expert, of an even share; further ones pass by it (default: no limit)", above=0
    )
    moe_pad_expert_input_to_capacity: bool = option(False, "pad each expert's tokens to moe_expert_capacity_factor")
    moe_token_drop_policy: Literal["probs", "position"] = option("probs", "which tokens pass by a full expert")
    moe_router_dtype: Literal["none", "fp32", "fp64"] = option("fp32", "dtype of routing (none: the model's)")
    moe_permute_fusion: bool = option(False, "sort tokens by expert in one kernel; needs GPUs")
    moe_shared_expert_overlap: bool = option(False, "run the shared expert while tokens travel; needs GPUs")


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Optimizer"""

    lr: float | None = option(None, "learning rate (default: 1e-5, with lora 1e-4)", least=0)
    min_lr: float = option(0, "learning rate at the end of its decay", least=0)
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = option("cosine", "shape of the decay")
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
    target_modules: list[str] = option(["all-linear"], f"all-linear, or of {' '.join(LINEAR_LAYERS)}")
    modules_to_save: list[str] = option([], "trained and saved whole, beside the adapters: word_embeddings output_layer")
    merge_lora: bool | None = common(
        None, "also save the merged model (default: save_safetensors); export: write the model with adapters added in"
    )


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions:
    """Preferences, and what they share with GRPO"""

    loss_type: str | None = option(
        None,
        "; ".join(f"{task}: {' '.join(losses)}" for task, losses in LOSSES.items()) + " (default: the first)",
        tasks=tuple(LOSSES),
    )
    beta: float | None = option(
        None,
        "grpo: weight of the KL penalty, 0: no reference model; dpo, kto: how near the policy stays to the reference"
        "; gkd: 0 is KL(teacher || student), 1 KL(student || teacher) (default: grpo 0.04, gkd 0.5, else 0.1)",
        tasks=(*REFERRED, "gkd"),
        least=0,
    )
    label_smoothing: float = dpo(0.0, "share of pairs whose preference is wrong", least=0, most=0.5)
    reference_free: bool = dpo(False, "no reference model: its logprobs count as 0")
    rpo_alpha: float | None = dpo(None, "weight of the chosen response's cross entropy beside the loss", least=0)
    ld_alpha: float | None = dpo(None, "weight of the tokens beyond the shorter response of a pair (default: 1)", least=0, most=1)
    f_divergence_type: FDivergence = dpo("reverse_kl", "divergence from the reference")
    f_alpha_divergence_coef: float = dpo(0.5, "alpha of alpha_divergence, as TRL's: near 1 reverse_kl, at 0 forward_kl")
    discopop_tau: float = dpo(0.05, "temperature of loss_type discopop", above=0)
    desirable_weight: float = kto(1.0, "weight of desirable responses", least=0)
    undesirable_weight: float = kto(1.0, "weight of undesirable responses", least=0)


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Scores and classes"""

    num_labels: int | None = seq_cls(
        None, "classes, or numbers of a regression (default: those of the model's own head)", least=1
    )
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = seq_cls(
        None, "what labels are (default: the model's own; else with 1 label regression, with more single_label_classification)"
    )
    mrl_dims: dict[int, float] | None = option(
        None,
        'weights of losses on embeddings cut to so many numbers, {"64": 1, "256": 0.5} (default: on whole ones alone)',
        tasks=("embedding",),
    )
    center_rewards_coefficient: float | None = option(
        None, "weight of the squared sum of a pair's scores, which keeps them around 0 (default: none)", tasks=("rm",), least=0
    )


@dataclass(frozen=True, kw_only=True)
class GkdOptions:
    """Distillation"""

    lmbda: float = gkd(0.5, "share of steps on the policy's own responses; 0: none, no engines", least=0, most=1)
    seq_kd: bool = gkd(False, "the other steps take the teacher's responses, sampled once a prompt, not the dataset's")
    sft_alpha: float = gkd(0.0, "weight of the cross entropy beside the divergence, on those other steps", least=0)
    offload_teacher_model: bool = gkd(False, "the teacher's weights wait in host memory but while it gives its logits")
    gkd_logits_topk: int | None = gkd(None, "compare over the teacher's likeliest tokens only (default: over all)", least=1)


@dataclass(frozen=True, kw_only=True)
class GrpoOptions:
    """GRPO"""

    num_generations: int = scores(8, "responses a prompt", least=1)
    generation_batch_size: int | None = grpo(
        None, "responses of one generation batch (default: global_batch_size * steps_per_generation)", least=1
    )
    steps_per_generation: int | None = grpo(None, "steps that share a generation batch (default: 1)", least=1)
    num_iterations: int = grpo(1, "passes over each generation batch", least=1)
    epsilon: float = grpo(0.2, "lower clip of the ratio", least=0)
    epsilon_high: float | None = grpo(None, "upper clip; for cispo the cap itself (default: epsilon)", least=0)
    delta: float | None = grpo(None, "cap of the unclipped ratio (default: none)", above=0)
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] = grpo("token", "what a ratio is of")
    advantage_estimator: Literal["grpo", "rloo", "reinforce_plus_plus"] = grpo("grpo", "baseline of the advantages")
    scale_rewards: Literal["group", "batch", "none"] | None = grpo(
        None, "what advantages are divided by (default: group; rloo: none; reinforce_plus_plus: batch)"
    )
    kl_in_reward: bool | None = grpo(None, "KL in the reward, not the loss (default: false; rloo, reinforce_plus_plus: true)")
    dynamic_sample: bool = grpo(False, "replace groups whose rewards are all equal")
    max_resample_times: int = grpo(3, "rounds of dynamic_sample", least=0)
    overlong_filter: bool = grpo(False, "do not train on responses cut at max_completion_length")
    rollout_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None = grpo(
        None, "corrects for the rollout engine's numerics (default: off)"
    )
    rollout_importance_sampling_threshold: float = grpo(2.0, "cap of the correction", above=0)


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """Rewards"""

    reward_funcs: list[str] = scores([], "accuracy format cosine repetition soft_overlong, or names of plug-ins")
    reward_model: str | None = grpo(None, "folder, or hub id, of a model with one label: its score is a reward, the last one")
    reward_weights: list[float] | None = scores(None, "one a function, then the reward model's (default: 1 each)")
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

    max_completion_length: int = answers(512, "longest response, in tokens; also called max_new_tokens", least=1)
    temperature: float = answers(0.9, "of sampling, and of the distributions in training (infer, eval: 0 is greedy)", least=0)
    top_p: float = answers(1.0, "nucleus sampling", above=0, most=1)
    top_k: int = answers(-1, "sample from the k likeliest tokens (-1: all)", least=-1)
    repetition_penalty: float = answers(1.0, "of sampling", above=0)
    stop_words: list[str] = answers([], "strings that end a response")
    vllm_mode: Literal["colocate", "server"] = sampled("colocate", "share the policy's devices, or have their own")
    rollout_name: str = option(
        "rollout",
        "of the engines that `megaray rollout` starts, and vllm_mode server uses",
        tasks=(*SAMPLED, "rollout"),
        own=True,
    )
    infer_backend: Literal["vllm"] = option("vllm", "who generates", tasks=(*INFER, "rollout"))
    stream: bool | None = option(None, "answers appear as they are generated (default: unless from a dataset)", tasks=("infer",))
    vllm_gpu_memory_utilization: float | None = engine(
        None, "share of a device's memory for its engines (default: 0.9; on a shared GPU what the policy leaves)", above=0, most=1
    )
    offload_model: bool | None = sampled(
        None, "weights wait in host memory while engines generate on their GPUs, a frozen model's too (default: as needed)"
    )
    offload_optimizer: bool | None = sampled(
        None, "the optimizer's state waits in host memory while engines use the policy's GPUs (default: as needed)"
    )
    vllm_tensor_parallel_size: int = engine(1, "devices of one engine, all of one node", least=1)
    vllm_max_model_len: int | None = engine(
        None, "longest prompt + response, in tokens (default: the two limits together; else the model's)", least=1
    )
    vllm_max_num_seqs: int | None = engine(
        None, "responses an engine decodes at a time (default: its share of a generation batch, 256 to 1024)", least=1
    )
    vllm_enforce_eager: bool = engine(False, "no CUDA graphs, no compilation")
    vllm_enable_prefix_caching: bool = engine(True, "share the KV cache of equal prompts")
    push_timeout: float = own_sampled(120, "seconds for one push of weights to the engines", above=0)


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Checkpoints and logs"""

    output_dir: str | None = option(
        None,
        "holds one folder a run (default: runs); export: what is written (default: the source's name-mcore, -hf, -merged)",
        tasks=(*READING, *EXPORT),
    )
    run_name: str | None = own(None, "folder under output_dir (default: task, model and time)", tasks=READING)
    result_path: str | None = infer(None, "infer: answers, .jsonl; eval: scores, .json (default: in the run's folder)")
    save_steps: int = option(500, "steps between checkpoints", least=1)
    save_total_limit: int | None = option(None, "checkpoints kept (default: all)", least=1)
    save_safetensors: bool = option(True, "a Hugging Face folder in each checkpoint (without: for mcore_model)")
    no_save_optim: bool = option(False, "checkpoints without optimizer state: smaller, cannot be resumed")
    no_save_rng: bool = option(False, "checkpoints without random-number state")
    no_load_optim: bool = option(False, "continue with a new optimizer and learning-rate schedule")
    no_load_rng: bool = option(False, "continue with the seed's random numbers")
    finetune: bool = option(True, "start at step 0 with a new optimizer; resume_from_checkpoint overrides it")
    resume_from_checkpoint: str | None = option(None, "auto (the last complete one), or a checkpoint folder")
    logging_steps: int = option(5, "steps between lines on the screen", least=1)
    report_to: list[Literal["tensorboard", "wandb", "none"]] = option(
        ["tensorboard"], "tensorboard, wandb or none, beside metrics.jsonl and report.html"
    )
    log_completions: bool = sampled(False, "write every response to completions.jsonl")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Conversions"""

    to_mcore: bool = export(False, "write model as a Megatron checkpoint")
    to_hf: bool = export(False, "write mcore_model as a Hugging Face folder, an adapter added into its base")
    test_convert_precision: bool = export(
        False, "compare logits of source and result; exit status 1 when their mean difference is above 1e-4 (bfloat16: 0.1)"
    )
    test_convert_dtype: Literal["float32", "bfloat16"] = export("float32", "what the compared logits are computed in")
    exist_ok: bool = export(False, "write into an output_dir that is not empty; its weights are replaced")


@dataclass(frozen=True, kw_only=True)
class Config(
    ExportOptions, OutputOptions, SamplingOptions, RewardOptions, GrpoOptions, GkdOptions, HeadOptions, PreferenceOptions,
    LoraOptions, OptimizerOptions, ExpertOptions, MemoryOptions, BatchOptions, ParallelOptions, DataOptions, ModelOptions,
):  # fmt: skip
    """Pass-through"""

    task: Task = field(default="grpo", metadata={"positional": True})
    environment: dict[str, str] = field(default_factory=dict)  # ms-swift's variables that the task reads, see rlhf/variables.py
    rollout: RolloutRole = field(default_factory=RolloutRole)
    reference: FrozenRole = field(default_factory=FrozenRole)
    teacher: TeacherRole = field(default_factory=TeacherRole)
    megatron: dict[str, Any] = own_common({}, "--megatron.NAME VALUE goes to Megatron's TransformerConfig as it is")
    vllm: dict[str, Any] = engine({}, "--vllm.NAME VALUE goes to vLLM's engine arguments as it is", own=True)
