"""Listing folders and tars: what is a photo, which class it has, and where its bytes are."""

from __future__ import annotations

import io
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fastssl.pipelines.convert.formats import is_photo_name
from fastssl.pipelines.convert.sources import MAX_FILE_BYTES, SourceError, list_source


def grow(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def add(archive, name, data=b"", **attributes):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in attributes.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(data))


def tar_bytes(files, **options):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, data in files.items():
            add(archive, name, data)
    return buffer.getvalue()


def content(listing):
    """[(name, class name or None, bytes)] of all photos."""
    return [
        (name, None if listing.classes is None else listing.classes[label], listing.read(i))
        for i, (name, label) in enumerate(zip(listing.names, listing.labels))
    ]


def test_what_is_a_photo():
    assert all(is_photo_name(name) for name in ["a.jpg", "b.JPEG", "x/y.Png", "n.WebP", "a.b.gif"])
    assert not any(
        is_photo_name(name) for name in ["a", "jpg", "a.txt", ".jpg", "x/._a.jpg", ".hidden.jpg", "a.jpg.part", "x.tar"]
    )


def test_class_folders(tmp_path):
    files = {"dog/2.jpg": b"d2", "dog/1.JPEG": b"d1", "cat/z.png": b"cz", "cat-2/deep/down/a.jpg": b"ca"}
    files |= {"dog/readme.txt": b"", "dog/._1.jpg": b""}
    with list_source(grow(tmp_path, files)) as listing:
        assert listing.classes == ["cat", "cat-2", "dog"]
        assert content(listing) == [
            ("cat/z.png", "cat", b"cz"),
            ("cat-2/deep/down/a.jpg", "cat-2", b"ca"),
            ("dog/1.JPEG", "dog", b"d1"),
            ("dog/2.jpg", "dog", b"d2"),
        ]
        assert listing.ignored == 2 and listing.rejected == []
        assert listing.labels.dtype == np.int64


def test_flat_folder(tmp_path):
    with list_source(grow(tmp_path, {"b.jpg": b"b", "a.jpg": b"a", "notes/x.txt": b""})) as listing:
        assert listing.classes is None
        assert content(listing) == [("a.jpg", None, b"a"), ("b.jpg", None, b"b")]


def test_photos_beside_class_folders_are_rejected_not_lost(tmp_path):
    with list_source(grow(tmp_path, {"stray.jpg": b"s", "cat/a.jpg": b"a", "dog/b.jpg": b"b"})) as listing:
        assert listing.names == ["cat/a.jpg", "dog/b.jpg"]
        assert [name for name, _ in listing.rejected] == ["stray.jpg"]


def test_some_folders_in_a_folder_of_photos_are_no_classes(tmp_path):
    """Most photos lie in none: edited ones, thumbnails of a network disk, the pictures of an earlier run."""
    files = {f"{number}.jpg": b"p" for number in range(5)} | {"edited/0.jpg": b"e", "@eaDir/0.jpg/thumb.jpg": b"t"}
    files |= {"runs/mine/config.yaml": b"", "runs/mine/checkpoints/last.pt": b"", "runs/mine/views.png": b"v"}
    with list_source(grow(tmp_path, files)) as listing:
        assert listing.classes is None and listing.rejected == []
        assert listing.names == [*(f"{number}.jpg" for number in range(5)), "edited/0.jpg"]


def test_the_same_photos_in_a_tar_have_no_classes_either(tmp_path):
    files = {f"x/{number}.jpg": b"p" for number in range(5)} | {
        "x/edited/0.jpg": b"e",
        "x/@eaDir/0.jpg/thumb.jpg": b"t",
    }
    (tmp_path / "x.tar").write_bytes(tar_bytes(files))
    with list_source(tmp_path / "x.tar") as listing:
        assert listing.classes is None and len(listing) == 6 and listing.ignored == 1 and listing.rejected == []


