"""What a run needs, checked before its first step: better now than after the last epoch."""

from __future__ import annotations

from fastssl.errors import FastSSLError, counted
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.verify import verify


def require_whole_photos(reader: BetonReader, workers: int | None = None) -> None:
    """Decode all photos once; raise FastSSLError if one is damaged. For those that the run is judged on at its end.

    Args:
        workers: decoding threads; None: one a core.
    """
    # A wrong checksum alone is no reason: the photo decodes, and training would take it too.
    found = verify(reader.path, workers=workers).damaged
    damaged = [(sample, complaint) for sample, complaint in found if complaint != "wrong checksum"]
    if damaged:
        sample, complaint = damaged[0]
        photos = counted(len(reader), "photo")
        raise FastSSLError(
            f"{reader.path}: damaged are {len(damaged):,} of {photos}, the first is sample {sample} ({complaint}); "
            "convert again without them, or leave them out with --set train.on_bad=skip"
        )
