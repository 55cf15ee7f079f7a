"""The built-in reward functions: literal cases worked out by hand, and ms-swift's own implementation."""

import math
import threading
from types import SimpleNamespace

import pytest

from rewards.accuracy import Accuracy
from rewards.cosine import Cosine
from rewards.format import think_then_answer
from rewards.repetition import Repetition
from rewards.soft_overlong import SoftOverlong

OPTIONS = SimpleNamespace(
    max_completion_length=100,
    cosine_min_len_value_wrong=-0.5,
    cosine_max_len_value_wrong=0.0,
    cosine_min_len_value_correct=1.0,
    cosine_max_len_value_correct=0.5,
    cosine_max_len=None,
    repetition_n_grams=3,
    repetition_max_penalty=-1.0,
    soft_max_length=None,
    soft_cache_length=20,
)


def options(**changed):
    return SimpleNamespace(**{**vars(OPTIONS), **changed})


def test_accuracy_compares_values_not_spelling():
    texts = [r"so \boxed{0.5}", r"so \boxed{\frac{2}{4}}", "<answer>1/2</answer>", r"so \boxed{0.6}", "half", "", "1/2"]
    assert Accuracy()(texts, [r"$\frac{1}{2}$"] * 7) == [1, 1, 1, 0, 0, 0, 0]


def test_accuracy_takes_plain_and_numeric_solutions():
    assert Accuracy()([r"\boxed{72}", "<answer>72</answer>", r"\boxed{73}"], ["72", 72, 72.0]) == [1, 1, 0]


def test_accuracy_refuses_a_solution_without_an_expression():
    with pytest.raises(ValueError, match="no expression in the solution 'no number here'"):
        Accuracy()([r"\boxed{1}"], ["no number here"])


def test_accuracy_works_in_any_thread():
    results = []
    thread = threading.Thread(target=lambda: results.extend(Accuracy()([r"\boxed{7}", r"\boxed{8}"], ["7", "7"])))
    thread.start()
    thread.join()
    assert results == [1, 0]


def test_format_wants_the_whole_completion():
    good = "<think>a\nb</think>\n\n<answer>c\nd</answer>"
    texts = [good, good + "\n", " " + good, "<think>a</think> so <answer>b</answer>", "<answer>c</answer>", ""]
    assert think_then_answer(texts) == [1, 0, 0, 0, 0, 0]


def test_repetition_is_the_share_of_repeated_ngrams():
    # "a b a b a b": 3-grams aba bab aba bab: 2 of 4 are repeats; "A a a a": 2 of 2 alike
    texts = ["a b a b a b", "A a a a", "one two three four", "a b", ""]
    assert Repetition(OPTIONS)(texts) == [-0.5, -0.5, 0.0, 0.0, 0.0]
    assert Repetition(options(repetition_n_grams=1, repetition_max_penalty=-2.0))(["a a a a"]) == [-1.5]


def test_cosine_at_both_ends_and_in_the_middle():
    texts, solutions = [r"\boxed{1}"] * 3 + [r"\boxed{2}"] * 3, ["1"] * 6
    lengths = [[0] * n for n in (0, 50, 100, 0, 50, 100)]
    assert Cosine(OPTIONS)(texts, solutions, lengths) == pytest.approx([1.0, 0.75, 0.5, -0.5, -0.25, 0.0], abs=1e-12)
    at_quarter = Cosine(options(cosine_max_len=200))(texts[:1], ["1"], lengths[1:2])
    assert at_quarter == pytest.approx([0.75 + 0.25 * math.cos(math.pi / 4)], abs=1e-12)


def test_soft_overlong_falls_linearly_in_the_last_stretch():
    lengths = [[0] * n for n in (0, 80, 85, 90, 100)]
    assert SoftOverlong(OPTIONS)([""] * 5, lengths) == [0.0, 0.0, -0.25, -0.5, -1.0]


@pytest.mark.parametrize(
    ("function", "changed", "message"),
    [
        (SoftOverlong, {"soft_cache_length": None}, "needs soft_cache_length"),
        (SoftOverlong, {"soft_cache_length": 100}, "below soft_max_length \\(100\\)"),
        (Repetition, {"repetition_n_grams": 0}, "at least 1"),
        (Repetition, {"repetition_max_penalty": 0.5}, "must not be above 0"),
        (Cosine, {"cosine_max_len": 0}, "at least 1"),
    ],
)
def test_options_that_cannot_work_are_refused(function, changed, message):
    with pytest.raises(ValueError, match=message):
        function(options(**changed))


def test_built_ins_agree_with_ms_swift():
    from swift.rewards.orm import orms

    answers = [
        "1/2",
        r"\boxed{\frac{1}{2}}",
        "$0.5$",
        "the answer is 0.5",
        "The final answer is $0.5$. I hope it is correct.",
        r"\boxed{12}",
        r"$x = 12$",
        r"\boxed{12.0}",
        "<think>t</think><answer>12</answer>",
        "<think>t</think>\n<answer>\\frac{1}{2}</answer>",
        "<answer>x</answer>",
        "it it it it is is it it it it",
        r"\boxed{1\,200}",
        r"\boxed{12 \text{ km}}",
        r"$(1, 2)$",
        "",
        "Word word WORD word",
    ]
    right = 0
    for solution in ("12", r"$\frac{1}{2}$", r"\boxed{12}", "<answer>0.5</answer>", "(1, 2)"):
        solutions, ids = [solution] * len(answers), [[0] * (7 * n) for n in range(len(answers))]
        args = options(soft_max_length=100, cosine_max_len=100)
        theirs = {
            name: orms[name](args=args)(answers, solution=solutions, response_token_ids=ids)
            for name in ("accuracy", "format", "repetition", "cosine", "soft_overlong")
        }
        assert Accuracy()(answers, solutions) == theirs["accuracy"]
        assert think_then_answer(answers) == theirs["format"]
        assert Repetition(args)(answers) == pytest.approx(theirs["repetition"], abs=1e-12)
        assert Cosine(args)(answers, solutions, ids) == pytest.approx(theirs["cosine"], abs=1e-12)
        assert SoftOverlong(args)(answers, ids) == pytest.approx(theirs["soft_overlong"], abs=1e-12)
        right += sum(theirs["accuracy"])
    assert 10 <= right <= 40  # of 90: neither none nor all, so the comparison means something


def test_a_bare_number_is_an_answer():
    accuracy = Accuracy()
    assert accuracy(["85", " 85\n", "85.0", "1,085"], ["85", "85", "85", "1085"]) == [1, 1, 1, 1]
    assert accuracy(["84", "85+", ""], ["85"] * 3) == [0, 0, 0]
