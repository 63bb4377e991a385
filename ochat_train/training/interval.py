"""Wilson's score interval. Apart, so that reports need not load torch."""

import math

_Z95 = 1.959964


def wilson_interval(mean: float, num: int) -> tuple[float, float]:
    """The interval of 95 % of the mean of `num` scores of 0 and 1, num above 0.

    With scores in between it is wider than necessary, since they have less variance.
    """
    scale = 1 + _Z95**2 / num
    centre = (mean + _Z95**2 / (2 * num)) / scale
    spread = _Z95 / scale * math.sqrt(max(0.0, mean * (1 - mean)) / num + _Z95**2 / (4 * num**2))
    return max(0.0, centre - spread), min(1.0, centre + spread)
