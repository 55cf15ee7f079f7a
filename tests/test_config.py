"""Defaults and the reading of options."""

import ast
import importlib.util
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from rlhf.config import ALL, Config
from rlhf.options import ALIASES, COMMANDS, help_of, help_text, load_config, parse, supported
from rlhf.resolution import resolve
from rlhf.unsupported import ELSEWHERE, UNSUPPORTED
from tests.command import MAIN
from tests.model_json import TINY, write_model

# ms-swift 4.6.0's Megatron defaults. `None`: filled in later, see test_dependent_defaults.
MS_SWIFT = {
    "model": None, "use_hf": False, "model_type": None, "torch_dtype": None, "template": None,
    "template_backend": "swift", "system": None, "seed": 42, "dataset": [], "max_length": None,
    "truncation_strategy": None, "packing": False, "packing_length": None, "dataset_shuffle": True, "data_seed": 42,
    "dataset_num_proc": 1, "dataloader_num_workers": 4, "load_from_cache_file": False,
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "sequence_parallel": False,
    "decoder_first_pipeline_num_layers": None, "decoder_last_pipeline_num_layers": None,
    "use_distributed_optimizer": True, "micro_batch_size": 1, "global_batch_size": 16, "train_iters": None,
    "num_train_epochs": None, "recompute_granularity": "selective", "recompute_method": None,
    "recompute_num_layers": None, "recompute_modules": ["core_attn"],
    "expert_model_parallel_size": 1, "expert_tensor_parallel_size": 1, "overlap_grad_reduce": False,
    "overlap_param_gather": False, "optimizer_cpu_offload": False, "optimizer_offload_fraction": 1.0,
    "moe_permute_fusion": False, "moe_shared_expert_overlap": False, "moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": None,
    "moe_expert_capacity_factor": None, "moe_pad_expert_input_to_capacity": False, "moe_token_drop_policy": "probs",
    "moe_router_dtype": "fp32", "modules_to_save": [], "no_load_optim": False, "no_load_rng": False,
    "cross_entropy_loss_fusion": True, "lr": None, "min_lr": 0, "lr_decay_style": "cosine", "lr_warmup_iters": 0,
    "lr_warmup_fraction": None, "weight_decay": 0.1, "clip_grad": 1.0, "adam_beta1": 0.9, "adam_beta2": 0.95,
    "adam_eps": 1e-8, "tuner_type": "full", "lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05,
    "target_modules": ["all-linear"], "merge_lora": None, "num_generations": 8,
    "generation_batch_size": None, "steps_per_generation": None, "num_iterations": 1, "loss_type": None, "beta": None,
    "epsilon": 0.2, "epsilon_high": None, "delta": None, "importance_sampling_level": "token",
    "advantage_estimator": "grpo", "scale_rewards": None, "kl_in_reward": None, "dynamic_sample": False,
    "max_resample_times": 3, "overlong_filter": False, "rollout_importance_sampling_mode": None,
    "rollout_importance_sampling_threshold": 2.0, "reward_funcs": [], "reward_weights": None, "external_plugins": [],
    "cosine_min_len_value_wrong": -0.5, "cosine_max_len_value_wrong": 0.0, "cosine_min_len_value_correct": 1.0,
    "cosine_max_len_value_correct": 0.5, "cosine_max_len": None, "repetition_n_grams": 3,
    "repetition_max_penalty": -1.0, "soft_max_length": None, "soft_cache_length": None, "max_completion_length": 512,
    "temperature": 0.9, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "stop_words": [],
    "vllm_tensor_parallel_size": 1, "vllm_max_model_len": None,
    "vllm_max_num_seqs": None, "vllm_enforce_eager": False, "vllm_enable_prefix_caching": True, "output_dir": None,
    "save_steps": 500, "save_total_limit": None, "save_safetensors": True, "no_save_optim": False,
    "no_save_rng": False, "finetune": True, "logging_steps": 5, "report_to": ["tensorboard"],
    "log_completions": False, "label_smoothing": 0, "reference_free": False, "rpo_alpha": None,
    "f_divergence_type": "reverse_kl", "desirable_weight": 1.0, "undesirable_weight": 1.0, "val_dataset": [],
    "split_dataset_ratio": 0.0, "eval_steps": None, "eval_iters": -1, "num_labels": None, "problem_type": None,
    "center_rewards_coefficient": None, "reward_model": None, "lmbda": 0.5, "seq_kd": False, "sft_alpha": 0,
    "gkd_logits_topk": None, "offload_teacher_model": False, "mrl_dims": None,
    "mcore_model": None, "to_mcore": False, "to_hf": False, "adapters": [],
    "test_convert_precision": False, "test_convert_dtype": "float32", "exist_ok": False,
}  # fmt: skip
OURS = {
    "nnodes": 1, "nproc_per_node": None, "cpus_per_rank": 1, "micro_batch_tokens": None, "reward_workers": 2,
    "reward_timeout": 30, "reward_memory": 4, "call_timeout": 1800, "push_timeout": 120, "run_name": None,
    "deterministic": False, "megatron": {}, "vllm": {}, "rollout_name": "rollout",
    "stream": None,  # ms-swift: False
    "infer_backend": "vllm", "result_path": None,  # of `swift infer`, which has others by default
    "loss_scale": None,  # ms-swift: default, for rlhf last_round
    "ld_alpha": None,  # of ms-swift's own trainer, not of its Megatron one
    "f_alpha_divergence_coef": 0.5, "discopop_tau": 0.05,  # of TRL, and the latter of ms-swift's own trainer
    "vllm_mode": "colocate",  # ms-swift: None, which it refuses
    "attention_backend": None, "gradient_accumulation_fusion": None,  # ms-swift: flash, and true where apex is installed
    "resume_from_checkpoint": None,  # of ms-swift's own trainer, not of its Megatron one
    "vllm_gpu_memory_utilization": None, "offload_model": None, "offload_optimizer": None,  # ms-swift: 0.9, False, False
}  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("NPROC_PER_NODE", "RAY_JOB_CONFIG_JSON_ENV_VAR", "MEGARAY_OUTPUT_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def swift_options() -> dict[str, ast.expr | None]:
    """Every option of `megatron sft|rlhf|export` with its default, from ms-swift's sources."""
    root = Path(importlib.util.find_spec("swift").origin).parent
    found = {}
    files = [*(root / "arguments" / "base_args").glob("*.py"), root / "ray_utils" / "arguments.py"]
    for file in [*files, *sorted((root / "megatron" / "arguments").glob("*.py"))]:  # the last definition wins
        for item in ast.walk(ast.parse(file.read_text())):
            if isinstance(item, ast.ClassDef):
                names = [line for line in item.body if isinstance(line, ast.AnnAssign)]
                found |= {line.target.id: line.value for line in names if not line.target.id.startswith("_")}
    return found


def test_defaults_are_ms_swifts():
    config = Config()
    assert {name: getattr(config, name) for name in MS_SWIFT} == MS_SWIFT
    assert {name: getattr(config, name) for name in OURS} == OURS
    rest = {"task", "environment", "rollout", "reference", "teacher"}
    assert {item.name for item in fields(Config)} == {*MS_SWIFT, *OURS, *rest}


def test_defaults_are_those_in_the_installed_ms_swift():
    options = swift_options()
    compared = 0
    for name, value in MS_SWIFT.items():
        try:
            default = ast.literal_eval(options[name]) if options[name] is not None else None
        except ValueError:
            continue  # field(default_factory=...)
        if name not in ("truncation_strategy", "dataset_shuffle"):
            assert default == value, name
            compared += 1
    assert compared > 80


def test_every_option_of_ms_swift_is_supported_or_refused_by_name():
    known = {*supported(), *UNSUPPORTED, *ALIASES, *(selector for selector, _ in COMMANDS.values())}
    assert len(swift_options()) > 300
    assert set(swift_options()) - known == set()
    assert set(UNSUPPORTED) & set(supported()) == set()
    assert set(ELSEWHERE.values()) <= set(supported())


def test_options_of_our_own_stay_few():
    assert len([item for item in supported().values() if item.field.metadata["own"]]) < 60


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--lr 1e-6", "lr", 1e-6),
        ("--lr=1e-6", "lr", 1e-6),
        ("--learning-rate-is-not-it --lr 3", None, None),
        ("--train-iters 7", "train_iters", 7),
        ("--use_hf", "use_hf", True),
        ("--use_hf --seed 3", "use_hf", True),
        ("--use_hf False", "use_hf", False),
        ("--cross_entropy_loss_fusion 0", "cross_entropy_loss_fusion", False),
        ("--reward_funcs accuracy format", "reward_funcs", ["accuracy", "format"]),
        ("--reward_weights 1 0.5", "reward_weights", [1.0, 0.5]),
        ("--top_k -1", "top_k", -1),
        ("--scale_rewards none", "scale_rewards", "none"),
        ("--delta none", "delta", None),
        ("--seed 1 --seed 2", "seed", 2),
        ("--system 42", "system", "42"),
        ("--stop_words 1 </s>", "stop_words", ["1", "</s>"]),
        (
            "--megatron.layernorm_epsilon 1e-5 --megatron.fp8 hybrid",
            "megatron",
            {"layernorm_epsilon": 1e-5, "fp8": "hybrid"},
        ),
        ("--vllm.block_size 32 --vllm.enforce_eager", "vllm", {"block_size": 32, "enforce_eager": True}),
        ("--dataset a.jsonl#5 b", "dataset", ["a.jsonl#5", "b"]),
    ],
)
def test_command_line_values_are_typed(words, name, value):
    if name is None:
        with pytest.raises(ValueError, match="unknown option --learning_rate_is_not_it"):
            parse(["rlhf", "--rlhf_type", "grpo", *words.split()])
    else:
        assert getattr(parse(["rlhf", "--rlhf_type", "grpo", *words.split()]), name) == value


