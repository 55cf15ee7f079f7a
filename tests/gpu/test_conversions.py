"""Conversions on GPUs: what ranks with Transformer Engine compute is what transformers computes on the CPU."""

from __future__ import annotations

import command
import pytest
from safetensors.torch import load_file


@pytest.mark.parametrize(("dtype", "ranks"), [("float32", 1), ("bfloat16", 2)])
def test_to_megatron_and_back_with_the_precision_measured(gpu_ray, work, dtype, ranks):
    """In float32, so that a wrong weight would show; the second way with 2 tensor ranks."""
    options = ["--torch_dtype", dtype, "--test_convert_precision", "true", "--cpus_per_rank", 0.5]
    megatron, back = work / f"{dtype}-mcore", work / f"{dtype}-hf"
    log = work / f"export-{dtype}.log"
    there = ["--model", work / "model", "--to_mcore", "true", "--output_dir", megatron]
    again = ["--mcore_model", megatron, "--to_hf", "true", "--output_dir", back, "--tensor_model_parallel_size", ranks]
    for words in (there, again):
        status, output = command.run("export", *words, *options, log=log, address=gpu_ray)
        assert status == 0, output[-4000:]
        print(output[-400:])
    source, result = (load_file(folder / "model.safetensors") for folder in (work / "model", back))
    assert source.keys() == result.keys()
    assert [name for name in source if not (source[name].to(result[name].dtype) == result[name]).all()] == []
