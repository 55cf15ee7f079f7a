"""The tokenizer and template that ms-swift has for a model's folder."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from actors.model_folder import origin


def load_processor(config: Any) -> Any:
    """The tokenizer with what ms-swift knows of the model.

    ms-swift knows a model by the name of its folder, or of the one that it was made from. Otherwise it may fit several types
    (Qwen3ForCausalLM: qwen3, qwen3_emb, qwen3_reranker): the one named as config.json's `model_type` is taken.
    """
    from swift.model import get_matched_model_meta, get_processor

    model_type = config.model_type
    described = os.path.join(config.model, "config.json")
    known = get_matched_model_meta(config.model)
    if known is None and model_type is None and (known := get_matched_model_meta(origin(config.model))) is not None:
        processor = get_processor(config.model, model_type=known.model_type, use_hf=config.use_hf, download_model=False)
        processor.model_meta = known  # of that one model: of the type alone ms-swift takes one for all of its models
        return processor
    named_by_folder = known or os.path.exists(os.path.join(config.model, "args.json"))
    if model_type is None and os.path.exists(described) and not named_by_folder:
        from swift.model.model_meta import get_matched_model_types

        with open(described) as file:
            model = json.load(file)
        stored = (model.get("architectures") or [""])[0]
        architecture = re.sub("(ForSequenceClassification|Model)$", "ForCausalLM", stored)  # what ms-swift knows it by
        fitting = get_matched_model_types([architecture] if stored else None)
        if architecture != stored and len(fitting) == 1:
            model_type = fitting[0]
        if len(fitting) > 1:
            if model.get("model_type") not in fitting:
                raise ValueError(
                    f"{config.model} may be one of ms-swift's model types {', '.join(fitting)}: say which, with --model_type"
                )
            model_type = model["model_type"]
    return get_processor(config.model, model_type=model_type, use_hf=config.use_hf, download_model=False)


def own_template(processor: Any, backend: str) -> str | None:
    """The template named as the model type, where ms-swift cannot choose among several; jinja needs none."""
    meta = processor.model_meta
    several = meta.candidate_templates
    if meta.template is not None or len(several) < 2:
        return None
    if meta.model_type in several:
        return meta.model_type
    if backend == "jinja":
        return "dummy"
    raise ValueError(
        f"ms-swift has several templates for {meta.model_type}: give --template, one of {', '.join(several)}; "
        "or --template_backend jinja for the tokenizer's own"
    )
