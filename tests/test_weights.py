"""What a weight push does without an engine: checksum, expected names, the receiver's record, the sender's checks."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from actors.megatron.model import flags_on_host
from actors.megatron.parallel import ParallelSizes
from actors.megatron.platform import Platform
from actors.weights.broadcast import Broadcast
from actors.weights.checkpoint_names import CheckpointTensors, checkpoint_dtype, checkpoint_tensors
from actors.weights.checksum import BLOCK, checksum
from actors.weights.ledger import PushError, PushLedger
from actors.weights.packing import ALIGNMENT, pack
from actors.weights.push import push_weights
from actors.weights.transport import CudaIpc, ObjectStore
from rlhf.pipeline import Pipeline
from rlhf.records import Bucket


def random_bytes(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def by_hand(data: torch.Tensor) -> int:
    """The same sum in Python's unbounded integers."""
    words = [int.from_bytes(bytes(data[i : i + 4].tolist()), "little", signed=True) for i in range(0, len(data), 4)]
    total = len(words)
    for place, word in enumerate(words):
        total += word * (2 * (place % BLOCK) + 1) * 0x9E3779B97F4A7C13 ** (place // BLOCK)
    return total % 2**64


def test_checksum_is_the_weighted_sum_of_its_words_modulo_2_to_the_64() -> None:
    for size in (0, 64, 4096):
        assert checksum(random_bytes(size)) == by_hand(random_bytes(size))
    data = torch.zeros(4 * BLOCK + 128, dtype=torch.uint8)
    data[-128:] = random_bytes(128)  # a second block
    assert checksum(data) == by_hand(data)


def test_checksum_sees_every_flipped_bit() -> None:
    data = random_bytes(256)
    sums = {checksum(data)}
    for byte in range(256):
        for bit in range(8):
            data[byte] ^= 1 << bit
            sums.add(checksum(data))
            data[byte] ^= 1 << bit
    assert len(sums) == 1 + 256 * 8


def test_checksum_sees_two_swapped_words_even_if_they_differ_in_sign_alone() -> None:
    values = torch.full((64,), 1.5)
    values[5] = -1.5
    sums = set()
    for place in range(64):
        swapped = values.clone()
        swapped[5], swapped[place] = values[place], values[5]
        sums.add(checksum(swapped.view(torch.uint8)))
    assert len(sums) == 64


def test_checksum_sees_swapped_blocks_and_lost_zeros() -> None:
    data = random_bytes(8 * BLOCK)
    swapped = torch.cat([data[4 * BLOCK :], data[: 4 * BLOCK]])
    assert checksum(swapped) != checksum(data)
    assert checksum(torch.zeros(64, dtype=torch.uint8)) != checksum(torch.zeros(128, dtype=torch.uint8))


def write_checkpoint(folder, names: list[str], config: dict, shards: int = 1) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    files = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: torch.zeros(2, 3) for name in names if files[name] == file}, folder / file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def test_expected_tensors_come_from_every_shard(tmp_path) -> None:
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    write_checkpoint(tmp_path, names, {"tie_word_embeddings": False, "dtype": "bfloat16"}, shards=2)
    save_file({"left.over": torch.zeros(1)}, tmp_path / "other.safetensors")  # not in the index: not the model's
    found = checkpoint_tensors(tmp_path)
    assert found.required == dict.fromkeys(names, (2, 3))
    assert not found.redundant and not found.tied
    assert checkpoint_dtype(tmp_path) == "bfloat16"


@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_output_layer_is_not_required(tmp_path, stored: bool) -> None:
    names = ["model.embed_tokens.weight"] + ["lm_head.weight"] * stored
    write_checkpoint(tmp_path, names, {"tie_word_embeddings": True})
    found = checkpoint_tensors(tmp_path)
    assert list(found.required) == ["model.embed_tokens.weight"]
    assert found.redundant == {"lm_head.weight"} and found.tied


def test_a_folder_without_safetensors_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="no .*safetensors"):
        checkpoint_tensors(tmp_path)


def ledger(*required: str) -> PushLedger:
    tensors = CheckpointTensors(required=dict.fromkeys(required, (2, 3)), redundant=frozenset(["lm_head.weight"]), tied=True)
    return PushLedger(tensors)


def bucket(version: int, *names: str, shape: tuple[int, ...] = (2, 3)) -> Bucket:
    count = len(names)
    return Bucket(
        version=version,
        index=0,
        payload=None,
        size=64 * count,
        names=names,
        dtypes=("float32",) * count,
        shapes=(shape,) * count,
        offsets=tuple(range(0, 64 * count, 64)),
        checksum=0,
    )


def test_a_complete_push_is_acknowledged_and_redundant_tensors_are_not_loaded() -> None:
    record = ledger("a", "b")
    record.begin(1)
    assert record.admit(bucket(1, "a", "lm_head.weight")) == ["a"]
    assert record.admit(bucket(1, "b")) == ["b"]
    assert record.finish(1, ["a", "lm_head.weight", "b"]) == 3


def test_a_push_with_missing_unknown_repeated_or_misshapen_tensors_is_refused_by_name() -> None:
    record = ledger("model.a", "model.b")
    record.begin(1)
    with pytest.raises(PushError, match="unknown tensor 'model.c'"):
        record.admit(bucket(1, "model.c"))
    with pytest.raises(PushError, match=r"'model.a' has shape \(3, 2\) in version 1, the model \(2, 3\)"):
        record.admit(bucket(1, "model.a", shape=(3, 2)))
    record.begin(1)
    record.admit(bucket(1, "model.a"))
    with pytest.raises(PushError, match="'model.a' was sent twice"):
        record.admit(bucket(1, "model.a"))
    with pytest.raises(PushError, match="1 tensors missing: model.b"):
        record.finish(1, ["model.a"])
    with pytest.raises(PushError, match="1 tensors sent but not received: model.b"):
        record.finish(1, ["model.a", "model.b"])


