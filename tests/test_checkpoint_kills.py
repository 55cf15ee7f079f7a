"""A process killed while it saves leaves a checkpoint to continue from."""

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from rlhf.checkpoint import Checkpoints
from rlhf.run_folder import run_folder
from tests.test_checkpoint import Disk, config, find, names, saved_run


def in_a_process(work) -> multiprocessing.Process:
    """`work` in a forked process of its own."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def test_a_writer_killed_at_random_moments_leaves_the_last_complete_checkpoint(tmp_path):
    chance = random.Random(1)
    announced = tmp_path / "announced"
    announced.write_text("0")
    killed_in_the_middle = 0

    def write():
        options = config(tmp_path, save_total_limit=2, save_steps=1, resume_from_checkpoint="auto")
        checkpoints = Checkpoints(run_folder(options), options)
        found = checkpoints.find()
        for step in range(found.step + 1 if found else 1, 10000):
            checkpoints.save_if_due(step, Disk(pause=0.001), {"position": step})
            with open(announced, "r+") as file:
                file.write(str(step))

    for _ in range(15):
        process = in_a_process(write)
        time.sleep(chance.uniform(0.05, 0.3))
        process.kill()
        process.join()
        killed_in_the_middle += any("." in name for name in names(tmp_path / "run"))
        if finished := int(announced.read_text()):
            found = find(tmp_path)
            assert found.step in (finished, finished + 1)  # the next one may be complete, and not yet announced
            assert found.state == {"position": found.step}
            announced.write_text(str(found.step))
            assert len(names(tmp_path / "run")) <= 3 and not any("." in name for name in names(tmp_path / "run"))
    assert finished >= 5 and killed_in_the_middle >= 5, (finished, killed_in_the_middle)


def test_a_writer_killed_before_any_of_its_file_operations_leaves_a_good_checkpoint(tmp_path, monkeypatch):
    """Killed at the 1st, 2nd, ... operation of saving step 30 and deleting step 10, until one try reaches its end."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # what it costs is for power cuts, not for kills
    operations = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"}
    saved_run(tmp_path / "before", (10, 20))
    steps_found = []
    for count in range(1, 1000):
        output = tmp_path / str(count)
        folder = Path(shutil.copytree(tmp_path / "before", output)) / "run"

        def save(folder: Path = folder, count: int = count):
            checkpoints = Checkpoints(folder, config(folder.parent, save_total_limit=2))
            left = itertools.count(count - 1, -1)

            def kill_at_the_last(event: str, _: object) -> None:
                if event in operations and next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(kill_at_the_last)
            checkpoints.save(30, Disk(), {})

        process = in_a_process(save)
        process.join()
        steps_found.append(find(output).step)
        assert all("." not in name for name in names(folder))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert steps_found == sorted(steps_found) and set(steps_found) == {20, 30}
    assert steps_found.count(20) > 20  # killed while writing
    assert steps_found.count(30) > 3  # killed while deleting the old one
