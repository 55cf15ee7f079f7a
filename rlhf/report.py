"""report.html: one self-contained page about a run, made from the files in its folder.

No scripts, nothing fetched (the page's own policy forbids both); whatever a model or a user wrote is escaped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from rlhf.charts import Series, line_chart, number, stacked_bars
from rlhf.config import Config
from rlhf.report_page import PAGE, STYLE

PHASES = {"generate": 1, "score": 5, "logprobs": 4, "train": 3, "push": 6, "switch": 8, "save": 2}  # and their colours
FINAL_STEPS = 10  # "the end" of a run is the mean of so many last steps
SHOWN_PROMPTS = 4
SHOWN_RESPONSES = 2
MAIN_OPTIONS = (
    "model", "dataset", "reward_funcs", "train_iters", "global_batch_size", "num_generations", "max_completion_length",
    "max_length", "lr", "beta", "teacher", "lmbda", "temperature", "tuner_type", "torch_dtype", "tensor_model_parallel_size",
    "pipeline_model_parallel_size", "vllm_mode", "seed",
)  # fmt: skip


def write_report(folder: Path) -> Path | None:
    """Make `folder/report.html` from metrics.jsonl, samples.jsonl and args.json; None without a finished step."""
    rows = _read_lines(folder / "metrics.jsonl")
    if not rows:
        return None
    args = json.loads((folder / "args.json").read_text()) if (folder / "args.json").exists() else {}
    title = escape(folder.name)
    sections = [
        f"<header><h1>{title}</h1><p>{_summary(rows, args)}</p></header>",
        _tiles(rows),
        f'<section class="charts">{_charts(rows)}</section>',
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


def _values(rows: Sequence[Mapping[str, Any]], name: str) -> list[float | None]:
    return [row.get(name) for row in rows]


def _end(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    known = [value for value in _values(rows[-FINAL_STEPS:], name) if value is not None]
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


def _tiles(rows: Sequence[Mapping[str, Any]]) -> str:
    """The final numbers, each beside the first step's."""
    names = {
        "reward": "Reward",
        "loss": "Loss",
        "kl": f"KL {_compared(rows)}",
        "response_length": "Response length, tokens",
        "rollout_train_logprob_diff": "Rollout–train logprob difference",
        "tokens_per_second": "Tokens per second",
    }
    tiles = []
    for name, label in names.items():
        first, last = rows[0].get(name), _end(rows, name)
        if last is not None and not (name == "loss" and "reward" in rows[0]):
            tiles.append(_tile(label, first if len(rows) > 1 else None, last))
    seconds = [row["seconds"]["step"] for row in rows]
    tiles.append(_tile("Seconds per step", seconds[0] if len(rows) > 1 else None, fmean(seconds[-FINAL_STEPS:])))
    count = min(FINAL_STEPS, len(rows))
    note = f'<p class="note">Large: mean of the last {count} steps.</p>' if count > 1 else ""
    return f'<dl class="tiles">{"".join(tiles)}</dl>{note}'


def _compared(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the metric `kl` compares: distillation goes from the teacher to the policy."""
    return "from the teacher" if "on_policy" in rows[0] else "to the reference"


def _tile(label: str, first: float | None, last: float) -> str:
    small = f"<small>first step {number(first, 3)}</small>" if first is not None else ""
    return f"<div><dt>{label}</dt><dd>{number(last, 3)}{small}</dd></div>"


def _charts(rows: Sequence[Mapping[str, Any]]) -> str:
    steps = [row["step"] for row in rows]
    window = max(1, len(rows) // 20) if len(rows) >= 30 else 1
    smooth = f"thick: running mean of {window} steps" if window > 1 else ""

    def lines(title: str, note: str, *series: Series, window: int = window) -> str:
        known = [one for one in series if any(value is not None for value in one.values)]
        return _figure(title, note, line_chart(steps, known, window=window), known)

    def one(title: str, note: str, name: str, color: int = 1, band: str | None = None) -> str:
        spread = _values(rows, band) if band else None
        return lines(title, note, Series(name=name, values=_values(rows, name), color=color, band=spread))

    functions = [name for name in rows[-1] if name.startswith("reward/")]
    by_function = [
        Series(name=name.removeprefix("reward/"), values=_values(rows, name), color=i % 6 + 1)
        for i, name in enumerate(functions)
    ]
    figures = [
        one("Reward", "mean per step; band: ± reward_std, the spread within a group", "reward", 1, "reward_std"),
        lines("Reward by function", "mean before weighting", *by_function) if len(functions) > 1 else "",
        one(f"KL {_compared(rows)}", "nats per token", "kl", 2),
        one("Response length", "tokens", "response_length", 3),
        one("Responses cut off", "share that reached max_completion_length", "cut_off", 3),
        one("Groups without signal", "share whose rewards are all equal", "groups_without_signal", 5),
        one("Loss", "", "loss", 4),
        one("Gradient norm", "before clipping", "grad_norm", 5),
        lines("Learning rate", "", Series(name="lr", values=_values(rows, "lr"), color=6), window=1),
        one("Rollout–train difference", "mean |logprob difference|, nats per token", "rollout_train_logprob_diff", 2),
        _phases(rows, steps),
        one("Throughput", "tokens per second", "tokens_per_second", 3),
        _gpu_memory(rows, lines),
    ]
    if smooth:
        figures.append(f'<p class="note wide">Thin line: each step; {smooth}. Hover over a chart for values.</p>')
    return "".join(figures)


def _gpu_memory(rows: Sequence[Mapping[str, Any]], lines: Callable[..., str]) -> str:
    """What was in use in each phase; empty without GPUs."""
    measured = [
        Series(name=phase, values=_values(rows, f"max_gpu_gib_{phase}"), color=PHASES[phase])
        for phase in ("train", "push", "generate")
    ]
    predicted = [(one.name, rows[-1].get(f"predicted_gpu_gib_{one.name}")) for one in measured]
    expected = ", ".join(f"{phase} {number(gib, 3)}" for phase, gib in predicted if gib is not None)
    return lines("GPU memory", f"most in use on one GPU, GiB; predicted: {expected}", *measured, window=1)


def _phases(rows: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> str:
    layers = []
    for phase, color in PHASES.items():
        values = [row["seconds"].get(phase) for row in rows]
        if any(values):
            layers.append(Series(name=phase, values=values, color=color))
    other = []
    for row in rows:
        known = sum(row["seconds"].get(phase) or 0 for phase in PHASES)
        other.append(max(0.0, (row["seconds"].get("step") or 0) - known))
    if any(other):
        layers.append(Series(name="other", values=other, color=7))
    bars = stacked_bars(steps, layers, unit="s") if layers else ""
    return _figure("Time per phase", "seconds per step", bars, layers)


def _figure(title: str, note: str, svg: str, series: Sequence[Series]) -> str:
    if not svg:
        return ""
    keys = "".join(f'<span><i style="background:var(--c{one.color})"></i>{escape(one.name)}</span>' for one in series)
    legend = f'<span class="legend">{keys}</span>' if len(series) > 1 else ""
    return f"<figure><figcaption><b>{title}</b> <span>{note}</span>{legend}</figcaption>{svg}</figure>"


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
