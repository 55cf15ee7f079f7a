"""The plan's numbers against Hugging Face's parameter counts and against arithmetic written out."""

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.config import Config, FrozenRole, RolloutRole
from rlhf.counts import most_at_a_time, total_steps
from rlhf.devices import Devices
from rlhf.memory import BYTES, engine_memory, frozen_memory, policy_memory, responses_at_a_time
from rlhf.model_folder import read_shape
from rlhf.plan import count_rows, plan, render
from rlhf.resolution import resolve
from tests.model_json import QWEN25_7B, TINY, write_model

CPU = Devices(gpus=0, gpu_name="", memory=24 * 2**30, cores=2)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("NPROC_PER_NODE", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)


def grpo(folder: Path, **options) -> Config:
    base = Config(task="grpo", model=str(folder), dataset=["d"], reward_funcs=["accuracy"], train_iters=3)
    return resolve(replace(base, **options), read_shape(folder))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("Qwen2", {"tie_word_embeddings": False}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
        ("Qwen3", {"attention_bias": True, "num_key_value_heads": 4}),
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("Mistral", {}),
    ],
)
def test_parameter_count_is_hugging_faces(tmp_path, name, values):
    import torch
    import transformers

    sizes = {
        "hidden_size": 64, "intermediate_size": 144, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 3, "vocab_size": 500,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**(sizes | values))
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    config.architectures = [f"{name}ForCausalLM"]
    config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert shape.exact
    assert shape.num_parameters() == model.num_parameters()
    assert shape.stage_parameters([3]) == [model.num_parameters()]


