"""The report: what it says, that no data is markup, what may be missing."""

import dataclasses
import html.parser
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from unicl_jax import report
from unicl_jax.errors import InputError
from unicl_jax.evaluation import confusion
from unicl_jax.reporting import headline, maps, markup, paper, series, svg
from unicl_jax.reporting.examples import class_name
from unicl_jax.reporting.page import make_markdown, make_page
from unicl_jax.reporting.pictures import Pictures, data_uri
from unicl_jax.reporting.probes import few_shot, probe
from unicl_jax.reporting.results import read_results
from unicl_jax.reporting.runs import differing, read_runs

EVIL = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "&lt;b&gt; & </title></style></svg>",
    "\u202e\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 family",
    "a | pipe `tick` *star* [x](http://example.org)",
    "long" * 75,
    "nul \x00 bell \x07 half \ud800",
)
CLASSES = len(EVIL)


class Page(html.parser.HTMLParser):
    """Elements, attributes and texts of a page; what is not well-formed fails."""

    def __init__(self, content):
        super().__init__(convert_charrefs=True)
        self.open, self.found, self.text = [], [], []
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), tag
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    @property
    def said(self):
        return "".join(self.text)

    def all(self, tag):
        return [attrs for name, attrs in self.found if name == tag]


def check(content):
    """A page that needs nothing else and runs nothing; returns it parsed."""
    content.encode("utf-8")
    assert content.startswith("<!doctype html>\n")
    page = Page(content)
    tags = {tag for tag, _ in page.found}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    ids = [a["id"] for _, a in page.found if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.found:
        assert not [key for key in attrs if key.startswith("on")], tag
        assert attrs.get("href", "#").startswith("#")
        assert attrs.get("href", "#")[1:] in ["", *ids]
        assert attrs.get("src", "data:image/").startswith("data:image/")
    assert "url(" not in content and "@import" not in content
    assert all("alt" in a for a in page.all("img"))
    drawn = page.all("svg")
    assert all("aria-label" in a or "aria-hidden" in a for a in drawn)
    policies = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    assert [p for p in policies if p.startswith("default-src 'none'")]
    return page


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_metrics(workdir, rows):
    workdir.mkdir(parents=True, exist_ok=True)
    lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def write_arrays(folder, seed=0, classes=CLASSES, records=120):
    """Predictions that confuse 0 with 1, features, thumbnails."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    labels = rng.integers(0, classes, records).astype(np.int32)
    predictions = np.stack([(labels + i) % classes for i in range(5)], 1)
    swap = labels == 0
    predictions[swap, 0], predictions[swap, 1] = 1, 0
    index = 7 + 2 * np.arange(records)
    centres = rng.normal(size=(classes, 16)).astype(np.float32)
    images = (
        3 + centres[labels] + 0.1 * rng.normal(size=(records, 16)).astype(np.float32)
    )
    of = dict(predictions=predictions.astype(np.int32), labels=labels, index=index)
    np.savez(folder / "zero_shot.npz", class_embeddings=centres, **of)
    features = dict(image=images.astype(np.float32), label=labels, index=index)
    np.savez(folder / "features_test.npz", **features)
    keep = confusion.examples(predictions, labels, limit=20)
    pixels = rng.integers(0, 255, (20, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "thumbnails.npz", images=pixels, index=index[keep])
    return predictions, labels, keep


def write_out(out, score=0.8, names=EVIL, suite="offline", step=6):
    """An evaluation of one task by all protocols, a retrieval, and a missing task."""
    predictions, labels, keep = write_arrays(out / "tasks" / "t")
    accuracy, records = confusion.per_class(predictions, labels, CLASSES)
    pairs = confusion.confusions(predictions, labels, CLASSES)
    rates, decays = (1e-4, 1e-2, 1.0), (0.0, 1e-3, 1.0)
    curves = [
        dict(learning_rate=a, weight_decay=b, val=0.3 + 0.1 * i + 0.05 * j, epoch=3)
        for i, a in enumerate(rates)
        for j, b in enumerate(decays)
    ]
    curves[-1]["val"] = None  # diverged
    shots = [dict(shots=k, mean=0.4 + k / 100, interval=0.02) for k in (5, 20)]
    probe = dict(
        score=0.7,
        head_init=EVIL[0],
        chosen=dict(learning_rate=1e-2, weight_decay=1.0, epoch=3),
        curves=curves,
        selected=0.7,
        best_test_epoch=dict(score=0.72, epoch=9),
        epochs=[dict(epoch=i, test=0.5 + i / 50) for i in range(1, 11)],
        per_class=accuracy,
    )
    protocols = {
        "zero_shot": dict(
            score=score,
            interval=0.012,
            metrics=dict(accuracy=score, top1=score, top5=0.95),
            templates=["a {}.", EVIL[1]],
            class_names=list(names),
            per_class=accuracy,
            per_class_records=records,
            confusions=pairs,
        ),
        "linear_probe": probe,
        "knn": dict(
            score=0.6,
            chosen=dict(k=5),
            curves=[dict(k=k, val=0.5) for k in (1, 5, 20)],
        ),
        "few_shot": dict(score=0.6, few_shot=shots, full=0.7),
    }
    index = (7 + 2 * keep).tolist()
    found = [dict(text=t, score=0.5, right=i == 3) for i, t in enumerate(EVIL[:5])]
    seen = [dict(image=i, score=0.4, right=False) for i in index[:5]]
    to_text = dict(image=index[0], rank=4, texts=found, right=[EVIL[3]])
    to_image = dict(text=EVIL[0], rank=9, images=seen, right=[index[6]])
    rates = {"image_to_text_r1": 0.25, "text_to_image_r5": 0.5}
    rates["image_to_text_median_rank"] = 917.0
    examples = dict(image_to_text=[to_text], text_to_image=[to_image])
    retrieval = dict(score=0.25, metrics=rates, examples=examples)
    write_arrays(out / "tasks" / "r")

    def summary(task, name, details):
        write_json(out / "tasks" / task / f"{name}.json", details)
        return {k: details[k] for k in ("score", "interval") if k in details}

    tasks = {
        "t": dict(
            title=EVIL[0],
            classes=CLASSES,
            metric="accuracy",
            records=dict(test=120),
            protocols={k: summary("t", k, v) for k, v in protocols.items()},
            missing=None,
        ),
        "r": dict(
            title="Captions",
            kind="retrieval",
            protocols=dict(retrieval=summary("r", "retrieval", retrieval)),
        ),
        "absent": dict(
            title=EVIL[6],
            classes=10,
            missing=dict(why="no files", how=f"get {EVIL[0]}", where="data/absent"),
            protocols={},
        ),
    }
    model = dict(source=EVIL[1], step=step, digest="0123456789ab")
    versions = {"jax": "0.10.2", EVIL[0]: EVIL[1]}
    whole = dict(model=model, suite=suite, date="2026-11-22T10:20:30+00:00")
    write_json(out / "results.json", dict(whole, versions=versions, tasks=tasks))
    return out


def write_run(workdir, rate=0.1, **out):
    """A run's metrics and config, with its evaluation."""
    rows = [
        dict(step=i, loss=5 - i / 3, logit_scale=14.0, learning_rate=rate)
        for i in range(1, 7)
    ]
    write_metrics(workdir, [*rows, {"step": 6, f"eval/{EVIL[0]}_top1": 0.5}])
    source = dict(kind="image_label", path=EVIL[1], weight=2)
    config = dict(optimizer=dict(learning_rate=rate), total_steps=6, note=EVIL[0])
    write_json(workdir / "config.json", dict(config, data=dict(sources={"a": source})))
    write_out(workdir / "evaluation" / "offline", **out)
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two runs with hostile names, their page parsed, and the Markdown."""
    folder = tmp_path_factory.mktemp("runs")
    paths = [folder / "a <b>bold</b> & co", folder / "second"]
    write_run(paths[0], score=0.8), write_run(paths[1], rate=0.2, score=0.65)
    page, table = report.report(paths, folder / "out.html")
    return check(page.read_text("utf-8")), table.read_text("utf-8"), page, paths


# What comes from data.


def test_names_from_data_are_shown_and_are_no_markup(two):
    page, _, _, _ = two
    shown = {markup.shorten(name, 300) for name in EVIL}
    assert all(name in page.said for name in shown)
    assert "a <b>bold</b> & co" in page.said
    assert not page.all("b") or all("bold" != x for x in page.text)
    assert "\x00" not in page.said and "\ufffd" in page.said
    assert page.all("bdi")


def test_markdown_shows_names_and_keeps_its_tables(two):
    _, table, _, _ = two
    assert "\\<script\\>" in table and "<script>" not in table
    sizes = {}
    for line in table.splitlines():
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)
            sizes.setdefault(len(cells), []).append(line)
    assert list(sizes) == [7]
    assert "**80.0 \u00b1 1.2** | 65.0 \u00b1 1.2" in table


@pytest.mark.parametrize("name", EVIL)
def test_escaping_is_undone_by_a_parser(name):
    made = Page(markup.el("p", name, title=name))
    assert made.said == markup.clean(name) == made.all("p")[0]["title"]


def test_a_cut_name_is_short_and_does_not_end_in_a_joiner():
    assert markup.shorten("x" * 301, 300) == "x" * 299 + "\u2026"
    family = "\U0001f469\u200d\U0001f469"
    assert "\u200d\u2026" not in markup.shorten(family * 3, 5)
    assert markup.shorten("a\nb   c", 9) == "a b c"
    assert markup.markdown("# a|b\n- *c*") == "\\# a\\|b - \\*c\\*"


# What it says.


def test_the_best_score_is_marked_and_missing_data_is_said(two):
    page, _, _, paths = two
    assert "get <script>alert(1)</script>; data/absent; no files" in page.said
    boards = {b.protocol: b for b in headline.boards(read_runs(paths))}
    row = boards["zero_shot"].rows[0]
    assert [c.score for c in row.cells] == [0.8, 0.65]
    assert [row.is_best(i) for i in (0, 1)] == [True, False]
    assert row.chance == 1 / CLASSES
    assert not any(boards["knn"].rows[0].is_best(i) for i in (0, 1))  # both have 60
    assert [r.metric for r in boards["retrieval"].rows] == [
        "image to text R@1",
        "text to image R@5",
    ]


def test_a_rank_is_no_percentage(two):
    page, table, _, _ = two
    assert "917" in page.text and "91700.0" not in page.said + table


def test_a_setting_that_was_given_is_not_called_chosen(two):
    _, _, _, paths = two
    run = read_runs(paths)[0]
    knn = run.results[0].tasks["t"].protocols["knn"]
    assert "chosen on validation data: k 5" in Page(probe([(0, run, knn)])).said
    knn.details.pop("curves")
    assert ": k 5; test 60.0" in Page(probe([(0, run, knn)])).said


def test_a_mean_is_over_the_tasks_that_all_runs_have():
    cells = [(0.2, 0.4), (0.6, None), (0.4, 0.8)]
    rows = [
        headline.Row("t", "top-1", 2, 0.5, [headline.Cell(x) for x in row])
        for row in cells
    ]
    count, means = headline.Board("s", "zero_shot", rows, []).means()
    assert count == 2
    np.testing.assert_allclose(means, [0.3, 0.6])


def test_the_fields_in_which_runs_differ_are_found(two):
    page, _, _, paths = two
    runs = read_runs(paths)
    assert differing(runs) == {"optimizer.learning_rate": [0.1, 0.2]}
    assert "optimizer.learning_rate" in page.said


def test_a_field_that_is_newer_than_a_run_had_its_default(two, tmp_path):
    _, _, _, paths = two
    run = read_runs(paths)[0]
    newer = dataclasses.replace(run, config=run.config | {"micro_batches": 1})
    assert differing([run, newer]) == {}
    newer.config["micro_batches"] = 4
    assert differing([run, newer]) == {"micro_batches": [1, 4]}


def test_a_probe_shows_its_choice_and_labels_the_best_test_epoch(two):
    _, _, _, paths = two
    run = read_runs(paths)[0]
    made = probe([(0, run, run.results[0].tasks["t"].protocols["linear_probe"])])
    page = Page(made)
    assert "learning rate 0.01, weight decay 1, epoch 3; test 70.0" in page.said
    assert "best test epoch 72.0 (epoch 9): chosen on test data" in page.said
    assert "8 settings; the ring is the chosen one; 1 diverged" in page.said
    assert [a for a in page.all("circle") if a["class"] == "ring"]


def test_confused_pairs_have_their_pictures(two):
    page, _, _, paths = two
    folder = paths[0] / "evaluation" / "offline" / "tasks" / "t"
    found = np.load(folder / "zero_shot.npz")
    shown, first = np.load(folder / "thumbnails.npz"), found["predictions"][:, 0]
    kept = np.isin(found["index"], shown["index"])
    of = {
        (label, guess): {
            data_uri(shown["images"][list(shown["index"]).index(i)])
            for i in found["index"][
                kept & (found["labels"] == label) & (first == guess)
            ]
        }
        for label, guess in ((0, 1), (1, 1))
    }
    wrong = f"wrong: {EVIL[0]}, taken for {EVIL[1]}"
    images = page.all("img")
    assert {a["src"] for a in images if a["alt"] == wrong} <= of[0, 1]
    assert {a["src"] for a in images if a["alt"] == f"right: {EVIL[1]}"} <= of[1, 1]
    assert len([a for a in images if a["alt"] == wrong]) >= 2


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    for name in ("x/run", "y/run", "z"):
        write_metrics(tmp_path / name, [dict(step=1, loss=1.0)])
    paths = [tmp_path / name for name in ("x/run", "y/run", "z", "z")]
    assert [run.name for run in read_runs(paths)] == ["x/run", "y/run", "z"]


# Curves.


def test_a_long_run_gives_a_small_figure_that_keeps_extremes():
    rows = [dict(step=20 * i, loss=1 + 1e-6 * i) for i in range(25_000)]
    rows[12_345]["loss"] = 9.0
    found = series.series(rows, "loss")
    assert len(found.x) <= series.POINTS and max(found.high) == 9.0
    assert found.x == sorted(found.x)
    np.testing.assert_allclose(np.mean(found.y), 1.0128, atol=1e-3)
    few = series.series(rows[:10], "loss")
    assert few.y == few.low == [row["loss"] for row in rows[:10]]


def test_what_is_not_finite_is_counted_and_left_out(tmp_path):
    rows = [dict(step=i, loss=1.0 / i) for i in range(1, 9)]
    rows[2]["loss"], rows[4]["loss"] = None, "NaN"
    write_metrics(
        tmp_path / "r",
        [*rows, '{"step": 9, "loss": NaN}', '{"step": 10, "loss": -Infinity}',
         '{"step": 11, "loss": 1e999, "learning_rate": 5e-324}', "[1]", "7", "{cut",
         '{"step": "x", "loss": 3}', '{"step": NaN, "loss": 3}', "{}", "null"],
    )  # fmt: skip
    (run,) = read_runs([tmp_path / "r"])
    found = series.series(run.rows, "loss")
    assert found.x == [1, 2, 4, 6, 7, 8] and found.left_out == 5
    page = check(make_page([run]))
    assert "5 of its values were not finite" in page.said
    assert not re.search(r"nan|inf", json.dumps(page.all("path")))


@pytest.mark.parametrize(
    "values", [[0.0], [3.0, 3.0], [-1e-300, 0], [1e299, -1e299], [5e-324, 1e-323]]
)
@pytest.mark.parametrize("log", [False, True])
def test_axes_take_any_values(values, log):
    axis = svg.Axis(values, 10, 90, log=log)
    assert all(9 <= axis(v) <= 91 for v in values)
    assert len(axis.ticks()) <= 12


def test_a_log_axis_has_a_place_for_zero():
    axis = svg.Axis([0.0, 1e-4, 1e-2, 1.0], 0, 100, log=True)
    ticks = [said for _, said in axis.ticks()]
    assert ticks == "0 1e-4 0.001 0.01 0.1 1".split()
    assert axis(0.0) == 0 < axis(1e-4) < axis(1.0) == 100


# The paper.


def zero_shot_only(out, suite, names):
    tasks = {n: dict(protocols=dict(zero_shot=dict(score=0.5))) for n in names}
    write_json(out / "results.json", dict(suite=suite, tasks=tasks))
    return out


def test_few_shot_labels_the_best_test_epochs(two):
    _, _, _, paths = two
    run = read_runs(paths)[0]
    found = run.results[0].tasks["t"].protocols["few_shot"]
    found.details["few_shot"][0] |= dict(best_test_epoch=0.47, classes_short=3)
    said = Page(few_shot([(0, run, found)])).said
    assert "5 examples 45.0 \u00b1 2.0, 20 examples 60.0 \u00b1 2.0; all 70.0" in said
    assert "best test epochs, chosen on test data: 5 47.0" in said
    assert "classes with fewer images: 3 of 5" in said


def test_the_paper_is_compared_with_where_a_suite_is_whole(tmp_path):
    names = [f"t{i}" for i in range(20)]
    whole = zero_shot_only(tmp_path / "a", "elevater20", [*names, "imagenet"])
    part = zero_shot_only(tmp_path / "b", "elevater20", names[:-1])
    runs = read_runs([whole, part])
    values = paper.ours(runs, paper.read_paper()["columns"])
    assert values == [{"imagenet": 0.5, "zs20": 0.5}, {}]
    open_page, folded = Page(paper.comparison(runs)), Page(paper.comparison(runs[1:]))
    assert not open_page.all("details") and folded.all("details")
    assert "ours" in open_page.said and "27.1" in open_page.said


def test_every_number_of_the_paper_has_a_source():
    found = paper.read_paper()
    rows = [row for table in found["tables"] for row in table["rows"]]
    assert all(row["source"] and row["model"] and row["data"] for row in rows)
    given = [row[k] for row in rows for k in found["columns"] if k in row]
    assert len(given) == 41 and all(0 < x < 100 for x in given)


# Maps and pictures.


def test_without_scikit_learn_a_map_is_a_projection_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    out = write_out(tmp_path / "out")
    task = read_results(out).tasks["t"]
    found = maps.make_map(task)
    assert found.method == "PCA" and len(found.images) == 120
    assert 0 <= found.images.min() and found.texts.max() <= 1
    assert -1 <= found.gap <= 1
    page = Page(maps.map_figure(found, task, "a run"))
    assert "pip install unicl_jax[report]" in page.said
    # Each class's text lies among its images, not among another's.
    own = [found.images[found.labels == k].mean(0) for k in found.classes]
    apart = np.linalg.norm(found.texts[:, None] - np.stack(own), axis=-1)
    assert (apart.argmin(1) == np.arange(len(own))).mean() > 0.8


def test_a_map_is_drawn_by_t_sne(tmp_path):
    pytest.importorskip("sklearn.manifold", exc_type=ImportError)
    task = read_results(write_out(tmp_path / "out")).tasks["t"]
    found = maps.make_map(task, points=60)
    assert found.method == "t-SNE" and found.images.shape == (60, 2)
    assert np.isfinite(found.images).all()


def test_half_of_a_map_is_of_the_largest_classes():
    labels = np.concatenate([np.arange(2000) % 500, np.full(300, 7)])
    kept = maps.sample(labels, 100)
    assert len(np.unique(kept)) == 100
    shown = maps.shown_classes(labels)
    assert 7 in shown and len(shown) == maps.SHOWN
    assert np.isin(labels[kept], shown).sum() >= 50
    assert len(maps.shown_classes(np.arange(100))) == 0


def test_pictures_are_those_of_their_records(tmp_path):
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[1] += 200
    np.savez(tmp_path / "thumbnails.npz", images=images, index=[40, 9])
    found = Pictures(tmp_path)
    assert 9 in found and 1 not in found and None not in found
    (shown,) = Page(found.show(9, "x")).all("img")
    assert shown["src"] == data_uri(images[1]) != data_uri(images[0])
    assert found.show(3, "x") is None
    assert len(data_uri(np.zeros((300, 200, 3), np.uint8))) < 1000
    (tmp_path / "thumbnails.npz").write_bytes(b"PK\x03\x04 damaged")
    assert Pictures(tmp_path).indices == []


# What is missing or damaged.


def test_a_run_with_metrics_alone_has_a_page(tmp_path):
    write_metrics(tmp_path, [{"step": 3, "loss": 2.0, "eval/x_top1": 0.25}])
    runs = read_runs([tmp_path])
    page = check(make_page(runs))
    assert "There is no config.json" in page.said
    assert "| x | top-1, last evaluation while training |  | 25.0 |" in make_markdown(
        runs
    )


def test_a_broken_results_file_is_a_line_beside_metrics_and_an_error_alone(tmp_path):
    write_run(tmp_path / "run")
    out = tmp_path / "run" / "evaluation" / "offline"
    for broken in ('{"tasks": {', "[]", '{"suite": 3}', "\udcff"):
        content = broken.encode("utf-8", "surrogateescape")
        (out / "results.json").write_bytes(content)
        assert "results.json" in check(make_page(read_runs([tmp_path / "run"]))).said
        alone = tmp_path / "alone"
        shutil.copytree(out, alone, dirs_exist_ok=True)
        with pytest.raises(InputError, match="run evaluate again"):
            read_runs([alone])


def test_an_evaluation_of_a_run_brings_its_curves(tmp_path):
    write_run(tmp_path / "run")
    (run,) = read_runs([tmp_path / "run" / "evaluation" / "offline" / "results.json"])
    assert run.name == "run" and run.rows and len(run.results) == 1


def test_half_done_and_damaged_parts_are_said(tmp_path):
    out = write_out(tmp_path / "out")
    folder = out / "tasks" / "t"
    (folder / "linear_probe.json").write_text("{")
    (folder / "knn.json").unlink()
    for name in ("zero_shot.npz", "features_test.npz", "thumbnails.npz"):
        (folder / name).write_bytes(b"no archive")
    found = json.loads((out / "results.json").read_text())
    found["tasks"]["t"]["protocols"]["fine_tune"] = dict(error="out of memory")
    found["tasks"]["t2"] = dict(title="T2", skipped={"knn": "too <small>"})
    found["provisional"] = "its list is a guess"
    found["tasks"]["later"] = dict(title="Later", protocols={})
    found["tasks"]["odd"] = None
    write_json(out / "results.json", found)
    page = check(make_page(read_runs([out])))
    for said in (
        "linear_probe.json",
        "knn.json is not there",
        "fine-tuning, out: out of memory",
        "Later was not run yet",
        "\u2014 failed",
        "Provisional: its list is a guess",
    ):
        assert said in page.said, said


@pytest.mark.parametrize("junk", [None, 3, "x", [], {}, [[]], [None], {"a": 1}, True])
def test_any_field_may_be_anything(tmp_path, junk):
    out = write_out(tmp_path / "out")
    for name in ("zero_shot", "linear_probe", "few_shot", "knn"):
        file = out / "tasks" / "t" / f"{name}.json"
        write_json(file, dict.fromkeys(json.loads(file.read_text()), junk))
    file = out / "tasks" / "r" / "retrieval.json"
    write_json(file, dict.fromkeys(json.loads(file.read_text()), junk))
    check(make_page(read_runs([out]), points=0))
    whole = json.loads((out / "results.json").read_text())
    whole["tasks"] = {
        k: dict.fromkeys(task, junk) for k, task in whole["tasks"].items()
    }
    write_json(out / "results.json", {**dict.fromkeys(whole, junk), **whole})
    check(make_page(read_runs([out])))


def test_a_file_outside_of_the_evaluation_is_not_read(tmp_path):
    out = write_out(tmp_path / "out")
    secret = tmp_path / "secret.json"
    write_json(secret, dict(score=0.123, metrics=dict(top1=0.123)))
    found = json.loads((out / "results.json").read_text())
    for path in (str(secret), "../secret.json"):
        found["tasks"]["t"]["protocols"]["zero_shot"] = dict(details=path)
        write_json(out / "results.json", found)
        assert read_results(out).tasks["t"].protocols["zero_shot"].score == 0.8


def test_names_that_are_too_few_leave_numbers():
    class Short:
        class_names = ("a",)

    assert [class_name(Short, k) for k in (0, 1, -1)] == ["a", "class 1", "class -1"]


# The command.


def test_the_command_writes_both_files_or_says_why_not(tmp_path, capsys):
    write_run(tmp_path / "run")
    assert report.main([str(tmp_path / "run"), "--map_points=0"]) == 0
    assert "report.html" in capsys.readouterr().out
    check((tmp_path / "run" / "report.html").read_text("utf-8"))
    assert (tmp_path / "run" / "report.md").is_file()
    (tmp_path / "empty").mkdir()
    run = str(tmp_path / "run")
    for arguments, said in (
        ([str(tmp_path / "nowhere")], "there is no"),
        (["gs://bucket/run"], "on this machine"),
        ([str(tmp_path / "empty")], "no metrics.jsonl"),
        ([run, "--out=x.pdf"], "must be an HTML file"),
        ([run, f"--out={tmp_path}/no/x.html"], "can be written"),
        ([run, "--map_points=5"], "10 to 1,500"),
    ):
        assert report.main(arguments) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*.new"))


# A browser.

MEASURE = """<!doctype html><iframe id="f" style="width:360px;height:800px;border:0"
 srcdoc="{page}"></iframe><script>addEventListener("load", () => {{
 const d = document.getElementById("f").contentDocument;
 const wide = [...d.body.querySelectorAll("*")].filter(e => !e.closest(".scroll") &&
   !e.closest("svg") && !e.closest(".unseen") && e.getBoundingClientRect().right > 361);
 document.title = d.documentElement.scrollWidth + " " + wide.length + " " +
   d.images.length + " " + [...d.images].filter(i => !i.naturalWidth).length;
}});</script>"""


def test_a_phone_shows_the_page_without_scrolling_sideways(two, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    content = two[2].read_text("utf-8").replace(' loading="lazy"', "")
    quoted = content.replace("&", "&amp;").replace('"', "&quot;")
    (tmp_path / "m.html").write_text(MEASURE.format(page=quoted), "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", "--disable-component-update",
             "--disable-sync", "--disable-quic", f"--user-data-dir={tmp_path}/profile",
             "--virtual-time-budget=20000", "--dump-dom"]  # fmt: skip
    done = subprocess.run(
        [browser, *flags, f"file://{tmp_path}/m.html"],
        capture_output=True,
        timeout=240,
        check=True,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout.decode("utf-8"))
    width, beyond, images, broken = map(int, title[1].split())
    assert width <= 360 and beyond == 0 and images > 10 and broken == 0
