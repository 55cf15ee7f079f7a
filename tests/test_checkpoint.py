"""Checkpoints on a real disk: damaged, rotated, continued."""

import json
import os
import random
import re
import time
import zlib
from pathlib import Path

import pytest

from rlhf.checkpoint import Checkpoints, find_fault
from rlhf.config import Config
from rlhf.main import main
from rlhf.run_folder import run_folder, write_args
from tests.model_json import TINY, write_model


class Disk:
    """Writes what a policy writes, a little at a time: what is tested is the order of the writes around it."""

    def __init__(self, *, size: int = 4096, pause: float = 0.0):
        self.size, self.pause = size, pause

    def on_all(self, method: str, folder: str, step: int) -> None:
        assert method == "save"
        (Path(folder) / "mcore").mkdir()
        for name in ("config.json", "model.safetensors", "mcore/rank0.distcp", "mcore/rank1.distcp"):
            with open(Path(folder) / name, "wb", buffering=0) as file:
                for _ in range(4):
                    file.write(random.Random(f"{step} {name}").randbytes(self.size // 4))
                    time.sleep(self.pause)


def config(output: Path, **options) -> Config:
    run = {"task": "grpo", "model": "/models/tiny", "output_dir": str(output), "run_name": "run", "save_steps": 10}
    run |= {"steps_per_generation": 1}
    return Config(**run | options)


def saved_run(output: Path, steps: tuple[int, ...], **options) -> Path:
    options = config(output, **options)
    folder = run_folder(options)
    checkpoints = Checkpoints(folder, options)
    write_args(folder, options)
    for step in steps:
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(f'{{"step": {step}}}\n')
        checkpoints.save(step, Disk(), {"position": step * 16, "weight_version": step})
    return folder


def find(output: Path, asked: str | Path = "auto", **options):
    options = config(output, resume_from_checkpoint=str(asked), **options)
    return Checkpoints(run_folder(options), options).find()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def flip_a_byte(file: Path, at: int = 100) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_a_saved_checkpoint_gives_back_its_state_and_the_offsets_of_the_metrics(tmp_path):
    folder = saved_run(tmp_path, (10, 20))
    found = find(tmp_path)
    assert found.step == 20 and found.folder == folder / "checkpoint-20"
    assert found.state == {"position": 320, "weight_version": 20}
    assert found.offsets == {"metrics.jsonl": len('{"step": 10}\n{"step": 20}\n')}


def test_the_manifest_names_size_and_crc_of_every_other_file(tmp_path):
    folder = saved_run(tmp_path, (10,)) / "checkpoint-10"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"manifest.json"}
    assert set(files) == written >= {"controller.json", "config.json", "mcore/rank1.distcp"}
    content = (folder / "model.safetensors").read_bytes()
    assert files["model.safetensors"] == [len(content), f"{zlib.crc32(content):08x}"]


@pytest.mark.parametrize(
    ("file", "damage", "fault"),
    [
        ("model.safetensors", flip_a_byte, r"model.safetensors has CRC-32 \w{8} instead of \w{8}"),
        ("mcore/rank0.distcp", lambda file: os.truncate(file, 100), "rank0.distcp has 100 bytes instead of 4,096"),
        ("config.json", Path.unlink, "config.json is missing"),
        ("manifest.json", Path.unlink, "manifest.json is missing"),
        ("manifest.json", lambda file: os.truncate(file, 50), "manifest.json is damaged"),
        ("manifest.json", lambda file: file.write_text('{"files": [1]}'), "manifest.json is damaged"),
        ("controller.json", flip_a_byte, "controller.json has CRC-32"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, capsys, file, damage, fault):
    folder = saved_run(tmp_path, (10, 20))
    damage(folder / "checkpoint-20" / file)
    assert find(tmp_path).step == 10
    shown = capsys.readouterr().out
    assert re.search(rf"warning: {folder}/checkpoint-20 cannot be used: .*{fault}", shown), shown


def test_a_damaged_checkpoint_that_was_asked_for_falls_back_in_its_own_run(tmp_path, capsys):
    folder = saved_run(tmp_path, (10, 20, 30))
    flip_a_byte(folder / "checkpoint-20" / "config.json")
    assert find(tmp_path, folder / "checkpoint-20").step == 10
    assert "checkpoint-20 cannot be used: config.json has CRC-32" in capsys.readouterr().out


def test_no_good_checkpoint_is_an_error(tmp_path):
    folder = saved_run(tmp_path, (10,))
    flip_a_byte(folder / "checkpoint-10" / "config.json")
    with pytest.raises(ValueError, match=f"no usable checkpoint in {folder}"):
        find(tmp_path)


def test_later_checkpoints_are_set_aside_when_an_earlier_one_is_continued(tmp_path):
    folder = saved_run(tmp_path, (10, 20, 30))
    options = config(tmp_path, resume_from_checkpoint=str(folder / "checkpoint-10"))
    checkpoints = Checkpoints(run_folder(options), options)
    found = checkpoints.find()
    assert found.step == 10
    assert names(folder) == ["checkpoint-10", "checkpoint-20", "checkpoint-30"]  # the run may be refused yet
    checkpoints.leave_later(found)
    assert names(folder) == ["checkpoint-10", "checkpoint-20.replaced", "checkpoint-30.replaced"]
    assert find(tmp_path).step == 10  # and `auto` does not go back to them


def test_a_run_that_goes_on_from_another_ones_checkpoint_saves_at_its_own_multiples(tmp_path):
    folder = saved_run(tmp_path, (10, 20))
    options = config(tmp_path, run_name="other", resume_from_checkpoint=str(folder / "checkpoint-10"), save_steps=10)
    checkpoints = Checkpoints(run_folder(options), options)
    found = checkpoints.find()
    checkpoints.leave_later(found)
    assert [checkpoints.save_if_due(step, Disk(), {}) is not None for step in (11, 19, 20)] == [False, False, True]
    assert names(folder) == ["checkpoint-10", "checkpoint-20"] and names(folder.parent / "other") == ["checkpoint-20"]


def test_what_was_set_aside_is_deleted_once_this_course_has_saved_as_many_steps(tmp_path):
    folder = saved_run(tmp_path, (10, 20, 30))
    options = config(tmp_path, resume_from_checkpoint=str(folder / "checkpoint-10"), save_total_limit=2)

    class Watched(Disk):
        def on_all(self, method: str, writing: str, step: int) -> None:
            super().on_all(method, writing, step)
            assert f"checkpoint-{step}.replaced" in names(folder)  # the only copy of that step until the new one is complete

    checkpoints = Checkpoints(run_folder(options), options)
    checkpoints.leave_later(checkpoints.find())
    checkpoints.save(20, Watched(), {})
    assert names(folder) == ["checkpoint-10", "checkpoint-20", "checkpoint-30.replaced"]
    checkpoints = Checkpoints(folder, options)  # started again
    checkpoints.save(30, Watched(), {})
    assert names(folder) == ["checkpoint-20", "checkpoint-30"]


def test_a_step_within_a_generation_is_refused_with_what_it_was_saved_with(tmp_path):
    folder = saved_run(tmp_path, (3, 6, 12), num_iterations=3)
    text = (
        "checkpoint-6 is at step 6, no multiple of steps_per_generation 2 x num_iterations 2 = 4 optimizer steps a generation: "
        "give --steps_per_generation 1 --num_iterations 3, as it was saved with"
    )
    with pytest.raises(ValueError, match=text):
        find(tmp_path, folder / "checkpoint-6", steps_per_generation=2, num_iterations=2)
    assert names(folder) == ["checkpoint-12", "checkpoint-3", "checkpoint-6"]  # none is set aside
    assert find(tmp_path, steps_per_generation=2, num_iterations=2).step == 12


def test_an_interrupted_run_is_told_what_it_saved_and_how_to_go_on(tmp_path):
    options = config(tmp_path)
    folder = run_folder(options)
    checkpoints = Checkpoints(folder, options)
    assert checkpoints.left() == "run run has saved no checkpoint yet"
    checkpoints.save(10, Disk(), {})
    assert checkpoints.left() == "run run has saved step 10: --run_name run --resume_from_checkpoint auto goes on from there"
    weights = Checkpoints(folder, config(tmp_path, no_save_optim=True)).left()
    assert weights == (
        f"run run has saved step 10 without optimizer state: --model {folder}/checkpoint-10 starts a new run from its weights"
    )


def test_only_the_newest_are_kept_and_never_fewer_than_the_limit(tmp_path):
    options = config(tmp_path, save_total_limit=2)
    checkpoints = Checkpoints(run_folder(options), options)

    class Watched(Disk):
        def on_all(self, method: str, folder: str, step: int) -> None:
            super().on_all(method, folder, step)
            complete = [name for name in names(tmp_path / "run") if "." not in name]
            assert len(complete) == min(2, step // 10 - 1)  # the old ones are still there while the new one is written

    for step in (10, 20, 30, 40):
        checkpoints.save(step, Watched(), {})
    assert names(tmp_path / "run") == ["checkpoint-30", "checkpoint-40"]
    assert all(find_fault(tmp_path / "run" / name) is None for name in names(tmp_path / "run"))


def test_saves_are_due_every_save_steps_also_when_steps_pass_over_them_and_at_the_end(tmp_path):
    options = config(tmp_path, save_steps=10)
    checkpoints = Checkpoints(run_folder(options), options)
    for step in range(4, 29, 4):  # 4, 8, 12 ... 28
        checkpoints.save_if_due(step, Disk(), {})
    assert names(tmp_path / "run") == ["checkpoint-12", "checkpoint-20"]
    checkpoints.save_last()
    checkpoints.save_last()
    assert names(tmp_path / "run") == ["checkpoint-12", "checkpoint-20", "checkpoint-28"]


def test_saving_a_step_again_replaces_it(tmp_path):
    saved_run(tmp_path, (10,))
    options = config(tmp_path, resume_from_checkpoint="auto")
    Checkpoints(run_folder(options), options).save(10, Disk(), {"position": 7})
    assert find(tmp_path).state == {"position": 7} and names(tmp_path / "run") == ["checkpoint-10"]


def test_what_a_killed_run_left_is_removed_at_the_start(tmp_path):
    folder = saved_run(tmp_path, (10,))
    (folder / "checkpoint-20.writing" / "mcore").mkdir(parents=True)
    (folder / "checkpoint-5.deleting").mkdir()
    (folder / "checkpoint-notes.writing.txt").write_text("mine")
    assert find(tmp_path).step == 10
    assert names(folder) == ["checkpoint-10", "checkpoint-notes.writing.txt"]


def test_a_checkpoint_without_optimizer_is_refused_with_what_to_do_instead(tmp_path):
    folder = saved_run(tmp_path, (10,), no_save_optim=True)
    with pytest.raises(ValueError, match=f"no_save_optim.*--model {folder}/checkpoint-10"):
        find(tmp_path)
    assert find(tmp_path, no_load_optim=True).step == 10


@pytest.mark.parametrize("asked", ["auto", "checkpoint"])
def test_a_checkpoint_of_another_task_is_not_continued(tmp_path, asked):
    folder = saved_run(tmp_path, (10,))
    asked = folder / "checkpoint-10" if asked == "checkpoint" else asked
    with pytest.raises(ValueError, match=r"checkpoint-10 is of a run of grpo, this one is sft: .* --model .*checkpoint-10"):
        find(tmp_path, asked, task="sft")


def test_a_refused_resumption_leaves_the_options_of_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    write_model(tmp_path / "tiny", TINY)
    turns = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    folder = saved_run(tmp_path, (10,))
    before = (folder / "args.json").read_text()
    options = f"--model {tmp_path}/tiny --dataset {tmp_path}/rows.jsonl --train_iters 2 --output_dir {tmp_path} --run_name run"
    assert main(["sft", *options.split(), "--report_to", "none", "--resume_from_checkpoint", "auto"]) == 2
    assert "checkpoint-10 is of a run of grpo, this one is sft" in capsys.readouterr().err
    assert (folder / "args.json").read_text() == before


def test_a_policy_that_writes_where_this_node_cannot_see_is_an_error(tmp_path):
    class Elsewhere(Disk):
        def on_all(self, method: str, folder: str, step: int) -> None:
            pass

    options = config(tmp_path)
    with pytest.raises(ValueError, match="must be on a shared file system"):
        Checkpoints(run_folder(options), options).save(10, Elsewhere(), {})
    assert not (tmp_path / "run" / "checkpoint-10").exists()


def test_auto_without_a_checkpoint_starts_afresh_and_says_so(tmp_path, capsys):
    assert find(tmp_path) is None
    assert "starting at step 0" in capsys.readouterr().out


def test_auto_without_a_name_takes_the_newest_run_of_the_same_task_and_model(tmp_path):
    saved_run(tmp_path, (10,), run_name="old")
    right = saved_run(tmp_path, (20,), run_name="new")
    other_task = saved_run(tmp_path, (30,), run_name="sft", task="sft")
    other_model = saved_run(tmp_path, (40,), run_name="big", model="/models/big")
    for age, folder in enumerate((other_model, other_task, right, tmp_path / "old")):
        os.utime(folder / "args.json", (1e9 - age, 1e9 - age))
    found = find(tmp_path, run_name=None)
    assert found.folder == right / "checkpoint-20"


def test_another_runs_checkpoint_under_a_new_name_starts_new_files_and_leaves_that_run_alone(tmp_path):
    source = saved_run(tmp_path, (10, 20))
    found = find(tmp_path, source / "checkpoint-10", run_name="branch")
    assert found.step == 10 and found.offsets == {}
    assert names(source) == ["checkpoint-10", "checkpoint-20"] and (tmp_path / "branch").is_dir()


def test_a_checkpoint_folder_without_a_name_continues_in_its_own_run(tmp_path):
    source = saved_run(tmp_path, (10,))
    options = config(tmp_path / "elsewhere", run_name=None, resume_from_checkpoint=str(source / "checkpoint-10"))
    assert run_folder(options) == source


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        find(tmp_path, tmp_path / "run9" / "checkpoint-5", run_name="fresh")
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="neither a checkpoint-N folder nor a run"):
        find(tmp_path, tmp_path / "model", run_name="fresh")


def test_a_folder_that_holds_another_run_is_refused_unless_it_is_resumed(tmp_path):
    saved_run(tmp_path, (10,))
    with pytest.raises(ValueError, match="already holds a run.*--resume_from_checkpoint auto"):
        run_folder(config(tmp_path))
    with pytest.raises(ValueError, match=r"already holds a run \(metrics.jsonl\): choose another --run_name$"):
        run_folder(config(tmp_path, task="infer"))


def test_an_output_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to the run folder"):
        run_folder(config(tmp_path / "file"))


def test_the_run_folder_is_named_by_task_model_and_time_and_holds_the_options(tmp_path):
    options = config(tmp_path, run_name=None)
    folder = run_folder(options)
    write_args(folder, options)
    assert time.strftime("grpo-tiny-%Y%m%d-") in folder.name
    assert json.loads((folder / "args.json").read_text())["save_steps"] == 10


def test_a_run_that_starts_from_a_checkpoint_does_not_inherit_its_manifest(tmp_path):
    from actors.model_folder import copy_companions

    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    for name in ("manifest.json", "controller.json", "tokenizer.json", "config.json"):
        (source / name).write_text("{}")
    copy_companions(source, target, dtype=None)
    assert sorted(path.name for path in target.iterdir()) == ["tokenizer.json"]
