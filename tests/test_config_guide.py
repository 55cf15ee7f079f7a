"""The published Megatron-SWIFT commands, word for word: `megatron` replaced by `megaray`, paths by files that exist."""

import shlex
from pathlib import Path

import pytest

from rlhf.counts import data_ranks
from rlhf.options import load_config
from tests.model_json import QWEN3_30B_A3B, QWEN25_7B, write_model

DENSE_SFT = """
    megatron sft
    --model Qwen/Qwen2.5-7B-Instruct
    --use_hf
    --save_safetensors true
    --dataset 'AI-ModelScope/alpaca-gpt4-data-zh#500'
              'AI-ModelScope/alpaca-gpt4-data-en#500'
    --tensor_model_parallel_size 2
    --sequence_parallel true
    --micro_batch_size 16
    --global_batch_size 16
    --recompute_granularity full
    --recompute_method uniform
    --recompute_num_layers 1
    --finetune true
    --cross_entropy_loss_fusion true
    --lr 1e-5
    --lr_warmup_fraction 0.05
    --min_lr 1e-6
    --num_train_epochs 1
    --output_dir megatron_output/Qwen2.5-7B-Instruct
    --save_steps 100
    --max_length 2048
    --dataloader_num_workers 4
    --no_save_optim true
    --no_save_rng true
    --dataset_num_proc 4
"""
LORA_SFT = (
    DENSE_SFT.replace("--lr 1e-5", "--lr 1e-4").replace("--min_lr 1e-6", "--min_lr 1e-5")
    + """
    --merge_lora false
    --tuner_type lora
    --lora_rank 8
    --lora_alpha 32
    --target_modules all-linear
"""
)
GRPO = """
    megatron rlhf
    --rlhf_type grpo
    --model Qwen/Qwen2.5-7B-Instruct
    --use_hf
    --save_safetensors true
    --dataset /path/to/grpo_data.jsonl
    --reward_funcs accuracy format
    --num_generations 8
    --max_completion_length 2048
    --tensor_model_parallel_size 2
    --sequence_parallel true
    --micro_batch_size 1
    --global_batch_size 8
    --recompute_granularity full
    --recompute_method uniform
    --recompute_num_layers 1
    --finetune true
    --cross_entropy_loss_fusion true
    --lr 5e-7
    --beta 0.04
    --num_train_epochs 1
    --output_dir megatron_output/grpo
    --no_save_optim true
    --no_save_rng true
"""
GRPO_SERVER = """
    megatron rlhf
    --rlhf_type grpo
    --model Qwen/Qwen2.5-7B-Instruct
    --use_hf
    --save_safetensors true
    --vllm_mode server
    --dataset /path/to/data.jsonl
    --reward_funcs accuracy format
    --num_generations 8
    --tensor_model_parallel_size 2
    --sequence_parallel true
    --micro_batch_size 1
    --global_batch_size 8
    --output_dir megatron_output/grpo
    --no_save_optim true
    --no_save_rng true
"""
MOE_LORA = """
    megatron sft
    --model Qwen/Qwen3-30B-A3B-Instruct-2507
    --use_hf
    --save_safetensors true
    --merge_lora false
    --tuner_type lora
    --lora_rank 8
    --lora_alpha 32
    --target_modules all-linear
    --dataset 'your_dataset#2000'
    --load_from_cache_file true
    --expert_model_parallel_size 2
    --moe_permute_fusion true
    --moe_grouped_gemm true
    --moe_shared_expert_overlap true
    --moe_aux_loss_coeff 1e-3
    --micro_batch_size 8
    --global_batch_size 16
    --recompute_granularity full
    --recompute_method uniform
    --recompute_num_layers 1
    --num_train_epochs 1
    --finetune true
    --cross_entropy_loss_fusion true
    --lr 1e-4
    --lr_warmup_fraction 0.05
    --min_lr 1e-5
    --output_dir megatron_output/Qwen3-30B-A3B
    --save_steps 200
    --max_length 2048
    --dataloader_num_workers 8
    --dataset_num_proc 8
    --no_save_optim true
    --no_save_rng true
    --sequence_parallel true
    --moe_expert_capacity_factor 2
    --attention_backend flash
"""
MULTIMODAL_SFT = """
    megatron sft
    --model Qwen/Qwen2.5-7B-Instruct
    --use_hf
    --save_safetensors true
    --dataset /path/to/data.jsonl
    --tensor_model_parallel_size 2
    --sequence_parallel true
    --packing true
    --freeze_llm false
    --freeze_vit true
    --freeze_aligner true
    --micro_batch_size 1
    --global_batch_size 4
    --recompute_granularity full
    --recompute_method uniform
    --recompute_num_layers 1
    --finetune true
    --num_train_epochs 1
    --max_length 2048
    --attention_backend flash
"""
TO_MCORE = """
    swift export
    --model Qwen/Qwen2.5-7B-Instruct
    --use_hf
    --to_mcore true
    --torch_dtype bfloat16
    --output_dir Qwen2.5-7B-Instruct-mcore
    --test_convert_precision true
"""
TO_HF = """
    swift export
    --mcore_model megatron_output/model/vx-xxx/checkpoint-xxx
    --to_hf true
    --torch_dtype bfloat16
    --output_dir megatron_output/model/vx-xxx/checkpoint-xxx-hf
    --test_convert_precision true
"""


