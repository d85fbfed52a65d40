"""What a result says of the machine and the code that made it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from fastssl.utils import versions
from fastssl.utils.versions import describe_git, describe_host, describe_versions


def test_git_is_none_outside_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "versions.py"))
    assert describe_git() is None


def test_git_names_the_commit_and_says_when_files_differ_from_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *arguments],
            check=True,
            capture_output=True,
        )

    file = tmp_path / "versions.py"
    file.write_text("first")
    git("init")
    monkeypatch.setattr(versions, "__file__", str(file))
    assert describe_git() is None  # lies in a checkout, and is no part of it
    git("add", "versions.py")
    git("commit", "-m", "first")
    clean = describe_git()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    file.write_text("second")
    assert describe_git() == f"{clean}-dirty"


def test_no_name_of_host_or_user_is_given_away() -> None:
    assert describe_host().keys() <= {"cpu", "cores", "system", "memory_gib", "gpu", "gpus"}
    assert {"python", "fastssl", "torch", "timm"} <= describe_versions().keys()