def test_sections_of_other_roles():
    config = parse("rlhf --rlhf_type grpo --rollout.num_engines 2 --reference.nproc=3 --reference.model /m".split())
    assert (config.rollout.num_engines, config.reference.nproc, config.reference.model) == (2, 3, "/m")
    assert parse(["rlhf", "--rlhf_type", "grpo", "--ref_model", "/m"]).reference.model == "/m"
    assert parse(["plan", "sft", "--seed", "7"]) == parse(["sft", "--seed", "7"])


def test_command_line_wins_over_yaml_wherever_it_stands(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "lr: 1e-6\nseed: 5\nuse-hf: true\nreward_funcs: accuracy\nrollout: {num_engines: 2}\nvllm: {block_size: 16}\n"
    )
    config = parse(["rlhf", "--rlhf_type", "grpo", "--seed", "6", "--config", str(file)])
    assert (config.lr, config.seed, config.use_hf, config.reward_funcs) == (1e-6, 6, True, ["accuracy"])
    assert (config.rollout.num_engines, config.vllm) == (2, {"block_size": 16})


@pytest.mark.parametrize(
    "words",
    [
        "--padding_free true",
        "--context_parallel_size 1",
        "--use_vllm true",
        "--sleep_level 2",
        "--moe_aux_loss_coeff 0.0",
        "--moe_grouped_gemm true",
        "--offload_bridge false",
        "--optimizer adam",
    ],
)
def test_an_unsupported_option_that_asks_for_nothing_is_let_pass(words):
    assert parse(["rlhf", "--rlhf_type", "grpo", *words.split()]) == Config(task="grpo")


