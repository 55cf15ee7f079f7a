"""How the layers of a model are spread over the stages of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.config import Config, FrozenRole


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """`size` stages: the first and the last one hold so many layers where that is given, the others share the rest evenly."""

    size: int = 1
    first: int | None = None
    last: int | None = None

    def stages(self, num_layers: int) -> list[int]:
        """Layers of each stage. ValueError when they cannot be spread so."""
        given = {"decoder_first_pipeline_num_layers": self.first, "decoder_last_pipeline_num_layers": self.last}
        ends = {name: layers for name, layers in given.items() if layers is not None}
        if not ends:
            if num_layers % self.size:
                raise ValueError(f"pipeline_model_parallel_size {self.size} does not divide the model's {num_layers} layers")
            return [num_layers // self.size] * self.size
        named = " and ".join(f"{name} {layers}" for name, layers in ends.items())
        if self.size == 1:
            raise ValueError(f"{named} needs --pipeline_model_parallel_size 2 or more")
        stages, layers = self.size - len(ends), num_layers - sum(ends.values())
        if not _spreads(layers, stages):
            raise ValueError(
                f"{named}: of the model's {num_layers} layers {layers} are left, which the other stages ({stages}) cannot share "
                "evenly"
            )
        middle = [layers // stages] * stages if stages else []
        return [*filter(None, [self.first]), *middle, *filter(None, [self.last])]


def _spreads(layers: int, stages: int) -> bool:
    return layers == 0 if stages == 0 else layers > 0 and layers % stages == 0


def policy_pipeline(config: Config) -> Pipeline:
    """That of the policy."""
    return Pipeline(
        size=config.pipeline_model_parallel_size,
        first=config.decoder_first_pipeline_num_layers,
        last=config.decoder_last_pipeline_num_layers,
    )


def frozen_pipeline(config: Config, role: FrozenRole) -> Pipeline:
    """That of a frozen group: the policy's where both have one model and equally many stages, otherwise even."""
    size = role.pipeline_model_parallel_size or config.pipeline_model_parallel_size
    if role.model is None and size == config.pipeline_model_parallel_size:
        return policy_pipeline(config)
    return Pipeline(size=size)
