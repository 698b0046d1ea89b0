"""Block sizes that divide a side of a matrix."""

from __future__ import annotations

import math

from peft.errors import TargetError


def divisors(size: int) -> list[int]:
    """All divisors, ascending.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [n for n in range(1, size + 1) if size % n == 0]


def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of `size` nearest to `wanted`; the smaller one of two.

    >>> nearest_divisor(30, 4)
    3
    """
    return min(divisors(size), key=lambda n: (abs(n - wanted), n))


def must_divide(name: str, value: int, key: str, *sizes: int) -> None:
    """Raise TargetError, with the nearest legal value, unless the option `name` divides all `sizes` of a layer."""
    common = math.gcd(*sizes)
    if common % value:
        sides = " and ".join(str(size) for size in sizes)
        raise TargetError(
            f"{name} = {value} does not divide {sides} of the layer {key!r}. The nearest that does is "
            f"{nearest_divisor(common, value)}; all that do: {divisors(common)}."
        )
