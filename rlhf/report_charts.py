"""The figures of report.html."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from rlhf.charts import Series, line_chart, number, stacked_bars

PHASES = {"generate": 1, "score": 5, "logprobs": 4, "train": 3, "push": 6, "switch": 8, "save": 2}  # and their colours
SHARES = {"accuracy": "accuracy", "recall@1": "recall@1", "mrr": "mean reciprocal rank"}
HELD_OUT = {"loss": "loss", "rewards/accuracies": "right preferences", "kl": "KL", **SHARES}


def values(rows: Sequence[Mapping[str, Any]], name: str) -> list[float | None]:
    return [row.get(name) for row in rows]


def compared(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the metric `kl` compares: distillation goes from the teacher to the policy."""
    return "from the teacher" if "on_policy" in rows[0] else "to the reference"


def charts(rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Figures of the steps' metrics, then of what the held-out rows gave."""
    steps = [row["step"] for row in rows]
    window = max(1, len(rows) // 20) if len(rows) >= 30 else 1
    smooth = f"thick: running mean of {window} steps" if window > 1 else ""

    def lines(title: str, note: str, *series: Series, window: int = window) -> str:
        known = [one for one in series if any(value is not None for value in one.values)]
        return _figure(title, note, line_chart(steps, known, window=window), known)

    def one(title: str, note: str, name: str, color: int = 1, band: str | None = None) -> str:
        spread = values(rows, band) if band else None
        return lines(title, note, Series(name=name, values=values(rows, name), color=color, band=spread))

    functions = [name for name in rows[-1] if name.startswith("reward/")]
    by_function = [
        Series(name=name.removeprefix("reward/"), values=values(rows, name), color=i % 6 + 1) for i, name in enumerate(functions)
    ]
    chosen_and_rejected = [
        Series(name=name, values=values(rows, f"rewards/{name}"), color=color) for name, color in (("chosen", 3), ("rejected", 5))
    ]
    figures = [
        one("Reward", "mean per step; band: ± reward_std, the spread within a group", "reward", 1, "reward_std"),
        lines("Reward by function", "mean before weighting", *by_function) if len(functions) > 1 else "",
        one(f"KL {compared(rows)}", "nats per token", "kl", 2),
        one("Entropy", "nats per token, estimated from the sampled tokens", "entropy", 6),
        one("Response length", "tokens", "response_length", 3),
        one("Responses cut off", "share that reached max_completion_length", "cut_off", 3),
        one("Groups without signal", "share whose rewards are all equal", "groups_without_signal", 5),
        one("Loss", "", "loss", 4),
        one("Right preferences", "share of pairs (kto: of rows) on the right side", "rewards/accuracies", 1),
        lines("Rewards", "of the better and the worse answers", *chosen_and_rejected),
        *(one(label.capitalize(), "share of the rows of a step", name, 1) for name, label in SHARES.items()),
        one("Gradient norm", "before clipping", "grad_norm", 5),
        lines("Learning rate", "", Series(name="lr", values=values(rows, "lr"), color=6), window=1),
        one("Rollout–train difference", "mean |logprob difference|, nats per token", "rollout_train_logprob_diff", 2),
        _phases(rows, steps),
        one("Throughput", "tokens per second", "tokens_per_second", 3),
        _gpu_memory(rows, lines),
        *_held_out(evaluations),
    ]
    if smooth:
        figures.append(f'<p class="note wide">Thin line: each step; {smooth}. Hover over a chart for values.</p>')
    return "".join(figures)


def _held_out(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """A figure of each metric that says how good the model is on rows that it is not trained on."""
    steps = [row["step"] for row in evaluations]
    figures = []
    for name, label in HELD_OUT.items():
        series = [Series(name=name, values=values(evaluations, name), color=2)]
        if any(value is not None for value in series[0].values):
            figures.append(_figure(f"Held-out {label}", "", line_chart(steps, series), series))
    return figures


def _gpu_memory(rows: Sequence[Mapping[str, Any]], lines: Callable[..., str]) -> str:
    """What was in use in each phase; empty without GPUs."""
    measured = [
        Series(name=phase, values=values(rows, f"max_gpu_gib_{phase}"), color=PHASES[phase])
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
