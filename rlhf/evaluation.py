"""`megaray eval`: responses to a dataset's prompts, scored by reward functions; a table and two files."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf.cluster import Cluster
from rlhf.records import Group, Score
from rlhf.results import RowFile, progress, response_row
from rlhf.roles import build_inference

Scored = Sequence[tuple[Group, Score]]
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "max_completion_length", "num_generations", "seed", "system")


def evaluate(cluster: Cluster, results: Path) -> None:
    """Generate, score, print the table; `results` gets the numbers, the .jsonl beside it a row a response."""
    config = cluster.config
    roles = build_inference(cluster)
    roles.scorer.wait_until_ready()
    prompts = roles.data.next_batch(roles.data.num_rows)
    groups = roles.rollout.generate(prompts, n=config.num_generations)
    scored = roles.scorer.score(progress(groups, len(prompts), "prompts answered"), step=0)
    found = summary(scored)
    Console(soft_wrap=True).print(table(found))
    about = {"model": config.model, "adapters": config.adapters, "dataset": config.dataset}
    about |= {name: getattr(config, name) for name in SAMPLING}
    results.write_text(json.dumps(about | found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = results.with_suffix(".jsonl")
    rows.unlink(missing_ok=True)
    with RowFile(rows) as file:
        for group, score in scored:
            for item in range(len(group.texts)):
                file.write(scored_row(group, score, item))
    print(f"results are in {results}, every response in {rows}")


def summary(scored: Scored) -> dict[str, Any]:
    """What the responses got, over all prompts.

    By reward function, and for their weighted sum `reward`: mean and number of the responses that have one, and the standard
    error of that mean, from the spread of the prompts' means: responses to one prompt are not independent (Miller 2024, arXiv
    2411.00640). None where it is not defined.
    """
    functions = scored[0][1].by_function if scored else {}
    columns = {name: [score.by_function[name] for _, score in scored] for name in functions}
    lengths = [length for group, _ in scored for length in group.response_lengths]
    reasons = [reason for group, _ in scored for reason in group.finish_reasons]
    failures = sum((Counter(score.failures) for _, score in scored), Counter())
    return {
        "rewards": {name: statistics(groups) for name, groups in columns.items()},
        "reward": statistics([score.rewards for _, score in scored]),
        "prompts": len(scored),
        "responses": len(lengths),
        "response_length": fmean(lengths),
        "share_cut": reasons.count("length") / len(reasons),
        "failures": dict(failures),
    }


def statistics(groups: Sequence[Sequence[float | None]]) -> dict[str, float | int | None]:
    """Mean, standard error and count of values by prompt; None stands for no value."""
    known = [[value for value in group if value is not None] for group in groups]
    means = [fmean(group) for group in known if group]
    values = [value for group in known for value in group]
    error = stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    return {"mean": fmean(values) if values else None, "std_error": error, "count": len(values)}


def scored_row(group: Group, score: Score, item: int) -> dict[str, Any]:
    """One response and what it got."""
    row = response_row(group.prompt, group.texts[item], group.finish_reasons[item], group.response_lengths[item])
    rewards = {name: values[item] for name, values in score.by_function.items()}
    return {"prompt_index": group.prompt.index, **row, "rewards": rewards, "reward": score.rewards[item]}


def table(found: dict[str, Any]) -> Table:
    """The summary, for the terminal."""
    cut = f"{found['response_length']:.1f} tokens on average, {found['share_cut']:.1%} cut at the limit"
    lost = "".join(f"; {count} scores lost: {kind}" for kind, count in found["failures"].items())
    caption = f"{found['responses']} responses to {found['prompts']} prompts: {cut}{lost}"
    lines = Table("reward", box=None, pad_edge=False, caption=caption, caption_justify="left", caption_style="")
    for name in ("mean", "std error", "count"):
        lines.add_column(name, justify="right")
    total = {"weighted sum": found["reward"]} if len(found["rewards"]) > 1 else {}
    for name, values in (found["rewards"] | total).items():
        lines.add_row(name, _number(values["mean"]), _number(values["std_error"]), str(values["count"]))
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
