"""Names, plug-in files, and how functions of both kinds are called."""

import textwrap
from types import SimpleNamespace

import numpy as np
import pytest

from rewards.calling import Failure, Request, RewardFunction, reward_columns
from rewards.loading import check, check_config, load
from rlhf.records import GroupTokens

# As the documentation of ms-swift 4.6.0 writes one: the base class, and the table.
ORM_PLUGIN = """
    import asyncio
    from swift.rewards import ORM, AsyncORM, orms

    class Shorter(ORM):
        def __init__(self, args=None, **kwargs):
            super().__init__(args, **kwargs)
            self.limit = args.max_completion_length

        def __call__(self, completions, solution, **kwargs):
            ids, state = kwargs['response_token_ids'], kwargs['trainer_state']
            assert [m[-1]['content'] for m in kwargs['messages']] == completions
            found = [float(s in c) for c, s in zip(completions, solution)]
            return [len(i) / self.limit + f + state.global_step for i, f in zip(ids, found)]

    class Later(AsyncORM):
        async def __call__(self, completions, **kwargs):
            await asyncio.sleep(0)
            return [float(len(c)) for c in completions]

    class NoArguments(ORM):
        def __init__(self):
            pass

        def __call__(self, completions, **kwargs):
            return [None if t else 1.0 for t in kwargs['is_truncated']]

    class MyFormat(ORM):
        def __call__(self, completions, **kwargs):
            return [42.0] * len(completions)

    orms['shorter'], orms['later'], orms['no_arguments'], orms['format'] = Shorter, Later, NoArguments, MyFormat
"""
# As TRL's documentation writes them.
TRL_PLUGIN = """
    import re
    from beside import BONUS

    def accuracy_reward(completions, solution, **kwargs):
        return [1.0 if c == s else 0.0 for c, s in zip(completions, solution)]

    def format_reward(completions, **kwargs):
        contents = [completion[0]["content"] for completion in completions]
        return [BONUS if re.match("<think>", content) else 0.0 for content in contents]

    def only_math(prompts, completions, task, **kwargs):
        return [float(len(p[0]["content"])) if t == "math" else None for p, t in zip(prompts, task)]

    async def in_time(completions, trainer_state, completion_ids):
        return [float(trainer_state.global_step * len(ids)) for ids in completion_ids]
"""


def write(folder, name, text):
    (folder / name).write_text(textwrap.dedent(text))
    return str(folder / name)


def config(reward_funcs, plugins=(), **more):
    return SimpleNamespace(
        reward_funcs=reward_funcs,
        external_plugins=list(plugins),
        reward_model=None,
        reward_weights=None,
        max_completion_length=10,
        soft_max_length=None,
        soft_cache_length=None,
        **more,
    )


def scored(functions, texts, **columns):
    n = len(texts)
    request = Request(
        function="",
        items=tuple(range(n)),
        texts=tuple(texts),
        finish_reasons=("length",) + ("stop",) * (n - 1),
        prompt_index=5,
        messages=[{"role": "user", "content": "1+1?"}],
        columns=columns,
        step=3,
        max_steps=9,
    )
    ids = tuple(np.arange(2 * item, dtype=np.int32) for item in range(n))
    tokens = GroupTokens(prompt_ids=np.zeros(1, np.int32), response_ids=ids, rollout_logprobs=ids)
    return {name: function.score(list(texts), reward_columns(request, tokens)) for name, function in functions.items()}


def function(target):
    return {"f": RewardFunction("f", target)}


def test_ms_swift_orms_run_unchanged(tmp_path, monkeypatch):
    from swift.rewards import orms

    for name, kind in orms.items():
        monkeypatch.setitem(orms, name, kind)  # the plugin's "format" is not to outlive this test
    plugin = write(tmp_path, "orm_rewards.py", ORM_PLUGIN)
    names = ["shorter", "later", "no_arguments", "format", "repetition"]
    check(names, [plugin])
    with pytest.raises(
        ValueError,
        match="'shortest': did you mean 'shorter'. Available: accuracy, cosine, format, later, no_arguments,",
    ):
        check(["shortest"], [plugin])
    functions = load(config(names, [plugin], repetition_n_grams=1, repetition_max_penalty=-1.0))
    assert scored(functions, ["two words", "no"], solution="two") == {
        "shorter": (0.0 + 1 + 3, 0.2 + 0 + 3),
        "later": (9.0, 2.0),
        "no_arguments": (None, 1.0),
        "format": (42.0, 42.0),  # the user's own replaces the built-in
        "repetition": (0.0, 0.0),
    }


