"""Preference losses against TRL's and ms-swift's own code, run without a model; values and gradients."""

import subprocess
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from rlhf.preference_losses import (
    DPO_LOSS_TYPES,
    F_DIVERGENCE_TYPES,
    WHOLE_BATCH_LOSS_TYPES,
    RunningMean,
    chosen_nll,
    dpo_losses,
    dpo_rewards,
    kto_losses,
    ld_dpo_weights,
    reward_metrics,
    reward_pair_losses,
)

PAIRS, LENGTH, VOCAB, BETA = 4, 9, 13, 0.3
PROMPT = 2
RESPONSES = torch.tensor([3, 7, 5, 1, 6, 2, 5, 4])  # tokens of the four chosen, then of the four rejected responses
CLOSE = dict(rel=1e-6, abs=1e-6)


def normal(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


# [2P, S], prompt, response, padding; float64, so that what differs is the formula and not the rounding
IDS = torch.randint(VOCAB, (2 * PAIRS, LENGTH), generator=torch.Generator().manual_seed(7))
MASK = (torch.arange(LENGTH) >= PROMPT) & (torch.arange(LENGTH) < PROMPT + RESPONSES[:, None])
REF_LOGITS = normal(2 * PAIRS, LENGTH, VOCAB, seed=1, scale=2.0)
LENGTHS = dict(chosen_lengths=RESPONSES[:PAIRS], rejected_lengths=RESPONSES[PAIRS:])
MEAN_CHOSEN_LENGTH = RESPONSES[:PAIRS].sum().item() / PAIRS


def policy_logits(scale: float = 1.0) -> torch.Tensor:
    return (REF_LOGITS + normal(2 * PAIRS, LENGTH, VOCAB, seed=2, scale=scale)).requires_grad_()


def token_logprobs(logits: torch.Tensor) -> torch.Tensor:
    """Logprobs of the response tokens, 0 elsewhere: [2P, S, V] -> [2P, S - 1]."""
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None]).squeeze(-1)
    return logprobs * MASK[:, 1:]


def summed(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed logprobs, [P] each: chosen, rejected, and those of the reference."""
    reference = REF_LOGITS.to(logits.dtype)
    return *token_logprobs(logits).sum(-1).chunk(2), *token_logprobs(reference).sum(-1).chunk(2)


class Given(torch.nn.Module):
    """A model whose logits are given."""

    is_gradient_checkpointing = False

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, **_) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)


ALONE = SimpleNamespace(device="cpu", use_distributed=False, gather=lambda value: value, gather_for_metrics=lambda value: value)


def trl_dpo(logits: torch.Tensor, *loss_types: str, **options) -> tuple[torch.Tensor, dict]:
    """Loss and metrics of TRL's DPOTrainer for these logits of the policy."""
    from trl.trainer.dpo_trainer import DPOTrainer

    settings = dict(
        beta=BETA, label_smoothing=0.0, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5, ld_alpha=None,
        loss_weights=[1.0],
    ) | options  # fmt: skip
    args = SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=settings.pop("discopop_tau", 0.05))
    trainer = SimpleNamespace(
        model=Given(logits), ref_model=Given(REF_LOGITS.to(logits.dtype)), accelerator=ALONE, loss_types=loss_types,
        use_weighting=False, precompute_ref_logps=False, _truncate_inputs=lambda *inputs: inputs, _total_train_tokens=0,
        _metrics={"train": defaultdict(list)}, args=args, **settings,
    )  # fmt: skip
    inputs = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS), completion_mask=MASK.long())
    loss = DPOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def ms_swift_dpo(sums: tuple[torch.Tensor, ...], loss_type: str, **options) -> torch.Tensor:
    """Losses of ms-swift's DPOTrainer for these summed logprobs, [P]."""
    from swift.rlhf_trainers import DPOTrainer

    settings = dict(
        beta=BETA, label_smoothing=0.0, f_divergence_type="reverse_kl", reference_free=False,
        f_divergence_params={"alpha_divergence_coef": 0.5},
    ) | options  # fmt: skip
    trainer = SimpleNamespace(accelerator=ALONE, args=SimpleNamespace(discopop_tau=0.05), **settings)
    return DPOTrainer.dpo_loss(trainer, *sums, loss_type, None)[0]


def our_dpo(logits: torch.Tensor, loss_type: str, **options) -> torch.Tensor:
    lengths = dict(**LENGTHS, mean_chosen_length=MEAN_CHOSEN_LENGTH)
    return dpo_losses(*summed(logits), loss_type=loss_type, beta=BETA, **lengths, **options)


