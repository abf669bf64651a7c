"""What training did to a model, in one list of records: how it answers every set of prompts, under attack too, and the measures of
mechanism.py per layer and set; for one checkpoint, or for a second one against the first.

A record   {"set", "layer", "metric", "value"}; set and layer are None where a measure has none
Sets       {name: [{"prompt", "harmful"}]}, among them "safe" and "unsafe"; of safe prompts "harmful" may be None
"""

import copy

import torch
from tqdm import tqdm

from minisap.measure.attacks import LONGEST_SUFFIX, attack, check_room, plain
from minisap.measure.evaluate import generate_texts, print_table
from minisap.measure.judge import judge_of
from minisap.study.mechanism import (
    clusters,
    column_space,
    interpolate,
    lipschitz,
    mlp_matrix,
    mlp_streams,
    row_space,
    sigma1_share,
    tau,
)

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.2, 1.5)
VERDICTS = ("comply", "refuse", "other")


def as_records(found):
    return [dict(zip(("set", "layer", "metric", "value"), record)) for record in found]


def shares(name, verdicts, suffix=""):
    return [
        (name, None, verdict + suffix, verdicts.count(verdict) / len(verdicts))
        for verdict in VERDICTS
    ]


def answers(model, tokenizer, sets, suffix=""):
    """Shares of prompts that are answered, refused, and neither, of every set."""
    _, judge = judge_of(tokenizer)
    for name, rows in sets.items():
        texts = generate_texts(model, tokenizer, [row["prompt"] for row in rows])
        yield from shares(
            name, [judge(text, row["harmful"]) for text, row in zip(texts, rows)], suffix
        )


def cluster_measures(streams):
    """Per layer: τ of every set, by the means of the unsafe and the safe one; and of every set against the safe one how far they
    stand apart. streams: {set: â}."""
    for j in range(len(streams["safe"])):
        clouds = {name: x[j] for name, x in streams.items()}
        for name, cloud in clouds.items():
            yield name, j, "tau", tau(cloud, clouds["unsafe"], clouds["safe"], name).mean().item()
            yield name, j, "sigma1_share", sigma1_share(cloud)
            if name != "safe":
                yield from (
                    (name, j, metric, value)
                    for metric, value in clusters(cloud, clouds["safe"]).items()
                )


def change_measures(before, after, streams):
    """Per layer whose MLP was trained: where ΔW lies with respect to W_before, and how much it sees of each set's inputs in the
    model `after`. streams: {set: a}."""
    for j in range(len(streams["safe"])):
        W = mlp_matrix(before, j)
        delta = mlp_matrix(after, j) - W
        if not delta.any():  # LoRA elsewhere
            continue
        svd = torch.linalg.svd(delta, full_matrices=False)
        yield from ((None, j, metric, value) for metric, value in column_space(W, svd).items())
        for name, a in streams.items():
            yield from ((name, j, metric, value) for metric, value in row_space(svd, a[j]).items())


def check_sets(sets):
    """ValueError where a set is too small for the measures of a cluster."""
    for name, rows in sets.items():
        if len(rows) < 2:
            raise ValueError(
                f"{name}: {len(rows)} prompts; the measures of a cluster need 2, and better 50"
            )


def measure(model, tokenizer, sets, max_len, before=None, attacked=True):
    """Every record of one checkpoint; with the one that it was trained from, those of the change, too."""
    check_sets(sets)
    if attacked:
        check_room(tokenizer, sets["unsafe"], max_len)
    found = [*answers(model, tokenizer, sets)]
    inputs = {
        name: plain(tokenizer, [row["prompt"] for row in rows]) for name, rows in sets.items()
    }
    for name, verdicts, suffixed in (
        attack(model, tokenizer, sets["unsafe"], max_len) if attacked else ()
    ):
        found += shares(name, verdicts)
        if name == LONGEST_SUFFIX:
            inputs[name] = suffixed
    a, a_hat = {}, {}
    for name, prompts in tqdm(inputs.items(), desc="look inside", leave=False):
        a[name], a_hat[name] = mlp_streams(model, prompts)
        found += [
            (name, None, metric, value) for metric, value in lipschitz(model, prompts).items()
        ]
    found += cluster_measures(a_hat)
    if before:
        found += change_measures(before, model, a)
    return as_records(found)


