"""report.html: one self-contained page about a run, made from the files in its folder.

No scripts, nothing fetched (the page's own policy forbids both); whatever a model or a user wrote is escaped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from rlhf.charts import number
from rlhf.config import Config
from rlhf.report_charts import HELD_OUT, charts, compared, values
from rlhf.report_page import PAGE, STYLE

FINAL_STEPS = 10  # "the end" of a run is the mean of so many last steps
SHOWN_PROMPTS = 4
SHOWN_RESPONSES = 2
MAIN_OPTIONS = (
    "model", "dataset", "reward_funcs", "train_iters", "global_batch_size", "num_generations", "max_completion_length",
    "max_length", "lr", "beta", "teacher", "lmbda", "temperature", "tuner_type", "torch_dtype", "tensor_model_parallel_size",
    "pipeline_model_parallel_size", "vllm_mode", "seed",
)  # fmt: skip


def write_report(folder: Path) -> Path | None:
    """Make `folder/report.html` from the JSONL files of metrics, evaluations and samples, and args.json; None without a step."""
    rows, evaluations = (_read_lines(folder / name) for name in ("metrics.jsonl", "evaluations.jsonl"))
    if not rows:
        return None
    args = json.loads((folder / "args.json").read_text()) if (folder / "args.json").exists() else {}
    title = escape(folder.name)
    sections = [
        f"<header><h1>{title}</h1><p>{_summary(rows, args)}</p></header>",
        _tiles(rows, evaluations),
        f'<section class="charts">{charts(rows, evaluations)}</section>',
        _failures(rows),
        _samples(_read_lines(folder / "samples.jsonl")),
        _options(args),
    ]
    page = PAGE.replace("{title}", title).replace("{style}", STYLE).replace("{body}", "\n".join(filter(None, sections)))
    draft, report = folder / ".report.html", folder / "report.html"
    draft.write_text(page, encoding="utf-8", errors="replace")
    os.replace(draft, report)
    return report


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a line that a killed run left unfinished is passed over."""
    if not file.exists():
        return []
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]


