"""A Hugging Face folder that lacks a tensor of its model is refused by the tensor's name."""

import pytest
from safetensors.torch import load_file, save_file

from tests.policy_ranks import policy_config
from tests.tiny import make_tiny_model, make_tiny_moe

FILE = "model.safetensors"
ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.1.mlp"
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2, "call_timeout": 5.0}  # so long does the stage wait that lacks nothing


def remove(folder, *names):
    tensors = load_file(folder / FILE)
    for name in names:
        del tensors[name]
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (f"{ATTENTION}.k_proj.weight", {}),
        (f"{ATTENTION}.q_norm.weight", TP2),
        (f"{MLP}.up_proj.weight", {}),
        ("model.layers.0.input_layernorm.weight", {}),
        ("model.embed_tokens.weight", {}),
        ("model.norm.weight", {}),
        ("lm_head.weight", PP2),
    ],
)
def test_a_missing_tensor_is_named(hosts, tmp_path, name, options):
    folder = make_tiny_model(tmp_path)
    remove(folder, name)
    with pytest.raises(ValueError, match=f"{folder} has no tensor {name}, which the model of its config.json needs"):
        hosts.start(policy_config(folder, **options), 2 if options else 1)


def test_a_missing_tensor_of_an_expert_is_named(hosts, tmp_path):
    folder = make_tiny_moe(tmp_path)
    remove(folder, f"{MLP}.experts.5.down_proj.weight")
    with pytest.raises(
        ValueError, match=f"{folder} has no tensor {MLP}.experts.5.down_proj.weight, which the model of its config.json needs"
    ):
        hosts.start(policy_config(folder), 1)


@pytest.mark.parametrize(
    ("task", "options"), [("sft", {"tie_word_embeddings": True}), ("rm", {}), ("seq_cls", {}), ("embedding", {})]
)
def test_what_a_model_has_no_need_of_may_be_missing(hosts, tmp_path, task, options):
    """An output layer, where it is the embedding or a head takes its place; that of scores is new."""
    folder = make_tiny_model(tmp_path, **options)
    if not options:
        remove(folder, "lm_head.weight")
    assert "lm_head.weight" not in load_file(folder / FILE)
    labels = {"num_labels": 3, "problem_type": "single_label_classification"} if task == "seq_cls" else {}
    hosts.start(policy_config(folder, task=task, **labels), 1)
