"""Conversations to token ids and loss masks, through ms-swift's templates or the tokenizer's own chat template.

`template_backend swift`: ms-swift's template of the model renders prompts and rows. `jinja`: the tokenizer's chat
template does (`actors.chat_template`). Text only.

Letters: L tokens of one conversation.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.chat_template import ChatTemplate
from actors.head_rows import head_rows
from actors.processor import load_processor, own_template
from rlhf.config import HEADED, PAIRED, reads_answers, reads_prompts

PASSED_ON = (
    "messages",
    "tools",
    "chat_template_kwargs",
)  # what a template reads of a row; reward columns must not reach it
MEDIA = ("images", "videos", "audios")
UNLIMITED = 1 << 40  # the template never truncates: `Encoder` does, and counts
TOO_LONG = "longer than max_length"  # reasons to leave a row out
UNTRAINED = "without a token to train on"
EMPTY = "with an empty response"
EQUAL = "with two equal answers"


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """What the model reads at a time."""

    token_ids: np.ndarray  # [L] int32
    loss_mask: np.ndarray  # [L] float32: how much the prediction of this token counts
    targets: tuple[float, ...] = ()  # what the loss wants beside the tokens: kto, 1 for desirable; rm, the margin; ...


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a dataset: one sequence, or the chosen and the rejected one of a pair."""

    sequences: tuple[Sequence, ...]
    truncated: bool


