"""DataWorker: one CPU process that loads and encodes the dataset, and hands out prompts or rows by position.

ms-swift reads the datasets (files, hub ids, column mapping, `#ROWS`) and renders the templates. All rows are encoded
once, at setup, so that their number is known and rows that are too long or train nothing are dropped and counted.

Order: epoch e visits the rows in the order `default_rng([data_seed, e]).permutation(num_rows)`, or as they were read
when `dataset_shuffle` is false. A position counts rows (packs, when packing) from the start of epoch 0 and determines
everything.

Letters: U units of one epoch (a unit is a row, or a pack of rows), L tokens of a row.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from actors.progress import Progress
from rlhf.records import Prompt, RowTokens

if TYPE_CHECKING:
    from actors.encoding import Encoder

SPAN = 500  # rows encoded at a time by one process


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What setup found. `num_rows` counts the units of one epoch: packs when packing, rows otherwise."""

    num_rows: int
    loaded: int  # rows read
    too_long: int  # dropped: more than max_length tokens
    truncated: int  # cut to max_length tokens
    untrained: int  # dropped: no token would be trained
    longest: int  # tokens of the longest row (rlhf: prompt) that is left
    num_tokens: int  # of one epoch
    end_tokens: tuple[str, ...] = ()  # special tokens by which the template ends an answer
    warnings: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line of counts, and the warnings."""
        counts = {"longer than max_length": self.too_long, "without a token to train on": self.untrained}
        dropped = "".join(f", {count} dropped: {why}" for why, count in counts.items() if count)
        cut = f", {self.truncated} cut to max_length" if self.truncated else ""
        line = f"dataset: {self.loaded} rows{dropped}{cut}; {self.num_rows} an epoch, the longest of {self.longest} tokens"
        return "\n".join([line, *(f"warning: {warning}" for warning in self.warnings)])


@dataclass(frozen=True, kw_only=True)
class EncodedRows:
    """Rows one after another in flat arrays."""

    token_ids: np.ndarray  # [sum of L] int32
    loss_masks: np.ndarray  # [sum of L] float32
    lengths: np.ndarray  # [rows] int64: L
    sources: np.ndarray  # [rows] int64: index of the row in the dataset
    too_long: int
    truncated: int
    untrained: int

    @classmethod
    def joined(cls, parts: Sequence[EncodedRows]) -> EncodedRows:
        """The rows of all parts, in order."""
        arrays = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("token_ids", "loss_masks", "lengths", "sources")
        }
        counts = {name: sum(getattr(part, name) for part in parts) for name in ("too_long", "truncated", "untrained")}
        return cls(**arrays, **counts)


class DataWorker:
    """Loads, encodes, and serves by position. One of `prompts` (rlhf) and `rows` (sft) has a use in a run."""

    def __init__(self, config: Any):
        self.config = config
        self.progress = Progress()
        self.epoch, self.order = -1, np.zeros(0, np.int64)  # the order of one epoch: [U]

    def setup(self) -> DatasetInfo:
        """Load and encode the whole dataset.

        Raises:
            ValueError: a dataset cannot be read, a row cannot be encoded, or no row is left.
        """
        config, prompts_only = self.config, self.config.task != "sft"
        from actors.encoding import Encoder

        with self.progress.doing(f"importing ms-swift and loading the template of {config.model}"):
            logging.getLogger("swift").setLevel(logging.ERROR)
            encoder = Encoder(config, prompts_only=prompts_only)
        with self.progress.doing(f"loading {' '.join(config.dataset)}"):
            self.dataset = load_rows(config)
        with self.progress.doing(f"encoding {len(self.dataset)} rows"):
            self.encoded = encode_rows(self.dataset, encoder, num_proc=config.dataset_num_proc)
        self.ends = np.cumsum(self.encoded.lengths)
        self.units = self._units(encoder.limit)
        info = self._info(encoder)
        if not info.num_rows:
            raise ValueError(
                f"no row of {' '.join(config.dataset)} is left: of {info.loaded}, {info.too_long} have more than "
                f"max_length {encoder.limit} tokens, {info.untrained} have no token to train on"
            )
        return info

    def prompts(self, start: int, count: int) -> list[Prompt]:
        """The prompts at positions start .. start + count - 1."""
        with self.progress.doing(f"reading {count} prompts from position {start}"):
            return [self._prompt(position) for position in range(start, start + count)]

    @ray.method(num_returns=2)
    def rows(self, start: int, count: int) -> tuple[RowTokens, tuple[list[int], list[int], list[list[int]]]]:
        """The rows of the units at positions start .. start + count - 1, and what planning needs of them.

        The second value is (lengths, trained, units): tokens and trained tokens of each row, and for each unit the rows
        it is made of, as indices into them.
        """
        with self.progress.doing(f"reading {count} rows from position {start}"):
            rows, units = [], []
            for position in range(start, start + count):
                unit = self.units[self._at(position)]
                units.append(list(range(len(rows), len(rows) + len(unit))))
                rows += unit
            tokens = RowTokens(
                token_ids=tuple(self._slice(self.encoded.token_ids, row) for row in rows),
                loss_masks=tuple(self._slice(self.encoded.loss_masks, row) for row in rows),
            )
            lengths = [len(ids) for ids in tokens.token_ids]
            trained = [int(np.count_nonzero(mask)) for mask in tokens.loss_masks]
            return tokens, (lengths, trained, units)

    @ray.method(concurrency_group="report")
    def report(self) -> str:
        """What it is doing now."""
        return self.progress.report()

    def _prompt(self, position: int) -> Prompt:
        from actors.encoding import without_answer

        unit = self._at(position)
        row = self.dataset[int(self.encoded.sources[unit])]
        return Prompt(
            index=position,
            token_ids=self._slice(self.encoded.token_ids, unit),
            messages=without_answer(row.pop("messages")),
            columns=_own_columns(row),
        )

    def _slice(self, flat: np.ndarray, row: int) -> np.ndarray:
        return flat[self.ends[row] - self.encoded.lengths[row] : self.ends[row]].copy()

    def _at(self, position: int) -> int:
        """Which unit is at a position of the run."""
        epoch, place = divmod(position, len(self.units))
        if not self.config.dataset_shuffle:
            return place
        if epoch != self.epoch:
            order = np.random.default_rng([self.config.data_seed, epoch]).permutation(len(self.units))
            self.epoch, self.order = epoch, order
        return int(self.order[place])

    def _units(self, limit: int) -> list[list[int]]:
        lengths = self.encoded.lengths.tolist()
        if self.config.task == "sft" and self.config.packing:
            return pack_rows(lengths, self.config.packing_length or limit)
        return [[row] for row in range(len(lengths))]

    def _info(self, encoder: Encoder) -> DatasetInfo:
        encoded = self.encoded
        return DatasetInfo(
            num_rows=len(self.units),
            loaded=len(self.dataset),
            too_long=encoded.too_long,
            truncated=encoded.truncated,
            untrained=encoded.untrained,
            longest=int(encoded.lengths.max(initial=0)),
            num_tokens=int(encoded.lengths.sum()),
            end_tokens=encoder.end_tokens(),
            warnings=tuple(encoder.warnings(self.dataset[0])) if len(self.dataset) else (),
        )


def load_rows(config: Any) -> Any:
    """All datasets as one Hugging Face dataset, with `messages` and the rows' other columns.

    Raises:
        ValueError: ms-swift cannot read one of them, with the first cause.
    """
    import datasets
    from swift.dataset import load_dataset

    datasets.disable_progress_bars()
    try:
        rows, _ = load_dataset(
            config.dataset,
            seed=config.data_seed,
            num_proc=config.dataset_num_proc,
            load_from_cache_file=config.load_from_cache_file,
            shuffle=config.dataset_shuffle,
            use_hf=config.use_hf,
            strict=True,
            remove_unused_columns=False,
        )
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        raise ValueError(
            f"dataset {' '.join(config.dataset)} cannot be read: {type(cause).__name__}: {cause}"
        ) from error
    return rows


def encode_rows(dataset: Any, encoder: Encoder, *, num_proc: int) -> EncodedRows:
    """Encode every row, in `num_proc` processes when there is enough for each to do."""
    spans = [range(start, min(start + SPAN, len(dataset))) for start in range(0, len(dataset), SPAN)]
    num_proc = min(num_proc, len(spans))
    if num_proc <= 1:
        parts = [_encode_span(dataset, encoder, span) for span in spans]
    else:
        # Forked processes share the dataset and the template; spawned ones would import ms-swift again.
        with ProcessPoolExecutor(
            num_proc, mp_context=get_context("fork"), initializer=_adopt, initargs=(dataset, encoder)
        ) as pool:
            parts = list(pool.map(_encode_adopted, spans))
    return EncodedRows.joined(parts or [_encode_span(dataset, encoder, range(0))])


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group rows into packs of at most `capacity` tokens with ms-swift's bin packing, over 1,000 rows at a time."""
    from swift.dataset.packing import PackingDataset, calculate_matched_group

    packs, waiting, step = [], [], PackingDataset.PACKING_BATCH_SIZE
    for start in range(0, len(lengths), step):
        waiting += list(enumerate(lengths[start : start + step], start))
        done, waiting = calculate_matched_group(waiting, capacity, is_finished=start + step >= len(lengths))
        packs += [[row for row, _ in pack] for pack in done]
    return packs


