"""Conversions between Hugging Face folders and Megatron checkpoints: real ranks, checked against transformers and PEFT."""

# ruff: noqa: E501 - a table of whole messages

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import command
import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from actors.hugging_face import EXAMPLE
from rlhf.checkpoint import Checkpoints
from rlhf.config import Config
from rlhf.export import _clear, export
from rlhf.options import load_config
from tests.policy_ranks import hugging_face, largest_difference, nll_loss, policy_config, random_rows, shards_of
from tests.row_batch import SPLITS, assert_same_weights, weights_of
from tests.tiny import make_tiny_model

LORA = {"tuner_type": "lora", "lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "lr": 1e-2}
TP2 = {"tensor_model_parallel_size": 2}
ROWS = random_rows(8)
TOKENS = ROWS.token_ids[0]


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("NPROC_PER_NODE", "RAY_JOB_CONFIG_JSON_ENV_VAR", "MEGARAY_OUTPUT_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", head_dim=32)


@pytest.fixture(scope="module")
def megatron(hosts, model, tmp_path_factory) -> Path:
    """`model` as `export --to_mcore` writes it, by two tensor ranks."""
    folder = tmp_path_factory.mktemp("megatron") / "tiny-mcore"
    exporter(hosts, "--model", model, "--to_mcore", "--tensor_model_parallel_size", 2).call("save_megatron", str(folder))
    return folder


@pytest.fixture(scope="module")
def lora(hosts, model, megatron, tmp_path_factory) -> dict[str, Path]:
    """One LoRA run of 2 steps from the Megatron checkpoint, saved without ("mcore") and with safetensors ("peft")."""
    output = tmp_path_factory.mktemp("lora")
    return {
        "mcore": trained(hosts, output / "without", model=megatron, mcore_model=str(megatron), save_safetensors=False, **LORA),
        "peft": trained(hosts, output / "with", model=megatron, mcore_model=str(megatron), **LORA),
    }


def exporter(hosts, *words):
    """The ranks that `megaray export WORDS` starts."""
    config = load_config(["export", *map(str, words)])
    return hosts.start(config, config.nproc_per_node, kind="Exporter")


def trained(hosts, output: Path, *, model: Path, **options) -> Path:
    """A checkpoint after 2 steps, written as a run writes it."""
    group = hosts.start(policy_config(model, **options), 1)
    for _ in range(2):
        group.train_step(shards_of(ROWS, ray.put(ROWS), SPLITS[1]), nll_loss)
    output.mkdir()
    checkpoints = Checkpoints(output, Config(task="sft", model=str(model), **options))
    return checkpoints.save(2, SimpleNamespace(on_all=group.call), {})


def logits_of(hf) -> np.ndarray:
    """[T, V] of TOKENS, from transformers."""
    with torch.no_grad():
        return hf(input_ids=torch.from_numpy(TOKENS.astype(np.int64))[None]).logits[0].float().numpy()


def logits_from(group) -> np.ndarray:
    return next(result for result in group.call("logits", TOKENS) if result is not None)


def disturbed(model: Path, folder: Path) -> Path:
    """`model` with one weight of its first layer changed."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    changed = weights_of(model)
    changed["model.layers.0.mlp.up_proj.weight"][3, 5] += 2
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "options", "ranks"),
    [
        pytest.param({}, "--tensor_model_parallel_size 2", "", id="qwen3, written by 2 tensor ranks"),
        pytest.param({"family": "Qwen2", "tie_word_embeddings": True}, "", "--pipeline_model_parallel_size 2", id="qwen2, read by 2 stages"),
        pytest.param({"vocab_size": 511}, "--tensor_model_parallel_size 2", "--pipeline_model_parallel_size 2", id="padded vocabulary"),
    ],
)  # fmt: skip
def test_to_megatron_and_back_gives_the_same_bits(hosts, tmp_path, family, options, ranks):
    model = make_tiny_model(tmp_path / "model", **family)
    writers = exporter(hosts, "--model", model, "--to_mcore", *options.split())
    writers.call("save_megatron", str(tmp_path / "mcore"))
    readers = exporter(hosts, "--mcore_model", tmp_path / "mcore", "--to_hf", *ranks.split())
    readers.call("save_hugging_face", str(tmp_path / "back"))
    assert_same_weights(weights_of(tmp_path / "back"), weights_of(model))
    hf = hugging_face(tmp_path / "back")
    token_ids = np.minimum(TOKENS, 510)
    with torch.no_grad():
        expected = hf(input_ids=torch.from_numpy(token_ids.astype(np.int64))[None]).logits[0].numpy()
    result = next(result for result in readers.call("logits", token_ids) if result is not None)
    assert result.shape == expected.shape
    assert np.abs(result - expected).max() <= 1e-5
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "back")(EXAMPLE) == AutoTokenizer.from_pretrained(model)(EXAMPLE)


def test_bfloat16_rounds_once_and_computes_in_float32_with_the_rounded_weights(hosts, model, tmp_path):
    writers = exporter(hosts, "--model", model, "--to_mcore", "--torch_dtype", "bfloat16")
    writers.call("save_megatron", str(tmp_path / "mcore"))
    assert json.loads((tmp_path / "mcore" / "config.json").read_text())["dtype"] == "bfloat16"
    readers = exporter(hosts, "--mcore_model", tmp_path / "mcore", "--to_hf")
    readers.call("save_hugging_face", str(tmp_path / "back"))
    rounded = {name: tensor.bfloat16() for name, tensor in weights_of(model).items()}
    assert_same_weights(weights_of(tmp_path / "back"), rounded)
    readers.call("compute_in", "float32")
    hf = hugging_face(model)
    hf.load_state_dict({name: tensor.float() for name, tensor in rounded.items()})
    assert np.abs(logits_from(readers) - logits_of(hf)).max() <= 1e-5


@pytest.mark.slow
def test_training_from_a_megatron_checkpoint_is_training_from_the_model(hosts, model, megatron):
    """Losses, gradient norms, and the weights that a float32 checkpoint gives a bfloat16 run."""
    shards = shards_of(ROWS, ray.put(ROWS), SPLITS[1])
    for options in ({}, {"torch_dtype": "bfloat16"} | TP2):
        runs = []
        for source in ({"model": model}, {"model": megatron, "mcore_model": str(megatron)}):
            group = hosts.start(policy_config(**source, **options), 2 if options else 1)
            runs.append([group.train_step(shards, nll_loss) for _ in range(2)])
        assert [step["loss"] for step in runs[0]] == pytest.approx([step["loss"] for step in runs[1]], abs=1e-6)
        assert runs[0] == runs[1]
        assert runs[0][1]["loss"] < runs[0][0]["loss"]


def test_a_frozen_reference_starts_from_the_megatron_checkpoint_too(hosts, model, megatron):
    shards, measured = shards_of(ROWS, ray.put(ROWS), SPLITS[1]), []
    for source in ({"model": model}, {"model": megatron, "mcore_model": str(megatron)}):
        measured.append(hosts.start(policy_config(**source), 1, frozen="reference").logprobs(shards))
    assert largest_difference(*measured) == 0


def test_a_checkpoint_without_safetensors_becomes_the_folder_it_would_have_had(hosts, model, tmp_path):
    without = trained(hosts, tmp_path / "without", model=model, save_safetensors=False)
    complete = trained(hosts, tmp_path / "with", model=model)
    assert not list(without.glob("*.safetensors"))
    readers = exporter(hosts, "--mcore_model", without, "--to_hf")
    readers.call("save_hugging_face", str(tmp_path / "hf"))
    assert_same_weights(weights_of(tmp_path / "hf"), weights_of(complete))
    assert np.array_equal(logits_of(hugging_face(tmp_path / "hf")), logits_of(hugging_face(complete)))
    again = hosts.start(policy_config(without, mcore_model=str(without)), 1)
    first = again.train_step(shards_of(ROWS, ray.put(ROWS), SPLITS[1]), nll_loss)
    continued = hosts.start(policy_config(complete), 1)
    assert first == continued.train_step(shards_of(ROWS, ray.put(ROWS), SPLITS[1]), nll_loss)


def test_a_checkpoint_of_another_model_is_told_so(hosts, megatron, tmp_path):
    other = make_tiny_model(tmp_path / "other", head_dim=32, intermediate_size=256)
    with pytest.raises(ValueError, match=f"{megatron}/mcore cannot be read as the model of {other}/config.json: Global shape"):
        exporter(hosts, "--mcore_model", megatron, "--to_hf", "--model", other)


@pytest.mark.slow
def test_an_adapters_checkpoint_is_merged_into_the_base_that_it_records(hosts, model, megatron, lora, tmp_path):
    """Its base is a Megatron checkpoint too; PEFT merges what the same run wrote for transformers."""
    from peft import PeftModel

    assert not list(lora["mcore"].glob("*.safetensors"))
    readers = exporter(hosts, "--mcore_model", lora["mcore"], "--to_hf", *["--tensor_model_parallel_size", 2])
    readers.call("save_hugging_face", str(tmp_path / "hf"))
    in_peft = PeftModel.from_pretrained(hugging_face(model), lora["peft"]).merge_and_unload()
    expected = dict(in_peft.state_dict())
    result = weights_of(tmp_path / "hf")
    assert largest_difference(result, {name: expected[name] for name in result}) <= 1e-6
    assert largest_difference(result, weights_of(model)) > 1e-3
    assert np.abs(logits_from(readers) - logits_of(in_peft)).max() <= 1e-5
    with pytest.raises(ValueError, match=f"the base model {megatron} is a Megatron checkpoint: convert it first"):
        load_config(f"export --adapters {lora['peft']} --merge_lora true".split())
    given = exporter(hosts, "--mcore_model", lora["mcore"], "--to_hf", "--model", model)
    given.call("save_hugging_face", str(tmp_path / "given"))
    assert_same_weights(weights_of(tmp_path / "given"), weights_of(lora["peft"] / "merged"))


def test_merge_lora_is_pefts_merge_also_of_adapters_that_megatron_cannot_hold(local_ray, model, tmp_path, capsys):
    """An adapter on q_proj alone, as other programs make them: W + alpha / rank * B A."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(hugging_face(model), settings).save_pretrained(tmp_path / "adapter")
    words = f"export --adapters {tmp_path}/adapter --merge_lora true --output_dir out --test_convert_precision true"
    config = load_config(words.split())
    assert (config.model, config.torch_dtype) == (str(model), "float32")
    assert export(config) == 0
    assert capsys.readouterr().out.count("logits in float32, ") == 2
    adapter, expected = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), weights_of(model)
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        expected[f"{name}.weight"] += 6 / 4 * b @ a
    assert largest_difference(weights_of(tmp_path / "out"), expected) <= 1e-6
    assert largest_difference(weights_of(tmp_path / "out"), weights_of(model)) > 1e-2
    assert (tmp_path / "out" / "chat_template.jinja").exists()


