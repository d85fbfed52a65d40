"""How long a detector is fine-tuned, and with which rate.

Detectron2's 1x schedule: 90,000 iterations of 16 pictures of COCO, the rate a tenth from 60,000 and a hundredth from
80,000 on, 1,000 iterations of warm-up from a thousandth. That is 12.28 passes over the 117,266 pictures that have
boxes, and so it is for every other set and batch: as many passes.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Passes over the pictures with boxes.
EPOCHS = {"1x": 90_000 * 16 / 117_266, "2x": 180_000 * 16 / 117_266}


def iterations_of(schedule: str, pictures: int, batch_size: int) -> int:
    """Iterations of ``batch_size`` pictures (of all processes) that make as many passes as ``1x`` or ``2x`` makes over
    COCO; at least one.
    """
    return max(1, round(EPOCHS[schedule] * pictures / batch_size))


@dataclass(frozen=True)
class Rates:
    """The learning rate of every iteration.

    Attributes:
        iterations: N.
        peak: behind the warm-up.
        warmup: iterations on a line from ``peak`` / 1000 to ``peak``; None: 1000, or a tenth of N where that is less.
    """

    iterations: int
    peak: float
    warmup: int | None = None

    def at(self, iteration: int) -> float:
        """The rate of ``iteration``, from 0: a tenth of the peak from two thirds on, a hundredth from eight ninths
        on.
        """
        warmup = min(1000, self.iterations // 10) if self.warmup is None else self.warmup
        rate = self.peak
        if iteration < warmup:
            rate *= 0.001 + 0.999 * iteration / warmup
        drops = (3 * iteration >= 2 * self.iterations) + (9 * iteration >= 8 * self.iterations)
        return rate * 0.1**drops
