"""The images install by the steps that the documentation gives and that CI has run."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ["docker/Dockerfile", "docker/Dockerfile.cpu"]


def apt_packages(text: str) -> set[str]:
    (line,) = re.findall(r"apt-get install ([^\n&>\\]+)", text)
    return {word for word in line.split() if not word.startswith("-")}


def extras(text: str) -> set[str]:
    return {name for found in re.findall(r"pip install [^\n]*'\.\[([a-z,]+)\]'", text) for name in found.split(",")}


@pytest.mark.parametrize("name", FILES)
def test_the_images_follow_the_documented_steps(name: str) -> None:
    image, section = (ROOT / name).read_text(), (ROOT / "docs/install-and-engines.md").read_text()
    assert apt_packages(image) == apt_packages(section) == apt_packages((ROOT / ".ci/run").read_text())
    assert extras(image) == extras(section) == {"ffcv", "dali", "onnx", "detect"}


@pytest.mark.parametrize("name", FILES)
def test_every_install_is_pinned_and_every_copied_file_is_there(name: str) -> None:
    image = (ROOT / name).read_text()
    installs = re.findall(r"^RUN pip install .*$", image, re.MULTILINE)
    assert installs and all("-c constraints.txt" in line for line in installs)
    copied = [source for line in re.findall(r"^COPY (.*) \S+$", image, re.MULTILINE) for source in line.split()]
    assert "docker/constraints.txt" in copied
    for source in copied:
        assert (ROOT / source).exists(), source
    # What the package is built from must be among them, or the image would lack it.
    assert {"fastssl", "pipelines", "benchmarks", "setup.cfg", "pyproject.toml"} <= set(copied)


def test_the_pins_cover_what_is_installed_and_fit_it() -> None:
    packaging = pytest.importorskip("packaging.requirements")
    pins = dict(line.split("==") for line in (ROOT / "docker/constraints.txt").read_text().splitlines() if "==" in line)
    pins = {name.lower(): version for name, version in pins.items()}
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    wanted = config["options"]["install_requires"] + "".join(
        config["options.extras_require"][name] for name in ("ffcv", "dali", "onnx", "detect")
    )
    requirements = [
        packaging.Requirement(line) for line in wanted.splitlines() if line.strip() and not line.strip().startswith("#")
    ]
    assert len(requirements) > 10
    for requirement in requirements:
        assert requirement.name.lower() in pins, f"{requirement.name} is not pinned in docker/constraints.txt"
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement
