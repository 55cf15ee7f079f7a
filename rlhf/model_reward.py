"""A reward model as a reward of GRPO: a frozen group scores every response, rendered by the reward model's own template."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray

from actors.group import LongWait, RankGroup, first_line
from rlhf.batching import row_shards
from rlhf.counts import reward_names
from rlhf.data import DataFailure, RowBatch
from rlhf.head_losses import head_outputs
from rlhf.reward_process import ScoringError

if TYPE_CHECKING:
    from rlhf.config import Config
    from rlhf.records import Group, RowSummary


class ModelReward:
    """The score of a model with a head of one label, at the last token of prompt and response."""

    def __init__(self, ranks: RankGroup, encoder: Any, config: Config):
        """`ranks` hold the reward model; `encoder`: handle of the DataWorker, which knows its template."""
        self.ranks, self.encoder, self.config = ranks, encoder, config
        self.name = reward_names(config)[-1]

    def score(self, groups: Sequence[Group]) -> list[tuple[float, ...]]:
        """The scores of each group's responses. ScoringError when one is not finite, DataFailure when they were not encoded."""
        answers = [(group.prompt.messages, group.prompt.columns, group.texts) for group in groups]
        tokens, summary = self.encoder.answers.remote(answers)
        batch = RowBatch(tokens=tokens, summary=self._encoded(summary))
        shards = row_shards(batch, self.config, data_size=self.ranks.data_size, weigh="rows")
        parts = ray.get(self.ranks.on_shards_refs("sequence_values", shards, head_outputs))
        by_key = {key: value for part in parts for key, value in part.items()}
        values = [float(by_key[key][0]) for key in range(len(by_key))]
        if not all(map(math.isfinite, values)):
            raise ScoringError(f"the reward model {self.config.reward_model} gave a score that is not finite")
        scores, start = [], 0
        for group in groups:
            scores.append(tuple(values[start : start + len(group.texts)]))
            start += len(group.texts)
        return scores

    def _encoded(self, summary: ray.ObjectRef) -> RowSummary:
        """What the data worker says of the responses. DataFailure when it does not in call_timeout, or has died."""
        try:
            with LongWait("encoding the responses for the reward model", lambda: "  in the data worker") as news:
                return news.get(summary, time.monotonic() + self.config.call_timeout)
        except ray.exceptions.GetTimeoutError:
            timeout = f"{self.config.call_timeout:g} s (call_timeout)"
            raise DataFailure(f"the data worker did not encode the responses for the reward model within {timeout}") from None
        except ray.exceptions.RayActorError as error:
            raise DataFailure(f"the data worker died at the responses for the reward model: {first_line(error)}") from error