def test_parameters_of_a_published_model(tmp_path):
    shape = read_shape(write_model(tmp_path, QWEN25_7B))
    assert shape.num_parameters() == 7_615_616_512
    # TP 2: half of every matrix and bias, all of the 57 norms
    norms = 57 * 3584
    assert shape.stage_parameters([28], 2) == [(7_615_616_512 - norms) // 2 + norms]
    # stages of 15 and 13 layers, each with one 152064 x 3584 matrix, the last with a norm
    layer = 3584 * (3584 + 2 * 512) + (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944 + 2 * 3584
    matrix = 152064 * 3584
    assert shape.stage_parameters([15, 13]) == [15 * layer + matrix, 13 * layer + matrix + 3584]


def test_weights_gradients_and_optimizer_bytes(tmp_path):
    folder = write_model(tmp_path, QWEN25_7B)
    shape, count = read_shape(folder), 7_615_616_512
    memory = policy_memory(grpo(folder, nproc_per_node=4), shape)
    # bfloat16 weights; float32 gradients; float32 master weight and two moments over 4 data-parallel ranks
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * count, 4 * count, 12 * count // 4)
    memory = policy_memory(grpo(folder, nproc_per_node=4, use_distributed_optimizer=False), shape)
    assert memory.optimizer == 12 * count
    memory = policy_memory(grpo(folder, nproc_per_node=4, torch_dtype="float32"), shape)
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * count, 4 * count, 8 * count // 4)


def test_lora_trains_only_the_adapters(tmp_path):
    folder = write_model(tmp_path, QWEN25_7B)
    shape, count = read_shape(folder), 7_615_616_512
    # rank 8: r * (in + out) of qkv, proj, fc1 and fc2, in 28 layers
    pairs = [(3584, 3584 + 2 * 512), (3584, 3584), (3584, 2 * 18944), (18944, 3584)]
    adapters = 28 * 8 * sum(width + height for width, height in pairs)
    memory = policy_memory(grpo(folder, tuner_type="lora"), shape)
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * (count + adapters), 4 * adapters, 12 * adapters)
    only = policy_memory(grpo(folder, tuner_type="lora", target_modules=["linear_qkv"]), shape)
    assert only.gradients == 4 * 28 * 8 * (3584 + 3584 + 2 * 512)


def test_kv_cache_holds_the_longest_responses_of_an_engine(tmp_path):
    folder = write_model(tmp_path, QWEN25_7B)
    config = grpo(folder, max_length=1000, max_completion_length=24, global_batch_size=64, nproc_per_node=2)
    memory = engine_memory(config, read_shape(folder))
    # 64 responses on 2 engines, 1024 tokens each: keys and values of 4 heads x 128, 28 layers, bfloat16
    assert memory.kv_cache == 32 * 1024 * 2 * 28 * 4 * 128 * 2
    assert memory.weights == 2 * 7_615_616_512
    few = engine_memory(replace(config, vllm_max_num_seqs=4), read_shape(folder))
    assert few.kv_cache == memory.kv_cache // 8


@pytest.mark.parametrize(
    ("batch", "given", "most", "together"),
    [(64, None, 256, 32), (1024, None, 512, 512), (8192, None, 1024, 1024), (8192, 2000, 2000, 2000), (64, 8, 8, 8)],
)
def test_an_engine_decodes_its_share_of_a_batch_at_a_time(tmp_path, batch, given, most, together):
    config = grpo(write_model(tmp_path, QWEN25_7B), global_batch_size=batch, nproc_per_node=2, vllm_max_num_seqs=given)
    assert (most_at_a_time(config), responses_at_a_time(config)) == (most, together)


def test_a_teachers_engine_may_be_the_only_one(tmp_path):
    config = replace(grpo(write_model(tmp_path, QWEN25_7B), global_batch_size=300), task="gkd", lmbda=0.0)
    assert most_at_a_time(config) == 300


def test_activations_follow_recompute_sequence_parallel_and_tokens(tmp_path):
    folder = write_model(tmp_path, QWEN25_7B)
    shape = read_shape(folder)

    def activations(**options) -> int:
        return policy_memory(grpo(folder, max_length=1536, **options), shape).activations

    # at the loss each logit takes 14 bytes, unfused 11; a layer is all there, or its input alone
    layer = 4 * 3584 + 2 * (3584 + 512) + 512 + 3584 + 3 * 18944
    uniform = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    block = uniform | {"recompute_method": "block"}
    assert activations(**uniform) == 2048 * (28 * 3584 * 2 + 152064 * 14)
    assert activations(**block) == 2048 * ((3584 + 27 * layer) * 2 + 152064 * 14)
    assert activations() == 2048 * (28 * layer * 2 + 152064 * 14)
    assert activations(cross_entropy_loss_fusion=False) == 2048 * (28 * layer * 2 + 152064 * 11)
    without_mlp = layer - 3 * 18944 - 3584
    assert activations(recompute_modules=["mlp"]) == 2048 * (28 * without_mlp * 2 + 152064 * 14)
    # of two stages the first holds two micro batches of its 14 layers: more than the last, with one and the logits
    assert activations(pipeline_model_parallel_size=2) == 2048 * 2 * 14 * layer * 2
    assert activations(micro_batch_size=2) == 2 * activations()
    assert activations(micro_batch_tokens=8192) == 4 * activations()
    split = activations(tensor_model_parallel_size=2)
    assert activations() // 2 < split < activations()
    assert activations(tensor_model_parallel_size=2, sequence_parallel=True) == activations() // 2


def test_steps_of_a_run(tmp_path):
    folder = write_model(tmp_path, TINY)
    config = grpo(folder, num_train_epochs=2, global_batch_size=32, num_generations=8)
    assert total_steps(config, 100) == 50  # 4 prompts a step
    assert total_steps(config, 101) == 51  # 202 prompts
    assert total_steps(replace(config, num_iterations=3), 100) == 150
    split = grpo(folder, num_train_epochs=2, global_batch_size=32, steps_per_generation=2)
    assert total_steps(split, 100) == 50  # 25 generations of 8 prompts, 2 steps each
    assert total_steps(replace(config, num_train_epochs=None), 100) == 3
    sft = resolve(Config(task="sft", model=str(folder), num_train_epochs=3, global_batch_size=16))
    assert total_steps(sft, 100) == 19  # 300 rows


def test_batches_placement_and_verdict_in_words(tmp_path):
    folder = write_model(tmp_path, TINY)
    config = grpo(
        folder,
        tensor_model_parallel_size=2,
        nproc_per_node=4,
        global_batch_size=32,
        micro_batch_size=4,
        steps_per_generation=2,
        rollout=RolloutRole(num_engines=1),
        reference=FrozenRole(nproc=2),
    )
    made = plan(config, dataset_rows=100, devices=CPU)
    assert (made.data_size, made.prompts, made.micro_batches, made.steps) == (2, 8, 4, 3)
    assert [(role.name, role.count, role.place) for role in made.roles] == [
        ("policy", 4, "bundles 0-3"),
        ("reference", 2, "with the policy, bundles 0-1"),
        ("rollout", 1, "with the policy, bundle 0"),
        ("reward", 2, "any node"),
        ("data", 1, "driver's node"),
    ]
    text = render(config, made)
    assert "4 policy ranks / (TP 2 x PP 1 = 2) = 2 data-parallel" in text
    assert "global batch 32 responses / DP 2 / micro batch 4 = 4 micro batches a rank and step" in text
    assert "32 x steps_per_generation 2 = 64 responses / num_generations 8 = 8 prompts, for 2 steps" in text
    assert "4 bundles of 1 CPU: more than the 2 here" in text
    server = plan(replace(config, vllm_mode="server", nproc_per_node=2), dataset_rows=None, devices=CPU)
    assert next(role.place for role in server.roles if role.name == "rollout") == "own bundle 2"
    wide = replace(config, vllm_tensor_parallel_size=2, rollout=RolloutRole())
    made = plan(wide, dataset_rows=None, devices=CPU)
    assert made.roles[2].place == "with the policy, bundles 0-3, each on 2 devices" and made.roles[2].count == 2
    assert "rollout      2 x  with the policy, bundles 0-3, each on 2 devices" in render(wide, made)
    own = replace(wide, vllm_mode="server", nproc_per_node=2, rollout=RolloutRole(num_engines=2))
    text = render(own, plan(own, dataset_rows=None, devices=replace(CPU, cores=6)))
    assert "rollout      2 x  own bundles 2-3, each on 2 devices" in text
    assert "2 bundles of 1 CPU and 2 bundles of 2 CPU\n" in text + "\n"
    shared = replace(config, rollout=RolloutRole(engines_per_device=2))
    made = plan(shared, dataset_rows=None, devices=CPU)
    assert "rollout      8 x  with the policy, bundles 0-3, 2 on each device" in render(shared, made)
    small = replace(CPU, memory=2**20)
    assert ": too much (libraries not counted)" in render(config, plan(config, dataset_rows=1, devices=small))
    assert plan(replace(config, beta=0.0), dataset_rows=1, devices=CPU).roles[1].name == "rollout"


def test_memory_of_a_node_is_the_sum_of_its_processes(tmp_path):
    folder = write_model(tmp_path, TINY)
    config, shape = grpo(folder, nproc_per_node=2), read_shape(folder)
    sizes = [policy_memory(config, shape), frozen_memory(config, shape), engine_memory(config, shape)]
    assert plan(config, dataset_rows=1, devices=CPU).peaks == {"node": 2 * sum(size.total for size in sizes)}
    assert sizes[1].weights == shape.num_parameters() * BYTES["float32"]


def test_a_wide_engine_holds_its_part_on_each_device(tmp_path):
    folder = write_model(tmp_path, QWEN25_7B)
    one, two = (grpo(folder, nproc_per_node=2, vllm_tensor_parallel_size=width) for width in (1, 2))
    shape = read_shape(folder)
    whole, half = engine_memory(one, shape), engine_memory(two, shape)
    assert half.weights == whole.weights // 2 == shape.num_parameters() * 2 // 2
    assert half.kv_cache == whole.kv_cache  # half of the heads of twice as many responses
    sizes = {config.vllm_tensor_parallel_size: plan(config, dataset_rows=1, devices=CPU).peaks["node"] for config in (one, two)}
    assert sizes[1] - sizes[2] == 2 * (whole.total - half.total) == 2 * shape.num_parameters()


def test_on_gpus_the_plan_shows_each_phase_and_what_would_be_refused(tmp_path):
    config = grpo(write_model(tmp_path, QWEN25_7B), max_length=1024, beta=0.0)
    small = Devices(gpus=1, gpu_name="NVIDIA H100", memory=80 * 2**30, cores=8)
    text = render(config, plan(config, dataset_rows=1, devices=small))
    assert "Predicted peak of the fullest GPU, GiB of 80.00\n  train                        141.90  too much\n" in text
    assert "vllm_gpu_memory_utilization 0.74, offload_optimizer true: the policy keeps 17.2 GiB of each GPU's 80.0 GiB" in text
    assert "\nThis would be refused: phase train needs about 132.2 GiB of a GPU's 80.0 GiB (optimizer state 85.1, " in text
    fits = plan(config, dataset_rows=1, devices=replace(small, memory=160 * 2**30))
    assert fits.refusal is None and "refused" not in render(config, fits)
    assert list(plan(replace(config, task="sft"), dataset_rows=1, devices=small).peaks) == ["train"]


def test_sft_has_no_rollout(tmp_path):
    folder = write_model(tmp_path, TINY)
    config = resolve(Config(task="sft", model=str(folder), num_train_epochs=1), read_shape(folder))
    made = plan(config, dataset_rows=None, devices=CPU)
    assert [role.name for role in made.roles] == ["policy", "data"]
    assert (made.steps, made.prompts) == (None, None)
    assert "optimizer steps: unknown until the dataset is read (1 epochs of unknown number of rows)" in render(config, made)


def test_packs_are_counted_when_the_dataset_has_been_packed(tmp_path):
    folder = write_model(tmp_path, TINY)
    config = Config(task="sft", model=str(folder), num_train_epochs=1, packing=True, packing_length=4096)
    config = resolve(replace(config, micro_batch_size=2), read_shape(folder))
    text = render(config, plan(config, dataset_rows=100, devices=CPU))
    assert "global batch 16 packs / DP 1 / micro batch 2 = 8 micro batches a rank and step" in text
    assert "optimizer steps: unknown until the dataset is packed" in text
    assert "micro batches of 8,192 tokens" in text


def test_rows_of_local_files(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n\n{"a": 2}\n{"a": 3}')
    assert count_rows([str(file)]) == 3
    assert count_rows([f"{file}#2", str(file)]) == 5
    assert count_rows([str(file), "org/set"]) is None
    assert count_rows([f"{file}#3", str(file)], held_out=0.67) == 2  # 2 of each 3 are kept from training
    assert count_rows([str(file)], held_out=0.01) == 2  # at least one
