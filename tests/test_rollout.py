"""Real vLLM engines behind real Ray actors: what they sample, what they refuse, how they are replaced.

The expected numbers come from Hugging Face's model in float32 on the same tokens.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from kill_engine import engine_pid, kill_while_generating
from ray.exceptions import ActorDiedError
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model

import rlhf.generation
from actors.group import ActorGroup, RankFailure
from actors.rollout import ENVIRONMENT, RolloutEngine
from actors.weights.ledger import PushError
from rlhf.config import Config, RolloutRole
from rlhf.error_origin import is_ours_in_actor
from rlhf.records import Batch, Group, GroupTokens, Prompt
from rlhf.rollout import RolloutEngines

ROOT = Path(__file__).resolve().parent.parent
EOS = 2  # token id of tests/tiny.py's tokenizer
TOLERANCE = 1e-4  # of a logprob, nats


class Sender:
    """Pushes a safetensors file through the real sending code; `tamper` names what is wrong with the push."""

    def __init__(self, folder: Path, group: bool = False):
        """`group`: the bytes go over a process group instead of the object store."""
        from actors.weights.broadcast import Broadcast
        from actors.weights.transport import ObjectStore

        self.folder, self.tamper, self.timeout = folder, "", 60.0
        self.transport = Broadcast("gloo") if group else ObjectStore()
        send, self.transport.send = self.transport.send, lambda data: send(self.damaged(data))

    def damaged(self, data):
        import torch

        words = data.clone().view(torch.int32)
        if self.tamper == "flipped bit":
            words[1000] ^= 1 << 20
        if self.tamper == "swapped words":
            words[[1000, 1001]] = words[[1001, 1000]]
        return words.view(torch.uint8)

    def push(self, folder: Path, tamper: str = "", timeout: float = 60.0) -> None:
        self.folder, self.tamper, self.timeout = folder, tamper, timeout

    def push_weights(self, engines: dict, version: int):
        from actors.weights.push import push_weights

        weights, tamper = load_file(self.folder / "model.safetensors"), self.tamper
        if tamper == "engine killed":
            self.tamper = ""
            ray.kill(engines[0])
        if tamper == "missing":
            del weights["model.norm.weight"]
        if tamper == "unknown":
            weights["model.norm.wait"] = weights["model.norm.weight"]
        if tamper == "nan":
            weights["model.norm.weight"][3] = float("nan")
        version -= {"repeated": 1, "stale": 2}.get(tamper, 0)
        # 100,000 bytes: several buckets, tensors larger than one, fused layers spread over two
        return push_weights(
            weights.items(), engines, version, bucket_bytes=100_000, timeout=self.timeout, transport=self.transport
        )

    def group(self) -> str:
        return self.transport.name

    def leave_device(self, weights: bool) -> None:
        """Asked of those who share the engines' devices."""

    def enter_device(self) -> None:
        """Likewise."""

    def report(self) -> str:
        return "ready"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_tiny_model(folder / name, seed=seed, head_dim=32) for seed, name in enumerate("ab")}


def settings(model: Path, **options) -> Config:
    defaults = dict(
        nproc_per_node=1,
        torch_dtype="float32",
        vllm_enforce_eager=True,
        vllm_max_model_len=512,
        max_completion_length=16,
        temperature=1.0,
        deterministic=True,
        call_timeout=500,
        push_timeout=60,
    )
    return Config(task="grpo", model=str(model), **(defaults | options))


def start_engines(config: Config, count: int, environment: Mapping[str, str] = ENVIRONMENT) -> RolloutEngines:
    def spawn(index: int):
        kind = ray.remote(max_concurrency=1000)(RolloutEngine)
        return kind.options(num_cpus=0, runtime_env={"env_vars": ENVIRONMENT | environment}).remote(config, index=index)

    return RolloutEngines(spawn, num_engines=count, config=config)


@pytest.fixture(scope="module")
def started(local_ray, models) -> RolloutEngines:
    """Two engines with their own random weights, never those of a or b until they are pushed."""
    return start_engines(settings(models["a"]), 2)


@pytest.fixture(scope="module")
def policy(local_ray, models) -> ActorGroup:
    sender = ray.remote(concurrency_groups={"report": 1})(Sender).options(num_cpus=0).remote(models["b"])
    return ActorGroup("policy", [sender], timeout=60)


