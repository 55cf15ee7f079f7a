"""GRPO on GPUs: seconds of a step and of its phases, beside the floor of each phase, in one go. By itself on one, colocated.

The work: 64 prompts x 8 responses, 256 + 1024 tokens, beta 0, bfloat16, a Qwen2.5 shape with random weights. "run" is the
program. "generation" has its engines take turns with vLLM driven by `LLM.generate(logprobs=0)`, as others do, and with vLLM
in-process without logprobs, its fastest way. The other floors have the GPUs to themselves: Megatron's forward, backward and
optimizer step on batches of the same sizes, with as many ranks as the run; a device copy of the weights. "turns" is generation
and push alone, with a policy that has no optimizer.

Two GPUs: `-- --vllm_mode server`, or `-- --nproc_per_node 2 --tensor_model_parallel_size 2 --sequence_parallel true
--rollout.num_engines 2 --micro_batch_tokens 32768`.

usage: grpo_gpu.py [--shape 1.5B] [--steps 3] [--tokens 1024] [--only run,generation,megatron,copy] [--out result.json]
                   [-- further options of the run]
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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ |= {"RAY_ADDRESS": "local", "VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1"}
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])

from alone import DefaultAlone, EngineAlone, PolicyAlone, WeightsAlone, random_shards  # noqa: E402
from shapes import VOCABULARY, make_model, make_prompts  # noqa: E402

if TYPE_CHECKING:
    from rlhf.records import Prompt

PROMPTS, RESPONSES, PROMPT_TOKENS = 64, 8, 256
PARTS = ("run", "generation", "megatron", "copy")  # "turns" is for shapes whose optimizer state does not fit


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="1.5B")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--work", type=Path, help="a folder to keep (default: grpo_gpu-SHAPE in the temporary folder)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("options", nargs="*", help="further options of the run")
    arguments = parser.parse_args()
    arguments.work = arguments.work or Path(tempfile.gettempdir()) / f"grpo_gpu-{arguments.shape}"
    parts = arguments.only.split(",")
    if len(parts) == 1 and parts[0] != "run":  # in its own process: prints what it measured
        print(json.dumps(globals()[f"measure_{parts[0]}"](arguments)))
        return
    result: dict[str, Any] = {}
    if not (arguments.work / "chance.py").exists():
        result["parameters"] = apart("make", arguments)
    for part in parts:
        result[part] = measure_run(arguments) if part == "run" else apart(part, arguments)
        print(part, json.dumps(result[part]), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1))


def apart(part: str, arguments: argparse.Namespace) -> Any:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--only", part, "--work", arguments.work, "--steps", arguments.steps]
    command += ["--tokens", arguments.tokens, "--shape", arguments.shape, "--", *arguments.options]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def options(arguments: argparse.Namespace) -> list[str]:
    work = arguments.work
    values = {
        "rlhf_type": "grpo", "model": work / "model", "dataset": work / "prompts.jsonl", "template_backend": "jinja",
        "model_type": "qwen2", "external_plugins": work / "chance.py", "reward_funcs": "chance", "output_dir": work / "runs",
        "run_name": f"bench-{time.time():.0f}", "num_generations": RESPONSES, "global_batch_size": PROMPTS * RESPONSES,
        "micro_batch_tokens": 8192, "train_iters": arguments.steps + 1, "max_completion_length": arguments.tokens,
        "max_length": PROMPT_TOKENS, "beta": 0, "lr": 1e-6, "temperature": 1.0, "nproc_per_node": 1,
        "recompute_granularity": "none", "report_to": "none", "save_steps": 10**6, "vllm_gpu_memory_utilization": 0.5,
        "vllm_max_num_seqs": PROMPTS * RESPONSES, "logging_steps": 1,
    }  # fmt: skip
    return ["rlhf", *(str(word) for name, value in values.items() for word in (f"--{name}", value)), *arguments.options]


def measure_run(arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each phase, all but the first step; and the logprob difference of the last step."""
    words = options(arguments)
    subprocess.run([sys.executable, str(ROOT / "rlhf" / "main.py"), *words], check=True)
    folder = arguments.work / "runs" / words[words.index("--run_name") + 1]
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")][1:]
    phases = {name: statistics.median(row["seconds"][name] for row in rows) for name in rows[0]["seconds"]}
    differences = {name: rows[-1][name] for name in rows[-1] if "logprob_diff" in name}
    return phases | differences | {"response_tokens": rows[-1]["response_tokens"]}


def measure_make(arguments: argparse.Namespace) -> int:
    """Make the model, the prompts and a reward; the number of parameters."""
    (arguments.work / "model").mkdir(parents=True, exist_ok=True)
    count = make_model(arguments.work / "model", arguments.shape)
    make_prompts(arguments.work / "prompts.jsonl", PROMPT_TOKENS)
    reward = "import random\ndef chance(completions, **columns):\n    return [random.random() for _ in completions]\n"
    (arguments.work / "chance.py").write_text(reward)
    return count


