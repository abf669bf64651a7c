"""Pictures of the records of compare.py and study.py: one per observation, means over seeds, every seed as a faint line or dot."""

from minisap.measure.attacks import ATTACK_TOKENS, LONGEST_SUFFIX
from minisap.run.flags import pyplot, save_figure
from minisap.study.compare import ALPHAS, VERDICTS, Series, means

COLOURS = {"comply": "tab:red", "refuse": "tab:green", "other": "lightgrey"}


def line(axis, x, seeds, label, **style):
    """The mean over seeds, and every seed faintly."""
    (drawn,) = axis.plot(x, means(seeds), marker="o", markersize=3, label=label, **style)
    for values in seeds if len(seeds) > 1 else ():
        axis.plot(
            x,
            values,
            color=drawn.get_color(),
            linestyle=drawn.get_linestyle(),
            alpha=0.25,
            linewidth=0.8,
        )


def share_line(axis, x, series, protocol, cells, label):
    """A line of shares, in %, one (set, metric) for every x."""
    columns = [series.seeds(protocol, *cell) for cell in cells]
    line(axis, x, [[100 * values[0] for values in seed] for seed in zip(*columns)], label)


def grid(n, title, width=3.2, height=2.8, **options):
    figure, axes = pyplot().subplots(1, n, figsize=(width * n, height), squeeze=False, **options)
    axes[0, 0].set_ylabel(title, fontsize=8)
    return figure, axes[0]


def per_layer(series, metric, sets, label, scale="linear"):
    """A panel per set, a line per protocol."""
    sets = [name for name in sets if series.protocols(name, metric)]
    figure, axes = grid(len(sets), label, sharey=True)
    for axis, name in zip(axes, sets):
        for protocol in series.protocols(name, metric):
            line(
                axis,
                series.layers(protocol, name, metric),
                series.seeds(protocol, name, metric),
                protocol,
            )
        axis.set(title=name, xlabel="layer", yscale=scale)
    axes[0].legend(frameon=False, fontsize=7)
    return figure


def draw_answers(series):
    """Stacked shares of every set, attacks included, a panel per protocol."""
    protocols = series.protocols("safe", "comply")
    figure, axes = grid(len(protocols), "", width=2.6, height=3.4, sharey=True, sharex=True)
    for axis, protocol in zip(axes, protocols):
        names, left = series.sets(protocol, "comply"), 0
        for verdict in VERDICTS:
            widths = [100 * series.mean(protocol, name, verdict)[0] for name in names]
            axis.barh(names, widths, left=left, color=COLOURS[verdict], label=verdict)
            left = [a + b for a, b in zip(left, widths)] if left else widths
        axis.set(title=protocol, xlabel="% of prompts")
        axis.tick_params(axis="y", labelsize=7)
    axes[0].invert_yaxis()
    axes[-1].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_attacks(series):
    """Share of unsafe prompts that are answered against the length of the attack."""
    figure, axes = grid(2, "% of unsafe prompts answered", sharey=True)
    for axis, attack in zip(axes, ("adv", "prefill")):
        for protocol in series.protocols(f"{attack}_1", "comply"):
            cells = [
                (name, "comply") for name in ("unsafe", *(f"{attack}_{k}" for k in ATTACK_TOKENS))
            ]
            share_line(axis, (0, *ATTACK_TOKENS), series, protocol, cells, protocol)
        axis.set(xlabel={"adv": "tokens of soft suffix", "prefill": "tokens of prefill"}[attack])
    axes[0].legend(frameon=False, fontsize=7)
    return figure


def draw_tau(series):
    """τ of every set in the last layer, a panel per protocol."""
    protocols = series.protocols("safe", "tau")
    figure, axes = grid(len(protocols), "", width=2.6, height=3, sharey=True)
    for axis, protocol in zip(axes, protocols):
        names = series.sets(protocol, "tau")
        for values in zip(
            *([seed[-1] for seed in series.seeds(protocol, name, "tau")] for name in names)
        ):
            axis.plot(values, names, "o", markersize=4, alpha=0.6, color="tab:blue")
        axis.axvline(0, color="grey", linewidth=0.5)
        axis.set(title=protocol, xlabel="τ, last layer (> 0: looks safe)")
        axis.tick_params(axis="y", labelsize=7)
    axes[0].invert_yaxis()
    return figure


