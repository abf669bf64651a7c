"""How sure we are: 95 % intervals, paired tests, verdicts."""

import math

import numpy as np

Z = 1.959964  # standard normal quantile of 97.5 %


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


STUDENT = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
)  # quantiles of 97.5 %, for 1, 2, … degrees of freedom


def student(values):
    """(low, high): Student's interval of the mean of a few values, one per seed; at least two."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        raise ValueError(f"an interval over seeds needs at least two; there is {n}")
    half = STUDENT[min(n - 1, len(STUDENT)) - 1] * math.sqrt(
        sum((x - mean) ** 2 for x in values) / (n - 1) / n
    )
    return mean - half, mean + half


def auroc(positive, negative):
    """Probability that a positive scores above a negative (ties count half): the area under the ROC curve."""
    difference = np.asarray(positive)[:, None] - np.asarray(negative)[None, :]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def kappa(a, b):
    """Cohen's κ of two raters' labels (Cohen 1960): agreement beyond chance; 1 where both always say the same one thing."""
    a, b = np.unique([*a, *b], return_inverse=True)[1].reshape(2, -1)
    agreed = (a == b).mean()
    chance = sum(
        (a == label).mean() * (b == label).mean() for label in range(max(a.max(), b.max()) + 1)
    )
    return float((agreed - chance) / (1 - chance)) if chance < 1 else 1.0


def bootstrap_clusters(statistic, columns, clusters, draws=2000, seed=0):
    """(low, high): percentile bootstrap of statistic(*columns), where rows of one cluster are drawn together."""
    columns, (names, of_row) = (
        [np.asarray(column) for column in columns],
        np.unique(clusters, return_inverse=True),
    )
    rows_of = [np.flatnonzero(of_row == i) for i in range(len(names))]
    drawn = (
        np.concatenate([rows_of[i] for i in pick])
        for pick in np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    )
    return tuple(
        float(x)
        for x in np.quantile(
            [statistic(*(column[rows] for column in columns)) for rows in drawn], (0.025, 0.975)
        )
    )


def mcnemar(a, b):
    """Exact two-sided p of McNemar's test (1947): hits a and b (0 or 1 per prompt) of two methods on the same prompts, of which
    only those count that they differ in."""
    only_a, only_b = (sum(x > y for x, y in zip(*pair)) for pair in ((a, b), (b, a)))
    n, fewer = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def paired_interval(a, b):
    """(mean of a − b, low, high) for values (seeds, rows) of two methods on the same seeds and rows. Seeds are the outer level:
    Student's half-width over their means, and the paired bootstrap's over rows, add as independent errors do. At least two seeds.
    (A percentile bootstrap over so few seeds would call one difference in ten real that is none.)"""
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    (seed_low, seed_high), (row_low, row_high) = (
        student(difference.mean(1).tolist()),
        bootstrap(difference.mean(0)),
    )
    half = math.hypot(seed_high - seed_low, row_high - row_low) / 2
    return (
        float(difference.mean()),
        float(difference.mean() - half),
        float(difference.mean() + half),
    )


def both_levels(values, low, high):
    """(low, high) for the mean of `values`, one per seed, where the same rows are measured for all: Student's interval over the seeds, and (low, high)
    over the rows, as independent errors add; at least two seeds."""
    mean, (seed_low, seed_high) = sum(values) / len(values), student(values)
    return mean - math.hypot(mean - low, mean - seed_low), mean + math.hypot(
        high - mean, seed_high - mean
    )


def share_interval(shares, n):
    """both_levels of shares, one per seed, of n rows: Wilson's interval over the rows; within 0 and 1."""
    low, high = both_levels(shares, *wilson(sum(shares) / len(shares) * n, n))
    return max(0.0, low), min(1.0, high)


def verdict(low, high):
    """What an interval of (ours − theirs), of something that is better the lower it is, allows to say of ours."""
    return "better" if high < 0 else "worse" if low > 0 else "not distinguishable"
