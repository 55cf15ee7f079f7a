"""Greedy answers of saved model folders, by vLLM: the share that is right, one number a folder, as a JSON list.

usage: answer.py QUESTIONS.jsonl MODEL_DIR [MODEL_DIR ...]
"""

from __future__ import annotations

import json
import os
import sys

os.environ.update(VLLM_PLUGINS="", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_ENABLE_V1_MULTIPROCESSING="0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def main() -> None:
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    questions, *folders = sys.argv[1:]
    rows = [json.loads(line) for line in open(questions)]
    right = []
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [tokenizer.apply_chat_template(r["messages"], add_generation_prompt=True, tokenize=False) for r in rows]
        prompts = [{"prompt_token_ids": tokenizer(text, add_special_tokens=False).input_ids} for text in texts]
        engine = LLM(folder, dtype="float32", max_model_len=32, enforce_eager=True)
        answers = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
        right.append(sum(a.outputs[0].text == r["solution"] for a, r in zip(answers, rows)) / len(rows))
    print(json.dumps(right))


if __name__ == "__main__":
    main()
