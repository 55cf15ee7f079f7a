"""What remains to be changed in megatron-core 0.16 for the CPU: random states, type names, optimizer defects."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from actors.cpu.cuda_names import Stream


def install() -> None:
    """Change megatron-core's modules in place."""
    _replace_random_tracker()
    _replace_type_name_checks()
    _mend_distributed_optimizer()
    _replace_moe_copies()


def _replace_random_tracker() -> None:
    from megatron.core.tensor_parallel import random

    class CpuRNGStatesTracker(random.CudaRNGStatesTracker):
        """Named states of the CPU generator."""

        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random state {name} or seed {seed} already exists")
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            if not self._is_initialized:
                yield
                return
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    random.CudaRNGStatesTracker = CpuRNGStatesTracker
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _replace_type_name_checks() -> None:
    """Where Megatron asks whether `tensor.type()` is 'torch.cuda.FloatTensor', CPU tensors answer yes."""
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    _with_cuda_type_names(distrib_optimizer.DistributedOptimizer, "_build_model_and_main_param_groups")
    _with_cuda_type_names(distrib_optimizer.DistributedOptimizer, "__init__")
    _with_cuda_type_names(optimizer.Float16OptimizerWithFloat16Params, "__init__")
    _with_cuda_type_names(clip_grads, "clip_grad_by_total_norm_fp32")
    optimizer.clip_grad_by_total_norm_fp32 = clip_grads.clip_grad_by_total_norm_fp32


def _with_cuda_type_names(owner: Any, name: str) -> None:
    raw = owner.__dict__[name]
    function = raw.__func__ if isinstance(raw, classmethod) else raw

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    setattr(owner, name, classmethod(wrapped) if isinstance(raw, classmethod) else wrapped)


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    tensor_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        if not isinstance(result, str) or result.startswith("torch.cuda."):  # blocks of this context nest
            return result
        return result.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_
    try:
        yield
    finally:
        torch.Tensor.type = tensor_type


def _mend_distributed_optimizer() -> None:
    """Torch's AdamW keeps `step` as a tensor for each parameter; Transformer Engine's and Apex's Adam do not."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    load = DistributedOptimizer.load_state_dict

    def set_states_with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        step = {"step": state["step"]} if "step" in state else {}
        return set_states(self, model_param, {**step, **tensors})

    def load_state_dict(self: Any, state_dict: Any) -> None:
        load(self, state_dict)
        # All parameters got one `step` tensor: AdamW would count it once a parameter.
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_with_step
    DistributedOptimizer.load_state_dict = load_state_dict


def _replace_moe_copies() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    def stay(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = Stream()
    token_dispatcher.maybe_move_tensor_to_cpu = stay
