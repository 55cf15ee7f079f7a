"""A dataset in memory: read by ms-swift, encoded once, handed out by position.

Order: epoch e visits the units in the order `default_rng([data_seed, e]).permutation(num_units)`, or as they were read when
it is not to be shuffled. A position counts units from the start of epoch 0 and determines everything.

Letters: U units of one epoch (a unit is a row, or a pack of rows), N rows, S sequences, L tokens of one sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.records import RowSummary, RowTokens

if TYPE_CHECKING:
    from actors.encoding import Encoder

SPAN = 500  # rows encoded at a time by one process
NO_TOKENS = np.zeros(0, np.int32)


@dataclass(frozen=True, kw_only=True)
class EncodedRows:
    """Rows one after another in flat arrays; a row is one sequence or several."""

    token_ids: np.ndarray  # [sum of L] int32
    loss_masks: np.ndarray  # [sum of L] float32
    lengths: np.ndarray  # [S] int64: L
    targets: tuple[tuple[float, ...], ...]  # S x what the loss wants of a sequence beside its tokens
    row_starts: np.ndarray  # [N + 1] int64: the sequences of row i are row_starts[i] .. row_starts[i + 1] - 1
    sources: np.ndarray  # [N] int64: index of the row in the dataset
    dropped: Counter[str]  # rows by the reason why they are not here
    truncated: int

    @classmethod
    def joined(cls, parts: Sequence[EncodedRows]) -> EncodedRows:
        """The rows of all parts, in order."""
        arrays = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("token_ids", "loss_masks", "lengths", "sources")
        }
        sizes = np.concatenate([np.diff(part.row_starts) for part in parts])
        return cls(
            **arrays,
            targets=tuple(target for part in parts for target in part.targets),
            row_starts=np.concatenate([[0], np.cumsum(sizes)]),
            dropped=sum((part.dropped for part in parts), Counter()),
            truncated=sum(part.truncated for part in parts),
        )

    @property
    def row_lengths(self) -> list[int]:
        """N: tokens of all sequences of a row."""
        sums = np.concatenate([[0], np.cumsum(self.lengths)])
        return np.diff(sums[self.row_starts]).tolist()


class Dataset:
    """Encoded rows in the seeded order of a run."""

    def __init__(self, rows: Any, encoder: Encoder, *, num_proc: int, pack_tokens: int | None, shuffle_seed: int | None):
        """`rows`: a Hugging Face dataset; `pack_tokens`: of one pack; `shuffle_seed` None: as they were read."""
        self.rows, self.shuffle_seed, self.limit = rows, shuffle_seed, encoder.limit
        self.pack_tokens = pack_tokens
        self.prompted = encoder.reads_prompts  # the last sequence of a row is its prompt
        self.answered = encoder.reads_answers
        self.responses: dict[int, np.ndarray] = {}  # [R] int32 by row: answers that were sampled
        self.encoded = encode_rows(rows, encoder, num_proc=num_proc)
        self.ends = np.cumsum(self.encoded.lengths)
        num_rows = len(self.encoded.sources)
        self.units = pack_rows(self.encoded.row_lengths, pack_tokens) if pack_tokens else [[row] for row in range(num_rows)]
        self.epoch, self.order = -1, np.zeros(0, np.int64)  # the order of one epoch: [U]

    def warnings(self) -> list[str]:
        """What its user should know of the packs."""
        too_long = sum(length > self.pack_tokens for length in self.encoded.row_lengths) if self.pack_tokens else 0
        text = f"{too_long} rows are longer than packing_length {self.pack_tokens}, all their sequences together: packs alone"
        return [text] * bool(too_long)

    def row_at(self, position: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Of an unpacked dataset with prompts: the prompt's token ids [L] int32, and the row as it was read."""
        (row,) = self.units[self._at(position)]
        prompt = self.encoded.row_starts[row + 1] - 1
        return self._slice(self.encoded.token_ids, prompt), self.rows[int(self.encoded.sources[row])]

    def adopt(self, responses: dict[int, np.ndarray]) -> None:
        """Answer prompts: token ids [R] int32 by a position of the first epoch, for `take` in every epoch."""
        self.responses = {self.units[self._at(position)][0]: ids for position, ids in responses.items()}

    def take(self, start: int, count: int) -> tuple[RowTokens, RowSummary]:
        """The rows of the units at positions start .. start + count - 1, and what planning needs of them.

        Without the prompt that stands beside an answered one, and with the response that was adopted for a prompt.
        """
        sequences: list[int] = []
        responses: list[np.ndarray] = []
        units: list[list[list[int]]] = []
        for position in range(start, start + count):
            units.append([])
            for row in self.units[self._at(position)]:
                first, last = self.encoded.row_starts[row : row + 2]
                last -= self.prompted and self.answered
                units[-1].append(list(range(len(sequences), len(sequences) + last - first)))
                sequences += range(first, last)
                responses += [self.responses.get(row, NO_TOKENS)] * int(last - first)
        tokens = RowTokens(
            token_ids=tuple(
                np.concatenate([self._slice(self.encoded.token_ids, sequence), response])
                for sequence, response in zip(sequences, responses)
            ),
            loss_masks=tuple(
                np.concatenate([self._slice(self.encoded.loss_masks, sequence), np.ones(len(response), np.float32)])
                for sequence, response in zip(sequences, responses)
            ),
        )
        return tokens, self._summary(tokens, [self.encoded.targets[sequence] for sequence in sequences], units)

    def take_mismatched(self, start: int, count: int) -> tuple[RowTokens, RowSummary]:
        """As `take`, of one-sequence rows, with a second sequence in each: its prompt with the response of the row before it.

        "Before" goes around the batch: the first row gets the response of the last.
        """
        tokens, summary = self.take(start, count)
        parts = [_prompt_and_response(ids, mask) for ids, mask in zip(tokens.token_ids, tokens.loss_masks)]
        ids, masks, targets, units, number = [], [], [], [], 0
        for unit in summary.units:
            units.append([])
            for (own,) in unit:
                prompt, response = parts[own][0], parts[own - 1][1]
                mask = np.concatenate([np.zeros(len(prompt), np.float32), np.ones(len(response), np.float32)])
                ids += [tokens.token_ids[own], np.concatenate([prompt, response])[: self.limit]]
                masks += [tokens.loss_masks[own], mask[: self.limit]]
                targets += [summary.targets[own]] * 2
                units[-1].append([number, number + 1])
                number += 2
        both = RowTokens(token_ids=tuple(ids), loss_masks=tuple(masks))
        return both, self._summary(both, targets, units)

    @staticmethod
    def _summary(tokens: RowTokens, targets: list[tuple[float, ...]], units: list[list[list[int]]]) -> RowSummary:
        return RowSummary(
            lengths=[len(ids) for ids in tokens.token_ids],
            trained=[int(np.count_nonzero(mask)) for mask in tokens.loss_masks],
            targets=targets,
            units=units,
        )

    def _slice(self, flat: np.ndarray, sequence: int) -> np.ndarray:
        return flat[self.ends[sequence] - self.encoded.lengths[sequence] : self.ends[sequence]].copy()

    def _at(self, position: int) -> int:
        """Which unit is at a position of the run."""
        epoch, place = divmod(position, len(self.units))
        if self.shuffle_seed is None:
            return place
        if epoch != self.epoch:
            order = np.random.default_rng([self.shuffle_seed, epoch]).permutation(len(self.units))
            self.epoch, self.order = epoch, order
        return int(self.order[place])


