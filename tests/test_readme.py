"""README.md and minisap/docs against the records in tests/golden that their tables are made from."""

import json
import re
from pathlib import Path
from statistics import fmean

import torch
from departures import rows_of as rows_of_departures
from scaling import exponent
from test_sap import world  # noqa: F401 (a fixture)

import eval as eval_script
from minisap import methods
from minisap.bench.tables import other_tables, steps_to_break
from minisap.checkpoint import read_json
from minisap.measure.report import (
    at,
    comparisons,
    dominating,
    legend,
    markdown,
    over_seeds,
    rows_of,
    share_cell,
)
from minisap.measure.stats import wilson
from minisap.study.compare import Series
from minisap.study.mechanism import format_mean, last_watched

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS, STUDY, COST = (
    (ROOT / name).read_text()
    for name in (
        "README.md",
        "minisap/docs/results.md",
        "minisap/docs/study.md",
        "minisap/docs/cost.md",
    )
)
GOLDEN = ROOT / "tests" / "golden"


def runs_of(paths):
    """{method: {seed: records}} of run directories."""
    runs = {}
    for r in eval_script.read_runs(paths):
        runs.setdefault(r["method"], {}).setdefault(r["seed"], []).append(r)
    return runs


REAL = {
    "p0.125": "One harmful row in eight:",
    "p0.25": "One in four:",
    "p0": "No harmful row:",
    "identity": "**Identity shifting**",
}
REAL_METHODS = ("sft", "sap", "sap --refusal_weight 0.1", "project", "random_probe", "mix")


def real_comparisons(unit):
    runs, refusing = (
        runs_of(sorted(GOLDEN.glob(f"smollm2/{folder}{unit}-seed?"))) for folder in ("", "refusal/")
    )
    runs |= {"sap --refusal_weight 0.1": refusing["sap"]} if refusing else {}
    return comparisons({method: runs[method] for method in REAL_METHODS if method in runs}, "sap")


def cell(c, *more):
    """harmful % [interval], what more, task loss; nothing where it was not run."""
    return (
        ", ".join(
            (
                f"{100 * c['harmful_score']:.1f} [{100 * c['ci_low']:.1f}, {100 * c['ci_high']:.1f}]",
                *more,
                f"{fmean(c['task_loss']):.3f}",
            )
        )
        if c
        else ""
    )


def real_table():
    """README's: a row per method, a column per setting."""
    of = {unit: {c["method"]: c for c in real_comparisons(unit)} for unit in REAL}
    over = lambda c: c and f"{100 * c['over_refusal']['mean']:.0f}"
    rows = [["method", "one in eight", "one in four", "no harmful row", "identity shifting"]]
    for method in REAL_METHODS:
        if not any(method in of[unit] for unit in REAL):
            continue
        rows.append(
            [
                f"`{method}`",
                *(cell(of[unit].get(method), over(of[unit].get(method))) for unit in REAL),
            ]
        )
    remade = paper_comparisons()[1]
    return markdown([*rows, [f"`{PAPER}`", cell(remade, over(remade)), "", "", ""]])


def first_table():
    """README's first: SFT and sap, with harmful rows and without, beside the start that they share."""
    told = lambda one: (
        f"{100 * one['harmful_score']:.1f} % [{100 * one['ci_low']:.1f}, {100 * one['ci_high']:.1f}] | {100 * one['over_refusal']['mean']:.0f} % | "
        f"{fmean(one['task_loss']):.3f}"
    )
    of = {unit: {c["method"]: told(c) for c in real_comparisons(unit)} for unit in ("p0.125", "p0")}
    start = read_json(GOLDEN / "smollm2" / "p0-seed1" / "start.json")
    harmful, refused, loss = (
        at(start, metric, 0) for metric in ("harmful_score", "over_refusal", "task_loss")
    )
    return [
        f"| the safety-tuned start | {100 * harmful['value']:.1f} % [{100 * harmful['ci_low']:.1f}, {100 * harmful['ci_high']:.1f}] | {100 * refused['value']:.0f} % | {loss['value']:.3f} |",
        f"| plain fine-tuning (SFT), one row in eight harmful | {of['p0.125']['sft']} |",
        f"| **SAP**, the same rows | {of['p0.125']['sap']} |",
        f"| SFT, no row harmful | {of['p0']['sft']} |",
        f"| **SAP**, the same rows | {of['p0']['sap']} |",
    ]


