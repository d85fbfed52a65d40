"""The inner loops of the host side, compiled by numba: pixels pass through the cache once, and the interpreter lock is
free meanwhile.

The same work in torch or NumPy calls takes six times as long on one core (every call is another pass over the planes),
and in several threads it does not get faster at all: each of its hundreds of small calls has to come back for the lock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from fastssl.pipelines.plan.draw import BRIGHTNESS, CONTRAST, HUE
from fastssl.utils.jit import fast

_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)  # ITU-R 601-2, with torchvision's digits
_ZERO, _ONE, _TWO, _THREE, _SIX = (np.float32(value) for value in (0, 1, 2, 3, 6))


# ---------------------------------------------------------------------- crop, antialiased resize, flip


@fast
def _weights(length: int, size: int, cubic: bool) -> tuple:
    """First source pixel, number of taps and weights of every output pixel: Pillow's filters, normalised inside the
    box.
    """
    scale = length / size
    reduction = max(scale, 1.0)
    support = (2.0 if cubic else 1.0) * reduction
    first, taps = np.empty(size, np.int64), np.empty(size, np.int64)
    weights = np.zeros((size, 2 * math.ceil(support) + 1), np.float32)
    for i in range(size):
        center = (i + 0.5) * scale
        low, high = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), length)
        first[i], taps[i] = low, high - low
        total = 0.0
        for k in range(high - low):
            x = abs((low + k - center + 0.5) / reduction)
            if cubic:
                if x < 1:
                    w = (1.5 * x - 2.5) * x * x + 1
                elif x < 2:
                    w = ((-0.5 * x + 2.5) * x - 4) * x + 2
                else:
                    w = 0.0
            else:
                w = max(1.0 - x, 0.0)
            weights[i, k] = w
            total += w
        for k in range(high - low):
            weights[i, k] /= total
    return first, taps, weights


#: Rows that `_weigh` takes at a time: the weights of two taps are fetched once for all of them.
_ROWS = 4
#: Weights along a row are whole numbers of 1 / 2^14: a cubic's can exceed one, and 16 bits have to hold them.
_BITS = 14


@fast
def _whole(taps: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(S, T) float32 weights as (S, an even number of at least T) int16 in units of 1 / 2^_BITS.

    What a weight loses by rounding goes on to the next one: each row's sum is exact, so that what is even stays even,
    and the thousands of taps of an extreme reduction are not all rounded to nothing.
    """
    whole = np.zeros((len(weights), (weights.shape[1] + 1) // 2 * 2), np.int16)
    for i in range(len(weights)):
        total, given = 0.0, 0
        for k in range(taps[i]):
            total += weights[i, k] * (1 << _BITS)
            here = (1 << _BITS) if k == taps[i] - 1 else math.floor(total + 0.5)
            whole[i, k] = here - given
            given = here
    return whole


@intrinsic
def _weigh(
    typing: Any, source: Any, row: Any, weights: Any, column: Any, pairs: Any, target: Any, target_row: Any
) -> tuple:
    """One output pixel in each of `_ROWS` rows: the weighted sum of neighbouring RGB pixels, two at a time, rounded and
    cut to 8 bits.

    Numba's own vectoriser does not see that the colours of a pixel belong together. Written as vectors of eight bytes
    (red, red, green, green, blue, blue, and two that come next), products and sums of a pair of taps become one
    instruction where the processor has it: the resize is four times as fast.

    ``weights`` is the array of `_whole`, of which row ``column`` is used and ``pairs`` pairs of it. (The array and not
    its address: numba frees what is not named any more.) The others are addresses or distances in bytes: the first tap
    in the first row, from row to row; the first result, from result to result. Reads up to five bytes behind the last
    pixel, and writes one behind each result.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        source, row, weights, column, pairs, target, target_row = arguments
        table = context.make_array(signature.args[2])(context, builder, weights)
        weights_at = builder.add(
            builder.ptrtoint(table.data, source.type), builder.mul(column, builder.extract_value(table.strides, 0))
        )

        def vector(bits: int, lanes: int) -> ir.VectorType:
            return ir.VectorType(ir.IntType(bits), lanes)

        def number(value: int) -> ir.Constant:
            return ir.Constant(source.type, value)

        def place(base: ir.Value, distance: ir.Value, times: ir.Value, kind: ir.Type) -> ir.Value:
            return builder.inttoptr(builder.add(base, builder.mul(distance, times)), kind.as_pointer())

        def pick(values: ir.Value, *lanes: int) -> ir.Value:
            return builder.shuffle_vector(
                values, ir.Constant(values.type, ir.Undefined), ir.Constant(vector(32, len(lanes)), list(lanes))
            )

        half = 1 << (_BITS - 1)
        sums = [cgutils.alloca_once_value(builder, ir.Constant(vector(32, 4), [half] * 4)) for _ in range(_ROWS)]
        with cgutils.for_range(builder, pairs) as loop:
            two = builder.load(place(weights_at, number(4), loop.index, vector(16, 2)), align=2)
            both = builder.sext(pick(two, 0, 1, 0, 1, 0, 1, 0, 1), vector(32, 8))
            first = builder.add(source, builder.mul(number(6), loop.index))
            for k, total in enumerate(sums):
                pixels = pick(builder.load(place(first, row, number(k), vector(8, 8)), align=1), 0, 3, 1, 4, 2, 5, 6, 7)
                product = builder.mul(builder.zext(pixels, vector(32, 8)), both)
                pair = builder.add(pick(product, 0, 2, 4, 6), pick(product, 1, 3, 5, 7))
                builder.store(builder.add(builder.load(total), pair), total)
        for k, total in enumerate(sums):
            value = builder.ashr(builder.load(total), ir.Constant(vector(32, 4), [_BITS] * 4))
            for bound, beyond in ((0, "<"), (255, ">")):
                limit = ir.Constant(vector(32, 4), [bound] * 4)
                value = builder.select(builder.icmp_signed(beyond, value, limit), limit, value)
            builder.store(
                builder.trunc(value, vector(8, 4)), place(target, target_row, number(k), vector(8, 4)), align=1
            )
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, weights, *[types.intp] * 4), generate


@fast
def crop_resize(image: np.ndarray, box: np.ndarray, cubic: bool, scratch: np.ndarray, out: np.ndarray) -> None:
    """Crop, resize and flip one view of one decoded picture, along the rows first; Pillow's passes in that order differ
    by 1/255, at most by 2. Checks nothing.

    Args:
        image: (H, W, 3) uint8, C-contiguous. box: top, left, height, width, flip; inside the image. cubic: bicubic
            instead of bilinear.
        scratch: uint8, at least (height, 3 * S + 1): half-done rows, each with a spare byte for `_weigh`.
            Two-dimensional, because FFCV marks the type of all one-dimensional byte arrays as read-only once a loader
            is made. out: (S, S, 3) uint8, C-contiguous, overwritten.
    """
    top, left, height, width, flip = box[0], box[1], box[2], box[3], box[4]
    size = out.shape[0]
    row_first, row_taps, row_weights = _weights(height, size, cubic)
    column_first, column_taps, column_weights = _weights(width, size, cubic)
    # Rounded and cut to 8 bits in between, as Pillow and torchvision do: a cubic's overshoot at an edge is gone behind
    # that.
    stride, narrow = image.strides[0], scratch.strides[0]
    whole = _whole(column_taps, column_weights)
    # As signed numbers: numba adds an unsigned and a signed one as floats.
    corner, target = np.intp(image.ctypes.data) + top * stride + 3 * left, np.intp(scratch.ctypes.data)
    # The last rows are read from a copy, because the bytes behind their last pixels may belong to somebody else. (It is
    # named in the loop, and so lives until the loop's end.)
    spare = np.zeros((width + 2, 3), np.uint8)
    y = 0
    while y < height:
        # What is left over goes row by row, as _ROWS rows that are all the same one.
        many = y + _ROWS + 1 < height
        source, source_row, target_row = corner + y * stride, stride, narrow
        if not many:
            for x in range(width):
                for c in range(3):
                    spare[x, c] = image[top + y, left + x, c]
            source, source_row, target_row = np.intp(spare.ctypes.data), 0, 0
        for x in range(size):
            column = size - 1 - x if flip else x
            pairs = (column_taps[column] + 1) // 2
            first, place = source + 3 * column_first[column], target + 3 * x
            _weigh(first, source_row, whole, column, pairs, place, target_row)  # type: ignore[call-arg]  # see @intrinsic
        y += _ROWS if many else 1
        target += narrow * (_ROWS if many else 1)
    # Whole lines are added up here, which the compiler turns into vector instructions.
    line = np.empty(3 * size, np.float32)
    lines = out.reshape((size, 3 * size))
    for y in range(size):
        for x in range(3 * size):
            line[x] = np.float32(0.5)
        for k in range(row_taps[y]):
            w, row = row_weights[y, k], scratch[row_first[y] + k]
            for x in range(3 * size):
                line[x] += w * row[x]
        for x in range(3 * size):
            lines[y, x] = np.uint8(min(max(line[x], np.float32(0)), np.float32(255)))


@fast
def crop_views(
    image: np.ndarray, boxes: np.ndarray, cubic: bool, scratch: np.ndarray, views: np.ndarray, position: int
) -> None:
    """`crop_resize` of each box into ``views[k, position]``: boxes (count, 5) int64, views (count, B, S, S, 3). Refuses
    boxes outside the image.
    """
    for k in range(len(boxes)):
        top, left, height, width = boxes[k, 0], boxes[k, 1], boxes[k, 2], boxes[k, 3]
        if (
            top < 0
            or left < 0
            or height < 1
            or width < 1
            or top > image.shape[0] - height
            or left > image.shape[1] - width
        ):
            raise ValueError("a box lies outside its picture")
    for k in range(len(boxes)):
        crop_resize(image, boxes[k], cubic, scratch, views[k, position])


# ---------------------------------------------------------------------- colour


@fast
def _clamp(value: float) -> float:
    return min(max(value, _ZERO), _ONE)


@fast
def _blend(planes: np.ndarray, operation: int, factor: float) -> None:
    """Brightness, contrast or saturation in place: a blend with black, with the mean luminance, with the luminance."""
    red, green, blue = planes[0], planes[1], planes[2]
    rest, count = _ONE - factor, planes.shape[1]
    if operation == BRIGHTNESS:
        for i in range(count):
            red[i], green[i], blue[i] = _clamp(red[i] * factor), _clamp(green[i] * factor), _clamp(blue[i] * factor)
    elif operation == CONTRAST:
        total = 0.0
        for i in range(count):
            total += _RED * red[i] + _GREEN * green[i] + _BLUE * blue[i]
        mean = np.float32(total / count) * rest
        for i in range(count):
            red[i], green[i], blue[i] = (
                _clamp(red[i] * factor + mean),
                _clamp(green[i] * factor + mean),
                _clamp(blue[i] * factor + mean),
            )
    else:
        for i in range(count):
            grey = (_RED * red[i] + _GREEN * green[i] + _BLUE * blue[i]) * rest
            red[i], green[i], blue[i] = (
                _clamp(red[i] * factor + grey),
                _clamp(green[i] * factor + grey),
                _clamp(blue[i] * factor + grey),
            )


@fast
def _on_circle(difference: float) -> float:
    """Distance on a circle of six, for differences up to 9, cut to 1 .. 2."""
    return min(max(abs(abs(abs(difference) - _THREE) - _THREE), _ONE), _TWO)


@fast
def _turn_hue(planes: np.ndarray, shift: float) -> None:
    """Hue in place, by the formula that `augment.turn_hue` explains."""
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(planes.shape[1]):
        r, g, b = red[i], green[i], blue[i]
        low = min(r, min(g, b))
        chroma = max(r, max(g, b)) - low
        hue = (g + b - r - low) / max(chroma, np.float32(1e-12)) + _ONE
        hue = (hue if g >= b else -hue) + shift * _SIX
        top = low + _TWO * chroma
        red[i] = top - chroma * _on_circle(hue)
        green[i] = top - chroma * _on_circle(hue - _TWO)
        blue[i] = top - chroma * _on_circle(hue + _TWO)


@fast
def _blur(plane: np.ndarray, weights: np.ndarray, half: np.ndarray, line: np.ndarray) -> None:
    """Gaussian blur of one (S, S) plane in place, borders reflected. half: (S, S) and line: (S + 2 radius) are scratch.

    The two neighbours at a distance share a weight. Loops run over slices, whose indices the compiler knows to be
    positive: that makes them vector instructions.
    """
    size, radius = len(plane), len(weights) // 2
    for y in range(size):
        w, row, total = weights[radius], plane[y], half[y]
        for x in range(size):
            total[x] = w * row[x]
        for k in range(1, radius + 1):
            w, above, below = weights[radius + k], plane[abs(y - k)], plane[min(y + k, 2 * (size - 1) - y - k)]
            for x in range(size):
                total[x] += w * (above[x] + below[x])
    for y in range(size):
        row, out, middle = half[y], plane[y], line[radius : radius + size]
        for x in range(size):
            middle[x] = row[x]
        for k in range(1, radius + 1):
            line[radius - k], line[radius + size - 1 + k] = row[k], row[size - 1 - k]
        w = weights[radius]
        for x in range(size):
            out[x] = w * middle[x]
        for k in range(1, radius + 1):
            w, left, right = (
                weights[radius + k],
                line[radius - k : radius - k + size],
                line[radius + k : radius + k + size],
            )
            for x in range(size):
                out[x] += w * (left[x] + right[x])


@fast
def _gaussian(sigma: float, radius: int) -> np.ndarray:
    """(2 * r + 1,) float32 that sum to one; beyond five sigmas, where a weight is below 4e-6, nothing is added up."""
    radius = min(radius, math.ceil(5 * sigma))
    weights, total = np.empty(2 * radius + 1, np.float32), 0.0
    for k in range(2 * radius + 1):
        weights[k] = math.exp(-0.5 * ((k - radius) / sigma) ** 2)
        total += weights[k]
    for k in range(2 * radius + 1):
        weights[k] /= total
    return weights


@fast
def colour(
    views: np.ndarray,
    flags: np.ndarray,
    order: np.ndarray,
    factors: np.ndarray,
    sigmas: np.ndarray,
    radius: int,
    threshold: float,
    scale: np.ndarray,
    offset: np.ndarray,
    out: np.ndarray,
) -> None:
    """Jitter in each sample's order, grey, blur, solarise, normalise.

    Args:
        views: (N, S * S * 3) uint8, colours side by side.
        flags: (N, 3) bool: jitter, grey, solarise. order: (N, 4) int64. factors: (N, 4) float32, at the operations'
            numbers.
        sigmas: (N,) float32, 0 for none. radius: of the blur's kernel. threshold: of solarisation, 0 .. 1.
        scale, offset: (3,) float32: the result is value * scale + offset.
        out: (N, S * S * 3) float32, overwritten.
    """
    count = views.shape[1] // 3
    size = int(math.sqrt(count) + 0.5)
    planes, half, line = (
        np.empty((3, count), np.float32),
        np.empty((size, size), np.float32),
        np.empty(size + 2 * radius, np.float32),
    )
    for sample in range(views.shape[0]):
        source, target = views[sample], out[sample]
        for i in range(count):
            for c in range(3):
                planes[c, i] = np.float32(source[3 * i + c]) / np.float32(255)
        if flags[sample, 0]:
            for place in range(4):
                operation = order[sample, place]
                factor = factors[sample, operation]
                if operation == HUE:
                    if factor != _ZERO:
                        _turn_hue(planes, factor)
                else:
                    _blend(planes, operation, factor)
        if flags[sample, 1]:
            for i in range(count):
                grey = _RED * planes[0, i] + _GREEN * planes[1, i] + _BLUE * planes[2, i]
                planes[0, i], planes[1, i], planes[2, i] = grey, grey, grey
        if sigmas[sample] > 0:
            weights = _gaussian(sigmas[sample], radius)
            for c in range(3):
                _blur(planes[c].reshape((size, size)), weights, half, line)
        if flags[sample, 2]:
            for c in range(3):
                for i in range(count):
                    planes[c, i] = _ONE - planes[c, i] if planes[c, i] >= threshold else planes[c, i]
        for i in range(count):
            for c in range(3):
                target[3 * i + c] = planes[c, i] * scale[c] + offset[c]
