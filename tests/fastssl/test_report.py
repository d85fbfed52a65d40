"""The report page: whole runs, stopped runs, runs without labels, and hostile strings."""

from __future__ import annotations

import json
import math
import os
import random
import re
from html.parser import HTMLParser

import matplotlib
import pytest
from PIL import Image

from fastssl.errors import FastSSLError, duration
from fastssl.report.charts import line_chart
from fastssl.report.page import headline, render, write_report
from fastssl.report.run_record import read_run

VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Every tag is closed in order; collects what would be fetched, and scripts."""

    def __init__(self):
        super().__init__()
        self.stack, self.fetched, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        assert all(value.startswith("#") for name, value in attributes if name == "xlink:href")

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def parse(html):
    checker = Checker()
    checker.feed(html)
    assert checker.stack == []
    assert "script" not in checker.tags and "link" not in checker.tags
    assert all(value.startswith("data:image/png;base64,") for value in checker.fetched)
    assert "http" not in html.replace("http-equiv", "") and "nan" not in re.sub(r"base64,[^\"]*", "", html).lower()
    return checker


def step_row(step, **changes):
    row = {
        "kind": "step",
        "step": step,
        "epoch": step / 10,
        "loss": 9 - step / 50,
        "kl": 5 - step / 50,
        "alignment": 0.5,
    }
    row |= {
        "embedding_std": 0.9,
        "lr": 0.1,
        "momentum": 0.99,
        "smoothing": 0.1,
        "pair_per_s": 200.0,
        "view_per_s": 400.0,
        "data_wait": 0.02,
        "seconds": step / 2,
    }
    return row | changes


def probe_row(step, **changes):
    row = {
        "kind": "probe",
        "step": step,
        "epoch": step // 10,
        "knn": 50 + step / 10,
        "feature_std": 0.5,
        "effective_rank": 30.0,
    }
    return row | {"uniformity": -2.0, "seconds": 1.0} | changes


#: The interval of one difference reaches over 0: it is level.
AGAINST = {"random initialisation": {"knn": {"low": 15.0, "high": 25.0}, "linear": {"low": -1.0, "high": 21.0}}}
AGAINST |= {"raw pixels": {"knn": {"low": -9.0, "high": -1.0}, "linear": {"low": -3.2, "high": -0.2}}}


def summary(trained=(70.0, 81.4), random=(50.0, 71.2), raw=(75.0, 83.1), **changes):
    names = ("raw pixels (16x16)", "random initialisation", "after pre-training")
    rows = [{"name": name, "knn": knn, "linear": linear} for name, (knn, linear) in zip(names, (raw, random, trained))]
    return {
        "arch": "mobilenetv3_large",
        "recipe": "quickstart",
        "data": {"name": "photos.beton", "samples": 4000, "classes": 10, "val_name": "val.beton"},
        "device": "cpu",
        "host": {"cpu": "a processor", "cores": 2},
        "versions": {"python": "3.11", "torch": "2.9"},
        "epochs": 10,
        "steps": 100,
        "samples_seen": 40000,
        "train_seconds": 540.0,
        "total_seconds": 600.0,
        "pair_per_s": 231.7,
        "view_per_s": 463.4,
        "data_wait": 0.031,
        "bottleneck": "compute-bound: the network",
        "probe": {
            "note": "judged on val.beton",
            "train_samples": 4000,
            "val_samples": 2000,
            "classes": 10,
            "rows": rows,
        },
        "share": {
            "samples_seen": 40000,
            "full_samples": 256000000,
            "percent": 0.0156,
            "full_recipe": "light-moco-mobilenetv3",
            "text": "this run saw 40,000 photos: 0.016 % of the 256,000,000 of light-moco-mobilenetv3",
        },
        "command": "fastssl pretrain --arch mobilenetv3_large --data photos.beton",
        "verdict": {"state": "learned in part", "text": "learned in part: better than nothing.", "against": AGAINST},
        "skipped": 0,
    } | changes


def make_run(folder, result=None, rows=None, config="recipe: quickstart\narch: mobilenetv3_large\n", pictures=False):
    folder.mkdir()
    rows = [step_row(s) for s in range(10, 101, 10)] + [probe_row(50), probe_row(100)] if rows is None else rows
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config is not None:
        (folder / "config.yaml").write_text(config)
    if result is not None:
        (folder / "summary.json").write_text(json.dumps(result))
    if pictures:
        for name in ("views.png", "neighbours.png"):
            Image.new("RGB", (4, 4)).save(folder / name)
    return folder


def test_teacher_and_reestimated_statistics_have_rows_beside_the_trained_network(tmp_path):
    result = summary()
    result["probe"]["rows"] += [
        {"name": "its teacher", "knn": 60.0, "linear": 61.5},
        {"name": "after pre-training, BatchNorm statistics of centre crops", "knn": 98.0, "linear": 99.0},
    ]
    rows = [step_row(s) | {"target_entropy": 0.5} for s in range(10, 101, 10)]
    html = write_report(make_run(tmp_path / "run", result, rows=[*rows, probe_row(50), probe_row(100)])).read_text()
    assert "linear probe 81.4 %" in html, "the headline is of the network as it was trained"
    assert "<b>61.5</b>" in html and "its teacher" in html and "<b>99.0</b>" in html and "linear -1.7" in html
    assert "Entropy of the target" in html


def test_a_finished_run(tmp_path):
    path = write_report(make_run(tmp_path / "run", summary(), pictures=True))
    assert path == tmp_path / "run" / "report.html" and not (tmp_path / "run" / "report.html.tmp").exists()
    html = path.read_text()
    checker = parse(html)
    assert checker.tags.count("svg") == 8 and checker.tags.count("img") == 2 and checker.tags.count("details") == 1
    for text in (
        "MobileNet-V3-Large was trained on 4,000 photos without labels in 9 min: "
        "linear probe 81.4 %, random initialisation 71.2 %, raw pixels 83.1 %.",
        "<b>Learned in part</b><p>Better than nothing.</p>",
        '<span class="yes">kNN +20.0 &#10003;</span><br><span class="none">linear +10.2 level</span>',
        '<span class="no">kNN -5.0 &#10007;</span><br><span class="no">linear -1.7 &#10007;</span>',
        "<pre><code>fastssl pretrain --arch mobilenetv3_large --data photos.beton</code></pre>",
        "0.016 % of the 256,000,000 of light-moco-mobilenetv3",
        "compute-bound: the network.",
        "recipe: quickstart",
        "a processor",
    ):
        assert text in html, text


def test_a_run_older_than_verdicts_has_its_figures_and_no_judgement(tmp_path):
    result = summary(trained=(70.0, 90.0))
    del result["verdict"], result["command"]
    run = read_run(make_run(tmp_path / "run", result))
    assert headline(run).endswith("linear probe 90.0 %, random initialisation 71.2 %, raw pixels 83.1 %.")
    page = render(run)
    parse(page)
    assert 'class="verdict' not in page and "kNN +20.0" in page and "&#10003;" not in page


def test_colours_and_the_most_frequent_class_have_rows_of_their_own(tmp_path):
    result = summary()
    result["probe"]["rows"][:0] = [
        {"name": "most frequent class", "knn": 33.3, "linear": 33.3},
        {"name": "colour histogram", "knn": 64.0, "linear": 66.0},
    ]
    above = {"knn": {"low": 1.0, "high": 9.0}, "linear": {"low": 1.0, "high": 9.0}}
    result["verdict"]["against"] = {"most frequent class": above, "colour histogram": above}
    page = render(read_run(make_run(tmp_path / "run", result)))
    parse(page)
    names = ["most frequent class", "raw pixels (16x16)", "colour histogram"]
    names += ["random initialisation", "after pre-training"]
    places = [page.index(f"<th scope='row'>{name}</th>") for name in names]
    assert places == sorted(places)
    assert "kNN +36.7 &#10003;" in page and "linear +15.4 &#10003;" in page


def test_figures_that_the_verdict_does_not_compare_have_no_tick(tmp_path):
    """As of photos that were learned from: the figures say nothing."""
    result = summary()
    result["verdict"] = {"state": "not judged", "text": "not judged: nobody knows.", "against": {}}
    page = render(read_run(make_run(tmp_path / "run", result)))
    assert "&#10003;" not in page and "&#10007;" not in page and "level" not in page and "kNN +20.0" in page


def test_without_labels(tmp_path):
    result = summary() | {"probe": {"note": "the photos have no labels", "rows": []}, "share": None}
    rows = [step_row(10), step_row(20), probe_row(20, knn=None)]
    html = render(read_run(make_run(tmp_path / "run", result, rows)))
    parse(html)
    assert "There are no probe figures: the photos have no labels." in html
    assert "<table class='marks'>" not in html and "kNN accuracy" not in html and "Effective rank" in html


def test_null_figures_in_rows(tmp_path):
    html = render(read_run(make_run(tmp_path / "run", summary(trained=(70.0, None), random=(None, None)))))
    parse(html)
    assert "kNN 70.0 %, raw pixels 75.0 %" in html and "not measured" in html


def test_an_interrupted_run(tmp_path):
    run = make_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "lo')  # the line that the kill cut off
    html = write_report(run).read_text()
    parse(html)
    assert "not finished. The last logged step is 100 (epoch 10.0) after 50 s of training." in html
    assert "run the same command again" in html and "1 line(s) of metrics.jsonl were unreadable" in html


@pytest.mark.parametrize("rows", [[], [step_row(10)]])
def test_a_run_that_has_hardly_begun(tmp_path, rows):
    html = render(read_run(make_run(tmp_path / "run", rows=rows)))
    parse(html)
    assert ("has not logged a step yet" in html) == (not rows)


def test_nan_and_infinity_leave_gaps_and_a_warning(tmp_path):
    rows = [step_row(s, loss=math.nan if s > 50 else 5.0, kl=math.inf) for s in range(10, 101, 10)]
    rows.append(probe_row(100, effective_rank=math.nan, knn=None, feature_std=math.nan, uniformity=math.nan))
    html = render(
        read_run(make_run(tmp_path / "run", summary(trained=(math.nan, math.nan), pair_per_s=math.nan), rows))
    )
    parse(html)
    assert "not a finite number in 5 of 10" in html


def test_strings_are_escaped(tmp_path):
    evil = "<script>alert('x')</script>&\"'"
    result = summary(arch=evil, recipe=evil, bottleneck=evil, device=evil, host={evil: evil}, versions=evil)
    result["data"]["name"] = result["probe"]["note"] = evil
    result["probe"]["rows"][0]["name"] += evil
    result["command"] = evil
    result["verdict"] = {"state": evil, "text": evil, "against": evil}
    result["share"]["full_recipe"] = evil
    html = render(read_run(make_run(tmp_path / "run", result, config=json.dumps({"a": evil}))))
    parse(html)
    assert "<script" not in html and html.count("&lt;script&gt;") >= 10


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(FastSSLError, match="no such run directory"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(FastSSLError, match="not a run directory"):
        write_report(tmp_path)
    run = make_run(tmp_path / "run", config="a: [1,\n")
    with pytest.raises(FastSSLError, match=r"config\.yaml: not valid yaml"):
        write_report(run)
    run = make_run(tmp_path / "other")
    (run / "summary.json").write_text("{")
    with pytest.raises(FastSSLError, match=r"summary\.json: not valid JSON"):
        write_report(run)


LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", LAUGHS + "arch: *a39\n", "more than 10,000 values"),
        ("config.yaml", "a: " + "[" * 3000, "deep in one another"),
        ("config.yaml", "arch: !!bool x", "a value that cannot be read"),
        ("config.yaml", "arch: 2026-99-99", "a value that cannot be read"),
        ("config.yaml", "arch: !!python/object/apply:os.system ['touch broken']", "could not determine a constructor"),
        ("config.yaml", "a: " + "x" * 70_000, "is longer than 64 KiB"),
        ("summary.json", "[" * 100_000, "not valid JSON"),
        ("summary.json", '{"steps": ' + "9" * 5000 + "}", "not valid JSON"),
        *(
            (name, None, "is not a plain file")
            for name in ("config.yaml", "metrics.jsonl", "summary.json", "views.png")
        ),
    ],
)
def test_a_folder_that_is_made_to_harm(tmp_path, name, content, message):
    """A run that somebody sent is looked at: one line, and at once."""
    run = make_run(tmp_path / "run", summary())
    (run / name).unlink(missing_ok=True)
    if content is None:
        os.mkfifo(run / name)
    else:
        (run / name).write_text(content)
    with pytest.raises(FastSSLError, match=rf"{re.escape(name)}: .*{message}"):
        write_report(run)


def test_metrics_that_are_made_to_harm_are_lines_that_cannot_be_read(tmp_path):
    run = make_run(tmp_path / "run", summary())
    with (run / "metrics.jsonl").open("a") as file:
        file.write("[" * 100_000 + "\n" + "9" * 5000 + "\n")
    record = read_run(run)
    assert record.unreadable == 2 and len(record.steps) == 10


def test_a_picture_that_is_none_stays_out_of_the_page(tmp_path):
    """The page is passed on; a folder that was sent may have a link there, to anything."""
    (tmp_path / "secret").write_text("-----BEGIN OPENSSH PRIVATE KEY-----")
    run = make_run(tmp_path / "run", summary())
    (run / "views.png").symlink_to(tmp_path / "secret")
    assert "base64" not in render(read_run(run))


def test_a_name_that_is_no_unicode(tmp_path):
    """Linux takes any bytes for a file's name."""
    run = make_run(tmp_path / "run", summary(recipe=os.fsdecode(b"o\xffdd")))
    assert r"o\udcffdd" in write_report(run).read_text()


