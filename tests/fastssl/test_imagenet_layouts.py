"""ImageNet as people have it: the commands of docs/data.md on made-up sets of the same layouts, with 20 classes. Labels
are those of torchvision's ImageFolder on the same photos, sorted into class folders.
"""

from __future__ import annotations

import io
import json
import shlex
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import jpeg_bytes, make_photo
from torchvision.datasets import ImageFolder

from fastssl.cli import cli
from fastssl.evaluate.photos import open_split
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.convert.sources import list_splits
from tests.pipelines.test_labels import synsets

DRAW = np.random.default_rng(7)
#: In the devkit's order, which is not the sorted one.
WNIDS = [f"n{number:08}" for number in DRAW.choice(np.arange(1_440_764, 15_075_141), 20, replace=False)]
KAGGLE = "imagenet-object-localization-challenge"


def commands() -> dict[str, list[str]]:
    """The commands of docs/data.md, by what stands in front of them: {"original": ["fastssl ...", ...], ...}"""
    text = (Path(__file__).parents[2] / "docs/data.md").read_text().split("## ImageNet\n")[1].split("```")[1]
    blocks = [block.splitlines() for block in text.removeprefix("bash\n").split("# ")[1:]]
    lines = ["\n".join(block).replace("\\\n", "").splitlines() for block in blocks]
    return {block[0].split(":")[0]: [line for line in block[1:] if line] for block in lines}


class Photos:
    """{name: bytes} of a split. ``classes``: the class of each, by name."""

    def __init__(self, names: dict[str, str]):
        self.classes = names
        self.files = {name: jpeg_bytes(make_photo(k, 24, 32)) for k, name in enumerate(names)}


@pytest.fixture(scope="module")
def train() -> Photos:
    return Photos({f"{wnid}_{k}.JPEG": wnid for wnid in WNIDS for k in (10026, 3, 451)})


@pytest.fixture(scope="module")
def val() -> Photos:
    """Each class twice, in no order."""
    drawn = np.random.default_rng(8).permutation(WNIDS * 2)
    return Photos({f"ILSVRC2012_val_{k:08}.JPEG": str(wnid) for k, wnid in enumerate(drawn, 1)})


@pytest.fixture(scope="module")
def test() -> Photos:
    return Photos({f"ILSVRC2012_test_{k:08}.JPEG": "" for k in range(1, 6)})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(lines: list[str]) -> str:
    said = ""
    for line in lines:
        result = CliRunner().invoke(cli, shlex.split(line)[1:])
        assert result.exit_code == 0, result.output
        said += result.output
    return said


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def require_torchvisions_labels(path: Path, photos: Photos, folder: Path) -> None:
    """Every photo is in the file, as it was, with the label of an ImageFolder."""
    for name, wnid in photos.classes.items():
        (folder / wnid).mkdir(parents=True, exist_ok=True)
        (folder / wnid / name).write_bytes(photos.files[name])
    expected = {Path(file).read_bytes(): label for file, label in ImageFolder(str(folder)).samples}
    with BetonReader(path) as reader:
        assert reader.labels is not None
        found = {bytes(reader.encoded(k)): int(reader.labels[k]) for k in range(len(reader))}
    assert found == expected and len(found) == len(photos.files)


def require_no_labels(path: Path, photos: Photos) -> None:
    with BetonReader(path) as reader:
        assert not reader.labelled and len(reader) == len(photos.files)


