"""How sure we are: 95 % intervals."""
import math

import numpy as np

Z = 1.959964        # standard normal quantile of 97.5 %


def wilson(successes, n):
    """(low, high): Wilson's score interval of a share (Wilson 1927)."""
    share, spread = successes / n, Z * Z / n
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values, weights=None, draws=2000, seed=0):
    """(low, high): percentile bootstrap over rows of the mean of `values`, weighted by `weights` (say, tokens per row)."""
    values = np.asarray(values, dtype=float)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=float)
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    means = (values * weights)[picks].sum(1) / weights[picks].sum(1)
    return tuple(float(x) for x in np.quantile(means, (0.025, 0.975)))


STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)     # quantiles of 97.5 %, for 1, 2, … degrees of freedom


def student(values):
    """(low, high): Student's interval of the mean of a few values, one per seed; at least two."""
    n, mean = len(values), sum(values) / len(values)
    half = STUDENT[min(n - 1, len(STUDENT)) - 1] * math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1) / n)
    return mean - half, mean + half


def auroc(positive, negative):
    """Probability that a positive scores above a negative (ties count half): the area under the ROC curve."""
    difference = np.asarray(positive)[:, None] - np.asarray(negative)[None, :]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())
