"""``fastssl search``: the photos nearest to one, and photos that are nearly alike, by features that ``embed`` wrote."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networkx.utils import UnionFind
from torch import Tensor
from torch.nn import functional

from fastssl.distributed.devices import choose_device
from fastssl.errors import FastSSLError
from fastssl.evaluate.features import Bar, extract_features, silent
from fastssl.evaluate.knn import Finder, nearest_neighbors
from fastssl.evaluate.session import Session
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.convert.encode import encode_photo
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.utils.plain_file import read_plain

#: Rows whose like are looked for at once; among the nearest so many, then more; what rounding may take from a cosine.
_BLOCK, _NEAREST, _ROUNDING = 8192, (64, 1024), 1e-6


def open_features(path: str | Path) -> tuple[Tensor, dict[str, Any]]:
    """What `embed` wrote, (N, F), and what OUT.json says. Of a .npy pages are read from disk as they are needed. Raises
    FastSSLError where one of them is damaged, or they do not belong together.
    """
    try:
        about = json.loads(read_plain(f"{path}.json", 1 << 30))
        features = torch.from_numpy(_read(Path(path), about["width"]))
        (count, width), columns = features.shape, about["columns"]
        there = about["width"], columns["id"], len(columns["path"]), len(columns["label"])
        if not count or there != (width, list(range(count)), count, count):
            raise ValueError("they do not belong together")
        made_from, names = about["made_from"], [*columns["path"], *columns["label"]]
        texts = [about["network"], about["weights"], made_from["data"], made_from["weights"], *filter(None, names)]
        if not all(isinstance(text, str) for text in texts) or not about["size"] > 0 < about["crop"]:
            raise ValueError("damaged")
    except ModuleNotFoundError as error:
        raise FastSSLError(f"{path}: parquet needs pyarrow: pip install 'fastssl-vision[parquet]'") from error
    except (OSError, ValueError, TypeError, LookupError, EOFError, RecursionError, FastSSLError) as error:
        raise FastSSLError(f"{path} and .json: not as `fastssl embed` writes them ({error}); embed again") from None
    return features, about


def _read(path: Path, width: int) -> np.ndarray:
    if path.suffix == ".csv":
        how: dict[str, Any] = {"delimiter": ",", "quotechar": '"', "comments": None, "skiprows": 1, "ndmin": 2}
        return np.loadtxt(path, np.float32, usecols=range(3, 3 + width), encoding="utf-8", **how)
    if path.suffix == ".parquet":
        from pyarrow.parquet import read_table

        return np.array(read_table(path)["features"].combine_chunks().flatten()).reshape(-1, width)
    found: np.ndarray = np.load(path, mmap_mode="c", allow_pickle=False)  # torch wants it writable
    return found


def faiss_candidates(features: Tensor) -> Finder:
    """An exact index of faiss on ``features`` (N, F). FastSSLError: it is not installed; features NaN or infinite."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise FastSSLError("--faiss needs faiss: pip install 'fastssl-vision[faiss]'") from error
    index = faiss.IndexFlatIP(features.shape[1])
    for rows in features.split(_BLOCK):
        index.add(functional.normalize(_finite(rows.float()), dim=1).numpy())
    return lambda bank, unit, count, own: torch.from_numpy(index.search(unit.cpu().numpy(), count)[1]).to(unit.device)


@contextmanager
def open_query(photo: str | Path) -> Iterator[BetonReader]:
    """A picture file as a ``.beton`` file that holds it alone, as `embed` would see it. Raises FastSSLError."""
    try:
        one = encode_photo(read_plain(photo, 1 << 30), ConvertOptions(keep_size=True, short_side=None, quality=95))
    except Exception as error:  # decoders raise anything at all for what is no picture
        raise FastSSLError(f"{photo}: cannot be read as a photo ({error})") from None
    with tempfile.TemporaryDirectory(prefix="fastssl-") as folder:
        with BetonWriter(place := Path(folder, "query.beton"), 1, labels=False) as writer:
            writer.add(one.data, one.height, one.width, mode=one.mode)
        with BetonReader(place) as reader:
            yield reader


def nearest(
    session: Session, features: Tensor, about: dict[str, Any], query: BetonReader, top: int, by: Finder | None = None
) -> list[tuple[float, int]]:
    """(cosine, row) of the ``top`` rows most similar to the photo in ``query``, by the network that made the features.
    Raises FastSSLError where ``session`` has another one, or features are NaN or infinite.
    """
    if session.weights != about["weights"]:
        raise FastSSLError(f"{session.source}: did not make the features; name with --weights what did, or embed again")
    look = {"size": about["size"], "crop": about["crop"], "normalisation": session.trained.normalisation}
    asked = extract_features(session.trained.backbone, query, device=session.device, **look).features
    like, rows = nearest_neighbors(features, asked.to(session.device), k=min(top, len(features)), by=by)
    return list(zip(_finite(like)[0].tolist(), rows[0].tolist()))


def find_duplicates(
    features: Tensor, above: float, top: int, device: str = "auto", bar: Bar = silent, by: Finder | None = None
) -> tuple[int, list[tuple[float, int, int]], list[list[int]]]:
    """Pairs of rows of ``features`` (N, F) whose cosine is ``above`` or more: how many; (cosine, row, later row) of the
    ``top`` most similar; and the groups that they make, the largest first. Compared in tiles: memory is for these and
    the pairs. Of each row its 1,024 nearest are seen; rows of zeros are like none. FastSSLError: as of `nearest`.
    """
    count, kept, groups, on = 0, np.empty((3, 0)), UnionFind(), choose_device(device)
    with bar("comparing", len(features), "photos") as advance:
        for rows in torch.arange(len(features)).split(_BLOCK):
            for most in _NEAREST:
                like, others = nearest_neighbors(features, features[rows].to(on), k=min(most, len(features)), by=by)
                if _finite(like)[:, -1].max() < above - _ROUNDING:
                    break
            one, place = ((like >= above - _ROUNDING) & (others != rows.to(on)[:, None])).nonzero(as_tuple=True)
            found = torch.stack([-like[one, place].double(), rows.to(on)[one], others[one, place]]).cpu().numpy()
            for pair in found[1:].T.tolist():
                groups.union(*pair)
            found = found[:, found[1] < found[2]]
            count += found.shape[1]
            kept = np.concatenate([kept, found], axis=1)
            kept = kept[:, np.lexsort(kept[::-1])[:top]]
            advance(int(rows[-1]) + 1)
    sets = sorted((sorted(map(int, rows)) for rows in groups.to_sets()), key=lambda rows: (-len(rows), rows))
    return count, [(-unlike, int(one), int(other)) for unlike, one, other in kept.T.tolist()], sets


def _finite(numbers: Tensor) -> Tensor:
    if not numbers.isfinite().all():
        raise FastSSLError("some of the features are NaN or infinite; embed again, by a network whose are not")
    return numbers