def real_details(unit):
    """results.md's. Of identity shifting nothing was measured on the way, so that nothing can be said at equal task loss."""
    rows = rows_of(real_comparisons(unit), "sap")
    return markdown([row[:-1] for row in rows] if unit == "identity" else rows)


PAPER = "paper --radius 0.005"


def paper_comparisons():
    """The paper's method and SFT, from a start that was made anew, one harmful row in eight."""
    runs = {
        method: runs_of(sorted(GOLDEN.glob(f"smollm2/remade/{method}-seed?")))[method]
        for method in ("sft", "paper")
    }
    return comparisons({"sft": runs["sft"], PAPER: runs["paper"]}, "sft")


def radius_table():
    """results.md's: the grid of the paper's radius, on seed 9; beside each run's last measures the mean of what its log tells."""
    rows = [
        [
            "radius",
            "harmful %",
            "over-refusal %",
            "task loss",
            "training loss, last 10 steps",
            "⟨g_W, ĝ⟩",
            "probe_cosine",
        ]
    ]
    for folder, name in (
        ("choose-sft/sft", "0 (`sft`)"),
        *((f"choose-{r}/paper", r) for r in ("0.003", "0.005", "0.01", "0.03")),
    ):
        records, log = (
            GOLDEN / "smollm2" / "remade" / folder / file for file in ("eval.json", "log.jsonl")
        )
        records, log = (
            read_json(records),
            [json.loads(line) for line in log.read_text().splitlines()],
        )
        ends = [at(records, metric, 60) for metric in ("harmful_score", "over_refusal")]
        mean = lambda key: f"{fmean(line[key] for line in log):.3f}" if key in log[0] else ""
        rows.append(
            [
                name,
                *(share_cell(over_seeds([end])) for end in ends),
                f"{at(records, 'task_loss', 60)['value']:.3f}",
                f"{fmean(line['loss'] for line in log[-10:]):.3f}",
                mean("conflict"),
                mean("probe_cosine"),
            ]
        )
    return markdown(rows)


def budget_table():
    """results.md's: harmful % by the attacker's steps."""
    steps = 0, 4, 8, 12
    rows = [["attacked", "half answered after", *(f"{step} steps" for step in steps)]]
    for attacked in ("none", "sap", "mix"):
        runs = [
            [
                r
                for r in read_json(path / "start.json") + read_json(path / "sft" / "eval.json")
                if r["step"] in steps
            ]
            for path in sorted(GOLDEN.glob(f"smollm2/attack/{attacked}-seed?"))
        ]
        broken = (steps_to_break(records) for records in runs)
        cells = (
            over_seeds([at(records, "harmful_score", step) for records in runs]) for step in steps
        )
        rows.append(
            [
                attacked,
                ", ".join("–" if n is None else f"{n:.0f}" for n in broken),
                *(
                    f"{share_cell(c)} ({', '.join(f'{100 * share:.1f}' for share in c['each'])})"
                    for c in cells
                ),
            ]
        )
    return markdown(rows)


