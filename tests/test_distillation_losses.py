"""Divergences of distillation against TRL's and ms-swift's own code, the formula written out, and a split vocabulary."""

import math
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlhf.distillation_losses import generalized_jsd, top_k_jsd

TOKENS, VOCAB, K = 7, 11, 4
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
EXACT = dict(rtol=0, atol=1e-10)  # float64


def normal(*shape: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TEACHER = normal(TOKENS, VOCAB, seed=1)
UPSTREAM = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)  # a different weight for each token


def student_logits(width: int = VOCAB) -> torch.Tensor:
    return normal(TOKENS, width, seed=0).requires_grad_()


def value_and_gradient(losses: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return losses.detach(), torch.autograd.grad(losses, logits, UPSTREAM.to(losses.dtype))[0]


def assert_same(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...], **tolerance: float) -> None:
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, **(tolerance or EXACT))


def of_trl(student: torch.Tensor, teacher: torch.Tensor, *, beta: float, temperature: float) -> torch.Tensor:
    from trl.experimental.gkd import GKDTrainer

    terms = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=temperature, reduction="none")
    return terms.sum(-1)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_gradient_equal_those_of_trl(beta, temperature):
    student = student_logits()
    ours = generalized_jsd(student, TEACHER, beta=beta, temperature=temperature, vocab_size=VOCAB, chunk=3)
    theirs = of_trl(student, TEACHER, beta=beta, temperature=temperature)
    assert ours.shape == (TOKENS,)
    assert_same(value_and_gradient(ours, student), value_and_gradient(theirs, student))


@pytest.mark.parametrize("beta", BETAS)
def test_sum_over_tokens_equals_that_of_ms_swift(beta):
    from swift.rlhf_trainers.gkd_loss import jsd_loss

    student = student_logits()
    ours = generalized_jsd(student, TEACHER, beta=beta, vocab_size=VOCAB).sum()
    theirs = jsd_loss(student, TEACHER, beta)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-10)
    assert_same(torch.autograd.grad(ours, student), torch.autograd.grad(theirs, student))


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_equals_finite_differences(beta):
    divergence = partial(generalized_jsd, beta=beta, temperature=1.7, vocab_size=VOCAB, chunk=2)
    assert torch.autograd.gradcheck(divergence, (student_logits(), TEACHER))
    ids = TEACHER.topk(K).indices
    over_top_k = partial(top_k_jsd, beta=beta, temperature=1.7, vocab_size=VOCAB)
    assert torch.autograd.gradcheck(over_top_k, (student_logits(), ids, TEACHER.gather(-1, ids)))


