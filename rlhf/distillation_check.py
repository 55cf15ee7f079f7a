"""What can be found wrong with a distillation before anything starts, above all a teacher with another tokenizer. Reads JSON."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf.config import Config
from rlhf.counts import needs_teacher, teacher_places, teacher_width
from rlhf.layout_check import check_tensor_split
from rlhf.memory import longest_sequence
from rlhf.model_folder import ModelShape, check_files, read_shape


def check_distillation(config: Config, shape: ModelShape) -> None:
    """Check a resolved config of gkd whose models are local folders; `shape`: the student's. Raises ValueError."""
    if config.beta > 1:
        raise ValueError(f"beta {config.beta:g} of gkd must be at most 1: 0 is KL(teacher || student), 1 KL(student || teacher)")
    if config.temperature == 0:
        raise ValueError("temperature 0 leaves gkd no distributions to compare: use 1, say")
    own = bool(teacher_places(config))
    if config.offload_teacher_model and (own or not needs_teacher(config)):
        why = "the teacher has devices of its own" if own else "with LoRA the policy itself is the teacher"
        raise ValueError(f"offload_teacher_model has nothing to act on: {why}")
    folder = Path(config.teacher.model)
    teacher = read_shape(folder)
    if config.teacher.backend == "vllm":
        check_engine_teacher(config, teacher)
    if config.gkd_logits_topk and config.gkd_logits_topk > teacher.vocab_size:
        raise ValueError(f"gkd_logits_topk {config.gkd_logits_topk} is more than the teacher's {teacher.vocab_size} tokens")
    if folder != Path(config.model):
        check_same_tokens(Path(config.model), folder, smaller=min(shape.vocab_size, teacher.vocab_size))


def check_engine_teacher(config: Config, teacher: ModelShape) -> None:
    """Check a teacher that vLLM engines hold. Raises ValueError."""
    role, width = config.teacher, teacher_width(config)
    if not config.gkd_logits_topk:
        raise ValueError("teacher.backend vllm gives the likeliest tokens alone: say how many, as --gkd_logits_topk 64")
    if role.pipeline_model_parallel_size:
        raise ValueError("teacher.pipeline_model_parallel_size is for teacher.backend megatron")
    if role.own_devices is False:
        raise ValueError("teacher.own_devices false is for teacher.backend megatron: a teacher's engines share no devices")
    check_files(Path(role.model))
    check_tensor_split(teacher, width, f"teacher.tensor_model_parallel_size {width}")
    if role.nproc and role.nproc % width:
        raise ValueError(f"teacher.nproc {role.nproc} is no multiple of the {width} devices of one engine")
    if teacher.max_length and longest_sequence(config) > teacher.max_length:
        raise ValueError(
            f"sequences of up to {longest_sequence(config)} tokens are longer than the {teacher.max_length} that the teacher "
            "takes: lower max_length or vllm_max_model_len"
        )


def check_same_tokens(student: Path, teacher: Path, *, smaller: int) -> None:
    """ValueError when the tokenizers give an id different meanings, or have one that a model lacks.

    `smaller`: of the vocabularies of the two models, which their folders may pad to different sizes.
    """
    own, other = token_ids(student), token_ids(teacher)
    if own is None or other is None:
        folder = student if own is None else teacher
        raise ValueError(
            f"{folder} has no tokenizer.json: save the tokenizer there with transformers (save_pretrained), since student and "
            "teacher can be compared only when their tokens have the same ids"
        )
    for token_id in sorted(own.keys() | other.keys()):
        mine, yours = own.get(token_id), other.get(token_id)
        if mine != yours:
            raise ValueError(
                f"the teacher {teacher} has another tokenizer than the student {student}: token {token_id} is {_shown(yours)} "
                f"for the teacher, {_shown(mine)} for the student; distillation needs models with the same tokenizer"
            )
    if max(own) >= smaller:
        raise ValueError(f"the tokenizer has the token {max(own)}, but student or teacher has only {smaller} of them")


def token_ids(folder: Path) -> dict[int, str] | None:
    """Every token by its id, of `folder`/tokenizer.json; None without one. ValueError when it is broken."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = described["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [token, score], in the order of the ids
            vocabulary = {token: token_id for token_id, (token, _) in enumerate(vocabulary)}
        tokens = {token_id: token for token, token_id in vocabulary.items()}
        return tokens | {added["id"]: added["content"] for added in described.get("added_tokens") or []}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a tokenizer's file: {error}") from None


def _shown(token: str | None) -> str:
    return "no token" if token is None else repr(token)
