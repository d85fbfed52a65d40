"""``fastssl embed``: the features of photos as a file that other tools read, written as they come."""

from __future__ import annotations

import csv
import importlib.util
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.distributed.collectives import barrier
from fastssl.distributed.world import first_of_host_speaks
from fastssl.errors import FastSSLError
from fastssl.evaluate import features
from fastssl.evaluate.features import Bar, ProbeError, extract_features, require_size, shard, silent
from fastssl.evaluate.photos import open_photos, stored_names
from fastssl.evaluate.session import Session
from fastssl.pipelines.convert.conversion import require_target
from fastssl.pipelines.convert.sources import is_source
from fastssl.utils.addresses import shown
from fastssl.utils.atomic_files import UNFINISHED, write_atomically
from fastssl.utils.json_text import to_json

#: Batches whose features a process holds.
_HELD = 32


def embed(
    session: Session, data: str | Path, out: str | Path, *, half: bool = False, bar: Bar = silent, **how: Any
) -> dict[str, Any]:
    """Write the features of all photos, a row each in their order, as `extract_features` gives them. Several processes
    share the work, on one file system, and hold those of some batches each. ``out`` is whole or absent.

    Args:
        session: whose network it is. data: as of `open_photos`, labelled or not.
        out: ``.npy``, (N, F); or ``.csv`` or ``.parquet`` of the columns id, path, label and these numbers. OUT.json
            has the columns, and says how all was made. half: float16 and not float32.
        how: ``photos``: what a ``.beton`` file, which holds no paths, was converted from. ``size``, ``crop``, or None:
            the run's own. ``batch_size``, ``workers``.

    Returns what OUT.json says but for the columns and ``made_from``, which is private; {} in all processes but the
    first. Raises FastSSLError for what cannot be read, and features that are NaN, infinite or beyond float16.
    """
    out, photos, batch = Path(out), how.pop("photos", None), how.setdefault("batch_size", 256)
    draft = out.with_name(f"{out.name}.features{UNFINISHED}")
    writers = {".npy": lambda path, *_: os.replace(draft, path), ".csv": _write_csv, ".parquet": _write_parquet}
    with ExitStack() as opened:
        with first_of_host_speaks():
            if (write := writers.get(out.suffix)) is None:
                raise FastSSLError(f"{out}: features are written as .npy, .csv or .parquet")
            if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
                raise FastSSLError(f"{out}: parquet needs pyarrow: pip install 'fastssl-vision[parquet]'")
            require_target(out, [data])
            reader, trained = opened.enter_context(open_photos(data, how.get("workers"))), session.trained
            names: list = stored_names(reader, photos or data) if photos or is_source(data) else [None] * len(reader)
            look = {"size": how.pop("size", None) or trained.size or features.EVALUATION_SIZE}
            look["crop"] = how.pop("crop", None) or trained.crop or features.EVALUATION_CROP
            how |= {**look, "normalisation": trained.normalisation, "device": session.device}
            require_size(trained.backbone, look["size"], session.device)
            mine = shard(np.arange(len(reader)))
        if session.is_main:
            opened.callback(draft.unlink, missing_ok=True)
            draft.write_bytes(b"")
        barrier()
        with (bar if session.is_main else silent)("photos", len(mine)) as advance, draft.open("r+b") as file:
            for some in np.split(mine, range(_HELD * batch, len(mine), _HELD * batch)):
                found = extract_features(trained.backbone, reader, indices=some, **how).features
                rows = (found.half() if half else found).numpy()
                if not np.isfinite(rows).all():
                    raise ProbeError(f"{trained.name}: the network's features are NaN, infinite or beyond {rows.dtype}")
                if not file.tell():  # what all processes write alike
                    about = {"descr": rows.dtype.str, "fortran_order": False, "shape": (len(reader), rows.shape[1])}
                    np.lib.format.write_array_header_1_0(file, about)
                    file.seek(int(mine[0]) * rows[0].nbytes, os.SEEK_CUR)
                file.write(rows.tobytes())  # and not mapped: a full disk is then an error, and no signal
                advance(int(some[-1] - mine[0]) + 1)
        barrier()
        made = {"data": Path(shown(data)).name, "photos": len(reader), "width": rows.shape[1], "dtype": rows.dtype.name}
        record = session.record("embed", **look, **made)
        if session.is_main:
            classes, index = dict(enumerate(reader.classes or ())), np.arange(len(reader))
            labels = [None if k < 0 else classes.get(k, str(k)) for k in reader.labels_of(index).tolist()]
            paths = [name and name.encode("utf-8", "backslashreplace").decode() for name in names]
            given = {"weights": session.source, "data": data}
            places = {name: os.path.abspath(one) if os.path.exists(one) else shown(one) for name, one in given.items()}
            columns = {"id": index.tolist(), "path": paths, "label": labels}
            beside, text = Path(f"{out}.json"), to_json({**record, "made_from": places, "columns": columns})
            beside.unlink(missing_ok=True)  # it says what stands in its file: comes last, goes first
            write_atomically(out, lambda path: write(path, np.load(draft, mmap_mode="r"), columns))
            write_atomically(beside, lambda path: path.write_text(text))
        return record if session.is_main else {}


def _write_csv(path: Path, rows: np.ndarray, columns: dict[str, list]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, *(f"f{k}" for k in range(rows.shape[1]))])
        for *row, numbers in zip(*columns.values(), rows):
            writer.writerow([*row, *map("%.9g".__mod__, numbers.tolist())])  # nine digits: the same float32 again


def _write_parquet(path: Path, rows: np.ndarray, columns: dict[str, list]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    numbers = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])  # mapped, not copied
    names = {name: pa.array(columns[name], pa.string()) for name in ("path", "label")}
    table = pa.table({"id": columns["id"], **names, "features": numbers})
    parquet.write_table(table, path, row_group_size=8192)
