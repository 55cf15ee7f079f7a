"""Options of mixture-of-experts models, of memory and of overlapping: what is refused, and what is counted."""

# ruff: noqa: E501 - whole messages

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import rlhf.run
from rlhf.config import Config
from rlhf.devices import Devices
from rlhf.memory import policy_memory
from rlhf.model_folder import read_shape
from rlhf.options import load_config
from rlhf.phases import offloaded
from rlhf.plan import plan, render
from rlhf.resolution import resolve
from rlhf.run import refuse_what_cannot_fit
from tests.model_json import QWEN3_30B_A3B, TINY, write_model

CPU = Devices(gpus=0, gpu_name="", memory=24 * 2**30, cores=2)
SHARED = QWEN3_30B_A3B | {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "shared_expert_intermediate_size": 4096,
}
MATRIX = 151936 * 2048
ATTENTION = 2048 * (4096 + 2 * 512) + 4096 * 2048  # qkv and output
EXPERT = 3 * 2048 * 768
REST = 2 * 2048 + 2 * 128 + 128 * 2048  # norms, query and key norm, router


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("NPROC_PER_NODE", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, values in {"dense": TINY, "moe": QWEN3_30B_A3B, "shared": SHARED}.items():
        write_model(tmp_path / name, values)
    (tmp_path / "d.jsonl").write_text("{}\n")
    return tmp_path


def read(model: str, words: str) -> Config:
    return load_config(f"sft --model {model} --dataset d.jsonl --train_iters 4 {words}".split())


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("dense", "--expert_model_parallel_size 2", "expert_model_parallel_size 2 has nothing to act on: qwen3 is no mixture-of-experts model"),
        ("dense", "--moe_aux_loss_coeff 1e-3", "moe_aux_loss_coeff 0.001 has nothing to act on: qwen3 is no mixture-of-experts model"),
        ("dense", "--recompute_modules moe", "recompute_modules 'moe': choose from core_attn, layernorm, mlp"),
        ("moe", "--recompute_modules mlp", "recompute_modules 'mlp': choose from core_attn, layernorm, moe"),
        ("moe", "--expert_model_parallel_size 3 --nproc_per_node 3 --global_batch_size 3", "expert_model_parallel_size 3 does not divide the model's 128 experts"),
        ("moe", "--expert_model_parallel_size 4 --nproc_per_node 6 --global_batch_size 6", "6 ranks is no multiple of expert_model_parallel_size 4 x expert_tensor_parallel_size 1 x pipeline_model_parallel_size 1 = 4"),
        ("moe", "--tensor_model_parallel_size 2 --expert_model_parallel_size 2", "tensor_model_parallel_size 2 of a model with experts needs --sequence_parallel true"),
        ("moe", "--tensor_model_parallel_size 2 --sequence_parallel true", "with expert_model_parallel_size 1 every tensor rank needs its part of each expert, and Megatron would not add up gradients otherwise: give --expert_tensor_parallel_size 2, or a greater expert_model_parallel_size"),
        ("moe", "--expert_model_parallel_size 2 --expert_tensor_parallel_size 2 --tuner_type lora", "expert_tensor_parallel_size 2: adapters of experts cannot be split; raise expert_model_parallel_size instead"),
        ("moe", "--expert_model_parallel_size 2 --expert_tensor_parallel_size 5 --nproc_per_node 10 --global_batch_size 10", "expert_tensor_parallel_size 5 does not divide the model's moe_intermediate_size 768"),
        ("moe", "--moe_pad_expert_input_to_capacity true --moe_expert_capacity_factor 2 --expert_model_parallel_size 2", "moe_pad_expert_input_to_capacity needs micro batches of equal length on the ranks that share experts, and rows are never padded here: leave it out, or set expert_model_parallel_size to 1"),
        ("moe", "--moe_pad_expert_input_to_capacity true", "moe_pad_expert_input_to_capacity needs --moe_expert_capacity_factor"),
        ("moe", "--moe_token_drop_policy position", "moe_token_drop_policy position needs --moe_expert_capacity_factor"),
        ("moe", "--moe_grouped_gemm false", "option --moe_grouped_gemm is known but not supported (only true is): mcore-bridge builds the experts of a rank as one grouped layer"),
        ("moe", "--moe_token_dispatcher_type allgather", "option --moe_token_dispatcher_type is known but not supported (only alltoall is): allgather takes sequences of one length only, flex needs DeepEP"),
        ("dense", "--overlap_param_gather true", "overlap_param_gather needs --overlap_grad_reduce true and --use_distributed_optimizer true"),
        ("dense", "--optimizer_cpu_offload true --use_distributed_optimizer false", "optimizer_cpu_offload needs --use_distributed_optimizer true"),
        ("dense", "--optimizer_offload_fraction 0.5", "--optimizer_offload_fraction has no effect without optimizer_cpu_offload: leave it out, or give --optimizer_cpu_offload true"),
        ("dense", "--modules_to_save output_layer", "--modules_to_save has no effect without LoRA, where all weights are trained: leave it out, or give --tuner_type lora"),
        ("dense", "--tuner_type lora --modules_to_save lm_head", "modules_to_save 'lm_head': choose from word_embeddings, output_layer"),
        ("dense", "--megatron.moe_aux_loss_coeff 1", "megatron.moe_aux_loss_coeff is set by the run itself: use the option of its own, if there is one"),
    ],
)  # fmt: skip
def test_what_is_refused(folder, model, words, message):
    with pytest.raises(ValueError) as caught:
        read(model, words)
    assert str(caught.value) == message


