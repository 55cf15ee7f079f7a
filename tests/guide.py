"""The commands of the Megatron-SWIFT training guide, word for word, and what a machine of two cores changes in them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

DENSE_SFT = r"""
PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \
NPROC_PER_NODE=2 \
CUDA_VISIBLE_DEVICES=0,1 \
megatron sft \
    --model Qwen/Qwen2.5-7B-Instruct \
    --use_hf \
    --save_safetensors true \
    --dataset 'AI-ModelScope/alpaca-gpt4-data-zh#500' \
              'AI-ModelScope/alpaca-gpt4-data-en#500' \
    --tensor_model_parallel_size 2 \
    --sequence_parallel true \
    --micro_batch_size 16 \
    --global_batch_size 16 \
    --recompute_granularity full \
    --recompute_method uniform \
    --recompute_num_layers 1 \
    --finetune true \
    --cross_entropy_loss_fusion true \
    --lr 1e-5 \
    --lr_warmup_fraction 0.05 \
    --min_lr 1e-6 \
    --num_train_epochs 1 \
    --output_dir megatron_output/Qwen2.5-7B-Instruct \
    --save_steps 100 \
    --max_length 2048 \
    --dataloader_num_workers 4 \
    --no_save_optim true \
    --no_save_rng true \
    --dataset_num_proc 4
"""
LORA_SFT = r"""
PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \
NPROC_PER_NODE=2 \
CUDA_VISIBLE_DEVICES=0,1 \
megatron sft \
    --model Qwen/Qwen2.5-7B-Instruct \
    --use_hf \
    --save_safetensors true \
    --merge_lora false \
    --tuner_type lora \
    --lora_rank 8 \
    --lora_alpha 32 \
    --target_modules all-linear \
    --dataset 'AI-ModelScope/alpaca-gpt4-data-zh#500' \
              'AI-ModelScope/alpaca-gpt4-data-en#500' \
    --tensor_model_parallel_size 2 \
    --sequence_parallel true \
    --micro_batch_size 16 \
    --global_batch_size 16 \
    --recompute_granularity full \
    --recompute_method uniform \
    --recompute_num_layers 1 \
    --finetune true \
    --cross_entropy_loss_fusion true \
    --lr 1e-4 \
    --lr_warmup_fraction 0.05 \
    --min_lr 1e-5 \
    --num_train_epochs 1 \
    --output_dir megatron_output/Qwen2.5-7B-Instruct \
    --save_steps 100 \
    --max_length 2048 \
    --dataloader_num_workers 4 \
    --no_save_optim true \
    --no_save_rng true \
    --dataset_num_proc 4
"""
MOE_SFT = r"""
PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \
CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 \
NPROC_PER_NODE=8 \
megatron sft \
    --model Qwen/Qwen3-30B-A3B-Instruct-2507 \
    --use_hf \
    --save_safetensors true \
    --dataset 'your_dataset#20000' \
    --load_from_cache_file true \
    --moe_permute_fusion true \
    --pipeline_model_parallel_size 2 \
    --decoder_first_pipeline_num_layers 25 \
    --tensor_model_parallel_size 4 \
    --expert_model_parallel_size 4 \
    --moe_grouped_gemm true \
    --moe_shared_expert_overlap true \
    --moe_aux_loss_coeff 1e-6 \
    --micro_batch_size 1 \
    --global_batch_size 4 \
    --recompute_granularity full \
    --recompute_method uniform \
    --recompute_num_layers 1 \
    --num_train_epochs 1 \
    --finetune true \
    --cross_entropy_loss_fusion true \
    --lr 1e-5 \
    --lr_warmup_fraction 0.05 \
    --min_lr 1e-6 \
    --output_dir megatron_output/Qwen3-30B-A3B \
    --save_steps 500 \
    --max_length 8192 \
    --packing true \
    --dataloader_num_workers 8 \
    --dataset_num_proc 8 \
    --no_save_optim true \
    --no_save_rng true \
    --sequence_parallel true \
    --moe_expert_capacity_factor 2 \
    --attention_backend flash