@pytest.fixture(scope="module")
def broadcaster(local_ray, models) -> ActorGroup:
    kind = ray.remote(concurrency_groups={"report": 1})(Sender).options(num_cpus=0)
    return ActorGroup("policy", [kind.remote(models["b"], group=True)], timeout=60)


@pytest.fixture
def engines(started, policy, models) -> RolloutEngines:
    """The engines with the weights of b."""
    push(started, policy, models["b"])
    return started


def push(engines: RolloutEngines, policy: ActorGroup, folder: Path, tamper: str = ""):
    policy.broadcast("push", folder, tamper)
    return engines.push(policy)


def forget(engines: RolloutEngines) -> None:
    """Drop what a generation that failed left in the engines."""
    for engine in engines.engines:
        ray.get(engine.serve.remote(ray.get(engine.offer.remote())))


def one_of(engines: RolloutEngines, index: int) -> RolloutEngines:
    """The same engines as if there were only this one."""
    view = copy.copy(engines)
    view.engines = [engines.engines[index]]
    return view


def some_prompts(count: int, *, first: int = 0, length: int = 12) -> list[Prompt]:
    random = np.random.default_rng(first)
    return [
        Prompt(index=first + i, token_ids=random.integers(3, 500, length).astype(np.int32), messages=[], columns={})
        for i in range(count)
    ]


def hugging_face(folder: Path):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logprob_errors(model, tokens: GroupTokens, item: int, temperature: float = 1.0, excluded: Sequence[int] = ()) -> np.ndarray:
    """|rollout logprob - Hugging Face's| of a response's tokens, [R]; those of `excluded` were not to be sampled."""
    import torch

    ids, mask, logprobs = tokens.sequence(item)
    with torch.no_grad():
        logits = model(torch.tensor(ids[None]).long()).logits[0] / temperature
    logits[:, list(excluded)] = -torch.inf
    expected = logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(ids[1:, None]).long())[:, 0].numpy()
    return np.abs(expected - logprobs[1:])[mask[1:] > 0]


def logprob_error(model, groups: list[Group], temperature: float = 1.0) -> float:
    """Largest |rollout logprob - Hugging Face's| over all response tokens."""
    worst = 0.0
    for group in groups:
        tokens = ray.get(group.tokens)
        for item in range(len(group.texts)):
            errors = logprob_errors(model, tokens, item, temperature)
            assert len(errors) == group.response_lengths[item] > 0
            worst = max(worst, float(errors.max()))
    return worst


def by_prompt(groups) -> dict[int, tuple[list[list[int]], list[list[float]]]]:
    found = {}
    for group in groups:
        tokens = ray.get(group.tokens)
        logprobs = [row.tolist() for row in tokens.rollout_logprobs]
        found[group.prompt.index] = [row.tolist() for row in tokens.response_ids], logprobs
    return found


def test_an_engine_refuses_to_generate_before_the_first_push(started) -> None:
    started.setup()
    with pytest.raises(RuntimeError, match="asked for weight version 0 but has no complete push"):
        list(started.generate(some_prompts(1), n=1))


@pytest.fixture
def by_turns(engines, policy, monkeypatch) -> RolloutEngines:
    """The engines as if they shared their devices with the policy."""
    monkeypatch.setattr(engines, "neighbours", [policy])
    return engines


def test_engines_that_slept_get_the_weights_again_before_they_answer(by_turns, policy, models) -> None:
    push(by_turns, policy, models["a"])
    by_turns.make_room(policy)
    assert logprob_error(hugging_face(models["a"]), list(by_turns.generate(some_prompts(4), n=2))) <= TOLERANCE
    assert by_turns.take_seconds()["switch"] > 0


@pytest.mark.slow
def test_an_engine_that_died_asleep_is_replaced_by_the_next_push(by_turns, policy, models) -> None:
    before = by_turns.restarts
    by_turns.make_room(policy)
    ray.kill(by_turns.engines[0])
    push(by_turns, policy, models["a"])
    assert by_turns.restarts == before + 1
    assert logprob_error(hugging_face(models["a"]), list(by_turns.generate(some_prompts(8), n=2))) <= TOLERANCE


