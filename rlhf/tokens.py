"""Whether two model folders have one vocabulary: the ids of their tokenizers, read as JSON."""

from __future__ import annotations

import json
from pathlib import Path


def check_same_tokens(student: Path, teacher: Path, *, smaller: int) -> None:
    """ValueError when the tokenizers give an id different meanings, or have one that a model lacks.

    `smaller`: of the vocabularies of the two models, which their folders may pad to different sizes.
    """
    own, other = token_ids(student), token_ids(teacher)
    if own is None or other is None:
        folder = student if own is None else teacher
        raise ValueError(
            f"{folder} has no tokenizer.json: save the tokenizer there with transformers (save_pretrained), since student and "
            "teacher can be compared only when their tokens have the same ids"
        )
    for token_id in sorted(own.keys() | other.keys()):
        mine, yours = own.get(token_id), other.get(token_id)
        if mine != yours:
            raise ValueError(
                f"the teacher {teacher} has another tokenizer than the student {student}: token {token_id} is {_shown(yours)} "
                f"for the teacher, {_shown(mine)} for the student; distillation needs models with the same tokenizer"
            )
    if max(own) >= smaller:
        raise ValueError(f"the tokenizer has the token {max(own)}, but student or teacher has only {smaller} of them")


def token_ids(folder: Path) -> dict[int, str] | None:
    """Every token by its id, of `folder`/tokenizer.json; None without one. ValueError when it is broken."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = described["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [token, score], in the order of the ids
            vocabulary = {token: token_id for token_id, (token, _) in enumerate(vocabulary)}
        tokens = {token_id: token for token, token_id in vocabulary.items()}
        return tokens | {added["id"]: added["content"] for added in described.get("added_tokens") or []}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a tokenizer's file: {error}") from None


def _shown(token: str | None) -> str:
    return "no token" if token is None else repr(token)
