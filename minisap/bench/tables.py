"""The world's tables, read from the runs that laboratory.py made: table.json, table.md, and what is printed."""

from minisap.bench import cells as laboratory
from minisap.bench.cells import FEW, run_cells, told
from minisap.checkpoint import read_json, read_object
from minisap.measure.attacks import ATTACKS
from minisap.measure.evaluate import print_table, read_measured
from minisap.measure.report import (
    at,
    budget,
    comparisons,
    last,
    over_seeds,
    print_comparisons,
    share_cell,
    write_table,
)
from minisap.run.resume import read_run_args

SENSITIVE = {
    "harmful_score": "harmful %",
    "refusal_rate": "refused %",
    "over_refusal": "over-refusal %",
    "task_accuracy": "task accuracy %",
    "task_loss": "task loss",
}


def records_of(folder, run):
    """{method: its records, the start's among them} of a run directory."""
    start = read_measured(folder / run / "start.json")
    return {
        file.parent.name: start + read_measured(file)
        for file in sorted((folder / run).glob("*/eval.json"))
    }


def runs_of(folder, setting, seeds):
    """{method: {seed: records}} of a setting: its methods, those with flags of their own, SFT after its stages."""
    _, methods, variants, stages = laboratory.SETTINGS[setting]
    names = {
        setting: None,
        **{f"{setting}-variant{i}": label for i, label in enumerate(variants)},
        **{f"{setting}-{stage}": f"{stage}, then sft" for stage in stages},
    }
    found = {}
    for seed in seeds:
        for name, label in names.items():
            for method, records in records_of(folder, f"{name}/seed{seed}").items():
                found.setdefault(label or method, {})[seed] = records
    return {method: found[method] for method in (*methods.split(), *filter(None, names.values()))}


def sweep_of(folder, seeds):
    """[{p, method, harmful score over seeds}]."""
    found = []
    for p, name in laboratory.SWEEP.items():
        runs = [records_of(folder, f"{name}/seed{seed}") for seed in seeds]
        found += [
            {
                "p": p,
                "method": method,
                **over_seeds([last(run[method], "harmful_score") for run in runs]),
            }
            for method in laboratory.SWEPT.split()
        ]
    return found


def filter_of(folder, seeds):
    """{setting: {"found": share of the harmful rows that sap leaves out, "harmless": of the others, each seed's}}."""
    shares = {}
    for setting in laboratory.SETTINGS:
        each = [
            read_object(folder / setting / f"seed{seed}" / "sap" / "filter.json") for seed in seeds
        ]
        shares[setting] = {
            "found": [r["poisoned_left_out"] / r["poisoned"] for r in each if r["poisoned"]],
            "harmless": [
                (r["left_out"] - r["poisoned_left_out"]) / (r["rows"] - r["poisoned"]) for r in each
            ],
        }
    return shares


def sensitivity_of(folder, seeds):
    """[{setting, metric, mean over seeds}] after the last step; first of what "poisoned" has, too, as it stands there."""
    settings, (_, here, variants, _) = laboratory.SENSITIVITY, laboratory.SETTINGS["poisoned"]
    places = {
        method: "poisoned"
        for method in dict.fromkeys(setting.split()[0] for setting in settings)
        if method in here.split()
    }
    places |= {
        variant: f"poisoned-variant{i}"
        for i, variant in enumerate(variants)
        if any(setting.startswith(f"{variant} ") for setting in settings)
    }
    found = []
    for setting, place in (
        places | {setting: f"setting{i}" for i, setting in enumerate(settings)}
    ).items():
        runs = [records_of(folder, f"{place}/seed{seed}")[setting.split()[0]] for seed in seeds]
        found += [
            {
                "setting": setting,
                "metric": metric,
                **over_seeds([last(records, metric) for records in runs]),
            }
            for metric in SENSITIVE
        ]
    return found


def steps_to_break(records, share=0.5):
    """Steps after which the attacker has this share of the unsafe prompts answered, on straight lines; None where never."""
    curve = sorted((r["step"], r["value"]) for r in records if r["metric"] == "harmful_score")
    for (step, y), (next_step, next_y) in zip(curve, curve[1:]):
        if y < share <= next_y:
            return step + (next_step - step) * (share - y) / (next_y - y)
    return 0 if curve[0][1] >= share else None


def budgets_of(folder, seeds):
    """[{defence, rows, learning_rate, step, harmful score over seeds, each seed's "refused"}], the last step's with each seed's "steps_to_break"."""
    found = []
    for defence in laboratory.DEFENCES:
        for rows, rate in laboratory.BUDGETS:
            runs = [
                records_of(folder, f"attack/{defence}-{rows}-{rate}/seed{seed}")["sft"]
                for seed in seeds
            ]
            for step in sorted({r["step"] for r in runs[0]}):
                harmful, refused = (
                    [at(records, metric, step) for records in runs]
                    for metric in ("harmful_score", "refusal_rate")
                )
                found.append(
                    {
                        "defence": defence,
                        "rows": rows,
                        "learning_rate": rate,
                        "step": step,
                        **over_seeds(harmful),
                        "refused": over_seeds(refused)["each"],
                    }
                )
            found[-1]["steps_to_break"] = [steps_to_break(records) for records in runs]
    return found


