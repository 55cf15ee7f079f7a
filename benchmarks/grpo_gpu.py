"""GRPO on GPUs: seconds of a step and of its phases, beside the floor of each phase. By itself on one, colocated.

The work: 64 prompts x 8 responses, 256 + 1024 tokens, beta 0, bfloat16, a Qwen2.5 shape with random weights. "turns" is the
program, whose steps take turns with its floors, so that what the machine does to one it does to the other: vLLM in-process
without logprobs, its fastest way, with an engine on every GPU that the run generates on, all at once; `LLM.generate(logprobs=0)`,
as others do, likewise; and Megatron's forward, backward and optimizer step on batches of the same sizes, by the run's own ranks.
"run" is the program by itself, "copy" a device copy of the weights, "pushes" generation and push alone, with a policy that has
no optimizer, for shapes whose optimizer's state does not fit.

Two GPUs: `-- --vllm_mode server`, or `-- --nproc_per_node 2 --tensor_model_parallel_size 2 --sequence_parallel true
--rollout.num_engines 2 --micro_batch_tokens 32768`.

usage: grpo_gpu.py [--shape 1.5B] [--steps 3] [--tokens 1024] [--only turns,run,copy] [--work FOLDER] [--out result.json]
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
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ |= {"RAY_ADDRESS": "local", "VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1"}
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])

from alone import DefaultAlone, EngineAlone, PolicyAlone, WeightsAlone, random_shards  # noqa: E402
from shapes import VOCABULARY, make_model, make_prompts  # noqa: E402
from turns import run_in_turns  # noqa: E402

if TYPE_CHECKING:
    from rlhf.cluster import Cluster
    from rlhf.records import Prompt
    from rlhf.roles import Roles

PROMPTS, RESPONSES, PROMPT_TOKENS = 64, 8, 256
WARM_UP = 2  # steps: in the second, torch still compiles for sizes that the first did not have
PARTS = ("turns", "run", "copy", "pushes")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="1.5B")
    parser.add_argument("--steps", type=int, default=3, help=f"to measure, after {WARM_UP} to warm up")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--only", default=",".join(PARTS[:3]), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--work", type=Path, help="a folder to keep (default: grpo_gpu-SHAPE in the temporary folder)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", help=argparse.SUPPRESS)  # measure this in this process, and print it
    parser.add_argument("options", nargs="*", help="further options of the run")
    arguments = parser.parse_args()
    arguments.work = arguments.work or Path(tempfile.gettempdir()) / f"grpo_gpu-{arguments.shape}"
    if arguments.here:
        print(json.dumps(globals()[f"measure_{arguments.here}"](arguments)))
        return
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only {', '.join(unknown)}: there are {', '.join(PARTS)}")
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
    command = [sys.executable, __file__, "--here", part, "--work", arguments.work, "--steps", arguments.steps]
    command += ["--tokens", arguments.tokens, "--shape", arguments.shape, "--", *arguments.options]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def options(arguments: argparse.Namespace, **changes: Any) -> list[str]:
    """The run's words; what the user gives comes last."""
    work = arguments.work
    values = {
        "rlhf_type": "grpo", "model": work / "model", "dataset": work / "prompts.jsonl", "template_backend": "jinja",
        "model_type": "qwen2", "external_plugins": work / "chance.py", "reward_funcs": "chance", "output_dir": work / "runs",
        "run_name": f"bench-{time.time():.0f}", "num_generations": RESPONSES, "global_batch_size": PROMPTS * RESPONSES,
        "micro_batch_tokens": 8192, "train_iters": WARM_UP + arguments.steps, "max_completion_length": arguments.tokens,
        "max_length": PROMPT_TOKENS, "beta": 0, "lr": 1e-6, "temperature": 1.0, "nproc_per_node": 1,
        "recompute_granularity": "none", "report_to": "none", "save_steps": 10**6, "vllm_gpu_memory_utilization": 0.5,
        "vllm_max_num_seqs": PROMPTS * RESPONSES, "logging_steps": 1, "no_save_optim": "true",
    }  # fmt: skip
    words = (str(word) for name, value in (values | changes).items() for word in (f"--{name}", value))
    return ["rlhf", *words, *arguments.options]


