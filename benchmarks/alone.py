"""The engines with nothing around them: what a phase of a run takes at least."""

from __future__ import annotations

import time
from functools import partial
from types import SimpleNamespace
from typing import Any

from actors.frozen import Frozen
from actors.policy import Policy


class PolicyAlone(Policy):
    """A Megatron rank that goes through one batch again and again, packed once."""

    def take(self, shard: Any) -> None:
        """Pack the batch."""
        from actors.megatron.micro_batch import fetch_sources, pack_micro_batches

        self.batches = pack_micro_batches(shard, fetch_sources(shard), device=self.platform.device, multiple=self.multiple)

    def score_alone(self) -> float:
        """Seconds of a scoring forward."""
        import torch

        from actors.megatron.forward_backward import run_micro_batches

        torch.cuda.synchronize()  # on a CPU this does nothing
        start = time.monotonic()
        run_micro_batches(self.module, self.batches, self._score, backward=False)
        torch.cuda.synchronize()
        return time.monotonic() - start

    def train_alone(self, beta: float) -> float:
        """Seconds of a training step with GRPO's loss."""
        import torch

        from actors.megatron.forward_backward import run_micro_batches
        from rlhf.losses import grpo_loss

        loss = partial(grpo_loss, beta=beta)
        torch.cuda.synchronize()
        start = time.monotonic()
        self.training.zero_gradients()
        run_micro_batches(
            self.module,
            self.batches,
            lambda logits, batch: loss(self._next_token_logprobs(logits, batch), batch.batch),
            backward=True,
        )
        self.training.update()
        torch.cuda.synchronize()
        return time.monotonic() - start


class WeightsAlone(Frozen):
    """A Megatron rank that only holds the policy's weights and pushes them: for models whose optimizer needs more GPUs."""

    training = SimpleNamespace(finish_gather=lambda: None)
    transport = Policy.transport
    push_weights = Policy.push_weights


class EngineAlone:
    """vLLM in its own process, driven by a plain loop."""

    def __init__(self, config: Any, index: int):
        from actors.engine_build import build_engine

        self.engine = build_engine(config, index, load_weights=True, sleeps=False)

    def alone(self, prompts: list[list[int]], responses: int, tokens: int, logprobs: int | None) -> float:
        """Seconds to answer all prompts."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            n=responses, temperature=1.0, max_tokens=tokens, ignore_eos=True, logprobs=logprobs, flat_logprobs=True,
            detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        self.engine.reset_prefix_cache()
        start = time.monotonic()
        for index, ids in enumerate(prompts):
            self.engine.add_request(str(index), {"prompt_token_ids": ids}, params)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return time.monotonic() - start


class DefaultAlone:
    """vLLM as `LLM` drives it by default, each sampled token's logprob asked for."""

    def __init__(self, folder: str, options: dict[str, Any]):
        """`options` of `LLM` that say how much memory it may take, and for how many sequences at once."""
        from vllm import LLM

        self.engine = LLM(folder, **options)

    def alone(self, prompts: list[list[int]], responses: int, tokens: int) -> float:
        """Seconds to answer all prompts."""
        from vllm import SamplingParams

        params = SamplingParams(n=responses, temperature=1.0, max_tokens=tokens, ignore_eos=True, logprobs=0)
        start = time.monotonic()
        self.engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return time.monotonic() - start


def random_shards(prompts: list[Any], responses: int, tokens: int, vocabulary: int, config: Any, data_size: int) -> list[Any]:
    """A global batch of `responses` random answers of `tokens` to each of `prompts`, for each data rank."""
    import numpy as np
    import ray

    from rlhf.batching import make_shards
    from rlhf.records import GroupTokens, SequenceRef

    rng = np.random.default_rng(0)
    sources = [
        ray.put(
            GroupTokens(
                prompt_ids=ids,
                response_ids=tuple(rng.integers(3, vocabulary, tokens).astype(np.int32) for _ in range(responses)),
                rollout_logprobs=tuple(np.full(tokens, -6, np.float32) for _ in range(responses)),
            )
        )
        for ids in prompts
    ]
    weight = 1 / (len(prompts) * responses * tokens)
    units = [
        [SequenceRef(source=s, item=i, key=s * responses + i, length=len(ids) + tokens, weight=weight, advantage=1.0)]
        for s, ids in enumerate(prompts)
        for i in range(responses)
    ]
    return make_shards(
        units,
        sources,
        trained_tokens=len(units) * tokens,
        data_size=data_size,
        max_units=None if config.micro_batch_tokens else config.micro_batch_size,
        max_tokens=config.micro_batch_tokens,
    )