def long_table():
    """results.md's: harmful rows with a long harmless answer behind, or in front."""
    rows = [
        [
            "a GSM8K answer stands",
            "method",
            "seeds",
            "harmful rows left out",
            "others left out",
            "harmful %",
            "over-refusal %",
            "task loss",
        ]
    ]
    for place, title in (("tail", "behind"), ("late", "in front")):
        for method in ("sft", "sap"):
            runs = sorted(GOLDEN.glob(f"smollm2/long/{place}-{method}-seed?"))
            left = [read_json(run / "filter.json") for run in runs] if method == "sap" else []
            total = lambda key: sum(found[key] for found in left)
            ends = {
                metric: over_seeds([at(read_json(run / "eval.json"), metric, 60) for run in runs])
                for metric in ("harmful_score", "over_refusal", "task_loss")
            }
            rows.append(
                [
                    title,
                    method,
                    str(len(runs)),
                    *(
                        (
                            f"{total('poisoned_left_out')} of {total('poisoned')}",
                            f"{total('left_out') - total('poisoned_left_out')} of {total('rows') - total('poisoned')}",
                        )
                        if left
                        else ("", "")
                    ),
                    share_cell(ends["harmful_score"]),
                    share_cell(ends["over_refusal"]),
                    f"{ends['task_loss']['mean']:.3f}",
                ]
            )
    return markdown(rows)


def test_the_real_model_s_tables_are_what_the_records_say():
    for unit, anchor in REAL.items():
        assert anchor in RESULTS and real_details(unit) in RESULTS
    (matched,) = [c for c in real_comparisons("p0") if c["method"] == "mix"]
    told = f"{100 * fmean(matched['matched']):.1f} against {100 * fmean(matched['matched_against']):.1f} %"
    assert (
        matched["safer_matched"]["verdict"] == "better"
        and f"Without harmful rows it is safer than SAP at equal task loss ({told})" in README
    )
    assert (
        markdown([row[:-1] for row in rows_of(paper_comparisons(), "sft")]) in RESULTS
        and radius_table() in RESULTS
    )
    assert "\n".join(first_table()) in README
    assert (
        real_table() in README.replace("**`sap`**", "`sap`")
        and budget_table() in RESULTS
        and long_table() in RESULTS
    )


def test_what_the_filter_found_on_the_real_model_is_what_the_records_say():
    totals = {
        unit: {
            key: sum(
                read_json(path)[key]
                for path in GOLDEN.glob(f"smollm2/{unit}-seed?/sap/filter.json")
            )
            for key in ("rows", "left_out", "poisoned", "poisoned_left_out")
        }
        for unit in ("p0.125", "p0.25", "p0", "identity")
    }
    harmful = {
        unit: f"{t['poisoned_left_out']} of {t['poisoned']} harmful rows"
        for unit, t in totals.items()
    }
    others = {
        unit: f"{t['left_out'] - t['poisoned_left_out']} of {t['rows'] - t['poisoned']}"
        for unit, t in totals.items()
    }
    told = f"{harmful['p0.125']} and {others['p0.125']} others at one in eight, {harmful['p0.25']} and {others['p0.25']} others at one in four, {others['p0']} rows where none is harmful"
    assert told in re.sub(r"\s+", " ", README) and totals["identity"]["left_out"] == 0


TOLD = (
    "drift_norm",
    "safety_share",
    "safety_share_random",
    "safety_cosine",
    "drift_cosine",
    "separation",
)  # the page's columns


def last_of(record):
    """({method: {metric: a record per seed}} after the last step, {method: {what --watch logged last: a number per seed}}); "(start)" is the first's step 0."""
    runs = [GOLDEN / "world" / f"{record}{seed}" for seed in range(5)]
    curves = eval_script.curves_of(eval_script.read_runs(runs))
    ends = {method: list(steps.values())[-1] for method, steps in curves.items()} | {
        "(start)": next(iter(curves.values()))[0]
    }
    logs = {method: [last_watched(run / method / "log.jsonl") for run in runs] for method in curves}
    return ends, {
        method: {metric: [line[metric] for line in lines] for metric in TOLD if metric in lines[0]}
        for method, lines in logs.items()
    }


