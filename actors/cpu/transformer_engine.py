"""The Transformer Engine classes that Megatron wraps, in plain torch.

Class and parameter names, tensor-parallel attributes and the returned tuples are those of Transformer Engine 2.6, so that
Megatron's own wrappers, mcore-bridge and PEFT see the same model as on a GPU. Float8 is not there.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from actors.cpu.attention import DotProductAttention
from actors.cpu.cuda_names import CPU

VERSION = "2.6.0"  # what the stand-in claims: later versions bring arguments that it does not have


class TransformerEngineBaseModule(nn.Module):
    """What Megatron calls on every Transformer Engine module."""

    fp8 = fp8_calibration = False

    def init_fp8_metadata(self, *args: Any, **kwargs: Any) -> None:
        pass

    def set_tensor_parallel_group(self, group: Any) -> None:
        self.tp_group = group

    def backward_dw(self) -> None:
        pass


class Linear(TransformerEngineBaseModule):
    """y = x W^T + b with column, row or no tensor parallelism; `LayerNormLinear` normalizes x first."""

    has_norm = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        parallel_mode: str | None = None,
        params_dtype: torch.dtype | None = None,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        zero_centered_gamma: bool = False,
        return_layernorm_output: bool = False,
        **_: Any,
    ):
        super().__init__()
        self.tp_group, self.tp_size, self.parallel_mode = tp_group, tp_size, parallel_mode
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.in_features = in_features // tp_size if parallel_mode == "row" else in_features
        self.out_features = out_features // tp_size if parallel_mode == "column" else out_features
        self.use_bias, self.return_bias = bias, return_bias
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        self.return_layernorm_output = return_layernorm_output
        place = {"dtype": params_dtype, "device": CPU}
        if self.has_norm:
            self._add_norm(in_features, place)
        weight = nn.Parameter(torch.empty(self.out_features, self.in_features, **place))
        self.weight = _mark_parallel(weight, parallel_mode is not None, 1 if parallel_mode == "row" else 0)
        if init_method is not None:
            fork = contextlib.nullcontext()
            if get_rng_state_tracker and parallel_mode:
                fork = get_rng_state_tracker().fork(*([rng_tracker_name] if rng_tracker_name else []))
            with torch.no_grad(), fork:
                init_method(self.weight)
        self.register_parameter("bias", None)
        if bias:
            self.bias = _mark_parallel(nn.Parameter(torch.zeros(self.out_features, **place)), parallel_mode == "column", 0)
            if parallel_mode == "row":
                self.bias.sequence_parallel = self.sequence_parallel

    def _add_norm(self, size: int, place: dict[str, Any]) -> None:
        self.layer_norm_weight = nn.Parameter(torch.full((size,), 0.0 if self.zero_centered_gamma else 1.0, **place))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        self.register_parameter("layer_norm_bias", None)
        if self.normalization == "LayerNorm":
            self.layer_norm_bias = nn.Parameter(torch.zeros(size, **place))
            self.layer_norm_bias.sequence_parallel = self.sequence_parallel

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None, **_: Any) -> Any:
        from megatron.core.tensor_parallel import mappings

        normed = None
        if self.has_norm:
            weight, bias = self.layer_norm_weight, self.layer_norm_bias
            x = normed = _norm(x, weight, bias, self.eps, self.normalization, self.zero_centered_gamma)
        parallel = self.tp_size > 1 and self.parallel_mode is not None
        if parallel and self.parallel_mode == "column":
            enter = mappings.copy_to_tensor_model_parallel_region
            if self.sequence_parallel:
                enter = mappings.gather_from_sequence_parallel_region
            x = enter(x, group=self.tp_group)
        bias = self.bias if self.use_bias and not self.return_bias else None
        if parallel and self.parallel_mode == "row":
            leave = mappings.reduce_from_tensor_model_parallel_region
            if self.sequence_parallel:
                leave = mappings.reduce_scatter_to_sequence_parallel_region
            y = leave(F.linear(x, self.weight), group=self.tp_group)
            y = y if bias is None else y + bias
        else:
            y = F.linear(x, self.weight, bias)
        output = (y, self.bias) if self.return_bias else y
        if self.has_norm and self.return_layernorm_output:
            return (*output, normed) if self.return_bias else (output, normed)
        return output


class LayerNormLinear(Linear):
    """A norm and a linear layer in one module."""

    has_norm = True


class GroupedLinear(TransformerEngineBaseModule):
    """One linear layer for each expert, over tokens sorted by expert."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        parallel_mode: str | None = None,
        tp_group: Any = None,
        tp_size: int = 1,
        params_dtype: torch.dtype | None = None,
        sequence_parallel: bool = False,
        **_: Any,
    ):
        super().__init__()
        self.num_gemms, self.tp_size, self.tp_group = num_gemms, tp_size, tp_group
        self.parallel_mode, self.sequence_parallel = parallel_mode, sequence_parallel
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.fp8_meta = {"fp8_checkpoint": False}
        place = {"dtype": params_dtype, "device": CPU}
        for i in range(num_gemms):
            weight = nn.Parameter(torch.empty(out_features, in_features, **place))
            weight = _mark_parallel(weight, True, 1 if parallel_mode == "row" else 0)
            if init_method is not None:
                with torch.no_grad():
                    init_method(weight)
            self.register_parameter(f"weight{i}", weight)
            if bias:
                self.register_parameter(f"bias{i}", nn.Parameter(torch.zeros(out_features, **place)))

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        pass

    def forward(self, x: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None, **_: Any) -> torch.Tensor:
        outputs = []
        for i, part in enumerate(torch.split(x, list(m_splits))):
            bias = getattr(self, f"bias{i}") if self.use_bias else None
            outputs.append(F.linear(part, getattr(self, f"weight{i}"), bias))
        return torch.cat(outputs)


