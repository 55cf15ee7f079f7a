"""A checkpoint folder: what transformers and vLLM load, and `mcore/`, what Megatron continues or starts from.

`mcore/` is Megatron's distributed checkpoint of the model (or its adapter), and of a run also the optimizer, the schedule and
the random states. It can be read by ranks of another layout, the random states excepted: those belong to a rank.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.megatron.head import described_tensors, load_safetensors
from actors.megatron.lora import adapter_merged, adapter_parameters, add_adapter, merge_adapter, save_adapter
from actors.megatron.model import Model
from actors.model_folder import copy_companions
from actors.weights.checkpoint_names import tensor_shapes
from rlhf.heads import Head
from rlhf.megatron_folder import MEGATRON, TENSORS, adapter_of

if TYPE_CHECKING:
    from actors.megatron.optimizer import Training

MERGED = "merged"
# Optimizer state in the shapes of the parameters, which every layout can cut for itself.
OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}
GIVEN = ("max_lr", "min_lr", "lr_mult", "wd_mult", "betas", "eps")  # of a parameter group: what a run's options say


def save_for_inference(model: Model, folder: Path, *, rank: int, merge: bool) -> None:
    """Hugging Face safetensors with config and tokenizer; of an adapter PEFT's files, and with `merge` `merged/`. Collective."""
    if not model.has_adapter:
        save_weights(model, folder, rank=rank)
        return
    save_adapter(model, folder, rank)
    if rank == 0:
        copy_companions(model.folder, folder, dtype=None)
    if merge:
        with adapter_merged(model):
            save_weights(model, folder / MERGED, rank=rank)


def save_weights(model: Model, folder: Path, *, rank: int) -> None:
    """A Hugging Face folder of a model without adapter, or with a merged one. Collective."""
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    model.config.bridge.save_weights([model.module], str(folder))
    if rank == 0:
        copy_companions(model.folder, folder, dtype=model.dtype_name, head=model.head)


def save_model(model: Model, folder: Path, *, rank: int) -> None:
    """`folder`/mcore with the weights alone, and beside it what it takes to train from it and to go back. Collective."""
    _write({"contents": _contents(model, step=0, optimizer=False, rng=False), "model": _model_state(model)}, folder)
    if rank == 0:
        save_description(model, folder)


def save_description(model: Model, folder: Path) -> None:
    """What stands beside `mcore/` where no Hugging Face folder is written: config, tokenizer, names of the tensors."""
    copy_companions(model.folder, folder, dtype=model.dtype_name, head=model.head)
    tensors = described_tensors(tensor_shapes(model.folder), model.head, score=model.config.bridge.hf_score_key)
    (folder / TENSORS).write_text(json.dumps(tensors) + "\n")


def save_state(model: Model, training: Training, folder: Path, *, step: int, optimizer: bool, rng: bool) -> None:
    """Write `folder`/mcore, a collective. Without `optimizer` the schedule is left out too."""
    state = _model_state(model)
    optimizers = len(training.optimizer.chained_optimizers)
    contents = _contents(model, step=step, optimizer=optimizer, rng=rng) | {"optimizers": optimizers}
    everything: dict[str, Any] = {"contents": contents, "model": state}
    if optimizer:
        everything["optimizer"] = training.optimizer.sharded_state_dict(state, metadata=OPTIMIZER_FORMAT)
        everything["scheduler"] = training.scheduler.state_dict()
    if rng:
        everything["rng"] = _rng_state(model, _read_rng())
    _write(everything, folder)


def load_model(model: Model, folder: Path) -> None:
    """Fill the model from `folder`/mcore, a collective; an adapter there is added into the weights of its base, `model.folder`.

    The dtype of the model stays; tensors are cast to it. A head of scores that the checkpoint does not have stays as it is.
    Raises ValueError when it is a checkpoint of another model, lacks the output layer that the model needs, or has another number
    of scores.
    """
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException

    adapter = adapter_of(folder)
    if adapter is not None:
        load_weights(model, model.folder)
        add_adapter(model, adapter)
    state, source = _model_state(model), str(folder / MEGATRON)
    left = set()
    if not _has_head(dist_checkpointing.load_common_state_dict(source)["contents"], model.head, folder):
        left = {name for name in state if name.startswith("output_layer.")}
    try:
        loaded = dist_checkpointing.load({"model": {name: state[name] for name in state if name not in left}}, source)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise ValueError(f"{source} cannot be read as the model of {model.folder}/config.json: {cause}") from error
    _fill(model, loaded["model"], left=left)
    if adapter is not None:
        merge_adapter(model)


