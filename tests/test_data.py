"""The data worker, in this process, with real ms-swift. Expected ids come from the tokenizer's own chat template."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from actors.encoding import EMPTY, EQUAL, TOO_LONG, UNTRAINED
from rlhf.config import Config
from tests.tiny import make_tiny_model, make_tokenizer


@pytest.fixture(scope="module", autouse=True)
def dataset_cache(tmp_path_factory):
    """Keep ms-swift's dataset cache out of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELSCOPE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model folder as far as data needs it: tokenizer and config.json, and a name that ms-swift does not know."""
    folder = tmp_path_factory.mktemp("model") / "mine"
    make_tokenizer().save_pretrained(folder)
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(count: int) -> list[dict]:
    """`count` different rows: question, answer, and columns of their own."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"what is {i}+{i}?"},
                {"role": "assistant", "content": f"{2 * i}"},
            ],
            "solution": str(2 * i),
            "level": i,
        }
        for i in range(count)
    ]


def started(model: Path, dataset: list[str], **options):
    from actors.data import DataWorker

    settings = {"task": "sft", "template_backend": "jinja", "dataset_shuffle": False} | options
    worker = DataWorker(Config(model=str(model), dataset=dataset, **settings))
    return worker, worker.setup()


def trained_text(tokenizer, tokens, item: int) -> str:
    return tokenizer.decode(tokens.token_ids[item][tokens.loss_masks[item] > 0].tolist())


CONVERSATION = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "what is 1+2?"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "what is 3+1?"},
    {"role": "assistant", "content": "the answer is 4"},
]


def test_prompt_ids_are_the_chat_templates_own_without_the_answer(model, tokenizer, tmp_path):
    worker, info = started(model, [write(tmp_path / "a.jsonl", [{"messages": CONVERSATION}])], task="grpo")
    (prompt,) = worker.prompts(0, 1)
    expected = tokenizer.apply_chat_template(CONVERSATION[:-1], add_generation_prompt=True, return_dict=False)
    assert prompt.token_ids.tolist() == expected and prompt.token_ids.dtype == np.int32
    assert prompt.messages == CONVERSATION[:-1]
    assert info.num_rows == 1 and info.longest == len(expected) and info.warnings == ()
    assert info.end_tokens == ("<|im_end|>",)


def test_row_ids_are_the_chat_templates_own_and_each_answer_is_trained_with_its_end(model, tokenizer, tmp_path):
    worker, _ = started(model, [write(tmp_path / "a.jsonl", [{"messages": CONVERSATION}])])
    tokens, summary = worker.rows(0, 1)
    expected = tokenizer.apply_chat_template(CONVERSATION, return_dict=False)
    assert tokens.token_ids[0].tolist() == expected
    assert trained_text(tokenizer, tokens, 0) == "3<|im_end|>the answer is 4<|im_end|>"
    assert summary.lengths == [len(expected)] and summary.trained == [int(tokens.loss_masks[0].sum())]
    assert summary.units == [[[0]]] and summary.targets == [()]


@pytest.mark.parametrize(
    "loss_scale, text",
    [
        ("default", "3<|im_end|>the answer is 4<|im_end|>"),
        ("last_round", "the answer is 4<|im_end|>"),
    ],
)
def test_both_backends_train_the_answers_that_loss_scale_names(model, tokenizer, tmp_path, loss_scale, text):
    data = [write(tmp_path / "a.jsonl", [{"messages": CONVERSATION}])]
    for backend, options in [("jinja", {}), ("swift", {"template": "chatml"})]:
        worker, _ = started(model, data, loss_scale=loss_scale, template_backend=backend, **options)
        tokens, _ = worker.rows(0, 1)
        assert tokens.token_ids[0].tolist() == tokenizer.apply_chat_template(CONVERSATION, return_dict=False)
        # ms-swift's chatml counts the line break after <|im_end|> to the end of an answer.
        assert trained_text(tokenizer, tokens, 0).replace("\n", "") == text, backend


def test_loss_scale_all_trains_all_but_the_first_token(model, tmp_path):
    worker, _ = started(model, [write(tmp_path / "a.jsonl", [{"messages": CONVERSATION}])], loss_scale="all")
    tokens, _ = worker.rows(0, 1)
    assert tokens.loss_masks[0].tolist() == [0.0] + [1.0] * (len(tokens.token_ids[0]) - 1)


def test_a_messages_own_loss_and_loss_scale_weigh_its_answer(model, tokenizer, tmp_path):
    messages = [dict(message) for message in CONVERSATION]
    messages[2]["loss"] = False
    messages[4]["loss_scale"] = 0.5
    worker, _ = started(model, [write(tmp_path / "a.jsonl", [{"messages": messages}])])
    tokens, _ = worker.rows(0, 1)
    assert trained_text(tokenizer, tokens, 0) == "the answer is 4<|im_end|>"
    assert set(tokens.loss_masks[0].tolist()) == {0.0, 0.5}


def test_a_chat_template_that_rewrites_earlier_turns_is_refused_unless_only_the_last_is_trained(model, tmp_path):
    from transformers import AutoTokenizer

    rewriting = AutoTokenizer.from_pretrained(model)
    rewriting.chat_template = rewriting.chat_template.replace(
        "{{ message['content'] }}", "{{ message['content'] if loop.last or message['role'] != 'assistant' else '...' }}"
    )
    rewriting.save_pretrained(tmp_path / "rewriting")
    (tmp_path / "rewriting" / "config.json").write_text((model / "config.json").read_text())
    data = [write(tmp_path / "a.jsonl", [{"messages": CONVERSATION}])]
    with pytest.raises(ValueError, match="renders message 3 differently.*last_round"):
        started(tmp_path / "rewriting", data)
    worker, _ = started(tmp_path / "rewriting", data, loss_scale="last_round")
    assert trained_text(rewriting, worker.rows(0, 1)[0], 0) == "the answer is 4<|im_end|>"


THINKING = (  # as Qwen3's: an empty thought before the last answer, and in the prompt when thinking is off
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' and '</think>' not in m['content'] %}<think>\n\n</think>\n\n"
    "{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.mark.parametrize("backend", ["swift", "jinja"])
def test_a_row_is_its_rollout_prompt_and_then_what_is_trained(model, tokenizer, tmp_path, backend):
    from transformers import AutoTokenizer

    thinking = AutoTokenizer.from_pretrained(model)
    thinking.chat_template = THINKING
    thinking.save_pretrained(tmp_path / "thinking")
    (tmp_path / "thinking" / "config.json").write_text((model / "config.json").read_text())
    data = [write(tmp_path / "a.jsonl", [{"messages": CONVERSATION[1:3]}])]
    prompt = started(tmp_path / "thinking", data, task="grpo", template_backend=backend)[0].prompts(0, 1)[0].token_ids
    # ms-swift prompts Qwen3 with thinking off unless it is told otherwise.
    options = {"add_generation_prompt": True, "return_dict": False, "enable_thinking": False}
    assert prompt.tolist() == thinking.apply_chat_template(CONVERSATION[1:2], **options)
    tokens, _ = started(tmp_path / "thinking", data, template_backend=backend)[0].rows(0, 1)
    assert tokens.token_ids[0][: len(prompt)].tolist() == prompt.tolist()
    assert trained_text(thinking, tokens, 0).rstrip("\n").endswith("3<|im_end|>")
    if backend == "jinja":
        assert trained_text(thinking, tokens, 0) == "3<|im_end|>" and not tokens.loss_masks[0][: len(prompt)].any()


def test_the_system_option_is_for_conversations_without_one(model, tokenizer, tmp_path):
    data = write(tmp_path / "a.jsonl", [{"messages": CONVERSATION}, {"messages": CONVERSATION[1:3]}])
    for task in ("grpo", "sft"):
        worker, _ = started(model, [data], system="be kind", task=task)
        ids = [p.token_ids for p in worker.prompts(0, 2)] if task == "grpo" else worker.rows(0, 2)[0].token_ids
        texts = [tokenizer.decode(row.tolist()) for row in ids]
        assert "be short" in texts[0] and "be kind" not in texts[0] and "system\nbe kind<|im_end|>" in texts[1]


def test_a_template_that_differs_from_the_tokenizers_own_is_warned_of(model, tmp_path):
    data = [write(tmp_path / "a.jsonl", sums(1))]
    _, info = started(
        model, data, task="grpo", template_backend="swift"
    )  # qwen3's adds <think></think>, the tokenizer's does not
    assert len(info.warnings) == 1 and "--template_backend jinja" in info.warnings[0]
    assert started(model, data, task="grpo", template_backend="swift", template="chatml")[1].warnings == ()


def test_columns_of_a_row_survive_and_are_its_own(model, tmp_path):
    worker, _ = started(model, [write(tmp_path / "a.jsonl", sums(30))], task="grpo", dataset_shuffle=True)
    prompts = worker.prompts(0, 30)
    assert sorted(prompt.columns["level"] for prompt in prompts) == list(range(30))
    for prompt in prompts:
        level = prompt.columns["level"]
        assert prompt.messages == [{"role": "user", "content": f"what is {level}+{level}?"}]
        assert prompt.columns["solution"] == str(2 * level)
        assert set(prompt.columns) == {
            "level",
            "solution",
            "dataset",
        }  # `dataset`: ms-swift's tag of where it came from


def test_question_answer_rows_are_mapped_and_solution_kept(model, tokenizer, tmp_path):
    rows = [{"question": "what is 1+2?", "solution": "3"}]
    worker, _ = started(model, [write(tmp_path / "a.jsonl", rows)], task="grpo")
    (prompt,) = worker.prompts(0, 1)
    assert prompt.messages == [{"role": "user", "content": "what is 1+2?"}] and prompt.columns["solution"] == "3"


def levels(worker, start: int, count: int) -> list[int]:
    return [prompt.columns["level"] for prompt in worker.prompts(start, count)]


def test_order_is_seeded_reshuffled_each_epoch_and_resumable_at_any_position(model, tmp_path):
    data = [write(tmp_path / "a.jsonl", sums(50))]
    options = {"task": "grpo", "dataset_shuffle": True, "data_seed": 7}
    worker, _ = started(model, data, **options)
    order = levels(worker, 0, 150)
    first, second, third = order[:50], order[50:100], order[100:]
    assert sorted(first) == sorted(second) == sorted(third) == list(range(50))
    assert first != second and second != third and first != list(range(50))
    resumed, _ = started(model, data, **options)
    assert levels(resumed, 97, 20) == order[97:117]  # across the end of an epoch
    assert [prompt.index for prompt in resumed.prompts(97, 3)] == [97, 98, 99]
    assert levels(started(model, data, **options | {"data_seed": 8})[0], 0, 50) != first


def test_without_shuffle_rows_come_in_file_order(model, tmp_path):
    worker, _ = started(model, [write(tmp_path / "a.jsonl", sums(5))], task="grpo")
    assert levels(worker, 0, 7) == [0, 1, 2, 3, 4, 0, 1]


def test_several_datasets_and_row_limits(model, tmp_path):
    first = write(tmp_path / "a.jsonl", sums(20))
    second = write(tmp_path / "b.jsonl", [row | {"level": row["level"] + 100} for row in sums(9)])
    worker, info = started(model, [f"{first}#4", second], task="grpo")
    assert info.num_rows == info.loaded == 13
    assert levels(worker, 0, 13) == [0, 1, 2, 3, *range(100, 109)]
    shuffled, info = started(model, [f"{first}#4"], task="grpo", dataset_shuffle=True)
    assert info.num_rows == 4 and len(set(levels(shuffled, 0, 4))) == 4


def test_long_prompts_are_cut_at_the_left_or_dropped_and_counted(model, tokenizer, tmp_path):
    rows = sums(3)
    rows[1]["messages"][0]["content"] = "7" * 100
    data = [write(tmp_path / "a.jsonl", rows)]
    full = tokenizer.apply_chat_template(rows[1]["messages"][:1], add_generation_prompt=True, return_dict=False)
    worker, info = started(model, data, task="grpo", max_length=40)  # truncation_strategy: left for prompts
    assert (info.num_rows, info.truncated, info.dropped, info.longest) == (3, 1, {}, 40)
    assert worker.prompts(1, 1)[0].token_ids.tolist() == full[-40:]
    worker, info = started(model, data, task="grpo", max_length=40, truncation_strategy="delete")
    assert (info.num_rows, info.truncated, info.dropped, info.loaded) == (2, 0, {TOO_LONG: 1}, 3)
    assert levels(worker, 0, 3) == [0, 2, 0]
    worker, info = started(model, data, task="grpo", max_length=len(full), truncation_strategy="delete")
    assert info.num_rows == 3
    worker, _ = started(model, data, task="grpo", max_length=40, truncation_strategy="right")
    assert worker.prompts(1, 1)[0].token_ids.tolist() == full[:40]


def test_long_rows_are_dropped_by_default_and_rows_that_train_nothing_always(model, tmp_path):
    rows = sums(4)
    rows[0]["messages"][1]["content"] = "9" * 200
    rows[2]["messages"][1]["loss"] = False
    data = [write(tmp_path / "a.jsonl", rows)]
    worker, info = started(model, data, max_length=60)
    assert (info.loaded, info.dropped, info.num_rows) == (4, {TOO_LONG: 1, UNTRAINED: 1}, 2)
    assert all(count > 0 for count in worker.rows(0, 2)[1].trained)
    with pytest.raises(ValueError, match="no row .* is left: of 4, 4 longer than max_length .max_length 5 tokens."):
        started(model, data, max_length=5)


def test_packs_hold_every_row_once_and_never_exceed_their_length(model, tmp_path):
    rows = sums(120)
    for i, row in enumerate(rows):
        row["messages"][0]["content"] += " what" * (i * 7 % 23)
    data = [write(tmp_path / "a.jsonl", rows)]
    plain, before = started(model, data)
    packed, info = started(model, data, packing=True, packing_length=128, dataset_shuffle=True)
    assert info.num_tokens == before.num_tokens and info.num_rows < before.num_rows / 2
    tokens, summary = packed.rows(0, info.num_rows)
    assert max(sum(summary.lengths[item] for (item,) in unit) for unit in summary.units) <= 128
    assert sorted(item for unit in summary.units for (item,) in unit) == list(range(120))
    expected = plain.rows(0, 120)[0]
    assert sorted(ids.tolist() for ids in tokens.token_ids) == sorted(ids.tolist() for ids in expected.token_ids)
    assert summary.trained == [int((mask > 0).sum()) for mask in tokens.loss_masks]


def test_packing_places_every_row_of_a_long_dataset_and_wastes_little():
    from actors.dataset import pack_rows

    lengths = np.random.default_rng(0).integers(10, 60, 2500).tolist()
    packs = pack_rows(lengths, 128)
    assert sorted(row for pack in packs for row in pack) == list(range(2500))
    assert max(sum(lengths[row] for row in pack) for pack in packs) <= 128
    next_fit, room = 1, 128  # taking rows in order and closing a pack when the next does not fit
    for length in lengths:
        next_fit, room = (next_fit, room - length) if length <= room else (next_fit + 1, 128 - length)
    assert len(packs) < 0.95 * next_fit
    assert len(packs) <= 1.05 * sum(lengths) / 128


def test_encoding_in_two_processes_gives_the_same_rows(model, tmp_path, monkeypatch):
    data = [write(tmp_path / "a.jsonl", sums(50))]
    one, _ = started(model, data)
    monkeypatch.setattr("actors.dataset.SPAN", 20)
    two, info = started(model, data, dataset_num_proc=2)
    assert info.num_rows == 50
    assert np.array_equal(one.train.encoded.token_ids, two.train.encoded.token_ids)
    assert np.array_equal(one.train.encoded.loss_masks, two.train.encoded.loss_masks)
    assert np.array_equal(one.train.encoded.sources, two.train.encoded.sources)


def test_model_type_and_template_options_win_over_config_json(model, tmp_path):
    from actors.encoding import Encoder

    def chosen(**options) -> tuple[str, str]:
        encoder = Encoder(Config(task="grpo", model=str(model), dataset=["a"], **options))
        return encoder.tokenizer.model_meta.model_type, encoder.template.template_meta.template_type

    assert chosen() == ("qwen3", "qwen3")
    assert chosen(model_type="qwen2", template="llama3") == ("qwen2", "llama3")
    assert chosen(model_type="qwen2", template_backend="jinja")[0] == "qwen2"
    with pytest.raises(ValueError, match="several templates for qwen2: give --template"):
        chosen(model_type="qwen2")


def test_a_checkpoint_has_the_template_of_the_model_that_it_was_made_from_in_the_end(tmp_path):
    """ms-swift has seven templates for qwen2 models, and knows by the name of a folder which one is its own."""
    from actors.encoding import Encoder
    from actors.model_folder import copy_companions

    model = make_tiny_model(tmp_path / "Qwen2.5-7B-Instruct", family="Qwen2")
    folders = [model, tmp_path / "checkpoint-3", tmp_path / "checkpoint-5"]
    for source, target in zip(folders, folders[1:]):
        target.mkdir()
        copy_companions(source, target, dtype="float32")
    encoders = [Encoder(Config(task="sft", model=str(folder), dataset=["a"])) for folder in folders]
    assert [encoder.template.template_meta.template_type for encoder in encoders] == ["qwen2_5"] * 3
    row = {"messages": [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "3"}]}
    first, *others = [encoder.encode(row).sequences[0].token_ids.tolist() for encoder in encoders]
    assert others == [first, first]
    prompted = Encoder(Config(task="sft", model=str(folders[2]), dataset=["a"], template="llama3"))
    assert prompted.template.template_meta.template_type == "llama3"


def test_a_row_that_cannot_be_encoded_is_an_error_that_shows_it(model, tmp_path):
    data = write(
        tmp_path / "a.jsonl",
        [*sums(2), {"messages": [{"role": "assistant", "content": "42"}], "solution": "", "level": 3}],
    )
    with pytest.raises(ValueError, match="42.*no user message is left"):
        started(model, [data], task="grpo")


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(model, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user"\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl cannot be read"):
        started(model, [str(tmp_path / "bad.jsonl")])


def test_images_are_refused(model, tmp_path):
    rows = [sums(1)[0] | {"images": ["cat.png"]}]
    with pytest.raises(ValueError, match="text rows only"):
        started(model, [write(tmp_path / "a.jsonl", rows)])


def pair(question: str, chosen: str, rejected: str, **columns) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": chosen}]
    return {"messages": messages, "rejected_response": rejected, **columns}


@pytest.mark.parametrize("backend", ["jinja", "swift"])
def test_a_pair_is_two_conversations_with_one_prompt(model, tokenizer, tmp_path, backend):
    rows = [pair("1+1?", "2", "3"), pair("2+2?", "4", "5")]
    rejected = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}]
    rows[1] = {"messages": rows[1]["messages"], "rejected_messages": rejected}
    data = [write(tmp_path / "a.jsonl", rows)]
    worker, _ = started(model, data, task="dpo", template_backend=backend, template="chatml")
    tokens, summary = worker.rows(0, 2)
    assert summary.units == [[[0, 1]], [[2, 3]]]
    texts = [tokenizer.decode(ids.tolist()) for ids in tokens.token_ids]
    answers = [trained_text(tokenizer, tokens, item) for item in range(4)]
    assert [answer.strip().removesuffix("<|im_end|>") for answer in answers] == ["2", "3", "4", "5"]
    assert ["1+1?" in text for text in texts] == [True, True, False, False]
    assert texts[0].split("assistant")[0] == texts[1].split("assistant")[0]


def test_pairs_that_teach_nothing_are_dropped_and_counted(model, tmp_path):
    rows = [pair("1?", "2", "3"), pair("1?", "2", "2"), pair("1?", " ", "2"), pair("1?", "2", ""), pair("1?", "2" * 90, "3")]
    worker, info = started(model, [write(tmp_path / "a.jsonl", rows)], task="dpo", max_length=60)
    assert (info.loaded, info.num_rows, info.dropped) == (5, 1, {EQUAL: 1, EMPTY: 2, TOO_LONG: 1})
    with pytest.raises(ValueError, match=f"no row of .* is left: of 2, 2 {EQUAL}"):
        started(model, [write(tmp_path / "b.jsonl", [pair("1?", "2", "2"), pair("3?", "2", "2")])], task="dpo")


def test_a_packed_pair_stays_together(model, tmp_path):
    rows = [pair(f"{i}?", str(i), str(-i - 1)) for i in range(20)]
    worker, info = started(model, [write(tmp_path / "a.jsonl", rows)], task="dpo", packing=True, packing_length=200)
    _, summary = worker.rows(0, info.num_rows)
    assert info.num_rows < 10
    assert [row for unit in summary.units for row in unit] == [[2 * i, 2 * i + 1] for i in range(20)]


def test_kto_rows_come_with_their_prompt_before_the_response_of_the_row_before(model, tokenizer, tmp_path):
    rows = [row | {"label": i != 1} for i, row in enumerate(sums(3))]
    worker, _ = started(model, [write(tmp_path / "a.jsonl", rows)], task="kto", loss_type="kto")
    tokens, summary = worker.rows(0, 3)
    assert summary.units == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert summary.targets == [(1.0,), (1.0,), (0.0,), (0.0,), (1.0,), (1.0,)]
    own = [tokenizer.decode(ids.tolist()) for ids in tokens.token_ids[::2]]
    mismatched = [tokenizer.decode(ids.tolist()) for ids in tokens.token_ids[1::2]]
    for i, text in enumerate(mismatched):
        assert f"what is {i}+{i}?" in text and text.startswith(own[i].partition("assistant")[0])
        assert trained_text(tokenizer, tokens, 2 * i + 1).strip() == f"{2 * ((i - 1) % 3)}<|im_end|>"
    with pytest.raises(ValueError, match="`label` must be true or false, not 'yes'"):
        started(model, [write(tmp_path / "b.jsonl", [sums(1)[0] | {"label": "yes"}])], task="kto", loss_type="kto")


def test_pre_training_reads_plain_text_and_trains_on_all_of_it(model, tokenizer, tmp_path):
    rows = [{"messages": [{"role": "assistant", "content": "what is 1+2? the answer is 3"}]}]
    worker, _ = started(model, [write(tmp_path / "a.jsonl", rows)], task="pt", loss_scale="all", template_backend="swift")
    tokens, summary = worker.rows(0, 1)
    text = tokenizer("what is 1+2? the answer is 3")["input_ids"]
    assert tokens.token_ids[0].tolist() == [*text, tokenizer.eos_token_id]
    assert summary.trained == [len(text)]  # all but the first token, and the end


def test_held_out_rows_are_not_trained_on(model, tmp_path):
    data = [write(tmp_path / "a.jsonl", sums(50))]
    worker, info = started(model, data, split_dataset_ratio=0.2)
    assert (info.num_rows, info.evaluation_rows) == (40, 10)
    train, held_out = worker.rows(0, 40)[0].token_ids, worker.rows(0, 10, True)[0].token_ids
    assert len({tuple(ids.tolist()) for ids in (*train, *held_out)}) == 50
    worker, info = started(model, data, val_dataset=[write(tmp_path / "b.jsonl", sums(3))])
    assert (info.num_rows, info.evaluation_rows) == (50, 3)