def _encode_span(dataset: Any, encoder: Encoder, span: range) -> EncodedRows:
    ids, masks, sources = (
        [np.zeros(0, np.int32)],
        [np.zeros(0, np.float32)],
        [],
    )  # the first: no rows at all is an array too
    too_long = truncated = untrained = 0
    for index, row in zip(span, dataset.select(span), strict=True):
        try:
            encoded = encoder.encode(row)
        except Exception as error:
            raise ValueError(f"row {str(row['messages'])[:120]} cannot be encoded: {error}") from error
        if encoded is None:
            too_long += 1
            continue
        token_ids, mask, cut = encoded
        if not encoder.prompts_only and not mask.any():
            untrained += 1
            continue
        truncated += cut
        ids.append(token_ids)
        masks.append(mask)
        sources.append(index)
    return EncodedRows(
        token_ids=np.concatenate(ids),
        loss_masks=np.concatenate(masks),
        lengths=np.array([len(part) for part in ids[1:]], np.int64),
        sources=np.array(sources, np.int64),
        too_long=too_long,
        truncated=truncated,
        untrained=untrained,
    )


_adopted: tuple[Any, Any] | None = None  # of a forked process: dataset and encoder


def _adopt(dataset: Any, encoder: Any) -> None:
    global _adopted
    _adopted = dataset, encoder


def _encode_adopted(span: range) -> EncodedRows:
    assert _adopted is not None
    return _encode_span(*_adopted, span)


def _own_columns(row: dict[str, Any]) -> dict[str, Any]:
    """The row's columns without the empty ones that ms-swift adds (images, objects, ...)."""
    from swift.dataset import RowPreprocessor

    return {key: value for key, value in row.items() if value or key not in RowPreprocessor.standard_keys}
