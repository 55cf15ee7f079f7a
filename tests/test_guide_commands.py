"""Every command of the Megatron-SWIFT training guide, run to its end on two cores, with a checkpoint that loads.

`here(...)` says what differs from the guide: models and data that are here, at most two ranks, short rows, small batches.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command
import pytest
from tiny import make_tiny_model, make_tiny_moe

from tests import guide
from tests.guide import here
from tests.model_json import write_model

slow = pytest.mark.slow
QWEN2 = {"family": "Qwen2", "hidden_size": 128, "head_dim": 32, "max_position_embeddings": 1024}
SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."  # Qwen2.5's, of conversations without one
QUESTION = "what is 5+5?"
SMALL = {"max_length": 256, "global_batch_size": 4}
GPU_KERNELS = ("moe_permute_fusion", "attention_backend")  # refused without GPUs: see the last tests


@dataclass(frozen=True, kw_only=True)
class Place:
    """A working folder with what the guide's commands name."""

    folder: Path
    model: Path
    base: Path
    teacher: Path
    experts: Path

    def run(self, line: str, *, lines: str = "", address: str = "local", **environment: str) -> str:
        """The output of a command that must succeed."""
        log = self.folder / "log"
        process = command.start_in_shell(line, log=log, address=address, **environment)
        status, output = command.ended(process, log=log, lines=lines)
        assert status == 0, f"{line}\n{output[-6000:]}"
        return output

    def refused(self, line: str) -> str:
        """The last line of a command that is refused before anything starts."""
        log = self.folder / "log"
        status, output = command.ended(command.start_in_shell(line, log=log), log=log, timeout=30)
        assert status == 2, output
        return output.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("guide")
    questions = [f"what is {a}+{a}?" for a in range(24)]
    asked = [{"messages": [{"role": "user", "content": question}]} for question in questions]
    answered = [{"messages": [*row["messages"], assistant(f"the answer is {2 * a}.")]} for a, row in enumerate(asked)]
    write(folder / "zh.jsonl", answered)
    write(folder / "en.jsonl", answered)
    write(folder / "text.jsonl", [{"messages": [assistant(f"{question} the answer is 3. " * 4)]} for question in questions])
    write(folder / "grpo.jsonl", [row | {"solution": "1"} for row in asked[:3]])
    write(folder / "dpo.jsonl", [row | {"rejected_response": "the user is 7?"} for row in answered[:8]])
    return Place(
        folder=folder,
        model=taught_to_answer(make_tiny_model(folder / "Qwen2.5-7B-Instruct", **QWEN2), questions),
        base=make_tiny_model(folder / "Qwen2.5-7B", **QWEN2),
        teacher=make_tiny_model(folder / "Qwen2.5-72B-Instruct", seed=1, num_hidden_layers=3, **QWEN2),
        experts=make_tiny_moe(folder / "Qwen3-30B-A3B-Instruct-2507", num_hidden_layers=3),
    )


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rendered(question: str) -> str:
    """A prompt, by Qwen2.5's chat template."""
    turns = [("system", SYSTEM), ("user", question)]
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


def taught_to_answer(folder: Path, questions: list[str]) -> Path:
    """Trained to say 1 or 2, each half of the time: GRPO on the solution 1 then has something to learn in every step."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(60):
        text = rendered(questions[step % len(questions)])
        rows = [tokenizer(text + answer + "<|im_end|>", return_tensors="pt")["input_ids"] for answer in "12"]
        logits = model(torch.cat(rows)).logits[:, -3:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.cat(rows)[:, -2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.4, loss  # ln(2) / 2: one of two digits, then the end
    model.save_pretrained(folder)
    return folder


def last_run(place: Place, output_dir: str) -> Path:
    """The newest run's folder."""
    return max((place.folder / output_dir).iterdir(), key=lambda folder: folder.stat().st_mtime)


