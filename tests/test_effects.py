"""Options that would have no effect are refused by name, and accepted beside what they need."""

from __future__ import annotations

import pytest
import torch

from rlhf.config import GRPO_LOSSES
from rlhf.effect_check import NEEDS, check_effects
from rlhf.options import load_config, parse, supported
from rlhf.preference_losses import DPO_LOSS_TYPES, PLAIN_RATIO_LOSS_TYPES, SMOOTHED_LOSS_TYPES, dpo_losses
from tests.test_losses import run

GRPO = "rlhf --rlhf_type grpo --reward_funcs format"
ROWS_ONLY = "rlhf --rlhf_type gkd --lmbda 0"
SERVER = "rlhf --rlhf_type grpo --vllm_mode server"
SAMPLED = "--lmbda 0.5"
CASES = [  # a command, the option that it would ignore, and what gives it an effect
    ("sft", "lora_rank 64", "--tuner_type lora"),
    ("sft", "lora_alpha 8", "--tuner_type lora"),
    ("sft", "lora_dropout 0", "--tuner_type lora"),
    ("sft", "target_modules linear_qkv", "--tuner_type lora"),
    ("sft", "modules_to_save output_layer", "--tuner_type lora"),
    ("sft", "merge_lora true", "--tuner_type lora"),
    ("sft", "recompute_method uniform", "--recompute_granularity full"),
    ("sft --recompute_granularity none", "recompute_num_layers 1", "--recompute_granularity full"),
    ("sft --recompute_granularity none", "recompute_modules mlp", "--recompute_granularity selective"),
    ("sft --recompute_granularity full", "recompute_modules mlp", "--recompute_granularity selective"),
    ("sft", "optimizer_offload_fraction 0.5", "--optimizer_cpu_offload true"),
    ("sft --lr_decay_style constant", "min_lr 1e-6", "--lr_decay_style linear"),
    ("sft", "no_load_optim true", "--resume_from_checkpoint auto"),
    ("sft", "no_load_rng true", "--resume_from_checkpoint auto"),
    ("sft", "packing_length 99", "--packing true"),
    ("sft", "eval_steps 5", "--val_dataset d"),
    ("sft", "eval_iters 5", "--split_dataset_ratio 0.1"),
    *((f"rlhf --loss_type {loss_type}", "label_smoothing 0.1", "--loss_type robust") for loss_type in ("ipo", "hinge", "sft")),
    ("rlhf --loss_type aot", "f_divergence_type forward_kl", "--loss_type sigmoid"),
    ("rlhf", "f_alpha_divergence_coef 0.1", "--f_divergence_type alpha_divergence"),
    ("rlhf", "discopop_tau 0.1", "--loss_type discopop"),
    ("rlhf --loss_type sft", "ld_alpha 0.5", "--loss_type ipo"),
    ("rlhf --loss_type sft", "reference_free true", "--loss_type ipo"),
    ("rlhf --rlhf_type gkd --lmbda 1", "seq_kd true", SAMPLED),
    ("rlhf --rlhf_type gkd --lmbda 1", "sft_alpha 0.1", SAMPLED),
    (f"{GRPO} --loss_type cispo --epsilon_high 5", "epsilon 0.1", "--loss_type dapo"),
    (f"{GRPO} --loss_type cispo --epsilon_high 5", "epsilon 5", "--epsilon_high none"),
    (f"{GRPO} --loss_type cispo", "delta 3", "--loss_type dapo"),
    (GRPO, "max_resample_times 5", "--dynamic_sample true"),
    (GRPO, "rollout_importance_sampling_threshold 5", "--rollout_importance_sampling_mode token_mask"),
    ("rlhf --rlhf_type grpo --reward_model m", "external_plugins p.py", "--reward_funcs mine"),
    ("rlhf --rlhf_type grpo --reward_model m", "reward_workers 5", "--reward_funcs format"),
    ("rlhf --rlhf_type grpo --reward_model m", "reward_timeout 5", "--reward_funcs format"),
    ("rlhf --rlhf_type grpo --reward_model m", "reward_memory 5", "--reward_funcs format"),
    (GRPO, "cosine_min_len_value_wrong 0", "--reward_funcs cosine"),
    (GRPO, "cosine_max_len_value_wrong 1", "--reward_funcs cosine"),
    (GRPO, "cosine_min_len_value_correct 0", "--reward_funcs cosine"),
    (GRPO, "cosine_max_len_value_correct 0", "--external_plugins p.py"),
    ("eval --reward_funcs format", "cosine_max_len 99", "--reward_funcs cosine"),
    (GRPO, "repetition_n_grams 4", "--reward_funcs format repetition"),
    (GRPO, "repetition_max_penalty -2", "--reward_funcs format repetition"),
    (GRPO, "soft_max_length 99", "--reward_funcs soft_overlong"),
    (GRPO, "soft_cache_length 9", "--reward_funcs soft_overlong"),
    (ROWS_ONLY, "rollout.num_engines 1", SAMPLED),
    (ROWS_ONLY, "rollout.engines_per_device 2", SAMPLED),
    ("infer", "rollout.num_engines 2", "--dataset f.jsonl --stream false"),
    (SERVER, "rollout.engines_per_device 2", "--vllm_mode colocate"),
    (ROWS_ONLY, "vllm_mode server", SAMPLED),
    (f"{ROWS_ONLY} --seq_kd true", "vllm_mode server", SAMPLED),
    (ROWS_ONLY, "vllm_gpu_memory_utilization 0.5", SAMPLED),
    (ROWS_ONLY, "offload_model true", SAMPLED),
    (ROWS_ONLY, "offload_optimizer true", SAMPLED),
    (ROWS_ONLY, "push_timeout 9", SAMPLED),
    (ROWS_ONLY, "log_completions true", SAMPLED),
    (GRPO, "rollout_name mine", "--vllm_mode server"),
    (SERVER, "offload_model true", "--vllm_mode colocate"),
    (SERVER, "offload_optimizer true", "--vllm_mode colocate"),
    (ROWS_ONLY, "max_completion_length 99", SAMPLED),
    (ROWS_ONLY, "max_completion_length 99", "--seq_kd true"),
    (f"{ROWS_ONLY} --teacher.backend vllm", "top_p 0.9", SAMPLED),
    (ROWS_ONLY, "top_k 9", SAMPLED),
    (ROWS_ONLY, "repetition_penalty 1.1", SAMPLED),
    (ROWS_ONLY, "stop_words x", SAMPLED),
    (ROWS_ONLY, "vllm_max_model_len 99", SAMPLED),
    (f"{ROWS_ONLY} --teacher.backend vllm", "vllm_max_num_seqs 99", "--seq_kd true"),
    (ROWS_ONLY, "vllm_tensor_parallel_size 2", "--seq_kd true"),
    (f"{ROWS_ONLY} --seq_kd true --teacher.own_devices true", "vllm_tensor_parallel_size 2", SAMPLED),
    (ROWS_ONLY, "vllm_enforce_eager true", "--teacher.backend vllm"),
    (ROWS_ONLY, "vllm_enable_prefix_caching false", "--seq_kd true"),
    (ROWS_ONLY, "vllm.block_size 32", "--teacher.backend vllm"),
    (ROWS_ONLY, "vllm.block_size 32", SAMPLED),
]