@pytest.mark.slow
def test_an_engine_that_dies_in_a_push_by_turns_is_replaced_with_the_others(by_turns, policy, models) -> None:
    before, engines = by_turns.restarts, list(by_turns.engines)
    by_turns.make_room(policy)
    push(by_turns, policy, models["a"], "engine killed")
    assert by_turns.restarts == before + 1
    assert not set(engines) & set(by_turns.engines)
    assert logprob_error(hugging_face(models["a"]), list(by_turns.generate(some_prompts(8), n=2))) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [True, False])
def test_an_engine_that_dies_generating_by_turns_costs_the_others_their_requests(
    by_turns, policy, models, monkeypatch, caplog, deterministic
) -> None:
    monkeypatch.setattr(logging.getLogger("ray"), "propagate", True)
    monkeypatch.setattr(by_turns, "config", replace(by_turns.config, deterministic=deterministic))
    by_turns.make_room(policy)
    push(by_turns, policy, models["a"])
    before, groups = by_turns.restarts, by_turns.generate(some_prompts(200), n=4, sampling={"max_completion_length": 128})
    first = next(groups)
    ray.kill(by_turns.engines[0])
    groups = [first, *groups]
    assert sorted(group.prompt.index for group in groups) == list(range(200))
    assert by_turns.restarts == before + 1
    assert "Unhandled error" not in caplog.text  # Ray's, of a lost request
    assert logprob_error(hugging_face(models["a"]), groups[:20] + groups[-20:]) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_an_engine_that_dies_in_its_setup_is_replaced_and_set_up_once(local_ray, policy, models, shared) -> None:
    class Counting(RolloutEngine):
        setups = 0

        async def setup(self) -> int:
            self.setups += 1
            return await super().setup()

        async def count(self) -> int:
            return self.setups

    spawned = []

    def spawn(index: int):
        kind = ray.remote(max_concurrency=1000)(Counting).options(num_cpus=0, runtime_env={"env_vars": ENVIRONMENT})
        spawned.append(kind.remote(settings(models["a"]), index=index))
        if len(spawned) == 1:
            ray.kill(spawned[0])
        return spawned[-1]

    engines = RolloutEngines(spawn, num_engines=1, config=settings(models["a"]), neighbours=[policy] if shared else [])
    engines.setup()
    assert len(spawned) == 2 and engines.restarts == 1
    assert ray.get(spawned[1].count.remote()) == 1
    ray.kill(spawned[1])


def test_deaths_in_the_setup_are_counted_and_their_successors_have_no_more_time(local_ray, models, capsys) -> None:
    """The first engines are killed as soon as they are there; a successor would be ready in some 10 seconds."""
    kind = ray.remote(max_concurrency=1000)(RolloutEngine).options(num_cpus=0, runtime_env={"env_vars": ENVIRONMENT})
    spawned = []

    def engines(deaths: int, call_timeout: float) -> RolloutEngines:
        config = settings(models["a"], call_timeout=call_timeout)
        spawned.clear()

        def spawn(index: int):
            spawned.append(kind.remote(config, index=index))
            if len(spawned) <= deaths:
                ray.kill(spawned[-1])
            return spawned[-1]

        return RolloutEngines(spawn, num_engines=1, config=config)

    with pytest.raises(RankFailure, match=r"^rollout engine 0 died during `setup`, death 4 in a row of an engine: "):
        engines(deaths=9, call_timeout=500).setup()
    assert len(spawned) == 4
    assert capsys.readouterr().out == "rollout engine 0 died while it was built: another one takes its place\n" * 3
    late, start = engines(deaths=1, call_timeout=3), time.monotonic()
    with pytest.raises(RankFailure, match="rollout engine 0 did not finish `setup` within 3 s"):
        late.setup()
    assert time.monotonic() - start < 3 + 5.5 and late.restarts == 1  # and the seconds of the last report
    ray.kill(spawned[-1])


def test_an_engine_whose_thread_fails_ends_instead_of_leaving_its_callers_waiting(local_ray, models) -> None:
    class Failing(RolloutEngine):
        async def fail(self) -> None:
            self.thread.post(lambda: 1 / 0)

    kind = ray.remote(max_concurrency=1000)(Failing).options(num_cpus=0, runtime_env={"env_vars": ENVIRONMENT})
    engine = kind.remote(settings(models["a"]), index=0)
    ray.get([engine.load_libraries.remote(), engine.setup.remote()])  # both import vLLM: not at the same time
    engine.fail.remote()
    with pytest.raises(ActorDiedError):
        ray.get(engine.peak_gib.remote(), timeout=30)