"""
MOE_LORA = r"""
PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \
NPROC_PER_NODE=2 \
CUDA_VISIBLE_DEVICES=0,1 \
megatron sft \
    --model Qwen/Qwen3-30B-A3B-Instruct-2507 \
    --use_hf \
    --save_safetensors true \
    --merge_lora false \
    --tuner_type lora \
    --lora_rank 8 \
    --lora_alpha 32 \
    --target_modules all-linear \
    --dataset 'your_dataset#2000' \
    --load_from_cache_file true \
    --expert_model_parallel_size 2 \
    --moe_permute_fusion true \
    --moe_grouped_gemm true \
    --moe_shared_expert_overlap true \
    --moe_aux_loss_coeff 1e-3 \
    --micro_batch_size 8 \
    --global_batch_size 16 \
    --recompute_granularity full \
    --recompute_method uniform \
    --recompute_num_layers 1 \
    --num_train_epochs 1 \
    --finetune true \
    --cross_entropy_loss_fusion true \
    --lr 1e-4 \
    --lr_warmup_fraction 0.05 \
    --min_lr 1e-5 \
    --output_dir megatron_output/Qwen3-30B-A3B \
    --save_steps 200 \
    --max_length 2048 \
    --dataloader_num_workers 8 \
    --dataset_num_proc 8 \
    --no_save_optim true \
    --no_save_rng true \
    --sequence_parallel true \
    --moe_expert_capacity_factor 2 \
    --attention_backend flash
"""
MULTIMODAL_SFT = r"""
PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \
NPROC_PER_NODE=2 \
IMAGE_MAX_TOKEN_NUM=1024 \
VIDEO_MAX_TOKEN_NUM=128 \
FPS_MAX_FRAMES=16 \
CUDA_VISIBLE_DEVICES=0,1 \
megatron sft \
    --model Qwen/Qwen3-VL-8B-Instruct \
    --use_hf \
    --save_safetensors true \
    --dataset /path/to/multimodal_data.jsonl \
    --tensor_model_parallel_size 2 \
    --sequence_parallel true \
    --packing true \
    --freeze_llm false \
    --freeze_vit true \
    --freeze_aligner true \
    --micro_batch_size 1 \
    --global_batch_size 4 \
    --recompute_granularity full \
    --recompute_method uniform \
    --recompute_num_layers 1 \
    --finetune true \
    --cross_entropy_loss_fusion true \
    --lr 1e-5 \
    --lr_warmup_fraction 0.05 \
    --min_lr 1e-6 \
    --num_train_epochs 1 \
    --output_dir megatron_output/Qwen3-VL-8B \
    --save_steps 200 \
    --max_length 2048 \
    --dataloader_num_workers 4 \
    --no_save_optim true \
    --no_save_rng true \
    --dataset_num_proc 8
"""
PRETRAINING = r"""
NPROC_PER_NODE=8 \
megatron pt \
    --model Qwen/Qwen2.5-7B \
    --use_hf \
    --save_safetensors true \
    --dataset /path/to/pretrain_data.jsonl \
    --tensor_model_parallel_size 2 \
    --sequence_parallel true \
    --micro_batch_size 4 \
    --global_batch_size 32 \
    --recompute_granularity selective \
    --finetune true \
    --cross_entropy_loss_fusion true \
    --lr 1e-5 \
    --num_train_epochs 1 \
    --max_length 4096 \
    --packing true \
    --output_dir megatron_output/pretrain \
    --no_save_optim true \
    --no_save_rng true
"""
GRPO = r"""
PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \
NPROC_PER_NODE=4 \
CUDA_VISIBLE_DEVICES=0,1,2,3 \
megatron rlhf \
    --rlhf_type grpo \
    --model Qwen/Qwen2.5-7B-Instruct \
    --use_hf \
    --save_safetensors true \
    --dataset /path/to/grpo_data.jsonl \
    --reward_funcs accuracy format \
    --num_generations 8 \
    --max_completion_length 2048 \
    --tensor_model_parallel_size 2 \
    --sequence_parallel true \
    --micro_batch_size 1 \
    --global_batch_size 8 \
    --recompute_granularity full \
    --recompute_method uniform \
    --recompute_num_layers 1 \
    --finetune true \
    --cross_entropy_loss_fusion true \
    --lr 5e-7 \
    --beta 0.04 \
    --num_train_epochs 1 \
    --output_dir megatron_output/grpo \
    --no_save_optim true \
    --no_save_rng true
"""
ROLLOUT = r"""
CUDA_VISIBLE_DEVICES=4,5,6,7 \
swift rollout \
    --model Qwen/Qwen2.5-7B-Instruct \
    --use_hf \
    --infer_backend vllm \
    --vllm_tensor_parallel_size 4
"""
GRPO_SERVER = r"""
NPROC_PER_NODE=4 \
CUDA_VISIBLE_DEVICES=0,1,2,3 \
megatron rlhf \
    --rlhf_type grpo \
    --model Qwen/Qwen2.5-7B-Instruct \
    --use_hf \
    --save_safetensors true \
    --vllm_mode server \
    --dataset /path/to/data.jsonl \
    --reward_funcs accuracy format \
    --num_generations 8 \
    --tensor_model_parallel_size 2 \
    --sequence_parallel true \
    --micro_batch_size 1 \
    --global_batch_size 8 \
    --output_dir megatron_output/grpo \
    --no_save_optim true \
    --no_save_rng true
