"""The controller's batches: positions, fetching ahead, deadlines. Over real Ray actors."""

from __future__ import annotations

import json
import os
import time

import pytest
import ray

from rlhf.config import Config
from rlhf.data import DataFailure, PromptStream, RowStream
from tests.tiny import make_tokenizer

pytestmark = pytest.mark.usefixtures("local_ray")


@ray.remote(concurrency_groups={"report": 1})
class Counter:
    """Answers with the positions it was asked for."""

    def __init__(self, delay: float = 0.0):
        self.delay, self.calls = delay, []

    def prompts(self, start: int, count: int) -> list[int]:
        self.calls.append((start, count))
        time.sleep(self.delay)
        if start < 0:
            os._exit(1)
        return list(range(start, start + count))

    def seen(self) -> list[tuple[int, int]]:
        return self.calls

    @ray.method(concurrency_group="report")
    def report(self) -> str:
        return "counting slowly"


def test_batches_follow_each_other_and_the_next_is_fetched_ahead():
    worker = Counter.remote()
    stream = PromptStream(worker, num_rows=10, timeout=30)
    assert stream.next_batch(3) == [0, 1, 2]
    assert ray.get(worker.seen.remote()) == [(0, 3), (3, 3)]
    assert stream.next_batch(3) == [3, 4, 5]
    assert stream.next_batch(2) == [6, 7]  # another count: what was fetched ahead is not used
    assert stream.position == 8 and stream.epoch == 0.8
    stream.position = 100
    assert stream.next_batch(2) == [100, 101]
    on_demand = Counter.remote()
    PromptStream(on_demand, num_rows=10, timeout=30, ahead=False).next_batch(3)
    assert ray.get(on_demand.seen.remote()) == [(0, 3)]


def test_a_late_answer_is_an_error_that_says_what_the_worker_does():
    stream = PromptStream(Counter.remote(delay=60), num_rows=10, timeout=1, position=7)
    start = time.monotonic()
    with pytest.raises(DataFailure, match="`prompts` at position 7 within 1 s; it reports: counting slowly"):
        stream.next_batch(3)
    assert time.monotonic() - start < 15
    assert stream.position == 7


def test_a_dead_worker_is_an_error_that_names_the_call():
    stream = PromptStream(Counter.remote(), num_rows=10, timeout=30, position=-1)
    with pytest.raises(DataFailure, match="died during `prompts` at position -1"):
        stream.next_batch(3)


@pytest.mark.slow
def test_a_real_worker_keeps_tokens_in_the_object_store_and_resumes(tmp_path):
    from actors.data import DataWorker

    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}))
    messages = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": str(i)}] for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in messages))
    config = Config(
        task="sft", model=str(tmp_path), dataset=[str(tmp_path / "rows.jsonl")], template_backend="jinja", max_length=64
    )
    worker = ray.remote(concurrency_groups={"report": 1})(DataWorker).remote(config)
    done = worker.setup.remote()
    assert isinstance(ray.get(worker.report.remote(), timeout=60), str)  # answers while setup runs
    info = ray.get(done, timeout=120)
    stream = RowStream(worker, num_rows=info.num_rows, timeout=30)
    batches = [stream.next_batch(8) for _ in range(5)]
    for batch in batches:
        tokens = ray.get(batch.tokens)
        assert [len(ids) for ids in tokens.token_ids] == batch.summary.lengths
        assert [int((mask > 0).sum()) for mask in tokens.loss_masks] == batch.summary.trained
        assert batch.summary.units == [[[item]] for item in range(8)]
    again = RowStream(worker, num_rows=info.num_rows, timeout=30, position=32).next_batch(8)
    same = zip(ray.get(again.tokens).token_ids, ray.get(batches[4].tokens).token_ids, strict=True)
    assert all(a.tolist() == b.tolist() for a, b in same)