def test_a_request_that_comes_to_the_thread_after_a_drop_is_dropped_too(local_ray, models) -> None:
    class Overtaken(RolloutEngine):
        def _request(self, *arguments):
            self.thread.post(lambda: self._drop("the engine was put to sleep"))
            return super()._request(*arguments)

    kind = ray.remote(max_concurrency=1000)(Overtaken).options(num_cpus=0, runtime_env={"env_vars": ENVIRONMENT})
    engine = kind.remote(settings(models["a"]), index=0, load_weights=True)
    ray.get(engine.setup.remote())
    asked = engine.generate.options(num_returns=2).remote([0], [some_prompts(1)[0].token_ids], 1, 0, Batch(0, 2))[0]
    with pytest.raises(PushError, match="request dropped: the engine was put to sleep"):
        ray.get(asked, timeout=30)
    assert "no complete weights, 0 prompts pending" in ray.get(engine.report.remote())
    ray.kill(engine)


@pytest.fixture
def told(local_ray, models) -> tuple[RolloutEngines, list[str]]:
    """Engines 0 to 3, which do nothing, on two shared places, and what was asked of them, in order."""
    events: list[str] = []

    def call(name: str, index: int) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *_: (events.append(f"{name} {index}"), ray.put(None))[1])

    def spawn(index: int) -> SimpleNamespace:
        events.append(f"spawn {index}")
        calls = {name: call(name, index) for name in ("setup", "sleep")}
        return SimpleNamespace(**calls, load_libraries=SimpleNamespace(remote=lambda: None))

    class Told(RolloutEngines):
        def _get(self, ref, index, call, deadline=None):
            if call == "setup":
                events.append(f"ready {index}")
            return super()._get(ref, index, call, deadline)

        def _respawn(self, index):
            self._spawn(index)  # there is no process to kill

    config = settings(models["a"], rollout=RolloutRole(num_engines=4, engines_per_device=2))
    neighbour = SimpleNamespace(broadcast=lambda *_: None)
    return Told(spawn, num_engines=4, config=config, neighbours=[neighbour]), events


def test_engines_of_one_place_are_set_up_one_after_another(told) -> None:
    engines, events = told
    engines.setup()
    assert events[:4] == [f"spawn {index}" for index in range(4)]
    assert events[4:] == ["setup 0", "setup 1", "ready 0", "setup 2", "ready 1", "setup 3", "ready 2", "ready 3"]


def test_engines_sleep_before_one_that_died_is_built_again_beside_them(told) -> None:
    engines, events = told
    engines.setup()
    engines.asleep = False
    events.clear()
    engines.replace(2, "generate", ray.exceptions.RayActorError())
    assert events == [*(f"sleep {index}" for index in range(4)), "spawn 2", "setup 2", "ready 2"]
    assert engines.asleep and engines.restarts == 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_pushed_weights(engines, models, temperature) -> None:
    groups = list(engines.generate(some_prompts(8), n=4, sampling={"temperature": temperature}))
    assert sorted(group.prompt.index for group in groups) == list(range(8))
    assert {group.weight_version for group in groups} == {engines.version}
    assert logprob_error(hugging_face(models["b"]), groups, temperature) <= TOLERANCE
    assert logprob_error(hugging_face(models["a"]), groups, temperature) > 0.1  # the measure can tell them apart


def test_greedy_tokens_are_those_of_hugging_face(engines, models) -> None:
    import torch

    model, prompts = hugging_face(models["b"]), some_prompts(8)
    greedy = by_prompt(engines.generate(prompts, n=1, sampling={"temperature": 0, "max_completion_length": 24}))
    for prompt in prompts:
        ids = torch.tensor(prompt.token_ids[None]).long()
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert greedy[prompt.index][0] == [expected[0, len(prompt.token_ids) :].tolist()]


def test_more_prompts_than_a_step_takes_are_answered_under_seeds(engines, models) -> None:
    groups = list(engines.generate(some_prompts(100, length=100), n=1, sampling={"max_completion_length": 2}))
    assert len(groups) == 100
    assert logprob_error(hugging_face(models["b"]), groups[:10]) <= TOLERANCE


