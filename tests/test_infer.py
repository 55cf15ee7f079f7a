"""`megaray infer`: what it answers is what transformers, with PEFT for an adapter, says to the same prompts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import command
import numpy as np
import pytest
import ray
from tiny import make_tiny_model

from actors.rollout import ENVIRONMENT, RolloutEngine
from rlhf.config import DEFAULTS, Config
from rlhf.records import Prompt
from rlhf.rollout import RolloutEngines

QUESTIONS = [f"what is {a}+{b}?" for a, b in ((1, 2), (30, 4), (5, 5), (12, 9), (7, 0), (8, 88))]
LIMIT = 24  # tokens of an answer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), head_dim=32)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> Path:
    """A LoRA checkpoint of every linear layer, far from no change."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = LoraConfig(r=4, lora_alpha=16, target_modules=layers, task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = get_peft_model(base, settings)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in tuned.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.1)
    tuned.save_pretrained(folder)
    return folder


class Reference:
    """Greedy answers of transformers, to prompts rendered by the tokenizer's own template."""

    def __init__(self, model: Path, adapter: Path | None = None):
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if adapter is not None:
            self.model = PeftModel.from_pretrained(self.model, adapter)

    def prompt(self, messages: list[dict]) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer(self, messages: list[dict]) -> str:
        import torch

        ids = torch.tensor([self.prompt(messages)])
        mask = torch.ones_like(ids)
        found = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=LIMIT, do_sample=False)
        return self.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def options(**given) -> list:
    defaults = {"template_backend": "jinja", "max_new_tokens": LIMIT, "vllm_max_model_len": 512, "vllm_enforce_eager": "true"}
    return [word for name, value in (defaults | given).items() for word in (f"--{name}", value)]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_dataset_is_answered_in_its_order_as_transformers_answers(model, tmp_path):
    data = tmp_path / "questions.jsonl"
    rows = [{"messages": [user(text)], "solution": str(place)} for place, text in enumerate(QUESTIONS)]
    system, answered = {"role": "system", "content": "be brief"}, {"role": "assistant", "content": "10"}
    rows[2]["messages"] = [system, *rows[2]["messages"], answered]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = options(model=model, val_dataset=data, output_dir=tmp_path, run_name="run")
    status, output = command.run("infer", *arguments, log=tmp_path / "log")
    assert status == 0, output
    path = tmp_path / "run" / "infer.jsonl"
    assert f"answers are in {path}" in output
    reference, found = Reference(model), rows_of(path)
    prompts = [[message for message in row["messages"] if message["role"] != "assistant"] for row in rows]
    answers = [reference.answer(prompt) for prompt in prompts]
    assert [row["response"] for row in found] == answers
    assert len(set(answers)) > 3
    assert [row["messages"] for row in found] == [
        [*prompt, {"role": "assistant", "content": answer}] for prompt, answer in zip(prompts, answers)
    ]
    assert [row["solution"] for row in found] == [row["solution"] for row in rows]
    assert {row["response_length"] for row in found} <= set(range(1, LIMIT + 1))


@pytest.fixture(scope="module")
def engines(local_ray, model, adapter) -> RolloutEngines:
    """One engine with the adapter."""
    defaults = DEFAULTS["infer"] | {"max_completion_length": LIMIT}
    config = Config(task="infer", model=str(model), adapters=[str(adapter)], vllm_max_model_len=512, **defaults)
    config = replace(config, vllm_enforce_eager=True)

    def spawn(index: int):
        kind = ray.remote(max_concurrency=1000)(RolloutEngine)
        options = {"num_cpus": 0, "runtime_env": {"env_vars": ENVIRONMENT}}
        return kind.options(**options).remote(config, index=index, load_weights=True)

    return RolloutEngines(spawn, num_engines=1, config=config)


def prompts_of(reference: Reference) -> list[Prompt]:
    ids = [np.array(reference.prompt([user(text)]), np.int32) for text in QUESTIONS]
    return [Prompt(index=place, token_ids=row, messages=[], columns={}) for place, row in enumerate(ids)]


def test_an_adapter_answers_as_with_peft(engines, model, adapter):
    tuned, base = Reference(model, adapter), Reference(model)
    groups = {group.prompt.index: group.texts[0] for group in engines.generate(prompts_of(tuned), n=1)}
    answers = [tuned.answer([user(text)]) for text in QUESTIONS]
    assert [groups[place] for place in range(len(QUESTIONS))] == answers
    assert answers != [base.answer([user(text)]) for text in QUESTIONS]


def test_streamed_pieces_are_the_answer(engines, model):
    prompts = prompts_of(Reference(model))
    whole = {group.prompt.index: group for group in engines.generate(prompts, n=1)}
    most = 0
    for prompt in prompts:
        *pieces, summary = engines.stream(prompt.token_ids)
        group = whole[prompt.index]
        assert "".join(pieces) == summary.texts[0] == group.texts[0]
        assert (summary.finish_reasons, summary.response_lengths) == (group.finish_reasons, group.response_lengths)
        most = max(most, len(pieces))
    assert most > 3


@pytest.mark.slow
def test_lines_of_a_pipe_are_one_conversation_until_clear(model, adapter, tmp_path):
    lines = f"{QUESTIONS[0]}\n\n{QUESTIONS[1]}\nclear\n{QUESTIONS[1]}\nexit\nnot asked\n"
    results = tmp_path / "out" / "answers.jsonl"
    arguments = options(adapters=adapter, result_path=results)
    status, output = command.run("infer", *arguments, log=tmp_path / "log", lines=lines)
    assert status == 0, output
    reference = Reference(model, adapter)
    first = [user(QUESTIONS[0])]
    first.append({"role": "assistant", "content": reference.answer(first)})
    second = [*first, user(QUESTIONS[1])]
    second.append({"role": "assistant", "content": reference.answer(second)})
    third = [user(QUESTIONS[1])]
    third.append({"role": "assistant", "content": reference.answer(third)})
    assert [row["messages"] for row in rows_of(results)] == [first, second, third]
    for conversation in (first, second, third):
        assert conversation[-1]["content"] in output


@pytest.mark.slow
def test_a_question_longer_than_the_engine_holds_is_said_and_the_next_one_answered(model, tmp_path):
    lines = f"{'long ' * 600}\n{QUESTIONS[0]}\n"
    arguments = options(model=model, result_path=tmp_path / "answers.jsonl", stream="false")
    status, output = command.run("infer", *arguments, log=tmp_path / "log", lines=lines)
    assert status == 0, output
    assert f"longer than {512 - LIMIT} tokens" in output
    assert [row["response"] for row in rows_of(tmp_path / "answers.jsonl")] == [Reference(model).answer([user(QUESTIONS[0])])]
