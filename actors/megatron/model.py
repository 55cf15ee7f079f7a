"""The model of a rank: built through mcore-bridge after a Hugging Face config."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.megatron.head import head_settings, start_head
from actors.megatron.parallel import ParallelSizes
from actors.megatron.platform import Platform
from rlhf.heads import LANGUAGE_MODEL, Head

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class Model:
    """One pipeline stage's tensor-parallel share of a model."""

    module: torch.nn.Module  # mcore-bridge's GPTModel, or the PEFT model around it
    config: Any  # mcore_bridge.ModelConfig
    folder: Path  # the Hugging Face folder it came from
    sizes: ParallelSizes
    head: Head = LANGUAGE_MODEL
    has_adapter: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.config.params_dtype

    @property
    def dtype_name(self) -> str:
        """As config.json has it: "bfloat16", ..."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding in the Hugging Face folder; tensor parallelism may pad it."""
        return self.config.actual_vocab_size

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face names and tensors, a collective of all ranks; a tensor may alias a live parameter."""
        from mcore_bridge.bridge import gpt_bridge

        with flags_on_host(gpt_bridge, self.sizes):
            yield from self.config.bridge.export_weights([self.module])


def build_model(
    config: Any, folder: str, sizes: ParallelSizes, platform: Platform, options: dict[str, Any], head: Head = LANGUAGE_MODEL
) -> Model:
    """Build this rank's part, with random weights, after `folder`/config.json. `options`: further fields of that config.

    Raises ValueError when the model does not divide into `sizes`.
    """
    import torch
    from mcore_bridge import ModelConfig, get_mcore_model, hf_to_mcore_config
    from transformers import AutoConfig

    hugging_face = AutoConfig.from_pretrained(folder)
    dtype = getattr(torch, config.torch_dtype) if config.torch_dtype else _stored_dtype(hugging_face)
    settings = hf_to_mcore_config(hugging_face)
    _check_divides(settings, sizes)
    settings |= _training_settings(config, sizes, dtype, platform) | head_settings(head)
    if settings.get("num_moe_experts"):
        settings |= _expert_settings(config, sizes)
    settings |= platform.model_settings | options
    with _rope_functions_restored():
        model_config = ModelConfig(**settings)
        (module,) = get_mcore_model(model_config)
    _mark_vocabulary_weights(module, head)
    _silence_progress_bars()
    start_head(module, head, Path(folder), seed=config.seed, environment=config.environment)
    return Model(module=module.to(platform.device), config=model_config, folder=Path(folder), sizes=sizes, head=head)


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The `megatron:` section, which was checked, as fields of the model, the optimizer and the data-parallel config."""
    from mcore_bridge import ModelConfig
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    known = [{field.name for field in fields(kind)} for kind in (ModelConfig, OptimizerConfig, DistributedDataParallelConfig)]
    model, optimizer, ddp = ({name: value for name, value in options.items() if name in names} for names in known)
    return model, optimizer, ddp


def _training_settings(config: Any, sizes: ParallelSizes, dtype: torch.dtype, platform: Platform) -> dict[str, Any]:
    import torch
    from megatron.core.transformer.enums import AttnBackend

    if config.attention_backend == "local":
        raise ValueError("attention_backend local: mcore-bridge builds models with Transformer Engine's attention only")
    backend = config.attention_backend or "flash"
    if backend == "flash" and not platform.flash_attention:
        print("attention_backend flash: flash-attn is not installed; Transformer Engine chooses among its own kernels")
        backend = "auto"
    if config.deterministic:
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
        torch.compiler.set_stance("force_eager")  # what is compiled follows the sizes that came first: others after a resumption
    granularity = None if config.recompute_granularity == "none" else config.recompute_granularity
    settings: dict[str, Any] = {
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "tensor_model_parallel_size": sizes.tensor,
        "pipeline_model_parallel_size": sizes.pipeline.size,
        "num_layers_in_first_pipeline_stage": sizes.pipeline.first,
        "num_layers_in_last_pipeline_stage": sizes.pipeline.last,
        "sequence_parallel": sizes.sequence,
        "attention_backend": AttnBackend[backend],
        "deterministic_mode": config.deterministic,
        "cross_entropy_loss_fusion": config.cross_entropy_loss_fusion,
        "gradient_accumulation_fusion": _fuses_gradients(config, platform),
        "calculate_per_token_loss": True,  # losses come divided: Megatron shall only add (see forward_backward.py)
        "mtp_num_layers": None,
        "recompute_granularity": granularity,
    }
    if granularity == "full":
        settings |= {"recompute_method": config.recompute_method, "recompute_num_layers": config.recompute_num_layers}
    if granularity == "selective":
        settings |= {"recompute_modules": list(config.recompute_modules)}
    return settings


