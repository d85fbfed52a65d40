"""What is written can be passed on: it names no folder, machine or user, and nothing of the environment."""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path

import pytest
from conftest import jpeg_bytes, make_photo
from PIL import Image

from fastssl.cli import main

#: the folder in which everything happens: a name that would tell something
FOLDER = "klinik-dr-mabuse-4711"
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI-K7MDENG",
    "HF_TOKEN": "hf_secretsecretsecret",
    "WANDB_API_KEY": "0123456789abcdef0123",
    "SLURM_JOB_ACCOUNT": "projekt-geheim-17",
    "SLURM_SUBMIT_DIR": "/lustre/geheim/submit",
    "SLURMD_NODENAME": "node-geheim-0815",
    "HOSTNAME": "host-geheim-0815",
    "USER": "benutzer-geheim",
    "LOGNAME": "benutzer-geheim",
    "SSH_CONNECTION": "203.0.113.77 51515 203.0.113.78 22",
}
#: in the photos' own metadata: pictures that are drawn from them have none of it
DESCRIPTION = "Patientin 0815, Zimmer 12"

SMALL = {
    "train.epochs": 2,
    "train.batch_size": 8,
    "train.log_every": 2,
    "moco.queue": 32,
    "moco.projector.hidden": 16,
    "moco.projector.out": 8,
    "views.0.size": 32,
    "probe.size": 32,
    "probe.online_samples": 20,
    "probe.every_epochs": 1,
}


def run(*arguments: object, status: int = 0) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(one) for one in arguments])
    assert (stop.value.code or 0) == status, arguments


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """(the folder, all that was written into it by converting, training, evaluating and exporting; by name)."""
    folder = tmp_path_factory.mktemp("data") / FOLDER
    photos = folder / "photos"
    exif = Image.Exif()
    exif[0x010E], exif[0x013B] = DESCRIPTION, "Dr. Mabuse"
    for number in range(24):
        name = photos / ("blue", "red")[number % 2] / f"{number}.jpg"
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_bytes(jpeg_bytes(make_photo(number, 40, 48), exif=exif.tobytes()))
    (photos / "red" / "bad.jpg").write_bytes(b"no picture")
    out, data = folder / "out", folder / "photos.beton"
    out.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        run("convert-imagenet", photos, data, "--json", out / "convert.json")
        run("verify", data, "--json", out / "verify.json")
        (out / "cut.beton").write_bytes(data.read_bytes()[:5000])
        (out / "side.beton").write_bytes(data.read_bytes())
        (out / "side.beton.json").write_text('{"classes": null, "bytes": 5}')
        for name in ("cut", "side"):
            run("verify", out / f"{name}.beton", "--json", out / f"{name}.json", status=1)
        overrides = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
        run(
            "pretrain",
            "--arch",
            "lcnet_035",
            "--recipe",
            "few-photos-moco",
            "--device",
            "cpu",
            "--data",
            data,
            "--out",
            out / "run",
            *overrides,
        )
        run("evaluate", "knn", out / "run", "--data", data, "--size", 32, "--k", 3, "--json", out / "knn.json")
        run("evaluate", "linear", out / "run", "--data", data, "--size", 32, "--json", out / "linear.json")
        run("evaluate", "compare", out / "knn.json", out / "linear.json", "--out", out / "comparison")
        run("views", data, "--recipe", "few-photos-moco", "--out", out / "views.png")
        run("export", out / "run", out / "timm")
        run("export", out / "run", out / "mine.safetensors", "--format", "safetensors")
        run("report", out / "run")
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return folder, {name: content for name, content in found.items() if not name.startswith("photos/")}


def test_everything_is_there(written: tuple[Path, dict[str, bytes]]) -> None:
    """That what is looked through below is what commands write."""
    names = set(written[1])
    run_files = {
        f"out/run/{name}"
        for name in (
            "config.yaml",
            "metrics.jsonl",
            "report.html",
            "checkpoints/last.pt",
            "checkpoints/last.safetensors",
        )
    }
    assert (
        run_files <= names
        and {"photos.beton", "photos.beton.json", "photos.beton.rejects.jsonl", "out/knn.json", "out/views.png"}
        <= names
    )
    assert (
        len(names) > 14
        and b"bad.jpg" in written[1]["photos.beton.rejects.jsonl"]
        and b"knn" in written[1]["out/knn.json"]
    )


def test_no_folder_machine_or_user(written: tuple[Path, dict[str, bytes]]) -> None:
    folder, files = written
    telling = {"the folder": FOLDER, "where it is": str(folder.parent), "the home folder": str(Path.home()), **SECRETS}
    if len(socket.gethostname()) > 4:
        telling["the machine"] = socket.gethostname()
    telling["the checkout"] = str(Path(__file__).resolve().parents[2])
    telling["the temporary folder"] = "/tmp/"
    found = [(name, what) for name, content in files.items() for what, text in telling.items() if _holds(content, text)]
    assert found == []


def _holds(content: bytes, text: str) -> bool:
    return any(text.encode(encoding) in content for encoding in ("utf-8", "utf-16-le"))


def test_no_metadata_of_the_photos(written: tuple[Path, dict[str, bytes]]) -> None:
    """A photo that needs no change is stored byte for byte, with its EXIF; nothing else has any of it."""
    _, files = written
    assert _holds(files["photos.beton"], DESCRIPTION)
    assert [
        name
        for name, content in files.items()
        if not name.endswith(".beton") and (_holds(content, DESCRIPTION) or _holds(content, "Mabuse"))
    ] == []
    drawn = 0
    for name, content in files.items():
        if name.endswith((".png", ".jpg")):
            drawn += 1
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                assert not image.getexif() and not set(image.info) - {"dpi"}, (name, image.info)
    assert drawn > 1


def test_files_are_for_whom_the_umask_says(written: tuple[Path, dict[str, bytes]]) -> None:
    folder, files = written
    mask = os.umask(0)
    os.umask(mask)
    for name in files:
        assert (folder / name).stat().st_mode & 0o7111 == 0 and (folder / name).stat().st_mode & 0o777 & mask == 0, name