def test_parts_of_another_version_are_refused() -> None:
    record = ledger("a")
    with pytest.raises(PushError, match="no push is open"):
        record.admit(bucket(1, "a"))
    record.begin(2)
    with pytest.raises(PushError, match="version 1 refused: version 2 is being pushed"):
        record.admit(bucket(1, "a"))
    with pytest.raises(PushError, match="version 1 refused: version 2 has already been sent"):
        record.begin(1)
    record.begin(2)  # the same version again, after a failure
    record.fail()
    with pytest.raises(PushError, match="no push is open"):
        record.admit(bucket(2, "a"))


def test_what_comes_late_of_a_push_that_was_given_up_is_refused() -> None:
    record = ledger("a")
    assert not record.give_up(1)  # before its beginning came
    with pytest.raises(PushError, match="version 1 refused: its sender has given it up"):
        record.begin(1)
    record.begin(2)
    assert not record.give_up(1)  # once more, when the next one is there already
    assert record.admit(bucket(2, "a")) == ["a"]
    assert record.give_up(2)
    with pytest.raises(PushError, match="no push is open"):
        record.finish(2, ["a"])


def test_buckets_hold_each_tensor_as_it_was_when_the_next_was_asked_for() -> None:
    """Odd sizes, several dtypes, one tensor larger than a bucket; a tensor's memory is used again for the next."""
    sizes = {33: torch.bfloat16, 5: torch.int64, 70: torch.float32, 1000: torch.float32, 201: torch.float32, 0: torch.float32}
    sizes |= {1: torch.float64}
    weights = {str(size): torch.randn(size, dtype=torch.float64).to(dtype) for size, dtype in sizes.items()}

    def stream():
        for name, values in weights.items():
            lent = values.clone()
            yield name, lent
            lent.fill_(float("nan") if values.is_floating_point() else -1)

    buckets = list(pack(stream(), 1024))
    assert [tensor.name for bucket in buckets for tensor in bucket.tensors] == list(weights)
    assert [len(bucket.tensors) for bucket in buckets] == [3, 1, 3]
    for bucket in buckets:
        assert bucket.checksum() == checksum(bucket.data)
        bucket.require_finite()
        assert bucket.data.numel() % ALIGNMENT == 0 and all(tensor.offset % ALIGNMENT == 0 for tensor in bucket.tensors)
        for name, offset, _ in bucket.tensors:
            raw = weights[name].view(torch.uint8)
            assert torch.equal(bucket.data[offset : offset + raw.numel()], raw)


def test_what_pads_a_bucket_is_zero_though_memory_held_something_else(monkeypatch) -> None:
    """Else a bucket's checksum would depend on it, and NaNs there would look like a tensor's."""
    monkeypatch.setattr(torch, "empty", lambda size, **options: torch.full((size,), 0xFF, **options))
    (bucket,) = pack({"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(20), "c": torch.ones(1)}.items(), 1024)
    expected = torch.zeros(4 * ALIGNMENT, dtype=torch.uint8)
    for start, values in ((0, torch.ones(3, dtype=torch.bfloat16)), (ALIGNMENT, torch.ones(20)), (3 * ALIGNMENT, torch.ones(1))):
        expected[start : start + values.nbytes] = values.view(torch.uint8)
    assert torch.equal(bucket.data, expected)


@pytest.mark.parametrize(("pipeline", "expert", "device"), [(1, 1, "cpu"), (2, 1, "meta"), (1, 2, "meta")])
def test_flags_are_made_on_the_host_where_no_other_rank_has_to_know_them(pipeline: int, expert: int, device: str) -> None:
    sizes = ParallelSizes(tensor=2, pipeline=Pipeline(size=pipeline), sequence=False, expert=expert)
    bridge = SimpleNamespace(torch=torch)
    with pytest.raises(KeyError), flags_on_host(bridge, sizes):
        assert bridge.torch.tensor([True], dtype=torch.bool, device="meta").device.type == device
        assert bridge.torch.Tensor is torch.Tensor
        raise KeyError
    assert bridge.torch is torch


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_that_is_not_finite_is_refused_by_name_and_the_stream_is_read_to_its_end(bad: float, dtype) -> None:
    first = {"first": torch.ones(300, dtype=dtype), "none": torch.ones(0), "counts": torch.full((5,), -1)}
    weights = first | {"second": torch.ones(300, dtype=dtype), "third": torch.ones(3)}
    weights["second"][7] = bad
    stream = iter(weights.items())
    with pytest.raises(PushError, match="'second' is not finite"):
        push_weights(stream, {}, 1)
    assert next(stream, None) is None


@pytest.mark.parametrize(
    ("device", "shared", "kind"),
    [("cuda", True, CudaIpc), ("cuda", False, Broadcast), ("cpu", True, ObjectStore), ("cpu", False, ObjectStore)],
)
def test_weights_reach_engines_by_what_both_devices_have(device: str, shared: bool, kind: type) -> None:
    platform = Platform(device=torch.device(device), backend={"cuda": "nccl", "cpu": "gloo"}[device])
    assert type(platform.transport(shared_device=shared, width=1)) is kind
