"""GRPO on 2 CPU cores: seconds of a step and of its phases, beside the floor of each phase and TRL's GRPOTrainer, in one run.

The work: 16 prompts x 8 responses x 64 tokens, beta 0.04, 4 micro batches of 32 responses, float32, a model of 0.7M parameters.
A floor is what the engine takes when it has nothing else to do: vLLM stepping through the same prompts, Megatron
going through the same batches (reference forward; forward, backward, optimizer step), with as many processes as the run has.

usage: grpo_cpu.py [--steps 12] [--no-trl] [--out result.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from tiny import VOCABULARY, make_model, make_prompts  # noqa: E402

from actors.policy import Policy  # noqa: E402

PROMPTS, RESPONSES, TOKENS = 16, 8, 64
RANKS = 2
WARM_UP = 3  # steps that are not counted


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
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
        result = {"whole": whole(work, arguments.steps), "floors": floors(work, arguments.steps)}
        if not arguments.no_trl:
            result["trl"] = trl(work, arguments.steps)
    print(table(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2))


def command(work: Path, steps: int) -> list[str]:
    options = {
        "rlhf_type": "grpo", "model": work / "model", "dataset": work / "prompts.jsonl", "template_backend": "jinja",
        "external_plugins": work / "variety.py", "reward_funcs": "variety", "output_dir": work / "runs", "run_name": "bench",
        "num_generations": RESPONSES, "global_batch_size": PROMPTS * RESPONSES, "micro_batch_size": 32, "train_iters": steps,
        "max_completion_length": TOKENS, "max_length": 64, "beta": 0.04, "lr": 1e-4, "temperature": 1.0,
        "nproc_per_node": RANKS, "vllm_enforce_eager": "true", "recompute_granularity": "none", "report_to": "none",
        "reward_workers": 1, "save_steps": 10**6,
    }  # fmt: skip
    return ["rlhf", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]


def whole(work: Path, steps: int) -> dict[str, float]:
    """Median seconds of a step and its phases, from the run's own metrics."""
    environment = os.environ | {"RAY_ADDRESS": "local"}
    subprocess.run([sys.executable, str(ROOT / "rlhf" / "main.py"), *command(work, steps)], check=True, env=environment)
    rows = [json.loads(line) for line in open(work / "runs" / "bench" / "metrics.jsonl")][WARM_UP:]
    assert all(row["response_length"] == TOKENS for row in rows)
    return {name: statistics.median(row["seconds"][name] for row in rows) for name in rows[0]["seconds"]}


class PolicyAlone(Policy):
    """A Megatron rank that goes through one batch again and again, packed once."""

    def alone(self, shard: Any, loss: Any, repeats: int) -> tuple[list[float], list[float]]:
        """Seconds of each scoring forward, and of each training step."""
        from actors.megatron.forward_backward import run_micro_batches
        from actors.megatron.micro_batch import fetch_sources, pack_micro_batches

        batches = pack_micro_batches(shard, fetch_sources(shard), device=self.platform.device, multiple=self.multiple)
        scoring, training = [], []
        for _ in range(repeats):
            start = time.monotonic()
            run_micro_batches(self.module, batches, self._score, backward=False)
            middle = time.monotonic()
            self.training.zero_gradients()
            run_micro_batches(
                self.module,
                batches,
                lambda logits, batch: loss(self._next_token_logprobs(logits, batch), batch.batch),
                backward=True,
            )
            self.training.update()
            scoring.append(middle - start)
            training.append(time.monotonic() - middle)
        return scoring, training