def test_a_folder_that_cannot_be_read_is_a_reject(tmp_path, monkeypatch):
    real = os.scandir

    def scandir(path):
        if os.path.basename(os.path.normpath(path)) == "locked":
            raise PermissionError(13, "Permission denied")
        return real(path)

    root = grow(tmp_path, {"cat/a.jpg": b"a", "locked/b.jpg": b"b"})
    monkeypatch.setattr(os, "scandir", scandir)
    with (
        pytest.warns(UserWarning, match="locked: a folder that cannot be read.*its photos are missing"),
        list_source(root) as listing,
    ):
        assert listing.names == ["cat/a.jpg"]
        assert listing.rejected == [("locked/", "a folder that cannot be read: Permission denied")]


def test_links_loops_pipes_and_hidden_folders(tmp_path):
    root = grow(tmp_path / "src", {"cat/a.jpg": b"a", ".cache/x.jpg": b"x"})
    grow(tmp_path / "other", {"b.jpg": b"b"})
    (root / "dog").symlink_to(tmp_path / "other")
    (root / "cat" / "c.jpg").symlink_to(tmp_path / "other" / "b.jpg")
    (root / "cat" / "up").symlink_to(root)
    (root / "cat" / "dead.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(root / "cat" / "pipe.jpg")
    with list_source(root) as listing:
        assert content(listing) == [("cat/a.jpg", "cat", b"a"), ("cat/c.jpg", "cat", b"b"), ("dog/b.jpg", "dog", b"b")]
        assert [name for name, _ in listing.rejected] == ["cat/dead.jpg"]


def test_two_class_folders_may_be_one_folder(tmp_path):
    """As for torchvision's ImageFolder; inside a class each folder is read once, so that chains of links end."""
    root = grow(tmp_path / "src", {"real/a.jpg": b"a"})
    for name in ("cat", "dog"):
        (root / name).symlink_to(root / "real")
    (tmp_path / "src/real/again").symlink_to(root / "dog")
    with list_source(root) as listing:
        assert content(listing) == [(f"{name}/a.jpg", name, b"a") for name in ("cat", "dog", "real")]


def test_hidden_parts_of_paths_are_passed_over_and_counted(tmp_path):
    hidden = [".ipynb_checkpoints/a.jpg", "__MACOSX/cat/._a.jpg", ".hidden/b.jpg", "cat/.thumbs/c.jpg", "@eaDir/d.jpg"]
    files = dict.fromkeys(["cat/a.jpg", "dog/b.jpg", *hidden], b"x")
    (tmp_path / "x.tar").write_bytes(tar_bytes({f"./{name}": data for name, data in files.items()}))
    (tmp_path / "y.tar").write_bytes(tar_bytes({"n1.tar": tar_bytes(files), ".n2.tar": tar_bytes(files)}))
    for source in (grow(tmp_path / "src", files), tmp_path / "x.tar"):
        with list_source(source) as listing:
            assert listing.names == ["cat/a.jpg", "dog/b.jpg"] and listing.classes == ["cat", "dog"]
            assert sum(listing.passed_over.values()) == listing.ignored == 5 and listing.rejected == []
    with list_source(tmp_path / "y.tar") as listing:
        assert listing.names == ["n1.tar/cat/a.jpg", "n1.tar/dog/b.jpg"] and listing.classes == ["n1"]


def test_joined_tars(tmp_path):
    """cat a.tar b.tar c.tar > all.tar: tar itself would stop behind the first one."""
    parts = [tar_bytes({f"{name}/{k}.jpg": f"{name}{k}".encode() for k in range(5)}) for name in ("cat", "dog", "cow")]
    (tmp_path / "all.tar").write_bytes(b"".join(parts))
    (tmp_path / "classes.tar").write_bytes(tar_bytes({"n1.tar": b"".join(parts[:2]), "n2.tar": parts[2]}))
    with list_source(tmp_path / "all.tar") as listing:
        assert listing.classes == ["cat", "cow", "dog"] and listing.rejected == []
        assert [data for _, _, data in content(listing)] == [
            f"{name}{k}".encode() for name in ("cat", "dog", "cow") for k in range(5)
        ]
    with list_source(tmp_path / "classes.tar") as listing:
        assert np.bincount(listing.labels).tolist() == [10, 5]
    (tmp_path / "all.tar").write_bytes(parts[0] + b"no tar at all" * 100)
    with pytest.raises(SourceError, match=f"no valid member header at byte {len(parts[0])}"):
        list_source(tmp_path / "all.tar")


def test_several_sources_are_one_list(tmp_path):
    (tmp_path / "more.tar").write_bytes(tar_bytes({"dog/a.jpg": b"d1", "cow/b.jpg": b"c1"}))
    folder = grow(tmp_path / "some", {"cat/a.jpg": b"c0", "dog/a.jpg": b"d0"})
    with list_source([folder, tmp_path / "more.tar"]) as listing:
        assert content(listing) == [
            ("some/cat/a.jpg", "cat", b"c0"),
            ("some/dog/a.jpg", "dog", b"d0"),
            ("more.tar/dog/a.jpg", "dog", b"d1"),
            ("more.tar/cow/b.jpg", "cow", b"c1"),
        ]
    with list_source([folder, folder]) as listing:
        assert listing.names == [f"{k}-some/{name}/a.jpg" for k in range(2) for name in ("cat", "dog")]


@pytest.mark.parametrize(
    ("tars", "classes"),
    [
        ({"a": "cat/", "b": "dog/"}, ["cat", "dog"]),
        ({"n01440764": "", "n01443537": ""}, ["n01440764", "n01443537"]),
        ({"a": "n01440764/", "b": "n01443537/"}, ["n01440764", "n01443537"]),
        ({"train-000": "", "train-001": ""}, None),
        ({"a": "part-0/", "b": "part-1/"}, None),
        ({"a": "cat/", "b": "cat/"}, None),
    ],
)
def test_tars_of_one_class_each(tmp_path, tars, classes):
    for name, folder in tars.items():
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes({f"{folder}{k}.jpg": b"x" for k in range(2)}))
    with list_source(tmp_path / "*.tar") as listing:
        assert listing.classes == classes and len(listing) == 4
        assert listing.labels.tolist() == ([0, 0, 1, 1] if classes else [0] * 4)