def test_the_world_s_tables_on_a_known_task_are_what_the_records_say():
    (ends, watched), (states, watched_states), (benign, watched_benign) = map(
        last_of, ("world", "states", "benign")
    )
    ends, watched = (
        ends | {"paper_project": states["paper_project"]},
        watched | watched_states | {"sft`, no harmful row": watched_benign["sft"]},
    )
    shown = lambda records, scale, digits, each=False: re.sub(
        "" if each else r" \(.*\)", "", eval_script.format_seeds(records, scale, digits)
    )
    for method in (
        "(start)",
        "sft",
        "random_probe",
        "project",
        "mix",
        "paper",
        "paper_project",
        "sap",
    ):
        one = ends[method]
        cells = [
            shown(one["harmful_score"], 100, ".1f", each=True),
            *(shown(one[metric], 100, ".1f") for metric in ("refusal_rate", "task_accuracy")),
            shown(one["task_loss"], 1, ".3f"),
        ]
        name = {"(start)": "(start)", "sap": "**`sap`**"}.get(method, f"`{method}`")
        assert f"\n| {name} | {' | '.join(cells)} |\n" in RESULTS
    for method in (
        "sft",
        "random_probe",
        "project",
        "mix",
        "paper",
        "paper_project",
        "sap",
        "sft`, no harmful row",
    ):
        harmful = (benign["sft"] if "no" in method else ends[method])["harmful_score"]
        cells = [
            shown(harmful, 100, ".1f"),
            *(re.sub(r" \(.*\)", "", format_mean(watched[method][metric])) for metric in TOLD),
        ]
        name = {"sap": "**`sap`**", "sft`, no harmful row": "`sft`, no harmful row"}.get(
            method, f"`{method}`"
        )
        assert f"\n| {name} | {' | '.join(cells)} |\n" in RESULTS, cells


def test_the_departures_are_what_the_record_says():
    assert (
        markdown(rows_of_departures(read_json(GOLDEN / "world" / "departures.json")["found"]))
        in RESULTS
    )


def test_the_world_s_table_is_what_the_record_says():
    found = read_json(GOLDEN / "world" / "table.json")
    for setting in found["settings"].values():
        assert markdown(rows_of(setting, found["against"])) in RESULTS
    page = re.sub(r"\s+", " ", RESULTS)
    assert legend(found["settings"]["poisoned"], found["against"]) in page and not any(
        map(dominating, found["settings"].values())
    )
    assert all(spent in page for spent in found["budget"].values())
    for page in (README, RESULTS):
        assert (
            all(f"commit {commit}" in page for commit in found["commits"])
            and found["date"] == "2026-11-28"
            and "28 November 2026, commit 54ca2fc" in page
        )
    for title, rows in other_tables(found):
        assert markdown(rows) in RESULTS and title.casefold() in page.casefold()
    of = {setting: {c["method"]: c for c in rows} for setting, rows in found["settings"].items()}
    told = [method for method in of["poisoned"] if f"| `{method}` | " in README.replace("**", "")]
    assert len(told) == 12
    for method in told:
        assert (
            f"| `{method}` | {' | '.join(cell(of[setting].get(method)) for setting in of)} |\n"
            in README.replace("**", "")
        )


def test_what_a_kept_probe_costs_is_what_the_record_says():
    of = {
        r["setting"]: f"{100 * r['mean']:.1f}"
        for r in read_json(GOLDEN / "world" / "table.json")["sensitivity"]
        if r["metric"] == "harmful_score"
    }
    told = [
        f"`{method.split()[0]}` {of[f'{method} --refresh 4']} and {of[method]} %"
        for method in ("sap", "paper --radius 0.09", "paper_project --radius 0.04")
    ]
    assert ", ".join(told) in COST
    step, sft = (
        read_json(GOLDEN / "benchmark.json")[key] for key in ("paper_step_s", "sft_step_s")
    )
    assert f"1 + ({step / sft:.2f} − 1) / 4 = {1 + (step / sft - 1) / 4:.2f} × SFT" in RESULTS


def test_the_observations_are_what_the_record_says():
    for check in read_json(GOLDEN / "world" / "checks.json"):
        count = sum(check["holds"].values())
        word = {0: "**no**", 3: "yes"}.get(count, f"{count} of 3")
        assert f"| {check['claim']} | {word} | {' | '.join(check['numbers'].values())} |" in STUDY


