"""What convolutional models ask of records: square images, one or three colours, pixels row by row."""

from __future__ import annotations

from math import isqrt

from fedsim.errors import InputError


def shape(features: int, model: str, least: int) -> tuple[int, int]:
    """Return (colours, side) of square images with this many pixels.

    Raises:
        InputError: the pixels are those of no square image, or of one smaller than `least`.
    """
    for colours in (1, 3):
        side = isqrt(features // colours)
        if colours * side * side == features:
            if side < least:
                raise InputError(
                    f"problem.model: {model} needs images of {least} x {least} pixels at least; these have {side} x"
                    f" {side}"
                )
            return colours, side
    raise InputError(
        f"problem.model: {model} needs square images, and {features} features are neither side^2 nor 3 side^2"
        " (leave data.bias out)"
    )
