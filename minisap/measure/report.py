"""Methods against each other on the same prompts and seeds: intervals, paired tests, verdicts, at equal steps and at equal task loss.

A run         {method: {seed: the records that train.py left, with "step" and, of shares, "hits" per prompt}}
A comparison  one dict per method: see compare
"""

import math

from minisap.checkpoint import write_json, write_whole
from minisap.measure.evaluate import SHARES, judges, print_table
from minisap.measure.stats import both_levels, mcnemar, paired_interval, share_interval, verdict
from minisap.methods import PAIRLESS


def at(records, metric, step):
    return next((r for r in records if (r["metric"], r["step"]) == (metric, step)), None)


def last_step(records):
    return max(r["step"] for r in records)


def last(records, metric):
    """A metric's record after the last step."""
    return at(records, metric, last_step(records))


def over_seeds(records):
    """Of one record per seed {"mean", "ci_low", "ci_high": over seeds and rows, "each"}; of a single one its own interval, over rows."""
    values, (low, high) = (
        [r["value"] for r in records],
        (sum(r[bound] for r in records) / len(records) for bound in ("ci_low", "ci_high")),
    )
    if len(records) > 1:
        low, high = (
            share_interval(values, records[0]["n"])
            if records[0]["metric"].startswith(SHARES)
            else both_levels(values, low, high)
        )
    low = max(0.0, low) if records[0]["metric"] == "task_loss" else low
    return {"mean": sum(values) / len(values), "ci_low": low, "ci_high": high, "each": values}


def hits(runs, metric):
    """[[0 or 1 per prompt] per seed] after the last step; None where the metric was not measured."""
    found = [last(records, metric) for records in runs.values()]
    if None in found:
        return None
    if any("hits" not in r for r in found):
        raise ValueError(
            "these runs are of an earlier version, without a verdict per prompt: what is paired cannot be computed; run them again"
        )
    return [[int(hit) for hit in r["hits"]] for r in found]


def losses(runs):
    return [last(records, "task_loss")["value"] for records in runs.values()]


def loss_rows(*both):
    """Of each of both runs: [[what each row adds to the task loss] per seed] after the last step; the loss itself as one row where an older run did
    not keep that, and the legend says so."""
    found = [[last(records, "task_loss") for records in runs.values()] for runs in both]
    kept = all("per_row" in r for of_seeds in found for r in of_seeds)
    return [[r["per_row"] if kept else [r["value"]] for r in of_seeds] for of_seeds in found]


def harmful_at(records, loss):
    """[harmful hit per prompt], each a share between 0 and 1, where the curve first falls to this task loss, on straight lines between
    evaluations; None where it never does, or begins there."""
    steps = sorted({r["step"] for r in records})
    curve = [
        (
            at(records, "task_loss", step)["value"],
            [int(hit) for hit in at(records, "harmful_score", step)["hits"]],
        )
        for step in steps
    ]
    for (x, y), (next_x, next_y) in zip(curve, curve[1:]):
        if x > loss >= next_x:
            way = (x - loss) / (x - next_x)
            return [here + (there - here) * way for here, there in zip(y, next_y)]
    return None


def difference(ours, theirs, largest=math.inf):
    """Paired over seeds and rows, of values (seeds, rows): {"difference": mean of ours − theirs, "low", "high", "verdict"}; that of shares is 1 at most."""
    mean, low, high = paired_interval(ours, theirs)
    low, high = max(-largest, low), min(largest, high)
    return {"difference": mean, "low": low, "high": high, "verdict": verdict(low, high)}


def check_paired(method, runs, reference):
    if runs.keys() != reference.keys():
        raise ValueError(
            f"{method} has seeds {sorted(runs)}, the reference {sorted(reference)}: only the same seeds can be compared"
        )
    if len(runs) < 2:
        raise ValueError(f"{method} has one seed: an interval over seeds needs at least two")
    for metric in ("harmful_score", "task_loss"):
        if (
            len({last(records, metric)["n"] for records in (*runs.values(), *reference.values())})
            > 1
        ):
            raise ValueError(f"{method}: {metric} was not measured on the same rows for every seed")


