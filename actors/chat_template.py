"""Conversations through the tokenizer's own chat template, with the loss mask that ms-swift would not give for it.

ms-swift trains on every token of a row that such a template renders. Here the mask is that of the assistant's answers, each
with its end token. Letters: L tokens of one conversation.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class ChatTemplate:
    """The chat template of a tokenizer, under the settings of ms-swift's `template` of the model."""

    def __init__(self, template: Any):
        self.template, self.tokenizer = template, template.tokenizer

    def encode(self, conversation: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [L] int32 and loss mask [L] float32."""
        ids, mask = [], []
        for text, weight in self._weighted_text(conversation):
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += tokens
            mask += [weight] * len(tokens)
        return np.array(ids, np.int32), np.array(mask, np.float32)

    def _weighted_text(self, conversation: dict[str, Any]) -> list[tuple[str, float]]:
        """The rendered conversation in pieces, each with the loss weight of its tokens; neighbours differ in weight.

        A piece is tokenized by itself, as prompt and response are when the model answers.
        """
        messages = self.with_system(conversation["messages"])
        text = self.render(messages, conversation)
        loss_scale, end = self.template.loss_scale, self.tokenizer.eos_token
        last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        pieces: list[tuple[str, float]] = []
        untrained = 1.0 if loss_scale.base_strategy == "all" else 0.0
        position = 0
        for i, message in enumerate(messages):
            if message["role"] == "tool_call":
                raise ValueError("rows with tool_call messages need template_backend swift for training")
            if message["role"] != "assistant" or not _is_trained(message, loss_scale, after_last_user=i > last_user):
                continue
            before = self.render(messages[:i], conversation, add_generation_prompt=True)
            after = text if i == len(messages) - 1 else self.render(messages[: i + 1], conversation)
            if not (after.startswith(before) and text.startswith(after)):
                raise ValueError(
                    f"the chat template renders message {i + 1} differently once others follow it, so what to train on "
                    "is not known: set loss_scale to last_round, or template_backend to swift"
                )
            answer = after[len(before) :]
            trained = answer[: answer.rfind(end) + len(end)] if end and end in answer else answer
            pieces.append((text[position : len(before)], untrained))
            pieces += _answer_pieces(trained, message, messages[i - 1] if i else None, loss_scale)
            position = len(before) + len(trained)
        pieces.append((text[position:], untrained))
        return _merged(pieces)

    def with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages, after ms-swift's system message of the model where they have none."""
        system = self.template.template_meta.default_system
        if system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": system}, *messages]

    def render(self, messages: list[dict[str, Any]], row: dict[str, Any], *, add_generation_prompt: bool = False) -> str:
        """As text; of `row` the tools and the template's own options."""
        options = {}
        if self.template.template_meta.is_thinking or self.template.enable_thinking:
            options["enable_thinking"] = self.template.enable_thinking
        if row.get("tools"):
            options["tools"] = row["tools"]
        options |= row.get("chat_template_kwargs") or {}
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )


def _is_trained(message: dict[str, Any], loss_scale: Any, *, after_last_user: bool) -> bool:
    """ms-swift's rule: the message's own `loss`, else the base strategy."""
    if message.get("loss") is not None:
        return bool(message["loss"])
    return loss_scale.base_strategy != "last_round" or after_last_user


def _answer_pieces(text: str, message: dict[str, Any], query: dict[str, Any] | None, loss_scale: Any) -> list[tuple[str, float]]:
    if message.get("loss_scale") is not None:
        return [(text, float(message["loss_scale"]))]
    texts, weights = loss_scale.get_loss_scale(text, query=query["content"] if query else "")
    return list(zip(texts, weights, strict=True))


def _merged(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    merged: list[tuple[str, float]] = []
    for text, weight in pieces:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        elif text:
            merged.append((text, weight))
    return merged
