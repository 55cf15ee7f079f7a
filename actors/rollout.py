"""A rollout engine: vLLM in a Ray actor, stepped by one thread.

The engine lives in the actor's own process. One thread builds it, steps it and does everything else to it between two
steps; the actor's event loop only takes calls, waits, and turns finished requests into arrays and texts.

An engine answers for one version of the weights: the last complete push. From the beginning of a push to its verified
end it refuses to generate, and what it was asked before waits: it goes on with the new weights.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.decoding import decode_batch
from actors.device_memory import memory_explained
from actors.engine_build import build_engine, import_engine, lora_request
from actors.model_folder import require_model
from actors.progress import Progress
from actors.sampling import sampling_params
from actors.step_thread import Held, StepThread, Watch
from actors.weights.broadcast import leave_group
from actors.weights.checkpoint_names import checkpoint_tensors
from actors.weights.ledger import PushError, PushLedger
from actors.weights.transport import for_workers
from rlhf.records import Batch, Bucket, GroupSummary, GroupTokens

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest

    from actors.weights.broadcast import Seat

ENVIRONMENT = {  # of the engine's process; what the user sets for vLLM's memory and logging wins
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_PLUGINS": "",  # ms-swift installs one that a bare engine cannot import
    "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # "auto" pins every engine of a node to the same cores
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",  # the model is a local folder
}


class RolloutEngine:
    """An async Ray actor around one vLLM engine."""

    def __init__(self, config: Any, *, index: int, load_weights: bool = False, sleeps: bool = False, gpus: Sequence[str] = ()):
        """`load_weights`: answer for version 0 with the model folder's weights; else the first push brings them.

        `sleeps`: this engine shares its GPUs: it sleeps when it is built, until it is woken. `gpus`: those to use, when they
        are not the ones that Ray gave.
        """
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        if config.vllm_enforce_eager:  # vLLM's sampler would still compile a function: tens of seconds
            os.environ["TORCHDYNAMO_DISABLE"] = "1"  # vLLM's import asks torch for that
        self.config, self.index, self.load_weights, self.sleeps = config, index, load_weights, sleeps
        self.offered = config
        self.progress, self.importing = Progress(), asyncio.Lock()
        self.acknowledged: int | None = None  # the version this engine answers for
        self.thread: StepThread | None = None
        self.built = asyncio.Event()
        self.adapter: LoRARequest | None = None  # what every request asks for

    async def load_libraries(self) -> None:
        """Import what takes long, while others use the GPU; one call at a time, since another thread could see half of it."""

        def load() -> None:
            with self.progress.doing("importing vLLM"):
                import_engine()

        async with self.importing:
            await asyncio.to_thread(load)

    async def setup(self) -> int:
        """Build the engine; the process id."""
        require_model(self.config.model)
        await self.load_libraries()
        self.ledger = PushLedger(checkpoint_tensors(self.config.model))
        arguments = self.config, self.index, self.load_weights, self.sleeps
        self.thread = StepThread(lambda: build_engine(*arguments), self.progress)
        engine = await self.thread.start()
        self.tokenizer = engine.get_tokenizer()
        self.recorded = all(await self.thread.call(lambda: self.thread.workers.call("record_logprobs")))
        self.acknowledged = 0 if self.load_weights else None
        self.adapter = lora_request(self.config.adapters)
        if self.sleeps:
            await self.sleep()
        self.built.set()
        return os.getpid()

    async def offer(self) -> Any:
        """The config that this engine was built for."""
        return self.offered

    async def serve(self, config: Any) -> None:
        """Once built: answer another run from now on, under its sampling options and seed, and only for what it pushes."""
        await self.built.wait()

        def begin() -> None:
            self.ledger = PushLedger(self.ledger.tensors)
            self._drop("another run took the engine")

        await self.thread.call(begin)
        leave_group()
        self.config = config

    async def sleep(self) -> None:
        """Give the GPU's memory back: weights and KV cache are dropped. Unfinished requests fail; nothing if asleep."""

        def sleep() -> None:
            self._drop("the engine was put to sleep")
            if not self.thread.engine.is_sleeping():
                self.thread.engine.sleep(level=2)

        await self.thread.call(sleep)

    async def wake(self, tag: str) -> None:
        """Take the memory of the "weights", or of the "kv_cache", again; both are to be filled anew. Nothing if awake."""

        def wake() -> None:
            if self.thread.engine.is_sleeping():
                with memory_explained(f"waking the engine's {tag}"):
                    self.thread.engine.wake_up([tag])
            self.thread.workers.call("peak_gib")  # from here on that of the next phase

        await self.thread.call(wake)

    async def version(self) -> int | None:
        """The version this engine answers for; None before and during a push, and after one that failed."""
        return self.acknowledged

    async def generate(
        self,
        indices: Sequence[int],
        prompts: Sequence[np.ndarray],
        n: int,
        version: int,
        batch: Batch,
        sampling: Mapping[str, Any] | None = None,
    ) -> tuple[list[GroupSummary], *tuple[GroupTokens, ...]]:
        """Sample n responses to each prompt [P] with the weights of `version`; to be called with num_returns = prompts + 1.

        `indices` are the prompts' places in the run's order. `sampling` overrides the config's sampling options (see
        `sampling.OPTIONS`), and names "excluded_ids". The token that ends a response is part of it. Nothing starts before
        all prompts of `batch` are here; they then start between the same two steps, in the order of their indices.
        A push meanwhile pauses them: what is sampled after it is by the new weights, as the group's version tells. PushError
        when the engine does not hold `version` at first, and when requests are dropped: by a push that fails, or to sleep.
        """
        self._require(version)
        requests = []
        for index, prompt in zip(indices, prompts):
            params = self._sampling_params(sampling, n=n, index=index)
            requests.append(Held(index, *self._request(prompt, params)))
        self.thread.post(lambda: self.thread.hold(requests, batch))
        outputs = await asyncio.gather(*(request.done for request in requests))
        groups = await asyncio.to_thread(lambda: [self._group(prompt, *output) for prompt, output in zip(prompts, outputs)])
        return [summary for _, summary in groups], *(tokens for tokens, _ in groups)

    async def stream(
        self, prompt: np.ndarray, version: int, sampling: Mapping[str, Any] | None = None
    ) -> AsyncIterator[str | GroupSummary]:
        """One response to a prompt [P]: its text in pieces as they are sampled, then its summary, whose text is all of them."""
        self._require(version)
        arrived: asyncio.Queue[RequestOutput | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        params = self._sampling_params(sampling, n=1, index=0, streamed=True)
        add, done = self._request(prompt, params, lambda output: loop.call_soon_threadsafe(arrived.put_nowait, output))
        done.add_done_callback(lambda _: arrived.put_nowait(None))
        self.thread.post(add)
        ids, text = [], ""
        while (output := await arrived.get()) is not None:
            (sample,) = output.outputs
            ids += sample.token_ids
            if sample.text:
                text += sample.text
                yield sample.text
        output, (version, _) = await done
        whole = self.tokenizer.decode(ids, skip_special_tokens=True)
        if whole.startswith(text) and whole != text:  # bytes that no character was completed from
            yield whole[len(text) :]
            text = whole
        reason = output.outputs[0].finish_reason
        yield GroupSummary(texts=(text,), finish_reasons=(reason,), response_lengths=(len(ids),), weight_version=version)

    async def begin_push(self, version: int) -> None:
        """Answer for no version, pause what is unfinished, and get ready for the buckets of `version`."""

        def begin() -> None:
            self.ledger.begin(version)
            self.thread.pause()
            self.acknowledged = None
            self.thread.workers.call("begin_weights")

        await self.thread.call(begin)

    async def join_push(self, seat: Seat) -> None:
        """Join the group that buckets will be broadcast in, instead of the one joined before."""
        await seat.take()

    async def receive_bucket(self, bucket: Bucket) -> None:
        """Load one bucket; PushError, and the end of this push, when anything about it is wrong."""
        if workers := len(self.thread.workers.processes):
            data, _kept = await for_workers(bucket.payload, self.index, workers)  # kept until this returns
        else:
            data = await bucket.payload.open(self.index)
        bare = replace(bucket, payload=None)  # which another process could not read

        def load() -> None:
            with self.progress.doing(f"loading bucket {bucket.index} of version {bucket.version}"):
                try:
                    names = self.ledger.admit(bucket)
                    self.thread.workers.call("load_bucket", bare, data, names)
                except Exception:
                    self.ledger.fail()
                    raise

        await self.thread.call(load)

    async def finish_push(self, version: int, names: list[str]) -> tuple[int, int]:
        """Check that exactly the model's tensors came, put them in place, and go on with them, without the old prefix cache.

        Returns the version that is held from now on, and its number of tensors.
        """

        def finish() -> tuple[int, int]:
            with self.progress.doing(f"finishing the push of version {version}"):
                count = self.ledger.finish(version, names)
                self.thread.workers.call("finish_weights", self.ledger.tensors.tied)
                self.thread.resume()
                self.acknowledged = version
                return version, count

        return await self.thread.call(finish)

    async def give_up_push(self, version: int) -> None:
        """The push of `version` failed: refuse the rest of it, drop what waits for it. Nothing if it came to its end here."""

        def give_up() -> None:
            if self.ledger.give_up(version) and self.acknowledged is None:
                self._drop(f"the push of version {version} failed")

        if self.built.is_set():
            await self.thread.call(give_up)

    async def peak_gib(self) -> float | None:
        """See `device_memory.peak_gib`; of the fullest of the engine's devices."""

        def largest() -> float | None:
            peaks = self.thread.workers.call("peak_gib")
            return max((gib for gib in peaks if gib is not None), default=None)

        return await self.thread.call(largest)

    async def report(self) -> str:
        """What the engine is doing now."""
        holds = "no complete weights" if self.acknowledged is None else f"version {self.acknowledged}"
        if self.thread is not None and self.thread.paused:
            holds += f", paused by the push of version {self.ledger.latest}"
        pending = 0 if self.thread is None else self.thread.num_pending
        return f"{self.progress.report()}; {holds}, {pending} prompts pending, pid {os.getpid()}"

    def _drop(self, reason: str) -> None:
        """In the thread: answer for no version, and drop every request."""
        self.acknowledged = None
        self.thread.close(PushError(f"request dropped: {reason}"))

    def _require(self, version: int) -> None:
        if version != self.acknowledged:
            has = "no complete push" if self.acknowledged is None else f"version {self.acknowledged}"
            raise PushError(f"rollout engine {self.index} was asked for weight version {version} but has {has}")

    def _sampling_params(self, overrides: Mapping[str, Any] | None, **request: Any) -> SamplingParams:
        return sampling_params(
            self.config, overrides or {}, special=self.tokenizer.get_added_vocab(), logprobs=not self.recorded, **request
        )

    def _request(self, prompt: np.ndarray, params: SamplingParams, watch: Watch | None = None) -> tuple[Callable[[], None], Any]:
        return self.thread.request(prompt.tolist(), params, self._last_state, watch=watch, adapter=self.adapter)

    def _last_state(self, request_id: str, output: RequestOutput) -> tuple[int, list[np.ndarray] | None]:
        """In the thread, when a request is finished: the version of now, its samples' logprobs where the worker recorded them."""
        if not self.recorded:
            return self.acknowledged, None
        names = [request_id] if len(output.outputs) == 1 else [f"{sample.index}_{request_id}" for sample in output.outputs]
        start = len(output.prompt_token_ids)
        spans = [(start, start + len(sample.token_ids)) for sample in output.outputs]
        return self.acknowledged, self.thread.workers.call("recorded_logprobs", names, spans)[0]

    def _group(
        self, prompt_ids: np.ndarray, output: RequestOutput, last_state: tuple[int, list[np.ndarray] | None]
    ) -> tuple[GroupTokens, GroupSummary]:
        version, logprobs = last_state
        ids = [list(sample.token_ids) for sample in output.outputs]
        logprobs = logprobs or [sample.logprobs.logprobs for sample in output.outputs]
        assert [len(row) for row in ids] == [len(row) for row in logprobs], (output.request_id, ids, logprobs)
        tokens = GroupTokens(
            prompt_ids=np.asarray(prompt_ids, np.int32),
            response_ids=tuple(np.array(row, np.int32) for row in ids),
            rollout_logprobs=tuple(np.array(row, np.float32) for row in logprobs),
        )
        texts = decode_batch(self.tokenizer, ids)
        summary = GroupSummary(
            texts=tuple(texts),
            finish_reasons=tuple(sample.finish_reason for sample in output.outputs),
            response_lengths=tuple(map(len, ids)),
            weight_version=version,
        )
        return tokens, summary