def test_a_response_ends_with_its_end_token_or_at_the_limit(engines, models) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models["b"])
    ends = {"stop": 0, "length": 0}
    for group in engines.generate(some_prompts(24), n=8, sampling={"max_completion_length": 32, "temperature": 1.5}):
        for response, reason, text in zip(ray.get(group.tokens).response_ids, group.finish_reasons, group.texts):
            ends[reason] += 1
            assert (reason == "stop") == (EOS in response)
            assert EOS not in response[:-1] and len(response) <= 32
            assert (len(response) == 32) or reason == "stop"
            assert text == tokenizer.decode(response, skip_special_tokens=True)
    assert min(ends.values()) > 0, ends


@pytest.mark.parametrize("word", ["s", "<|im_start|>"])
def test_a_stop_word_ends_a_response_with_the_token_that_completes_it(engines, models, word) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models["b"])
    texts = [tokenizer.decode([token], skip_special_tokens=word == "s") for token in range(512)]
    completing = [word in text for text in texts]
    broken = [word == "s" and "\ufffd" in text for text in texts]  # part of a character: shows when the next one comes
    prompts = some_prompts(16)
    for prompt in prompts:  # so must the prompt not end in a part of one
        prompt.token_ids[-1] = tokenizer.convert_tokens_to_ids("x")
    sampling = {"stop_words": [word], "max_completion_length": 32, "temperature": 2.0}
    groups = list(engines.generate(prompts, n=8, sampling=sampling))
    stopped = 0
    for group in groups:
        for response, reason in zip(ray.get(group.tokens).response_ids, group.finish_reasons):
            if any(broken[token] for token in response):
                continue
            assert not any(completing[token] or token == EOS for token in response[:-1])
            stopped += completing[response[-1]]
            assert reason == "stop" if completing[response[-1]] or response[-1] == EOS else len(response) == 32
    assert stopped > 0
    assert logprob_error(hugging_face(models["b"]), groups, 2.0) <= TOLERANCE


REFUSALS = {
    "flipped bit": "bucket 0 of version .* was damaged on the way: checksum",
    "swapped words": "bucket 0 of version .* was damaged on the way: checksum",
    "missing": "1 tensors missing: model.norm.weight",
    "unknown": "unknown tensor 'model.norm.wait'",
    "nan": "tensor 'model.norm.weight' is not finite",
    "repeated": "^a rollout engine holds version .* after the push of",
    "stale": "push of version .* refused: version .* has already been sent",
}


@pytest.mark.parametrize("tamper", REFUSALS)
def test_a_wrong_push_is_refused_and_only_a_complete_one_heals(engines, policy, models, tamper) -> None:
    restarts = engines.restarts
    with pytest.raises(RankFailure, match=REFUSALS[tamper]) as caught:
        push(engines, policy, models["a"], tamper)
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match=f"asked for weight version {engines.version}"):
        list(engines.generate(some_prompts(1), n=1))
    report = push(engines, policy, models["a"])
    assert report == engines.last_push and report.version == engines.version and report.num_tensors == 25
    assert engines.restarts == restarts
    assert logprob_error(hugging_face(models["a"]), list(engines.generate(some_prompts(4), n=2))) <= TOLERANCE


@pytest.mark.parametrize("tamper", ["flipped bit", "missing"])
def test_weights_go_over_a_group_that_lasts_until_a_push_fails(engines, broadcaster, models, tamper) -> None:
    report = push(engines, broadcaster, models["a"])
    assert report.num_tensors == 25 and report.num_buckets > 4
    assert logprob_error(hugging_face(models["a"]), list(engines.generate(some_prompts(8), n=2))) <= TOLERANCE
    before = broadcaster.broadcast("group")
    push(engines, broadcaster, models["b"])
    assert broadcaster.broadcast("group") == before
    assert logprob_error(hugging_face(models["b"]), list(engines.generate(some_prompts(8), n=2))) <= TOLERANCE
    with pytest.raises(RuntimeError, match=REFUSALS[tamper]):
        push(engines, broadcaster, models["a"], tamper)
    with pytest.raises(RuntimeError, match=f"asked for weight version {engines.version}"):
        list(engines.generate(some_prompts(1), n=1))
    push(engines, broadcaster, models["a"])
    assert broadcaster.broadcast("group") != before
    assert logprob_error(hugging_face(models["a"]), list(engines.generate(some_prompts(8), n=2))) <= TOLERANCE