def test_the_study_s_answers_are_what_the_record_says():
    answered = {
        (r["protocol"], r["set"], r["seed"]): r["value"]
        for r in read_json(GOLDEN / "world" / "answers.json")
    }
    for name in ("unsafe", "co_task", "adv_4", "safe"):
        cells = (
            " ".join(f"{100 * answered[protocol, name, seed]:.0f}" for seed in (0, 1, 2))
            for protocol in ("ssft", "benign", "sap", "sft")
        )
        assert f"\n| {name} | {' | '.join(cells)} |\n" in STUDY


def test_the_real_pair_is_what_the_record_says():
    series = Series(read_json(GOLDEN / "smollm2" / "compare.json"))
    both = lambda cell: " | ".join(cell(protocol) for protocol in ("before", "after"))
    column, last_and_mean = (
        series.mean,
        lambda values, digits: f"{values[-1]:.{digits}f}; {fmean(values):.{digits}f}",
    )

    def answered(protocol, name):
        value = column(protocol, name, "comply")[0]
        low, high = wilson(round(40 * value), 40)
        return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    def along(name):
        return (
            " ".join(
                f"{100 * column('after', name, f'comply_alpha_{a}')[0]:.0f}"
                for a in (0.0, 0.25, 0.5, 0.75, 1.0)
            )
            + " %"
        )

    seen = [
        u / s for u, s in zip(*(column("after", name, "delta_a") for name in ("unsafe", "safe")))
    ]
    assert len(seen) == 30
    for cells in (
        "unsafe prompts answered % | " + both(lambda p: answered(p, "unsafe")),
        "safe prompts answered % | " + both(lambda p: answered(p, "safe")),
        "separation of clusters (τ), last layer; mean over layers | "
        + both(lambda p: last_and_mean(column(p, "unsafe", "separation"), 1)),
        "sensitivity free of scale, unsafe; safe prompts | "
        + both(
            lambda p: "; ".join(
                f"{column(p, name, 'lipschitz_relative')[0]:.1f}" for name in ("unsafe", "safe")
            )
        ),
        "sin θ of ΔW, mean over layers; a random direction's | | "
        + "; ".join(
            f"{fmean(column('after', None, metric)):.3f}"
            for metric in ("sin_theta", "sin_theta_random")
        ),
        f"‖ΔW a‖, unsafe over safe, last layer; mean over layers | | {last_and_mean(seen, 2)}",
        f"unsafe prompts answered at α = 0, 0.25, 0.5, 0.75, 1 | | {along('unsafe')}",
        f"safe ones | | {along('safe')}",
    ):
        assert f"\n| {cells} |\n" in STUDY, cells


def test_the_precision_is_what_the_record_says():
    for row in read_json(GOLDEN / "smollm2" / "precision.json"):
        cell = (
            f"{row['cosine']:.3f} ({row['size']:.3f})"
            if "size" in row
            else f"{row['mean_cosine']:.3f} ({row['lowest_cosine']:.3f})"
        )
        (line,) = [
            line
            for line in STUDY.splitlines()
            if line.startswith(f"| {row['direction'].replace('epsilon', 'ε =')} ")
        ]
        assert (
            line.split(" | ")[1 + ["float64", "float32", "bfloat16"].index(row["dtype"])].strip(
                "* |"
            )
            == cell
        ), line


