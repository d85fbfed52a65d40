"""Damaged samples, for engines that would not notice them.

libjpeg goes on after most kinds of damage and leaves grey or stale pixels; DALI and FFCV do not ask it whether it did.
So each sample is looked at once before such an engine is given it. Where a side file holds checksums that costs a CRC,
and otherwise one strict decode: in a file of other origin the first epoch decodes twice.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fastssl.errors import BetonError, FastSSLError, JpegError, at_work_on
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.verify import sample_checksums
from fastssl.pipelines.engines.base import EngineStats, Request
from fastssl.pipelines.ops import jpeg


class SampleCheck:
    """Says which samples of a request are damaged; remembers what it has looked at. The strict decodes run on ``pool``;
    what was passed over goes into ``stats``.
    """

    def __init__(self, reader: BetonReader, on_bad: str, stats: EngineStats, pool: ThreadPoolExecutor):
        self.reader, self.on_bad, self.stats, self._pool = reader, on_bad, stats, pool
        self._checksums = sample_checksums(reader)
        self._sound = np.zeros(len(reader), bool)
        self._damaged: dict[int, FastSSLError] = {}
        self._to_repair: set[int] = set()

    def __call__(self, request: Request) -> Request:
        """The request without damaged samples: each one's place is given to a good one of the batch. ``FastSSLError``:
        one is damaged, and ``on_bad`` is ``fail``; all are; or looking at one went wrong (``WorkerError``).
        """
        # After the first epoch this is empty: looking costs one indexing a batch.
        unknown = np.unique(request.index[~self._sound[request.index]]).tolist()
        self._look_at([sample for sample in unknown if sample not in self._damaged])
        broken = np.flatnonzero(~self._sound[request.index]).tolist()
        if broken:
            samples = request.index[broken].tolist()
            if self.on_bad == "fail":
                raise self._damaged[samples[0]]
            self.stats.skipped.extend(samples)
            give_places(request, broken, self._damaged[samples[0]], self._is_sound)
        return request

    def _is_sound(self, sample: int) -> bool:
        """Of a sample that is another process's."""
        if not self._sound[sample] and sample not in self._damaged:
            self._look_at([sample])
        return bool(self._sound[sample])

    def _look_at(self, samples: list[int]) -> None:
        for sample, error in zip(samples, self._pool.map(self._look, samples)):
            if error is None:
                self._sound[sample] = True
            else:
                self._damaged[sample] = error

    def encoded(self, sample: int) -> np.ndarray:
        """The bytes of a sound sample as any decoder takes them: `jpeg.repaired`, where that is needed."""
        data = self.reader.encoded(sample)
        whole = jpeg.repaired(data) if sample in self._to_repair else None
        return data if whole is None else np.frombuffer(whole, np.uint8)

    def lost(self, sample: int, error: BetonError) -> None:
        """``sample`` was sound when it was looked at, and can no longer be read."""
        self._sound[sample] = False
        self._damaged[sample] = error

    def _look(self, sample: int) -> FastSSLError | None:
        try:
            with at_work_on(self.reader.path, f"sample {sample}"):
                # A wrong checksum alone is not damage here: the picture may still decode, as `native` would find.
                if self._checksums is None or zlib.crc32(self.reader.encoded(sample).data) != self._checksums[sample]:
                    heights, widths = self.reader.shapes(np.array([sample]))
                    if self.reader.decode_into(sample, np.empty((heights[0], widths[0], 3), np.uint8)):
                        self._to_repair.add(sample)
        except (JpegError, BetonError) as error:
            return error
        return None


def give_places(
    request: Request, broken: Collection[int], first_error: Exception, is_sound: Callable[[int], bool]
) -> dict[int, int | None]:
    """Let the nearest good sample of the batch stand in for each damaged one, in ``request`` itself: the batch of all
    processes, so that a damaged photo has the same neighbours however many there are.

    Args:
        broken: positions in the batch.
        first_error: for the message of the ``FastSSLError`` when no sample is good.
        is_sound: is asked of samples of other processes, by their ids.

    Returns:
        the position that each broken one took its sample from; None where that is another process's.
    """
    index, bad = request.index, set(broken)
    total = len(index) if request.total is None else request.total
    donors: dict[int, int | None] = {}
    for position in sorted(bad):
        here = request.first + position
        for place in sorted(set(range(total)) - {here}, key=lambda place: (abs(place - here), place)):
            donor, other = place - request.first, request
            donors[position] = donor if 0 <= donor < len(index) else None
            if donor in bad:
                continue
            if donors[position] is None:
                assert request.draw is not None, "a request of several processes"
                donor, other = 0, request.draw(place)
                if not is_sound(int(other.index[0])):
                    continue
            index[position] = other.index[donor]
            for plan, found in zip(request.plans, other.plans):
                plan[:, position] = found[:, donor]
            break
        else:
            raise FastSSLError(f"every picture of a batch is damaged; the first: {first_error}")
    return donors