def test_an_engine_that_does_not_answer_a_push_is_named_with_the_option(engines, policy, models) -> None:
    pid = engine_pid(engines, 1)
    policy.broadcast("push", models["a"], "", 3.0)
    asked = ask(one_of(engines, 1), some_prompts(2), Batch(-6, 2), max_completion_length=300)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(RankFailure) as caught:
            engines.push(policy)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert str(caught.value) == (
        f"the weights of version {engines.version} were not pushed: rollout engine 1 did not answer `begin_push` of version "
        f"{engines.version} in push_timeout (3 s)"
    )
    with suppress(PushError):  # dropped, when the push began before it was given up
        assert len(ray.get(asked, timeout=30)) == 2
    push(engines, policy, models["b"])
    assert logprob_error(hugging_face(models["b"]), list(engines.generate(some_prompts(4), n=2))) <= TOLERANCE


@pytest.mark.slow
def test_an_engine_that_takes_a_dead_ones_place_is_in_the_next_group(engines, broadcaster, models) -> None:
    push(engines, broadcaster, models["a"])
    before, restarts = broadcaster.broadcast("group"), engines.restarts
    ray.kill(engines.engines[1])
    push(engines, broadcaster, models["b"])
    assert engines.restarts == restarts + 1 and broadcaster.broadcast("group") != before
    for index in (0, 1):
        groups = list(one_of(engines, index).generate(some_prompts(8), n=2))
        assert logprob_error(hugging_face(models["b"]), groups) <= TOLERANCE


def test_what_the_prefix_cache_kept_of_old_weights_is_not_used(engines, policy, models) -> None:
    prompts = some_prompts(4, length=300)  # the cache on CPU keeps blocks of 128 tokens
    before = list(engines.generate(prompts, n=2))
    push(engines, policy, models["a"])
    after = list(engines.generate(prompts, n=2))
    assert logprob_error(hugging_face(models["b"]), before) <= TOLERANCE
    assert logprob_error(hugging_face(models["a"]), after) <= TOLERANCE


def test_the_same_requests_give_the_same_bits_whatever_the_engine_did_before(engines, policy, models) -> None:
    list(one_of(engines, 0).generate(some_prompts(7, first=50, length=150), n=3))
    push(engines, policy, models["b"])
    prompts = some_prompts(20)
    first = by_prompt(one_of(engines, 0).generate(prompts, n=4))
    second = by_prompt(one_of(engines, 1).generate(prompts, n=4))
    assert first == second
    responses = [response for rows, _ in first.values() for response in map(tuple, rows)]
    assert len(set(responses)) == len(responses)  # every response has a seed of its own


def ask(engines: RolloutEngines, prompts: list[Prompt], batch: Batch, *, max_completion_length: int = 4) -> ray.ObjectRef:
    """One call of the first engine; its prompts' summaries."""
    options = engines.engines[0].generate.options(num_returns=len(prompts) + 1)
    indices, ids = [prompt.index for prompt in prompts], [prompt.token_ids for prompt in prompts]
    return options.remote(indices, ids, 1, engines.version, batch, {"max_completion_length": max_completion_length})[0]


def test_a_call_that_overtakes_an_earlier_batch_starts_neither_that_one_nor_waits_for_it(engines) -> None:
    prompts = some_prompts(6)
    first = ask(engines, prompts[:2], Batch(-1, 4))
    assert len(ray.get(ask(engines, prompts[4:], Batch(-2, 2)), timeout=60)) == 2
    assert ray.wait([first], timeout=0.5)[0] == []
    second = ask(engines, prompts[2:4], Batch(-1, 4))
    assert [len(summaries) for summaries in ray.get([first, second], timeout=60)] == [2, 2]


