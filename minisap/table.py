"""Methods against each other on the same prompts and seeds: intervals, paired tests, verdicts, at equal steps and at equal task loss.

A run         {method: {seed: the records that train.py left, with "step" and, of shares, "hits" per prompt}}
A comparison  one dict per method: see compare
"""
from minisap.evaluate import print_judges, print_table
from minisap.stats import mcnemar, paired_interval, student, verdict, wilson


def at(records, metric, step):
    return next((r for r in records if (r["metric"], r["step"]) == (metric, step)), None)


def last_step(records):
    return max(r["step"] for r in records)


def hits(runs, metric):
    """[[0 or 1 per prompt] per seed] after the last step; None where the metric was not measured."""
    found = [at(records, metric, last_step(records)) for records in runs.values()]
    if None in found:
        return None
    if any("hits" not in r for r in found):
        raise ValueError("these runs are of an earlier version, without a verdict per prompt: what is paired cannot be computed; run them again")
    return [[int(hit) for hit in r["hits"]] for r in found]


def losses(runs):
    return [at(records, "task_loss", last_step(records))["value"] for records in runs.values()]


def harmful_at(records, loss):
    """The harmful score where the curve first falls to this task loss, on straight lines between evaluations; None where it never
    does, or begins there."""
    steps = sorted({r["step"] for r in records})
    curve = [(at(records, "task_loss", step)["value"], at(records, "harmful_score", step)["value"]) for step in steps]
    for (x, y), (next_x, next_y) in zip(curve, curve[1:]):
        if x > loss >= next_x:
            return y + (next_y - y) * (x - loss) / (x - next_x)
    return None


def difference(ours, theirs):
    """Paired over seeds: {"difference": mean of ours − theirs, "low", "high", "verdict"}; of values per seed, or of hits."""
    if isinstance(ours[0], list):
        mean, low, high = paired_interval(ours, theirs)
    else:
        values = [a - b for a, b in zip(ours, theirs)]
        mean, (low, high) = sum(values) / len(values), student(values)
    return {"difference": mean, "low": low, "high": high, "verdict": verdict(low, high)}


def check_paired(method, runs, reference):
    if runs.keys() != reference.keys():
        raise ValueError(f"{method} has seeds {sorted(runs)}, the reference {sorted(reference)}: only the same seeds can be compared")
    if len(runs) < 2:
        raise ValueError(f"{method} has one seed: an interval over seeds needs at least two")


def compare(method, runs, against):
    """One method's dict: what it reached, and how that differs from the reference, paired by seed and prompt."""
    check_paired(method, runs, against)
    runs, against = ({seed: of_seeds[seed] for seed in sorted(of_seeds)} for of_seeds in (runs, against))
    harmful, n = hits(runs, "harmful_score"), len(hits(runs, "harmful_score")[0])
    each = [sum(row) / n for row in harmful]
    mean = sum(each) / len(each)
    low, high = wilson(mean * n, n)
    found = {"method": method, "seeds": list(runs), "n": n, "harmful_score": mean, "ci_low": low, "ci_high": high, "each": each,
             "task_loss": losses(runs), "safer": difference(harmful, hits(against, "harmful_score")),
             "more_useful": difference(losses(runs), losses(against)),
             "mcnemar": [mcnemar(*pair) for pair in zip(harmful, hits(against, "harmful_score"))]}
    found["seconds"] = [at(records, "seconds", last_step(records))["value"] for records in runs.values()]
    for metric in ("over_refusal", "refusal_rate", "task_accuracy"):
        rows = hits(runs, metric)
        found[metric] = rows and [sum(row) / len(row) for row in rows]
    reached = [max(pair) for pair in zip(losses(runs), losses(against))]                    # the task loss that both curves fall to
    matched, theirs = ([harmful_at(records, loss) for records, loss in zip(of_seeds.values(), reached)] for of_seeds in (runs, against))
    comparable = None not in matched + theirs
    found["matched"], found["matched_against"] = (matched, theirs) if comparable else (None, None)
    found["safer_matched"] = difference(matched, theirs) if comparable else None
    return found


def comparisons(runs, reference="sap"):
    """[compare of every method]; ValueError where the reference is not among them."""
    if reference not in runs:
        raise ValueError(f"--against {reference}: among the runs are {', '.join(runs)}")
    return [compare(method, of_seeds, runs[reference]) for method, of_seeds in runs.items()]


def dominating(found):
    """The methods that are both safer and more useful than the reference, each beyond its interval."""
    return [c["method"] for c in found if c["safer"]["verdict"] == c["more_useful"]["verdict"] == "better"]


def percent(values):
    return "" if values is None else f"{100 * sum(values) / len(values):.1f}"


def cells(c, reference):
    """A comparison as strings."""
    same, safer, useful, matched = c["method"] == reference, c["safer"], c["more_useful"], c["safer_matched"]
    each = ", ".join(f"{100 * value:.1f}" for value in c["each"])
    differ = sum(p < 0.05 for p in c["mcnemar"])
    return [c["method"], f"{100 * c['harmful_score']:.1f} [{100 * c['ci_low']:.1f}, {100 * c['ci_high']:.1f}] ({each})", percent(c["refusal_rate"]),
            percent(c["over_refusal"]), percent(c["task_accuracy"]), f"{sum(c['task_loss']) / len(c['task_loss']):.3f}", f"{sum(c['seconds']) / len(c['seconds']):.0f}",
            "" if same else f"{safer['verdict']} ({100 * safer['difference']:+.1f} [{100 * safer['low']:+.1f}, {100 * safer['high']:+.1f}]; {differ})",
            "" if same else f"{useful['verdict']} ({useful['difference']:+.3f} [{useful['low']:+.3f}, {useful['high']:+.3f}])",
            "" if same else "–" if matched is None else
            f"{percent(c['matched'])} against {percent(c['matched_against'])}: {matched['verdict']} ({100 * matched['difference']:+.1f} [{100 * matched['low']:+.1f}, {100 * matched['high']:+.1f}])"]


def rows_of(found, reference):
    """Comparisons as rows of strings, the header first."""
    titles = ["method", "harmful %", "refused %", "over-refusal %", "task accuracy %", "task loss", "seconds", f"safer than {reference}?",
              f"more useful than {reference}?", f"harmful % at equal task loss, against {reference}"]
    return [titles] + [cells(c, reference) for c in found]


def markdown(rows):
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def legend(found, reference):
    """What the columns mean, and whether a method beats the reference in both."""
    seeds, better = len(found[0]["seeds"]), dominating(found)
    return (f"Mean of {seeds} seeds [95 % interval over the n = {found[0]['n']} prompts] (each seed). Differences are paired, their 95 % intervals over seeds and "
            f"prompts, not adjusted for the {len(found) - 1} comparisons of a column; after ;: in how many of {seeds} seeds McNemar's test has p < 0.05. Task loss: "
            f"nats per token, differences over seeds alone. Equal task loss: per seed, the larger of the two last ones. Seconds: of training, on whatever else the machine had to do. "
            + (f"Shown to be both safer and more useful than {reference}: {', '.join(better)}." if better else
               f"No method is shown to be both safer and more useful than {reference}."))


def print_comparisons(found, runs, reference):
    print_table(rows_of(found, reference))
    print(legend(found, reference))
    print_judges([r for of_seeds in runs.values() for records in of_seeds.values() for r in records])
