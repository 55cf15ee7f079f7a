"""Weights broadcast over NCCL from one device to another: as tests/test_broadcast.py, with one receiver."""

from __future__ import annotations

import pytest
import ray
from test_broadcast import FAILURES, Sender, push, receivers


@pytest.fixture(scope="module")
def sender(gpu_ray):
    """One process for all tests: it outlives every failure."""
    sender = ray.remote(Sender).options(num_cpus=0, num_gpus=1).remote("nccl", timeout=30.0)
    yield sender
    ray.kill(sender)


def test_buckets_that_no_buffer_holds_do_not_wait_for_each_other(sender) -> None:
    """40 MB at a time, in the first push: what the sender launches first while a broadcast is under way must not wait for it."""
    push(sender, receivers("", gpus=0.1), 1, scale=10_000)


def test_a_group_is_kept_while_its_engine_is_the_same(sender) -> None:
    engines = receivers("", gpus=0.1)
    first = push(sender, engines, 1)
    assert len(first[0]) == 1
    assert push(sender, engines, 2) == first
    push(sender, receivers("", gpus=0.1), 3)


def test_buckets_keep_their_order_when_calls_start_in_another(sender) -> None:
    push(sender, receivers("out of order", gpus=0.1), 1)


@pytest.mark.parametrize("fault", FAILURES)
def test_an_engine_that_fails_is_named_and_the_next_push_forms_another_group(sender, fault) -> None:
    engines = {1: receivers(fault, gpus=0.1)[0]}
    with pytest.raises(RuntimeError, match=FAILURES[fault]):
        ray.get(sender.push.remote(engines, 1))
    if "dies" in fault:
        engines = {1: receivers("", gpus=0.1)[0]}
    push(sender, engines, 1)
