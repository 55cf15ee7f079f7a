"""Fits a run to its GPUs before it starts: the options that memory decides, and the refusal of what cannot fit.

Where engines share the policy's GPUs, those of a GPU get what the policy leaves while they generate. Numbers are those of
`rlhf.memory` and `rlhf.phases`: predictions.
"""

from __future__ import annotations

from dataclasses import replace

from rlhf.changes import changed, in_words, possible_changes
from rlhf.config import Config
from rlhf.counts import frozen_group, row_sequences, samples, teacher_places
from rlhf.memory import GIB, engine_memory, longest_sequence, responses_at_a_time, sequence_cache
from rlhf.model_folder import ModelShape
from rlhf.phases import ACTIVATIONS, ENGINE_RESIDUE, ENGINE_WORK, holdings, offloaded, phases, shares_gpus

MARGIN = 2  # per cent of a GPU that nobody is given
MOST = 90  # per cent of a GPU that its engines get when the user does not say
RESPONSES = 256  # of the longest length: what a KV cache should hold before the policy may stay on the GPU
DECIDED = ("vllm_gpu_memory_utilization", "offload_optimizer", "offload_model")


def fit(config: Config, shape: ModelShape, frozen_shape: ModelShape | None, gpu_memory: int | None) -> Config:
    """`config` with the options of DECIDED filled in; `gpu_memory`: bytes of a GPU, None without GPUs. Twice is as once.

    Raises ValueError, one line, when a phase of the run cannot fit.
    """
    text = refusal(config, shape, frozen_shape, gpu_memory)
    if text is not None:
        raise ValueError(text)
    return complete(config, shape, frozen_shape, gpu_memory)


def complete(config: Config, shape: ModelShape, frozen_shape: ModelShape | None, gpu_memory: int | None) -> Config:
    """`fit` without the refusal. What is given stays.

    On shared GPUs the optimizer's state is offloaded first, then the models too, until what an engine needs fits: the share
    that was given, or room in its KV cache for RESPONSES (or as many as there are) of the longest length.
    """
    if gpu_memory is None or not samples(config):
        return _filled(config, MOST / 100, optimizer=False, model=False)
    steps = ((False, False), (True, False), (True, True))
    for optimizer, model in steps if shares_gpus(config) else steps[:1]:
        trial = _filled(config, MOST / 100, optimizer=optimizer, model=model)
        left = _share_left(trial, shape, frozen_shape, gpu_memory)
        trial = _filled(config, min(max(left, 0.01), MOST / 100), optimizer=optimizer, model=model)
        pushes = phases(trial, shape, frozen_shape, gpu_memory)["push"] <= gpu_memory
        if config.vllm_gpu_memory_utilization is not None:
            enough = left >= config.vllm_gpu_memory_utilization
        else:
            enough = _cache(trial, shape, gpu_memory) >= _wanted_responses(trial) * sequence_cache(trial, shape)
        if pushes and enough:
            break
    return trial


def note(
    config: Config, completed: Config, shape: ModelShape, frozen_shape: ModelShape | None, gpu_memory: int | None
) -> str | None:
    """What `complete` decided for shared GPUs, and why; None when it decided nothing."""
    if gpu_memory is None or not shares_gpus(config):
        return None
    decided = {name: getattr(completed, name) for name in DECIDED if getattr(config, name) is None}
    decided = {name: value for name, value in decided.items() if value is not False}
    if not decided:
        return None
    stays = frozen_shape is not None and not config.offload_teacher_model and not teacher_places(config)
    frozen = [frozen_group(config)] * stays + ["reward model"] * bool(config.reward_model)
    who = f"policy and {' and '.join(frozen)} keep" if frozen else "the policy keeps"
    text = (
        f"{in_words(decided)}: {who} {_gib(_kept(completed, shape, frozen_shape, gpu_memory))} GiB of each GPU's "
        f"{_gib(gpu_memory)} GiB while the engine generates"
    )
    if set(decided) == {"vllm_gpu_memory_utilization"} or config.vllm_gpu_memory_utilization is not None:
        return text
    return f"{text}, whose KV cache is to hold {_wanted_responses(config)} responses of {longest_sequence(config):,} tokens"


def check_host(config: Config, shape: ModelShape, frozen_shape: ModelShape | None, host_memory: int) -> None:
    """ValueError when a node has too little host memory (bytes) for what a completed config offloads."""
    needed = offloaded(config, shape, frozen_shape)
    if needed > host_memory:
        changes = [f"{name} false" for name in ("offload_teacher_model", "optimizer_cpu_offload") if getattr(config, name)]
        if shares_gpus(config):
            changes.append("offload_model false, offload_optimizer false and a lower vllm_gpu_memory_utilization")
        raise ValueError(
            f"offloading needs about {_gib(needed)} GiB of a node's host memory, there are {_gib(host_memory)}: give "
            f"{', '.join(changes)}, or use more nodes"
        )


def warning(config: Config, shape: ModelShape, frozen_shape: ModelShape | None, gpu_memory: int | None) -> str | None:
    """What does not fit if rows are as long as they may be, and what to change; None when that fits, or is refused."""
    if gpu_memory is None or refusal(config, shape, frozen_shape, gpu_memory):
        return None
    room = shape, frozen_shape, gpu_memory
    problem, _ = _problem(config, *room, longest=True)
    if problem is None:
        return None
    return f"when rows are as long as max_length allows, {problem}; then {_advice(config, *room, longest=True)}"