class EngineAlone:
    """vLLM driven by a plain loop."""

    def __init__(self, config: Any, index: int):
        from actors.rollout import _build

        self.config, self.engine = config, _build(config, index, load_weights=True)

    def alone(self, prompts: list[list[int]], repeats: int) -> list[float]:
        """Seconds to answer all prompts, each time."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            n=RESPONSES, temperature=1.0, max_tokens=TOKENS, ignore_eos=True, logprobs=0, flat_logprobs=True, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        seconds = []
        for repeat in range(repeats):
            self.engine.reset_prefix_cache()
            start = time.monotonic()
            for index, ids in enumerate(prompts):
                self.engine.add_request(f"{repeat}-{index}", {"prompt_token_ids": ids}, params)
            while self.engine.has_unfinished_requests():
                self.engine.step()
            seconds.append(time.monotonic() - start)
        return seconds


def floors(work: Path, steps: int) -> dict[str, float]:
    """Median seconds of each engine alone; the slower process counts."""
    from functools import partial

    import numpy as np
    import ray

    from actors.group import RankGroup
    from actors.rollout import ENVIRONMENT
    from rlhf.batching import make_shards
    from rlhf.cluster import QUIET
    from rlhf.losses import grpo_loss
    from rlhf.options import load_config
    from rlhf.records import GroupTokens, SequenceRef

    config = load_config(command(work, steps))
    environment = QUIET | {"PYTHONPATH": os.pathsep.join(sys.path[:2]), "OMP_NUM_THREADS": "1"}
    ray.init(address="local", include_dashboard=False, logging_level="ERROR", runtime_env={"env_vars": environment})
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCABULARY, 20).astype(np.int32) for _ in range(PROMPTS)]

    engine = ray.remote(num_cpus=0)(EngineAlone).options(runtime_env={"env_vars": ENVIRONMENT})
    engines = [engine.remote(config, index) for index in range(RANKS)]
    parts = [[ids.tolist() for ids in prompts[index::RANKS]] for index in range(RANKS)]
    ray.get([e.alone.remote(part, WARM_UP) for e, part in zip(engines, parts)])
    generate = ray.get([e.alone.remote(part, steps) for e, part in zip(engines, parts)])
    for actor in engines:
        ray.kill(actor)

    ranks = [
        ray.remote(concurrency_groups={"report": 1})(PolicyAlone).options(num_cpus=0).remote(config, rank=rank, world_size=RANKS)
        for rank in range(RANKS)
    ]
    policy = RankGroup("policy", ranks, timeout=300)
    policy.setup()
    policy.broadcast("schedule", 10**6)
    sources = [
        ray.put(
            GroupTokens(
                prompt_ids=ids,
                response_ids=tuple(rng.integers(3, VOCABULARY, TOKENS).astype(np.int32) for _ in range(RESPONSES)),
                rollout_logprobs=tuple(np.full(TOKENS, -6, np.float32) for _ in range(RESPONSES)),
            )
        )
        for ids in prompts
    ]
    count = PROMPTS * RESPONSES
    units = [
        [SequenceRef(source=s, item=i, key=s * RESPONSES + i, length=20 + TOKENS, weight=1 / count / TOKENS, advantage=1.0)]
        for s in range(PROMPTS)
        for i in range(RESPONSES)
    ]
    shards = make_shards(
        units, sources, trained_tokens=count * TOKENS, data_size=RANKS, max_units=config.micro_batch_size, max_tokens=None
    )
    loss = partial(grpo_loss, beta=0.04)
    measured = policy.scatter("alone", shards, loss, WARM_UP + steps)
    ray.shutdown()
    slower = [[max(times) for times in zip(*kind)][WARM_UP:] for kind in zip(*measured)]
    return {
        "generate": statistics.median(max(times) for times in zip(*generate)),
        "logprobs": statistics.median(slower[0]),
        "train": statistics.median(slower[1]),
    }


def trl(work: Path, steps: int) -> float:
    """Median seconds of TRL's step."""
    script = ROOT / "benchmarks" / "trl_grpo_cpu.py"
    arguments = [work / "model", work / "prompts.jsonl", steps, PROMPTS, RESPONSES, TOKENS]
    done = subprocess.run([sys.executable, str(script), *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])["seconds"]


def table(result: dict[str, Any]) -> str:
    """A text table of phases and ratios."""
    whole, floors = result["whole"], result["floors"]
    lines = [f"{'':10} {'seconds':>9} {'floor':>9}"]
    for phase, seconds in whole.items():
        floor = sum(floors.values()) if phase == "step" else floors.get(phase)
        lines.append(f"{phase:10} {seconds:9.3f} " + (f"{floor:9.3f}" if floor is not None else " " * 9))
    lines.append(f"step / sum of the floors: {whole['step'] / sum(floors.values()):.2f}")
    lines.append(f"response tokens a second: {PROMPTS * RESPONSES * TOKENS / whole['step']:,.0f}")
    if "trl" in result:
        lines.append(f"TRL: {result['trl']:.3f} s a step; step / TRL: {whole['step'] / result['trl']:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
