"""ms-swift's environment variables: read by the driver for the tasks that use them, refused when they cannot be."""

from __future__ import annotations

import pytest

from rlhf.config import Config
from rlhf.variables import VARIABLES, read_environment, variable


def test_defaults_are_ms_swifts():
    config = Config(task="embedding")
    found = {name: variable(config, name) for name in VARIABLES}
    assert found == {
        "INFONCE_TEMPERATURE": 0.1,
        "INFONCE_USE_BATCH": True,
        "INFONCE_HARD_NEGATIVES": None,
        "INFONCE_MASK_FAKE_NEGATIVE": False,
        "INFONCE_FAKE_NEG_MARGIN": 0.1,
        "INFONCE_INCLUDE_QQ": False,
        "INFONCE_INCLUDE_DD": False,
        "MAX_POSITIVE_SAMPLES": 1,
        "MAX_NEGATIVE_SAMPLES": 7,
        "LISTWISE_RERANKER_TEMPERATURE": 1.0,
        "LISTWISE_RERANKER_MIN_GROUP_SIZE": 2,
        "GENERATIVE_RERANKER_POSITIVE_TOKEN": "yes",
        "GENERATIVE_RERANKER_NEGATIVE_TOKEN": "no",
    }


def test_a_task_reads_its_own(monkeypatch):
    monkeypatch.setenv("INFONCE_TEMPERATURE", "0.02")
    monkeypatch.setenv("MAX_NEGATIVE_SAMPLES", "3")
    config = Config(task="embedding", environment=read_environment("embedding"))
    assert config.environment == {"INFONCE_TEMPERATURE": "0.02"} and variable(config, "INFONCE_TEMPERATURE") == 0.02
    assert read_environment("reranker") == {"MAX_NEGATIVE_SAMPLES": "3"} and read_environment("sft") == {}


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("INFONCE_TEMPERATURE", "0", "must be above 0"),
        ("INFONCE_TEMPERATURE", "warm", "is not a number"),
        ("INFONCE_USE_BATCH", "maybe", "is not true or false"),
        ("INFONCE_HARD_NEGATIVES", "0", "must be at least 1"),
        ("INFONCE_HARD_NEGATIVES", "1.5", "is not a whole number"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(monkeypatch, name, text, message):
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=f"{name}={text} in the environment {message}"):
        read_environment("embedding")


def test_what_needs_the_whole_batch_is_refused_without_it(monkeypatch):
    monkeypatch.setenv("INFONCE_USE_BATCH", "false")
    monkeypatch.setenv("INFONCE_INCLUDE_QQ", "true")
    with pytest.raises(ValueError, match="INFONCE_INCLUDE_QQ .* needs the negatives of the whole batch"):
        read_environment("embedding")