class Encoder:
    """Encodes dataset rows for a task: whole conversations with loss masks, prompts without their answer, or both of a row."""

    def __init__(self, config: Any):
        from swift.template import get_template

        processor = load_processor(config)
        self.config, self.task = config, config.task
        self.reads_prompts = reads_prompts(config)
        self.reads_answers = reads_answers(config)
        self.limit = config.max_length or processor.model_info.max_model_len
        if config.packing and config.packing_length:
            self.limit = min(self.limit, config.packing_length)
        self.has_head = config.task in HEADED
        if self.has_head:  # ms-swift then ends a text as it does for a head or an embedding
            processor.model_info.task_type = "seq_cls"
        self.strategy = config.truncation_strategy or ("delete" if self.reads_answers else "left")
        self.template = get_template(
            processor,
            config.system,
            UNLIMITED,
            template_type=config.template or own_template(processor, config.template_backend),
            loss_scale=config.loss_scale or "default",
            template_backend=config.template_backend,
            use_chat_template=config.task != "pt",
        )
        self.tokenizer = self.template.tokenizer
        self.chat_template = ChatTemplate(self.template)
        unknown_model = self.template.template_meta.template_type == "dummy"
        self.jinja = config.task != "pt" and (config.template_backend == "jinja" or unknown_model)
        if self.jinja and not self.tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {config.model} has no chat template: give --template chatml, or another of "
                "ms-swift's, and --template_backend swift"
            )

    def of_answers(self) -> Encoder:
        """The same for rows that are evaluated: whole conversations."""
        encoder = copy(self)
        encoder.reads_prompts, encoder.reads_answers = False, True
        return encoder

    def end_tokens(self) -> tuple[str, ...]:
        """Special tokens by which the template ends an answer: a base model's own end token is often another one."""
        if self.jinja:
            question = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
            ends = [self.chat_template.render(question, {}).rpartition("ANSWER")[2]]
        else:
            meta = self.template.template_meta
            ends = [word for word in (*meta.stop_words, *meta.suffix[-1:]) if isinstance(word, str)]
        special = self.tokenizer.get_added_vocab()
        first = [min((t for t in special if t in end), key=end.index, default=None) for end in ends]
        return tuple(dict.fromkeys(token for token in first if token is not None))

    def encode(self, row: dict[str, Any]) -> Row | str:
        """The row's sequences; or the reason why it is left out.

        Raises:
            ValueError: it cannot be encoded, or is too long under `truncation_strategy raise`.
        """
        if any(row.get(key) for key in MEDIA):
            raise ValueError("images, videos and audio are not supported: text rows only")
        conversations = self._conversations(row)
        if isinstance(conversations, str):
            return conversations
        passed_on = _passed_on(row)
        sequences, truncated = [], False
        for messages, targets in conversations:
            ids, mask = self._tokens(passed_on | {"messages": messages})
            truncated |= len(ids) > self.limit
            fitting = self._fit(ids, mask)
            if fitting is None:
                return TOO_LONG
            ids, mask = fitting
            if not (self.has_head or mask.any()):
                return UNTRAINED
            sequences.append(Sequence(token_ids=ids, loss_mask=mask, targets=targets))
        if self.reads_prompts:
            ids = self._prompt_tokens(passed_on | {"messages": without_answer(row["messages"])})
            truncated |= len(ids) > self.limit
            fitting = self._fit(ids, np.zeros(len(ids), np.float32))
            if fitting is None:
                return TOO_LONG
            sequences.append(Sequence(token_ids=fitting[0], loss_mask=fitting[1]))
        return Row(sequences=tuple(sequences), truncated=truncated)

    def conversation(self, row: dict[str, Any]) -> Sequence:
        """The whole conversation of a row as one sequence, cut to max_length."""
        ids, mask = self._fit(*self._tokens(_passed_on(row)))
        return Sequence(token_ids=ids, loss_mask=mask)

    def _conversations(self, row: dict[str, Any]) -> list[tuple[list[dict[str, Any]], tuple[float, ...]]] | str:
        """The conversations that make a row's answered sequences, each with its targets; or why the row is left out."""
        messages = row["messages"]
        if not self.reads_answers:
            return []
        if self.has_head and self.task not in PAIRED:
            return head_rows(row, self.config)
        if _is_empty(messages):
            return EMPTY
        if self.task == "kto":
            return [(messages, (float(_label(row)),))]
        if self.task not in PAIRED:
            return [(messages, ())]
        rejected = _rejected(row)
        if _is_empty(rejected):
            return EMPTY
        if rejected == messages:
            return EQUAL
        margin = (float(row.get("margin") or 0.0),)
        return [(messages, margin), (rejected, margin)]

    def _tokens(self, conversation: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [L] int32 and loss mask [L] float32 (all 0 for a head)."""
        if self.has_head:
            ids = np.array(self._text_ids(conversation), np.int32)
            return ids, np.zeros(len(ids), np.float32)
        if self.jinja:
            return self.chat_template.encode(conversation)
        return self._encode_with_template(conversation)

    def _text_ids(self, conversation: dict[str, Any]) -> list[int]:
        if not self.jinja:
            self.template.set_mode("train")
            return self.template.encode(conversation)["input_ids"]
        messages = self.chat_template.with_system(conversation["messages"])
        text = self.chat_template.render(messages, conversation, add_generation_prompt=messages[-1]["role"] != "assistant")
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _prompt_tokens(self, conversation: dict[str, Any]) -> np.ndarray:
        """Token ids [L] int32 of a conversation that waits for its answer."""
        self.template.set_mode("vllm")
        return np.array(self.template.encode(conversation)["input_ids"], np.int32)

    def warnings(self, row: dict[str, Any]) -> Iterator[str]:
        """Warn when ms-swift's template renders this row's prompt otherwise than the tokenizer's own does."""
        if self.jinja or not self.reads_prompts or not self.tokenizer.chat_template:
            return
        encoded = self.encode(row)
        if isinstance(encoded, str) or encoded.truncated:
            return
        ids = encoded.sequences[-1].token_ids.tolist()
        messages = self.chat_template.with_system(without_answer(row["messages"]))
        text = self.chat_template.render(messages, row, add_generation_prompt=True)
        own = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids != own:
            yield (
                f"ms-swift's template {self.template.template_meta.template_type} ends a prompt with "
                f"{self.tokenizer.decode(ids)[-80:]!r}, the tokenizer's own chat template with "
                f"{self.tokenizer.decode(own)[-80:]!r}: --template_backend jinja takes the tokenizer's"
            )

    def _fit(self, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """At most max_length tokens; None: too many, and not to be cut."""
        long = len(ids) > self.limit
        if long and self.strategy == "delete":
            return None
        if long and self.strategy == "raise":
            raise ValueError(
                f"{len(ids)} tokens are more than max_length {self.limit}: raise it, or set truncation_strategy to left or delete"
            )
        part = slice(len(ids) - self.limit, None) if self.strategy == "left" else slice(None, self.limit)
        if long:
            ids, mask = ids[part], mask[part]
        if len(mask):
            mask[0] = 0  # nothing comes before the first token that could predict it
        return ids, mask

    def _encode_with_template(self, conversation: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        self.template.set_mode("train")
        encoded = self.template.encode(conversation)
        labels = np.array(encoded["labels"])
        mask = (labels != -100).astype(np.float32)
        if encoded.get("loss_scale") is not None:
            mask *= np.array(encoded["loss_scale"], np.float32)
        return np.array(encoded["input_ids"], np.int32), mask


def _passed_on(row: dict[str, Any]) -> dict[str, Any]:
    """What a template reads of a row."""
    return {key: row[key] for key in PASSED_ON if row.get(key)}


def without_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation up to its last message that is not the assistant's."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    if not any(message["role"] == "user" for message in messages[:end]):
        raise ValueError("no user message is left once the trailing answer is removed")
    return messages[:end]


def _is_empty(messages: list[dict[str, Any]]) -> bool:
    """Whether the conversation ends with an answer that says nothing."""
    last = messages[-1]
    return last["role"] == "assistant" and not str(last["content"]).strip()


def _label(row: dict[str, Any]) -> bool:
    label = row.get("label")
    if label not in (True, False):  # 0 and 1 too
        raise ValueError(f"`label` must be true or false, not {label!r}")
    return bool(label)


def _rejected(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rejected conversation: `rejected_messages`, or `messages` with another last answer, `rejected_response`."""
    if row.get("rejected_messages"):
        return row["rejected_messages"]
    answer = row.get("rejected_response")
    if answer is None:
        raise ValueError("neither `rejected_response` nor `rejected_messages`")
    prompt = without_answer(row["messages"])
    return [*prompt, {"role": "assistant", "content": answer}] if isinstance(answer, str) else [*prompt, *answer]
