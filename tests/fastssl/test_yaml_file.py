"""Recipes from anywhere: one clear line, quickly, whatever stands in the file."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from fastssl.config.recipe import RECIPE_FOLDER, load_recipe
from fastssl.errors import FastSSLError
from fastssl.utils.yaml_file import MAX_BYTES, parse_yaml, read_yaml

LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40))

#: name -> (text, what the message says)
HOSTILE = {
    "billion laughs": (LAUGHS, "more than 10,000 values"),
    "billion laughs as a value": ("epochs: [" + "*a, " * 3 + "1]\n", "found undefined alias"),
    "merged without end": (MERGES, "more than 10,000 values"),
    "a chain of aliases": (
        "".join(f"a{n}: &a{n} [{f'*a{n - 1}' if n else ''}]\n" for n in range(2500)),
        "more than 20 deep in one another",
    ),
    "holds itself": ("train: &a [*a]", "a value that holds itself"),
    "holds itself as its key": ("&a ? *a\n: 1", "."),
    "deep": ("[" * 3000, "more than 20 deep in one another"),
    "deep mappings": ("{a: " * 3000, "more than 20 deep in one another"),
    "deep blocks": ("- " * 3000, "more than 20 deep in one another"),
    "thirty levels": ("[" * 30 + "]" * 30, "more than 20 deep"),
    "twice": ("method: moco\nmethod: dino", "key 'method' stands twice"),
    "twice, inside": ("train: {epochs: 1, epochs: 2}", "key 'epochs' stands twice"),
    "python": ("!!python/object/apply:os.system ['touch broken']", "could not determine a constructor"),
    "python, inside": ("train: !!python/name:os.system ''", "could not determine a constructor"),
    "python, new": (
        "train: !!python/object/new:subprocess.Popen [[touch, broken]]",
        "could not determine a constructor",
    ),
    "not a number": ("optim: {lr: .nan}", "optim.lr must be a finite number, got nan"),
    "infinite": ("optim: {lr: -.inf}", "optim.lr must be a finite number, got -inf"),
    "too large": ("optim: {lr: 1.0e+400}", "optim.lr must be a finite number, got inf"),
    "too large, a string to yaml": ("optim: {lr: 1e400}", "optim.lr must be a finite number, got inf"),
    "many digits": ("train: {epochs: " + "9" * 5000 + "}", "a value that cannot be read"),
    "a date that is none": ("train: 2001-99-99", "a value that cannot be read"),
    "an empty number": ("train: !!int ''", "a value that cannot be read"),
    "a list as key": ("? [a, b]\n: 1", "not a yaml file"),
    "a long string": ("train: " + "x" * 60_000, r"train must be a mapping.{,200}xxx\.\.\.$"),
    "a long key": ("x" * 60_000 + ": 1", r"not a yaml file|no key 'xxx.{,200}\.\.\.$"),
    "a long quoted key": ("? '" + "x" * 60_000 + "'\n: 1", r"no key 'xx.{,200}\.\.\.$"),
    "a long list": ("train: [" + "1, " * 9000 + "1]", r"train must be a mapping.*\.\.\.$"),
    "two documents": ("a: 1\n--- \nb: 2", "expected a single document"),
    "a control character": ("method: \x1b[31m", "special characters are not allowed"),
    "tabs": ("train:\n\tepochs: 1", "cannot start any token"),
    "nothing": ("", "a recipe is a mapping"),
    "a list": ("- 1", "a recipe is a mapping"),
    "many anchors": ("".join(f"k{n}: &k{n} v\n" for n in range(4500)), "."),
    "brackets": ("[] " * 20_000, "."),
    "questions": ("? " * 30_000, "."),
    "quotes": ("'" * 60_001, "."),
    "long lines of dashes": ("-" * 60_000, "."),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_recipes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, message = HOSTILE[name]
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    started = time.process_time()
    with pytest.raises(FastSSLError, match=message) as caught:
        load_recipe(str(path))
    assert time.process_time() - started < 10
    said = str(caught.value)
    assert "bad.yaml" in said and "\n" not in said and len(said) < 1000
    assert os.listdir(tmp_path) == ["bad.yaml"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values_on_the_command_line(name: str) -> None:
    """The same texts behind ``--set``."""
    text, _ = HOSTILE[name]
    started = time.process_time()
    with pytest.raises(FastSSLError) as caught:
        load_recipe("quickstart", {"train.epochs": text})
    said = str(caught.value)
    assert time.process_time() - started < 10 and "train.epochs" in said and "\n" not in said and len(said) < 1000


def test_files_that_are_none(tmp_path: Path) -> None:
    pipe, link, folder, dead = (tmp_path / f"{name}.yaml" for name in ("pipe", "link", "folder", "dead"))
    os.mkfifo(pipe)
    link.symlink_to("/dev/zero")
    folder.mkdir()
    dead.symlink_to(tmp_path / "nowhere")
    for path, message in [
        (pipe, "not a plain file"),
        (link, "not a plain file"),
        (folder, "not a plain file"),
        (dead, "no such recipe file"),
    ]:
        with pytest.raises(FastSSLError, match=rf"{path.name}: .*{message}"):
            load_recipe(str(path))
    large = tmp_path / "large.yaml"
    large.touch()
    os.truncate(large, 100 << 20)
    with pytest.raises(FastSSLError, match=r"large.yaml: is longer than 64 KiB"):
        load_recipe(str(large))
    large.write_bytes(b"method: \xff\xfe")
    with pytest.raises(FastSSLError, match="not UTF-8 at byte 8"):
        load_recipe(str(large))
    for name in ("a\0b.yaml", "\0", "x" * 5000 + ".yaml", "../recipes/quickstart\n"):
        with pytest.raises((FastSSLError, OSError)):
            load_recipe(name)


def test_a_link_to_a_recipe_is_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").symlink_to(RECIPE_FOLDER / "quickstart.yaml")
    assert load_recipe(str(tmp_path / "mine.yaml")) == load_recipe("quickstart")


def test_what_people_write_is_read(tmp_path: Path) -> None:
    """Anchors and merges in the measure of a recipe, comments, any length up to the limit."""
    text = "base: &base {size: 224, count: 1}\nviews: [{<<: *base, blur: 1.0}, *base]\n"
    assert parse_yaml(text, "")["views"] == [{"size": 224, "count": 1, "blur": 1.0}, {"size": 224, "count": 1}]
    path = tmp_path / "long.yaml"
    path.write_text(text + "#" * (MAX_BYTES - len(text)))
    assert read_yaml(path)["base"] == {"size": 224, "count": 1}
    assert parse_yaml("# nothing", "") is None
