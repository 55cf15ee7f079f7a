"""What a wrong command is told: one line, with the numbers, before anything is loaded."""

# ruff: noqa: E501 - a table of whole messages

import json
from pathlib import Path

import pytest

from rlhf.options import load_config
from tests.model_json import TINY, write_model

BASE = "--model m --dataset d.jsonl --train_iters 2 --rlhf_type grpo --reward_funcs accuracy"


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    for name in ("NPROC_PER_NODE", "RAY_JOB_CONFIG_JSON_ENV_VAR", "MEGARAY_OUTPUT_ROOT", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "m", TINY)
    (tmp_path / "d.jsonl").write_text("{}\n")
    return tmp_path


def error_of(words: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(words.split())
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_base_of_these_commands_is_accepted():
    assert load_config(["rlhf", *BASE.split()]).global_batch_size == 16


def test_what_acts_on_a_ratio_is_noted_where_the_ratio_is_1(capsys):
    words = f"rlhf {BASE} --importance_sampling_level sequence".split()
    load_config(words)
    assert "note: delta and importance_sampling_level have no effect with one optimizer step" in capsys.readouterr().err
    load_config([*words, "--num_iterations", "2"])
    assert "note" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the first word is pt, sft, rlhf, infer, eval, rollout, export, plan or check, not ''"),
        ("rlfh --lr 1", "the first word is pt, sft, rlhf, infer, eval, rollout, export, plan or check, not 'rlfh'; did you mean rlhf?"),
        ("grpo --lr 1", "the first word is pt, sft, rlhf, infer, eval, rollout, export, plan or check, not 'grpo': write megaray rlhf --rlhf_type grpo"),
        ("seq_cls", "the first word is pt, sft, rlhf, infer, eval, rollout, export, plan or check, not 'seq_cls': write megaray sft --task_type seq_cls"),
        ("rlhf --rlhf_type dpi", "--rlhf_type dpi: choose from dpo, kto, rm, gkd, grpo; did you mean dpo?"),
        ("sft --rlhf_type grpo", "--rlhf_type belongs to rlhf: write megaray rlhf --rlhf_type grpo"),
        ("rlhf lr 1", "expected an option that starts with --, not 'lr'"),
        ("rlhf --rlhf_type grpo --num_generation 3", "unknown option --num_generation; did you mean --num_generations?"),
        ("rlhf --learning_rate 3", "unknown option --learning_rate; here it is --lr"),
        ("rlhf --lerning_rate 3", "unknown option --lerning_rate; did you mean --lr?"),
        ("infer --lerning_rate 3", "unknown option --lerning_rate; --help lists them"),
        ("rlhf --zzz 3", "unknown option --zzz; --help lists them"),
        ("rlhf --rlhf_type grpo --rollout.num_engine 2", "unknown option --rollout.num_engine; did you mean --rollout.num_engines?"),
        ("rlhf --megatron 2", "--megatron is a section: write --megatron.NAME VALUE"),
        ("sft --num_generations 4", "--num_generations is not used by sft; it belongs to grpo, eval"),
        ("sft --vllm.block_size 4", "--vllm is not used by sft; it belongs to grpo, gkd, infer, eval, rollout"),
        ("infer --lr 1", "--lr is not used by infer; it belongs to pt, sft, dpo, kto, rm, gkd, grpo, seq_cls, reranker, generative_reranker, embedding"),
        ("rollout --dataset d.jsonl", "--dataset is not used by rollout; it belongs to pt, sft, dpo, kto, rm, gkd, grpo, seq_cls, reranker, generative_reranker, embedding, infer, eval"),
        ("eval --stream true", "--stream is not used by eval; it belongs to infer"),
        ("infer --infer_backend pt", "--infer_backend is one of vllm, not 'pt'"),
        ("plan infer --model m", "there is no plan of infer: plan is for pt, sft and rlhf"),
        ("infer --rlhf_type grpo", "--rlhf_type belongs to rlhf: write megaray rlhf --rlhf_type grpo"),
        ("eval --packing true", "--packing is not used by eval; it belongs to pt, sft, dpo, kto, rm, gkd, grpo, seq_cls, reranker, generative_reranker, embedding"),
        ("rlhf --lr fast", "--lr takes a number, not 'fast'"),
        ("rlhf --lr nan", "--lr takes a number, not 'nan'"),
        ("rlhf --lr", "--lr takes one value, got none"),
        ("rlhf --lr 1 2", "--lr takes one value, got 2: 1 2"),
        ("rlhf --rlhf_type grpo --reward_funcs", "--reward_funcs takes one value or more, got none"),
        ("rlhf --save_steps 1.5", "--save_steps takes a whole number, not '1.5'"),
        ("rlhf --use_hf maybe", "--use_hf takes true or false, not 'maybe'"),
        ("rlhf --rlhf_type grpo --vllm_mode colocated", "--vllm_mode is one of colocate, server, not 'colocated'"),
        ("rlhf --report_to swanlab", "--report_to is one of tensorboard, wandb, none, not 'swanlab'"),
        ("rlhf --train_iters 0", "--train_iters must be at least 1, not 0"),
        ("rlhf --micro_batch_size -1", "--micro_batch_size must be at least 1, not -1"),
        ("rlhf --rlhf_type grpo --temperature -1", "--temperature must be at least 0, not -1.0"),
        ("rlhf --rlhf_type grpo --top_p 1.5", "--top_p must be at most 1, not 1.5"),
        ("rlhf --context_parallel_size 2", "option --context_parallel_size is known but not supported (only 1 is): context parallelism is not supported yet"),
        ("rlhf --padding_free false", "option --padding_free is known but not supported (only true is): rows are always packed without padding"),
        ("rlhf --teacher_model x", "--teacher.model is not used by dpo; it belongs to gkd"),
        ("rlhf --offload_bridge true", "option --offload_bridge is known but not supported (only false is): this kind of offloading is not supported yet"),
        ("rlhf --config", "--config needs a file: --config FILE.yaml"),
        ("rlhf --config nowhere.yaml", "--config nowhere.yaml: No such file or directory"),
    ],
)  # fmt: skip
def test_words_that_are_not_understood(words, message):
    assert error_of(words) == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model nowhere", "--model nowhere: no such folder (a hub id looks like Qwen/Qwen2.5-7B-Instruct)"),
        ("--model d.jsonl", "--model d.jsonl is a file: give the folder that holds config.json"),
        ("--global_batch_size 12", "global_batch_size 12 x steps_per_generation 1 = 12 responses is no multiple of num_generations 8: prompts a generation must be a whole number"),
        ("--global_batch_size 12 --steps_per_generation 3", "global_batch_size 12 x steps_per_generation 3 = 36 responses is no multiple of num_generations 8: prompts a generation must be a whole number"),
        ("--generation_batch_size 24", "generation_batch_size 24 must be a multiple of global_batch_size 16"),
        ("--generation_batch_size 32 --steps_per_generation 3", "generation_batch_size 32 is not global_batch_size 16 x steps_per_generation 3 = 48: give one of them"),
        ("--nproc_per_node 4 --micro_batch_size 8", "global_batch_size 16 must be a multiple of micro_batch_size 8 x 4 data-parallel ranks = 32 (ranks 4 / TP*PP 1 = 4)"),
        ("--nproc_per_node 32 --micro_batch_tokens 99", "global_batch_size 16 is less than the 32 data-parallel ranks: each needs a sequence"),
        ("--nproc_per_node 3 --tensor_model_parallel_size 2", "1 nodes x 3 ranks = 3 policy ranks is no multiple of tensor_model_parallel_size 2 x pipeline_model_parallel_size 1 = 2: set --nproc_per_node (or NPROC_PER_NODE)"),
        ("--lora_rank 64", "--lora_rank has no effect without LoRA, where all weights are trained: leave it out, or give --tuner_type lora"),
        ("--target_modules linear_qkv", "--target_modules has no effect without LoRA, where all weights are trained: leave it out, or give --tuner_type lora"),
        ("--tensor_model_parallel_size 3", "tensor_model_parallel_size 3 does not divide the model's 4 attention heads"),
        ("--pipeline_model_parallel_size 3", "pipeline_model_parallel_size 3 does not divide the model's 2 layers"),
        ("--megatron.layernorm_epsilonn 1e-5", "megatron.layernorm_epsilonn is no field of Megatron's model, optimizer or data-parallel config; did you mean megatron.layernorm_epsilon?"),
        ("--megatron.grad_reduce_in_fp23 false", "megatron.grad_reduce_in_fp23 is no field of Megatron's model, optimizer or data-parallel config; did you mean megatron.grad_reduce_in_fp32?"),
        ("--megatron.bf16 true", "megatron.bf16 is set by the run itself: use the option of its own, if there is one"),
        ("--vllm.load_format auto", "vllm.load_format is set by the run itself: use the option of its own, if there is one"),
        ("--vllm.max_num_seqs 2048", "vllm.max_num_seqs is set by the run itself: use the option of its own, if there is one"),
        ("--vllm.gpu_memory_utilization 0.5", "vllm.gpu_memory_utilization is set by the run itself: use the option of its own, if there is one"),
        ("--vllm_mode server --offload_model true", "--offload_model has no effect with vllm_mode server, where no GPU is shared: leave it out, or give --vllm_mode colocate"),
        ("--vllm.block_sizes 4", "vllm.block_sizes is no engine argument of vLLM; did you mean vllm.block_size?"),
        ("--vllm_tensor_parallel_size 3", "vllm_tensor_parallel_size 3 does not divide the model's 4 attention heads"),
        ("--vllm_tensor_parallel_size 2", "vllm_mode colocate has 1 policy ranks to share; 1 engines x vllm_tensor_parallel_size 2 need 2"),
        ("--nnodes 2 --nproc_per_node 3 --micro_batch_tokens 99 --vllm_tensor_parallel_size 2", "vllm_tensor_parallel_size 2 does not divide nproc_per_node 3: an engine's devices are those of policy ranks of one node"),
        ("--vllm.distributed_executor_backend ray", "vllm.distributed_executor_backend is set by the run itself: use the option of its own, if there is one"),
        ("--rollout.num_engines 2", "vllm_mode colocate has 1 policy ranks to share; 2 engines x vllm_tensor_parallel_size 1 need 2"),
        ("--rollout.num_engines 4 --rollout.engines_per_device 2", "vllm_mode colocate has 1 policy ranks to share; 4 engines, 2 on a device, need 2"),
        ("--rollout.num_engines 3 --rollout.engines_per_device 2", "rollout.num_engines 3 is no multiple of rollout.engines_per_device 2: leave num_engines out, or give 4"),
        ("--vllm_mode server --rollout.engines_per_device 2", "--rollout.engines_per_device has no effect with vllm_mode server, where no GPU is shared: leave it out, or give --vllm_mode colocate"),
        ("--nproc_per_node 2 --rollout.engines_per_device 2 --vllm_tensor_parallel_size 2", "rollout.engines_per_device 2 is for a model too small to keep a GPU busy, vllm_tensor_parallel_size 2 for one too large for it: leave one of them out"),
        ("--min_lr 1", "min_lr 1 is greater than lr 1e-05"),
        ("--lr_warmup_iters 2", "lr_warmup_iters 2 must be less than train_iters 2"),
        ("--lr_warmup_iters 1 --lr_warmup_fraction 0.5", "give --lr_warmup_iters or --lr_warmup_fraction, not both"),
        ("--recompute_granularity full", "recompute_granularity full also needs --recompute_method uniform and --recompute_num_layers 1"),
        ("--recompute_method uniform", "--recompute_method has no effect with recompute_granularity selective: leave it out, or give --recompute_granularity full"),
        ("--recompute_modules moe", "recompute_modules 'moe': choose from core_attn, layernorm, mlp"),
        ("--tuner_type lora --target_modules q_proj", "target_modules 'q_proj': choose from all-linear, linear_qkv, linear_proj, linear_fc1, linear_fc2 (linear_qkv: q, k and v; linear_proj: o; linear_fc1: gate and up; linear_fc2: down)"),
        ("--reward_weights 1 2", "2 reward_weights for 1 reward_funcs"),
        ("--temperature 0", "temperature 0 gives a prompt's responses no difference to learn from: use 1, say"),
        ("--num_generations 1", "num_generations 1 gives every response advantage 0: use at least 2"),
        ("--truncation_strategy right", "truncation_strategy right would cut the question's end: use left or delete"),
        ("--reward_funcs soft_overlong", "reward soft_overlong needs --soft_cache_length"),
        ("--reward_funcs soft_overlong --soft_cache_length 9 --soft_max_length 9", "soft_cache_length 9 must be below soft_max_length 9"),
        ("--delta 1.2", "delta 1.2 caps the ratio at or below the clip at 1 + epsilon_high = 1.2, and at 1 good responses teach nothing: give a larger one, 4 is usual"),
        ("--micro_batch_tokens 99 --micro_batch_size 2", "give --micro_batch_size or --micro_batch_tokens, not both: each sets what a micro batch holds"),
        ("--top_k 0", "top_k 0 leaves no token: use -1 for all"),
        ("--max_completion_length 2048", "max_completion_length 2048 leaves no room for a prompt: the model's limit is 2048 tokens"),
        ("--max_completion_length 99 --vllm_max_model_len 99", "max_completion_length 99 leaves no room for a prompt: vllm_max_model_len is 99 tokens"),
        ("--vllm_max_model_len 4096", "vllm_max_model_len 4096 is more than the model's limit of 2048 tokens"),
        ("--beta 0 --reference.nproc 1", "--reference.nproc has nothing to act on: the loss compares with no reference"),
        ("--reference.nproc 3 --reference.tensor_model_parallel_size 2", "reference.nproc 3 is more than the 1 policy ranks whose places it shares"),
        ("--finetune false", "--finetune false continues a run: say which, by --resume_from_checkpoint auto or a checkpoint folder"),
        ("--run_name a/b", "run_name 'a/b' is a folder's name, without slashes; its place is --output_dir"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(words, message):
    assert error_of(f"rlhf {BASE} {words}") == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sft --dataset d --train_iters 1", "--model is missing: a model folder, or a hub id such as Qwen/Qwen2.5-7B-Instruct"),
        ("sft --model m --train_iters 1", "--dataset is missing: files (.jsonl) or hub ids"),
        ("sft --model m --dataset d", "give --train_iters or --num_train_epochs: the run has no length"),
        ("sft --model m --dataset d --train_iters 1 --packing_length 9", "--packing_length has no effect without packing: leave it out, or give --packing true"),
        ("rlhf --rlhf_type grpo --model m --dataset d --train_iters 1 --packing --micro_batch_tokens 9", "give --packing or --micro_batch_tokens, not both: each packs rows without padding"),
        ("sft --model m --dataset d --train_iters 1 --packing --micro_batch_tokens 9", "give --packing or --micro_batch_tokens, not both: each packs rows without padding"),
        ("sft --model m --dataset d --train_iters 1 --packing --packing_length 9 --max_length 10", "packing_length 9 is less than max_length 10: a row must fit"),
        ("rlhf --model m --dataset d --train_iters 1 --loss_type robust --label_smoothing 0.5", "loss_type robust: with label_smoothing 0.5 the preferences say nothing; choose one below"),
        ("rlhf --model m --dataset d --train_iters 1 --discopop_tau 0.1", "--discopop_tau has no effect with loss_type sigmoid: leave it out, or give --loss_type discopop"),
        ("rlhf --model m --dataset d --train_iters 1 --f_alpha_divergence_coef 0.1", "--f_alpha_divergence_coef has no effect with f_divergence_type reverse_kl: leave it out, or give --f_divergence_type alpha_divergence"),
        ("infer", "--model is missing: a model folder, or a hub id such as Qwen/Qwen2.5-7B-Instruct, or --adapters CHECKPOINT"),
        ("rollout", "--model is missing: a model folder, or a hub id such as Qwen/Qwen2.5-7B-Instruct"),
        ("infer --adapters a b", "--adapters takes one checkpoint, got 2: a b"),
        ("infer --adapters m", "--adapters DIR/m: no adapter_config.json (No such file or directory): this is a whole model, give it as --model"),
        ("infer --adapters lost", "--adapters DIR/lost: its base model /lost/base is gone: give its place as --model"),
        ("infer --adapters dora", "DIR/dora/adapter_config.json: use_dora True is not supported: merge it, and give --model"),
        ("infer --model m --dataset d --val_dataset d", "give --dataset or --val_dataset, not both: they mean the same here"),
        ("infer --model m --result_path x.json", "--result_path x.json must end in .jsonl"),
        ("infer --model m --max_length 2048", "a prompt of max_length 2048 leaves no room to answer: an engine holds 2048 tokens"),
        ("infer --model m --vllm_tensor_parallel_size 8", "vllm_tensor_parallel_size 8 does not divide the model's 4 attention heads"),
        ("eval --model m", "--dataset is missing: files (.jsonl) or hub ids"),
        ("eval --model m --dataset d", "--reward_funcs is missing: accuracy, format, cosine, repetition, soft_overlong, or a plug-in's name"),
        ("eval --model m --dataset d --reward_funcs format --num_generations 4", "4 responses at temperature 0 would be equal: give --temperature too"),
        ("eval --model m --dataset d --result_path x.jsonl", "--result_path x.jsonl must end in .json; every response goes into a .jsonl beside it"),
        ("rollout --model m --rollout_name a/b", "rollout_name 'a/b' is a name, without slashes"),
        ("rlhf --rlhf_type grpo --model m --dataset d --train_iters 1", "--reward_funcs is missing: accuracy, format, cosine, repetition, soft_overlong, or a plug-in's name; or --reward_model"),
    ],
)  # fmt: skip
def test_what_is_missing(words, message, folder):
    lost = {"r": 8, "peft_type": "LORA", "base_model_name_or_path": "/lost/base"}
    for name, settings in {"lost": lost, "dora": lost | {"use_dora": True}}.items():
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps(settings))
        (folder / name / "adapter_model.safetensors").write_bytes(b"")
    assert error_of(words) == message.replace("DIR", str(folder))


def test_a_hub_id_that_cannot_be_had():
    message = error_of(f"rlhf {BASE} --use_hf --model nobody/nothing")
    assert message.startswith("--model nobody/nothing: no such folder here, and Hugging Face did not give it")


@pytest.mark.parametrize("name", ["./none", "../none"])
def test_a_relative_folder_is_not_looked_for_on_a_hub(name):
    assert (
        error_of(f"rlhf {BASE} --model {name}")
        == f"--model {name}: no such folder (a hub id looks like Qwen/Qwen2.5-7B-Instruct)"
    )


def test_broken_model_folders(folder):
    config = folder / "m" / "config.json"
    config.write_text('{"hidden_size": ')
    assert "m/config.json is not JSON: Expecting value: line 1 column 17" in error_of(f"rlhf {BASE}")
    config.write_text("[]")
    assert error_of(f"rlhf {BASE}").endswith("m/config.json: expected an object, found a list")
    config.unlink()
    assert error_of(f"rlhf {BASE}").endswith("m/config.json: No such file or directory; is this a model folder?")
    for key, value, message in (
        ("num_experts", 8, "qwen3 is a mixture-of-experts model; of these there are qwen2_moe, qwen3_moe"),
        ("vision_config", {}, "qwen3 is a multimodal model, which is not supported yet"),
        ("architectures", ["BertModel"], "m has no output layer for tokens (it is a ...Model), which grpo needs"),
        ("hidden_size", "wide", "config.json is broken: invalid literal for int() with base 10: 'wide'"),
        (
            "dtype",
            "float16",
            "the model's weights are float16, which is not trained in: give --torch_dtype bfloat16 or float32",
        ),
    ):
        config.write_text(json.dumps(TINY | {key: value}))
        assert error_of(f"rlhf {BASE}").endswith(message)
    config.write_text(json.dumps({key: value for key, value in TINY.items() if key != "intermediate_size"}))
    assert error_of(f"rlhf {BASE}").endswith("config.json lacks intermediate_size: qwen3 is not supported")


def test_an_adapter_as_model_points_to_the_merged_one(folder):
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    assert "give the model that merge_lora puts into adapter/merged" in error_of(f"rlhf {BASE} --model adapter")


def test_a_model_without_tokenizer_or_weights(folder):
    (folder / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x-1", "b": "x-2"}}))
    (folder / "m" / "x-1").write_bytes(b"")
    assert error_of(f"rlhf {BASE}") == f"{folder}/m lacks 1 of 2 weight files, the first is x-2"
    (folder / "m" / "model.safetensors.index.json").unlink()
    (folder / "m" / "model.safetensors").unlink()
    assert error_of(f"rlhf {BASE}") == f"{folder}/m has no weights (*.safetensors)"
    (folder / "m" / "tokenizer.json").unlink()
    assert error_of(f"rlhf {BASE}") == f"{folder}/m has no tokenizer (tokenizer.json or tokenizer.model): save it there too"


def test_a_plan_needs_neither_weights_nor_tokenizer(folder):
    (folder / "m" / "model.safetensors").unlink()
    (folder / "m" / "tokenizer.json").unlink()
    assert load_config(["rlhf", *BASE.split()], weights=False).model == f"{folder}/m"


def test_an_output_folder_that_cannot_be_written(folder):
    assert error_of(f"rlhf {BASE} --output_dir d.jsonl/x") == f"output_dir {folder}/d.jsonl/x: {folder}/d.jsonl is a file"
    assert error_of(f"rlhf {BASE} --output_dir /proc/x").startswith("output_dir /proc/x cannot be written: /proc: ")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: [1", "--config c.yaml is not YAML: "),
        ("- 3", "--config c.yaml: expected lines of `name: value`, found a list"),
        ("lrr: 3", "unknown option --lrr; did you mean --lr?"),
        ("rollout: {engines: 3}", "unknown option --rollout.engines; did you mean --rollout.num_engines?"),
        ("use_hf: 3", "--use_hf takes true or false, not '3'"),
        ("train_iters: true", "--train_iters takes a whole number, not 'True'"),
        ("train_iters: 2.5", "--train_iters takes a whole number, not '2.5'"),
        ("model: {a: 3}", "--model takes a text, not "),
    ],
)
def test_yaml_that_is_not_understood(folder, text, message):
    (folder / "c.yaml").write_text(text)
    assert error_of("rlhf --rlhf_type grpo --config c.yaml").startswith(message)