"""
DPO = r"""
NPROC_PER_NODE=2 \
CUDA_VISIBLE_DEVICES=0,1 \
megatron rlhf \
    --rlhf_type dpo \
    --model Qwen/Qwen2.5-7B-Instruct \
    --use_hf \
    --save_safetensors true \
    --dataset /path/to/dpo_data.jsonl \
    --beta 0.1 \
    --tensor_model_parallel_size 2 \
    --sequence_parallel true \
    --micro_batch_size 4 \
    --global_batch_size 16 \
    --recompute_granularity full \
    --recompute_method uniform \
    --recompute_num_layers 1 \
    --finetune true \
    --cross_entropy_loss_fusion true \
    --lr 1e-5 \
    --num_train_epochs 1 \
    --output_dir megatron_output/dpo \
    --no_save_optim true \
    --no_save_rng true
"""
GKD = r"""
NPROC_PER_NODE=2 \
CUDA_VISIBLE_DEVICES=0,1 \
megatron rlhf \
    --rlhf_type gkd \
    --model Qwen/Qwen2.5-7B-Instruct \
    --teacher_model Qwen/Qwen2.5-72B-Instruct \
    --use_hf \
    --save_safetensors true \
    --dataset /path/to/sft_data.jsonl \
    --beta 0.5 \
    --lmbda 0.5 \
    --temperature 0.9 \
    --max_completion_length 512 \
    --tensor_model_parallel_size 2 \
    --sequence_parallel true \
    --micro_batch_size 4 \
    --global_batch_size 16 \
    --finetune true \
    --cross_entropy_loss_fusion true \
    --lr 1e-5 \
    --num_train_epochs 1 \
    --output_dir megatron_output/gkd \
    --no_save_optim true \
    --no_save_rng true
"""
INFER_FULL = r"""
CUDA_VISIBLE_DEVICES=0 \
swift infer \
    --model megatron_output/model-name/vx-xxx/checkpoint-xxx \
    --stream true \
    --temperature 0 \
    --max_new_tokens 2048
"""
INFER_LORA = r"""
CUDA_VISIBLE_DEVICES=0 \
swift infer \
    --adapters megatron_output/model-name/vx-xxx/checkpoint-xxx \
    --stream true \
    --temperature 0 \
    --max_new_tokens 2048
"""
TO_MCORE = r"""
CUDA_VISIBLE_DEVICES=0 \
swift export \
    --model Qwen/Qwen2.5-7B-Instruct \
    --use_hf \
    --to_mcore true \
    --torch_dtype bfloat16 \
    --output_dir Qwen2.5-7B-Instruct-mcore \
    --test_convert_precision true
"""
SFT_FROM_MCORE = r"""
megatron sft \
    --mcore_model Qwen2.5-7B-Instruct-mcore \
    --save_safetensors false \
    ...
"""
TO_HF = r"""
CUDA_VISIBLE_DEVICES=0 \
swift export \
    --mcore_model megatron_output/model/vx-xxx/checkpoint-xxx \
    --to_hf true \
    --torch_dtype bfloat16 \
    --output_dir megatron_output/model/vx-xxx/checkpoint-xxx-hf \
    --test_convert_precision true
"""


def parts(command: str) -> tuple[dict[str, str], str, dict[str, list[str]]]:
    """Variables in front of a command, its task (the word after the program), and its options with their words."""
    words = shlex.split(command.replace("\\\n", " "))
    variables: dict[str, str] = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    program, task, *rest = words
    assert program in ("megatron", "swift"), program
    options: dict[str, list[str]] = {}
    for word in rest:
        if word.startswith("--"):
            options[word[2:]] = values = []
        else:
            values.append(word)
    return variables, task, options


def here(command: str, *, without: Sequence[str] = (), added: dict[str, Any] | None = None, **changed: Any) -> str:
    """The command as it is typed on this machine: `megaray` for its program, and other values of the options `changed`.

    `changed` in capitals are variables in front of it. `without` are left out. All of these must stand in the guide's command,
    and those that are `added` must not: what is not named here is as it is written there.
    """
    variables, task, options = parts(command)
    for name, value in changed.items():
        owner = variables if name.isupper() else options
        assert name in owner, f"the guide's command has no {name}"
        owner[name] = value
    for name in without:
        del options[name]
    assert not set(options) & set(added or {}), "the guide's command has that option: change it"
    words = [f"{name}={shlex.quote(str(value))}" for name, value in variables.items()] + ["megaray", task]
    for name, value in (options | (added or {})).items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(shlex.quote(str(item)) for item in values)]
    return " ".join(words)