def measure_run(arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each phase after the warm-up; and the logprob difference of the last step."""
    words = options(arguments)
    subprocess.run([sys.executable, str(ROOT / "rlhf" / "main.py"), *words], check=True)
    folder = arguments.work / "runs" / words[words.index("--run_name") + 1]
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")][WARM_UP:]
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


def measure_turns(arguments: argparse.Namespace) -> dict[str, Any]:
    """For each turn after the warm-up, seconds of the run's phases and of the floors; what their sums say."""
    import rlhf.roles
    from rlhf.counts import policy_ranks, rollout_engines
    from rlhf.model_folder import read_shape
    from rlhf.options import load_config

    rlhf.roles.Policy = PolicyAlone
    words = options(arguments, vllm_gpu_memory_utilization=0.3)  # the floors have engines of their own
    both = run_in_turns(words, turn=1, others=partial(start_floors, tokens=arguments.tokens))[WARM_UP:]
    steps, turns = [rows[0] for rows, _ in both], [{"run": rows[0]["seconds"]} | floors for rows, floors in both]
    run = {phase: sum(turn["run"][phase] for turn in turns) for phase in turns[0]["run"]}
    default, fast, train = (sum(turn[name] for turn in turns) for name in ("default", "fast", "train"))
    config, shape = load_config(words), read_shape(arguments.work / "model")
    gpus = rollout_engines(config) // config.rollout.engines_per_device * config.vllm_tensor_parallel_size
    trained = len(steps) * PROMPTS * RESPONSES * (PROMPT_TOKENS + arguments.tokens)
    sums = {
        "generate: default way / run": default / run["generate"],
        "generate: fastest way / run": fast / run["generate"],
        "generate: response tokens/s a GPU": sum(row["response_tokens"] for row in steps) / run["generate"] / gpus,
        "train: alone / run": train / run["train"],
        "train: TFLOP/s a GPU": 6e-12 * shape.num_parameters() * trained / run["train"] / policy_ranks(config),
        "step: sum of the floors / run": (fast + train) / run["step"],
        "logprob difference": max(row["rollout_train_logprob_diff"] for row in steps),
    }
    return {"turns": turns, "sums": {name: float(f"{value:.4g}") for name, value in sums.items()}}


def start_floors(cluster: Cluster, roles: Roles, *, tokens: int) -> Callable[[], dict[str, float]]:
    """vLLM's two other ways on the run's GPUs, and a batch for its ranks: what measures each of them once.

    Each engine's KV cache is as large as the run's on a GPU, instead of what vLLM finds free there. The first call, which
    compiles, samples a few tokens alone.
    """
    import numpy as np
    import ray

    from actors.rollout import ENVIRONMENT
    from rlhf.config import RolloutRole
    from rlhf.counts import own_places
    from rlhf.memory import engine_memory
    from rlhf.model_folder import read_shape

    config, policy = cluster.config, roles.policy
    each, width = config.rollout.engines_per_device, config.vllm_tensor_parallel_size
    count = cluster.num_engines // each
    cache = int(1.05 * each * engine_memory(config, read_shape(Path(config.model))).kv_cache)
    first = cluster.policy_ranks if own_places(config) else 0
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(first + count * width)))).split(",")[first:]
    places = [",".join(listed[index * width : (index + 1) * width]) for index in range(count)]

    def start(kind: type, *values: Any, env: dict[str, str] | None = None) -> list[Any]:
        chosen = [{"CUDA_VISIBLE_DEVICES": gpus, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"} for gpus in places]  # not by Ray
        kinds = [ray.remote(kind).options(num_cpus=0, runtime_env={"env_vars": one | (env or {})}) for one in chosen]
        return [kind.remote(*values) for kind in kinds]

    of_fast = {"vllm_gpu_memory_utilization": 0.1, "vllm": config.vllm | {"kv_cache_memory_bytes": cache}}
    of_default = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": cache}
    of_default |= {"max_num_seqs": PROMPTS * RESPONSES, "tensor_parallel_size": width}
    fast = start(EngineAlone, replace(config, rollout=RolloutRole(), **of_fast), 0, env=ENVIRONMENT)
    default = start(DefaultAlone, config.model, of_default)
    ray.get([engine.__ray_ready__.remote() for engine in fast + default])
    arrays = [np.array(ids, np.int32) for ids in prompts()]
    policy.on_shards("take", random_shards(arrays, RESPONSES, tokens, VOCABULARY, config, policy.data_size))
    turn = 0

    def once() -> dict[str, float]:
        nonlocal turn
        turn += 1
        shares = [prompts(turn)[index::count] for index in range(count)]
        answer = [RESPONSES, tokens if turn > 1 else 32]
        seconds = {"train": max(policy.on_all("train_alone", config.beta))}
        seconds["fast"] = max(ray.get([one.alone.remote(share, *answer, None) for one, share in zip(fast, shares)]))
        seconds["default"] = max(ray.get([one.alone.remote(share, *answer) for one, share in zip(default, shares)]))
        return seconds

    return once


def measure_pushes(arguments: argparse.Namespace) -> list[dict[str, float]]:
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