def draw_column_space(series):
    """sin θ per layer, a line per protocol, and what a random direction has."""
    figure, (axis,) = grid(1, "sin θ of ΔW against W's column space", width=4.5)
    for protocol in series.protocols(None, "sin_theta"):
        line(
            axis,
            series.layers(protocol, None, "sin_theta"),
            series.seeds(protocol, None, "sin_theta"),
            protocol,
        )
    first = series.protocols(None, "sin_theta")[0]
    line(
        axis,
        series.layers(first, None, "sin_theta"),
        series.seeds(first, None, "sin_theta_random"),
        f"random, for {first}",
        color="black",
        linestyle=":",
    )
    axis.set(xlabel="layer")
    axis.legend(frameon=False, fontsize=7)
    return figure


def draw_answers_between(series):
    """Share answered of every set along W_before + α ΔW, a panel per protocol."""
    protocols = series.protocols("safe", f"comply_alpha_{ALPHAS[0]}")
    figure, axes = grid(len(protocols), "% answered", width=2.8, height=3, sharey=True)
    for axis, protocol in zip(axes, protocols):
        for name in series.sets(protocol, f"comply_alpha_{ALPHAS[0]}"):
            share_line(
                axis,
                ALPHAS,
                series,
                protocol,
                [(name, f"comply_alpha_{alpha}") for alpha in ALPHAS],
                name,
            )
        axis.axvline(1, color="grey", linewidth=0.5)
        axis.set(title=protocol, xlabel="α")
    axes[0].legend(frameon=False, fontsize=6)
    return figure


def draw_safety_share(series):
    """Share of a run's ΔW in the directions that safety training wrote, and its cosine with what it wrote."""
    metrics = {
        "safety_share": "share of ΔW",
        "safety_share_random": "the same by chance",
        "safety_cosine": "cosine with ΔW of safety",
        "drift_cosine": "cosine of ΔW with ĝ₀",
    }
    figure, axes = grid(len(metrics), "", width=2.4, sharex=True)
    for axis, (metric, label) in zip(axes, metrics.items()):
        for protocol in series.protocols(None, metric):
            values = [seed[0] for seed in series.seeds(protocol, None, metric)]
            axis.plot([protocol] * len(values), values, "o", alpha=0.6)
        axis.axhline(0, color="grey", linewidth=0.5)
        axis.set_title(label, fontsize=8)
        axis.margins(x=0.4)
    return figure


def draw_lipschitz(series):
    """Both versions, sets against protocols."""
    figure, axes = grid(2, "", width=4, height=3)
    for axis, metric in zip(axes, ("lipschitz", "lipschitz_relative")):
        for name in ("unsafe", "safe", "co_task", "co_text", LONGEST_SUFFIX):
            protocols = series.protocols(name, metric)
            if protocols:
                line(
                    axis,
                    protocols,
                    list(
                        zip(
                            *(
                                [seed[0] for seed in series.seeds(p, name, metric)]
                                for p in protocols
                            )
                        )
                    ),
                    name,
                )
        axis.set_title(
            {"lipschitz": "‖∇ max logit‖", "lipschitz_relative": "free of scale"}[metric],
            fontsize=8,
        )
        axis.set_yscale("log")
        axis.tick_params(axis="x", labelsize=7, rotation=30)
    axes[0].legend(frameon=False, fontsize=7)
    return figure


# {name: (the set and metric without which there is nothing to draw, how)}
FIGURES = {
    "answers": (("safe", "comply"), draw_answers),
    "attacks": (("adv_1", "comply"), draw_attacks),
    "separation": (
        ("unsafe", "separation"),
        lambda series: per_layer(
            series,
            "separation",
            ("unsafe", "co_task", "co_text", LONGEST_SUFFIX),
            "separation from safe prompts, τ",
            "symlog",
        ),
    ),
    "sigma1": (
        ("unsafe", "sigma1_share"),
        lambda series: per_layer(
            series, "sigma1_share", ("unsafe", "safe"), "σ₁ share of the cluster's covariance"
        ),
    ),
    "tau": (("unsafe", "tau"), draw_tau),
    "column_space": ((None, "sin_theta"), draw_column_space),
    "row_space": (
        ("unsafe", "delta_a"),
        lambda series: per_layer(
            series,
            "delta_a",
            ("unsafe", "safe", "co_task", "co_text", LONGEST_SUFFIX),
            "‖ΔW a‖, a of norm 1",
        ),
    ),
    "lipschitz": (("unsafe", "lipschitz"), draw_lipschitz),
    "path": (("safe", f"comply_alpha_{ALPHAS[0]}"), draw_answers_between),
    "safety_share": ((None, "safety_share"), draw_safety_share),
}


def draw_all(records, folder):
    """One PNG per observation that the records hold."""
    series = Series(records)
    for name, (needed, draw) in FIGURES.items():
        if series.protocols(*needed):
            save_figure(draw(series), folder / f"{name}.png")