def check_that_a_push_pauses(engines: RolloutEngines, policy: ActorGroup, old: Path, new: Path) -> None:
    """Over 16 responses and a stream of engine 0, which has the weights `old`: every token's logprob, before and after."""
    engine, version, limit = engines.engines[0], engines.version, {"max_completion_length": 300, "excluded_ids": [EOS]}
    prompts = some_prompts(8)
    summaries, *tokens = engine.generate.options(num_returns=9).remote(
        range(8), [prompt.token_ids for prompt in prompts], 2, version, Batch(-3, 8), limit
    )
    stream = engine.stream.options(num_returns="streaming").remote(prompts[0].token_ids, version, limit)
    pieces = [ray.get(next(stream)) for _ in range(20)]
    push(engines, policy, new)
    *more, last = [ray.get(ref) for ref in stream]
    assert "".join(pieces + more) == last.texts[0] and last.weight_version == version + 1
    by, paused = {folder: hugging_face(folder) for folder in (old, new)}, 0
    for summary, group in zip(ray.get(summaries, timeout=60), ray.get(tokens)):
        for item, length in enumerate(summary.response_lengths):
            by_new = logprob_errors(by[new], group, item, excluded=[EOS]) <= TOLERANCE
            switch = length - int(by_new[::-1].cumprod().sum())  # the first of the tokens that the new weights explain to the end
            assert (logprob_errors(by[old], group, item, excluded=[EOS])[:switch] <= TOLERANCE).all()
            paused += 0 < switch < length
            assert summary.weight_version == version + 1 or switch == length
    assert paused == 16
    assert logprob_error(by[new], list(engines.generate(prompts, n=2))) <= TOLERANCE


def test_a_push_pauses_responses_and_the_rest_of_them_is_by_the_new_weights(engines, policy, models) -> None:
    check_that_a_push_pauses(engines, policy, models["b"], models["a"])


def test_what_waits_for_the_rest_of_its_batch_starts_with_the_weights_of_then(engines, policy, models) -> None:
    waiting = ask(engines, some_prompts(2), Batch(-4, 4))
    assert ray.wait([waiting], timeout=0.5)[0] == []
    push(engines, policy, models["a"])
    rest = ask(engines, some_prompts(2, first=2), Batch(-4, 4))
    versions = {summary.weight_version for summaries in ray.get([waiting, rest], timeout=60) for summary in summaries}
    assert versions == {engines.version}


@pytest.mark.parametrize("tamper", ["missing", "nan"])  # seen by the engine, by the sender
def test_a_push_that_fails_drops_what_it_paused(engines, policy, models, tamper) -> None:
    engine, limit = engines.engines[0], {"max_completion_length": 300, "excluded_ids": [EOS]}
    prompts = some_prompts(4)
    running = engine.generate.options(num_returns=5).remote(
        range(4), [prompt.token_ids for prompt in prompts], 2, engines.version, Batch(-5, 4), limit
    )[0]
    stream = engine.stream.options(num_returns="streaming").remote(prompts[0].token_ids, engines.version, limit)
    ray.get(next(stream))
    with pytest.raises(RankFailure):
        push(engines, policy, models["a"], tamper)
    dropped = f"request dropped: the push of version {engines.version} failed"
    with pytest.raises(RuntimeError, match=dropped):
        ray.get(running, timeout=60)
    with pytest.raises(RuntimeError, match=dropped):
        _ = [ray.get(ref) for ref in stream]
    push(engines, policy, models["a"])
    assert logprob_error(hugging_face(models["a"]), list(engines.generate(prompts, n=2))) <= TOLERANCE


def test_prompts_go_to_the_engine_that_has_room(engines, models, monkeypatch) -> None:
    monkeypatch.setattr(engines, "config", replace(engines.config, deterministic=False, vllm_max_num_seqs=4))
    groups = list(engines.generate(some_prompts(40), n=4))  # room for 6 prompts an engine
    assert sorted(group.prompt.index for group in groups) == list(range(40))
    assert logprob_error(hugging_face(models["b"]), groups) <= TOLERANCE


def test_a_late_call_is_an_error_with_engine_call_and_last_report(engines, policy, models, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engines, "config", replace(engines.config, call_timeout=2))
        late = r"rollout engine [01] did not finish `generate\(prompts \d+ to \d+\)` within 2 s .*Last report: generating"
        with pytest.raises(RankFailure, match=late):
            list(engines.generate(some_prompts(200), n=8, sampling={"max_completion_length": 200}))
    forget(engines)
    push(engines, policy, models["b"])
    assert logprob_error(hugging_face(models["b"]), list(engines.generate(some_prompts(4), n=2))) <= TOLERANCE