def _fuses_gradients(config: Any, platform: Platform) -> bool:
    if config.gradient_accumulation_fusion and not platform.fused_gradients:
        raise ValueError("gradient_accumulation_fusion needs a GPU and apex's CUDA extensions, which are not here: leave it out")
    return platform.fused_gradients and config.gradient_accumulation_fusion is not False


def _expert_settings(config: Any, sizes: ParallelSizes) -> dict[str, Any]:
    names = ("permute_fusion", "shared_expert_overlap", "aux_loss_coeff", "z_loss_coeff", "expert_capacity_factor")
    names += ("pad_expert_input_to_capacity", "token_drop_policy", "router_dtype")
    return {f"moe_{name}": getattr(config, f"moe_{name}") for name in names} | {
        "expert_model_parallel_size": sizes.expert,
        "expert_tensor_parallel_size": sizes.expert_tensor,
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "alltoall",
    }


def _stored_dtype(hugging_face: Any) -> torch.dtype:
    import torch

    dtype = getattr(hugging_face, "dtype", None) or torch.float32
    return torch.bfloat16 if dtype == torch.float16 else dtype


def _check_divides(settings: dict[str, Any], sizes: ParallelSizes) -> None:
    """Key-value heads may be fewer than tensor ranks, which then share them: Megatron checks that they can."""
    heads = settings["num_attention_heads"]
    if heads % sizes.tensor:
        raise ValueError(f"tensor_model_parallel_size {sizes.tensor} does not divide the model's num_attention_heads {heads}")
    sizes.pipeline.stages(settings["num_layers"])


def _silence_progress_bars() -> None:
    """mcore-bridge shows one for each load and save, whatever the environment says."""
    from mcore_bridge.bridge import gpt_bridge
    from tqdm import tqdm

    gpt_bridge.tqdm = lambda *arguments, **options: tqdm(*arguments, **(options | {"disable": True}))


def _mark_vocabulary_weights(module: torch.nn.Module, head: Head) -> None:
    """Without the mark a gradient norm under tensor parallelism counts only rank 0's part of these two weights."""
    from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

    whole = head.kind == "seq_cls"  # each tensor rank has all of this output layer
    for name in ("embedding.word_embeddings",) if whole else ("embedding.word_embeddings", "output_layer"):
        try:
            weight = module.get_submodule(name).weight
        except AttributeError:  # another pipeline stage has it
            continue
        if weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, 0, 1)


@contextmanager
def flags_on_host(gpt_bridge: Any, sizes: ParallelSizes) -> Iterator[None]:
    """mcore-bridge makes a flag for each tensor, for pipeline and expert ranks to agree on, on the GPU, and waits for it.

    Here it is made on the host where there are no such ranks.
    """
    import torch

    if sizes.pipeline.size == sizes.expert == 1:
        gpt_bridge.torch = _TorchWithTensorsOnHost()
    try:
        yield
    finally:
        gpt_bridge.torch = torch


class _TorchWithTensorsOnHost:
    """The module torch, but for where `torch.tensor` makes one."""

    def __getattr__(self, name: str) -> Any:
        import torch

        return getattr(torch, name)

    def tensor(self, data: Any, **options: Any) -> torch.Tensor:
        import torch

        return torch.tensor(data, **options | {"device": "cpu"})


@contextmanager
def _rope_functions_restored() -> Iterator[None]:
    """mcore-bridge writes into a table of transformers', which breaks Hugging Face models made later in this process."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    functions = dict(ROPE_INIT_FUNCTIONS)
    try:
        yield
    finally:
        ROPE_INIT_FUNCTIONS.clear()
        ROPE_INIT_FUNCTIONS.update(functions)
