"""The demo's task as a command for GPUs."""

from __future__ import annotations

from pathlib import Path

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo"


def demo(task: str, model: Path, work: Path, name: str, **options) -> list:
    """Its words, with one GPU for the policy; `work` holds the data, `options` replace those of the demo's config file."""
    given = {
        "config": DEMO / ("sft.yaml" if task == "sft" else "grpo.yaml"), "model": model, "torch_dtype": "bfloat16",
        "dataset": work / ("sft.jsonl" if task == "sft" else "grpo.jsonl"), "nproc_per_node": 1, "report_to": "none",
        "output_dir": work, "run_name": name, "logging_steps": 1,
    }  # fmt: skip
    if task == "rlhf":
        given |= {"vllm_gpu_memory_utilization": 0.1}
    return [task, *(word for name, value in (given | options).items() for word in (f"--{name}", value))]