@pytest.fixture
def read(monkeypatch, tmp_path):
    """Reads a command with NPROC_PER_NODE in its environment."""
    model = write_model(tmp_path / "model", QWEN25_7B)
    experts = write_model(tmp_path / "experts", QWEN3_30B_A3B)
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)

    def read(command: str, nproc: int):
        monkeypatch.setenv("NPROC_PER_NODE", str(nproc))
        words = shlex.split(command)[1:]
        for old, new in {
            "Qwen/Qwen2.5-7B-Instruct": model,
            "Qwen/Qwen3-30B-A3B-Instruct-2507": experts,
            "/path/to/grpo_data.jsonl": data,
            "/path/to/data.jsonl": data,
        }.items():
            words = [str(new) if word == old else word for word in words]
        return load_config(words)

    return read


def test_dense_sft(read):
    config = read(DENSE_SFT, 2)
    assert (config.lr, config.min_lr, config.lr_warmup_fraction, config.num_train_epochs) == (1e-5, 1e-6, 0.05, 1)
    assert (config.tensor_model_parallel_size, config.sequence_parallel, data_ranks(config)) == (2, True, 1)
    assert config.dataset == ["AI-ModelScope/alpaca-gpt4-data-zh#500", "AI-ModelScope/alpaca-gpt4-data-en#500"]
    assert (config.recompute_granularity, config.recompute_method, config.recompute_num_layers) == (
        "full",
        "uniform",
        1,
    )
    assert (config.no_save_optim, config.no_save_rng, config.use_hf, config.torch_dtype) == (
        True,
        True,
        True,
        "bfloat16",
    )
    assert (config.dataset_num_proc, config.dataloader_num_workers, config.save_steps) == (4, 4, 100)


def test_lora_sft(read):
    config = read(LORA_SFT, 2)
    assert (config.tuner_type, config.lora_rank, config.lora_alpha, config.merge_lora) == ("lora", 8, 32, False)
    assert (config.lr, config.min_lr, config.target_modules) == (1e-4, 1e-5, ["all-linear"])


def test_grpo(read):
    config = read(GRPO, 4)
    assert (config.vllm_mode, config.reward_funcs, config.beta, config.lr) == (
        "colocate",
        ["accuracy", "format"],
        0.04,
        5e-7,
    )
    assert (config.generation_batch_size // config.num_generations, data_ranks(config)) == (1, 2)
    assert (config.max_length, config.vllm_max_model_len) == (32768 - 2048, 32768)


def test_grpo_server_mode_lacks_a_length_and_then_works(read):
    with pytest.raises(ValueError, match="give --train_iters or --num_train_epochs: the run has no length"):
        read(GRPO_SERVER, 4)
    config = read(GRPO_SERVER + "--num_train_epochs 1", 4)
    assert (config.vllm_mode, config.max_completion_length, config.lr, config.beta) == ("server", 512, 1e-5, 0.04)


def test_the_multimodal_command_works_on_a_text_model(read):
    config = read(MULTIMODAL_SFT, 2)
    assert (config.packing, config.packing_length, config.micro_batch_tokens) == (True, 2048, None)


def test_moe_lora(read, capsys):
    config = read(MOE_LORA, 2)
    assert (config.expert_model_parallel_size, config.moe_aux_loss_coeff, config.moe_expert_capacity_factor) == (2, 1e-3, 2)
    assert (config.moe_permute_fusion, config.attention_backend, data_ranks(config)) == (True, "flash", 2)
    assert "note: moe_shared_expert_overlap has no effect: the model has no shared expert" in capsys.readouterr().err


def test_the_workflow_with_explicit_conversions(read, tmp_path):
    to_mcore = read(TO_MCORE, 1)
    assert (to_mcore.task, to_mcore.to_mcore, to_mcore.torch_dtype, to_mcore.nproc_per_node) == ("export", True, "bfloat16", 1)
    assert to_mcore.output_dir == f"{tmp_path}/Qwen2.5-7B-Instruct-mcore"
    checkpoint = tmp_path / "megatron_output" / "model" / "vx-xxx" / "checkpoint-xxx"
    (checkpoint / "mcore").mkdir(parents=True)
    for name in ("mcore/metadata.json", "tensors.json", "tokenizer.json"):
        (checkpoint / name).write_text("{}")
    write_model(checkpoint, QWEN25_7B)
    (checkpoint / "model.safetensors").unlink()
    to_hf = read(TO_HF, 1)
    assert (to_hf.to_hf, to_hf.mcore_model, to_hf.model) == (True, str(checkpoint), str(checkpoint))
    options = "--save_safetensors false --dataset /path/to/data.jsonl --train_iters 9"
    sft = read(f"megatron sft --mcore_model {checkpoint} {options}", 2)
    assert (sft.mcore_model, sft.model, sft.save_safetensors) == (str(checkpoint), str(checkpoint), False)
    assert (sft.max_length, sft.torch_dtype) == (32768, "bfloat16")


def test_shipped_yaml_files_are_complete_but_for_model_and_data(read):
    configs = Path(__file__).parent.parent / "configs"
    common = "--model Qwen/Qwen2.5-7B-Instruct --dataset /path/to/data.jsonl"
    grpo = read(f"megaray rlhf --config {configs}/grpo.yaml {common} --reward_funcs accuracy", 4)
    assert (grpo.global_batch_size, grpo.lr, grpo.rollout_importance_sampling_mode) == (128, 1e-6, "token_truncate")
    sft = read(f"megaray sft --config {configs}/sft.yaml {common}", 4)
    assert (sft.packing_length, sft.max_length, sft.lr) == (8192, 2048, 1e-5)
