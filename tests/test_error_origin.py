"""What a ValueError shows: one line where our own code raised it, its traceback before that line where a library did."""

import json
import signal
from pathlib import Path

import pytest
import ray
from model_json import TINY, write_model

from rlhf.main import main
from rlhf.model_folder import read_shape
from rlhf.options import load_config
from rlhf.run import on_cluster


def test_an_error_of_our_own_is_one_line(tmp_path, capsys):
    assert main(["export", "--mcore_model", str(tmp_path / "none"), "--to_hf", "true"]) == 2
    assert capsys.readouterr().err == f"error: --mcore_model {tmp_path}/none: no such folder\n"


def test_an_error_of_a_library_shows_its_traceback_first(tmp_path, capsys):
    (tmp_path / "mcore").mkdir()
    (tmp_path / "mcore" / "metadata.json").write_text("{}")
    (tmp_path / "controller.json").write_text("{")  # cut off: `json` says so
    assert main(["export", "--mcore_model", str(tmp_path), "--to_hf", "true"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and any("in adapter_of" in line for line in lines)
    assert lines[-1].startswith("error: Expecting property name") and sum(line.startswith("error: ") for line in lines) == 1


@pytest.fixture
def infer(tmp_path, local_ray):
    """A complete config of a task without ranks."""
    write_model(tmp_path / "model", TINY)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "1 + 1"}]}) + "\n")
    handler = signal.getsignal(signal.SIGTERM)
    yield load_config(["infer", "--model", str(tmp_path / "model"), "--val_dataset", str(tmp_path / "rows.jsonl")])
    signal.signal(signal.SIGTERM, handler)  # `on_cluster` has set one


def test_an_error_of_our_own_in_another_process_is_only_its_text(infer, tmp_path, capsys):
    with pytest.raises(ValueError, match=f"^{tmp_path}/none/config.json: No such file or directory; is this a model folder.$"):
        on_cluster(infer, lambda cluster: ray.get(ray.remote(read_shape).remote(Path(tmp_path, "none"))))
    assert "Traceback" not in capsys.readouterr().err


def test_an_error_of_a_library_in_another_process_shows_its_traceback_first(infer, capsys):
    with pytest.raises(ValueError, match="^Expecting property name"):
        on_cluster(infer, lambda cluster: ray.get(ray.remote(json.loads).remote("{")))
    error = capsys.readouterr().err
    assert "Traceback" in error and "json/decoder.py" in error
