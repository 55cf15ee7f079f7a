"""How the guide's commands are read, word for word but for models and data; test_guide_commands.py runs them."""

from pathlib import Path

import pytest

from rlhf.counts import data_ranks, expert_copies, policy_ranks
from rlhf.options import load_config
from rlhf.pipeline import policy_pipeline
from tests import guide
from tests.model_json import QWEN3_30B_A3B, QWEN25_7B, write_model


@pytest.fixture
def read(monkeypatch, tmp_path):
    """Reads a command of the guide, with `more` words behind it, or words alone; the variables in front are set."""
    model = write_model(tmp_path / "model", QWEN25_7B)
    experts = write_model(tmp_path / "experts", QWEN3_30B_A3B)
    (tmp_path / "data.jsonl").write_text("{}\n")
    found = {"Qwen/Qwen2.5-7B-Instruct": model, "Qwen/Qwen3-30B-A3B-Instruct-2507": experts, "Qwen/Qwen3-VL-8B-Instruct": model}
    monkeypatch.chdir(tmp_path)
    for name in ("NPROC_PER_NODE", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)

    def read(command: str, more: str = ""):
        variables, task, options = guide.parts(command)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        words = [task]
        for name, values in options.items():
            words += [f"--{name}", *("data.jsonl" if word.endswith(".jsonl") else str(found.get(word, word)) for word in values)]
        return load_config([*words, *more.split()])

    return read


def test_dense_sft(read):
    config = read(guide.DENSE_SFT)
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
    config = read(guide.LORA_SFT)
    assert (config.tuner_type, config.lora_rank, config.lora_alpha, config.merge_lora) == ("lora", 8, 32, False)
    assert (config.lr, config.min_lr, config.target_modules) == (1e-4, 1e-5, ["all-linear"])


def test_grpo(read):
    config = read(guide.GRPO)
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
        read(guide.GRPO_SERVER)
    config = read(guide.GRPO_SERVER, "--num_train_epochs 1")
    assert (config.vllm_mode, config.max_completion_length, config.lr, config.beta) == ("server", 512, 1e-5, 0.04)


def test_the_multimodal_command_works_on_a_text_model(read):
    config = read(guide.MULTIMODAL_SFT)
    assert (config.packing, config.packing_length, config.micro_batch_tokens) == (True, 2048, None)


def test_moe_sft(read):
    """8 ranks of one copy: 4 tensor ranks, between which the experts of a stage are split, in stages of 25 and 23 layers."""
    config = read(guide.MOE_SFT)
    assert (policy_ranks(config), data_ranks(config), expert_copies(config)) == (8, 1, 1)
    assert policy_pipeline(config).stages(48) == [25, 23]
    assert (config.packing, config.packing_length, config.recompute_granularity) == (True, 8192, "full")


def test_moe_lora(read, capsys):
    config = read(guide.MOE_LORA)
    assert (config.expert_model_parallel_size, config.moe_aux_loss_coeff, config.moe_expert_capacity_factor) == (2, 1e-3, 2)
    assert (config.moe_permute_fusion, config.attention_backend, data_ranks(config)) == (True, "flash", 2)
    assert "note: moe_shared_expert_overlap has no effect: the model has no shared expert" in capsys.readouterr().err


def test_the_workflow_with_explicit_conversions(read, tmp_path):
    to_mcore = read(guide.TO_MCORE)
    assert (to_mcore.task, to_mcore.to_mcore, to_mcore.torch_dtype, to_mcore.nproc_per_node) == ("export", True, "bfloat16", 1)
    assert to_mcore.output_dir == f"{tmp_path}/Qwen2.5-7B-Instruct-mcore"
    checkpoint = tmp_path / "megatron_output" / "model" / "vx-xxx" / "checkpoint-xxx"
    (checkpoint / "mcore").mkdir(parents=True)
    for name in ("mcore/metadata.json", "tensors.json", "tokenizer.json"):
        (checkpoint / name).write_text("{}")
    write_model(checkpoint, QWEN25_7B)
    (checkpoint / "model.safetensors").unlink()
    to_hf = read(guide.TO_HF)
    assert (to_hf.to_hf, to_hf.mcore_model, to_hf.model) == (True, str(checkpoint), str(checkpoint))
    options = "--save_safetensors false --dataset /path/to/data.jsonl --train_iters 9"
    sft = read(f"NPROC_PER_NODE=2 megatron sft --mcore_model {checkpoint} {options}")
    assert (sft.mcore_model, sft.model, sft.save_safetensors) == (str(checkpoint), str(checkpoint), False)
    assert (sft.max_length, sft.torch_dtype) == (32768, "bfloat16")


def test_shipped_yaml_files_are_complete_but_for_model_and_data(read):
    configs = Path(__file__).parent.parent / "configs"
    common = "--model Qwen/Qwen2.5-7B-Instruct --dataset /path/to/data.jsonl"
    grpo = read(f"NPROC_PER_NODE=4 megatron rlhf --config {configs}/grpo.yaml {common} --reward_funcs accuracy")
    assert (grpo.global_batch_size, grpo.lr, grpo.rollout_importance_sampling_mode) == (128, 1e-6, "token_truncate")
    sft = read(f"NPROC_PER_NODE=4 megatron sft --config {configs}/sft.yaml {common}")
    assert (sft.packing_length, sft.max_length, sft.lr) == (8192, 2048, 1e-5)
