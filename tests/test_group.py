"""What a group of ranks says when one of them is late or gone."""

import os
import re
import time

import pytest
import ray

import actors.group
from actors.group import RankFailure, RankGroup


class Slow:
    """A rank whose every call takes as long as it is told."""

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds

    def node_address(self) -> str:
        time.sleep(self.seconds)
        return "127.0.0.1:1"

    def setup(self, master: str) -> None:
        time.sleep(self.seconds)

    def end(self, rank: int, dies: int) -> None:
        if rank == dies:
            os._exit(1)
        time.sleep(600)  # as in a collective that waits for the dead one

    @ray.method(concurrency_group="report")
    def report(self) -> str:
        return f"asleep for {self.seconds:g} s"


def ranks(*seconds: float, timeout: float = 5.0) -> RankGroup:
    kind = ray.remote(concurrency_groups={"report": 1})(Slow).options(num_cpus=0)
    actors = [kind.remote(each) for each in seconds]
    ray.get([actor.report.remote() for actor in actors], timeout=120)  # their start is not what is timed
    return RankGroup("reference", actors, timeout=timeout)


def test_a_rank_that_does_not_say_where_to_meet_is_named(local_ray):
    with pytest.raises(RankFailure, match=r"reference ranks \[0\] did not finish `node_address` within 5 s") as caught:
        ranks(600.0, 0.0).setup()
    assert "reference rank 0: asleep for 600 s" in str(caught.value)


def test_a_rank_that_does_not_come_up_is_named(local_ray):
    with pytest.raises(RankFailure, match=r"reference ranks \[1\] did not finish `setup` within 5 s"):
        ranks(0.0, 600.0).setup()


def test_a_rank_that_dies_is_named_while_the_others_wait_for_it(local_ray):
    group, start = ranks(0.0, 0.0, timeout=300.0), time.monotonic()
    with pytest.raises(RankFailure, match=re.escape("reference rank 1 died during `end`")) as caught:
        group.scatter("end", [0, 1], 1)
    assert time.monotonic() - start < 60
    assert "reference rank 0: asleep for 0 s" in str(caught.value) and "rank 1: dead" in str(caught.value)


def test_a_long_wait_says_what_it_is_for_unless_it_always_takes_so_long(local_ray, monkeypatch, capsys):
    monkeypatch.setattr(actors.group, "FIRST_NEWS", 0.5)
    monkeypatch.setattr(actors.group.LongWait, "longest", {})
    group = ranks(0.0, 2.5)
    group.broadcast("setup", "")
    told = re.findall(r"reference: `setup` takes (\d) s so far:\n(.*)\n(.*)\n", capsys.readouterr().err)
    assert len(told) == 3  # after 0.5, 1 and 2 seconds
    assert told[0][1:] == ("  reference rank 0: asleep for 0 s", "  reference rank 1: asleep for 2.5 s")
    group.broadcast("setup", "")
    assert "so far" not in capsys.readouterr().err
