"""What we add to a vLLM worker, mixed into it by `worker_extension_cls`; called by `EngineWorkers`.

On a GPU tensors are copied into the parameters that are in use. On a CPU, whose kernels want them repacked, vLLM's layerwise
reload keeps a reference to each tensor until its (fused) layer is complete. Tensors are therefore views of their own bucket's
memory, which lives as long as one of them does.
"""

from __future__ import annotations

import ctypes
import signal
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from actors.device_memory import peak_gib
from actors.sampled_logprobs import LogprobRecorder
from actors.weights.checksum import checksum
from actors.weights.ledger import PushError
from actors.weights.transport import Handle
from rlhf.records import Bucket

PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)


class WorkerExtension(LogprobRecorder):
    """Methods of vLLM's worker: begin_weights, load_bucket for each bucket, finish_weights."""

    _loading = False

    def answer(self, method: str, arguments: tuple[Any, ...]) -> tuple[Any, Exception | None]:
        """What a method below gives, and the exception that it raised."""
        try:
            return getattr(self, method)(*arguments), None
        except Exception as error:  # goes to the caller
            return None, error

    def end_with_engine(self) -> None:
        """Be killed when the process that started this one is gone, whatever this one is doing."""
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def begin_weights(self) -> None:
        """Open the model's layers for loading; an unfinished push before it is closed first."""
        if self._loading:
            self.finish_weights(tied=False)
        if self.device.type == "cpu":
            _repack_experts(self.model_runner.model)
            with set_current_vllm_config(self.vllm_config):
                initialize_layerwise_reload(self.model_runner.model)
        self._loading = True

    def load_bucket(self, bucket: Bucket, source: torch.Tensor | list[Handle], names: list[str]) -> None:
        """Load `names` of a bucket from its bytes, uint8 [size], after they gave the sender's checksum.

        Every worker reads all bytes, on its own device, by its own handle, and keeps its part of each tensor.
        """
        data = (source[self.rank].map() if isinstance(source, list) else source).to(self.device)
        assert data.numel() == bucket.size, (data.numel(), bucket.size)
        found = checksum(data)
        if found != bucket.checksum:
            raise PushError(
                f"bucket {bucket.index} of version {bucket.version} ({bucket.size} bytes, {bucket.names[0]} to "
                f"{bucket.names[-1]}) was damaged on the way: checksum {found:016x}, sent {bucket.checksum:016x}"
            )
        wanted = set(names)
        entries = zip(bucket.names, bucket.dtypes, bucket.shapes, bucket.offsets, strict=True)
        weights = [(name, _read(data, *where)) for name, *where in entries if name in wanted]
        with set_current_vllm_config(self.vllm_config), torch.no_grad():
            self.model_runner.model.load_weights(weights)
        if data.is_cuda:
            torch.cuda.current_stream().synchronize()  # the sender may reuse this memory when we answer

    def peak_gib(self) -> float | None:
        """See `device_memory.peak_gib`."""
        return peak_gib()

    def finish_weights(self, tied: bool) -> None:
        """Put the loaded layers in place; `tied`: the output layer is the embedding, and was not sent."""
        self._loading = False
        if self.device.type != "cpu":
            return
        model = self.model_runner.model
        with set_current_vllm_config(self.vllm_config), torch.no_grad():
            finalize_layerwise_reload(model, self.model_config)
            if tied:
                _tie_output(model)


def _repack_experts(model: torch.nn.Module) -> None:
    """vLLM packs experts for its CPU kernel only when it builds the kernel: without this they would be replaced unpacked."""
    for layer in model.modules():
        if hasattr(method := getattr(layer, "quant_method", None), "moe_kernel"):
            method.moe_kernel = None


def _tie_output(model: torch.nn.Module) -> None:
    """Layerwise reload leaves an output layer that was not loaded as it is: on CPU a repacked copy of the old embedding."""
    layers = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    embedding = next(layer for layer in layers if not isinstance(layer, ParallelLMHead))
    for output in layers:
        if isinstance(output, ParallelLMHead):
            if output.weight is not embedding.weight:  # vLLM unties a checkpoint that stores both
                output.weight.copy_(embedding.weight)
            output.quant_method.process_weights_after_loading(output)


def _read(data: torch.Tensor, dtype: str, shape: tuple[int, ...], offset: int) -> torch.Tensor:
    kind = getattr(torch, dtype)
    size = torch.Size(shape).numel() * kind.itemsize
    return data[offset : offset + size].view(kind).view(shape)
