"""What a rank lends to the engines on its GPU comes back when all of their processes are done."""

from __future__ import annotations

import ray

from actors.weights.transport import CudaIpc

SIZE = 2**26  # bytes


class Lender:
    """A process that lends, by a transport for engines of two processes each."""

    def __init__(self) -> None:
        self.transport = CudaIpc(width=2)

    def lend(self, readers: dict[int, list]) -> list[int]:
        """The least byte that each reader of each engine saw."""
        import torch

        self.transport.connect(readers, 60)
        payload = self.transport.send(torch.full((SIZE,), 7, dtype=torch.uint8, device="cuda"))
        calls = [
            reader.read.remote(payload.handles[engine][at]) for engine in readers for at, reader in enumerate(readers[engine])
        ]
        seen = ray.get(calls)
        self.transport.release(payload)
        return seen

    def allocated(self) -> int:
        """Bytes in use on the GPU by this process's tensors."""
        import torch

        torch.cuda.ipc_collect()
        return torch.cuda.memory_allocated()


class Reader:
    """A process of an engine."""

    def read(self, handle) -> int:
        data = handle.map()
        return int(data.min())


def test_lent_memory_comes_back(gpu_ray) -> None:
    lender = ray.remote(Lender).options(num_cpus=0, num_gpus=0.2).remote()
    kind = ray.remote(Reader).options(num_cpus=0, num_gpus=0.2)
    readers = {engine: [kind.remote(), kind.remote()] for engine in (0, 2)}
    for _ in range(3):
        assert ray.get(lender.lend.remote(readers)) == [7] * 4
        assert ray.get(lender.allocated.remote()) < SIZE
    for actor in (lender, *readers[0], *readers[2]):
        ray.kill(actor)