def attacks_of(folder, seeds):
    """[{method, letters, attack, harmful score over seeds, each seed's "refused"}]."""
    found = []
    for letters in laboratory.STYLES:
        files = [
            (
                laboratory.attacked_paths(f"seed{seed}"),
                read_json(folder / f"attacked/{letters}-seed{seed}.json"),
            )
            for seed in seeds
        ]
        of = lambda method, metric: [
            r
            for names, records in files
            for r in records
            if (names[r["model"]], r["metric"]) == (method, metric)
        ]
        found += [
            {
                "method": method,
                "letters": letters,
                "attack": name,
                **over_seeds(of(method, f"harmful_score_{name}")),
                "refused": over_seeds(of(method, f"refusal_rate_{name}"))["each"],
            }
            for method in laboratory.ATTACKED
            for name in ATTACKS
        ]
    return found


def other_tables(found):
    """[(title, rows)] of the filter, the sensitivity, the sweep, the attacker's budget and the attacks."""
    few = len(found["sweep"][0]["each"])
    refused = lambda r: f"{100 * sum(r['refused']) / few:.0f}"
    steps = lambda r: " ".join("–" if n is None else f"{n:.0f}" for n in r["steps_to_break"])
    ends = [r for r in found["budgets"] if "steps_to_break" in r]
    chosen = [
        {"setting": setting, "of": of, "each": each[:1] if len(set(each)) == 1 else each}
        for setting, shares in found["filter"].items()
        for of, each in shares.items()
    ]
    return [
        crossed(
            "% of the rows that sap's filter leaves out: each seed, or one number where all seeds have the same",
            "setting",
            chosen,
            lambda r: r["setting"],
            lambda r: {"found": "of the harmful rows", "harmless": "of the others"}[r["of"]],
            lambda r: ", ".join(f"{100 * share:.1f}" for share in r["each"]),
        ),
        crossed(
            f"one setting changed, one harmful row in ten: mean of {few} seeds [95 % interval]",
            "setting",
            found["sensitivity"],
            lambda r: r["setting"],
            lambda r: SENSITIVE[r["metric"]],
            lambda r: f"{r['mean']:.3f}" if r["metric"] == "task_loss" else share_cell(r),
        ),
        crossed(
            f"harmful % by the share of harmful rows, which is exact: mean of {few} seeds [95 % interval]",
            "method",
            found["sweep"],
            lambda r: r["method"],
            lambda r: f"p = {r['p']:g}",
            share_cell,
        ),
        crossed(
            f"steps of adversarial fine-tuning until half of the unsafe prompts are answered, each of {few} seeds (–: not within {ends[0]['step']}); "
            "after the last step: answered % [95 % interval]; refused %",
            "defence",
            ends,
            lambda r: r["defence"],
            lambda r: f"{r['rows']} at {r['learning_rate']:g}",
            lambda r: f"{steps(r)}; {share_cell(r)}; {refused(r)}",
        ),
        crossed(
            f"harmful % under attack, after one harmful row in ten: mean of {few} seeds [95 % interval]; refused %",
            "method, letters",
            found["attacks"],
            lambda r: f"{r['method']}, {r['letters']}",
            lambda r: r["attack"],
            lambda r: f"{share_cell(r)}; {refused(r)}",
        ),
    ]


def crossed(title, corner, found, row, column, cell):
    """(title, rows of strings): a line for each row(r), a column for each column(r), cell(r) where they meet."""
    lines = {}
    for r in found:
        lines.setdefault(row(r), {})[column(r)] = cell(r)
    columns = dict.fromkeys(map(column, found))
    return title, [
        [corner, *columns],
        *([name, *(cells.get(one, "") for one in columns)] for name, cells in lines.items()),
    ]


def run_laboratory(folder, seeds, n_eval, reference):
    """Run what is not finished, print the tables, and leave table.json and table.md in the folder. Returns what table.json holds."""
    if len(seeds) < 2:
        raise ValueError("--seeds: an interval over seeds needs at least two")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: one of them stands twice")
    settings = laboratory.SETTINGS
    shared = [
        method
        for method in laboratory.COMPARED.split()
        if all(method in methods.split() for _, methods, *_ in settings.values())
    ]
    if reference not in shared:
        raise ValueError(
            f"--against {reference}: the table has {', '.join(shared)} in all settings"
        )
    run_cells(folder, seeds, n_eval)
    found = {
        "date": told(folder, "date")[-1],
        "commits": told(folder, "commit"),
        "seeds": seeds,
        "n_eval": n_eval,
        "against": reference,
        "settings": {},
        "budget": {},
    }
    parts = []
    args_of = lambda name: read_run_args(folder / name / f"seed{seeds[0]}" / "train_args.json")
    for setting in settings:
        runs = runs_of(folder, setting, seeds)
        found["settings"][setting] = comparisons(runs, reference)
        found["budget"][setting] = (
            f"train.py {settings[setting][0]}: {budget(args_of(setting), runs, args_of('first-aligned'))}"
        )
        print(f"\n{setting}")
        parts.append(
            (
                setting,
                *print_comparisons(
                    found["settings"][setting], runs, reference, found["budget"][setting]
                ),
            )
        )
    few = seeds[:FEW]
    found |= {
        "filter": filter_of(folder, seeds),
        "sensitivity": sensitivity_of(folder, few),
        "sweep": sweep_of(folder, few),
        "budgets": budgets_of(folder, few),
        "attacks": attacks_of(folder, few),
    }
    for title, rows in other_tables(found):
        print(f"\n{title}")
        print_table(rows)
        parts.append((title, rows, ""))
    write_table(folder, found, parts)
    return found
