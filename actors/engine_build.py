"""How a vLLM engine is built from a run's options."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from actors.device_memory import memory_explained, require_given_gpus
from actors.imports import lasting_imports
from actors.weights.checkpoint_names import checkpoint_dtype
from rlhf.counts import most_at_a_time

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine


def import_engine() -> type[LLMEngine]:
    """vLLM's engine, whose import takes long."""
    with lasting_imports():
        from vllm.v1.engine.llm_engine import LLMEngine

    return LLMEngine


def build_engine(config: Any, index: int, load_weights: bool, sleeps: bool) -> LLMEngine:
    """The engine, in this process; the arguments are those of `RolloutEngine`."""
    logging.getLogger("vllm").setLevel(logging.ERROR)
    require_given_gpus()
    with memory_explained("building the engine"):
        return import_engine().from_engine_args(_engine_args(config, index, load_weights, sleeps))


def lora_request(folders: Sequence[str]) -> LoRARequest | None:
    """The adapter in the first of `folders`, as a request asks for it; None without one."""
    if not folders:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name="adapter", lora_int_id=1, lora_path=folders[0])


def _engine_args(config: Any, index: int, load_weights: bool, sleeps: bool) -> EngineArgs:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    seeded_on_cpu = config.deterministic and current_platform.is_cpu()
    share = config.vllm_gpu_memory_utilization  # None where nobody looked at the device
    options = {
        "model": config.model,
        "dtype": config.torch_dtype or checkpoint_dtype(config.model),
        "load_format": "auto" if load_weights else "dummy",
        "seed": config.seed + index,
        "tensor_parallel_size": config.vllm_tensor_parallel_size,
        "distributed_executor_backend": "mp" if config.vllm_tensor_parallel_size > 1 else None,
        "max_model_len": config.vllm_max_model_len,
        "max_num_seqs": most_at_a_time(config),
        "enforce_eager": config.vllm_enforce_eager,
        "enable_prefix_caching": config.vllm_enable_prefix_caching,
        "enable_chunked_prefill": False if seeded_on_cpu else None,  # there vLLM fails on a seeded prompt that is cut in two
        "gpu_memory_utilization": share and share / config.rollout.engines_per_device,
        "logprobs_mode": "processed_logprobs",  # of the distribution sampled from: after temperature, top-p and top-k
        "worker_extension_cls": "actors.weights.vllm_extension.WorkerExtension",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "enable_sleep_mode": sleeps,
    }
    if config.adapters:
        options |= {"enable_lora": True, "max_lora_rank": _room_for(config.adapters[0])}
    given = {name: value for name, value in options.items() if value is not None}
    return EngineArgs(**given | config.vllm)


def _room_for(adapter: str) -> int:
    """The least of the ranks that vLLM reserves memory for in which the adapter's fits."""
    from vllm.config.lora import MaxLoRARanks

    settings = json.loads(Path(adapter, "adapter_config.json").read_text())
    rank = max(settings["r"], *settings.get("rank_pattern", {}).values(), 1)
    return min(room for room in get_args(MaxLoRARanks) if room >= rank)