def test_the_convention_of_beta_is_that_of_the_paper():
    p, q = [0.7, 0.2, 0.1], [0.1, 0.3, 0.6]  # teacher, student

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b))

    def ours(beta):
        teacher, student = torch.tensor([p]).log(), torch.tensor([q]).log()
        return generalized_jsd(student, teacher, beta=beta, vocab_size=3).item()

    mixture = [0.3 * x + 0.7 * y for x, y in zip(p, q)]
    assert ours(0.0) == pytest.approx(kl(p, q), abs=1e-6)
    assert ours(1.0) == pytest.approx(kl(q, p), abs=1e-6)
    assert ours(0.3) == pytest.approx(0.3 * kl(p, mixture) + 0.7 * kl(q, mixture), abs=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_columns_that_pad_the_vocabulary_count_on_neither_side(beta):
    student = student_logits(width=VOCAB + 5)
    teacher = torch.cat([TEACHER, normal(TOKENS, 2, seed=3) + 9], dim=1)
    ours = generalized_jsd(student, teacher, beta=beta, vocab_size=VOCAB, chunk=3)
    theirs = of_trl(student[:, :VOCAB], TEACHER, beta=beta, temperature=1.0)
    loss, gradient = value_and_gradient(ours, student)
    assert_same((loss, gradient), value_and_gradient(theirs, student))
    assert not gradient[:, VOCAB:].any()


def test_different_columns_on_the_two_sides_are_refused():
    with pytest.raises(ValueError, match="have 11 and 9 columns from token id 11 on, of a vocabulary of 22"):
        generalized_jsd(TEACHER, TEACHER[:, :9], beta=0.5, vocab_size=22, first_column=11)


@pytest.mark.parametrize("beta", BETAS)
def test_bfloat16_logits_are_computed_in_float32(beta):
    student, teacher = student_logits().detach().bfloat16().requires_grad_(), TEACHER.bfloat16()
    ours = value_and_gradient(generalized_jsd(student, teacher, beta=beta, vocab_size=VOCAB), student)
    exact = student.detach().double().requires_grad_()
    loss, gradient = value_and_gradient(of_trl(exact, teacher.double(), beta=beta, temperature=1.0), exact)
    assert_same(ours[:1], (loss.float(),), rtol=1e-6, atol=1e-6)
    assert_same(ours[1:], (gradient.bfloat16(),), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_a_logit_of_minus_infinity_is_a_probability_of_zero(beta):
    """As if the column were not there for the one side; nothing becomes NaN."""
    teacher = TEACHER.index_fill(1, torch.tensor([4]), -math.inf)
    student = student_logits()
    ours = generalized_jsd(student, teacher, beta=beta, vocab_size=VOCAB)
    theirs = of_trl(student, TEACHER.index_fill(1, torch.tensor([4]), -500.0), beta=beta, temperature=1.0)
    assert_same(value_and_gradient(ours, student), value_and_gradient(theirs, student))
    both = student_logits().detach().index_fill(1, torch.tensor([4]), -math.inf).requires_grad_()
    ours = value_and_gradient(generalized_jsd(both, teacher, beta=beta, vocab_size=VOCAB), both)
    keep = [column for column in range(VOCAB) if column != 4]
    theirs = value_and_gradient(of_trl(both[:, keep], TEACHER[:, keep], beta=beta, temperature=1.0), both)
    assert_same(ours, theirs)


def test_nothing_of_the_size_of_the_logits_is_kept_but_the_logits():
    student, kept = student_logits(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        generalized_jsd(student, TEACHER, beta=0.5, temperature=2.0, vocab_size=VOCAB)
    large = {x.data_ptr() for x in kept if x.numel() >= TOKENS * VOCAB}
    assert large == {student.data_ptr(), TEACHER.data_ptr()}


def test_parts_of_the_tokens_add_up():
    student = student_logits()
    divergence = partial(generalized_jsd, beta=0.3, vocab_size=VOCAB)
    parts = torch.cat([divergence(student[part], TEACHER[part]) for part in (slice(0, 3), slice(3, TOKENS))])
    assert_same(value_and_gradient(parts, student), value_and_gradient(divergence(student, TEACHER), student))
    nothing = divergence(student[:0], TEACHER[:0])
    assert nothing.shape == (0,) and nothing.sum().item() == 0


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_k_divergence_and_gradient_equal_those_of_ms_swift(beta, temperature):
    from swift.rlhf_trainers.gkd_loss import TeacherOutput, gkd_loss

    student = student_logits()
    logprobs, ids = TEACHER.log_softmax(-1).topk(K)
    ours = top_k_jsd(student, ids, logprobs, beta=beta, temperature=temperature, vocab_size=VOCAB).sum()
    labels = torch.arange(TOKENS)[None]  # every token is trained
    teacher = TeacherOutput(topk_logprobs=logprobs[None], topk_indices=ids[None], labels=labels)
    theirs, count = gkd_loss(student[None], teacher, labels, beta, temperature)
    assert count == TOKENS and ours.item() == pytest.approx(theirs.item(), abs=1e-10)
    assert_same(torch.autograd.grad(ours, student), torch.autograd.grad(theirs, student))


@pytest.mark.parametrize("beta", BETAS)
def test_missing_top_k_entries_count_on_neither_side(beta):
    student = student_logits()
    logprobs, ids = TEACHER.log_softmax(-1).topk(K)
    holes, hole_ids = logprobs.clone(), ids.clone()
    holes[0, 2:] = -math.inf
    hole_ids[1, 1], hole_ids[1, 2], hole_ids[1, 3] = -1, VOCAB, VOCAB + 3
    holes[2] = -math.inf
    losses = top_k_jsd(student, hole_ids, holes, beta=beta, vocab_size=VOCAB)
    loss, gradient = value_and_gradient(losses, student)
    kept_ids = ids[0, :2]
    first = top_k_jsd(student[:1], kept_ids[None], logprobs[:1, :2], beta=beta, vocab_size=VOCAB)
    assert loss[0].item() == pytest.approx(first.item(), abs=1e-12)
    assert set(gradient[0].nonzero().flatten().tolist()) == set(kept_ids.tolist())
    assert loss[1].item() == pytest.approx(0, abs=1e-12) and not gradient[1].any()  # one entry left: both sides are 1
    assert loss[2].item() == pytest.approx(0, abs=1e-12) and not gradient[2].any()
    assert_same((loss[3:],), (top_k_jsd(student, ids, logprobs, beta=beta, vocab_size=VOCAB)[3:].detach(),))


class OverRanks:
    """Plain in-place all-reduces, which autograd does not see."""

    def max(self, x):
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return x

    def sum(self, x):
        dist.all_reduce(x)
        return x


WIDTH = 8  # columns of a rank: two ranks hold 16
SPLIT_CASES = [(beta, vocab_size) for beta in BETAS for vocab_size in (16, 13, 6)]  # padding: none, some, a whole rank


def split_case(beta: float, vocab_size: int, student: torch.Tensor, teacher: torch.Tensor, **split) -> list[torch.Tensor]:
    """Losses and gradients over the vocabulary and over the top k, of the columns given."""
    wide = normal(TOKENS, 2 * WIDTH, seed=5)[:, :vocab_size].log_softmax(-1).topk(K)
    options = dict(beta=beta, temperature=1.3, vocab_size=vocab_size, **split)
    student = student.clone().requires_grad_()
    whole = value_and_gradient(generalized_jsd(student, teacher, chunk=3, **options), student)
    top_k = value_and_gradient(top_k_jsd(student, wide.indices, wide.values, **options), student)
    return [*whole, *top_k]


def split_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(normal(TOKENS, 2 * WIDTH, seed=seed) for seed in (8, 9))


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    columns = slice(rank * WIDTH, (rank + 1) * WIDTH)
    inputs = [logits[:, columns] for logits in split_inputs()]
    results = [split_case(*case, *inputs, first_column=columns.start, reduce=OverRanks()) for case in SPLIT_CASES]
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes computed for every case, from its half of the columns."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", range(len(SPLIT_CASES)), ids=[f"beta {b}, vocab {v}" for b, v in SPLIT_CASES])
def test_a_vocabulary_split_over_two_ranks_gives_the_losses_and_gradients_of_the_whole(ranks, case):
    loss, gradient, top_k_loss, top_k_gradient = split_case(*SPLIT_CASES[case], *split_inputs())
    assert gradient.abs().max() > 1e-2 and top_k_gradient.abs().max() > 1e-2
    for rank, results in enumerate(ranks):
        columns = slice(rank * WIDTH, (rank + 1) * WIDTH)
        expected = (loss, gradient[:, columns], top_k_loss, top_k_gradient[:, columns])
        assert_same(results[case], expected)
