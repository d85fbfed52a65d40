"""``fastssl search``: equal to scikit-learn's; the picture and the page; and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import jpeg_bytes, make_photo
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from test_embed import Anonymous

from fastssl.api import embed
from fastssl.cli import main
from fastssl.errors import FastSSLError
from fastssl.evaluate import search as module
from fastssl.evaluate.knn import nearest_neighbors
from fastssl.evaluate.search import faiss_candidates, find_duplicates, nearest, open_features, open_query
from fastssl.models.backbones import create_backbone, save_backbone
from fastssl.weights.source import open_session

HOW = {"size": 32, "device": "cpu", "workers": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with weights, photos/ (two of one kind) and their features."""
    root = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    save_backbone(create_backbone("lcnet_035"), root / "last.safetensors", arch="lcnet_035")
    for number in range(12):
        folder = root / "photos" / ("cats", "dogs")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02}.jpg").write_bytes(jpeg_bytes(make_photo(number, 48, 64)))
    shutil.copy(root / "photos" / "cats" / "00.jpg", root / "photos" / "dogs" / "again.jpg")
    embed(root / "last.safetensors", root / "photos", root / "f.npy", **HOW)
    return root


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["search", *map(str, arguments), "--device", "cpu"])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def clustered(count, width, seed=0):
    """(count, width): groups of rows that are more and less alike, a row of zeros, one that is there three times."""
    draw = np.random.default_rng(seed)
    rows = draw.normal(size=(count // 8, width))[draw.integers(0, count // 8, count)]
    rows += draw.uniform(0, 0.6, (count, 1)) * draw.normal(size=(count, width))
    rows[5], rows[[7, count - 2]] = 0, rows[40]
    return rows.astype(np.float32)


@pytest.mark.parametrize("limits", [(64, 1024), (2, 64)])
@pytest.mark.parametrize("above", [0.8, 0.97, 1.0])
def test_duplicates_are_scikit_learns(above, limits, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 100)
    monkeypatch.setattr(module, "_NEAREST", limits)
    rows = clustered(333, 24)
    graph = (
        NearestNeighbors(metric="cosine", algorithm="brute")
        .fit(rows)
        .radius_neighbors_graph(rows, 1 - above + 1e-6, mode="distance")
    )
    pairs = {(a, b): 1 - graph[a, b] for a, b in zip(*graph.nonzero()) if a < b}
    pairs |= dict.fromkeys([(7, 40), (7, 331), (40, 331)], 1.0)  # a distance of 0 is none to a sparse matrix
    count, listed, groups = find_duplicates(torch.from_numpy(rows), above, 10_000, "cpu")
    assert count == len(listed) == len(pairs) > 2 and {(a, b) for _, a, b in listed} == pairs.keys()
    assert all(like == pytest.approx(pairs[a, b], abs=1e-5) for like, a, b in listed)
    assert [like for like, *_ in listed] == sorted((like for like, *_ in listed), reverse=True)
    wanted = {row: {row} for row in range(len(rows))}
    for a, b in pairs:  # the slow twin of the groups
        joined = wanted[a] | wanted[b]
        wanted |= dict.fromkeys(joined, joined)
    assert {frozenset(group) for group in groups} == {frozenset(one) for one in wanted.values() if len(one) > 1}
    assert [len(group) for group in groups] == sorted(map(len, groups), reverse=True) and all(map(sorted, groups))
    assert find_duplicates(torch.from_numpy(rows), above, 2, "cpu") == (count, listed[:2], groups)


def test_thousands_of_one_photo_are_one_group(monkeypatch):
    monkeypatch.setattr(module, "_NEAREST", (4, 16))
    count, listed, groups = find_duplicates(torch.ones(300, 8), 0.9, 5, "cpu")
    assert groups == [list(range(300))] and count >= 300 and len(listed) == 5


def test_nearest_is_scikit_learns(made):
    features, about = open_features(made / "f.npy")
    with (
        open_query(made / "photos" / "dogs" / "03.jpg") as query,
        open_session(made / "last.safetensors", device="cpu") as session,
    ):
        found = nearest(session, features, about, query, 5)
        assert len(nearest(session, features, about, query, 10_000)) == 13
    own = about["columns"]["path"].index("dogs/03.jpg")
    rows = features.double().numpy()  # of a network without training they are tiny
    distance, rows = NearestNeighbors(n_neighbors=5, metric="cosine").fit(rows).kneighbors(rows[own : own + 1])
    assert [row for _, row in found] == rows[0].tolist() and found[0][1] == own
    np.testing.assert_allclose([like for like, _ in found], 1 - distance[0], atol=1e-5)


def test_faiss_finds_the_same(made, capsys, monkeypatch):
    pytest.importorskip("faiss")
    rows = torch.from_numpy(clustered(333, 24))
    by = faiss_candidates(rows)
    for k in (1, 7, 333):
        # without the row of zeros, to which any rows are equally near
        expected, found = (nearest_neighbors(rows, rows[6:50], k=k, by=one) for one in (None, by))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    monkeypatch.setattr(module, "_BLOCK", 100)
    assert find_duplicates(rows, 0.9, 50, "cpu", by=by) == find_duplicates(rows, 0.9, 50, "cpu")
    asked = []
    monkeypatch.setattr(module, "faiss_candidates", lambda features: asked.append(1) or faiss_candidates(features))
    for options in ((made / "photos" / "cats" / "02.jpg",), ("--duplicates", "--above", 0.99)):
        plain, faster = (run(capsys, *options, "--in", made / "f.npy", *more) for more in ((), ("--faiss",)))
        assert plain == faster and plain[0] == 0
    assert len(asked) == 2
    rows[3, 3] = np.inf
    with pytest.raises(FastSSLError, match="NaN or infinite"):
        faiss_candidates(rows)
    monkeypatch.setitem(sys.modules, "faiss", None)
    status, _, err = run(capsys, "--duplicates", "--in", made / "f.npy", "--faiss")
    assert status == 1 and "--faiss needs faiss: pip install 'fastssl-vision[faiss]'" in err and err.count("\n") == 1


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("half", [False, True])
def test_tables_are_read_too(made, tmp_path, ending, half, monkeypatch):
    pytest.importorskip("pyarrow")
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ('a "b", #c.jpg', "d\ne.jpg"):
        shutil.copy(made / "photos" / "cats" / "00.jpg", folder / name)
    for photos in (made / "photos", folder):
        (expected, about), (found, other) = (
            (embed(made / "last.safetensors", photos, out, half=half, **HOW), open_features(out))[1]
            for out in (tmp_path / "f.npy", tmp_path / f"f.{ending}")
        )
        assert torch.equal(found.float(), expected.float()) and other["columns"] == about["columns"]
    path = tmp_path / f"f.{ending}"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(FastSSLError, match="not as `fastssl embed` writes"):
        open_features(path)
    if ending == "parquet":
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(FastSSLError, match="parquet needs pyarrow: pip install"):
            open_features(path)


def test_memory_is_for_a_tile_of_the_photos(tmp_path):
    """200 MB of float16, of which a tile is 13,107 rows of float32."""
    rows = np.lib.format.open_memmap(tmp_path / "f.npy", "w+", np.float16, (20_000, 5120))
    rows[:] = np.random.default_rng(0).normal(size=5120)
    rows[:, 0] = np.arange(20_000) / 2000
    rows[18, :1000] *= -1
    rows[17] = -rows[18]
    rows.flush()
    made = {"network": "student", "weights": "1", "size": 32, "crop": 1.0, "made_from": {"data": "d", "weights": "w"}}
    columns = {"id": list(range(20_000)), "path": [None] * 20_000, "label": [None] * 20_000}
    Path(tmp_path / "f.npy.json").write_text(json.dumps({**made, "width": 5120, "columns": columns}))
    features, _ = open_features(tmp_path / "f.npy")
    assert features.dtype == torch.float16
    bar = Anonymous()
    with bar.watching():
        like, found = nearest_neighbors(features, -features[17:18], k=3)
    assert found[0, 0] == 18 and float(like[0, 0]) == pytest.approx(1)
    assert max(bar.seen) - bar.seen[0] < 720e6  # 800 MB were all rows at once, normalised


def test_a_query_as_table_record_and_picture(made, capsys, tmp_path):
    photo = made / "photos" / "cats" / "00.jpg"
    options = ("--in", made / "f.npy", "--top", 3, "--out", tmp_path / "found.png", "--json", tmp_path / "f.json")
    status, out, err = run(capsys, photo, *options)
    assert status == 0, err
    lines, record = out.splitlines(), json.loads((tmp_path / "f.json").read_text())
    assert lines[:2] == ["1.0000 cats/00.jpg (cats)", "1.0000 dogs/again.jpg (dogs)"] and len(lines) == 3
    assert [one[1:] for one in record["nearest"]][:2] == [[0, "cats/00.jpg (cats)"], [12, "dogs/again.jpg (dogs)"]]
    assert record["query"] == "00.jpg" and str(made) not in json.dumps(record)
    assert Image.open(tmp_path / "found.png").width == 1400


def test_duplicates_as_table_record_and_page(made, capsys, tmp_path):
    options = ("--duplicates", "--above", 0.9999, "--out", tmp_path / "d.html", "--json", "-")
    status, out, err = run(capsys, "--in", made / "f.npy", *options)
    assert status == 0, err
    record = json.loads(out)
    assert record["pairs"] == 1 and record["groups"] == [[0, 12]] and record["most_alike"][0][1:] == [0, 12]
    assert "1.0000 cats/00.jpg (cats) dogs/again.jpg (dogs)\n" in err
    assert "1 pair with a cosine of 0.9999 or more, in 1 group among 13 photos" in err
    page = (tmp_path / "d.html").read_text()
    assert "1 pair with a cosine" in page and "data:image/png;base64," in page and "<script" not in page
    status, out, _ = run(capsys, "--in", made / "f.npy", "--duplicates", "--top", 1, "--above", 0.2)
    assert status == 0 and len(out.splitlines()) == 2 and "in 1 group" in out


@contextmanager
def as_it_was(*paths):
    content = [path.read_bytes() for path in paths]
    try:
        yield
    finally:
        for path, data in zip(paths, content):
            path.write_bytes(data)


def test_what_is_no_photo_and_other_weights_are_one_line(made, capsys, tmp_path):
    (tmp_path / "no.jpg").write_text("no picture")
    status, _, err = run(capsys, tmp_path / "no.jpg", "--in", made / "f.npy")
    assert status == 1 and "no.jpg: cannot be read as a photo" in err and err.count("\n") == 1
    status, _, err = run(capsys, tmp_path / "none.jpg", "--in", made / "f.npy")
    assert status == 1 and "none.jpg: cannot be read" in err
    photo, other = made / "photos" / "cats" / "00.jpg", tmp_path / "other.safetensors"
    save_backbone(create_backbone("lcnet_035"), other, arch="lcnet_035")
    status, _, err = run(capsys, photo, "--in", made / "f.npy", "--weights", other)
    assert status == 1 and "other.safetensors: did not make the features" in err and err.count("\n") == 1
    shutil.copy(made / "last.safetensors", tmp_path / "moved.safetensors")
    assert run(capsys, photo, "--in", made / "f.npy", "--weights", tmp_path / "moved.safetensors")[0] == 0


def test_a_runs_teacher_is_asked_where_it_made_the_features(made, capsys, tmp_path):
    """By its own size and crop, too."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("probe: {size: 40, crop: 0.5}\n")
    for name, network in (("last", "student"), ("last-teacher", "teacher")):
        path = tmp_path / "checkpoints" / f"{name}.safetensors"
        save_backbone(create_backbone("lcnet_035"), path, arch="lcnet_035", network=network, step=3)
    embed(tmp_path, made / "photos", tmp_path / "f.npy", which="teacher", device="cpu", workers=1)
    about = open_features(tmp_path / "f.npy")[1]
    assert (about["network"], about["size"], about["crop"]) == ("teacher", 40, 0.5)
    status, out, err = run(capsys, made / "photos" / "cats" / "02.jpg", "--in", tmp_path / "f.npy", "--top", 1)
    assert (status, out) == (0, "1.0000 cats/02.jpg (cats)\n"), err


@pytest.mark.parametrize(
    "change",
    [
        lambda path, about: path.write_bytes(path.read_bytes()[:1000]),
        lambda path, about: path.write_bytes(b""),
        lambda path, about: np.save(path, np.array([{"a": 1}], object)),
        lambda path, about: np.save(path, np.zeros((13, 64), np.float32)),
        lambda path, about: np.save(path, np.zeros((12, 1280), np.float32)),
        lambda path, about: about["columns"]["id"].__setitem__(3, 2),
        lambda path, about: about["columns"]["path"].pop(),
        lambda path, about: about.pop("columns"),
        lambda path, about: about.clear(),
        lambda path, about: about.update(made_from=5),
        lambda path, about: about.update(network=None),
        lambda path, about: about.update(size="x"),
        lambda path, about: about["columns"]["path"].__setitem__(0, ["x"]),
        lambda path, about: path.unlink(),
    ],
)
def test_damaged_features_are_one_line(made, change):
    path, side = made / "f.npy", made / "f.npy.json"
    with as_it_was(path, side):
        about = json.loads(side.read_text())
        change(path, about)
        side.write_text(json.dumps(about))
        with pytest.raises(FastSSLError, match="not as `fastssl embed` writes"):
            open_features(path)
    with as_it_was(side):
        side.write_text("[" * 100_000)
        with pytest.raises(FastSSLError, match="not as `fastssl embed`"):
            open_features(path)


def test_features_that_are_no_numbers_are_refused(made, capsys):
    with as_it_was(made / "f.npy"):
        rows = np.load(made / "f.npy")
        rows[4, 2] = np.nan
        np.save(made / "f.npy", rows)
        for asked in ((made / "photos" / "cats" / "00.jpg",), ("--duplicates",)):
            status, _, err = run(capsys, *asked, "--in", made / "f.npy")
            assert status == 1 and "NaN or infinite" in err and err.count("\n") == 1


def test_photos_that_have_changed_are_not_drawn(made, capsys, tmp_path):
    extra = made / "photos" / "cats" / "extra.jpg"
    shutil.copy(made / "photos" / "cats" / "00.jpg", extra)
    try:
        status, _, err = run(capsys, "--duplicates", "--in", made / "f.npy", "--out", tmp_path / "d.html")
    finally:
        extra.unlink()
    assert status == 1 and "other photos" in err and not (tmp_path / "d.html").exists()


def test_wrong_usage(made, capsys, tmp_path):
    photo = made / "photos" / "cats" / "00.jpg"
    for options in ((), (photo, "--duplicates"), (photo, "--out", tmp_path / "f.jpg"), (photo, "--top", 0)):
        assert run(capsys, *options, "--in", made / "f.npy")[0] == 2
    for options, words in (
        ((photo, "--above", 0.95), "--above goes with --duplicates alone"),
        (("--duplicates", "--weights", made / "last.safetensors"), "--weights goes with a picture to look for alone"),
    ):
        status, _, err = run(capsys, *options, "--in", made / "f.npy")
        assert status == 2 and words in err
    assert run(capsys, "--duplicates", "--above", "nan", "--in", made / "f.npy")[0] == 2


def test_one_photo_and_none(tmp_path):
    assert find_duplicates(torch.ones(1, 4), 0.5, 10, "cpu") == (0, [], [])
    assert find_duplicates(torch.zeros(3, 4), 0.5, 10, "cpu") == (0, [], [])
    np.save(tmp_path / "f.npy", np.zeros((0, 4), np.float32))
    about = {"width": 4, "columns": {"id": [], "path": [], "label": []}}
    (tmp_path / "f.npy.json").write_text(json.dumps(about))
    with pytest.raises(FastSSLError, match="not as `fastssl embed`"):
        open_features(tmp_path / "f.npy")
