"""Sequence-level distillation (Kim and Rush 2016): the teacher's own responses to the prompts of a run, one each.

They are sampled before anything is trained, by vLLM engines with the teacher's weights, and kept in the run's folder in
`teacher_responses.jsonl`, a line a prompt. A resumed run samples only what is missing there.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

if TYPE_CHECKING:
    from rlhf.records import Group, Prompt

FILE = "teacher_responses.jsonl"
BATCH = 1024  # prompts given to the engines at a time


def complete_responses(
    folder: Path,
    prompts: Callable[[int, int], list[Prompt]],
    generate: Callable[..., Iterable[Group]],
    *,
    count: int,
    way: Mapping[str, Any],
) -> dict[int, np.ndarray]:
    """Token ids [R] int32 of a response to each of the prompts at positions 0 .. count - 1, by position.

    `prompts(start, number)` reads some, `generate(prompts, n=1)` answers them. `way`: the teacher and how it is sampled.
    ValueError when the file in `folder` belongs to other prompts, or came about in another way.
    """
    file = folder / FILE
    found = _read(file)
    for start in range(0, count, BATCH):
        batch = prompts(start, min(BATCH, count - start))
        for prompt in batch:
            if prompt.index in found and found[prompt.index][0] != _checksum(prompt, way):
                raise ValueError(
                    f"{file} holds responses to other prompts, or by another teacher or sampling (the first is at position "
                    f"{prompt.index}): resume with the same dataset, data_seed, template, {', '.join(way)}, or choose another "
                    "run_name"
                )
        missing = [prompt for prompt in batch if prompt.index not in found]
        if missing:
            with open(file, "a", encoding="utf-8", errors="replace") as lines:
                for group in generate(missing, n=1):
                    ids = ray.get(group.tokens).response_ids[0]
                    checksum = _checksum(group.prompt, way)
                    lines.write(json.dumps(_line(group, ids, checksum), ensure_ascii=False, default=str) + "\n")
                    found[group.prompt.index] = checksum, ids
            print(f"the teacher has answered {min(start + BATCH, count):,} of {count:,} prompts", flush=True)
    return {position: found[position][1] for position in range(count)}


def _line(group: Group, ids: np.ndarray, checksum: int) -> dict[str, Any]:
    return {
        "position": group.prompt.index,
        "prompt": group.prompt.messages,
        "crc32": checksum,  # of the prompt's tokens and the way
        "response": group.texts[0],
        "token_ids": ids.tolist(),
    }


def _read(file: Path) -> dict[int, tuple[int, np.ndarray]]:
    """Checksum and response by position; a line that a killed run left unfinished is cut off."""
    if not file.exists():
        return {}
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        file.write_bytes(whole)
    rows = [json.loads(line) for line in whole.splitlines()]  # of bytes: a text's own line separators are none here
    return {row["position"]: (row["crc32"], np.array(row["token_ids"], np.int32)) for row in rows}


def _checksum(prompt: Prompt, way: Mapping[str, Any]) -> int:
    tokens = np.ascontiguousarray(prompt.token_ids, np.int32).tobytes()
    return zlib.crc32(tokens, zlib.crc32(json.dumps(dict(way)).encode()))
