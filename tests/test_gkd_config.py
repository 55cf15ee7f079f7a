"""What gkd asks of a command line: options, a teacher with the same tokens, what the plan says."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.config import Config, TeacherRole
from rlhf.counts import frozen_group, rollout_engines, samples
from rlhf.devices import Devices
from rlhf.fit import check_host, fit, refusal
from rlhf.gkd import is_on_policy
from rlhf.memory import frozen_memory, policy_memory, shapes
from rlhf.model_folder import read_shape
from rlhf.options import load_config, parse
from rlhf.phases import offloaded, phases
from rlhf.plan import plan, render
from rlhf.resolution import resolve
from tests.model_json import QWEN25_7B, write_model
from tests.tiny import make_tokenizer

# The published command, word for word.
GUIDE = """
    megatron rlhf
    --rlhf_type gkd
    --model Qwen/Qwen2.5-7B-Instruct
    --teacher_model Qwen/Qwen2.5-72B-Instruct
    --use_hf
    --save_safetensors true
    --dataset /path/to/sft_data.jsonl
    --beta 0.5
    --lmbda 0.5
    --temperature 0.9
    --max_completion_length 512
    --tensor_model_parallel_size 2
    --sequence_parallel true
    --micro_batch_size 4
    --global_batch_size 16
    --finetune true
    --cross_entropy_loss_fusion true
    --lr 1e-5
    --num_train_epochs 1
    --output_dir megatron_output/gkd
    --no_save_optim true
    --no_save_rng true
