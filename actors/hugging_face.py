"""A model in transformers, in a process of its own without Megatron: what conversions are compared with, and PEFT's merge.

On the CPU, whatever the machine has: it is to be independent, and it computes little.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.model_folder import copy_companions, require_model
from actors.progress import Progress

EXAMPLE = (
    "Read this twice, then answer. A train leaves at 8:45 and needs 2 h 50 min; another leaves at 9:10 and needs 2 h 20 min. "
    "Which arrives first, and by how many minutes? 第二列火车早到。 `def minutes(h, m): return 60 * h + m`\n"
)
GREEDY = 32  # tokens that continue the example
OF_A_TOKENIZER = ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")


class HuggingFaceModel:
    """One model after another. Letters: T tokens, V vocabulary."""

    def __init__(self, config: Any):
        self.config = config
        self.progress = Progress()

    @ray.method(concurrency_group="report")
    def report(self) -> str:
        """What it is doing now, and for how long."""
        return self.progress.report()

    def load(self, folder: str, adapter: str | None = None) -> None:
        """The model in `folder`, its weights in `torch_dtype`, with a PEFT adapter if given.

        Raises ValueError when the adapter is not of this model.
        """
        import torch
        from transformers import AutoModelForCausalLM

        require_model(folder)
        with self.progress.doing(f"loading {folder}"):
            self.folder = folder
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, self.config.torch_dtype))
            if adapter is not None:
                self.model = _with_adapter(self.model, folder, adapter)
            self.model.eval()

    def merge(self, adapter: str, output: str) -> None:
        """Add the adapter into the weights for good and write the model, with config and tokenizer, into `output`."""
        with self.progress.doing(f"merging {adapter}"):
            self.model = self.model.merge_and_unload()
            self.model.save_pretrained(output)
            copy_companions(Path(self.folder), Path(output), dtype=self.config.torch_dtype)
            for pattern in OF_A_TOKENIZER:
                for file in Path(adapter).glob(pattern):
                    shutil.copyfile(file, Path(output, file.name))

    def compute_in(self, dtype: str) -> None:
        """From now on compute with the weights, which keep their values, in this dtype."""
        import torch

        self.model.to(getattr(torch, dtype))

    def example(self) -> tuple[np.ndarray, int]:
        """[T] int32: a fixed text and the tokens that greedy search adds to it; and how many the text has."""
        import torch
        from transformers import AutoTokenizer

        with self.progress.doing("greedy search"), torch.no_grad():
            ids = AutoTokenizer.from_pretrained(self.folder)(EXAMPLE, return_tensors="pt").input_ids
            tokens = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=GREEDY,
                max_new_tokens=GREEDY,
            )
            return tokens[0].numpy().astype(np.int32), ids.shape[1]

    def logits(self, token_ids: np.ndarray) -> np.ndarray:
        """[T] int32 -> [T, V] float32."""
        import torch

        with self.progress.doing("logits"), torch.no_grad():
            return self.model(input_ids=torch.from_numpy(token_ids.astype(np.int64))[None]).logits[0].float().numpy()


def _with_adapter(model: Any, folder: str, adapter: str) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError) as error:  # shapes that differ, layers that are not there
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the adapter {adapter} does not fit the model {folder}: {reason}") from error