def test_the_optimizer_moves_in_one_way(folder):
    words = "--reward_funcs accuracy --vllm_max_model_len 64 --optimizer_cpu_offload true --offload_optimizer true"
    with pytest.raises(ValueError, match="give --optimizer_cpu_offload or --offload_optimizer, not both"):
        load_config(f"rlhf --rlhf_type grpo --model dense --dataset d.jsonl --train_iters 4 {words}".split())


@pytest.mark.parametrize("task", ["rm", "embedding"])
def test_a_model_without_output_matrix_may_train_its_embedding_whole(folder, task):
    """Of a model whose embedding was its output layer too: the head takes the place of the latter."""
    write_model(folder / "dense", TINY | {"tie_word_embeddings": True})
    command = "rlhf --rlhf_type rm" if task == "rm" else "sft --task_type embedding --loss_type infonce"
    words = f"{command} --model dense --dataset d.jsonl --train_iters 4 --tuner_type lora --modules_to_save"
    assert load_config([*words.split(), "word_embeddings"]).modules_to_save == ["word_embeddings"]
    with pytest.raises(
        ValueError, match=f"modules_to_save output_layer: a model for {task} has none, its head is always trained"
    ):
        load_config([*words.split(), "output_layer"])


def test_models_that_are_refused(folder):
    write_model(folder / "moe", QWEN3_30B_A3B | {"mlp_only_layers": [0]})
    with pytest.raises(
        ValueError, match=r"layers without experts \(mlp_only_layers, decoder_sparse_step\) are not supported yet"
    ):
        read("moe", "")
    write_model(folder / "dense", TINY | {"tie_word_embeddings": True})
    with pytest.raises(ValueError, match="modules_to_save output_layer: the model's input and output embeddings are one matrix"):
        read("dense", "--tuner_type lora --modules_to_save output_layer")


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("moe", "--moe_permute_fusion true", "moe_permute_fusion true needs GPUs, there are none: it is a CUDA kernel of Transformer Engine's"),
        ("moe", "--attention_backend flash", "attention_backend flash needs GPUs, there are none: FlashAttention is a CUDA kernel"),
        ("shared", "--moe_shared_expert_overlap true", "moe_shared_expert_overlap true needs GPUs, there are none: it runs the shared expert on a CUDA stream"),
        ("dense", "--optimizer_cpu_offload true", "optimizer_cpu_offload true needs GPUs, there are none: without GPUs the optimizer's state is in host memory"),
        ("dense", "--gradient_accumulation_fusion true", "gradient_accumulation_fusion true needs GPUs, there are none: it is a CUDA kernel of apex's"),
        ("dense", "--attention_backend flash", None),
        ("dense", "--gradient_accumulation_fusion false", None),
    ],
)  # fmt: skip
def test_what_needs_gpus_is_refused_without_before_ray_starts(folder, monkeypatch, model, words, message):
    monkeypatch.setattr(rlhf.run, "find_devices", lambda: CPU)
    config = read(model, words)
    refused = plan(config, dataset_rows=None, devices=CPU).refusal
    if message is None:
        refuse_what_cannot_fit(config)
        assert refused is None
        return
    with pytest.raises(ValueError) as caught:
        refuse_what_cannot_fit(config)
    assert str(caught.value).startswith(message)
    assert refused == str(caught.value)


