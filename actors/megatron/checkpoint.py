"""A checkpoint folder: what transformers and vLLM load, and `mcore/`, what Megatron continues from.

`mcore/` is Megatron's distributed checkpoint of the model (or its adapter), the optimizer, the schedule and the random
states. It can be read by ranks of another layout, the random states excepted: those belong to a rank.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from actors.megatron.head import described
from actors.megatron.lora import adapter_merged, adapter_parameters, save_adapter
from actors.megatron.model import Model
from actors.megatron.optimizer import Training

DISTRIBUTED = "mcore"
MERGED = "merged"
OF_A_RUN = ("manifest.json", "controller.json")  # when the model's folder is itself a checkpoint
# Optimizer state in the shapes of the parameters, which every layout can cut for itself.
OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


def save_for_inference(model: Model, folder: Path, *, rank: int, merge: bool) -> None:
    """Hugging Face safetensors with config and tokenizer; of an adapter PEFT's files, and with `merge` `merged/`. Collective."""
    if not model.has_adapter:
        _save_weights(model, folder, rank)
        return
    save_adapter(model, folder, rank)
    if rank == 0:
        _copy_companions(model, folder, config=False)
    if merge:
        with adapter_merged(model):
            _save_weights(model, folder / MERGED, rank)


def save_state(model: Model, training: Training, folder: Path, *, step: int, optimizer: bool, rng: bool) -> None:
    """Write `folder`/mcore, a collective. Without `optimizer`, and before the first step, the schedule is left out too."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    target = folder / DISTRIBUTED
    if dist.get_rank() == 0:
        target.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    optimizer = optimizer and training.has_state
    state = _model_state(model)
    contents = {
        "step": step,
        "optimizer": optimizer,
        "optimizers": len(training.optimizer.chained_optimizers),
        "rng": rng,
        "layout": _layout(model),
        "adapter": model.has_adapter,
    }
    everything: dict[str, Any] = {"contents": contents, "model": state}
    if optimizer:
        everything["optimizer"] = training.optimizer.sharded_state_dict(state, metadata=OPTIMIZER_FORMAT)
        everything["scheduler"] = training.scheduler.state_dict()
    if rng:
        everything["rng"] = _rng_state(model, _read_rng())
    dist_checkpointing.save(everything, str(target), _in_process_writer())


def load_state(model: Model, training: Training, folder: Path, *, optimizer: bool, rng: bool) -> int:
    """Restore what `folder`/mcore holds, a collective; returns the step it was written at.

    Without `optimizer` the moments and the schedule start anew, without `rng` the random states stay as they are. Raises
    ValueError when it is of an adapter and the model has none, or the other way round, and when the optimizer's state is of
    experts that were split over ranks and now are not, or the other way round.
    """
    from megatron.core import dist_checkpointing

    source = str(folder / DISTRIBUTED)
    contents = dist_checkpointing.load_common_state_dict(source)["contents"]
    if contents["adapter"] != model.has_adapter:
        kinds = {True: "an adapter", False: "a full model"}
        raise ValueError(f"{folder} is a checkpoint of {kinds[contents['adapter']]}, the run trains {kinds[model.has_adapter]}")
    state = _model_state(model)
    everything: dict[str, Any] = {"model": state}
    optimizer, rng = optimizer and contents["optimizer"], rng and contents["rng"]
    if optimizer:
        _check_optimizers(contents, training, folder)
        everything["optimizer"] = training.optimizer.sharded_state_dict(state, is_loading=True, metadata=OPTIMIZER_FORMAT)
    if rng and contents["layout"] == _layout(model):
        everything["rng"] = _rng_state(model, None)
    loaded = dist_checkpointing.load(everything, source)
    missing, unexpected = model.module.load_state_dict(loaded["model"], strict=False)
    if not model.has_adapter:
        lost = [name for name in missing if not name.endswith("_extra_state")]
        assert not lost and not unexpected, f"checkpoint and model differ: missing {lost}, unexpected {unexpected}"
    if optimizer:
        training.optimizer.load_state_dict(loaded["optimizer"])
        training.scheduler.num_steps = 0
        training.scheduler.load_state_dict(loaded["scheduler"])
        training.has_state = True
    else:
        training.optimizer.reload_model_params()
    if "rng" in everything:
        _restore_rng(loaded["rng"])
    return contents["step"]


def _check_optimizers(contents: dict[str, Any], training: Training, folder: Path) -> None:
    """Megatron gives experts that are split over ranks an optimizer of their own, under other names in a checkpoint."""
    written, now = contents.get("optimizers", 1), len(training.optimizer.chained_optimizers)
    if written != now:
        sizes = {1: "expert_model_parallel_size 1", 2: "expert_model_parallel_size above 1"}
        raise ValueError(
            f"{folder} holds the optimizer's state of {sizes[written]}, the run has {sizes[now]}: give the former, or "
            "--no_load_optim true for a new optimizer"
        )


def _model_state(model: Model) -> dict[str, Any]:
    state = model.module.sharded_state_dict()
    return adapter_parameters(state) if model.has_adapter else state


def _layout(model: Model) -> dict[str, Any]:
    from megatron.core import parallel_state

    data = parallel_state.get_data_parallel_world_size()
    return {
        "tensor": model.sizes.tensor,
        "pipeline": model.sizes.pipeline,
        "sequence": model.sizes.sequence,
        "expert": model.sizes.expert,
        "expert_tensor": model.sizes.expert_tensor,
        "data": data,
    }


def _read_rng() -> dict[str, Any]:
    import random

    import numpy as np
    import torch
    from megatron.core import tensor_parallel

    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracked": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _restore_rng(state: dict[str, Any]) -> None:
    import random

    import numpy as np
    import torch
    from megatron.core import tensor_parallel

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracked"])


def _rng_state(model: Model, state: dict[str, Any] | None) -> Any:
    """One object for each rank: data ranks draw different amounts of random numbers."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    shape = (model.sizes.pipeline, model.sizes.tensor, parallel_state.get_data_parallel_world_size())
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )
    return ShardedObject("rng", state, shape, place, replica_id=0)


def _in_process_writer() -> Any:
    """Megatron's writer starts processes that import the program's main module again; this one writes where it is."""
    from megatron.core.dist_checkpointing.strategies import torch as strategies
    from torch.distributed import checkpoint

    class InProcessWriter(strategies.TorchDistSaveShardedStrategy):
        def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
            state, _, _ = strategies._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
            checkpoint.save(
                strategies.mcore_to_pyt_state_dict(state, False),
                storage_writer=checkpoint.FileSystemWriter(checkpoint_dir),
                planner=strategies.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            )

    return InProcessWriter("torch_dist", 1)


def _save_weights(model: Model, folder: Path, rank: int) -> None:
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    model.config.bridge.save_weights([model.module], str(folder))
    if rank == 0:
        _copy_companions(model, folder, config=True)


def _copy_companions(model: Model, folder: Path, *, config: bool) -> None:
    """What stands beside the weights: tokenizer, generation config, and the model's config with the dtype that was written."""
    for file in sorted(model.folder.iterdir()):
        companion = file.suffix in (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py") and file.name not in OF_A_RUN
        if file.is_file() and companion and file.name != "config.json" and not file.name.endswith(".safetensors.index.json"):
            shutil.copyfile(file, folder / file.name)
    if not config:
        return
    settings = json.loads((model.folder / "config.json").read_text())
    written = str(model.dtype).removeprefix("torch.")
    settings["torch_dtype" if "torch_dtype" in settings else "dtype"] = written
    settings = described(settings, model.head, model.folder)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
