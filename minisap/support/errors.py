"""A run ends where one of its numbers is NaN or infinite."""

import math


class NotFinite(ArithmeticError):
    """A number of a run is NaN or infinite, and the run must not go on: one line on stderr, exit status 3."""


def check_finite(quantities):
    """quantities: {name: number, or list of numbers}."""
    for name, value in quantities.items():
        for number in value if isinstance(value, list) else [value]:
            if not math.isfinite(number):
                raise NotFinite(f"{name} is {number}")
