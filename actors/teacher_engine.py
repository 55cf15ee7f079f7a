"""A teacher as a vLLM engine: the likeliest tokens after each trained position, and their logits.

vLLM gives logprobs of a prompt's tokens and of the likeliest others, which differ from logits by a constant of each position:
over the likeliest tokens alone both have the same distributions.

Letters: N trained tokens of a sequence, K likeliest tokens.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from actors.engine_build import build_engine, import_engine
from actors.engine_workers import EngineWorkers, built_together
from actors.model_folder import require_model
from actors.progress import Progress
from rlhf.config import RolloutRole
from rlhf.counts import teacher_width
from rlhf.fit import MOST
from rlhf.memory import longest_sequence
from rlhf.model_folder import read_shape
from rlhf.records import Shard, TokenLogits

if TYPE_CHECKING:
    from vllm.logprobs import FlatLogprobs


class TeacherEngine:
    """A Ray actor around one engine with a teacher's weights."""

    def __init__(self, config: Any):
        """`config`: the run's, of the student."""
        self.student, self.progress = config, Progress()
        if config.vllm_enforce_eager:
            os.environ["TORCHDYNAMO_DISABLE"] = "1"  # see `RolloutEngine`

    def load_libraries(self) -> None:
        """Import what takes long, while the policy sets up."""
        with self.progress.doing("importing vLLM"):
            import_engine()

    def setup(self) -> None:
        """Build the engine with the weights in the teacher's folder."""
        config = teacher_config(self.student)
        require_model(config.model)
        self.load_libraries()
        with self.progress.doing("setup"), built_together():
            self.engine = build_engine(config, index=0, load_weights=True, sleeps=False)
            self.workers = EngineWorkers(self.engine)
        self.vocab_size = read_shape(Path(config.model)).vocab_size

    @ray.method(num_returns=2)
    def token_logits(
        self, shard: Shard, vocab_size: int, top_k: int, reference: bool = False
    ) -> tuple[None, dict[int, ray.ObjectRef]]:
        """As `MegatronRank.token_logits`: per sequence key a reference to the `TokenLogits` of the `top_k` likeliest tokens.

        Tokens from `vocab_size` on, which the student lacks, are left out.
        """
        assert not reference, "an engine has no adapter to disable"
        sources = ray.get(list(shard.sources))
        sequences = {ref.key: sources[ref.source].sequence(ref.item)[:2] for batch in shard.micro_batches for ref in batch}
        with self.progress.doing(f"the logits of {len(sequences)} sequences"):
            kept = self._likeliest(sequences, top_k, vocab_size, top_k)
            lacking = {key: sequences[key] for key, found in kept.items() if found is None}
            if lacking:
                kept |= self._likeliest(lacking, top_k + self.vocab_size - vocab_size, vocab_size, top_k)
        return None, {key: ray.put(logits) for key, logits in kept.items()}

    @ray.method(concurrency_group="report")
    def report(self) -> str:
        """What the engine is doing now."""
        return f"{self.progress.report()}, pid {os.getpid()}"

    def _likeliest(
        self, sequences: Mapping[int, tuple[np.ndarray, np.ndarray]], asked: int, vocab_size: int, top_k: int
    ) -> dict[int, TokenLogits | None]:
        """Per key of the (token ids [L], loss mask [L]), by asking for so many tokens; None where `asked` were too few.

        The last token of a sequence is not shown: its prediction is that of the one token that vLLM must sample.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=1,
            logprobs=asked,
            prompt_logprobs=asked,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for key, (token_ids, _) in sequences.items():
            self.engine.add_request(str(key), {"prompt_token_ids": token_ids[:-1].tolist()}, params)
        found = {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    key = int(output.request_id)
                    positions = np.flatnonzero(sequences[key][1])
                    parts = [_likeliest_of(part, asked) for part in (output.prompt_logprobs[1:], output.outputs[0].logprobs)]
                    ids, values = (np.concatenate(arrays)[positions[positions > 0] - 1] for arrays in zip(*parts))
                    found[key] = _common(ids, values, vocab_size, top_k)
        return found


def teacher_config(config: Any) -> Any:
    """The options of a teacher's engine, of a student's run: its own model, and prompts alone."""
    own, other = (read_shape(Path(folder)).vocab_size for folder in (config.model, config.teacher.model))
    return replace(
        config,
        model=config.teacher.model,
        adapters=[],
        rollout=RolloutRole(num_engines=1),
        vllm_tensor_parallel_size=teacher_width(config),
        vllm_gpu_memory_utilization=MOST / 100,
        vllm_max_model_len=longest_sequence(config) or None,
        vllm_max_num_seqs=None,
        vllm=config.vllm | {"max_logprobs": config.gkd_logits_topk + max(other - own, 0)},
    )


def _likeliest_of(logprobs: FlatLogprobs, asked: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logprobs [positions, asked]. vLLM puts the sequence's own token before the likeliest, which may name it again."""
    places = np.array(logprobs.start_indices)[:, None] + 1 + np.arange(asked)
    return np.array(logprobs.token_ids, np.int32)[places], np.array(logprobs.logprobs, np.float32)[places]


def _common(ids: np.ndarray, values: np.ndarray, vocab_size: int, top_k: int) -> TokenLogits | None:
    """The first `top_k` of each row [N, asked] that are below `vocab_size`; None when a row has fewer."""
    common = ids < vocab_size
    if common.sum(1).min(initial=top_k) < top_k:
        return None
    first = np.argsort(~common, axis=1, kind="stable")[:, :top_k]
    ids, values = (np.take_along_axis(array, first, axis=1) for array in (ids, values))
    return TokenLogits(values=values, first_column=0, vocab_size=vocab_size, ids=ids)
