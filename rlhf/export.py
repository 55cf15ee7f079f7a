"""`megaray export`: one conversion from a checked config, and the comparison of what was read with what was written.

Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlhf.checkpoint import require_intact
from rlhf.config import Config
from rlhf.export_check import conversion
from rlhf.megatron_folder import MEGATRON, TENSORS
from rlhf.run import on_cluster

if TYPE_CHECKING:
    from actors.group import ActorGroup, RankGroup
    from rlhf.cluster import Cluster

BARS = {"float32": 1e-4, "bfloat16": 0.1}  # mean difference of two logits that is still rounding
REPLACED = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", TENSORS, "controller.json", "manifest.json")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of two models' logits at the same tokens."""

    mean: float
    largest: float
    agreeing: int  # tokens at which both find the same next token likeliest
    tokens: int

    @classmethod
    def of(cls, a: np.ndarray, b: np.ndarray) -> Difference:
        """`a`, `b`: [T, V] float32."""
        apart = np.abs(a - b)
        agreeing = int((a.argmax(-1) == b.argmax(-1)).sum())
        return cls(mean=float(apart.mean()), largest=float(apart.max()), agreeing=agreeing, tokens=len(a))

    def __str__(self) -> str:
        return f"mean {self.mean:.3g}, largest {self.largest:.3g}, likeliest token equal at {self.agreeing} of {self.tokens}"


def export(config: Config) -> int:
    """Convert, and compare when asked; the exit status."""
    if config.mcore_model is not None:
        require_intact(Path(config.mcore_model))
    return on_cluster(config, convert)


def convert(cluster: Cluster) -> int:
    """The conversion that the config asks for; the exit status."""
    from rlhf.roles import build_exporter, build_hugging_face

    config = cluster.config
    asked, output = conversion(config), config.output_dir
    if asked != "compare":
        _clear(Path(output))
    if asked == "merge_lora":
        return _merge(build_hugging_face(cluster), config)
    ranks = build_exporter(cluster)
    if asked != "compare":
        ranks.broadcast("save_megatron" if asked == "to_mcore" else "save_hugging_face", output)
        print(f"wrote {output}")
    if not config.test_convert_precision:
        return 0
    if asked == "to_mcore":
        ranks.broadcast("read_megatron", output)
    ranks.broadcast("compute_in", config.test_convert_dtype)
    transformers = build_hugging_face(cluster)
    transformers.broadcast("load", output if asked == "to_hf" else config.model)
    transformers.broadcast("compute_in", config.test_convert_dtype)
    token_ids, length = transformers.broadcast("example")[0]
    return _judge(_logits(ranks, token_ids), _logits(transformers, token_ids), length, config, BARS[config.test_convert_dtype])


def _merge(transformers: ActorGroup, config: Config) -> int:
    """Base and adapter to one model, which is compared with the two: weights in bfloat16 are rounded when they are added."""
    adapter, output, dtype = config.adapters[0], config.output_dir, config.test_convert_dtype
    transformers.broadcast("load", config.model, adapter)
    transformers.broadcast("merge", adapter, output)
    print(f"wrote {output}")
    if not config.test_convert_precision:
        return 0
    transformers.broadcast("load", config.model, adapter)
    transformers.broadcast("compute_in", dtype)
    token_ids, length = transformers.broadcast("example")[0]
    apart = _logits(transformers, token_ids)
    transformers.broadcast("load", output)
    transformers.broadcast("compute_in", dtype)
    bar = max(BARS[config.torch_dtype], BARS[dtype])
    return _judge(apart, _logits(transformers, token_ids), length, config, bar)


def _logits(group: RankGroup | ActorGroup, token_ids: np.ndarray) -> np.ndarray:
    """[T, V] float32, from the actor that has them."""
    return next(result for result in group.broadcast("logits", token_ids) if result is not None)


def _judge(a: np.ndarray, b: np.ndarray, length: int, config: Config, bar: float) -> int:
    """Print how far the logits [T, V] are apart; the exit status. `length`: tokens of the example, greedy ones follow."""
    parts = {"example": Difference.of(a[:length], b[:length]), "greedy tokens": Difference.of(a[length:], b[length:])}
    for name, difference in parts.items():
        print(f"logits in {config.test_convert_dtype}, {name}: {difference}")
    worst = max((difference.mean for difference in parts.values()), key=lambda mean: (not np.isfinite(mean), mean))
    if worst <= bar:
        return 0
    print(f"error: the models differ: mean difference of their logits {worst:.3g}, above {bar:g}", file=sys.stderr)
    return 1


def _clear(output: Path) -> None:
    """Make the folder, and take out of it (`exist_ok`) what a reader could take for the new model's."""
    output.mkdir(parents=True, exist_ok=True)
    for old in (file for pattern in REPLACED for file in output.glob(pattern)):
        old.unlink()
    shutil.rmtree(output / MEGATRON, ignore_errors=True)
