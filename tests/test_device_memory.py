"""What is said of a device that has too little memory, or that cannot be used."""

from __future__ import annotations

import pytest
import ray
import torch

from actors.device_memory import memory_explained, require_given_gpus


def test_errors_for_want_of_memory_say_in_a_line_what_to_change():
    with pytest.raises(ValueError, match="^training: CUDA out of memory. Tried 2 GiB. In training lower micro_batch_tokens .*"):
        with memory_explained("training"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nGPU 0 has ...")
    told = r"^building: No available memory for the cache blocks. Try x. `megaray plan` shows what each phase needs$"
    with pytest.raises(ValueError, match=told):
        with memory_explained("building"):
            raise ValueError("No available memory for the cache blocks. Try x.")


@pytest.mark.parametrize("error", [ValueError("no such model"), RuntimeError("not found")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, memory_explained("training"):
        raise error
    assert caught.value is error


def test_a_gpu_of_rays_that_torch_cannot_use_is_refused(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: [])
    require_given_gpus()
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: [3])
    with pytest.raises(ValueError, match=r"^Ray gave this process GPU 3, which torch .* cannot use: install torch for .*"):
        require_given_gpus()