def assert_same_loss_and_gradient(ours: torch.Tensor, theirs: torch.Tensor, *inputs: torch.Tensor) -> None:
    assert ours.item() == pytest.approx(theirs.item(), **CLOSE)
    for our, their in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs)):
        assert their.abs().max() > 1e-4  # there is a gradient to compare
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", DPO_LOSS_TYPES)
def test_mean_loss_and_gradient_equal_those_of_trl(loss_type):
    smoothing = {"exo_pair": 0.2, "robust": 0.2, "aot": 0.2, "aot_unpaired": 0.2}.get(loss_type, 0.0)
    logits = policy_logits()
    theirs, _ = trl_dpo(logits, loss_type, label_smoothing=smoothing)
    ours = our_dpo(logits, loss_type, label_smoothing=smoothing)
    assert ours.shape == (PAIRS,)
    assert_same_loss_and_gradient(ours.mean(), theirs, logits)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "nca_pair", "sppo_hard", "bco_pair", "apo_zero", "apo_down", "aot"])
@pytest.mark.parametrize("divergence", F_DIVERGENCE_TYPES)
def test_f_divergences_equal_those_of_trl(loss_type, divergence):
    logits = policy_logits(scale=0.2)  # forward_kl is steep
    if divergence == "alpha_divergence":
        logits = logits.detach().float().requires_grad_()  # TRL has no float64 here
    options = dict(f_divergence_type=divergence, f_alpha_divergence_coef=0.3)
    theirs, _ = trl_dpo(logits, loss_type, **options)
    ours = our_dpo(logits, loss_type, **options)
    assert_same_loss_and_gradient(ours.mean(), theirs, logits)


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        ("discopop", {"discopop_tau": 0.02}),
        ("discopop", {"discopop_tau": 0.5}),
        ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.2}),
        ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.5}),
        ("apo_down", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}),
    ],
)
def test_coefficients_mean_what_they_mean_in_trl(loss_type, options):
    logits = policy_logits(scale=0.2).detach()
    if "f_divergence_type" in options:  # TRL has no float64 for these; discopop's temperature enlarges float32's rounding
        logits = logits.float()
    logits.requires_grad_()
    theirs, _ = trl_dpo(logits, loss_type, **options)
    at_default, _ = trl_dpo(logits, loss_type, **options | {"f_alpha_divergence_coef": 0.5, "discopop_tau": 0.05})
    assert abs(theirs.item() - at_default.item()) > 1e-4
    assert_same_loss_and_gradient(our_dpo(logits, loss_type, **options).mean(), theirs, logits)


@pytest.mark.parametrize("loss_type", [name for name in DPO_LOSS_TYPES if name not in ("sft", "ipo", "bco_pair")])
def test_losses_of_each_pair_equal_those_of_ms_swift(loss_type):
    sums = summed(policy_logits())
    smoothing = 0.0 if loss_type == "exo_pair" else 0.1  # exo_pair takes 1e-3 for 0
    theirs = ms_swift_dpo(sums, loss_type, label_smoothing=smoothing)
    ours = dpo_losses(*sums, loss_type=loss_type, beta=BETA, label_smoothing=smoothing, **LENGTHS)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("divergence", ["js_divergence", "alpha_divergence"])
def test_f_divergences_equal_those_of_ms_swift_at_its_default_coefficient(divergence):
    sums = summed(policy_logits())
    ours = dpo_losses(*sums, loss_type="sigmoid", beta=BETA, f_divergence_type=divergence, **LENGTHS)
    torch.testing.assert_close(ours, ms_swift_dpo(sums, "sigmoid", f_divergence_type=divergence))


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "robust"])
def test_reference_free_takes_uniform_reference_logprobs(loss_type):
    sums = summed(policy_logits())
    ours = dpo_losses(*sums, loss_type=loss_type, beta=BETA, reference_free=True, **LENGTHS)
    torch.testing.assert_close(ours, ms_swift_dpo(sums, loss_type, reference_free=True))