class RMSNorm(TransformerEngineBaseModule):
    """x / rms(x) * weight over the last dimension."""

    kind = "RMSNorm"

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        zero_centered_gamma: bool = False,
        params_dtype: torch.dtype | None = None,
        **_: Any,
    ):
        super().__init__()
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        weight = torch.full((hidden_size,), 0.0 if zero_centered_gamma else 1.0, dtype=params_dtype)
        self.weight = nn.Parameter(weight)
        self.weight.sequence_parallel = sequence_parallel
        self.register_parameter("bias", None)
        if self.kind == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=params_dtype))
            self.bias.sequence_parallel = sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _norm(x, self.weight, self.bias, self.eps, self.kind, self.zero_centered_gamma)


class LayerNorm(RMSNorm):
    """(x - mean(x)) / std(x) * weight + bias over the last dimension."""

    kind = "LayerNorm"


def _mark_parallel(parameter: nn.Parameter, parallel: bool, dim: int) -> nn.Parameter:
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = parallel, dim, 1
    return parameter


class _RmsNorm(torch.autograd.Function):
    """x / rms(x) * weight, as Hugging Face computes it; its own backward takes half the time of autograd's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        inverse = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
        normed = (wide * inverse).to(x.dtype)
        ctx.save_for_backward(normed, inverse, weight)
        return weight * normed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        normed, inverse, weight = ctx.saved_tensors
        wide, wide_grad = normed.float(), (grad * weight).float()
        along = torch.linalg.vecdot(wide_grad, wide).unsqueeze(-1) / wide.shape[-1]
        grad_x = torch.addcmul(wide_grad, wide, along, value=-1).mul_(inverse).to(grad.dtype)
        return grad_x, (grad * normed).flatten(0, -2).sum(0), None


def _norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, kind: str, zero_centered: bool
) -> torch.Tensor:
    weight = weight + 1 if zero_centered else weight
    if kind == "RMSNorm":
        return _RmsNorm.apply(x, weight, eps)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


class _NoFloat8:
    def __init__(self, *args: Any, **kwargs: Any):
        raise NotImplementedError("float8 needs Transformer Engine")


class _Float8State:
    is_fp8_enabled = is_first_fp8_module = is_fp8_calibration = staticmethod(lambda: False)
    get_fp8_recipe = staticmethod(lambda: None)


def install() -> None:
    """Put the stand-in where `import transformer_engine` finds it."""
    no_context = lambda *args, **kwargs: contextlib.nullcontext()
    layers = (Linear, LayerNormLinear, GroupedLinear, RMSNorm, LayerNorm, DotProductAttention)
    modules = {
        "": {"__version__": VERSION},
        ".common": {},
        ".common.recipe": {"DelayedScaling": _NoFloat8, "Format": _NoFloat8},
        ".pytorch": {
            **{layer.__name__: layer for layer in layers},
            "fp8_autocast": no_context,
            "fp8_model_init": no_context,
        },
        ".pytorch.fp8": {"FP8GlobalStateManager": _Float8State, "fp8_autocast": no_context},
        # Megatron only asks whether an object is one of these
        ".pytorch.ops": {name: type(name, (nn.Module,), {}) for name in ("Sequential", "FusibleOperation")},
        ".pytorch.distributed": {
            "CudaRNGStatesTracker": type("CudaRNGStatesTracker", (), {}),
            "activation_recompute_forward": no_context,
        },
        ".pytorch.attention": {},
        ".pytorch.module": {},
        ".pytorch.tensor": {"QuantizedTensor": type("QuantizedTensor", (), {})},
        ".pytorch.module.base": {"get_dummy_wgrad": None, "TransformerEngineBaseModule": TransformerEngineBaseModule},
    }
    for name, contents in modules.items():
        _add_module("transformer_engine" + name, contents)


def _add_module(name: str, contents: dict[str, Any]) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    module.__dict__.update(contents)
    sys.modules[name] = module
    if "." in name:
        parent, child = name.rsplit(".", 1)
        setattr(sys.modules[parent], child, module)