def test_dependent_defaults():
    plain = resolve(Config(task="grpo"))
    assert (plain.lr, plain.beta, plain.loss_type, plain.epsilon_high) == (1e-5, 0.04, "grpo", 0.2)
    assert (plain.scale_rewards, plain.kl_in_reward, plain.truncation_strategy) == ("group", False, "left")
    assert (plain.steps_per_generation, plain.generation_batch_size, plain.merge_lora) == (1, 16, True)
    assert (plain.cosine_max_len, plain.soft_max_length) == (512, 512)
    assert resolve(plain) == plain
    rloo = resolve(Config(task="grpo", advantage_estimator="rloo"))
    assert (rloo.scale_rewards, rloo.kl_in_reward) == ("none", True)
    rpp = resolve(Config(task="grpo", advantage_estimator="reinforce_plus_plus"))
    assert (rpp.scale_rewards, rpp.kl_in_reward) == ("batch", True)
    lora = resolve(Config(task="sft", tuner_type="lora", save_safetensors=False))
    assert (lora.lr, lora.merge_lora, lora.truncation_strategy, lora.loss_scale) == (1e-4, False, "delete", "default")
    pt, dpo, kto = (resolve(Config(task=task)) for task in ("pt", "dpo", "kto"))
    assert (pt.loss_scale, dpo.loss_scale, dpo.beta, dpo.loss_type) == ("all", "last_round", 0.1, "sigmoid")
    assert (dpo.truncation_strategy, dpo.eval_steps, kto.loss_type) == ("delete", 500, "kto")
    given = resolve(
        replace(rloo, beta=0.0, kl_in_reward=False, epsilon_high=0.28, generation_batch_size=64, steps_per_generation=None)
    )
    assert (given.beta, given.kl_in_reward, given.epsilon_high, given.steps_per_generation) == (0.0, False, 0.28, 4)


def test_sequence_parallel_needs_tensor_parallel():
    assert not resolve(Config(task="sft", sequence_parallel=True)).sequence_parallel
    assert resolve(Config(task="sft", sequence_parallel=True, tensor_model_parallel_size=2)).sequence_parallel