def test_a_dead_policy_is_noticed_while_groups_come_out(engines, models, monkeypatch) -> None:
    kind = ray.remote(concurrency_groups={"report": 1})(Sender).options(num_cpus=0)
    dead = ActorGroup("policy", [kind.remote(models["b"])], timeout=60)
    push(engines, dead, models["b"])
    monkeypatch.setattr(rlhf.generation, "WATCH_SECONDS", 0.2)  # groups come more often
    monkeypatch.setattr(engines, "config", replace(engines.config, deterministic=False, vllm_max_num_seqs=4))
    ray.kill(dead.actors[0])
    with pytest.raises(RankFailure, match="^policy rank 0 died: "):
        list(engines.generate(some_prompts(600), n=4))
    forget(engines)


def test_a_killed_engine_is_replaced_and_the_result_is_the_same(engines, models) -> None:
    prompts, sampling = some_prompts(24), {"max_completion_length": 100}
    undisturbed = by_prompt(engines.generate(prompts, n=4, sampling=sampling))
    before = engines.restarts
    killer = kill_while_generating(engines, 0, after=0.05)
    groups = list(engines.generate(prompts, n=4, sampling=sampling))
    killer.join()
    assert engines.restarts == before + 1
    assert len(groups) == 24 and by_prompt(groups) == undisturbed
    assert logprob_error(hugging_face(models["b"]), groups[:4]) <= TOLERANCE


def test_an_engine_that_was_replaced_meanwhile_is_left_alone(engines, models) -> None:
    """As when it is found dead in the push to the successor of another one."""
    before = engines.restarts
    groups = engines.generate(some_prompts(24), n=4, sampling={"max_completion_length": 100})
    first = next(groups)
    ray.kill(engines.engines[1])
    engines.replace(1, "push", ActorDiedError())
    successor = engines.engines[1]
    assert len([first, *groups]) == 24
    assert engines.restarts == before + 1 and engines.engines[1] is successor


@pytest.mark.slow
def test_engines_killed_while_pulling_and_before_a_push_are_replaced(engines, policy, models, monkeypatch) -> None:
    monkeypatch.setattr(engines, "config", replace(engines.config, deterministic=False, vllm_max_num_seqs=16))
    before = engines.restarts
    killer = kill_while_generating(engines, 1, after=0.2)
    groups = list(engines.generate(some_prompts(64), n=4, sampling={"max_completion_length": 100}))
    killer.join()
    assert sorted(group.prompt.index for group in groups) == list(range(64))
    assert engines.restarts == before + 1
    assert logprob_error(hugging_face(models["b"]), groups) <= TOLERANCE
    ray.kill(engines.engines[0])
    push(engines, policy, models["a"])
    assert engines.restarts == before + 2
    assert logprob_error(hugging_face(models["a"]), list(engines.generate(some_prompts(8), n=2))) <= TOLERANCE


@pytest.mark.slow
def test_too_little_memory_for_an_engine_is_told_in_a_line(local_ray, models) -> None:
    everything = {"VLLM_CPU_KVCACHE_SPACE": "0"}  # then vLLM wants its share of the machine, as of a GPU
    engines = start_engines(settings(models["a"], vllm_gpu_memory_utilization=1.0), 1, everything)
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        engines.setup()
    assert isinstance(caught.value.cause, ValueError) and is_ours_in_actor(caught.value)
    assert re.fullmatch("building the engine: .*memory.*`megaray plan` shows what each phase needs", str(caught.value.cause))
    ray.kill(engines.engines[0])


@pytest.mark.slow
@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_output_layer_follows_the_embedding(local_ray, policy, tmp_path, stored) -> None:
    folders = [make_tiny_model(tmp_path / str(seed), seed=seed, head_dim=32, tie_word_embeddings=True) for seed in (0, 1)]
    if stored:  # some tools write the output layer too
        file = folders[0] / "model.safetensors"
        weights = load_file(file)
        save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    engines = start_engines(settings(folders[0]), 1)
    for folder in (folders[1], folders[0], folders[1]):
        assert push(engines, policy, folder).num_tensors == 24 + (stored and folder is folders[0])
        assert logprob_error(hugging_face(folder), list(engines.generate(some_prompts(4), n=2))) <= TOLERANCE
    ray.kill(engines.engines[0])