def test_the_original_tars(here: Path, train: Photos, val: Photos) -> None:
    """A tar of class tars, a flat tar, and the devkit, whose class numbers are an order of their own."""
    per_class = {wnid: {name: train.files[name] for name, of in train.classes.items() if of == wnid} for wnid in WNIDS}
    drawn = {f"{wnid}.tar": tar(per_class[wnid]) for wnid in reversed(WNIDS)}
    Path("ILSVRC2012_img_train.tar").write_bytes(tar(drawn))
    # In a tar the photos need not be in order.
    shuffled = dict(sorted(val.files.items(), key=lambda item: item[1]))
    Path("ILSVRC2012_img_val.tar").write_bytes(tar(shuffled))
    truth = "".join(f"{WNIDS.index(val.classes[name]) + 1}\n" for name in sorted(val.classes))
    inside = "ILSVRC2012_devkit_t12"
    devkit = {
        f"{inside}/COPYING": b"",
        f"{inside}/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
        f"{inside}/data/meta.mat": synsets(WNIDS),
        f"{inside}/readme.txt": b"",
    }
    Path("ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar(devkit, "w:gz"))
    said = run(commands()["original"])
    assert "60 photos, 20 classes: 60 copied" in said and "40 photos, 20 classes: 40 copied" in said
    require_torchvisions_labels(Path("train.beton"), train, here / "sorted" / "train")
    require_torchvisions_labels(Path("val.beton"), val, here / "sorted" / "val")
    with open_split("train.beton", "val.beton") as split:
        assert split.train.classes == split.val.classes == sorted(WNIDS)


def kaggle(train: Photos, val: Photos, test: Photos) -> dict[str, bytes]:
    """What is in Kaggle's zip."""
    data, notes = "ILSVRC/Data/CLS-LOC", "ILSVRC/Annotations/CLS-LOC"
    files = {f"{notes}/val/{name.replace('JPEG', 'xml')}": b"<annotation/>" for name in val.files}
    files |= {f"{data}/test/{name}": photo for name, photo in test.files.items()}
    files |= {f"{data}/train/{train.classes[name]}/{name}": photo for name, photo in train.files.items()}
    files |= {f"{data}/val/{name}": photo for name, photo in val.files.items()}
    files |= {"ILSVRC/ImageSets/CLS-LOC/val.txt": b"ILSVRC2012_val_00000001 1\n"}
    names = "".join(f"{wnid} a thing, some thing\n" for wnid in sorted(WNIDS))
    boxes = [f"{name.split('.')[0]},{wnid} 1 2 30 40 {wnid} 5 6 7 8 " for name, wnid in val.classes.items()]
    solution = ["ImageId,PredictionString", *sorted(boxes, key=lambda line: line[::-1])]
    return files | {
        "LOC_sample_submission.csv": b"ImageId,PredictionString\nILSVRC2012_test_00000001,n0 1 2 3 4\n",
        "LOC_synset_mapping.txt": names.encode(),
        "LOC_train_solution.csv": b"ImageId,PredictionString\nn02017213_7894,n02017213 115 49 448 294 \n",
        "LOC_val_solution.csv": "\n".join(solution).encode(),
    }


@pytest.mark.parametrize("unpacked", [False, True])
def test_kaggles_zip(here: Path, train: Photos, val: Photos, test: Photos, unpacked: bool) -> None:
    with zipfile.ZipFile(f"{KAGGLE}.zip", "w") as archive:
        for name, data in kaggle(train, val, test).items():
            archive.writestr(name, data)
        if unpacked:
            archive.extractall(KAGGLE)
    lines = commands()["Kaggle's zip, or the folder that it unpacks to"]
    run([line.replace(f"{KAGGLE}.zip", KAGGLE) if unpacked else line for line in lines])
    require_torchvisions_labels(Path("imagenet-train.beton"), train, here / "sorted" / "train")
    require_torchvisions_labels(Path("imagenet-val.beton"), val, here / "sorted" / "val")
    require_no_labels(Path("imagenet-test.beton"), test)
    with BetonReader("imagenet-train.beton") as one, BetonReader("imagenet-val.beton") as other:
        assert one.classes == other.classes == sorted(WNIDS)


def test_the_hubs_parquet(here: Path, train: Photos, val: Photos, test: Photos) -> None:
    """Its classes have words for names, in the order of the wnids; labels of test are -1."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    order = sorted(WNIDS)
    words = [f"thing {100 - k}, some thing" for k in range(20)]
    features = {"image": {"_type": "Image"}, "label": {"names": words, "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("image", image), ("label", pyarrow.int64())], about)
    folder = Path("imagenet-1k/data")
    folder.mkdir(parents=True)
    for split, photos, parts in (("train", train, 3), ("validation", val, 2), ("test", test, 1)):
        rows = [
            {"image": {"bytes": data, "path": name}, "label": order.index(of) if of else -1}
            for (name, data), of in zip(photos.files.items(), photos.classes.values())
        ]
        for part in range(parts):
            table = pyarrow.Table.from_pylist(rows[part::parts], schema)
            parquet.write_table(table, folder / f"{split}-{part:05}-of-{parts:05}-0123456789abcdef.parquet")
    run(commands()["the Hugging Face hub's parquet files"])
    require_torchvisions_labels(Path("imagenet-train.beton"), train, here / "sorted" / "train")
    require_torchvisions_labels(Path("imagenet-val.beton"), val, here / "sorted" / "val")
    require_no_labels(Path("imagenet-test.beton"), test)
    with BetonReader("imagenet-train.beton") as reader:
        assert reader.classes == words
    listings = list_splits(Path("imagenet-1k"))
    assert {split: len(listing) for split, listing in listings.items()} == {"train": 60, "val": 40, "test": 5}
    next(iter(listings.values())).close()


def test_photos_sorted_by_hand(here: Path, train: Photos, val: Photos) -> None:
    """As PyTorch's examples want them: train/WNID/, val/WNID/."""
    for split, photos in (("train", train), ("val", val)):
        for name, wnid in photos.classes.items():
            (here / "imagenet" / split / wnid).mkdir(parents=True, exist_ok=True)
            (here / "imagenet" / split / wnid / name).write_bytes(photos.files[name])
    run(["fastssl convert-imagenet imagenet/ imagenet.beton --keep-size"])
    require_torchvisions_labels(Path("imagenet-train.beton"), train, here / "sorted" / "train")
    require_torchvisions_labels(Path("imagenet-val.beton"), val, here / "sorted" / "val")