def test_steps_that_were_passed_over_are_mentioned(tmp_path):
    page = render(read_run(make_run(tmp_path / "run", summary(passed_over_steps=[7, 1200]))))
    assert "2 steps were passed over, because a loss or gradient was not finite: 7, 1,200." in page
    page = render(read_run(make_run(tmp_path / "many", summary(passed_over_steps=list(range(11))))))
    assert "11 steps were" in page and "9, ..." in page


def test_skipped_photos_are_mentioned(tmp_path):
    assert "3 damaged photos were skipped" in render(read_run(make_run(tmp_path / "run", summary(skipped=3))))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59, "59 s"),
        (59.6, "1 min"),
        (250, "4 min 10 s"),
        (599.7, "10 min"),
        (1490, "25 min"),
        (3599, "1 h"),
        (12000, "3 h 20 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def drawn(svg, pattern):
    """The numbers in each of what ``pattern`` finds."""
    return [[float(part) for part in re.findall(r"-?[\d.]+", found)] for found in re.findall(pattern, svg)]


def test_chart_places_points_leaves_gaps_and_follows_the_theme():
    points = [(0, 0.0), (5, 1.0), (6, math.nan), (8, 0.5), (9, math.nan), (10, 0.5), (15, 0.0)]
    chart = line_chart("a <t>", "y", {"nothing": [(1, math.nan)], "a": points}, [0, 1])
    assert chart[:2] == ("a <t>", {2: "a"}) and chart == line_chart("a <t>", "y", {"nothing": [], "a": points}, [0, 1])
    with matplotlib.rc_context({"text.color": "white", "lines.linestyle": "--"}):  # of the user's own style
        assert chart == line_chart("a <t>", "y", {"nothing": [], "a": points}, [0, 1])
    svg = str(chart[2])
    parse(svg)
    ((x0, y0, x1, y1, *alone, x2, y2, x3, y3),) = drawn(svg, r'<title>a</title>\s*<path d="([^"]*)"')
    assert y0 == y3 == 220 > y2 > y1 == 14 and y2 - y1 == y0 - y2  # svg's y points down
    assert (x0, x3) == (56, 504) and x1 - x0 == pytest.approx(x3 - x2) and x2 - x1 == pytest.approx(x1 - x0)
    dots = drawn(svg, r'<use xlink:href="#\w+" (x="[\d.]+" y="[\d.]+)" style="fill: var\(--series-2\)')
    assert dots == [alone, [x3, y3]] and alone[1] == y2
    assert 'aria-label="a &lt;t&gt;"' in svg and "#0000" not in svg and "stroke: var(--series-2)" in svg


def test_chart_of_nothing_of_one_point_and_of_very_many():
    assert line_chart("t", "y", {"a": [(1, math.nan), (2, math.inf)]}) is None and line_chart("t", "y", {}) is None
    single = str(line_chart("t", "y", {"a": [(3, 2.0)]})[2])
    assert single.count("fill: var(--series-1)") == 1
    many = str(line_chart("t", "y", {"a": [(i, i % 7) for i in range(50_000)]}, marks={"m": 12.0})[2])
    assert len(many) < 20_000 and ">m</text>" in many and ">40,000</text>" in many


def test_names_of_marks_stand_apart():
    svg = line_chart("t", "y", {"a": [(1, 40.0)]}, [0, 100], marks={"low": 10.0, "near": 11.0, "top": 100.0})[2]
    heights = drawn(svg, r'<g class="mark">\s*<text [^>]* y="([\d.]+)"')
    assert len(heights) == 3 and all(14 < y < 240 for (y,) in heights)
    assert heights[0][0] + 13 <= heights[1][0] and heights[1][0] + 13 <= heights[2][0]


@pytest.mark.filterwarnings("error")
def test_any_numbers_can_be_drawn():
    rng = random.Random(0)

    def number():
        near = 1 + rng.randrange(4) * 2.3e-16, 1e12 * (1 - 2e-16 * rng.randrange(4))
        far = rng.choice((1, -1)) * 10 ** rng.uniform(-320, 308)
        return rng.choice((0.0, -0.0, math.nan, math.inf, *near, rng.gauss(0, 1), far, far))

    for _ in range(150):
        points = [(number(), number()) for _ in range(rng.randrange(1, 5))]
        reach = rng.choice(((), (0.0,), (0.0, 100.0)))
        chart = line_chart("t", "y", {"a": points}, reach, marks={"m": number()})
        assert chart is None or not re.search(r'="[^"]*(nan|inf)', chart[2])
