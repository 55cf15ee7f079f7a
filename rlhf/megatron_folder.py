"""A folder with a model in Megatron's format and what it says about itself, read as JSON by the controller and by ranks.

`mcore/` in it is Megatron's distributed checkpoint. Of a whole model: config.json, the tokenizer and tensors.json (the names
and shapes that its weights have in a Hugging Face folder) stand beside it. Of an adapter alone: controller.json, of the run
that trained it, names the base model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

MEGATRON = "mcore"
TENSORS = "tensors.json"
RUN = "controller.json"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A low-rank adapter, in the names of the options of the run that trained it."""

    base: str  # folder of the model it belongs to: Hugging Face's, or Megatron's
    task: str
    num_labels: int | None
    problem_type: str | None
    lora_rank: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    lora_dropout: float = 0.0  # it is not trained further


def holds_megatron(folder: Path) -> bool:
    """Whether there is a distributed checkpoint in it."""
    return (folder / MEGATRON / "metadata.json").is_file()


def adapter_of(folder: Path) -> Adapter | None:
    """The adapter that the checkpoint in `folder` holds alone; None: it holds a whole model."""
    if not (folder / RUN).is_file():
        return None
    options = json.loads((folder / RUN).read_text(encoding="utf-8"))["config"]
    if options["tuner_type"] != "lora":
        return None
    return Adapter(
        base=options.get("mcore_model") or options["model"],
        task=options["task"],
        num_labels=options["num_labels"],
        problem_type=options["problem_type"],
        lora_rank=options["lora_rank"],
        lora_alpha=options["lora_alpha"],
        target_modules=tuple(options["target_modules"]),
        modules_to_save=tuple(options["modules_to_save"]),
    )


def find_megatron(name: str) -> Path:
    """The folder that `--mcore_model NAME` means. Raises ValueError, one line, when it holds no checkpoint of Megatron's."""
    folder = Path(name).expanduser().resolve()
    if not folder.is_dir():
        raise ValueError(f"--mcore_model {name}: no such folder")
    if holds_megatron(folder):
        return folder
    inside = [path.name for path in sorted(folder.iterdir()) if holds_megatron(path)]
    if inside:
        raise ValueError(f"--mcore_model {name} is a run: name one of its checkpoints ({', '.join(inside)})")
    if (folder / "latest_checkpointed_iteration.txt").exists():
        raise ValueError(f"--mcore_model {name} was written by ms-swift: give the Hugging Face folder it came from as --model")
    raise ValueError(
        f"--mcore_model {name} holds no {MEGATRON}/: give what `megaray export --to_mcore true` wrote, or a run's checkpoint-N"
    )


def check_described(folder: Path) -> None:
    """Whether the folder of a model says how it is built and what its tensors are called in a Hugging Face folder.

    Raises ValueError when it does not.
    """
    for name, there in {
        "config.json": (folder / "config.json").is_file(),
        TENSORS: (folder / TENSORS).is_file() or any(folder.glob("*.safetensors")),
    }.items():
        if not there:
            raise ValueError(f"{folder} has no {name}: give the Hugging Face folder that the model was made from as --model")


def find_whole_megatron(name: str) -> Path:
    """As `find_megatron`, of a whole model, for a run to start from."""
    folder = find_megatron(name)
    if adapter_of(folder) is not None:
        raise ValueError(
            f"--mcore_model {name} holds an adapter alone: `megaray export --mcore_model {name} --to_hf true` merges it into a "
            "model to start from; --resume_from_checkpoint continues its run"
        )
    return folder
