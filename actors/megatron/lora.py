"""Low-rank adapters: mcore-bridge's parallel LoRA layers, put in place and switched by PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.megatron.model import Model
from rlhf.config import LINEAR_LAYERS

PEFT_TASKS = {"seq_cls": "SEQ_CLS", "embedding": "FEATURE_EXTRACTION"}  # of a head; others: CAUSAL_LM


def add_adapter(model: Model, config: Any) -> None:
    """Freeze the model and put an adapter on `config.target_modules` (Megatron's names, or all-linear).

    The adapter starts as no change. Of `config.modules_to_save` and of a head of scores copies are trained, which stand in for
    the modules.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    targets = list(LINEAR_LAYERS if "all-linear" in config.target_modules else config.target_modules)
    whole = [*config.modules_to_save, *(["output_layer"] if model.head.kind == "seq_cls" else [])]
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        modules_to_save=whole or None,
    )
    model.module = get_peft_model(model.module, settings)
    model.has_adapter = True
    for layer in model.module.modules():
        if isinstance(layer, LoraLayer):  # mcore-bridge 1.6.5 does not read the dropout that PEFT 0.20 hands on
            layer.lora_dropout["default"] = torch.nn.Dropout(config.lora_dropout)


@contextmanager
def adapter_disabled(model: Model) -> Iterator[None]:
    """The model as it was before training, for the length of a block."""
    with model.module.disable_adapter():
        yield


@contextmanager
def adapter_merged(model: Model) -> Iterator[None]:
    """The adapter added into the weights for the length of a block; afterwards the weights have their old bits again.

    Subtracting the adapter would not give the old bits back, and a run would drift with each push: a copy is kept meanwhile,
    in host memory.
    """
    if not model.has_adapter:
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    # PeftModel.merge_adapter copies the model's config, which by then refers to process groups.
    layers = [layer for layer in model.module.modules() if isinstance(layer, BaseTunerLayer)]
    weights = [parameter for name, parameter in model.module.named_parameters() if ".base_layer." in name]
    kept = [weight.detach().to("cpu", copy=True) for weight in weights]
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer in layers:
            layer.unmerge()
        for weight, old in zip(weights, kept):
            weight.data.copy_(old)


def merge_adapter(model: Model) -> None:
    """Add the adapter into the weights for good."""
    model.module = model.module.merge_and_unload()
    model.has_adapter = False


def save_adapter(model: Model, folder: Path, rank: int) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` as PEFT reads them for the Hugging Face model; collective."""
    bridge = model.config.bridge
    bridge.save_weights([model.module], str(folder), peft_format=True)
    if rank:
        return
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    if model.head.kind == "embedding":  # of a model without an outer class, whose names have one `model.` less
        tensors = {name.replace(".model.model.", ".model.", 1): tensor for name, tensor in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})
    targets = {name.rsplit(".lora_", 1)[0].rsplit(".", 1)[-1] for name in tensors if ".lora_" in name}
    whole = {name.rsplit(".", 1)[-1] for name in bridge._peft_modules_to_save}
    settings = replace(
        model.module.peft_config["default"],
        target_modules=targets,
        base_model_name_or_path=str(model.folder),  # `get_peft_model` has set it to what Megatron's module says: nothing
        task_type=PEFT_TASKS.get(model.head.kind, "CAUSAL_LM"),
        modules_to_save=sorted(whole) or None,
        inference_mode=True,
    )
    if model.config.num_moe_experts:  # PEFT refuses dropout around the tensors that transformers holds experts in
        settings = replace(settings, lora_dropout=0.0)
    settings.save_pretrained(str(folder))


def adapter_parameters(state: dict[str, Any], *, gated: bool) -> dict[str, Any]:
    """The entries of a sharded state dict that are trained with the adapter: the rest is in the model's folder.

    `gated`: a tensor rank's part of linear_fc1 is a part of the gate and one of what it gates. For another number of tensor
    ranks the two are to be cut one by one; mcore-bridge says so of the weight, but not of the adapter's B.
    """
    own = {name: value for name, value in state.items() if ".lora_" in name or ".modules_to_save." in name}
    return {name: _in_halves(value) if gated and ".linear_fc1.lora_B." in name else value for name, value in own.items()}


def _in_halves(tensor: Any) -> Any:
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    axes = range(tensor.prepend_axis_num)  # that of the layers
    return apply_swiglu_sharded_factory(tensor, tuple((i, tensor.global_offset[i], tensor.axis_fragmentations[i]) for i in axes))
