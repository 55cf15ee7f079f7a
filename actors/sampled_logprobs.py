"""Keeps the logprob of every sampled token on the GPU, mixed into vLLM's worker; called by `EngineWorkers`.

vLLM hands out logprobs as Python objects, one for each token of each step, which takes longer than the step itself. Here one
kernel a step writes them into an array [requests, tokens], and a finished request fetches its row. Places that were not
written are NaN, so that a lost one cannot go unseen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class LogprobRecorder:
    """Methods of vLLM's worker: record_logprobs once, recorded_logprobs for each finished request."""

    def record_logprobs(self) -> bool:
        """Start recording; False where the model runner has no rows of its own for requests (vLLM's V1): nothing is recorded.

        A row is a request's own while it runs. It is saved when vLLM gives the row to another one, also for a request that is
        interrupted and goes on later in another row: what it has known by then is not written again.
        """
        runner: Any = self.model_runner
        if not hasattr(runner, "req_states"):
            return False
        states = runner.req_states
        runner.sampler.use_flashinfer = False  # it samples without giving out the distribution after top-p and top-k
        shape = states.max_num_reqs, states.max_model_len + 1
        self._rows = torch.full(shape, float("nan"), device=runner.device)
        self._saved: dict[str, torch.Tensor] = {}
        self._fetched: set[str] = set()
        sample, remove = runner.sampler.sample, runner._remove_request

        def recorded_sample(logits: torch.Tensor, rows: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            sampled, processed = sample(logits, rows, *arguments, **options)
            places = arguments[1] + 1  # the sampled token comes after the one that was read
            known = places < states.prefill_len.gpu[rows]  # vLLM throws this sample away
            values = torch.where(known, self._rows[rows, places], _token_logprobs(processed, sampled))
            self._rows[rows, places] = values
            return sampled, processed

        def remove_saved(request: str) -> Any:
            if (row := states.req_id_to_index.get(request)) is not None:
                if request not in self._fetched:
                    self._saved[request] = self._row(request).clone()
                self._rows[row] = float("nan")
            self._fetched.discard(request)
            return remove(request)

        runner.sampler.sample, runner._remove_request = recorded_sample, remove_saved
        return True

    def recorded_logprobs(self, requests: Sequence[str], spans: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Logprobs of the tokens at places [start, end) of finished requests, prompt tokens counted: float32 each."""
        parts = [self._row(request)[start:end] for request, (start, end) in zip(requests, spans)]
        for request in requests:
            self._saved.pop(request, None)
            if request in self.model_runner.req_states.req_id_to_index:
                self._fetched.add(request)  # its row is still there: not to be saved
        values = torch.cat(parts).cpu().numpy()
        assert not np.isnan(values).any(), f"no logprob was recorded for {np.isnan(values).sum()} tokens of {requests}"
        return np.split(values, np.cumsum([end - start for start, end in spans])[:-1])

    def forget_logprobs(self) -> None:
        """Drop what was saved of requests that nobody will ask for: none is running."""
        if hasattr(self, "_saved"):
            self._saved.clear()
            self._fetched.update(self.model_runner.req_states.req_id_to_index)

    def _row(self, request: str) -> torch.Tensor:
        """What is known of a request: its present row where that is written, else what was saved before."""
        place = self.model_runner.req_states.req_id_to_index.get(request)
        saved = self._saved.get(request)
        if place is None:
            return saved
        present = self._rows[place]
        return present if saved is None else torch.where(present.isnan(), saved, present)


def _token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[rows, V], [rows] -> [rows] float32."""
    from vllm.v1.worker.gpu.sample.logprob import compute_token_logprobs

    return compute_token_logprobs(logits, tokens[:, None])[:, 0]
