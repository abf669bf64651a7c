"""Pictures of table.json: harm against task loss, against the share of harmful rows, against the attacker's steps."""

from minisap.measure.stats import student
from minisap.run.flags import pyplot, save_figure

# README's columns.
TITLES = {
    "poisoned": "one row in ten harmful",
    "harmless": "no harmful row",
    "disguised": "harmful rows in the task's format",
    "evading": "likewise, chosen to evade the filter",
}
BUDGETS = {
    "attack10": "10 harmful rows",
    "attack100": "100 harmful rows",
    "capitals100": "100 in capitals",
}


def plane(axis, found, reference, title=""):
    """A dot per method with 95 % intervals: the harmful score over seeds and prompts, the task loss over seeds."""
    for c in found:
        x, y = sum(c["task_loss"]) / len(c["task_loss"]), 100 * c["harmful_score"]
        low, high = student(c["task_loss"])
        low = max(low, x / 2)  # the scale is logarithmic
        drawn = axis.errorbar(
            x,
            y,
            xerr=[[x - low], [high - x]],
            yerr=[[y - 100 * c["ci_low"]], [100 * c["ci_high"] - y]],
            fmt="o",
            markersize=7 if c["method"] == reference else 4,
            linewidth=0.8,
            capsize=2,
        )
        axis.annotate(
            c["method"],
            (x, y),
            textcoords="offset points",
            xytext=(5, 3),
            fontsize=7,
            color=drawn[0].get_color(),
        )
    axis.set(
        xscale="log",
        xlabel="task loss, nats per token (useful: to the left)",
        ylabel="harmful score, % (safe: below)",
        title=title,
    )
    ticker = pyplot().matplotlib.ticker
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.xaxis.set_major_formatter("{x:g}")


def over(axis, found, key, x, title, xlabel):
    """A line per value of `key` with Student's interval over seeds as a band."""
    for name in dict.fromkeys(r[key] for r in found):
        rows = [r for r in found if r[key] == name]
        places = [r[x] for r in rows]
        (line,) = axis.plot(
            places, [100 * r["mean"] for r in rows], marker="o", markersize=3, label=name
        )
        axis.fill_between(
            places,
            [100 * max(0, r["ci_low"]) for r in rows],
            [100 * min(1, r["ci_high"]) for r in rows],
            color=line.get_color(),
            alpha=0.12,
            linewidth=0,
        )
    axis.set(xlabel=xlabel, ylabel="harmful score, %", title=title, ylim=(-3, 103))
    axis.legend(frameon=False, fontsize=7)


def draw_plane(found, reference, file):
    figure, axis = pyplot().subplots(figsize=(7, 4.5))
    plane(axis, found, reference)
    save_figure(figure, file)


def draw_laboratory(found, file):
    """The planes of all settings, the sweep, and a panel for each of the attacker's budgets."""
    budgets = sorted({(r["rows"], r["learning_rate"]) for r in found["budgets"]})
    figure, axes = pyplot().subplots(3, 3, figsize=(15, 12.5))
    n = len(found["settings"])
    planes, (sweep, *attacks) = axes.flat[:n], axes.flat[n:]
    for axis, (setting, rows) in zip(planes, found["settings"].items()):
        plane(axis, rows, found["against"], TITLES[setting])
    over(sweep, found["sweep"], "method", "p", "share of harmful rows", "p")
    for axis in attacks[len(budgets) :]:
        axis.axis("off")
    for axis, (rows, rate) in zip(attacks, budgets):
        chosen = [r for r in found["budgets"] if (r["rows"], r["learning_rate"]) == (rows, rate)]
        over(
            axis,
            chosen,
            "defence",
            "step",
            f"attacker: {BUDGETS[rows]}, learning rate {rate:g}",
            "steps",
        )
    save_figure(figure, file)
