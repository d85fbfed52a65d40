"""No test that needs an engine is left out where the engines are: what asks for one must bear the mark that runs it
there.
"""

from __future__ import annotations

import re
from pathlib import Path

import conftest
import pytest

from fastssl.pipelines.engines import registry as engines
from fastssl.pipelines.engines.registry import EngineState

ROOT = Path(__file__).parents[1]


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "engine_state", lambda name: EngineState(name, None, "not installed"))


def test_who_asks_for_an_engine_without_the_mark_fails(missing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for everything in ("", "1"):
        monkeypatch.setenv("FASTSSL_ALL_ENGINES", everything)
        with pytest.raises(pytest.fail.Exception, match="mark it with `engines`"):
            conftest.need_engine("dali")


@pytest.mark.engines
def test_with_the_mark_it_is_skipped_or_fails_where_all_must_be_there(
    missing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTSSL_ALL_ENGINES", raising=False)
    with pytest.raises(pytest.skip.Exception, match="dali: not installed"):
        conftest.need_engine("dali")
    monkeypatch.setenv("FASTSSL_ALL_ENGINES", "1")
    with pytest.raises(pytest.fail.Exception, match="dali: not installed"):
        conftest.need_engine("dali")


def test_every_file_that_asks_for_an_engine_has_the_mark() -> None:
    for path in ROOT.glob("tests/**/test_*.py"):
        text = path.read_text()
        if re.search(r"need_engine\(|engine_state\(|import ffcv|nvidia\.dali import", text):
            assert "mark.engines" in text, path


def test_the_suite_runs_once_without_the_engines_and_then_what_needs_them() -> None:
    steps = (ROOT / ".ci/run").read_text()
    order = [
        steps.index(step)
        for step in (
            "uninstall --quiet --yes ffcv",
            "make test-all\n",
            "'.[test,ffcv,dali,torchcodec]'",
            "make test-engines",
        )
    ]
    assert order == sorted(order)
    assert "|| true" not in steps and "set -euo pipefail" in steps