def refusal(config: Config, shape: ModelShape, frozen_shape: ModelShape | None, gpu_memory: int | None) -> str | None:
    """Why the run cannot fit, and what to change, in one line; None when it fits or there are no GPUs."""
    if gpu_memory is None:
        return None
    problem, _ = _problem(config, shape, frozen_shape, gpu_memory)
    return f"{problem}; {_advice(config, shape, frozen_shape, gpu_memory)}" if problem else None


def _filled(config: Config, share: float, *, optimizer: bool, model: bool) -> Config:
    defaults = dict(zip(DECIDED, (share, optimizer, model)))
    return replace(config, **{name: value for name, value in defaults.items() if getattr(config, name) is None})


def _kept(config: Config, shape: ModelShape, frozen_shape: ModelShape | None, gpu_memory: int) -> int:
    """Bytes that the ranks on one GPU keep while its engines generate."""
    held = holdings(config, shape, frozen_shape, gpu_memory)["generate"]
    return sum(size for name, size in held.items() if not name.startswith("engine"))


def _share_left(config: Config, shape: ModelShape, frozen_shape: ModelShape | None, gpu_memory: int) -> float:
    """Of the GPU, beside all that is not the engines' share and the margin, rounded down to 0.01; may be negative."""
    held = holdings(config, shape, frozen_shape, gpu_memory)["generate"]
    beside = sum(held.values()) - held["engine"]
    return ((100 - MARGIN) * gpu_memory - 100 * beside) // gpu_memory / 100


def _cache(config: Config, shape: ModelShape, gpu_memory: int) -> int:
    """Bytes that remain of an engine's share for its KV cache; may be negative."""
    return _engine_share(config, gpu_memory) - engine_memory(config, shape).weights - ENGINE_RESIDUE - ENGINE_WORK


def _engine_share(config: Config, gpu_memory: int) -> int:
    """Bytes of a GPU that one engine gets."""
    return int(config.vllm_gpu_memory_utilization * gpu_memory) // config.rollout.engines_per_device


def _wanted_responses(config: Config) -> int:
    return min(responses_at_a_time(config), RESPONSES)


def _problem(
    config: Config, shape: ModelShape, frozen_shape: ModelShape | None, gpu_memory: int, *, longest: bool = False
) -> tuple[str | None, int]:
    """The first thing of the completed config that does not fit, in words, and the most bytes that anything lacks.

    Micro batches of so many rows, and rows longer than a pack, count only where all rows are the `longest`: most are shorter.
    """
    config = complete(config, shape, frozen_shape, gpu_memory)
    if config.packing and not longest:
        config = replace(config, max_length=config.packing_length // row_sequences(config))
    texts, lacking = [], 0
    for phase, held in holdings(config, shape, frozen_shape, gpu_memory).items():
        if not (longest or config.micro_batch_tokens or config.packing):
            held = {name: size for name, size in held.items() if not name.startswith(ACTIVATIONS)}
        if (needed := sum(held.values())) > gpu_memory:
            largest = sorted(held.items(), key=lambda item: -item[1])[:3]
            parts = ", ".join(f"{name} {_gib(size)}" for name, size in largest)
            texts.append(f"phase {phase} needs about {_gib(needed)} GiB of a GPU's {_gib(gpu_memory)} GiB ({parts})")
            lacking = max(lacking, needed - gpu_memory)
    if samples(config) and (short := sequence_cache(config, shape) - _cache(config, shape, gpu_memory)) > 0:
        share = _engine_share(config, gpu_memory)
        texts.append(
            f"phase generate: vllm_gpu_memory_utilization {config.vllm_gpu_memory_utilization:g} gives an engine "
            f"{_gib(share)} GiB of a GPU's {_gib(gpu_memory)} GiB, it needs at least {_gib(share + short)} "
            f"(weights {_gib(engine_memory(config, shape).weights)}, one sequence of {longest_sequence(config):,} tokens "
            f"{_gib(sequence_cache(config, shape))}, itself {_gib(ENGINE_RESIDUE + ENGINE_WORK)})"
        )
        lacking = max(lacking, short)
    return (texts[0] if texts else None), lacking


def _advice(config: Config, shape: ModelShape, frozen_shape: ModelShape | None, gpu_memory: int, *, longest: bool = False) -> str:
    """The changes of one kind that make the run fit; without one, those that bring it nearer."""
    room = shape, frozen_shape, gpu_memory
    _, lacking = _problem(config, *room, longest=longest)
    share = complete(replace(config, vllm_gpu_memory_utilization=None), *room).vllm_gpu_memory_utilization
    enough, nearer = [], []
    for kind in possible_changes(config, shape, frozen_shape, share=share):
        lacks = [_problem(changed(config, change), *room, longest=longest)[1] for change in kind]
        if 0 in lacks:
            enough.append(in_words(kind[lacks.index(0)]))
        elif lacks and lacks[0] < lacking:
            nearer.append(in_words(kind[0]))
    if enough:
        return f"give {'; or '.join(enough)}"
    if nearer:
        return f"no change of one kind is enough, combine: {'; '.join(nearer)}"
    return "it takes GPUs with more memory, or a smaller model"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