@pytest.mark.parametrize("files", [{}, {"cat/readme.txt": b"x", ".hidden.jpg": b"x"}])
def test_a_folder_of_nothing(tmp_path, files):
    with pytest.raises(SourceError, match=f"{len(files)} other files"):
        list_source(grow(tmp_path, files))


def test_missing_and_strange_sources(tmp_path):
    with pytest.raises(SourceError, match="nowhere: cannot read: No such file"):
        list_source(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="neither a folder nor a tar"):
        list_source("/dev/null")
    jpeg = b"\xff\xd8\xff" + bytes(3000)
    grow(tmp_path, {"text": b"not a tar " * 100, "empty.tar": b"", "one.jpg": jpeg, "a.beton": bytes(9)})
    said = {"one.jpg": "one photo; give its folder", "a.beton": "converted already; give its photos"}
    for name in ("text", "one.jpg", "a.beton", "empty.tar"):
        with pytest.raises(SourceError, match=f"{name}: {said.get(name, 'not a tar file')}"):
            list_source(tmp_path / name)


def test_a_file_that_changed_or_is_too_large(tmp_path):
    with list_source(grow(tmp_path, {"a.jpg": b"abc", "b.jpg": b"abc", "c.jpg": b"abc"})) as listing:
        (tmp_path / "a.jpg").write_bytes(b"abcd")
        (tmp_path / "b.jpg").write_bytes(b"ab")
        for i in (0, 1):
            with pytest.raises(SourceError, match="changed"):
                listing.read(i)
        listing.sizes[2] = MAX_FILE_BYTES + 1
        with pytest.raises(SourceError, match="limit"):
            listing.read(2)


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    ("prefix", "flat"),
    [("", False), ("./", False), ("data/train/", False), ("/abs/", False), ("", True), ("./photos/", True)],
)
def test_plain_tars(tmp_path, fmt, prefix, flat):
    """Read at random from threads, in the tar's order, as a folder would be; nothing is written anywhere."""
    long_name = "x" * 90 + ".jpg"
    names = ["b.jpg", "a.jpg", long_name] if flat else ["dog/b.jpg", "cat/deep/a.jpg", f"dog/{long_name}"]
    data = [os.urandom(size) for size in (5, 700, 2000)]
    path = tmp_path / "photos.tar"
    path.write_bytes(
        tar_bytes({prefix + name: one for name, one in zip(names, data)} | {prefix + "notes.txt": b"x"}, format=fmt)
    )
    with list_source(path) as listing, ThreadPoolExecutor(4) as pool:
        clean = prefix.removeprefix("./").lstrip("/")
        assert listing.names == [clean + name for name in names]
        assert listing.classes == (None if flat else ["cat", "dog"])
        assert flat or [listing.classes[k] for k in listing.labels] == ["dog", "cat", "dog"]
        assert list(pool.map(listing.read, [0, 1, 2] * 20)) == data * 20
        assert listing.ignored == 1 and not listing.rejected
    assert os.listdir(tmp_path) == ["photos.tar"]


