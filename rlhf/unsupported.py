"""Options of ms-swift that are known and not supported: why, and the values that ask for nothing and are let pass.

`NAME=value,value` in a list: these values mean what is done anyway. Every other value, and every name without values,
is refused with the reason of its list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

_REASONS: dict[str, str] = {
    "this setting of mixture-of-experts models is not supported yet": """
        experts_impl moe_enable_deepep=false moe_router_load_balancing_type router_replay_mode=disabled""",
    "use --recompute_modules moe": "moe_layer_recompute=false",
    "mcore-bridge builds the experts of a rank as one grouped layer": "moe_grouped_gemm=true",
    "allgather takes sequences of one length only, flex needs DeepEP": "moe_token_dispatcher_type=alltoall",
    "multi-token prediction and architectures that need it are not supported yet": """
        mtp_num_layers=0 mtp_loss_scaling_factor=0.1 mtp_decoder_input_detach=false mtp_shared_weights=false
        engram_tokenizer_map dsa_indexer_loss_coeff=0 dsa_indexer_use_sparse_loss=false apply_dsa_kernel_fusion=false
        csa_dense_mode=false use_fused_mhc=false mhc_recompute_layer_num linear_decoupled_in_proj=false
        apply_wd_to_qk_layernorm=false""",
    "multimodal models are not supported yet": """
        freeze_llm=false freeze_vit=true,false freeze_aligner=true,false vit_gradient_checkpointing
        vit_gradient_checkpointing_kwargs vit_attn_impl vit_lr aligner_lr max_pixels norm_bbox language_model_only=false
        vllm_limit_mm_per_prompt vllm_mm_processor_cache_gb""",
    "context parallelism is not supported yet": """
        context_parallel_size=1 cp_comm_type cp_partition_mode=zigzag sequence_parallel_size=1
        sequence_packing_scheduler""",
    "interleaved pipelines are not supported yet; --decoder_first_pipeline_num_layers and _last_ make uneven ones": """
        virtual_pipeline_model_parallel_size=1 pipeline_model_parallel_layout microbatch_group_size_per_vp_stage
        account_for_embedding_in_pipeline_split=false account_for_loss_in_pipeline_split=false
        overlap_p2p_comm=true,false batch_p2p_comm align_param_gather=true,false""",
    "this overlapping of communication is not supported yet": """
        tp_comm_overlap=false overlap_param_gather_with_optimizer_step=false align_grad_reduce=true,false
        nccl_comm_warmup=false""",
    "Megatron-FSDP is not supported yet; use_distributed_optimizer splits the optimizer's state": """
        use_megatron_fsdp=false strict_fsdp_dtensor_load=true data_parallel_sharding_strategy""",
    "FP8, FP4 and quantized training are not supported yet": """
        fp8_format fp8_recipe=delayed fp8_param_gather=false fp8_amax_history_len fp8_amax_compute_algo fp4_format
        fp4_recipe fp4_param_gather=false quant_method quant_bits hqq_axis bnb_4bit_compute_dtype bnb_4bit_quant_storage
        bnb_4bit_quant_type bnb_4bit_use_double_quant""",
    "use --torch_dtype float32 or bfloat16": "fp16=false bf16",
    "gradients, master weights and moments are kept in float32": """
        use_precision_aware_optimizer=false main_grads_dtype=fp32 main_params_dtype=fp32 exp_avg_dtype=fp32
        exp_avg_sq_dtype=fp32 accumulate_allreduce_grads_in_fp32=true""",
    "this kind of offloading is not supported yet": """
        optimizer_cuda_graph=false offload_bridge=false move_model_batches""",
    "the optimizer is Adam": """
        optimizer=adam sgd_momentum muon_momentum muon_split_qkv muon_use_nesterov muon_scale_mode muon_fp32_matmul_prec
        muon_coefficient_type muon_num_ns_steps muon_tp_mode muon_extra_scale_factor muon_scalar_optimizer muon_lr
        muon_min_lr""",
    "the learning rate decays over the whole run and weight decay is constant": """
        lr_warmup_init=0 lr_decay_iters lr_wsd_decay_style lr_wsd_decay_iters weight_decay_incr_style=constant
        start_weight_decay end_weight_decay""",
    "rows are always packed without padding": """
        padding_free=true group_by_length=false padding_side mlp_padding_free=false""",
    "streaming datasets are not supported yet": """
        streaming=false shuffle_buffer_size interleave_prob stopping_strategy""",
    "this kind of evaluation is not supported yet": """
        cached_val_dataset val_dataset_shuffle=false num_generations_eval metric_for_best_model greater_is_better""",
    "this way of preparing the dataset is not supported yet": """
        cached_dataset lazy_tokenize=false packing_num_proc=1 packing_strategy download_mode=reuse_dataset_if_exists
        columns strict=false disable_auto_column_mapping=false model_name model_author custom_dataset_info
        decision_drop_instructions=0 decision_subsample_options=0 decision_state_as_text=0
        decision_shuffle_fields=false""",
    "all columns are kept, for the reward functions": "remove_unused_columns=false",
    "use --dataset_shuffle": "train_dataloader_shuffle",
    "a data process encodes all rows at the start; --dataset_num_proc sets its processes": """
        dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context data_sharding=false""",
    "this template setting is not supported yet": """
        agent_template response_prefix enable_thinking preserve_thinking add_non_thinking_prefix=true
        is_binary_loss_scale use_chat_template=true disable_ignore_empty_think=false""",
    "the model is taken as its folder says; edit its config.json or give another folder": """
        model_revision attn_impl device_map max_memory rope_scaling max_model_len new_special_tokens init_strategy
        local_repo_path model_kwargs check_model=true bridge_backend=mcore-bridge enable_npu_model_patch=true
        perform_initialization=false use_cpu_initialization=false data_parallel_random_init=false""",
    "only language modelling is supported yet": """
        task_type=causal_lm enable_dft_loss=false enable_channel_loss=false""",
    "give a Hugging Face folder as --model, or continue a run by --resume_from_checkpoint": """
        mcore_ref_model mcore_ref_adapter ref_adapters load_args=false load_data_args=false""",
    "`export --mcore_model CHECKPOINT --to_hf true` merges an adapter's checkpoint too": "mcore_adapter",
    "checkpoints are written as one folder a step, complete or not at all": """
        save_strategy=steps async_save=false max_shard_size=5GB save_missing_weights=false
        create_checkpoint_symlink=false
        use_persistent_ckpt_worker=false dist_ckpt_save_pre_mcore_014=false dist_ckpt_optim_fully_reshardable=true
        distrib_optim_fully_reshardable_mem_efficient=false""",
    "a run's folder is output_dir/run_name: use --run_name": """
        add_version=true tensorboard_dir tensorboard_queue_size wandb_exp_name swanlab_exp_name ray_exp_name""",
    "set WANDB_PROJECT in the environment": "wandb_project",
    "report_to knows tensorboard and wandb": "swanlab_project wandb_log_unique_prompts=false",
    "set HF_TOKEN or MODELSCOPE_API_TOKEN in the environment": "hub_token",
    "callbacks are not supported": "callbacks",
    "only the plain form of LoRA and full training are supported yet": """
        freeze_parameters freeze_parameters_regex freeze_parameters_ratio=0 trainable_parameters
        trainable_parameters_regex target_regex lora_bias=none lora_dtype use_rslora=false
        tuner_backend=peft use_swift_lora=false""",
    "the loss type says whether there is a KL term: use --loss_type kto or apo_zero_unpaired": "calculate_KL",
    "the teacher is one model that the run itself loads, of the architecture that its folder says": """
        teacher_model_type teacher_model_revision teacher_model_server teacher_tag_key""",
    "teachers are for rlhf_type gkd": "teacher_kl_coef=1",
    "loss types sapo, real and fipo are not supported yet": """
        tau_pos=1 tau_neg=1.05 real_tau=0.5 fipo_decay_rate fipo_clip_range fipo_clip_high_only
        fipo_safety_threshold""",
    "losses are averaged over the global batch": "calculate_per_token_loss",
    "this part of GRPO is not supported yet": """
        off_policy_sequence_mask_delta log_entropy=false top_entropy_quantile=1 log_rollout_offpolicy_metrics=false
        sync_ref_model=false ref_model_sync_steps ref_model_mixup_alpha structured_outputs_regex""",
    "generation and training do not overlap yet": "async_generate=false max_staleness=0",
    "a reward model's score is taken as it is; for anything else write a reward function": "reward_model_plugin",
    "conversations of several turns are not supported yet": """
        multi_turn_scheduler max_turns=1 completion_length_limit_scope=per_round use_gym_env=false gym_env
        vllm_server_pass_dataset=false""",
    "responses come from vLLM engines of the job's Ray cluster: its own, or those of `megaray rollout` (--rollout_name)": """
        use_vllm=true vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_server_group_port
        num_beams=1 logprobs top_logprobs""",
    "use --vllm.NAME VALUE": "vllm_engine_kwargs vllm_disable_cascade_attn=false",
    "adapters are merged before each push": "vllm_enable_lora=false",
    "colocated engines sleep at level 2": "sleep_level=2",
    "use --megatron.NAME VALUE": """
        megatron_extra_kwargs masked_softmax_fusion bias_dropout_fusion bias_activation_fusion apply_rope_fusion
        attention_softmax_in_fp32=true apply_query_key_layer_scaling cross_entropy_fusion_impl=native""",
    "Ray starts, places and connects the processes": """
        use_ray=true device_groups local_rank ddp_backend skip_megatron_init=false te_rng_tracker=false""",
    "use --call_timeout": "ddp_timeout",
    "not supported": "manual_gc=false manual_gc_steps=0 manual_gc_eval ignore_args_error=false",
    "use --external_plugins": "custom_register_path",
}

# What users of other programs, or of older ms-swift, type: the name that does it here.
ELSEWHERE: dict[str, str] = {
    "learning_rate": "lr", "per_device_train_batch_size": "micro_batch_size", "max_steps": "train_iters",
    "gradient_accumulation_steps": "global_batch_size", "max_epochs": "num_train_epochs", "train_type": "tuner_type",
    "warmup_ratio": "lr_warmup_fraction", "lr_scheduler_type": "lr_decay_style", "max_grad_norm": "clip_grad",
    "save": "output_dir", "save_interval": "save_steps", "log_interval": "logging_steps", "load": "model",
    "num_workers": "dataloader_num_workers", "kl_coef": "beta", "cliprange": "epsilon", "plugin": "external_plugins",
    "model_id_or_path": "model", "model_name_or_path": "model", "max_seq_length": "max_length", "dtype": "torch_dtype",
    "vllm_data_parallel_size": "rollout.num_engines",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Unsupported:
    """Why an option is refused, and which of its values are not."""

    reason: str
    harmless: tuple[Any, ...]


def _read_table() -> dict[str, Unsupported]:
    table = {}
    for reason, names in _REASONS.items():
        for entry in names.split():
            name, _, values = entry.partition("=")
            assert name not in table, name
            harmless = tuple(yaml.safe_load(value) for value in values.split(",")) if values else ()
            table[name] = Unsupported(reason=reason, harmless=harmless)
    return table


UNSUPPORTED: dict[str, Unsupported] = _read_table()