def check(words: str) -> None:
    check_effects(parse(words.split()))


@pytest.mark.parametrize(("command", "ignored", "beside"), CASES)
def test_an_option_without_effect_is_refused_by_name_and_accepted_beside_what_it_needs(command, ignored, beside):
    name = ignored.split()[0]
    with pytest.raises(ValueError, match=f"^--{name} has no effect with.*: leave it out, or give ") as caught:
        check(f"{command} --{ignored}")
    assert "\n" not in str(caught.value) and "{" not in str(caught.value)
    check(command)
    check(f"{command} --{ignored} {beside}")


def test_every_option_of_the_table_is_supported_and_tried():
    names = {name for need in NEEDS for name in need.options.split()}
    tried = {ignored.split()[0].replace("vllm.block_size", "vllm") for _, ignored, _ in CASES}
    assert names <= supported().keys() and names == tried


@pytest.mark.parametrize(
    "words",
    [
        "sft --lora_rank 8 --recompute_granularity none --recompute_modules core_attn --merge_lora false --min_lr 0",
        f"{GRPO} --loss_type cispo --epsilon 0.2 --epsilon_high 5 --max_resample_times 3 --cosine_max_len_value_correct 0.5",
        f"{ROWS_ONLY} --vllm_mode colocate --max_completion_length 512 --vllm_enforce_eager false --offload_model false",
        f"{SERVER} --offload_model false",
        "eval --max_completion_length 2048 --repetition_n_grams 3",
    ],
)
def test_what_asks_for_nothing_is_let_pass(words):
    check(words)


def test_it_is_part_of_reading_a_command(tmp_path):
    common = ["--model", str(tmp_path), "--dataset", "d"]
    message = "--cosine_max_len has no effect without the reward function cosine: leave it out, or give --reward_funcs cosine"
    for words in ("rlhf --rlhf_type grpo --train_iters 1", "eval"):
        with pytest.raises(ValueError) as caught:
            load_config([*words.split(), *common, "--reward_funcs", "format", "--cosine_max_len", "9"])
        assert str(caught.value) == message


@pytest.mark.parametrize("loss_type", DPO_LOSS_TYPES)
def test_the_table_says_what_dpo_losses_use(loss_type):
    chosen, rejected, ref_chosen, ref_rejected = torch.tensor(
        [[-3.0, -8.0, -6.5], [-4.0, -6.0, -9.0], [-3.5, -7.0, -6.0], [-3.0, -6.5, -8.0]]
    )

    def losses(**options) -> torch.Tensor:
        lengths = torch.tensor([4.0, 6.0, 7.0])
        return dpo_losses(
            chosen, rejected, ref_chosen, ref_rejected, loss_type=loss_type, beta=0.5, chosen_lengths=lengths,
            rejected_lengths=lengths + 1, mean_chosen_length=5.0, **options,
        )  # fmt: skip

    def acts(**options) -> bool:
        return not torch.equal(losses(), losses(**options))

    assert acts(label_smoothing=0.2) == (loss_type in SMOOTHED_LOSS_TYPES)
    assert acts(f_divergence_type="forward_kl") == (loss_type not in PLAIN_RATIO_LOSS_TYPES)
    assert acts(discopop_tau=0.5) == (loss_type == "discopop")
    assert acts(reference_free=True) == (loss_type != "sft")


@pytest.mark.parametrize("loss_type", GRPO_LOSSES)
def test_the_table_says_what_grpo_losses_use(loss_type):
    high = {"epsilon_high": 1.1 if loss_type == "cispo" else 0.2}
    plain = run([0, 1, 2], loss_type, **high)[:2]
    assert (run([0, 1, 2], loss_type, epsilon=0.01, **high)[:2] != plain) == (loss_type != "cispo")
    assert (run([0, 1, 2], loss_type, delta=0.5, **high)[:2] != plain) == (loss_type != "cispo")
    assert run([0, 1, 2], loss_type, epsilon_high=0.01)[:2] != plain
