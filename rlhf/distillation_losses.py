"""Losses of distillation: logits of student and teacher in, a divergence for each token out. No model, no config.

Letters: T tokens, V vocabulary (this tensor rank's columns, where it is split), K the teacher's most likely tokens.

Where tensor ranks split the vocabulary, each calls with its own columns, the id of the first of them and a `reduce`
over the ranks. Every rank gets the same loss and, if all go on from it in the same way, the gradient of its own columns.
That gradient is a closed form, so ranks talk in the forward pass only (five times, whatever T is) and outside autograd.
The teacher gets no gradient. Torch is imported inside the functions, so that the controller can import this module.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

FLOOR = -1e30  # stands for a logit of -inf: its probability is 0, and 0 times its finite logprob is 0, not NaN


class VocabReduce(Protocol):
    """Reduction over the tensor ranks that split the vocabulary. Given a fresh tensor; may work in place; no backward."""

    def max(self, x: torch.Tensor) -> torch.Tensor: ...
    def sum(self, x: torch.Tensor) -> torch.Tensor: ...


class WholeVocab:
    """The reduction where every rank holds the whole vocabulary."""

    def max(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x


WHOLE_VOCAB = WholeVocab()


def generalized_jsd(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    beta: float,
    vocab_size: int,
    temperature: float = 1.0,
    first_column: int = 0,
    reduce: VocabReduce = WHOLE_VOCAB,
    chunk: int = 256,
) -> torch.Tensor:
    """Generalized Jensen-Shannon divergence of each token in nats, [T] (GKD, Agarwal et al. 2024, eq. 1, as in TRL).

    s, t: softmax of the logits / temperature. beta 0: KL(t || s), the forward KL; beta 1: KL(s || t); between,
    beta KL(t || m) + (1 - beta) KL(s || m) with m = beta t + (1 - beta) s. No factor temperature^2. The loss of a step is
    the mean over the trained tokens of its global batch.

    student_logits, teacher_logits [T, V]: their widths may differ by padding; columns of ids from vocab_size on are
    ignored. A column holds the id first_column + its index, the same one on both sides. Computed in float32 (float64 if
    given), `chunk` tokens at a time: beyond the inputs, which are kept for the backward pass, memory is some six
    float32 [chunk, V], and the gradient. Raises ValueError where the widths differ below vocab_size.
    """
    columns = max(vocab_size - first_column, 0)
    widths = [min(logits.shape[-1], columns) for logits in (student_logits, teacher_logits)]
    if widths[0] != widths[1]:
        raise ValueError(
            f"student and teacher have {student_logits.shape[-1]} and {teacher_logits.shape[-1]} columns from token id "
            f"{first_column} on, of a vocabulary of {vocab_size}: give both the columns of the same token ids"
        )
    return _divergence().apply(student_logits, teacher_logits, widths[0], beta, temperature, reduce, chunk)


def top_k_jsd(
    student_logits: torch.Tensor,
    teacher_ids: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    *,
    beta: float,
    vocab_size: int,
    temperature: float = 1.0,
    first_column: int = 0,
    reduce: VocabReduce = WHOLE_VOCAB,
) -> torch.Tensor:
    """`generalized_jsd` over the teacher's K most likely tokens, both sides renormalised over them, [T] (as in ms-swift).

    student_logits [T, V]; teacher_ids [T, K] int64; teacher_logprobs [T, K] at temperature 1 (or logits: a constant added
    to a row changes nothing). An entry whose logprob is -inf, or whose id is not in 0..vocab_size-1, counts on neither
    side; a token without entries has divergence 0.
    """
    missing = (teacher_logprobs == float("-inf")) | (teacher_ids < 0) | (teacher_ids >= vocab_size)
    teacher = _wide(teacher_logprobs).masked_fill(missing, FLOOR)
    student = _gather(student_logits, teacher_ids, first_column, reduce).masked_fill(missing, FLOOR)
    return generalized_jsd(student, teacher, beta=beta, vocab_size=teacher.shape[-1], temperature=temperature)


def _gather(logits: torch.Tensor, ids: torch.Tensor, first_column: int, reduce: VocabReduce) -> torch.Tensor:
    """Logits at the ids, wherever their columns are, [T, K]; the gradient goes to this rank's columns only."""
    columns = ids - first_column
    elsewhere = (columns < 0) | (columns >= logits.shape[-1])
    here = _wide(logits.gather(-1, columns.masked_fill(elsewhere, 0))).clamp(min=FLOOR).masked_fill(elsewhere, 0)
    return here + (reduce.sum(here.detach().clone()) - here.detach())