def test_ranks_of_a_node_come_from_the_option_then_the_environment_then_the_machine(monkeypatch):
    config = Config(task="grpo", tensor_model_parallel_size=2)
    assert resolve(config).nproc_per_node == 2
    assert resolve(config, gpus_per_node=8).nproc_per_node == 8
    assert resolve(replace(config, vllm_mode="server", vllm_tensor_parallel_size=2), gpus_per_node=8).nproc_per_node == 6
    monkeypatch.setenv("NPROC_PER_NODE", "4")
    assert resolve(config, gpus_per_node=8).nproc_per_node == 4
    assert resolve(replace(config, nproc_per_node=6), gpus_per_node=8).nproc_per_node == 6
    monkeypatch.setenv("NPROC_PER_NODE", "many")
    with pytest.raises(ValueError, match="NPROC_PER_NODE=many"):
        resolve(config)


def test_lengths_and_dtype_come_from_the_model(tmp_path):
    write_model(tmp_path / "m", TINY)
    (tmp_path / "d.jsonl").write_text("{}\n")
    words = "--model m --dataset d.jsonl#1 --train_iters 1 --output_dir out"
    sft = load_config(["sft", *words.split(), "--packing", "--micro_batch_size", "2", "--global_batch_size", "4"])
    assert (sft.max_length, sft.packing_length, sft.micro_batch_tokens, sft.torch_dtype) == (
        2048,
        2048,
        None,
        "float32",
    )
    assert (sft.model, sft.dataset) == (str(tmp_path / "m"), [f"{tmp_path}/d.jsonl#1"])
    rlhf = load_config(["rlhf", *words.split(), "--rlhf_type", "grpo", "--reward_funcs", "accuracy"])
    assert (rlhf.max_length, rlhf.vllm_max_model_len) == (2048 - 512, 2048)
    short = load_config(["rlhf", *words.split(), *"--rlhf_type grpo --reward_funcs accuracy --max_length 100".split()])
    assert (short.max_length, short.vllm_max_model_len) == (100, 612)


def test_a_submitted_job_keeps_its_output_outside_the_copied_folder(monkeypatch):
    config = Config(task="sft", output_dir="out")
    assert resolve(config).output_dir == str(Path.cwd() / "out")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ValueError, match="--output_dir out is relative, but a submitted job runs in a temporary copy"):
        resolve(config)
    assert resolve(replace(config, output_dir="/data/out")).output_dir == "/data/out"
    monkeypatch.setenv("MEGARAY_OUTPUT_ROOT", "/shared")
    assert resolve(config).output_dir == "/shared/out"
    assert resolve(Config(task="sft")).output_dir == "/shared/runs"


def test_help_lists_the_options_of_a_task_with_their_defaults():
    grpo, sft, dpo = help_text("grpo"), help_text("sft"), help_of(["rlhf", "--help"])
    assert "--num_generations INT" in grpo and "--num_generations" not in sft
    assert "--split_dataset_ratio" in sft and "--split_dataset_ratio" not in grpo
    assert all("--packing BOOL" in help_text(task) for task in ALL) and "--packing BOOL" not in help_text("infer")
    assert "--label_smoothing" in dpo and "--label_smoothing" not in grpo
    assert "  --global_batch_size INT" in sft and "[16]" in next(
        line for line in sft.splitlines() if "--global_batch_size INT" in line
    )
    assert all(f"--{name} " in help_text() for name in supported())


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("rlhf.options, rlhf.plan, rlhf.check", {"torch", "ray", "vllm", "megatron", "swift", "transformers", "datasets"}),
        (
            "rlhf.run, rlhf.cluster, rlhf.roles, rlhf.grpo, rlhf.sft, rlhf.metrics",
            {"torch", "vllm", "megatron", "swift", "transformers"},
        ),
    ],
    ids=["reading a command", "the controller"],
)
def test_what_stays_light_imports_nothing_heavy(modules, heavy):
    code = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_bare_command_works_from_another_folder(tmp_path):
    write_model(tmp_path / "m", TINY)
    (tmp_path / "d.jsonl").write_text("{}\n" * 64)
    main = [sys.executable, str(Path(__file__).parent.parent / "rlhf" / "main.py")]
    words = "--rlhf_type grpo --model m --dataset d.jsonl --reward_funcs accuracy --num_train_epochs 1".split()
    done = subprocess.run([*main, "plan", "rlhf", *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "optimizer steps: 32 (1 epochs of 64 rows)" in done.stdout
    assert not (tmp_path / "runs").exists()
    wrong = subprocess.run([*main, "rlhf", "--lrr", "1"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stderr) == (2, "error: unknown option --lrr; did you mean --lr?\n")


def test_help_ends_quietly_when_nobody_reads_it():
    """As of `megaray --help | head`, which ends before all is written."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, str(MAIN), "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