"""
GIB = 2**30
CPU = Devices(gpus=0, gpu_name="", memory=24 * GIB, cores=2)


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("NPROC_PER_NODE", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def folder(path: Path, *, size: int = 512, change=None, **values) -> Path:
    """A model folder without weights: config.json and a tokenizer, which `change` edits."""
    write_model(path, QWEN25_7B | {"vocab_size": size} | values)
    make_tokenizer().save_pretrained(path)
    if change is not None:
        file = path / "tokenizer.json"
        described = json.loads(file.read_text())
        change(described)
        file.write_text(json.dumps(described))
    return path


def load(student: Path, teacher: Path | None, *options: str) -> Config:
    words = f"rlhf --rlhf_type gkd --model {student} --dataset d.jsonl --train_iters 4".split()
    teacher_words = ["--teacher_model", str(teacher)] if teacher else []
    return load_config([*words, *teacher_words, *options], weights=False)


@pytest.fixture
def student(tmp_path) -> Path:
    return folder(tmp_path / "student")


@pytest.fixture
def teacher(tmp_path) -> Path:
    return folder(tmp_path / "teacher", size=640, num_hidden_layers=8)


def test_the_guides_options_and_defaults(student, teacher):
    config = load(student, teacher)
    assert (config.beta, config.lmbda, config.temperature, config.sft_alpha) == (0.5, 0.5, 0.9, 0.0)
    assert (config.max_completion_length, config.seq_kd, config.gkd_logits_topk) == (512, False, None)
    assert config.teacher == TeacherRole(model=str(teacher)) == load(student, None, "--teacher.model", str(teacher)).teacher
    assert config.max_length == 32768 - 512 and config.vllm_max_model_len == 32768
    assert config.truncation_strategy == "delete" and load(student, teacher, "--lmbda", "1").truncation_strategy == "left"


def test_the_guides_command(student, teacher, monkeypatch):
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    folders = {"Qwen/Qwen2.5-7B-Instruct": str(student), "Qwen/Qwen2.5-72B-Instruct": str(teacher)}
    config = load_config([folders.get(word, word) for word in shlex.split(GUIDE)[1:]], weights=False)
    assert (config.task, config.lmbda, config.beta, config.teacher.model) == ("gkd", 0.5, 0.5, str(teacher))
    assert (config.sequence_parallel, rollout_engines(config), config.micro_batch_size) == (True, 2, 4)


def test_the_shipped_file_is_complete_but_for_models_and_data(student, teacher):
    config = load(student, teacher, "--config", str(Path(__file__).parent.parent / "configs" / "gkd.yaml"))
    assert (config.gkd_logits_topk, config.lmbda, config.global_batch_size) == (64, 0.5, 64)


@pytest.mark.parametrize(("lmbda", "engines"), [("0", 0), ("0.1", 2), ("1", 2)])
def test_engines_are_there_only_for_steps_on_own_responses(student, teacher, lmbda, engines):
    config = load(student, teacher, "--lmbda", lmbda, "--nproc_per_node", "2")
    assert rollout_engines(config) == engines and samples(config) == (engines > 0)


def test_a_policy_with_an_adapter_needs_no_group_to_be_its_own_teacher(student, teacher):
    lora = ("--tuner_type", "lora")
    assert frozen_group(load(student, student, *lora)) is None
    assert frozen_group(load(student, teacher, *lora)) == frozen_group(load(student, student)) == "teacher"
    for option, value in (("teacher.nproc", "1"), ("offload_teacher_model", "true")):
        with pytest.raises(ValueError, match=f"{option} has nothing to act on: with LoRA the policy itself is the teacher"):
            load(student, student, *lora, f"--{option}", value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--temperature 0", "temperature 0 leaves gkd no distributions to compare"),
        ("--beta 1.5", "beta 1.5 of gkd must be at most 1"),
        ("--lmbda 1 --seq_kd true", "--seq_kd has no effect with lmbda 1, where all responses are the policy's own"),
        ("--lmbda 1 --sft_alpha 0.1", "--sft_alpha has no effect with lmbda 1, where all responses are the policy's own"),
        ("--lmbda 2", "--lmbda must be at most 1"),
        ("--packing true --micro_batch_tokens 900", "give --packing or --micro_batch_tokens, not both"),
        ("--gkd_logits_topk 700", "gkd_logits_topk 700 is more than the teacher's 640 tokens"),
        ("--teacher.tensor_model_parallel_size 3", "teacher.tensor_model_parallel_size 3 does not divide the model's 28"),
        ("--teacher.nproc 2", "teacher.nproc 2 is more than the 1 policy ranks whose places it shares"),
        ("--teacher_model_server http://x", "option --teacher_model_server is known but not supported: the teacher is one model"),
        ("--reference.nproc 1", "--reference.nproc is not used by gkd"),
        ("--truncation_strategy right", "truncation_strategy right would cut the question's end"),
    ],
)
def test_settings_that_cannot_work(student, teacher, options, message):
    with pytest.raises(ValueError) as caught:
        load(student, teacher, *options.split())
    assert message in str(caught.value)


def test_a_run_without_a_teacher_is_refused(student):
    for tuner in ("full", "lora"):
        with pytest.raises(ValueError, match="--teacher_model is missing"):
            load(student, None, "--tuner_type", tuner)
    with pytest.raises(ValueError, match="--teacher.model /nowhere: no such folder"):
        load(student, Path("/nowhere"))
    with pytest.raises(ValueError, match="--teacher.model is not used by grpo"):
        parse("rlhf --rlhf_type grpo --teacher_model x".split())


def test_a_teacher_with_another_tokenizer_is_refused_with_the_first_difference(student, tmp_path):
    def exchanged(described):
        vocabulary = described["model"]["vocab"]
        five, nine = (next(token for token, i in vocabulary.items() if i == wanted) for wanted in (5, 9))
        vocabulary[five], vocabulary[nine] = 9, 5

    own = json.loads((student / "tokenizer.json").read_text())["model"]["vocab"]
    five, nine = (next(token for token, i in own.items() if i == wanted) for wanted in (5, 9))
    with pytest.raises(ValueError) as caught:
        load(student, folder(tmp_path / "exchanged", change=exchanged))
    assert f"token 5 is {nine!r} for the teacher, {five!r} for the student" in str(caught.value)

    def added(described):
        described["added_tokens"].append({"id": 600, "content": "<tool>", "special": True})

    with pytest.raises(ValueError, match="token 600 is '<tool>' for the teacher, no token for the student"):
        load(student, folder(tmp_path / "added", size=640, change=added))
    longest = max(own.values())
    with pytest.raises(ValueError, match=f"the tokenizer has the token {longest}, but student or teacher has only {longest}"):
        load(folder(tmp_path / "short", size=longest), student)
    (student / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="student has no tokenizer.json"):
        load(student, folder(tmp_path / "other"))


def test_one_seeded_draw_a_step():
    config = Config(task="gkd", lmbda=0.3, seed=7)
    draws = [is_on_policy(config, position) for position in range(0, 16 * 4000, 16)]
    assert sum(draws) / 4000 == pytest.approx(0.3, abs=0.03)  # 4 standard deviations
    assert draws == [is_on_policy(config, position) for position in range(0, 16 * 4000, 16)]
    assert draws != [is_on_policy(replace(config, seed=8), position) for position in range(0, 16 * 4000, 16)]
    for lmbda, always in ((0.0, False), (1.0, True)):
        assert {is_on_policy(replace(config, lmbda=lmbda), position) for position in range(200)} == {always}


def test_the_teacher_is_counted_in_every_phase(tmp_path):
    """In bfloat16: 2 bytes a weight, and a context of 3 GiB beside the policy's."""
    student = write_model(tmp_path / "student", QWEN25_7B)
    teacher = write_model(tmp_path / "teacher", QWEN25_7B | {"num_hidden_layers": 14})
    base = Config(task="gkd", model=str(student), dataset=["d"], train_iters=3, nproc_per_node=1, max_length=512)
    gpu = 300 * GIB
    config, own = (
        resolve(replace(base, teacher=TeacherRole(model=str(folder)), tuner_type=tuner), read_shape(student))
        for folder, tuner in ((teacher, "full"), (student, "lora"))
    )
    config = replace(config, vllm_gpu_memory_utilization=0.3, offload_model=False, offload_optimizer=False)
    peaks = phases(config, *shapes(config), gpu)
    weights = 2 * read_shape(teacher).num_parameters()
    without = phases(config, shapes(config)[0], None, gpu)
    assert {phase: peaks[phase] - without[phase] for phase in peaks} == dict.fromkeys(peaks, weights + 3 * GIB)
    away = replace(config, offload_model=True)
    assert peaks["generate"] - phases(away, *shapes(away), gpu)["generate"] == weights + 2 * 7_615_616_512
    assert shapes(own)[1] is None and fit(own, *shapes(own), gpu)