def answers_between(before, after, tokenizer, sets):
    """How W(α) = W_before + α (W_after − W_before) answers every set, the metrics' names with α behind them: comply_alpha_0.5."""
    model, found = copy.deepcopy(after), []
    for alpha in tqdm(ALPHAS, desc="from before to after", leave=False):
        interpolate(model, before, after, alpha)
        found += answers(model, tokenizer, sets, f"_alpha_{alpha}")
    return as_records(found)


def means(seeds):
    """[mean over seeds] of [[value] of every seed]."""
    return [sum(column) / len(column) for column in zip(*seeds)]


class Series:
    """Records as {protocol: {set: {metric: {seed: {layer: value}}}}}, in the order that they come in."""

    def __init__(self, records):
        self.tree = {}
        for r in records:
            metrics = self.tree.setdefault(r["protocol"], {}).setdefault(r["set"], {})
            metrics.setdefault(r["metric"], {}).setdefault(r["seed"], {})[r["layer"]] = r["value"]

    def protocols(self, set, metric):
        return [protocol for protocol, sets in self.tree.items() if metric in sets.get(set, {})]

    def sets(self, protocol, metric):
        return [name for name, metrics in self.tree[protocol].items() if metric in metrics]

    def layers(self, protocol, set, metric):
        """The layers that have it: [None] of what has none."""
        return list(next(iter(self.tree[protocol][set][metric].values())))

    def seeds(self, protocol, set, metric):
        """[values over layers] of every seed."""
        return [list(layers.values()) for layers in self.tree[protocol][set][metric].values()]

    def mean(self, protocol, set, metric):
        """Over seeds, as a list over layers."""
        return means(self.seeds(protocol, set, metric))


def print_answers(series):
    """Shares of every set, means over seeds: a column per protocol."""
    protocols = series.protocols("safe", "comply")
    names = {name: None for protocol in protocols for name in series.sets(protocol, "comply")}
    cell = lambda protocol, name: " ".join(
        f"{100 * series.mean(protocol, name, verdict)[0]:3.0f}" for verdict in VERDICTS
    )
    print_table(
        [["set", *protocols]]
        + [[name, *(cell(protocol, name) for protocol in protocols)] for name in names]
    )
    print("of each set the shares that are answered, refused, and neither, in %")


LAYER_METRICS = (
    ("unsafe", "separation"),
    ("unsafe", "fisher"),
    ("unsafe", "sigma1_share"),
    ("safe", "sigma1_share"),
    (None, "sin_theta"),
    (None, "sin_theta_random"),
    ("unsafe", "delta_a"),
    ("safe", "delta_a"),
)


def print_layers(series):
    """The measures inside, means over seeds: a line per protocol and layer."""
    rows = [
        ["protocol", "layer", *(f"{metric} {name or ''}".strip() for name, metric in LAYER_METRICS)]
    ]
    for protocol in series.protocols("unsafe", "separation"):
        columns = [
            dict(zip(series.layers(protocol, *which), series.mean(protocol, *which)))
            if protocol in series.protocols(*which)
            else {}
            for which in LAYER_METRICS
        ]
        for j in columns[0]:
            rows.append(
                [
                    protocol,
                    str(j),
                    *(f"{column[j]:.3f}" if j in column else "" for column in columns),
                ]
            )
    print_table(rows)
    if not series.protocols(None, "sin_theta"):
        print("no layer's MLP (gate_proj, up_proj) was trained: there is no ΔW to look at")