def _prompt_and_response(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[P], [R]: the last run of trained tokens is the response, what stands before it the prompt."""
    trained = np.flatnonzero(mask)
    last = trained[-1]
    untrained = np.flatnonzero(mask[: last + 1] == 0)
    first = untrained[-1] + 1 if len(untrained) else 0
    return ids[:first], ids[first : last + 1]


def load_rows(config: Any, names: list[str], *, held_out: float = 0.0) -> tuple[Any, Any | None]:
    """The datasets `names` as one Hugging Face dataset, with `messages` and the rows' other columns; and the share `held_out`.

    Raises:
        ValueError: ms-swift cannot read one of them, with the first cause.
    """
    import datasets
    from swift.dataset import load_dataset

    datasets.disable_progress_bars()
    try:
        with _pairs_unchecked():
            return load_dataset(
                names,
                split_dataset_ratio=held_out,
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
        raise ValueError(f"dataset {' '.join(names)} cannot be read: {type(cause).__name__}: {cause}") from error


@contextmanager
def _pairs_unchecked() -> Iterator[None]:
    """ms-swift fails at a pair of equal answers; the encoder leaves it out and counts it."""
    from swift.dataset import RowPreprocessor

    check = RowPreprocessor.__dict__["_check_rejected_response"]
    RowPreprocessor._check_rejected_response = staticmethod(lambda row: None)
    try:
        yield
    finally:
        RowPreprocessor._check_rejected_response = check


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
    """Group rows into packs of at most `capacity` tokens with ms-swift's bin packing, over 1,000 rows at a time.

    A row that is longer, all its sequences together, is a pack alone.
    """
    from swift.dataset.packing import PackingDataset, calculate_matched_group

    packs, waiting, step = [], [], PackingDataset.PACKING_BATCH_SIZE
    for start in range(0, len(lengths), step):
        waiting += list(enumerate(lengths[start : start + step], start))
        done, waiting = calculate_matched_group(waiting, capacity, is_finished=start + step >= len(lengths))
        packs += [[row for row, _ in pack] for pack in done]
    return packs


def _encode_span(dataset: Any, encoder: Encoder, span: range) -> EncodedRows:
    ids, masks = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]  # the first: no rows at all is an array too
    targets: list[tuple[float, ...]] = []
    sizes, sources = [0], []
    dropped: Counter[str] = Counter()
    truncated = 0
    for index, row in zip(span, dataset.select(span), strict=True):
        try:
            encoded = encoder.encode(row)
        except Exception as error:
            raise ValueError(f"row {str(row['messages'])[:120]} cannot be encoded: {error}") from error
        if isinstance(encoded, str):
            dropped[encoded] += 1
            continue
        truncated += encoded.truncated
        for sequence in encoded.sequences:
            ids.append(sequence.token_ids)
            masks.append(sequence.loss_mask)
            targets.append(sequence.targets)
        sizes.append(len(encoded.sequences))
        sources.append(index)
    return EncodedRows(
        token_ids=np.concatenate(ids),
        loss_masks=np.concatenate(masks),
        lengths=np.array([len(part) for part in ids[1:]], np.int64),
        targets=tuple(targets),
        row_starts=np.cumsum(sizes),
        sources=np.array(sources, np.int64),
        dropped=dropped,
        truncated=truncated,
    )


_adopted: tuple[Any, Any] | None = None  # of a forked process: dataset and encoder


def _adopt(dataset: Any, encoder: Any) -> None:
    global _adopted
    _adopted = dataset, encoder


def _encode_adopted(span: range) -> EncodedRows:
    assert _adopted is not None
    return _encode_span(*_adopted, span)