def compare(method, runs, against):
    """One method's dict: what it reached, and how that differs from the reference, paired by seed and prompt."""
    check_paired(method, runs, against)
    runs, against = (
        {seed: of_seeds[seed] for seed in sorted(of_seeds)} for of_seeds in (runs, against)
    )
    harmful, n = hits(runs, "harmful_score"), len(hits(runs, "harmful_score")[0])
    each = [sum(row) / n for row in harmful]
    low, high = share_interval(each, n)
    rows = loss_rows(runs, against)
    found = {
        "method": method,
        "seeds": list(runs),
        "n": n,
        "harmful_score": sum(each) / len(each),
        "ci_low": low,
        "ci_high": high,
        "each": each,
        "task_loss": losses(runs),
        "safer": difference(harmful, hits(against, "harmful_score"), 1),
        "more_useful": difference(*rows),
        "mcnemar": [mcnemar(*pair) for pair in zip(harmful, hits(against, "harmful_score"))],
    }
    found["over_seeds_alone"] = all(len(of_seed) == 1 for of_seed in rows[0])
    found["seconds"] = [last(records, "seconds")["value"] for records in runs.values()]
    for metric in ("over_refusal", "refusal_rate", "task_accuracy"):
        ends = [last(records, metric) for records in runs.values()]
        found[metric] = None if None in ends else over_seeds(ends)
    reached = [
        max(pair) for pair in zip(losses(runs), losses(against))
    ]  # the task loss that both curves fall to
    matched, theirs = (
        [harmful_at(records, loss) for records, loss in zip(of_seeds.values(), reached)]
        for of_seeds in (runs, against)
    )
    comparable = None not in matched + theirs
    found["matched"], found["matched_against"] = (
        [sum(row) / n for row in rows] if comparable else None for rows in (matched, theirs)
    )
    found["safer_matched"] = difference(matched, theirs, 1) if comparable else None
    found["evaluations"] = min(
        len({r["step"] for r in records})
        for of_seeds in (runs, against)
        for records in of_seeds.values()
    )
    return found


def comparisons(runs, reference="sap"):
    """[compare of every method]; ValueError where the reference is not among them."""
    if reference not in runs:
        raise ValueError(f"--against {reference}: among the runs are {', '.join(runs)}")
    return [compare(method, of_seeds, runs[reference]) for method, of_seeds in runs.items()]


def dominating(found):
    """The methods that are both safer and more useful than the reference, each beyond its interval."""
    return [
        c["method"]
        for c in found
        if c["safer"]["verdict"] == c["more_useful"]["verdict"] == "better"
    ]


def safer_matched(found):
    """The methods that are safer than the reference at equal task loss."""
    return [
        c["method"]
        for c in found
        if c["safer_matched"] and c["safer_matched"]["verdict"] == "better"
    ]


def percent(values):
    return f"{100 * sum(values) / len(values):.1f}"


def share_cell(found):
    """'93.0 [89.1, 96.0]' of what over_seeds gives of shares; nothing where it was not measured."""
    return (
        f"{100 * found['mean']:.1f} [{100 * found['ci_low']:.1f}, {100 * found['ci_high']:.1f}]"
        if found
        else ""
    )


def difference_cell(d, scale, form, more=""):
    low, high = (format(scale * d[bound], form) for bound in ("low", "high"))
    return f"{d['verdict']} ({scale * d['difference']:{form}} [{low}, {high}]{more})"


