"""How sure an accuracy is: Wilson's interval, which stays sensible for few examples and where none or all are right.

    interval(p, n)          returns the ends of the 95 % interval
    standard_error(p, n)    returns the interval's half width as a standard error
    describe(p, n)          returns "26.67% (95% interval 14.18 to 44.45%)", as every accuracy is shown
"""
import math

Z = 1.959964  # standard deviations of a normal distribution that 95 % lie within


def interval(p: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval (low, high) of an accuracy p that was measured on n >= 1 examples (Wilson 1927).

    Both are nan if p is.
    """
    middle, reach = (p + Z**2 / (2 * n)) / (1 + Z**2 / n), Z * standard_error(p, n)
    low = middle - reach if p > 0 else 0.0  # exact, whatever the rounding
    high = middle + reach if p < 1 else 1.0
    return (math.nan, math.nan) if math.isnan(p) else (low, high)


def standard_error(p: float, n: int) -> float:
    """Return half of Wilson's interval over Z: sqrt(p (1 - p) / n) for many examples, and never 0."""
    return math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)


def describe(p: float, n: int) -> str:
    """Format an accuracy and its 95 % interval in percent."""
    low, high = interval(p, n)
    return f"{p:.2%} (95% interval {100 * low:.2f} to {high:.2%})"
