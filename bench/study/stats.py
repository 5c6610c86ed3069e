"""What the study computes from its numbers: differences with their spread, verdicts, power laws."""
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIRMED, UNSEEN, REFUTED = "confirmed", "not visible at this size", "refuted"
NEGLIGIBLE = 0.01  # nats; a difference below it counts as none


class Difference(NamedTuple):
    """A mean with the half width of its 95 % confidence interval (Student's t); inf from one number alone."""
    mean: float
    half: float

    def __str__(self):
        return f"{self.mean:+.4f} ± {self.half:.4f}"


def difference(ours: Sequence[float], others: Sequence[float]) -> Difference:
    """Return the mean of others - ours, paired by seed."""
    from scipy.stats import t

    apart = [other - one for one, other in zip(ours, others, strict=True)]
    if len(apart) < 2:
        return Difference(apart[0], float("inf"))
    error = statistics.stdev(apart) / len(apart) ** 0.5
    return Difference(statistics.fmean(apart), float(t.ppf(0.975, len(apart) - 1)) * error)


def verdict(found: Difference, predicted: int, negligible: float = NEGLIGIBLE) -> str:
    """Return whether what was found is what was `predicted`: a sign, 1 or -1, or 0 for no difference.

    A sign is confirmed, or refuted, if zero lies outside the interval. No difference is confirmed if the interval lies
    within `negligible` of zero, and refuted if it lies outside.
    """
    low, high = found.mean - found.half, found.mean + found.half
    if predicted:
        low, high = sorted((predicted * low, predicted * high))
        return CONFIRMED if low > 0 else REFUTED if high < 0 else UNSEEN
    if -negligible < low and high < negligible:
        return CONFIRMED
    return REFUTED if low > negligible or high < -negligible else UNSEEN


def spread(values: Sequence[float]) -> str:
    """Write the mean and the standard deviation of some numbers."""
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


class PowerLaw(NamedTuple):
    """loss = E + A / N^alpha + B / D^beta, with the standard error of each parameter."""
    E: float
    A: float
    alpha: float
    B: float
    beta: float
    errors: tuple[float, ...]

    def loss(self, N, D):
        """Return the loss for N parameters and D tokens."""
        return self.E + self.A / N**self.alpha + self.B / D**self.beta


def fit_power_law(N: Sequence[float], D: Sequence[float], loss: Sequence[float]) -> PowerLaw:
    """Fit the law of Hoffmann et al. (2022) by least squares, the best of nine starts. Errors are from the Jacobian."""
    from scipy.optimize import least_squares

    N, D, loss = (np.asarray(values, dtype=float) for values in (N, D, loss))

    def residuals(parameters):
        E, log_A, alpha, log_B, beta = parameters
        return E + np.exp(log_A - alpha * np.log(N)) + np.exp(log_B - beta * np.log(D)) - loss

    bounds = [0, -5, 0.02, -5, 0.02], [loss.min(), 30, 2, 30, 2]
    starts = [[0.5 * loss.min(), alpha * np.log(N.min()), alpha, beta * np.log(D.min()), beta]
              for alpha in (0.2, 0.4, 0.8) for beta in (0.2, 0.4, 0.8)]
    fits = [least_squares(residuals, start, bounds=bounds, x_scale="jac", max_nfev=1000) for start in starts]
    best = min(fits, key=lambda fit: fit.cost)
    variance = 2 * best.cost / max(1, len(loss) - 5)
    errors = np.sqrt(np.diag(np.linalg.pinv(best.jac.T @ best.jac)) * variance)
    E, log_A, alpha, log_B, beta = map(float, best.x)
    A, B = math.exp(log_A), math.exp(log_B)
    scaled = errors * [1, A, 1, B, 1]  # d(exp x) = exp(x) dx
    return PowerLaw(E, A, alpha, B, beta, tuple(map(float, scaled)))