def load_weights(model: Model, folder: Path) -> None:
    """Fill the model from a folder's safetensors, or its `mcore/` where it has none. Collective."""
    if any(folder.glob("*.safetensors")):
        load_safetensors(model.module, model.head, folder)
    else:
        load_model(model, folder)


def load_state(model: Model, training: Training, folder: Path, *, optimizer: bool, rng: bool) -> int:
    """Restore what `folder`/mcore holds, a collective; returns the step it was written at.

    Learning rates and Adam's settings are the run's, not the checkpoint's. Without `optimizer` the moments and the schedule
    start anew, without `rng` the random states stay as they are. Raises ValueError when it is of an adapter and the model has
    none, or the other way round, and when the optimizer's state is of experts that were split over ranks and now are not, or
    the other way round.
    """
    from megatron.core import dist_checkpointing

    source = str(folder / MEGATRON)
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
    _fill(model, loaded["model"])
    if optimizer:
        given = [{name: group[name] for name in GIVEN if name in group} for group in training.optimizer.param_groups]
        training.optimizer.load_state_dict(loaded["optimizer"])
        for group, values in zip(training.optimizer.param_groups, given, strict=True):
            group.update(values)  # Megatron would take the checkpoint's
        training.scheduler.num_steps = 0
        training.scheduler.load_state_dict(loaded["scheduler"])
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


def _write(everything: dict[str, Any], folder: Path) -> None:
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    target = folder / MEGATRON
    if dist.get_rank() == 0:
        target.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(everything, str(target), _in_process_writer())


def _contents(model: Model, *, step: int, optimizer: bool, rng: bool) -> dict[str, Any]:
    return {
        "step": step,
        "optimizer": optimizer,
        "rng": rng,
        "layout": _layout(model),
        "adapter": model.has_adapter,
        "head": model.head.kind,
        "num_labels": model.head.num_labels,
    }


def _has_head(contents: dict[str, Any], head: Head, folder: Path) -> bool:
    """Whether the output layer of a checkpoint, if any, is that of a model with `head`."""
    stored = Head(kind=contents["head"], num_labels=contents["num_labels"])
    tokens = ("causal_lm", "generative_reranker")
    if head.kind in tokens and stored.kind not in tokens:
        raise ValueError(f"{folder} has no output layer for tokens (it is a checkpoint of {stored.kind}): take another")
    if head.kind == stored.kind == "seq_cls" and head.num_labels != stored.num_labels:
        raise ValueError(
            f"{folder} ends in a head of {stored.num_labels} labels, the model is to have {head.num_labels}: take the checkpoint "
            "that it was made from"
        )
    return head.kind != "seq_cls" or stored.kind == "seq_cls"


def _model_state(model: Model) -> dict[str, Any]:
    """Without Transformer Engine's own states, which are empty but in FP8, and which a checkpoint written on a CPU lacks."""
    state = {name: value for name, value in model.module.sharded_state_dict().items() if "_extra_state" not in name}
    return adapter_parameters(state, gated=model.config.gated_linear_unit) if model.has_adapter else state


def _fill(model: Model, state: dict[str, Any], *, left: Collection[str] = ()) -> None:
    """Set the weights to `state`, which has all of them but those in `left`."""
    missing, unexpected = model.module.load_state_dict(state, strict=False)
    if not model.has_adapter:
        lost = [name for name in missing if "_extra_state" not in name and name not in left]
        assert not lost and not unexpected, f"checkpoint and model differ: missing {lost}, unexpected {unexpected}"


def _layout(model: Model) -> dict[str, Any]:
    from megatron.core import parallel_state

    data = parallel_state.get_data_parallel_world_size()
    return {
        "tensor": model.sizes.tensor,
        "pipeline": model.sizes.pipeline.size,
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

    shape = (model.sizes.pipeline.size, model.sizes.tensor, parallel_state.get_data_parallel_world_size())
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