def measure_generation(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of the same work by the run's engines, by `LLM.generate(logprobs=0)` and by vLLM's fastest way.

    They take turns, each turn with prompts of its own: a CPU's speed changes from minute to minute. The run's first engines and
    the fastest way are on one GPU, further engines on others; `LLM`, slow to start, has one too if there are enough, else
    shares the first. The two floors answer one GPU's share of the prompts.
    """
    import ray

    from actors.rollout import ENVIRONMENT, RolloutEngine
    from rlhf.config import RolloutRole
    from rlhf.counts import rollout_engines
    from rlhf.options import load_config
    from rlhf.rollout import RolloutEngines

    config = load_config(options(arguments) + ["--vllm_gpu_memory_utilization", "0.28"])
    count = rollout_engines(config)
    places = count // config.rollout.engines_per_device
    ray.init(include_dashboard=False, logging_level="ERROR")
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(int(ray.cluster_resources()["GPU"]))))).split(",")

    def start(kind: type, *values: Any, gpu: str, env: dict[str, str] | None = None, **named: Any) -> Any:
        shown = {"CUDA_VISIBLE_DEVICES": gpu, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}  # chosen here, not by Ray
        return ray.remote(kind).options(num_gpus=0, runtime_env={"env_vars": shown | (env or {})}).remote(*values, **named)

    def spawn(index: int) -> Any:
        return start(RolloutEngine, config, env=ENVIRONMENT, gpu=gpus[index % places], index=index, load_weights=True)

    def start_default(gpu: str) -> Any:
        return start(DefaultAlone, config.model, gpu=gpu, share=0.28, sequences=PROMPTS * RESPONSES)

    default = start_default(gpus[places]) if len(gpus) > places else None
    rollout = RolloutEngines(spawn, num_engines=count, config=config)
    rollout.setup()
    fast = start(EngineAlone, replace(config, rollout=RolloutRole()), 0, gpu=gpus[0], env=ENVIRONMENT)
    ray.get(fast.__ray_ready__.remote())  # one after the other on one GPU: each looks at what memory is free there
    default = default or start_default(gpus[0])
    ray.get(default.__ray_ready__.remote())

    def by_run(asked: list[list[int]], tokens: int) -> float:
        list(rollout.generate(as_prompts(asked), n=RESPONSES, sampling={"max_completion_length": tokens}))
        return rollout.take_seconds()["generate"]

    ways = {
        "run": by_run,
        "default": lambda asked, tokens: ray.get(default.alone.remote(asked[: PROMPTS // places], RESPONSES, tokens)),
        "fast": lambda asked, tokens: ray.get(fast.alone.remote(asked[: PROMPTS // places], RESPONSES, tokens, None)),
    }
    for answer in ways.values():  # what is slow once
        answer(prompts(0), 32)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(1, 1 + arguments.steps):
        for name, answer in ways.items():
            seconds[name].append(answer(prompts(turn), arguments.tokens))
    return seconds


def measure_megatron(arguments: argparse.Namespace) -> list[tuple[float, float]]:
    """Seconds of (a scoring forward, a training step) on a batch of the run's sizes."""
    import numpy as np
    import ray

    from actors.group import RankGroup
    from rlhf.counts import policy_ranks
    from rlhf.options import load_config

    config = load_config(options(arguments))
    ray.init(include_dashboard=False, logging_level="ERROR")
    kind, size = ray.remote(concurrency_groups={"report": 1})(PolicyAlone).options(num_gpus=1), policy_ranks(config)
    policy = RankGroup("policy", [kind.remote(config, rank=rank, world_size=size) for rank in range(size)], timeout=600)
    policy.setup()
    policy.broadcast("schedule", 100)
    arrays = [np.array(ids, np.int32) for ids in prompts()]
    shards = random_shards(arrays, RESPONSES, arguments.tokens, VOCABULARY, config, policy.data_size)
    policy.on_shards("take", shards)
    return [policy.broadcast("alone", 0.0)[0] for _ in range(1 + arguments.steps)][1:]


def measure_turns(arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds of generation, push and switch, several times; with the memory in use."""
    import ray

    from actors.group import RankGroup
    from rlhf.cluster import Cluster
    from rlhf.counts import policy_ranks, rollout_engines
    from rlhf.engines import build_engines
    from rlhf.options import load_config

    words = options(arguments) + ["--tuner_type", "lora", "--offload_optimizer", "false"]  # no optimizer state is planned for
    config = load_config(words)
    size, turns = policy_ranks(config), []
    with Cluster(config, policy_ranks=size, num_engines=rollout_engines(config)) as cluster:
        kind = ray.remote(concurrency_groups={"report": 1})(WeightsAlone)
        ranks = [cluster.create(kind, cluster.on_place(rank), rank=rank, world_size=size) for rank in range(size)]
        policy = RankGroup("policy", ranks, timeout=600)
        rollout = build_engines(cluster, [policy])
        policy.setup()
        rollout.setup()
        rollout.take_seconds()
        for turn in range(1 + arguments.steps):
            rollout.push(policy)
            groups = rollout.generate(as_prompts(prompts(turn)), n=RESPONSES)
            tokens = sum(sum(group.response_lengths) for group in groups)
            rollout.make_room(policy)
            turns.append(rollout.take_seconds() | rollout.metrics() | {"response_tokens": tokens})
    return turns


def measure_copy(arguments: argparse.Namespace) -> float:
    """Seconds of a device copy of the weights' bytes."""
    import torch
    from safetensors import safe_open

    tensors = []
    for file in (arguments.work / "model").glob("*.safetensors"):
        with safe_open(file, "pt", device="cuda") as weights:
            tensors += [weights.get_tensor(name) for name in weights.keys()]
    copies = [torch.empty_like(tensor) for tensor in tensors]
    seconds = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.monotonic()
        for copy, tensor in zip(copies, tensors):
            copy.copy_(tensor)
        torch.cuda.synchronize()
        seconds.append(time.monotonic() - start)
    return min(seconds)


def prompts(seed: int = 1) -> list[list[int]]:
    import random

    rng = random.Random(seed)
    return [[rng.randrange(3, VOCABULARY - 3) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)]


def as_prompts(token_ids: list[list[int]]) -> list[Prompt]:
    import numpy as np

    from rlhf.records import Prompt

    asked = enumerate(token_ids)
    return [Prompt(index=index, token_ids=np.array(ids, np.int32), messages=[], columns={}) for index, ids in asked]


if __name__ == "__main__":
    main()