def _end(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    known = [value for value in values(rows[-FINAL_STEPS:], name) if value is not None]
    return fmean(known) if known else None


def _summary(rows: Sequence[Mapping[str, Any]], args: Mapping[str, Any]) -> str:
    algorithm = args.get("task")
    model = Path(str(args["model"])).name if args.get("model") else None
    data = ", ".join(Path(str(name)).name for name in args.get("dataset") or [])
    count, time = rows[-1]["step"], _duration(sum(row["seconds"]["step"] for row in rows))
    parts = [algorithm and algorithm.upper(), model, data, f"{count:,} step{'s'[: count > 1]} in {time}"]
    return " · ".join(escape(part) for part in parts if part)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _tiles(rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The final numbers, each beside the first step's."""
    names = {
        "reward": "Reward",
        "loss": "Loss",
        "kl": f"KL {compared(rows)}",
        "response_length": "Response length, tokens",
        "rollout_train_logprob_diff": "Rollout–train logprob difference",
        "tokens_per_second": "Tokens per second",
    }
    tiles = []
    for name, label in names.items():
        first, last = rows[0].get(name), _end(rows, name)
        if last is not None and not (name == "loss" and "reward" in rows[0]):
            tiles.append(_tile(label, first if len(rows) > 1 else None, last))
    for name in (name for name in HELD_OUT if evaluations and name in evaluations[-1]):
        first, last = evaluations[0].get(name), evaluations[-1][name]
        tiles.append(_tile(f"Held-out {HELD_OUT[name]}", first if len(evaluations) > 1 else None, last))
    seconds = [row["seconds"]["step"] for row in rows]
    tiles.append(_tile("Seconds per step", seconds[0] if len(rows) > 1 else None, fmean(seconds[-FINAL_STEPS:])))
    count = min(FINAL_STEPS, len(rows))
    note = f'<p class="note">Large: mean of the last {count} steps.</p>' if count > 1 else ""
    return f'<dl class="tiles">{"".join(tiles)}</dl>{note}'


def _tile(label: str, first: float | None, last: float) -> str:
    small = f"<small>first step {number(first, 3)}</small>" if first is not None else ""
    return f"<div><dt>{label}</dt><dd>{number(last, 3)}{small}</dd></div>"


def _failures(rows: Sequence[Mapping[str, Any]]) -> str:
    """Samples that a reward function failed to score, by kind."""
    kinds = dict.fromkeys(name for row in rows for name in row if name.startswith("reward_failures/"))
    body = ""
    for kind in kinds:
        hit = [(row["step"], row[kind]) for row in rows if row.get(kind)]
        if not hit:
            continue
        count, first = sum(count for _, count in hit), hit[0][0]
        cells = [escape(kind.removeprefix("reward_failures/")), f"{count:,}", f"{len(hit):,}", f"{first:,}"]
        body += f"<tr><td>{'</td><td>'.join(cells)}</td></tr>"
    if not body:
        return ""
    head = "<tr><th>kind</th><th>samples</th><th>steps</th><th>first at step</th></tr>"
    text = "Samples that a reward function failed to score; they are excluded from their group's statistics."
    return f'<section><h2>Reward failures</h2><p class="note">{text}</p><table>{head}{body}</table></section>'


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """The same prompts at the first and the last sampled step; where none came up twice, different ones."""
    if not samples:
        return ""
    first, last = samples[0]["step"], samples[-1]["step"]
    before = _by_prompt(samples, first)
    after: dict[str, list[Mapping[str, Any]]] = {}
    for step in sorted({row["step"] for row in samples} - {first}):
        after |= {prompt: rows for prompt, rows in _by_prompt(samples, step).items() if prompt in before}
    if after:
        text = "The same prompts, at the first step and the last time they came up."
        pairs = [_pair(before[prompt], after[prompt], same=True) for prompt in after]
    elif last > first:
        text = "Prompts of the first and of the last sampled step; none came up twice."
        late = _by_prompt(samples, last).values()
        pairs = [_pair(*rows, same=False) for rows in zip(before.values(), late)]
    else:
        text, pairs = "Prompts of the first step.", [_pair(rows, [], same=True) for rows in before.values()]
    heading = "Completions, before and after" if last > first else "Completions"
    shown = "".join(pairs[:SHOWN_PROMPTS])
    return f'<section class="samples"><h2>{heading}</h2><p class="note">{text}</p>{shown}</section>'


def _by_prompt(samples: Sequence[Mapping[str, Any]], step: int) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in samples:
        if row["step"] == step:
            groups.setdefault(json.dumps(row["prompt"]), []).append(row)
    return groups


def _pair(first: Sequence[Mapping[str, Any]], last: Sequence[Mapping[str, Any]], *, same: bool) -> str:
    prompt = f'<div class="wide">{_prompt(first[0])}</div>' if same else ""
    sides = []
    for rows in filter(None, (first, last)):
        head = "" if same else _prompt(rows[0])
        body = "".join(_response(row) for row in rows[:SHOWN_RESPONSES])
        sides.append(f"<div><h3>Step {rows[0]['step']:,}</h3>{head}{body}</div>")
    return f"<article>{prompt}{''.join(sides)}</article>"


def _prompt(row: Mapping[str, Any]) -> str:
    messages = []
    for message in row["prompt"]:
        content = message.get("content")
        content = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        messages.append(f"<p class='role'>{escape(str(message.get('role', '')))}</p><pre>{escape(content)}</pre>")
    return "".join(messages)


def _response(row: Mapping[str, Any]) -> str:
    by_function = row["by_function"] if len(row["by_function"]) > 1 else {}
    reward = [f"reward {number(row['reward'])}"] if row["by_function"] else []
    parts = [*reward, *(f"{escape(k)} {number(v)}" for k, v in by_function.items())]
    if row["finish_reason"] == "length":
        parts.append("cut at the length limit")
    return f'<pre class="response">{escape(row["response"])}</pre><p class="score">{" · ".join(parts)}</p>'


def _options(args: Mapping[str, Any]) -> str:
    """The main options, and all of them behind a click; only those that the task uses and that have a value."""
    if not args:
        return ""
    task = args.get("task")
    used = {option.name for option in fields(Config) if task in option.metadata.get("tasks", [task])}

    def table(names: Sequence[str]) -> str:
        shown = [(name, _text(args.get(name))) for name in names if name in used]
        return f"<table>{''.join(f'<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in shown if v)}</table>"

    every = f"<details><summary>All options</summary>{table(sorted(args))}</details>"
    return f'<section class="options"><h2>Options</h2>{table(MAIN_OPTIONS)}{every}</section>'


def _text(value: Any) -> str:
    """An option's value; "" for None and what is empty."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {item}" for key, item in value.items() if item is not None)
    return "" if value is None else str(value)
