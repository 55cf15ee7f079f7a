"""DataWorker: one CPU process that loads and encodes the datasets, and hands out prompts or rows by position.

ms-swift reads the datasets (files, hub ids, column mapping, `#ROWS`) and renders the templates. All rows are encoded
once, at setup, so that their number is known and rows that are too long or train nothing are dropped and counted.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray

from actors.imports import lasting_imports
from actors.progress import Progress
from rlhf.records import Prompt, RowSummary, RowTokens

if TYPE_CHECKING:
    import numpy as np

    from actors.dataset import Dataset
    from actors.encoding import Encoder


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What setup found. `num_rows` counts the units of one epoch: packs when packing, rows otherwise."""

    num_rows: int
    loaded: int  # rows read
    dropped: dict[str, int]  # rows by the reason why they are left out
    truncated: int  # rows cut to max_length tokens
    longest: int  # tokens of the longest sequence (grpo: prompt) that is left
    num_tokens: int  # of one epoch
    evaluation_rows: int = 0  # units to evaluate on
    end_tokens: tuple[str, ...] = ()  # special tokens by which the template ends an answer
    warnings: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line of counts, and the warnings."""
        dropped = "".join(f", {count} dropped: {why}" for why, count in self.dropped.items())
        cut = f", {self.truncated} cut to max_length" if self.truncated else ""
        line = f"dataset: {self.loaded} rows{dropped}{cut}; {self.num_rows} an epoch, the longest of {self.longest} tokens"
        held_out = f"; {self.evaluation_rows} to evaluate on" if self.evaluation_rows else ""
        return "\n".join([line + held_out, *(f"warning: {warning}" for warning in self.warnings)])


class DataWorker:
    """Loads, encodes, and serves by position. A run uses `prompts` (grpo), `rows`, or both in one (gkd)."""

    train: Dataset
    evaluation: Dataset | None

    def __init__(self, config: Any):
        self.config = config
        self.progress = Progress()
        self.reward_encoder: Encoder | None = None  # of a reward model

    def setup(self) -> DatasetInfo:
        """Load and encode the datasets.

        Raises:
            ValueError: one cannot be read, a row cannot be encoded, or no row is left.
        """
        config = self.config
        from actors.dataset import load_rows
        from actors.encoding import Encoder

        with lasting_imports(), self.progress.doing(f"importing ms-swift and loading the template of {config.model}"):
            logging.getLogger("swift").setLevel(logging.ERROR)
            encoder = Encoder(config)
        with self.progress.doing(f"loading {' '.join(config.dataset + config.val_dataset)}"):
            train, evaluation = load_rows(config, config.dataset, held_out=config.split_dataset_ratio)
            if config.val_dataset:
                evaluation, _ = load_rows(config, config.val_dataset)
        self.train = self._encoded(train, encoder, " ".join(config.dataset), shuffled=config.dataset_shuffle)
        self.evaluation = None
        if evaluation is not None:
            name = " ".join(config.val_dataset) or f"split_dataset_ratio {config.split_dataset_ratio:g}"
            self.evaluation = self._encoded(evaluation, encoder.of_answers(), name, shuffled=False)
        return self._info(encoder)

    def prompts(self, start: int, count: int) -> list[Prompt]:
        """The prompts at positions start .. start + count - 1."""
        with self.progress.doing(f"reading {count} prompts from position {start}"):
            return [self._prompt(position) for position in range(start, start + count)]

    def adopt(self, responses: dict[int, np.ndarray]) -> None:
        """Train on these answers: token ids [R] int32 by the prompt's position in the first epoch."""
        self.train.adopt(responses)

    @ray.method(num_returns=2)
    def rows(self, start: int, count: int, evaluation: bool = False) -> tuple[RowTokens, RowSummary]:
        """The rows of the units at positions start .. start + count - 1, and what planning needs of them."""
        with self.progress.doing(f"reading {count} rows from position {start}"):
            dataset = self.evaluation if evaluation else self.train
            mismatched = self.config.task == "kto" and self.config.loss_type == "kto"
            return dataset.take_mismatched(start, count) if mismatched else dataset.take(start, count)

    @ray.method(num_returns=2)
    def answers(self, groups: list[tuple[list[dict[str, Any]], dict[str, Any], tuple[str, ...]]]) -> tuple[RowTokens, RowSummary]:
        """A row of each response to each prompt (messages, columns, responses), as the reward model reads it.

        What is too long for it loses its beginning.
        """
        from actors.encoding import Encoder

        with self.progress.doing(f"encoding {sum(len(texts) for _, _, texts in groups)} responses"):
            if self.reward_encoder is None:
                self.reward_encoder = Encoder(reward_model_config(self.config))
            rows = [
                self.reward_encoder.conversation(columns | {"messages": [*messages, {"role": "assistant", "content": text}]})
                for messages, columns, texts in groups
                for text in texts
            ]
        tokens = RowTokens(token_ids=tuple(row.token_ids for row in rows), loss_masks=tuple(row.loss_mask for row in rows))
        summary = RowSummary(
            lengths=[len(row.token_ids) for row in rows],
            trained=[0] * len(rows),
            targets=[()] * len(rows),
            units=[[[row]] for row in range(len(rows))],
        )
        return tokens, summary

    @ray.method(num_returns=3)
    def prompted_rows(self, start: int, count: int) -> tuple[RowTokens, list[Prompt], RowSummary]:
        """The rows of these positions with the prompt of each; not packed."""
        tokens, summary = self.rows(start, count)
        return tokens, self.prompts(start, count), summary

    @ray.method(concurrency_group="report")
    def report(self) -> str:
        """What it is doing now."""
        return self.progress.report()

    def _encoded(self, rows: Any, encoder: Encoder, name: str, *, shuffled: bool) -> Dataset:
        from actors.dataset import Dataset

        config = self.config
        with self.progress.doing(f"encoding {len(rows)} rows of {name}"):
            dataset = Dataset(
                rows,
                encoder,
                num_proc=config.dataset_num_proc,
                pack_tokens=(config.packing_length or encoder.limit) if config.packing else None,
                shuffle_seed=config.data_seed if shuffled else None,
            )
        if not dataset.units:
            reasons = ", ".join(f"{count} {why}" for why, count in dataset.encoded.dropped.items()) or "there are none"
            raise ValueError(f"no row of {name} is left: of {len(rows)}, {reasons} (max_length {encoder.limit} tokens)")
        return dataset

    def _prompt(self, position: int) -> Prompt:
        from actors.encoding import without_answer

        token_ids, row = self.train.row_at(position)
        messages = without_answer(row.pop("messages"))
        return Prompt(index=position, token_ids=token_ids, messages=messages, columns=_own_columns(row))

    def _info(self, encoder: Encoder) -> DatasetInfo:
        dataset, encoded = self.train, self.train.encoded
        return DatasetInfo(
            num_rows=len(dataset.units),
            loaded=len(dataset.rows),
            dropped=dict(encoded.dropped),
            truncated=encoded.truncated,
            longest=int(encoded.lengths.max()),
            num_tokens=int(encoded.lengths.sum()),
            evaluation_rows=len(self.evaluation.units) if self.evaluation else 0,
            end_tokens=encoder.end_tokens(),
            warnings=(*encoder.warnings(dataset.rows[0]), *dataset.warnings()),
        )


def reward_model_config(config: Any) -> Any:
    """What an encoder needs to know of the reward model: its own type, template and length."""
    own = {"model_type": None, "template": None, "max_length": None, "truncation_strategy": "left", "loss_scale": "last_round"}
    return replace(config, task="rm", model=config.reward_model, **own)


def _own_columns(row: dict[str, Any]) -> dict[str, Any]:
    """The row's columns without the empty ones that ms-swift adds (images, objects, ...)."""
    from swift.dataset import RowPreprocessor

    return {key: value for key, value in row.items() if value or key not in RowPreprocessor.standard_keys}
