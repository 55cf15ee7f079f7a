"""Predicted peaks of shared GPUs against arithmetic written out, what is decided from them, and what is refused."""

# ruff: noqa: E501 - whole messages

from dataclasses import replace

import pytest

import rlhf.run
from rlhf.config import Config, RolloutRole
from rlhf.devices import Devices
from rlhf.fit import complete, fit, note, refusal, warning
from rlhf.memory import shapes
from rlhf.model_folder import read_shape
from rlhf.phases import phases
from rlhf.resolution import resolve
from rlhf.run import refuse_what_cannot_fit
from tests.model_json import QWEN25_7B, write_model

GIB = 2**30
H200 = 143_771 * 2**20
QWEN25_1_5B = QWEN25_7B | {
    "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
    "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
SMALL = 1_543_714_304  # parameters
RECORDED = 512 * 1281 * 4  # logprobs of 512 responses of 256 + 1024 tokens, and of one place more
LARGE_TP2 = (7_615_616_512 - 57 * 3584) // 2 + 57 * 3584  # of one of two tensor ranks
LARGE = {"tensor_model_parallel_size": 2, "nproc_per_node": 2, "max_length": 1024, "max_completion_length": 4096}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("NPROC_PER_NODE", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def grpo(tmp_path):
    """A resolved config: 512 responses a step, of at most 256 + 1024 tokens."""

    def grpo(values=QWEN25_1_5B, **options) -> Config:
        folder = write_model(tmp_path / str(values["hidden_size"]), values)
        base = Config(
            task="grpo", model=str(folder), dataset=["d"], reward_funcs=["accuracy"], train_iters=3,
            beta=0.0, nproc_per_node=1, global_batch_size=512, micro_batch_tokens=8192, max_length=256, max_completion_length=1024,
        )  # fmt: skip
        return resolve(replace(base, **options), read_shape(folder))

    return grpo


def decided(config: Config) -> tuple[float, bool, bool]:
    return config.vllm_gpu_memory_utilization, config.offload_optimizer, config.offload_model


def test_phases_of_one_shared_gpu(grpo):
    config = grpo(beta=0.04)
    completed = complete(config, *shapes(config), H200)
    layer = 4 * 1536 + 2 * (1536 + 256) + 256 + 1536 + 3 * 8960
    activations = 8192 * (28 * layer * 2 + 151936 * 14)
    contexts, weights, optimizer = 2 * 3 * GIB, 2 * SMALL, 12 * SMALL
    asleep = 3 * GIB // 2 + RECORDED
    buffers = 3 * GIB // 2  # three buckets of 512 MiB, more than the embedding has
    assert decided(completed) == (0.76, False, False)  # 0.98 - 30.5 / 140.4
    predicted = {
        "train": contexts + 2 * weights + 4 * SMALL + optimizer + activations + asleep,
        "push": contexts + 3 * weights + optimizer + asleep + buffers,
        "generate": contexts + 2 * weights + optimizer + int(0.76 * H200) + asleep,
    }
    assert phases(completed, *shapes(config), H200) == predicted
    away = replace(completed, offload_optimizer=True, offload_model=True)
    predicted["push"] -= optimizer + weights  # the reference's
    predicted["generate"] -= optimizer + 2 * weights
    assert phases(away, *shapes(config), H200) == predicted


def test_engines_that_share_a_gpu_have_its_share_together(grpo):
    config, two = grpo(), grpo(rollout=RolloutRole(engines_per_device=2))
    peaks, doubled = (phases(fit(given, *shapes(config), H200), *shapes(config), H200) for given in (config, two))
    each = 3 * GIB // 2  # of one more engine, beside its share
    assert decided(fit(two, *shapes(config), H200)) == (decided(fit(config, *shapes(config), H200))[0] - 0.01, False, False)
    assert doubled["train"] - peaks["train"] == each
    assert doubled["push"] - peaks["push"] == each + 2 * SMALL  # and its weights
    large = grpo(QWEN25_7B, **LARGE, vllm_gpu_memory_utilization=0.2, rollout=RolloutRole(num_engines=4, engines_per_device=2))
    assert refusal(large, *shapes(large), H200) == (
        "phase generate: vllm_gpu_memory_utilization 0.2 gives an engine 14.0 GiB of a GPU's 140.4 GiB, it needs at least 18.0 "
        "(weights 14.2, one sequence of 5,120 tokens 0.3, itself 3.5); give vllm_gpu_memory_utilization 0.88; or "
        "rollout.num_engines 2, rollout.engines_per_device 1; or rollout.num_engines 1, rollout.engines_per_device 1, "
        "vllm_tensor_parallel_size 2"
    )
    assert refusal(replace(large, rollout=RolloutRole(num_engines=2)), *shapes(large), H200) is None
    sizes = {"nnodes": 2, "nproc_per_node": 8, "tensor_model_parallel_size": 4, "sequence_parallel": True}
    small = grpo(QWEN25_7B, micro_batch_tokens=2048, rollout=RolloutRole(engines_per_device=2), **sizes, **FULL)
    text = "give rollout.engines_per_device 1, vllm_tensor_parallel_size 2"  # as without it, but for the first words
    assert refusal(small, *shapes(small), 24 * GIB).endswith(text)


def test_without_sharing_each_phase_has_the_gpu_to_itself(grpo):
    config = grpo(vllm_mode="server")
    completed = fit(config, *shapes(config), H200)
    assert decided(completed) == (0.9, False, False)
    peaks = phases(completed, *shapes(config), H200)
    assert peaks["generate"] == int(0.9 * H200) + 3 * GIB // 2 + RECORDED + 3 * GIB // 2
    assert peaks["push"] == peaks["train"]  # torch gives nothing back between them
    short = replace(completed, micro_batch_tokens=64, vllm_max_model_len=64)
    assert phases(short, *shapes(config), H200)["push"] == 3 * GIB + 18 * SMALL + 3 * GIB // 2
    sft = resolve(Config(task="sft", model=config.model, max_length=512, nproc_per_node=1), shapes(config)[0])
    assert list(phases(fit(sft, *shapes(sft), H200), *shapes(sft), H200)) == ["train"]


def test_an_engine_on_a_small_gpu_of_its_own_leaves_room_for_what_is_pushed(grpo):
    half = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_hidden_layers": 24}
    config, small = grpo(QWEN25_1_5B | half, vllm_mode="server", micro_batch_tokens=None), 24 * GIB
    assert decided(complete(config, *shapes(config), small)) == (0.85, False, False)  # 0.98 - (1.5 + 1.5) / 24
    assert refusal(config, *shapes(config), small) is None


def test_without_gpus_nothing_is_offloaded_or_refused(grpo):
    config = grpo(max_length=30000)
    assert decided(fit(config, *shapes(config), None)) == (0.9, False, False)
    assert note(config, fit(config, *shapes(config), None), *shapes(config), None) is None


def test_the_optimizer_leaves_when_the_kv_cache_would_be_small(grpo):
    # beside weights and optimizer of half a 7B policy 0.56 of a GPU, of which 59 GiB for a KV cache: 256 x 5120 x 56 KiB = 70 GiB
    config = grpo(QWEN25_7B, **LARGE)
    completed = fit(config, *shapes(config), H200)
    engine, kept = 3 * GIB // 2, 3 * GIB + 2 * LARGE_TP2
    assert decided(completed) == (int(98 - 100 * (kept + engine) / H200) / 100, True, False)
    assert note(config, completed, *shapes(config), H200) == (
        "vllm_gpu_memory_utilization 0.89, offload_optimizer true: the policy keeps 10.1 GiB of each GPU's 140.4 GiB while the "
        "engine generates, whose KV cache is to hold 256 responses of 5,120 tokens"
    )
    short = grpo(QWEN25_7B, **LARGE | {"max_completion_length": 1024})
    kept += 12 * LARGE_TP2
    assert decided(fit(short, *shapes(short), H200)) == (int(98 - 100 * (kept + engine) / H200) / 100, False, False)
    few = grpo(QWEN25_7B, **LARGE | {"global_batch_size": 64})
    assert not fit(few, *shapes(few), H200).offload_optimizer


def test_the_model_leaves_when_that_is_not_enough(grpo):
    config = grpo(QWEN25_7B, **LARGE | FULL | {"tensor_model_parallel_size": 4, "nproc_per_node": 4, "global_batch_size": 1024})
    assert decided(fit(config, *shapes(config), 80 * GIB)) == (0.9, True, True)


def test_deciding_twice_is_as_once(grpo):
    config = grpo(beta=0.04)
    once = fit(config, *shapes(config), H200)
    assert fit(once, *shapes(config), H200) == once
    assert note(once, once, *shapes(config), H200) is None


def test_what_is_given_stays(grpo):
    config = grpo(vllm_gpu_memory_utilization=0.5, offload_model=True, offload_optimizer=False)
    assert fit(config, *shapes(config), H200) == config
    kept = grpo(QWEN25_7B, **LARGE, offload_optimizer=False)
    assert not fit(kept, *shapes(kept), H200).offload_optimizer
    # a share that was given decides what has to leave
    share = grpo(vllm_gpu_memory_utilization=0.9)
    assert decided(fit(share, *shapes(share), H200)) == (0.9, True, False)


@pytest.mark.parametrize(
    ("options", "memory", "message"),
    [
        (
            {"vllm_gpu_memory_utilization": 0.9, "offload_optimizer": False, "offload_model": False}, H200,
            "phase generate needs about 151.0 GiB of a GPU's 140.4 GiB (engine 126.4, optimizer state 17.3, contexts 3.0); "
            "give offload_optimizer true; or vllm_gpu_memory_utilization 0.8; or tensor_model_parallel_size 4, nproc_per_node 4; "
            "or nnodes 4",
        ),
        (
            {"vllm_gpu_memory_utilization": 0.99}, H200,
            "phase generate needs about 143.5 GiB of a GPU's 140.4 GiB (engine 139.0, contexts 3.0, engine's contexts 1.5); "
            "give vllm_gpu_memory_utilization 0.8",
        ),
        (
            {"vllm_gpu_memory_utilization": 0.03}, H200,
            "phase generate: vllm_gpu_memory_utilization 0.03 gives an engine 4.2 GiB of a GPU's 140.4 GiB, it needs at least 6.4 "
            "(weights 2.9, one sequence of 1,280 tokens 0.0, itself 3.5); give vllm_gpu_memory_utilization 0.8",
        ),
        (
            {"micro_batch_tokens": 32768}, H200,
            "phase train needs about 160.9 GiB of a GPU's 140.4 GiB (activations of 32,768 tokens 130.5, optimizer state 17.3, "
            "gradients 5.8); give micro_batch_tokens 16384; or recompute_granularity full, recompute_method uniform, "
            "recompute_num_layers 1; or tensor_model_parallel_size 2, nproc_per_node 2",
        ),
        (
            {"use_distributed_optimizer": False, "nproc_per_node": 4} | FULL, 40 * GIB,
            "phase train needs about 47.3 GiB of a GPU's 40.0 GiB (optimizer state 17.3, activations of 8,192 tokens 16.9, "
            "gradients 5.8); give micro_batch_tokens 4096; or tensor_model_parallel_size 2; or use_distributed_optimizer true",
        ),
        (
            {"micro_batch_tokens": 1280} | FULL, 20 * GIB,
            "phase train needs about 33.0 GiB of a GPU's 20.0 GiB (optimizer state 17.3, gradients 5.8, contexts 3.0); "
            "give tensor_model_parallel_size 2, nproc_per_node 2; or nnodes 8",
        ),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_with_what_to_change(grpo, options, memory, message):
    config = grpo(**options)
    with pytest.raises(ValueError) as caught:
        fit(config, *shapes(config), memory)
    assert str(caught.value) == message


def test_an_engine_too_large_for_one_gpu_is_to_be_spread(grpo):
    sizes = {"nnodes": 2, "nproc_per_node": 8, "tensor_model_parallel_size": 4, "sequence_parallel": True}
    config = grpo(QWEN25_7B, micro_batch_tokens=2048, **sizes, **FULL)
    room = *shapes(config), 24 * GIB
    message = (
        "phase push needs about 25.3 GiB of a GPU's 24.0 GiB (engine weights 14.2, policy weights 3.5, push buffers 3.0); "
        "give vllm_tensor_parallel_size 2"
    )
    assert refusal(config, *room) == message
    wide = replace(config, vllm_tensor_parallel_size=2)
    assert refusal(wide, *room) is None
    # half of the engine's weights, less what its other worker has on this GPU
    saved = phases(complete(config, *room), *room)["push"] - phases(complete(wide, *room), *room)["push"]
    assert saved == 7_615_616_512 * 2 // 2 - GIB // 2
    odd = replace(wide, nnodes=1, nproc_per_node=4, vllm_tensor_parallel_size=4)
    assert refusal(odd, *room) is not None and "vllm_tensor_parallel_size 8" not in refusal(odd, *room)  # no 8 ranks on a node


def test_rows_that_may_be_shorter_are_only_warned_of(grpo):
    config = grpo(micro_batch_tokens=None, micro_batch_size=32, **FULL)
    assert refusal(config, *shapes(config), 80 * GIB) is None
    assert warning(config, *shapes(config), 80 * GIB) == (
        "when rows are as long as max_length allows, phase train needs about 114.8 GiB of a GPU's 80.0 GiB (activations of 40,960 "
        "tokens 84.4, optimizer state 17.3, gradients 5.8); then give micro_batch_size 16; or tensor_model_parallel_size 2, "
        "nproc_per_node 2"
    )
    assert warning(replace(config, micro_batch_size=16), *shapes(config), 80 * GIB) is None


def test_a_change_that_is_proposed_is_enough(grpo):
    config = grpo(micro_batch_tokens=32768)
    for change in ({"micro_batch_tokens": 16384}, FULL, {"tensor_model_parallel_size": 2, "nproc_per_node": 2}):
        assert refusal(replace(config, **change), *shapes(config), H200) is None


def test_changes_are_combined_when_none_is_enough(grpo):
    config = grpo(QWEN25_7B, micro_batch_tokens=65536)
    text = refusal(config, *shapes(config), 24 * GIB)
    assert (
        text.startswith("phase train needs about ")
        and "no change of one kind is enough, combine: micro_batch_tokens 32768; " in text
    )


def test_a_command_for_this_machine_is_refused_before_anything_starts(monkeypatch, grpo):
    gpu = Devices(gpus=1, gpu_name="NVIDIA H200", memory=H200, cores=8, host_memory=64 * GIB)
    config = grpo(offload_optimizer=True)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(rlhf.run, "find_devices", lambda: gpu)
    refuse_what_cannot_fit(config)
    monkeypatch.setattr(rlhf.run, "find_devices", lambda: replace(gpu, memory=8 * GIB))
    with pytest.raises(ValueError, match=r"phase train needs about .* GiB of a GPU's 8.0 GiB"):
        refuse_what_cannot_fit(config)
    monkeypatch.setattr(rlhf.run, "find_devices", lambda: replace(gpu, host_memory=16 * GIB))
    with pytest.raises(
        ValueError, match="offloading needs about 17.3 GiB of a node's host memory, there are 16.0: give offload_model"
    ):
        refuse_what_cannot_fit(config)
    monkeypatch.setattr(rlhf.run, "find_devices", lambda: replace(gpu, gpus=0, memory=8 * GIB))
    refuse_what_cannot_fit(config)


def test_the_note_says_what_was_decided(grpo):
    config = grpo()
    completed = fit(config, *shapes(config), H200)
    assert decided(completed) == (0.8, False, False)
    assert note(config, completed, *shapes(config), H200) == (
        "vllm_gpu_memory_utilization 0.8: the policy keeps 23.1 GiB of each GPU's 140.4 GiB while the engine generates"
    )
