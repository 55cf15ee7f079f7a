"""GRPO on 2 CPU cores: seconds of a step and of its phases, beside the floor of each phase and a step of TRL's GRPOTrainer.

The work: 16 prompts x 8 responses x 64 tokens, beta 0.04, 4 micro batches of 32 responses, float32, a model of 0.7M parameters.
A floor is what the engine takes when it has nothing else to do: vLLM stepping through the same prompts, Megatron
going through the same batches (reference forward; forward, backward, optimizer step), in as many processes of their own as
the run has. The run and the floors take turns of TURN steps each, so that a machine whose speed drifts slows both alike; the
first step of a turn, which finds cold caches, does not count. TRL, which wants both cores for itself, comes before and after.

usage: grpo_cpu.py [--turns 5] [--no-trl] [--out result.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "configs")]
os.environ |= {"RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT / "benchmarks")}

from alone import EngineAlone, PolicyAlone, random_shards  # noqa: E402
from tiny import VOCABULARY, make_model, make_prompts  # noqa: E402
from turns import run_in_turns  # noqa: E402

PROMPTS, RESPONSES, TOKENS = 16, 8, 64
RANKS = 2
TURN = 6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=5, help="that count; one more comes first")
    parser.add_argument("--no-trl", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model")
        make_prompts(work / "prompts.jsonl")
        (work / "variety.py").write_text(
            "def variety(completions, **columns):\n    return [float(len(set(text))) for text in completions]\n"
        )
        trl = [] if arguments.no_trl else [trl_alone(work)]
        result: dict[str, Any] = {"turns": measure(work, 1 + arguments.turns)[1:]}
        result["trl"] = trl and [*trl, trl_alone(work)]
    print(table(**result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1))


def options(work: Path, steps: int) -> list[str]:
    values = {
        "rlhf_type": "grpo", "model": work / "model", "dataset": work / "prompts.jsonl", "template_backend": "jinja",
        "external_plugins": work / "variety.py", "reward_funcs": "variety", "output_dir": work / "runs", "run_name": "bench",
        "num_generations": RESPONSES, "global_batch_size": PROMPTS * RESPONSES, "micro_batch_size": 32, "train_iters": steps,
        "max_completion_length": TOKENS, "max_length": 64, "beta": 0.04, "lr": 1e-4, "temperature": 1.0,
        "nproc_per_node": RANKS, "vllm_enforce_eager": "true", "recompute_granularity": "none", "report_to": "none",
        "reward_workers": 1, "save_steps": 10**6,
    }  # fmt: skip
    return ["rlhf", *(str(word) for name, value in values.items() for word in (f"--{name}", value))]


Seconds = dict[str, float]  # by phase


def measure(work: Path, turns: int) -> list[dict[str, list[Seconds]]]:
    """For each turn the counted steps of the run and of the floors."""

    def start_floors(cluster: Any, roles: Any) -> Any:
        floors = Floors(cluster.config)
        return lambda: [floors.once() for _ in range(TURN)][1:]

    both = run_in_turns(options(work, turns * TURN), turn=TURN, others=start_floors)
    assert all(row["response_length"] == TOKENS for rows, _ in both for row in rows)
    return [{"run": [row["seconds"] for row in rows[1:]], "floor": floor} for rows, floor in both]


class Floors:
    """Engines and ranks of their own, with a batch of the run's sizes; inside the run's Ray."""

    def __init__(self, config: Any):
        import numpy as np
        import ray

        from actors.group import ActorGroup, RankGroup
        from actors.rollout import ENVIRONMENT

        rng = np.random.default_rng(0)
        prompts = [rng.integers(3, VOCABULARY, 20).astype(np.int32) for _ in range(PROMPTS)]
        self.parts = [[ids.tolist() for ids in prompts[index::RANKS]] for index in range(RANKS)]
        one_thread = {"OMP_NUM_THREADS": "1"}
        engine = ray.remote(num_cpus=0)(EngineAlone).options(runtime_env={"env_vars": one_thread | ENVIRONMENT})
        self.engines = ActorGroup("engine", [engine.remote(config, index) for index in range(RANKS)], timeout=300)
        rank = ray.remote(num_cpus=0, concurrency_groups={"report": 1})(PolicyAlone)
        rank = rank.options(runtime_env={"env_vars": one_thread})
        ranks = [rank.remote(config, rank=index, world_size=RANKS) for index in range(RANKS)]
        self.policy = RankGroup("policy", ranks, timeout=300)
        self.policy.setup()
        self.policy.broadcast("schedule", 10**6)
        self.policy.scatter("take", random_shards(prompts, RESPONSES, TOKENS, VOCABULARY, config, RANKS))

    def once(self) -> Seconds:
        """One step's work; of each phase the slower process counts."""
        logprobs, train = self.policy.broadcast("score_alone"), self.policy.broadcast("train_alone", 0.04)
        generate = self.engines.scatter("alone", self.parts, RESPONSES, TOKENS, 0)
        phases = {"generate": max(generate), "logprobs": max(logprobs), "train": max(train)}
        return phases | {"step": sum(phases.values())}


def trl_alone(work: Path) -> float:
    """Median seconds of TRL's step."""
    script = ROOT / "benchmarks" / "trl_grpo_cpu.py"
    arguments = [work / "model", work / "prompts.jsonl", 2 * TURN, PROMPTS, RESPONSES, TOKENS]
    done = subprocess.run([sys.executable, script, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])["seconds"]


def table(turns: list[dict[str, list[Seconds]]], trl: list[float]) -> str:
    """A text table of median seconds, and ratios."""
    ratios = [medians_of(turn["run"])["step"] / medians_of(turn["floor"])["step"] for turn in turns]
    run, floor = (medians_of([step for turn in turns for step in turn[name]]) for name in ("run", "floor"))
    lines = [f"{'':10} {'seconds':>9} {'floor':>9}"]
    for phase, seconds in run.items():
        lines.append(f"{phase:10} {seconds:9.3f} " + (f"{floor[phase]:9.3f}" if phase in floor else ""))
    listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    lines.append(f"step / sum of the floors: {statistics.median(ratios):.3f}, the median of the turns' {listed}")
    lines.append(f"response tokens a second: {PROMPTS * RESPONSES * TOKENS / run['step']:,.0f}")
    if trl:
        ratio = run["step"] / statistics.fmean(trl)
        lines.append(f"TRL: {trl[0]:.3f} s a step before, {trl[1]:.3f} s after; step / TRL: {ratio:.3f}")
    return "\n".join(lines)


def medians_of(steps: list[Seconds]) -> Seconds:
    """The median of each phase."""
    return {phase: statistics.median(step[phase] for step in steps) for phase in steps[0]}


if __name__ == "__main__":
    main()
