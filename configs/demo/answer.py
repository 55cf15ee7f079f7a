"""Greedy answers of a saved model folder, by vLLM: prints the share that is right.

usage: answer.py QUESTIONS.jsonl MODEL_DIR
"""

from __future__ import annotations

import json
import os
import sys

os.environ.update(VLLM_PLUGINS="", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_ENABLE_V1_MULTIPROCESSING="0")
os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1")


def main() -> None:
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    questions, folder = sys.argv[1:]
    rows = [json.loads(line) for line in open(questions)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False) for row in rows]
    prompts = [{"prompt_token_ids": tokenizer(text, add_special_tokens=False).input_ids} for text in texts]
    engine = LLM(folder, dtype="float32", max_model_len=32, enforce_eager=True)
    answers = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    print(sum(answer.outputs[0].text == row["solution"] for answer, row in zip(answers, rows)) / len(rows))


if __name__ == "__main__":
    main()
