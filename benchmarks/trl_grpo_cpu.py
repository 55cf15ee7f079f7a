"""The same work by TRL's GRPOTrainer: seconds a step (median of all but the first), as JSON.

usage: trl_grpo_cpu.py MODEL_DIR PROMPTS.jsonl STEPS PROMPTS_A_STEP RESPONSES TOKENS
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time

os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", VLLM_PLUGINS="")

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_, **__) -> None:
        self.start = time.monotonic()

    def on_step_end(self, *_, **__) -> None:
        self.seconds.append(time.monotonic() - self.start)


def variety(completions, **_):
    return [float(len(set(completion[0]["content"]))) for completion in completions]


def main() -> None:
    model, prompts = sys.argv[1:3]
    steps, count, responses, tokens = map(int, sys.argv[3:7])
    rows = [{"prompt": json.loads(line)["messages"]} for line in open(prompts)]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=count * responses // 4,
        gradient_accumulation_steps=4,
        num_generations=responses,
        max_completion_length=tokens,
        max_steps=steps,
        learning_rate=1e-4,
        beta=0.04,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        temperature=1.0,
        gradient_checkpointing=False,
        generation_kwargs={"min_new_tokens": tokens},
        model_init_kwargs={"dtype": "float32"},
    )
    times = StepTimes()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=variety,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[times],
    )
    trainer.train()
    print(json.dumps({"seconds": statistics.median(times.seconds[1:]), "all": times.seconds}))


if __name__ == "__main__":
    main()