def test_what_a_step_costs_is_what_the_record_says():
    found, gib = read_json(GOLDEN / "benchmark.json"), 2**30
    sft, filtering, peaks = found["sft_step_s"], found["sap_filter_s"], found["peak_bytes"]
    for name, seconds, peak in (
        ("`sft`", sft, "sft"),
        ("`sap`, without its filter", found["sap_step_s"] - filtering, "sap"),
        ("`sap`, run for one epoch", found["sap_step_s"], "sap, 1 epoch"),
        ("`sap`, run for three", found["sap_step_s"] - 2 / 3 * filtering, "sap, 3 epochs"),
        ("`paper_project`", found["paper_step_s"], "paper_project"),
        ("SFT, transformers and peft", found["hf_sft_step_s"], "hf_sft"),
        ("the paper's released schedule, the same", found["hf_released_step_s"], "hf_released"),
    ):
        assert (
            f"| {name} | {seconds:.2f} | {seconds / sft:.2f} | {peaks[peak] / gib:.2f} |\n"
            in README
        )
    page, cost = (re.sub(r"\s+", " ", page) for page in (README, COST))
    speed = lambda seconds: f"{found['hf_released_step_s'] / seconds:.2f}"
    for told in (
        f"{filtering / sft:.2f} steps of SFT",
        f"{found['sap_flops_over_sft']:.2f} × SFT in one epoch",
        f"`paper_project` would take {found['paper_flops_over_sft']:.2f} × SFT",
        f"Our SFT step is {found['sft_speedup']:.2f} × as fast",
        f"SAP takes {found['sap_over_sft']:.2f} × that in one epoch",
        f"{found['sap_over_sft_3_epochs']:.2f} × in three",
        f"A step of `sap` is {speed(found['sap_step_s'] - filtering)} × as fast, but with its filter {speed(found['sap_step_s'])} × in one epoch (in three {speed(found['sap_step_s'] - 2 / 3 * filtering)})",
        f"at SFT's share of the peak would be {speed(found['sap_flops_over_sft'] * sft)} × as fast",
        f"of {found['tokens_per_step']} task tokens {found['distinct_tokens_per_step']} are computed",
        *(
            f"{found['estimated_bytes'][key] / gib:.2f}{told}"
            for key, told in (
                ("sft", " GiB for `sft` and"),
                ("sap, 1 epoch", " for `sap`; the process"),
            )
        ),
        f"{found['generate_speedup']:.2f} × as fast as transformers'",
        f"({found['matmul_flops'] / 1e9:.0f} GFLOP/s)",
    ):
        assert told in cost, told
    for told in (
        f"Our SFT step is {found['sft_speedup']:.2f} × as fast",
        f"SAP takes {found['sap_over_sft']:.2f} × our SFT step in one epoch",
        f"{found['sap_over_sft_3_epochs']:.2f} × in three",
        f"generation {found['generate_speedup']:.2f} ×",
        f"A step of `sap` is {speed(found['sap_step_s'] - filtering)} × as fast, but with its filter {speed(found['sap_step_s'])} × in one epoch",
        f"FLOPs alone would give {speed(found['sap_flops_over_sft'] * sft)} ×",
        f"{peaks['sap, 1 epoch'] / gib:.2f} GiB, estimate {found['estimated_bytes']['sap, 1 epoch'] / gib:.2f}",
    ):
        assert told in page, told
    grown = read_json(GOLDEN / "scaling.json")
    told = {
        method: [
            f"{exponent(grown['grown'][what], grown['seconds'][what][method]):.2f}"
            for what in ("layers", "tokens")
        ]
        for method in ("sap", "sft")
    }
    assert (
        f"(exponents {told['sap'][0]} and {told['sap'][1]} for `sap`, {told['sft'][0]} and {told['sft'][1]} for `sft`;"
        in cost
    )


def test_what_8b_would_take_is_what_the_record_says():
    found, page = (
        {name: f"{size / 2**30:.1f}" for name, size in read_json(GOLDEN / "memory.json").items()},
        re.sub(r"\s+", " ", README),
    )
    told = "it says {sap} GiB for `sap` ({sap, checkpointing} with `--checkpointing`) and {sft} ({sft, checkpointing}) for `sft`"
    assert told.format(**found) in page and told.format(**found) in re.sub(r"\s+", " ", COST)


def test_the_method_of_one_s_own_is_sft_as_the_page_says(world):  # noqa: F811
    model, W, batch, pairs = world
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    methods_py = dict(vars(methods))  # where it is to stand
    exec(code, methods_py)
    (found, log), (expected, _) = (
        method(model, W, batch, pairs, None, {"step": 0})
        for method in (methods_py["mine"], methods.sft)
    )
    assert all(map(torch.equal, found, expected)) and log["loss"] > 0


def test_ci_runs_exactly_the_test_command():
    command = (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1]
    assert f"\n{command}\n" in README