def logits_of(folder: Path, adapter: Path | None = None) -> Any:
    """[T, V] of a fixed text, in float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 45)[None]).logits[0]


def weights_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def assert_trained(run: Path, model: Path, *, steps: int) -> Path:
    """All weights have moved, none further than Adam can, and the logits are finite and others; the last checkpoint.

    One step of Adam moves a weight by about the learning rate: exactly in the first step, and by at most 1.2 of it in later ones
    with beta1 0.9 and beta2 0.95; decay adds a tenth of the weight.
    """
    import torch

    checkpoint, lrs = run / f"checkpoint-{steps}", [row["lr"] for row in command.metrics(run)]
    assert len(lrs) == steps
    before, after = weights_of(model), weights_of(checkpoint)
    assert before.keys() == after.keys()
    moved = {name: (after[name] - weight).abs().max().item() for name, weight in before.items()}
    assert [name for name, distance in moved.items() if distance == 0] == []
    assert max(lrs) < max(moved.values()) < 1.5 * sum(lrs)
    old, new = logits_of(model), logits_of(checkpoint)
    assert torch.isfinite(new).all() and not torch.equal(old, new)
    return checkpoint


def assert_adapter_trained(run: Path, model: Path, *, steps: int, matrices: int) -> None:
    """An adapter alone, whose B have left 0 as `assert_trained` says; with it the logits are finite and others.

    B of an expert stays 0 when no token of so few goes to it.
    """
    import torch
    from safetensors.torch import load_file

    checkpoint, lrs = run / f"checkpoint-{steps}", [row["lr"] for row in command.metrics(run)]
    assert len(lrs) == steps
    assert not (checkpoint / "merged").exists() and not list(checkpoint.glob("model*.safetensors"))
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    moved = {name: weight.abs().max().item() for name, weight in adapter.items() if "lora_B" in name}
    still = [name for name, distance in moved.items() if distance == 0]
    assert len(adapter) == 2 * matrices and len(moved) == matrices
    assert max(lrs) < max(moved.values()) < 1.5 * sum(lrs)
    assert len(still) < 0.1 * matrices and all(".experts." in name for name in still)
    old, new = logits_of(model), logits_of(model, checkpoint)
    assert torch.isfinite(new).all() and not torch.equal(old, new)


@pytest.fixture(scope="module")
def dense_sft(place) -> Path:
    data = ["zh.jsonl#6", "en.jsonl#6"]
    place.run(here(guide.DENSE_SFT, model=place.model, dataset=data, micro_batch_size=4, **SMALL))
    return last_run(place, "megatron_output/Qwen2.5-7B-Instruct")


@slow
def test_dense_sft(place, dense_sft):
    assert_trained(dense_sft, place.model, steps=3)


@pytest.fixture(scope="module")
def lora_sft(place) -> Path:
    data = ["zh.jsonl#6", "en.jsonl#6"]
    place.run(here(guide.LORA_SFT, model=place.model, dataset=data, micro_batch_size=4, **SMALL))
    return last_run(place, "megatron_output/Qwen2.5-7B-Instruct")


@slow
def test_lora_sft(place, lora_sft):
    assert_adapter_trained(lora_sft, place.model, steps=3, matrices=2 * 7)


@slow
def test_moe_sft(place):
    """In two stages, of 2 and 1 layers."""
    sizes = {"tensor_model_parallel_size": 1, "expert_model_parallel_size": 1, "decoder_first_pipeline_num_layers": 2}
    small = {"NPROC_PER_NODE": 2, "max_length": 64}
    place.run(here(guide.MOE_SFT, model=place.experts, dataset="zh.jsonl#20", without=GPU_KERNELS, **sizes, **small))
    run = last_run(place, "megatron_output/Qwen3-30B-A3B")
    assert min(row["load_balancing_loss"] for row in command.metrics(run)) >= 1
    assert_trained(run, place.experts, steps=3)  # 20 rows, of which one or two make a pack: 9 to 12 packs


@slow
def test_moe_lora(place):
    """Experts split over two ranks."""
    small = {"max_length": 256, "micro_batch_size": 2, "global_batch_size": 4}
    place.run(here(guide.MOE_LORA, model=place.experts, dataset="zh.jsonl#12", without=GPU_KERNELS, **small))
    run = last_run(place, "megatron_output/Qwen3-30B-A3B")
    assert_adapter_trained(run, place.experts, steps=3, matrices=3 * (4 + 8 * 3))  # of attention, of 8 experts


@slow
def test_pretraining(place):
    small = {"max_length": 128, "micro_batch_size": 2, "global_batch_size": 4}
    place.run(here(guide.PRETRAINING, model=place.base, dataset="text.jsonl", NPROC_PER_NODE=2, **small))
    run = last_run(place, "megatron_output/pretrain")
    assert_trained(run, place.base, steps=4)


@slow
def test_grpo(place):
    small = {"max_completion_length": 8, "NPROC_PER_NODE": 2}
    place.run(here(guide.GRPO, model=place.model, dataset="grpo.jsonl", **small))
    run = last_run(place, "megatron_output/grpo")
    assert_grpo(run)
    assert_trained(run, place.model, steps=3)


def assert_grpo(run: Path) -> None:
    rows = command.metrics(run)
    assert max(row["rollout_train_logprob_diff"] for row in rows) < 1e-4
    assert [row["weight_version"] for row in rows] == [1, 2, 3]
    assert 0 < sum(row["reward"] for row in rows) / 3 < 1


@slow
def test_grpo_with_a_rollout_server(place):
    temporary = tempfile.mkdtemp(prefix="mr", dir="/tmp")  # the two terminals' own; a short path: Ray's sockets lie in it
    log = place.folder / "rollout.log"
    line = here(guide.ROLLOUT, model=place.model, vllm_tensor_parallel_size=2)
    terminal = command.start_in_shell(line, log=log, address="", TMPDIR=temporary)
    try:
        command.wait_until(lambda: "ready: " in log.read_text(), terminal, log=log)
        length = {"num_train_epochs": 1}  # the guide's command has none, which megatron refuses too
        line = here(guide.GRPO_SERVER, model=place.model, dataset="grpo.jsonl", NPROC_PER_NODE=2, added=length)
        output = place.run(line, address="", TMPDIR=temporary)
        terminal.send_signal(signal.SIGINT)
        assert terminal.wait(60) == 0
    finally:
        terminal.kill()
        shutil.rmtree(temporary, ignore_errors=True)
    assert "using the rollout engines named rollout of `megaray rollout`: 1" in output
    run = last_run(place, "megatron_output/grpo")
    assert_grpo(run)
    assert_trained(run, place.model, steps=3)


@slow
def test_dpo(place):
    place.run(here(guide.DPO, model=place.model, dataset="dpo.jsonl", micro_batch_size=2, global_batch_size=4))
    run = last_run(place, "megatron_output/dpo")
    assert command.metrics(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # policy and reference are equal
    assert_trained(run, place.model, steps=2)


@slow
def test_gkd(place):
    small = {"max_completion_length": 8, "micro_batch_size": 2, "global_batch_size": 4}
    place.run(here(guide.GKD, model=place.model, teacher_model=place.teacher, dataset="zh.jsonl", **small))
    run = last_run(place, "megatron_output/gkd")
    own = [row for row in command.metrics(run) if row["on_policy"]]
    assert 0 < len(own) < 6 and max(row["rollout_train_logprob_diff"] for row in own) < 1e-4
    assert_trained(run, place.model, steps=6)


@slow
def test_infer_full(place, dense_sft):
    line = here(guide.INFER_FULL, model=dense_sft / "checkpoint-3", max_new_tokens=8)
    assert answer(dense_sft / "checkpoint-3") in place.run(line, lines=QUESTION).splitlines()


@slow
def test_infer_lora(place, lora_sft):
    line = here(guide.INFER_LORA, adapters=lora_sft / "checkpoint-3", max_new_tokens=8)
    assert answer(place.model, lora_sft / "checkpoint-3") in place.run(line, lines=QUESTION).splitlines()


def answer(folder: Path, adapter: Path | None = None) -> str:
    """Transformers' greedy one to QUESTION."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    prompt = tokenizer(rendered(QUESTION), return_tensors="pt")
    found = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(found[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def mcore_model(place) -> Path:
    output = place.run(here(guide.TO_MCORE, model=place.model))
    assert "logits in float32" in output  # of --test_convert_precision, which also decides the exit status
    return place.folder / "Qwen2.5-7B-Instruct-mcore"


@pytest.fixture(scope="module")
def sft_from_mcore(place, mcore_model) -> Path:
    """The guide's `...` are the other options of its SFT command."""
    _, _, others = guide.parts(guide.DENSE_SFT)
    for name in ("model", "use_hf", "save_safetensors"):
        del others[name]
    others |= SMALL | {"dataset": "zh.jsonl#8", "micro_batch_size": 4, "output_dir": "megatron_output/model"}
    place.run(here(guide.SFT_FROM_MCORE, save_safetensors="false", added=others))
    return last_run(place, "megatron_output/model")


@slow
def test_to_mcore(place, mcore_model):
    assert (mcore_model / "mcore" / "metadata.json").exists() and not list(mcore_model.glob("*.safetensors"))
    assert json.loads((mcore_model / "config.json").read_text())["dtype"] == "bfloat16"


@slow
def test_sft_from_mcore_and_back(place, sft_from_mcore):
    """The base in bfloat16, where steps of this size show in the smallest weights alone, and move none by more than a bit."""
    import torch

    checkpoint, lrs = sft_from_mcore / "checkpoint-2", [row["lr"] for row in command.metrics(sft_from_mcore)]
    assert not list(checkpoint.glob("*.safetensors"))
    output = place.run(here(guide.TO_HF, mcore_model=checkpoint, output_dir=f"{checkpoint}-hf"))
    assert "logits in float32" in output
    result = Path(f"{checkpoint}-hf")
    before, after = weights_of(place.model), weights_of(result)
    assert before.keys() == after.keys()
    moved = {name: (after[name].float() - weight.bfloat16().float()).abs() for name, weight in before.items()}
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
    assert len(lrs) == 2 and sum(distance.count_nonzero() for distance in moved.values()) > 0
    assert all((distance <= 1.5 * sum(lrs) + before[name].abs() / 128).all() for name, distance in moved.items())
    assert torch.isfinite(logits_of(result)).all()


@pytest.mark.parametrize(
    ("without", "reason"),
    [
        ((), "moe_permute_fusion true needs GPUs, there are none: it is a CUDA kernel of Transformer Engine's"),
        (GPU_KERNELS[:1], "attention_backend flash needs GPUs, there are none: FlashAttention is a CUDA kernel"),
    ],
)
@pytest.mark.parametrize("name", ["MOE_SFT", "MOE_LORA"])
def test_kernels_for_gpus_are_refused_by_name(place, name, without, reason):
    changes = {"decoder_first_pipeline_num_layers": 2} if name == "MOE_SFT" else {}
    output = place.refused(here(getattr(guide, name), model=place.experts, dataset="zh.jsonl", without=without, **changes))
    assert output == f"error: {reason}; leave it out"


def test_the_multimodal_command_is_refused(place):
    described = {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"], "vision_config": {}}
    model = write_model(place.folder / "Qwen3-VL-8B-Instruct", described)
    line = here(guide.MULTIMODAL_SFT, model=model, dataset="zh.jsonl")
    assert place.refused(line) == f"error: {model}: qwen3_vl is a multimodal model, which is not supported yet"
