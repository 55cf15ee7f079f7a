"""report.html: its numbers are the run's numbers, it is one page on its own, and nobody's text becomes markup."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf.charts import Series, line_chart, number, round_ticks, thin
from rlhf.report import write_report

PATH = re.compile(r'<polyline class="line"[^>]*points="([^"]*)"')


class Page(HTMLParser):
    """Tags with their attributes, hover texts, and the figures by their title."""

    def __init__(self, file: Path):
        super().__init__()
        self.source = file.read_text()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.titles: list[str] = []
        self.text: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        (self.titles if self.open[-1:] == ["title"] else self.text).append(data)

    def figure(self, title: str) -> str:
        start = self.source.index(f"<figcaption><b>{title}</b>")
        return self.source[start : self.source.index("</figure>", start)]


def write_run(folder: Path, rows: list[dict], samples: list[dict] = (), args: dict | None = None) -> Page:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    if args:
        (folder / "args.json").write_text(json.dumps(args))
    return Page(write_report(folder))


def row(step: int, **metrics) -> dict:
    return {"step": step, "seconds": {"generate": 2.0, "train": 1.0, "step": 3.5}} | metrics


def sample(step: int, prompt: str, response: str, reward: float | None = 1.0) -> dict:
    return {
        "step": step,
        "prompt_index": 0,
        "prompt": [{"role": "user", "content": prompt}],
        "response": response,
        "reward": reward,
        "by_function": {"accuracy": reward},
        "finish_reason": "stop",
        "response_length": 3,
        "weight_version": step,
    }


def test_every_step_says_its_values_when_pointed_at(tmp_path):
    page = write_run(tmp_path, [row(i, reward=i / 8, reward_std=0.25, kl=i * 1e-5) for i in range(1, 7)])
    assert "step 3\nreward 0.375 ± 0.25" in page.titles
    assert "step 6\nkl 6e-5" in page.titles
    assert "step 1\ngenerate 2\ntrain 1\nother 0.5" in page.titles


def test_the_curve_is_drawn_at_the_measured_values(tmp_path):
    values = [0.0, 4.0, 1.0, 3.0]
    page = write_run(tmp_path, [row(i + 1, loss=value) for i, value in enumerate(values)])
    points = [tuple(map(float, pair.split(","))) for pair in PATH.search(page.figure("Loss"))[1].split()]
    xs, ys = zip(*points)
    assert xs[1] - xs[0] == pytest.approx(xs[3] - xs[2], abs=0.2)  # pixels
    shares = [(ys[0] - y) / (ys[0] - ys[1]) for y in ys]
    assert shares == pytest.approx([value / 4 for value in values], abs=0.01)


def test_a_value_that_is_missing_leaves_a_gap(tmp_path):
    page = write_run(tmp_path, [row(i, kl=None if i == 3 else 0.1 * i) for i in range(1, 6)])
    lines = PATH.findall(page.figure("KL to the reference"))
    assert [len(line.split()) for line in lines] == [2, 2]


def test_bars_are_as_high_as_the_seconds_of_their_phases(tmp_path):
    page = write_run(tmp_path, [row(1), row(2)])
    bars = re.findall(r'height="([\d.]+)" fill="var\(--c(\d)\)"', page.figure("Time per phase"))
    generate, train, other = (float(height) for height, _ in bars[:3])
    assert generate / train == pytest.approx(2.0, rel=0.01) and train / other == pytest.approx(2.0, rel=0.02)


def test_the_head_numbers_are_means_of_the_last_ten_steps(tmp_path):
    page = write_run(tmp_path, [row(i, reward=0.0 if i <= 5 else 0.8) for i in range(1, 16)])
    assert "<dt>Reward</dt><dd>0.8<small>first step 0</small></dd>" in page.source
    assert "15 steps in 52 s" in page.source  # 15 x 3.5 s


def test_a_supervised_run_has_no_charts_of_what_it_did_not_measure(tmp_path):
    rows = [row(1, loss=2.0, lr=1e-4), row(2, loss=1.0, lr=1e-4)]
    page = write_run(tmp_path, rows, args={"task": "sft", "beta": 0.04})
    titles = re.findall(r"<figcaption><b>([^<]*)</b>", page.source)
    assert titles == ["Loss", "Learning rate", "Time per phase"]
    assert "beta" not in "".join(page.text)


def test_text_of_models_and_users_never_becomes_markup(tmp_path):
    attack = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>"
    samples = [sample(1, attack, attack), sample(2, attack, attack)]
    metrics = {"reward/<b>x": 1.0, "reward/<i>y": 1.0, "reward_failures/<u>z": 1, "unscored": 1}
    args = {"task": "grpo", "model": attack, "dataset": [attack], "system": attack}
    page = write_run(tmp_path / "<b>run", [row(1, **metrics), row(2, **metrics)], samples, args)
    assert not {"script", "img", "u"} & {tag for tag, _ in page.tags}
    assert page.source.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_the_page_asks_for_nothing_from_outside(tmp_path):
    page = write_run(tmp_path, [row(1, loss=1.0)])
    assert not {"src", "href"} & {name for _, attributes in page.tags for name in attributes}
    assert "url(" not in page.source and "@import" not in page.source
    policy = [attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_the_same_prompt_is_shown_before_and_after(tmp_path):
    samples = [sample(1, "one?", "bad"), sample(1, "two?", "x"), sample(5, "three?", "x"), sample(9, "one?", "good")]
    source = write_run(tmp_path, [row(1), row(9)], samples).source
    places = [source.index(text) for text in ("one?", "Step 1<", ">bad<", "Step 9<", ">good<")]
    assert places == sorted(places)
    assert "two?" not in source and "three?" not in source


def test_other_prompts_of_the_last_step_are_shown_when_none_came_twice(tmp_path):
    samples = [sample(1, "one?", "early"), sample(4, "four?", "middle"), sample(9, "nine?", "late")]
    source = write_run(tmp_path, [row(1), row(9)], samples).source
    assert ">early<" in source and ">late<" in source and ">middle<" not in source
    assert "none came up twice" in source


def test_reward_failures_are_counted_by_kind(tmp_path):
    failed = {"unscored": 3, "reward_failures/timeout": 2, "reward_failures/raised": 1}
    page = write_run(tmp_path, [row(1, reward=1.0), row(2, **failed), row(3, **failed)])
    assert "<td>timeout</td><td>4</td><td>2</td><td>2</td>" in page.source
    assert "Reward failures" not in write_run(tmp_path / "clean", [row(1, reward=1.0)]).source


def test_an_unfinished_last_line_is_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row(1, loss=1.0)) + '\n{"step": 2, "lo')
    assert "1 step in" in write_report(tmp_path).read_text()


def test_a_run_without_a_finished_step_has_no_report(tmp_path):
    assert write_report(tmp_path) is None


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, (0, 0.25, 0.5, 0.75, 1)),
        (-0.03, 0.03, (-0.02, 0, 0.02)),
        (0, 9000, (0, 2500, 5000, 7500)),
        (3e-7, 9e-7, (4e-7, 6e-7, 8e-7)),
    ],
)
def test_ticks_are_round_numbers(low, high, ticks):
    assert round_ticks(low, high, 4) == pytest.approx(ticks, abs=1e-12)


def test_long_runs_are_thinned_by_means_and_keep_missing_values():
    assert thin([1.0, 3.0, None, 5.0, None, None, 7.0], 4) == [2.0, 5.0, None, 7.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.1235"), (12345.6, "12,346"), (1.25e-6, "1.25e-6"), (0, "0"), (None, "–"), (-3, "-3")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_a_curve_that_hardly_moves_is_drawn_as_a_level_line():
    """The learning rate at the start of a very long cosine."""
    rates = [0.001, 0.00099999999975326, 0.0009999999990130395]
    chart = line_chart([1, 2, 3], [Series(name="lr", values=rates)], window=1)
    heights = {float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', chart)}
    assert len(heights) == 1