def row_of(c, reference):
    """A comparison as strings."""
    each, low, high = (
        ", ".join(f"{100 * value:.1f}" for value in c["each"]),
        100 * c["ci_low"],
        100 * c["ci_high"],
    )
    own = [
        c["method"],
        f"{100 * c['harmful_score']:.1f} [{low:.1f}, {high:.1f}] ({each})",
        *(share_cell(c[metric]) for metric in ("refusal_rate", "over_refusal", "task_accuracy")),
        f"{sum(c['task_loss']) / len(c['task_loss']):.3f}",
        f"{sum(c['seconds']) / len(c['seconds']):.0f}",
    ]
    if c["method"] == reference:
        return own + [""] * 3
    matched = (
        c["safer_matched"]
        and f"{percent(c['matched'])} against {percent(c['matched_against'])}: {difference_cell(c['safer_matched'], 100, '+.1f')}"
    )
    return own + [
        difference_cell(c["safer"], 100, "+.1f", f"; {sum(p < 0.05 for p in c['mcnemar'])}"),
        difference_cell(c["more_useful"], 1, "+.3f"),
        matched or "–",
    ]


def rows_of(found, reference):
    """Comparisons as rows of strings, the header first."""
    titles = [
        "method",
        "harmful %",
        "refused %",
        "over-refusal %",
        "task accuracy %",
        "task loss",
        "seconds",
        f"safer than {reference}?",
        f"more useful than {reference}?",
        f"harmful % at equal task loss, against {reference}",
    ]
    return [titles] + [row_of(c, reference) for c in found]


def markdown(rows):
    return "".join(
        f"| {' | '.join(row)} |\n" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])
    )


def budget(args, methods, stage=None):
    """What every method of a run had, in two sentences: args, its train_args.json; stage, that of what comes before "…, then sft"."""
    without = [method for method in methods if method.split()[0] in PAIRLESS]
    more = (
        f' Before "…, then sft" come {stage["steps"]} steps more, of as many rows and pairs.'
        if any("then" in method for method in methods)
        else ""
    )
    return (
        f"{args['steps']} steps of {args['batch_size']} rows; {args['pairs']} contrastive pairs, {args['pairs_per_step']} a step"
        + (f", but none for {', '.join(without)}" if without else "")
        + f".{more}"
    )


def legend(found, reference):
    """What the columns mean, and whether a method beats the reference in both."""
    seeds, alone = len(found[0]["seeds"]), [c["method"] for c in found if c.get("over_seeds_alone")]
    said = [
        f"Mean of {seeds} seeds [95 % interval over seeds and the n = {found[0]['n']} prompts] (each seed).",
        f"Differences are paired, their 95 % intervals over seeds and prompts, or rows of the task, not adjusted for the {len(found) - 1} comparisons of a column;",
        f"after ;: in how many of {seeds} seeds McNemar's test has p < 0.05. Task loss: nats per token.",
        f"Equal task loss: per seed, the larger of the two last ones, on straight lines between {min(c['evaluations'] for c in found)} evaluations.",
        "Seconds: of training, on whatever else the machine had to do.",
    ]
    if alone:
        said.append(
            f"The task loss of {', '.join(alone)} is compared over seeds alone: not all runs kept each row's."
        )
    said.append(
        f"Shown to be both safer and more useful than {reference}: {', '.join(dominating(found)) or 'none'};"
    )
    said.append(f"safer at equal task loss: {', '.join(safer_matched(found)) or 'none'}.")
    return " ".join(said)


def print_comparisons(found, runs, reference, spent):
    """Print the table and what has to be said under it. Returns both: (rows, text)."""
    records = [r for of_seeds in runs.values() for records in of_seeds.values() for r in records]
    rows, text = (
        rows_of(found, reference),
        "\n".join([spent, legend(found, reference), *judges(records)]),
    )
    print_table(rows)
    print(text)
    return rows, text


def write_table(folder, found, parts):
    """Leave table.json and table.md in the folder. parts: [(title, rows, text)]."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(f"### {title}\n\n{markdown(rows)}\n{text}\n" for title, rows, text in parts)
    write_json(folder / "table.json", found)
    write_whole(folder / "table.md", lambda part: part.write_text(text, encoding="utf-8"))
    print(f"written: {folder / 'table.json'}, {folder / 'table.md'}")