def test_bco_delta_over_steps_equals_that_of_ms_swift():
    from trl.experimental.bco.bco_trainer import RunningMoments

    moments, running = RunningMoments(ALONE), RunningMean()
    for step in range(3):
        sums = tuple(normal(PAIRS, seed=10 * step + i, scale=3.0) - 20 for i in range(4))
        rewards = torch.cat(dpo_rewards(*sums, beta=BETA))
        running = running.updated(rewards.mean().item())
        ours = dpo_losses(*sums, loss_type="bco_pair", beta=BETA, delta=running.mean, **LENGTHS)
        torch.testing.assert_close(ours, ms_swift_dpo(sums, "bco_pair", running=moments), rtol=1e-6, atol=1e-6)
        assert running.mean == pytest.approx(moments.mean, abs=1e-6)
    assert running.count == 3 and abs(running.mean) > 0.05


@pytest.mark.parametrize("loss_type", [name for name in DPO_LOSS_TYPES if name not in WHOLE_BATCH_LOSS_TYPES])
def test_losses_and_gradients_of_the_halves_of_a_batch_are_those_of_the_batch(loss_type):
    whole_sums = summed(policy_logits())
    options = dict(loss_type=loss_type, beta=BETA, delta=0.1, mean_chosen_length=MEAN_CHOSEN_LENGTH)
    whole = dpo_losses(*whole_sums, **LENGTHS, **options)
    halves = []
    for half in (slice(0, 2), slice(2, 4)):
        lengths = {name: value[half] for name, value in LENGTHS.items()}
        halves.append(dpo_losses(*(value[half] for value in whole_sums), **lengths, **options))
    torch.testing.assert_close(torch.cat(halves), whole, rtol=0, atol=1e-7)
    split = torch.autograd.grad(sum(half.sum() for half in halves) / PAIRS, whole_sums[0], retain_graph=True)
    torch.testing.assert_close(split, torch.autograd.grad(whole.mean(), whole_sums[0]), rtol=0, atol=1e-7)


def test_rpo_is_the_loss_plus_the_token_mean_cross_entropy_of_the_chosen_responses():
    logits = policy_logits()
    chosen = MASK[:PAIRS, 1:]
    tokens = cross_entropy(logits[:PAIRS, :-1][chosen], IDS[:PAIRS, 1:][chosen])
    sums = summed(logits)
    nll = chosen_nll(sums[0], mean_chosen_length=MEAN_CHOSEN_LENGTH)
    assert nll.mean().item() == pytest.approx(tokens.item(), **CLOSE)
    ours = dpo_losses(*sums, loss_type="sigmoid", beta=BETA, **LENGTHS) + 0.7 * nll
    theirs, _ = trl_dpo(logits, "sigmoid", "sft", loss_weights=[1.0, 0.7])
    assert_same_loss_and_gradient(ours.mean(), theirs, logits)


def test_rewards_and_their_metrics_equal_those_of_trl():
    logits = policy_logits()
    _, theirs = trl_dpo(logits, "sigmoid")
    rewards = dpo_rewards(*summed(logits), beta=BETA)
    assert not any(reward.requires_grad for reward in rewards)
    for name, values in reward_metrics(*rewards).items():
        assert values.mean().item() == pytest.approx(theirs[name], **CLOSE)
    assert 0 < theirs["rewards/accuracies"] < 1


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
def test_length_desensitized_sums_give_the_loss_of_trl(ld_alpha):
    logits = policy_logits()
    theirs, _ = trl_dpo(logits, "sigmoid", ld_alpha=ld_alpha)
    sequence_ids = torch.arange(2 * PAIRS).repeat_interleave(LENGTH - 1)
    shared = torch.minimum(*RESPONSES.chunk(2)).repeat(2)
    weights = ld_dpo_weights(MASK[:, 1:].flatten().float(), sequence_ids, shared, ld_alpha=ld_alpha).view(2 * PAIRS, -1)
    sums = [(token_logprobs(x) * weights).sum(1) for x in (logits, REF_LOGITS)]
    ours = dpo_losses(*sums[0].chunk(2), *sums[1].chunk(2), loss_type="sigmoid", beta=BETA, **LENGTHS)
    assert_same_loss_and_gradient(ours.mean(), theirs, logits)


def test_length_desensitized_weights_written_out():
    mask = torch.tensor([0.0, 1, 1, 1, 0, 1, 0, 0])  # two responses of three and one token, then padding
    weights = ld_dpo_weights(mask, torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]), torch.tensor([1, 1, 0]), ld_alpha=0.25)
    assert weights.tolist() == [0, 1, 0.25, 0.25, 0, 1, 0, 0]


