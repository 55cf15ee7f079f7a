"""`megaray infer`: answers to the rows of a dataset, or to questions from the terminal or a pipe, one a line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import ray

from rlhf.cluster import Cluster
from rlhf.config import Config
from rlhf.records import Prompt
from rlhf.results import RowFile, progress, response_row
from rlhf.roles import InferenceRoles, build_inference

EXIT, CLEAR = ("exit", "quit"), "clear"


def infer(cluster: Cluster, results: Path | None) -> None:
    """Answer, and write every answer into `results`."""
    config = cluster.config
    interactive = not config.dataset and sys.stdin.isatty()
    if interactive:
        print(f"loading {config.model}")
    roles = build_inference(cluster)
    with RowFile(results) if results else nullcontext() as file:
        if config.dataset:
            answer_rows(config, roles, file)
        else:
            converse(config, roles, questions(sys.stdin, interactive), file)
    if results:
        print(f"answers are in {results}", file=sys.stderr)


def answer_rows(config: Config, roles: InferenceRoles, file: RowFile) -> None:
    """Answer each row of the dataset; with `stream` one after another and on the screen."""
    prompts = roles.data.next_batch(roles.data.num_rows)
    if config.stream:
        for prompt in prompts:
            print(f"> {prompt.messages[-1]['content']}")
            text, reason, length = answer(config, roles, prompt)
            file.write(response_row(prompt, text, reason, length))
        return
    waiting, place = {}, prompts[0].index
    for group in progress(roles.rollout.generate(prompts, n=1), len(prompts), "rows answered"):
        waiting[group.prompt.index] = group
        while place in waiting:  # in the order of the dataset
            done = waiting.pop(place)
            file.write(response_row(done.prompt, done.texts[0], done.finish_reasons[0], done.response_lengths[0]))
            place += 1


def converse(config: Config, roles: InferenceRoles, lines: Iterator[str], file: RowFile | None) -> None:
    """Answer one line after another as one conversation, until `clear` starts a new one or `exit` ends it."""
    history: list[dict[str, Any]] = []
    for turn, line in enumerate(lines):
        if line in EXIT:
            return
        if line == CLEAR:
            history = []
            continue
        asked = [*history, {"role": "user", "content": line}]
        token_ids = ray.get(roles.encoder.encode.remote(asked), timeout=config.call_timeout)
        if isinstance(token_ids, int):
            print(f"the conversation has become longer than {token_ids} tokens: `{CLEAR}` starts a new one", file=sys.stderr)
            continue
        prompt = Prompt(index=turn, token_ids=token_ids, messages=asked, columns={})
        text, reason, length = answer(config, roles, prompt)
        history = [*asked, {"role": "assistant", "content": text}]
        if file is not None:
            file.write(response_row(prompt, text, reason, length))


def answer(config: Config, roles: InferenceRoles, prompt: Prompt) -> tuple[str, str, int]:
    """Print the answer, with `stream` as it comes; (text, finish reason, tokens)."""
    if config.stream:
        *_, summary = shown(roles.rollout.stream(prompt.token_ids))
        text = summary.texts[0]
    else:
        (summary,) = roles.rollout.generate([prompt], n=1)
        text = summary.texts[0]
        sys.stdout.write(text)
    sys.stdout.write("\n")
    sys.stdout.flush()
    return text, summary.finish_reasons[0], summary.response_lengths[0]


def shown(items: Iterator[Any]) -> Iterator[Any]:
    """`items`, of which texts are printed as they pass."""
    for item in items:
        if isinstance(item, str):
            sys.stdout.write(item)
            sys.stdout.flush()
        yield item


def questions(source: TextIO, interactive: bool) -> Iterator[str]:
    """Lines that are not empty; from a terminal with a prompt and line editing."""
    if not interactive:
        yield from filter(None, map(str.strip, source))
        return
    import readline  # noqa: F401 input() then edits lines and remembers them

    print(f"One line a question. `{CLEAR}` starts a new conversation, `{EXIT[0]}` or Ctrl-D ends.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line:
            yield line
