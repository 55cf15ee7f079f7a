"""Models with a head, or without an output layer, against Hugging Face in float32 under every layout of one or two ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.head_losses import classification_loss, embedding_loss, embedding_values, reranker_loss, rm_loss
from rlhf.records import RowTokens, SequenceRef, Shard
from tests.one_step import FLOAT64, assert_same_gradients
from tests.policy_ranks import policy_config, random_rows

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2-sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {},
}
DIVIDED = ("tp2", "tp2-sp", "pp2")  # the model's layouts; "one" and "dp2" divide the batch alone
SIZES = {"one": 1}
SLOW = ("tp2", "pp2")  # tp2-sp is the hardest
all_layouts = pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LAYOUTS]
)
SEQUENCES = 12
YES, NO = 9, 11  # token ids
ROWS_OF = {  # task: targets of each row of sequences; all rows together have SEQUENCES
    "rm": [[(0.3 * row,)] * 2 for row in range(6)],
    "seq_cls": [[(float(row % 3),)] for row in range(12)],
    "reranker": [[(1.0,), (0.0,), (0.0,)]] * 4,
    "generative_reranker": [[(1.0,), (0.0,), (0.0,)]] * 4,
    "embedding": [[(1.0, 1.0), (0.0, 1.0), (0.0, 1.0)]] * 4,
    "pairs": [[(1.0, float(row % 2)), (0.0, float(row % 2))] for row in range(6)],
}
TASK = {"pairs": "embedding"}
LOSSES = {
    "rm": {"rm": partial(rm_loss, center_rewards_coefficient=0.1)},
    "seq_cls": {"single": partial(classification_loss, problem_type="single_label_classification")},
    "reranker": {
        name: partial(reranker_loss, loss_type=name, num_documents=12, num_groups=4, num_trained_groups=4)
        for name in ("pointwise_reranker", "listwise_reranker")
    },
    "embedding": {
        "infonce": partial(embedding_loss, loss_type="infonce", in_batch=True, include_qq=True, include_dd=True),
        "infonce-own": partial(embedding_loss, loss_type="infonce", temperature=0.5),
    },
    "pairs": {
        name: partial(embedding_loss, loss_type=name) for name in ("cosine_similarity", "contrastive", "online_contrastive")
    },
}
LOSSES["generative_reranker"] = LOSSES["reranker"]
LOSSES["embedding"]["infonce-mrl"] = partial(LOSSES["embedding"]["infonce"], mrl_dims={16: 1.0, 48: 0.5})
WHOLE = ("infonce", "infonce-mrl", "online_contrastive")  # they compare all rows of the global batch
CASES = [(task, name) for task, losses in LOSSES.items() for name in losses]
AUTO = {"embedding": AutoModel, "pairs": AutoModel, "generative_reranker": AutoModelForCausalLM}


@pytest.fixture(scope="module")
def rows() -> RowTokens:
    return random_rows(SEQUENCES)


def config_of(model: Path, task: str, **options: Any):
    tokens = {f"GENERATIVE_RERANKER_{name}_TOKEN": token_of(model, word) for name, word in (("POSITIVE", YES), ("NEGATIVE", NO))}
    settings = {
        "task": TASK.get(task, task),
        "num_labels": 3 if task == "seq_cls" else None,
        "problem_type": "single_label_classification" if task == "seq_cls" else None,
        "environment": tokens if task == "generative_reranker" else {},
    }
    return policy_config(model, **settings | options)


def token_of(model: Path, token_id: int) -> str:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model).convert_ids_to_tokens(token_id)


def head_shards(rows: RowTokens, source: Any, task: str, split: list[list[list[int]]]) -> list[Shard]:
    """`split[data rank][micro batch]` names rows of ROWS_OF[task]."""
    targets, starts, start = ROWS_OF[task], [], 0
    for row in targets:
        starts.append(start)
        start += len(row)

    def sequences(row: int) -> list[SequenceRef]:
        return [
            SequenceRef(source=0, item=item, key=item, length=len(rows.token_ids[item]), weight=1 / len(targets), targets=target)
            for item, target in enumerate(targets[row], starts[row])
        ]

    def shard(micro_batches: list[list[int]]) -> Shard:
        parts = tuple(tuple(sequence for row in part for sequence in sequences(row)) for part in micro_batches)
        return Shard(sources=(source,), micro_batches=parts, num_tokens=0, num_sequences=SEQUENCES)

    return [shard(micro_batches) for micro_batches in split]


def even_split(task: str, ranks: int, micro_batches: int) -> list[list[list[int]]]:
    """Rows dealt out; the micro batches of a rank differ in size where they do not divide."""
    parts = np.array_split(np.arange(len(ROWS_OF[task])), ranks * micro_batches)
    return [[part.tolist() for part in parts[rank::ranks]] for rank in range(ranks)]


def outputs(values, batch):
    return values


def values_of(group: Any, shards: list[Shard], values: Any) -> list[dict[int, np.ndarray]]:
    return group.on_shards("sequence_values", shards, values)


def hugging_face_model(folder: Path, task: str) -> torch.nn.Module:
    kind = AUTO.get(task, AutoModelForSequenceClassification)
    return kind.from_pretrained(folder, dtype=torch.float32)


def hugging_face_outputs(hf: torch.nn.Module, task: str, rows: RowTokens) -> torch.Tensor:
    """[SEQUENCES, K], each sequence alone."""
    results = []
    for ids in rows.token_ids:
        found = hf(input_ids=torch.from_numpy(ids.astype(np.int64))[None])
        if task == "generative_reranker":
            results.append(found.logits[0, -1, YES : YES + 1] - found.logits[0, -1, NO : NO + 1])
        elif AUTO.get(task) is AutoModel:
            results.append(torch.nn.functional.normalize(found.last_hidden_state[0, -1], dim=-1))
        else:
            results.append(found.logits[0])
    return torch.stack(results)


def written_out(name: str, task: str, values: torch.Tensor) -> torch.Tensor:
    """The loss of the whole batch, from its outputs [SEQUENCES, K], as its definition reads."""
    if name == "rm":
        gaps = [values[2 * row, 0] - values[2 * row + 1, 0] - 0.3 * row for row in range(6)]
        centers = [(values[2 * row, 0] + values[2 * row + 1, 0]) ** 2 for row in range(6)]
        return sum(torch.log1p(torch.exp(-gap)) + 0.1 * center for gap, center in zip(gaps, centers)) / 6
    if name == "single":
        return -sum(values[row].log_softmax(0)[row % 3] for row in range(12)) / 12
    if name == "pointwise_reranker":
        signs = [1 if row % 3 == 0 else -1 for row in range(12)]
        return sum(torch.log1p(torch.exp(-sign * value)) for sign, value in zip(signs, values[:, 0])) / 12
    if name == "listwise_reranker":
        return -sum(values[start : start + 3, 0].log_softmax(0)[0] for start in range(0, 12, 3)) / 4
    if name == "infonce-own":
        return -sum((values[i + 1 : i + 3] @ values[i] / 0.5).log_softmax(0)[0] for i in range(0, 12, 3)) / 4
    if name == "infonce-mrl":
        parts = [values[:, :dim] / values[:, :dim].norm(dim=1, keepdim=True) for dim in (16, 48)]
        return written_out("infonce", task, parts[0]) + 0.5 * written_out("infonce", task, parts[1])
    if name == "infonce":
        total = 0.0
        for i in range(0, 12, 3):
            documents = [j for j in range(12) if j % 3]
            compared = [values[i + 1] @ values[i]]
            compared += [values[j] @ values[i] for j in documents if j != i + 1]
            compared += [values[j] @ values[i] for j in range(0, 12, 3) if j != i]
            compared += [values[j] @ values[i + 1] for j in documents if j != i + 1]
            total = total - (torch.stack(compared) / 0.1).log_softmax(0)[0]
        return total / 4
    distances = [1 - values[2 * row] @ values[2 * row + 1] for row in range(6)]
    related, others = distances[1::2], distances[0::2]
    if name == "cosine_similarity":
        return (sum(d**2 for d in related) + sum((1 - d) ** 2 for d in others)) / 6
    near = [(0.5 - d).clamp(min=0) ** 2 for d in others]
    if name == "contrastive":
        return (sum(d**2 for d in related) + sum(near)) / 12
    farthest, nearest = max(related).item(), min(others).item()
    hard = [d**2 for d in related if d.item() > nearest] + [n for n, d in zip(near, others) if d.item() < farthest]
    return sum(hard)


@all_layouts
@pytest.mark.parametrize("task", ["rm", "seq_cls", "embedding", "generative_reranker"])
def test_outputs_are_those_of_the_saved_model_in_hugging_face(hosts, model, rows, source, tmp_path, task, layout):
    ranks = SIZES.get(layout, 2)
    group = hosts.start(config_of(model, task, **LAYOUTS[layout]), ranks)
    shards = head_shards(rows, source, task, even_split(task, group.data_size, 2))
    found = {key: value for part in values_of(group, shards, outputs) for key, value in part.items()}
    group.call("save", str(tmp_path), 0)
    expected = hugging_face_outputs(hugging_face_model(tmp_path, task), task, rows).detach()
    assert sorted(found) == list(range(SEQUENCES))
    np.testing.assert_allclose(np.stack([found[key] for key in range(SEQUENCES)]), expected, atol=1e-5)


@pytest.fixture(scope="module")
def headed(hosts, model, tmp_path_factory):
    """Folders of models with a head, by task: what a run starts from that continues another."""
    folders = {}
    for task in ROWS_OF:
        folders[task] = tmp_path_factory.mktemp(task)
        hosts.start(config_of(model, task), 1).call("save", str(folders[task]), 0)
    return folders


@pytest.fixture(scope="module")
def expected(headed, rows):
    """Loss and gradient norm of each case by Hugging Face and torch alone."""
    found = {}
    for task, name in CASES:
        hf = hugging_face_model(headed[task], task)
        loss = written_out(name, task, hugging_face_outputs(hf, task, rows))
        loss.backward()
        squares = [(parameter.grad**2).sum() for parameter in hf.parameters() if parameter.grad is not None]
        found[task, name] = loss.item(), torch.stack(squares).sum().sqrt().item()
    return found


def batch_values_of(group: Any, shards: list[Shard], name: str) -> list[ray.ObjectRef] | None:
    return [ray.put(part) for part in values_of(group, shards, embedding_values)] if name in WHOLE else None


STILL = {"lr": 0.0, "weight_decay": 0.0, "clip_grad": 0.0}


@pytest.mark.parametrize("layout", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in DIVIDED])
@pytest.mark.parametrize("task", LOSSES)
def test_losses_and_gradients_are_those_of_hugging_face(hosts, headed, rows, source, expected, task, layout):
    group = hosts.start(config_of(headed[task], task, **LAYOUTS[layout], **STILL), 2)
    shards = head_shards(rows, source, task, even_split(task, 1, 2))
    for name, loss in LOSSES[task].items():
        metrics = group.train_step(shards, loss, None, None, batch_values_of(group, shards, name))
        assert (metrics["loss"], metrics["grad_norm"]) == pytest.approx(expected[task, name], rel=2e-5), name


@pytest.mark.parametrize("task", LOSSES)
def test_losses_and_gradients_do_not_depend_on_the_split(hosts, headed, rows, source, expected, task):
    """1, 2 and 4 micro batches of one data rank, 1 and 2 of each of two: the loss and the norm are those of Hugging Face."""
    steps: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in LOSSES[task]}
    for ranks, micro_batches in ((1, (1, 2, 4)), (2, (1, 2))):
        group = hosts.start(config_of(headed[task], task, **FLOAT64, **STILL), ranks)
        for shards in (head_shards(rows, source, task, even_split(task, ranks, count)) for count in micro_batches):
            for name, loss in LOSSES[task].items():
                values = batch_values_of(group, shards, name)
                metrics = group.train_step(shards, loss, None, None, values)
                assert (metrics["loss"], metrics["grad_norm"]) == pytest.approx(expected[task, name], rel=2e-5), name
                steps[name].append(group.gradients(shards, loss, None, None, values))
    for gradients in steps.values():
        assert_same_gradients(gradients)


def adapter_loss(task: str):
    return next(iter(LOSSES[task].values()))


@pytest.mark.parametrize(
    ("layout", "whole"),
    [
        ("one", []),
        ("tp2-sp", []),
        pytest.param("pp2", [], marks=pytest.mark.slow),
        pytest.param("tp2-sp", ["word_embeddings"], marks=pytest.mark.slow),
        ("pp2", ["word_embeddings"]),
    ],
)
@pytest.mark.parametrize("task", ["rm", "pairs"])
def test_an_adapter_and_what_is_trained_with_it_load_in_peft_and_merged_and_resume(
    hosts, model, rows, source, tmp_path, task, layout, whole
):
    from peft import PeftModel

    config = config_of(model, task, **LAYOUTS[layout], tuner_type="lora", lr=1e-2, train_iters=10, modules_to_save=whole)
    ranks = SIZES.get(layout, 2)
    shards = head_shards(rows, source, task, even_split(task, 1, 2))

    def found(group: Any) -> np.ndarray:
        by_key = values_of(group, shards, outputs)[0]
        return np.stack([by_key[key] for key in range(SEQUENCES)])

    group = hosts.start(config, ranks)
    before = found(group)
    for _ in range(2):
        group.train_step(shards, adapter_loss(task))
    after = found(group)
    assert np.abs(after - before).max() > 1e-2
    group.call("save", str(tmp_path), 2)
    third = group.train_step(shards, adapter_loss(task))

    labels = {"num_labels": 1} if task == "rm" else {}
    kind = AUTO.get(task, AutoModelForSequenceClassification)
    adapted = PeftModel.from_pretrained(kind.from_pretrained(model, dtype=torch.float32, **labels), tmp_path)
    for hf in (adapted, hugging_face_model(tmp_path / "merged", task)):
        np.testing.assert_allclose(after, hugging_face_outputs(hf, task, rows).detach(), atol=1e-5)

    group = hosts.start(config, ranks)
    assert group.call("load", str(tmp_path))[0] == 2
    np.testing.assert_allclose(found(group), after, atol=1e-6)
    assert group.train_step(shards, adapter_loss(task)) == pytest.approx(third, rel=1e-5)


def test_a_run_with_a_head_goes_on_from_its_checkpoint_under_another_layout(hosts, model, rows, source, tmp_path):
    shards = head_shards(rows, source, "rm", even_split("rm", 1, 2))
    group = hosts.start(config_of(model, "rm"), 1)
    group.train_step(shards, adapter_loss("rm"))
    group.call("save", str(tmp_path), 1)
    second = group.train_step(shards, adapter_loss("rm"))
    group = hosts.start(config_of(model, "rm", tensor_model_parallel_size=2, sequence_parallel=True), 2)
    group.call("load", str(tmp_path))
    assert group.train_step(shards, adapter_loss("rm")) == pytest.approx(second, rel=1e-4)


def test_a_new_head_is_the_same_on_all_ranks_and_depends_on_the_seed(hosts, model, rows, source):
    found = []
    for seed, layout in ((42, "one"), (42, "tp2"), (42, "pp2"), (43, "one")):
        group = hosts.start(config_of(model, "rm", seed=seed, **LAYOUTS[layout]), SIZES.get(layout, 2))
        found.append(values_of(group, head_shards(rows, source, "rm", even_split("rm", 1, 1)), outputs)[0][0][0])
    assert found[1:3] == pytest.approx([found[0]] * 2, abs=1e-5) and abs(found[3] - found[0]) > 1e-3


def test_a_classifier_of_hugging_face_is_read(hosts, rows, source, model, tmp_path):
    hf = AutoModelForSequenceClassification.from_pretrained(model, num_labels=3, dtype=torch.float32)
    hf.config.problem_type = "multi_label_classification"
    hf.save_pretrained(tmp_path / "hf")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "hf")
    group = hosts.start(config_of(tmp_path / "hf", "seq_cls", problem_type="multi_label_classification"), 1)
    shards = head_shards(rows, source, "seq_cls", even_split("seq_cls", 1, 2))
    by_key = values_of(group, shards, outputs)[0]
    expected = hugging_face_outputs(hf, "seq_cls", rows).detach()
    np.testing.assert_allclose(np.stack([by_key[key] for key in range(SEQUENCES)]), expected, atol=1e-5)