@cache
def _divergence() -> Any:
    """The autograd function of `generalized_jsd`; a class that needs torch to be written down.

    With z = student logits / temperature, r = log s - log m (m is t where beta is 1) and c = 1 - beta (1 where beta is 1):
    d loss / d z = c s (r - sum of s r); where beta is 0, s - t. The sum of s r is kept, so the backward pass needs no sum.
    """
    import torch

    class Divergence(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            student: torch.Tensor,
            teacher: torch.Tensor,
            columns: int,
            beta: float,
            temperature: float,
            reduce: VocabReduce,
            chunk: int,
        ) -> torch.Tensor:
            student_norm = _log_norm(student[:, :columns], temperature, reduce, chunk)
            teacher_norm = _log_norm(teacher[:, :columns], temperature, reduce, chunk)
            kls = []
            for rows in _rows(len(student), chunk):
                s = _logprobs(student[rows, :columns], student_norm[rows], temperature)
                t = _logprobs(teacher[rows, :columns], teacher_norm[rows], temperature)
                m = _log_mixture(s, t, beta)
                kls.append(torch.stack([_kl(s, m), _kl(t, m)]))
            student_kl, teacher_kl = reduce.sum(torch.cat(kls, dim=1))
            ctx.save_for_backward(student, teacher, student_norm, teacher_norm, student_kl)
            ctx.options = columns, beta, temperature, chunk
            student_weight, teacher_weight = _weights(beta)
            return student_weight * student_kl + teacher_weight * teacher_kl

        @staticmethod
        def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            student, teacher, student_norm, teacher_norm, student_kl = ctx.saved_tensors
            columns, beta, temperature, chunk = ctx.options
            gradient = torch.zeros_like(student)
            for rows in _rows(len(student), chunk):
                s = _logprobs(student[rows, :columns], student_norm[rows], temperature)
                t = _logprobs(teacher[rows, :columns], teacher_norm[rows], temperature)
                if beta == 0:
                    slope = s.exp() - t.exp()
                else:
                    excess = s - _log_mixture(s, t, beta) - student_kl[rows, None]
                    slope = s.exp() * excess * _weights(beta)[0]
                gradient[rows, :columns] = slope * (upstream[rows, None] / temperature)
            return gradient, None, None, None, None, None, None

    return Divergence


def _rows(size: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, max(size, 1), chunk)]


def _weights(beta: float) -> tuple[float, float]:
    """What KL(s || m) and KL(t || m) weigh in the divergence."""
    return {0: (0.0, 1.0), 1: (1.0, 0.0)}.get(beta, (1 - beta, beta))


def _log_norm(logits: torch.Tensor, temperature: float, reduce: VocabReduce, chunk: int) -> torch.Tensor:
    """log of the sum of exp(logits / temperature) over the whole vocabulary, [T]."""
    largest = logits.amax(-1) if logits.shape[-1] else logits.new_full(logits.shape[:1], float("-inf"))
    largest = reduce.max((_wide(largest) / temperature).clamp(min=FLOOR))
    sums = largest.new_empty(largest.shape)
    for rows in _rows(len(logits), chunk):
        sums[rows] = _logprobs(logits[rows], largest[rows], temperature).exp().sum(-1)
    return largest + reduce.sum(sums).log()


def _logprobs(logits: torch.Tensor, log_norm: torch.Tensor, temperature: float) -> torch.Tensor:
    return (_wide(logits) / temperature).clamp_(min=FLOOR).sub_(log_norm[:, None])


def _log_mixture(s: torch.Tensor, t: torch.Tensor, beta: float) -> torch.Tensor:
    """log m from log s and log t, [T, V]: of the distribution that both are compared with."""
    if beta in (0, 1):
        return t if beta == 1 else s
    return (s + math.log1p(-beta)).logaddexp(t + math.log(beta))


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """This rank's part of KL(p || q) in nats, from logprobs [T, V], [T]."""
    return (p.exp() * (p - q)).sum(-1)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype.itemsize >= 4 else x.float()
