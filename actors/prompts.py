"""PromptEncoder: one CPU process that turns conversations into prompts as they come, with the template of training."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np


class PromptEncoder:
    """For questions that are in no dataset."""

    def __init__(self, config: Any):
        self.config = config

    def setup(self) -> tuple[str, ...]:
        """Load the template; the special tokens by which it ends an answer."""
        from actors.encoding import Encoder

        logging.getLogger("swift").setLevel(logging.ERROR)
        self.encoder = Encoder(self.config)
        return self.encoder.end_tokens()

    def encode(self, messages: list[dict[str, Any]]) -> np.ndarray | int:
        """Token ids of the prompt [P] int32; of one with more than max_length tokens that limit: nothing is cut off."""
        encoded = self.encoder.encode({"messages": messages})
        return self.encoder.limit if isinstance(encoded, str) or encoded.truncated else encoded.sequences[-1].token_ids
