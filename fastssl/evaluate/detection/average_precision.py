"""COCO's average precision, by pycocotools: the reference implementation, on the very predictions that are saved."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from fastssl.errors import FastSSLError

#: COCOeval's first six figures: mean over IoU 0.50 to 0.95, at 0.50, at 0.75, and of boxes up to 32^2, up to 96^2 and
#: above 96^2 pixels.
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def require_pycocotools() -> None:
    """
    Raises:
        FastSSLError: it is not installed.
    """
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        raise FastSSLError(
            "detection is judged by pycocotools, which is not installed: pip install 'fastssl-vision[detect]'"
        ) from error


def mask_tools() -> Any:
    """``pycocotools.mask``: draws polygons, packs masks into run lengths."""
    import pycocotools.mask

    return pycocotools.mask


def average_precision(
    document: dict[str, Any], predictions: list[dict[str, Any]], kind: str
) -> dict[str, float | None]:
    """What ``COCOeval`` says of ``predictions``, in percent.

    Args:
        document: annotations in COCO's format, as in ``DetectionSet.document``. Not changed.
        predictions: in COCO's format for results: ``image_id``, ``category_id``, ``score`` and ``bbox`` or
            ``segmentation``. Not changed.
        kind: ``bbox`` or ``segm``; of masks only annotations that have one are judged.

    Returns:
        ``FIGURES`` by name. None where there is no object of that size.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it talks
        truth = COCO()
        rows = [row for row in document["annotations"] if kind == "bbox" or "segmentation" in row]
        truth.dataset = {**document, "annotations": [dict(row) for row in rows]}  # it writes into them
        truth.createIndex()
        if predictions:
            found = truth.loadRes([dict(row) for row in predictions])
        else:  # which loadRes does not take
            found = COCO()
            found.dataset = {**document, "annotations": []}
            found.createIndex()
        judge = COCOeval(truth, found, kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {name: None if value < 0 else 100 * float(value) for name, value in zip(FIGURES, judge.stats)}
