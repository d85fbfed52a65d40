from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastssl.pipelines.plan import compiled_draw as draw


@pytest.mark.slow
def test_compiled_code_that_cannot_be_read_or_kept_is_compiled_again(tmp_path: Path) -> None:
    """The files of an earlier run, cut short or replaced; and a folder without room."""
    code = "from fastssl.pipelines.plan import compiled_draw as draw; print(draw.portable_exp(1.5))"

    def run(folder: Path) -> str:
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        ).stdout

    first = run(tmp_path)
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) == 2 and float(first) == draw.portable_exp(1.5)
    for damage in (
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    ):
        for path in kept:
            damage(path)
        assert run(tmp_path) == first
    assert run(Path("/dev/full")) == first  # not a folder at all


def test_without_the_compiler_it_says_so() -> None:
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    result = subprocess.run(
        [sys.executable, "-c", "import fastssl.pipelines.plan.compiled_draw"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "FastSSLError: NUMBA_DISABLE_JIT is set" in result.stderr


def test_uniform_and_below_use_all_bits() -> None:
    words = np.array([0, 1, 2**31, 2**32 - 1], dtype=np.uint64)
    assert [draw._uniform(word) for word in words] == [0.0, 2.0**-32, 0.5, 1.0 - 2.0**-32]
    assert [draw._below(word, 10) for word in words] == [0, 0, 5, 9]
    assert [draw._below(word, bound) for word, bound in zip(words, (1, 2, 3, 2**32 - 1))] == [0, 0, 1, 2**32 - 2]


def test_portable_exp_is_exact_to_the_bit_everywhere() -> None:
    """Compiled it rounds each operation as Python does: nothing was fused or taken in another order."""
    x = np.linspace(-7, 7, 2001)
    mine = np.array([draw.portable_exp(value) for value in x])
    assert np.abs(mine / np.exp(x) - 1).max() < 1e-13
    assert mine.tolist() == [draw.portable_exp.py_func(float(value)) for value in x]
