"""The losses of mixture-of-experts routers, whose gradients Megatron adds inside the model.

A router's loss is a mean over the tokens of a micro batch. Megatron multiplies it by their number and divides all gradients by
the tokens of the global batch in the end. That division is left out here (see forward_backward.py), so the coefficients are
divided instead, for the length of a step: what is added to the loss is the mean over micro batches and data ranks, each
weighted by its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from actors.megatron.micro_batch import PackedMicroBatch

if TYPE_CHECKING:
    import torch

COEFFICIENTS = ("moe_aux_loss_coeff", "moe_z_loss_coeff")


@contextmanager
def router_losses_averaged(config: Any, micro_batches: list[PackedMicroBatch]) -> Iterator[None]:
    """For the length of a block, router losses count as means over the tokens of all data ranks; a collective of them."""
    given = {name: value for name in COEFFICIENTS if (value := _coefficient(config, name))}
    if not given:
        yield
        return
    tokens = _tokens_of_routers(config, micro_batches)
    try:
        for name, value in given.items():
            setattr(config, name, value / tokens)
        yield
    finally:
        for name, value in given.items():
            setattr(config, name, value)


def read_router_losses(config: Any, num_micro_batches: int, device: torch.device) -> dict[str, float]:
    """Mean of each router loss, without its coefficient, over layers, micro batches and data ranks; a collective of all ranks.

    `load_balancing_loss` is E * sum over experts of f * P: 1 when all E experts get equally many tokens (Switch Transformer,
    https://arxiv.org/abs/2101.03961, equation 4); `z_loss` is the mean of logsumexp(router logits)^2 (ST-MoE,
    https://arxiv.org/abs/2202.08906, equation 5).
    """
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, get_moe_layer_wise_logging_tracker

    names = _recorded_names(config)
    if not names:
        return {}
    recorded = get_moe_layer_wise_logging_tracker()
    none = torch.zeros((), device=device)  # of a pipeline stage without such layers
    sums = torch.stack([recorded[name]["values"].sum() if name in recorded else none for name in names]).double()
    dist.all_reduce(sums)
    clear_aux_losses_tracker()
    means = sums / (_expert_layers(config) * num_micro_batches * parallel_state.get_data_parallel_world_size())
    result = dict(zip(names, means.tolist()))
    if "z_loss" in result:  # each tensor rank has the mean of its own tokens, of the others its part of a sum
        result["z_loss"] /= config.tensor_model_parallel_size
    return result


def _coefficient(config: Any, name: str) -> float:
    return (getattr(config, name) or 0.0) if config.num_moe_experts else 0.0


def _recorded_names(config: Any) -> list[str]:
    names = []
    if _coefficient(config, "moe_aux_loss_coeff"):
        kinds = {"aux_loss": "load_balancing_loss", "seq_aux_loss": "seq_load_balancing_loss"}
        names += [name for kind, name in kinds.items() if kind == config.moe_router_load_balancing_type]
    if _coefficient(config, "moe_z_loss_coeff"):
        names.append("z_loss")
    return names


def _expert_layers(config: Any) -> int:
    pattern = config.moe_layer_freq  # a layer: whether it has experts; or every how many of them has
    return sum(pattern) if isinstance(pattern, list) else -(-config.num_layers // pattern)


def _tokens_of_routers(config: Any, micro_batches: list[PackedMicroBatch]) -> float:
    """Tokens that a router of one tensor rank sees in a step, summed over micro batches and data ranks."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    first = micro_batches[0].batch.token_ids
    tokens = torch.tensor(sum(len(one.batch.token_ids) for one in micro_batches), dtype=torch.float64, device=first.device)
    dist.all_reduce(tokens, group=parallel_state.get_data_parallel_group())
    return tokens.item() / (config.tensor_model_parallel_size if config.sequence_parallel else 1)