def test_what_cannot_be_computed_is_refused_by_name():
    sums = tuple(torch.zeros(PAIRS) for _ in range(4))
    with pytest.raises(ValueError, match="loss_type 'ipoo': choose sigmoid, hinge, ipo"):
        dpo_losses(*sums, loss_type="ipoo", beta=BETA, **LENGTHS)
    with pytest.raises(ValueError, match=r"label_smoothing is 0.5; choose one in \[0, 0.5\)"):
        dpo_losses(*sums, loss_type="robust", beta=BETA, label_smoothing=0.5, **LENGTHS)
    with pytest.raises(ValueError, match="f_divergence_type 'kl': choose reverse_kl, forward_kl"):
        dpo_losses(*sums, loss_type="sigmoid", beta=BETA, f_divergence_type="kl", **LENGTHS)
    with pytest.raises(ValueError, match="loss_type 'bco': choose kto or apo_zero_unpaired"):
        kto_losses(sums[0], torch.ones(PAIRS, dtype=torch.bool), 0.0, loss_type="bco", beta=BETA)


KTO_POLICY, KTO_REF, KTO_DESIRABLE = normal(6, seed=3, scale=3.0), normal(6, seed=4), torch.tensor([1, 0, 0, 1, 1, 0]) == 1


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("shift", [2.0, -5.0], ids=["positive kl", "kl clamped to 0"])
def test_kto_losses_equal_those_of_trl(loss_type, shift):
    from trl.experimental.kto import KTOTrainer

    policy = KTO_POLICY.clone().requires_grad_()
    mismatched, mismatched_ref = normal(6, seed=5) + shift, normal(6, seed=6)
    settings = dict(beta=BETA, loss_type=loss_type, desirable_weight=1.3, undesirable_weight=0.8)
    trainer = SimpleNamespace(accelerator=ALONE, calculate_KL=loss_type == "kto", **settings)
    wanted, unwanted = KTO_DESIRABLE, ~KTO_DESIRABLE
    theirs, *_, their_kl = KTOTrainer.kto_loss(
        trainer, policy[wanted], policy[unwanted], mismatched, KTO_REF[wanted], KTO_REF[unwanted], mismatched_ref
    )
    kl = (mismatched - mismatched_ref).mean().clamp(min=0)
    if loss_type == "kto":
        assert kl.item() == pytest.approx(their_kl.item()) and (kl > 0) == (shift > 0)
    ours = kto_losses(policy - KTO_REF, wanted, kl, **settings)
    torch.testing.assert_close(torch.cat([ours[wanted], ours[unwanted]]), theirs, rtol=1e-6, atol=1e-6)
    assert_same_loss_and_gradient(ours.mean(), theirs.mean(), policy)


def test_kto_losses_of_parts_of_a_batch_are_those_of_the_batch():
    options = dict(loss_type="kto", beta=BETA, desirable_weight=1.3)
    whole = kto_losses(KTO_POLICY, KTO_DESIRABLE, 0.4, **options)
    parts = [kto_losses(KTO_POLICY[part], KTO_DESIRABLE[part], 0.4, **options) for part in ([0, 3], [1, 2, 4, 5])]
    assert torch.cat(parts).sum().item() == pytest.approx(whole.sum().item(), abs=1e-6)


@pytest.mark.parametrize("margins", [None, torch.tensor([0.5, 0.0, 1.0, 2.0]).double()], ids=["no margins", "margins"])
@pytest.mark.parametrize("coefficient", [None, 0.01])
def test_reward_pair_losses_equal_those_of_trl(margins, coefficient):
    from trl.trainer.reward_trainer import RewardTrainer

    scores = normal(2 * PAIRS, 1, seed=8).requires_grad_()
    trainer = SimpleNamespace(
        model=Given(scores), accelerator=ALONE, args=SimpleNamespace(center_rewards_coefficient=coefficient),
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0,
    )  # fmt: skip
    inputs = dict(attention_mask=torch.ones(2 * PAIRS, 3)) | ({} if margins is None else dict(margin=margins))
    theirs = RewardTrainer.compute_loss(trainer, trainer.model, inputs)
    ours = reward_pair_losses(*scores.squeeze(-1).chunk(2), margins, center_rewards_coefficient=coefficient)
    assert ours.shape == (PAIRS,)
    assert_same_loss_and_gradient(ours.mean(), theirs, scores)


def test_loss_modules_are_imported_without_torch():
    code = "import sys, rlhf.preference_losses, rlhf.distillation_losses, rlhf.sequence_losses; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