def test_a_rank_for_each_part_of_the_experts_without_gpus(folder, monkeypatch):
    monkeypatch.setattr("rlhf.options.find_devices", lambda: CPU)
    assert read("moe", "--expert_model_parallel_size 4").nproc_per_node == 4
    both = "--tensor_model_parallel_size 2 --sequence_parallel true --expert_model_parallel_size 2"
    assert read("moe", f"{both} --pipeline_model_parallel_size 2").nproc_per_node == 4


@pytest.mark.parametrize(("name", "shared"), [("Qwen3Moe", {}), ("Qwen2Moe", {"shared_expert_intermediate_size": 96})])
def test_parameter_count_is_hugging_faces(tmp_path, name, shared):
    import torch
    import transformers

    sizes = {
        "hidden_size": 64, "intermediate_size": 144, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3,
        "vocab_size": 500, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**(sizes | shared))
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    config.architectures = [f"{name}ForCausalLM"]
    config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert shape.exact
    assert shape.num_parameters() == model.num_parameters()


def test_memory_of_split_experts(folder):
    """Qwen3-30B-A3B on 8 ranks, TP 2 x DP 4: experts over 4 ranks, two copies of each."""
    shape = read_shape(folder / "moe")
    layer = ATTENTION + REST + 128 * EXPERT
    assert shape.num_parameters() == 2 * MATRIX + 48 * layer + 2048 == 30_532_122_624
    base = Config(task="sft", model=str(folder / "moe"), dataset=["d"], train_iters=1, nproc_per_node=8, max_length=1024)
    options = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 4}
    config = resolve(replace(base, **options), shape)
    memory = policy_memory(config, shape)
    rest = MATRIX + 48 * (ATTENTION // 2 + REST) + 2048
    experts = 48 * 32 * EXPERT
    assert (memory.weights, memory.gradients) == (2 * (rest + experts), 4 * (rest + experts))
    assert memory.optimizer == 12 * rest // 4 + 12 * experts // 2
    # a token keeps, in bfloat16: the layer's norms, attention and 8 experts' copies, halved over TP; one copy of the logits' columns
    attention = 3 * (4096 + 512) + 512 + 4096
    values = 2 * 2048 + attention // 2 + 8 * (2 * 2048 + 3 * 768) // 2
    assert memory.activations == 1024 * (48 * values * 2 + 151936 // 2 * 14)
    assert "experts over 4 ranks, each over 1: 2 copies of each" in render(config, plan(config, dataset_rows=1, devices=CPU))
    adapters = policy_memory(replace(config, tuner_type="lora"), shape)
    each = 8 * (2048 + (4096 + 1024) // 2) + 8 * (4096 // 2 + 2048) + 32 * 8 * (2048 + 2 * 768 + 768 + 2048)
    assert adapters.gradients == 4 * 48 * each


def test_memory_of_an_offloaded_optimizer_and_of_whole_modules(folder):
    shape = read_shape(folder / "dense")
    config = resolve(Config(task="sft", model=str(folder / "dense"), dataset=["d"], train_iters=1, nproc_per_node=2), shape)
    count = shape.num_parameters()
    away = replace(config, optimizer_cpu_offload=True, optimizer_offload_fraction=0.75)
    assert policy_memory(away, shape).optimizer == 8 * count // 2 // 4  # float32: two moments, a quarter of them, over two ranks
    assert offloaded(away, shape, None) == 2 * (16 * (3 * (8 * count // 2) // 4 // 8))
    lora = replace(config, tuner_type="lora", modules_to_save=["word_embeddings", "output_layer"])
    plain = policy_memory(replace(lora, modules_to_save=[]), shape)
    assert policy_memory(lora, shape).gradients - plain.gradients == 4 * 2 * 512 * 64