def test_tar_of_class_tars(tmp_path):
    inner = {
        f"n0{k}.tar": tar_bytes({f"n0{k}_{j}.JPEG": f"{k}{j}".encode() * 300 for j in range(3)} | {"._x.JPEG": b""})
        for k in (2, 1)
    }
    path = tmp_path / "train.tar"
    path.write_bytes(tar_bytes(inner | {"._n09.tar": b"mac", "stray.jpg": b"s"}))
    with list_source(path) as listing:
        assert listing.classes == ["n01", "n02"]
        assert content(listing) == [
            (f"n0{k}.tar/n0{k}_{j}.JPEG", f"n0{k}", f"{k}{j}".encode() * 300) for k in (2, 1) for j in range(3)
        ]
        assert [name for name, _ in listing.rejected] == ["stray.jpg"] and listing.ignored == 3


def test_hostile_tar_members(tmp_path):
    path = tmp_path / "in" / "bad.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        add(archive, "cat/good.jpg", b"good")
        add(archive, "../../evil.jpg", b"evil")
        add(archive, "cat/../../evil2.jpg", b"evil")
        add(archive, "cat/link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(archive, "cat/hard.jpg", type=tarfile.LNKTYPE, linkname="../../secret")
        add(archive, "cat/device.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        add(archive, "cat/fifo.jpg", type=tarfile.FIFOTYPE)
        add(archive, "cat/good.jpg", b"twice")
        add(archive, "dog/new\nline \udcff.jpg", b"odd")
        add(archive, "cat/folder.jpg", type=tarfile.DIRTYPE)
    with list_source(path) as listing:
        assert [(name, data) for name, _, data in content(listing)] == [
            ("cat/good.jpg", b"good"),
            ("dog/new\nline \udcff.jpg", b"odd"),
        ]
        assert [name for name, _ in listing.rejected] == [
            "../../evil.jpg",
            "cat/../../evil2.jpg",
            "cat/link.jpg",
            "cat/hard.jpg",
            "cat/device.jpg",
            "cat/fifo.jpg",
            "cat/good.jpg",
        ]
    assert os.listdir(tmp_path) == ["in"] and os.listdir(tmp_path / "in") == ["bad.tar"]


def test_cut_tars(tmp_path):
    whole = tar_bytes({"cat/a.jpg": b"a" * 1000, "dog/b.jpg": b"b" * 3000})
    path = tmp_path / "cut.tar"
    path.write_bytes(whole[: 512 + 1024 + 512 + 100])
    with pytest.raises(SourceError, match=r"cut.tar: damaged or cut off tar, behind member 2 at byte 1536"):
        list_source(path)
    inner_cut = whole[: 512 + 1024 + 512 + 100]
    path.write_bytes(tar_bytes({"n01.tar": whole, "n02.tar": inner_cut}))
    with list_source(path) as listing:
        assert listing.names == ["n01.tar/cat/a.jpg", "n01.tar/dog/b.jpg", "n02.tar/cat/a.jpg"]
        assert [name for name, _ in listing.rejected] == ["n02.tar/dog/b.jpg", "n02.tar"]


def test_damaged_tar_headers_are_noticed(tmp_path):
    """tarfile itself takes a damaged header in the middle for the end of the archive."""
    whole = bytearray(tar_bytes({f"cat/{k}.jpg": b"a" * 600 for k in range(5)}))
    whole[2 * 1536 + 100] ^= 0xFF
    path = tmp_path / "bad.tar"
    path.write_bytes(whole)
    with pytest.raises(SourceError, match="damaged tar: no valid member header at byte 3072"):
        list_source(path)
    path.write_bytes(tar_bytes({"n01.tar": tar_bytes({"a.jpg": b"a"}), "n02.tar": bytes(whole)}))
    with list_source(path) as listing:
        assert listing.names == ["n01.tar/a.jpg", "n02.tar/cat/0.jpg", "n02.tar/cat/1.jpg"]
        assert [name for name, _ in listing.rejected] == ["n02.tar"]


def test_random_damage_to_a_tar_ends(tmp_path):
    """Any damage gives an error or a listing whose photos lie inside the file; never an endless loop."""
    inner = {"n01.tar": tar_bytes({f"{k}.jpg": b"a" * 90 for k in range(3)}), "n02.tar": tar_bytes({"b.jpg": b"b"})}
    good = np.frombuffer(tar_bytes(inner), np.uint8)
    rng = np.random.default_rng(0)
    path = tmp_path / "bad.tar"
    listed = 0
    for _ in range(300):
        bad = good.copy()
        # Where headers are, and with the checksum made right again in half of the cases.
        header = 512 * int(rng.choice([0, 1, 3, 5, 21, 22]))
        bad[header + rng.integers(0, 512, 3)] = rng.choice(np.frombuffer(b"\x00\x80\xff0179-x", np.uint8), 3)
        if rng.integers(2):
            bad[header + 148 : header + 156] = 32
            bad[header + 148 : header + 156] = np.frombuffer(b"%06o\0 " % bad[header : header + 512].sum(), np.uint8)
        path.write_bytes(bad.tobytes())
        try:
            with list_source(path) as listing:
                listed += 1
                assert all(len(listing.read(i)) == listing.sizes[i] for i in range(len(listing)))
        except SourceError as error:
            assert "bad.tar" in str(error)
    assert 30 < listed < 300


def test_the_fingerprint_knows_the_photos(tmp_path):
    root = grow(tmp_path / "src", {"cat/a.jpg": b"abc", "dog/b.jpg": b"b"})

    def fingerprint():
        with list_source(root) as listing:
            return listing.fingerprint

    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    (root / "dog/readme.txt").write_text("no photo")
    assert fingerprint() == seen[0]
    for change in (
        lambda: (root / "dog/c.jpg").write_bytes(b"c"),
        lambda: (root / "dog/c.jpg").rename(root / "dog/d.jpg"),
        lambda: (root / "dog/d.jpg").write_bytes(b"cc"),
        lambda: os.utime(root / "dog/d.jpg", ns=(0, 12345)),
        lambda: (root / "dog").rename(root / "bird"),
    ):
        change()
        seen.append(fingerprint())
    assert len(set(seen)) == len(seen)


def test_hard_links_in_a_tar_are_photos(tmp_path):
    """To a photo of this very tar that came before; anything else stays a reject."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as archive:
        add(archive, "cat/1.jpg", b"one")
        for name, target in {"dog/1.jpg": "./cat/1.jpg", "dog/2.jpg": "cat/2.jpg", "cat/1.jpg": "cat/1.jpg"}.items():
            add(archive, name, type=tarfile.LNKTYPE, linkname=target)
        add(archive, "cat/2.jpg", b"two")
    (tmp_path / "x.tar").write_bytes(inner.getvalue())
    with list_source(tmp_path / "x.tar") as listing:
        assert content(listing) == [
            ("cat/1.jpg", "cat", b"one"), ("dog/1.jpg", "dog", b"one"), ("cat/2.jpg", "cat", b"two")
        ]  # fmt: skip
        assert [name for name, _ in listing.rejected] == ["dog/2.jpg", "cat/1.jpg"]
    (tmp_path / "y.tar").write_bytes(tar_bytes({"a.tar": inner.getvalue(), "b.tar": inner.getvalue()}))
    with list_source(tmp_path / "y.tar") as listing:
        assert [name for name, _, data in content(listing) if data == b"one"] == [
            f"{tar}.tar/{name}" for tar in "ab" for name in ("cat/1.jpg", "dog/1.jpg")
        ]
