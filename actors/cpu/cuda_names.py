"""`torch.cuda` and the device "cuda" mean the CPU in this process."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

CPU = torch.device("cpu")
FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like")


class Stream:
    """A stream or event where nothing is asynchronous: every method returns at once."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self


def install() -> None:
    """Replace the names of `torch.cuda`, the tensor factories and the moves between devices."""
    _replace_streams()
    _replace_random_states()
    _redirect_devices()


def _replace_streams() -> None:
    stream = Stream()
    results = dict.fromkeys(("synchronize", "empty_cache", "set_device"))
    results |= dict.fromkeys(("current_stream", "default_stream"), stream)
    for name, result in results.items():  # one function object per name: dynamo asserts that they are distinct
        setattr(torch.cuda, name, lambda *args, _result=result, **kwargs: _result)
    torch.cuda.current_device = lambda: CPU  # accepted wherever a device is
    torch.cuda.Stream = torch.cuda.Event = Stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()


def _replace_random_states() -> None:
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # Replicated LoRA factors must be equal on every tensor rank.
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)


def _redirect_devices() -> None:
    # The cached set of the original factories: `with torch.device("meta")`, by which transformers loads, knows them by identity.
    torch.utils._device._device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor_to = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return tensor_to(self, *(CPU if _is_cuda(arg) else arg for arg in args), **kwargs)

    torch.Tensor.to = to
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (isinstance(device, torch.device) and device.type == "cuda")