def test_a_teacher_that_waits_in_host_memory_is_counted_where_it_is(tmp_path):
    student = write_model(tmp_path / "student", QWEN25_7B)
    teacher = write_model(tmp_path / "teacher", QWEN25_7B | {"num_hidden_layers": 14})
    base = Config(
        task="gkd", model=str(student), dataset=["d"], train_iters=3, nproc_per_node=1, max_length=512,
        vllm_gpu_memory_utilization=0.3, teacher=TeacherRole(model=str(teacher)), micro_batch_tokens=1024,
    )  # fmt: skip
    config = resolve(base, read_shape(student))
    config, gpu = replace(config, offload_model=False, offload_optimizer=False), 300 * GIB
    waits = replace(config, offload_teacher_model=True)
    weights = 2 * read_shape(teacher).num_parameters()
    stays, away = phases(config, *shapes(config), gpu), phases(waits, *shapes(waits), gpu)
    assert {phase: stays[phase] - away[phase] for phase in stays} == dict.fromkeys(stays, weights)
    scores = frozen_memory(config, read_shape(teacher)).activations
    policy = policy_memory(config, read_shape(student))
    assert away["teacher"] == away["train"] + weights + scores - policy.activations
    both = replace(waits, offload_model=True)
    assert offloaded(waits, *shapes(waits)) == weights == offloaded(both, *shapes(both)) - policy.weights
    with pytest.raises(ValueError, match="a node's host memory, there are 1.0: give offload_teacher_model false, offload_model"):
        check_host(waits, *shapes(waits), GIB)
    rows_only = replace(config, lmbda=0.0)
    tight = phases(rows_only, *shapes(rows_only), gpu)["train"] - 1
    assert "offload_teacher_model true; or " in refusal(rows_only, *shapes(rows_only), tight)
    assert set(phases(replace(rows_only, offload_teacher_model=True), *shapes(rows_only), gpu)) == {"train", "teacher"}


def test_the_plan_says_what_the_teachers_logits_take(tmp_path):
    student = write_model(tmp_path / "student", QWEN25_7B)
    base = Config(
        task="gkd", model=str(student), dataset=["d"], train_iters=3, lmbda=0.25, max_length=512,
        teacher=TeacherRole(model=str(student)),
    )  # fmt: skip
    config = resolve(base, read_shape(student))
    text = render(config, plan(config, dataset_rows=4, devices=CPU))
    assert "25% of the steps on the policy's own responses, the others on the dataset's" in text
    assert f"teacher's logits: {2 * 152064:,} bytes a trained token in Ray's object store" in text
    assert "\n  teacher      1 x  with the policy, bundle 0" in text and "reward" not in text
    top_k = replace(config, gkd_logits_topk=64)
    assert "teacher's logits: 512 bytes a trained token" in render(top_k, plan(top_k, dataset_rows=4, devices=CPU))