def test_trl_functions_run_unchanged(tmp_path):
    write(tmp_path, "beside.py", "BONUS = 0.25")
    plugin = write(tmp_path, "trl_rewards.py", TRL_PLUGIN)
    names = ["accuracy_reward", "format_reward", "only_math", "in_time"]
    check(names, [plugin])
    functions = load(config(names, [plugin]))
    for _ in range(2):  # the second time the form of the completions is known
        assert scored(functions, ["<think>", "2", "3"], solution="2", task="math") == {
            "accuracy_reward": (0.0, 1.0, 0.0),
            "format_reward": (0.25, 0.0, 0.0),
            "only_math": (4.0, 4.0, 4.0),
            "in_time": (0.0, 6.0, 12.0),
        }
    assert scored(functions, ["2"], solution="2", task="code")["only_math"] == (None,)


def test_when_neither_form_works_the_first_error_is_told():
    def broken(completions, **columns):
        raise KeyError(type(completions[0]).__name__)

    outcome = scored(function(broken), ["a"])["f"]
    assert outcome.kind == "raised"
    assert outcome.message.startswith("KeyError: 'str' (test_rewards_loading.py:")


def test_a_missing_column_is_named():
    outcome = scored(function(lambda completions, target, **columns: [1.0]), ["a"], answer="1")["f"]
    assert "needs target, but there is no such dataset column (there are answer, completion_ids," in outcome.message


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([True, 2, np.float32(0.5)], (1.0, 2.0, 0.5)),
        (np.array([1.0, 2.0, 3.0]), (1.0, 2.0, 3.0)),
        ((None, 1.0, None), (None, 1.0, None)),
    ],
)
def test_numbers_of_any_kind_are_rewards(returned, expected):
    assert scored(function(lambda completions: returned), ["a", "b", "c"])["f"] == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1.0", [1.0], object()])
def test_other_values_fail_their_sample_alone(value):
    first, bad, last = scored(function(lambda completions: [1.0, value, 3.0]), ["a", "b", "c"])["f"]
    assert (first, last, bad.kind) == (1.0, 3.0, "bad_value")


@pytest.mark.parametrize(
    ("returned", "says"), [([1.0], "1 values for 2"), (1.0, "returned float"), (None, "NoneType"), ("ab", "str")]
)
def test_what_is_no_list_of_the_right_length_fails_the_call(returned, says):
    outcome = scored(function(lambda completions: returned), ["a", "b"])["f"]
    assert isinstance(outcome, Failure)
    assert outcome.kind == "bad_value" and says in outcome.message


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no reward function: give --reward_funcs, one or more of accuracy, cosine, format"),
        (["acuracy"], "unknown reward function 'acuracy': did you mean 'accuracy'. Available: accuracy, cosine"),
        (["format", "format"], "'format' is given twice"),
    ],
)
def test_bad_names_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        check(names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "\nimport not_a_module",
            r"bad.py does not import: ModuleNotFoundError: No module named 'not_a_module' \(bad.py:2\)",
        ),
        ("def f(:\n  pass", r"bad.py does not import: SyntaxError: .* \(bad.py:1\)"),
        ("def g():\n    raise KeyError('x')\ng()", r"bad.py does not import: KeyError: 'x' \(bad.py:2\)"),
        ("raise SystemExit('stop')", r"bad.py does not import: SystemExit: stop \(bad.py:1\)"),
        ("import os\nos._exit(3)", r"bad.py ended the process \(exit code 3\) while it was imported"),
        ("import time\ntime.sleep(60)", "bad.py did not import within 3 s"),
    ],
)
def test_plugins_that_do_not_import_are_refused(tmp_path, text, message):
    good, bad = write(tmp_path, "good.py", "def mine(completions): return [1.0]"), write(tmp_path, "bad.py", text)
    with pytest.raises(ValueError, match=message) as error:
        check(["mine"], [good, bad], seconds=3)
    assert "\n" not in str(error.value)


def test_a_plugin_file_must_exist(tmp_path):
    with pytest.raises(ValueError, match="plug-in file .*nowhere.py does not exist"):
        check(["accuracy"], [str(tmp_path / "nowhere.py")])


def test_weights_and_options_are_checked():
    settings = config(["accuracy", "format"])
    check_config(settings)
    settings.reward_weights = [1.0]
    with pytest.raises(ValueError, match="1 reward_weights for 2 reward_funcs"):
        check_config(settings)
    with pytest.raises(ValueError, match="'soft_overlong' needs soft_cache_length"):
        check_config(config(["soft_overlong"]))