@pytest.mark.slow
def test_grpo_from_a_megatron_checkpoint(model, megatron, tmp_path):
    """Engines, which learn the tensors' names from the checkpoint, and the reference: the run is that from the model."""
    lines = [json.dumps({"messages": [{"role": "user", "content": f"{i}+1="}]}) for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    options = "--rlhf_type grpo --dataset rows.jsonl --template_backend jinja --train_iters 2 --global_batch_size 8 --num_generations 4 --lr 1e-3 --report_to none"
    options += " --reward_funcs repetition --repetition_n_grams 1 --max_completion_length 12 --max_length 64 --vllm_enforce_eager true --deterministic true"
    runs = []
    for name, source in {"with": f"--model {model}", "without": f"--mcore_model {megatron} --save_safetensors false"}.items():
        status, text = command.run("rlhf", *source.split(), "--run_name", name, *options.split(), log=tmp_path / f"{name}.log")
        assert status == 0, text
        rows = command.metrics(tmp_path / "runs" / name)
        runs.append([{key: row[key] for key in ("reward", "loss", "kl", "grad_norm")} for row in rows])
    assert runs[0] == runs[1]
    assert runs[0][0]["kl"] == pytest.approx(0, abs=1e-6) and runs[0][1]["kl"] > 1e-5


def test_a_command_converts_and_a_disturbed_weight_is_found(local_ray, model, tmp_path, capsys):
    words = f"export --model {model} --use_hf --to_mcore true --output_dir {tmp_path}/mcore --test_convert_precision true"
    assert export(load_config(words.split())) == 0
    assert capsys.readouterr().out.count("logits in float32, ") == 2
    wrong = disturbed(model, tmp_path / "wrong")
    words = f"export --model {wrong} --mcore_model {tmp_path}/mcore --test_convert_precision true"
    assert export(load_config(words.split())) == 1
    assert "error: the models differ: mean difference of their logits" in capsys.readouterr().err


def test_exist_ok_takes_the_old_weights_out_and_leaves_the_rest(tmp_path):
    old = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "manifest.json", "mcore/common.pt"]
    (tmp_path / "mcore").mkdir()
    for name in (*old, "notes.txt"):
        (tmp_path / name).write_text("{}")
    _clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "nothing to do: give --to_mcore true, --to_hf true, --merge_lora true, or --test_convert_precision true with --model and --mcore_model to compare the two"),
        ("--model m --test_convert_precision true", "nothing to do: give --to_mcore true, --to_hf true, --merge_lora true, or --test_convert_precision true with --model and --mcore_model to compare the two"),
        ("--model m --to_mcore --to_hf", "give --to_mcore or --to_hf, not both: they are opposite directions"),
        ("--to_mcore", "--to_mcore needs --model: a Hugging Face folder, or a hub id"),
        ("--mcore_model mc --to_mcore", "--to_mcore writes a Megatron checkpoint, and --mcore_model is one: give --model"),
        ("--model m --to_hf", "--to_hf needs --mcore_model: the folder with the Megatron checkpoint"),
        ("--mcore_model mc --to_hf --merge_lora false", "--to_hf merges an adapter into its base: leave out --merge_lora false"),
        ("--mcore_model nowhere --to_hf", "--mcore_model nowhere: no such folder"),
        ("--mcore_model m --to_hf", "--mcore_model m holds no mcore/: give what `megaray export --to_mcore true` wrote, or a run's checkpoint-N"),
        ("--mcore_model swift --to_hf", "--mcore_model swift was written by ms-swift: give the Hugging Face folder it came from as --model"),
        ("--mcore_model run --to_hf", "--mcore_model run is a run: name one of its checkpoints (checkpoint-2)"),
        ("--mcore_model bare --to_hf", "{}/bare has no config.json: give the Hugging Face folder that the model was made from as --model"),
        ("--mcore_model mc --to_hf", "{}/mc has no tensors.json: give the Hugging Face folder that the model was made from as --model"),
        ("--mcore_model run/checkpoint-2 --to_hf", "the base model of {}/run/checkpoint-2 is not found, give it as --model: --model /gone/base: no such folder (a hub id looks like Qwen/Qwen2.5-7B-Instruct)"),
        ("--mcore_model run/checkpoint-2 --model m --test_convert_precision", "--mcore_model run/checkpoint-2 holds an adapter alone: --to_hf true --test_convert_precision true merges and compares it"),
        ("--model mc --to_mcore", "{}/mc has no weights (*.safetensors): it holds a Megatron checkpoint, give it as --mcore_model"),
        ("--model m --to_mcore --output_dir full", "output_dir {}/full is not empty: choose another, or replace its weights with --exist_ok true"),
        ("--model m --to_mcore --output_dir m --exist_ok", "output_dir {}/m is the model that is read: choose another"),
        ("--mcore_model whole --to_hf --output_dir full/file", "output_dir {}/full/file: {}/full/file is a file"),
        ("--model m --to_mcore --tensor_model_parallel_size 3", "tensor_model_parallel_size 3 does not divide the model's 4 attention heads"),
        ("--adapters p", "--adapters alone asks for nothing: add --merge_lora true"),
        ("--adapters p q --merge_lora", "--adapters takes one folder here, got 2"),
        ("--merge_lora true", "--merge_lora true needs --adapters, or the --mcore_model of a run and --to_hf true"),
        ("--adapters p --merge_lora --mcore_model mc", "--adapters and --mcore_model: merge the adapter first (--merge_lora true), then convert the result"),
        ("--adapters run/checkpoint-2 --merge_lora", "--adapters run/checkpoint-2 holds no PEFT adapter (adapter_config.json); its mcore/ is converted by --mcore_model run/checkpoint-2 --to_hf true"),
        ("--adapters p --merge_lora", "--adapters p has no weights (adapter_model.safetensors or adapter_model.bin)"),
        ("--model m --to_mcore --lr 1", "--lr is not used by export; it belongs to pt, sft, dpo, kto, rm, gkd, grpo, seq_cls, reranker, generative_reranker, embedding"),
        ("--model m --to_mcore --test_convert_dtype int8", "--test_convert_dtype is one of float32, bfloat16, not 'int8'"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_one_line(tmp_path, words, message):
    assert error_of("export " + words, tmp_path) == message.replace("{}", str(tmp_path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("plan export --model m --to_mcore", "there is no plan of export: plan is for pt, sft and rlhf"),
        ("sft --dataset d.jsonl --train_iters 1 --mcore_model m", "--mcore_model m holds no mcore/: give what `megaray export --to_mcore true` wrote, or a run's checkpoint-N"),
        ("sft --dataset d.jsonl --train_iters 1 --mcore_model bare --model mc", "{}/mc has no tensors.json: give the Hugging Face folder that the model was made from as --model"),
        ("sft --dataset d.jsonl --train_iters 1 --mcore_model run/checkpoint-2", "--mcore_model run/checkpoint-2 holds an adapter alone: `megaray export --mcore_model run/checkpoint-2 --to_hf true` merges it into a model to start from; --resume_from_checkpoint continues its run"),
        ("sft --model m --to_hf", "--to_hf is not used by sft; it belongs to export"),
        ("sft --mcore_adapter a", "option --mcore_adapter is known but not supported: `export --mcore_model CHECKPOINT --to_hf true` merges an adapter's checkpoint too"),
    ],
)  # fmt: skip
def test_a_wrong_run_is_one_line(tmp_path, words, message):
    assert error_of(words, tmp_path) == message.replace("{}", str(tmp_path))


def error_of(words: str, folder: Path) -> str:
    """What a command says in a folder with a model, Megatron checkpoints (of which only what is looked at is there), a PEFT adapter."""
    shape = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 2, "hidden_size": 64,
             "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}  # fmt: skip
    run = {
        "config": {
            "task": "sft",
            "num_labels": None,
            "problem_type": None,
            "tuner_type": "lora",
            "lora_rank": 8,
            "lora_alpha": 32,
            "target_modules": ["all-linear"],
            "modules_to_save": [],
            "model": "/gone/base",
        }
    }
    files = {"m/config.json": shape, "m/tokenizer.json": {}, "m/model.safetensors": {}, "mc/config.json": shape, "mc/tokenizer.json": {},
             "mc/mcore/metadata.json": {}, "whole/config.json": shape, "whole/tokenizer.json": {}, "whole/tensors.json": {},
             "whole/mcore/metadata.json": {}, "bare/mcore/metadata.json": {}, "full/file": {}, "p/adapter_config.json": {}, "d.jsonl": {},
             "run/checkpoint-2/mcore/metadata.json": {}, "run/checkpoint-2/controller.json": run,
             "swift/latest_checkpointed_iteration.txt": {}, "q/adapter_config.json": {}}  # fmt: skip
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError) as caught:
        load_config(words.split())
    message = str(caught.value)
    assert "\n" not in message
    return message
