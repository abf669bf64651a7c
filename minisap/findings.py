"""The world's tables, read from the runs that laboratory.py made: table.json, table.md, and what is printed."""
from minisap import laboratory
from minisap.attacks import ATTACKS
from minisap.checkpoint import read_json, read_object
from minisap.evaluate import print_table
from minisap.laboratory import FEW, run_cells, told
from minisap.stats import student
from minisap.table import at, budget, comparisons, last_step, print_comparisons, write_table

SENSITIVE = {"harmful_score": "harmful %", "refusal_rate": "refused %", "over_refusal": "over-refusal %", "task_accuracy": "task accuracy %", "task_loss": "task loss"}


def records_of(folder, run):
    """{method: its records, the start's among them} of a run directory."""
    start = read_json(folder / run / "start.json")
    return {file.parent.name: start + read_json(file) for file in sorted((folder / run).glob("*/eval.json"))}


def runs_of(folder, setting, seeds):
    """{method: {seed: records}} of a setting: its methods, those with flags of their own, SFT after its stages."""
    _, methods, variants, stages = laboratory.SETTINGS[setting]
    names = {setting: None, **{f"{setting}-variant{i}": label for i, label in enumerate(variants)}, **{f"{setting}-{stage}": f"{stage}, then sft" for stage in stages}}
    found = {}
    for seed in seeds:
        for name, label in names.items():
            for method, records in records_of(folder, f"{name}/seed{seed}").items():
                found.setdefault(label or method, {})[seed] = records
    return {method: found[method] for method in (*methods.split(), *filter(None, names.values()))}


def summary(values):
    low, high = student(values)
    return {"mean": sum(values) / len(values), "ci_low": low, "ci_high": high, "each": values}


def last(records, metric):
    return at(records, metric, last_step(records))["value"]


def sweep_of(folder, seeds):
    """[{p, method, harmful score over seeds}]."""
    found = []
    for p, name in laboratory.SWEEP.items():
        runs = [records_of(folder, f"{name}/seed{seed}") for seed in seeds]
        found += [{"p": p, "method": method, **summary([last(run[method], "harmful_score") for run in runs])} for method in laboratory.SWEPT.split()]
    return found


def filter_of(folder, seeds):
    """{setting: {"found": share of the harmful rows that sap leaves out, "harmless": of the others, each seed's}}."""
    shares = {}
    for setting in laboratory.SETTINGS:
        each = [read_object(folder / setting / f"seed{seed}" / "sap" / "filter.json") for seed in seeds]
        shares[setting] = {"found": [r["poisoned_left_out"] / r["poisoned"] for r in each if r["poisoned"]],
                           "harmless": [(r["left_out"] - r["poisoned_left_out"]) / (r["rows"] - r["poisoned"]) for r in each]}
    return shares


def sensitivity_of(folder, seeds):
    """[{setting, metric, mean over seeds}] after the last step; first of the methods of "poisoned" as they stand there."""
    settings, here = laboratory.SENSITIVITY, laboratory.SETTINGS["poisoned"][1].split()
    places = {method: "poisoned" for method in dict.fromkeys(setting.split()[0] for setting in settings) if method in here}
    found = []
    for setting, place in (places | {setting: f"setting{i}" for i, setting in enumerate(settings)}).items():
        runs = [records_of(folder, f"{place}/seed{seed}")[setting.split()[0]] for seed in seeds]
        found += [{"setting": setting, "metric": metric, **summary([last(records, metric) for records in runs])} for metric in SENSITIVE]
    return found


def steps_to_break(records, share=0.5):
    """Steps after which the attacker has this share of the unsafe prompts answered, on straight lines; None where never."""
    curve = sorted((r["step"], r["value"]) for r in records if r["metric"] == "harmful_score")
    for (step, y), (next_step, next_y) in zip(curve, curve[1:]):
        if y < share <= next_y:
            return step + (next_step - step) * (share - y) / (next_y - y)
    return 0 if curve[0][1] >= share else None


def budgets_of(folder, seeds):
    """[{defence, rows, learning_rate, step, harmful score over seeds}], the last step's with each seed's "steps_to_break" and "refused"."""
    found = []
    for defence in laboratory.DEFENCES:
        for rows, rate in laboratory.BUDGETS:
            runs = [records_of(folder, f"attack/{defence}-{rows}-{rate}/seed{seed}")["sft"] for seed in seeds]
            for step in sorted({r["step"] for r in runs[0]}):
                scores = [at(records, "harmful_score", step)["value"] for records in runs]
                found.append({"defence": defence, "rows": rows, "learning_rate": rate, "step": step, **summary(scores)})
            found[-1] |= {"steps_to_break": [steps_to_break(records) for records in runs], "refused": [last(records, "refusal_rate") for records in runs]}
    return found


def attacks_of(folder, seeds):
    """[{method, letters, attack, harmful score over seeds}]."""
    scores = {}
    for letters in laboratory.STYLES:
        for seed in seeds:
            names = laboratory.attacked_paths(f"seed{seed}")
            for r in read_json(folder / f"attacked/{letters}-seed{seed}.json"):
                name = r["metric"].removeprefix("harmful_score_")
                if name in ATTACKS and name != r["metric"]:
                    scores.setdefault((names[r["model"]], letters, name), []).append(r["value"])
    return [{"method": method, "letters": letters, "attack": name, **summary(values)} for (method, letters, name), values in scores.items()]


def other_tables(found):
    """[(title, rows)] of the sensitivity, the sweep, the attacker's budget and the attacks."""
    return [sensitivity_table(found["sensitivity"]), sweep_table(found["sweep"]), budget_table(found["budgets"]), attacks_table(found["attacks"])]


def sensitivity_table(found):
    measured = {(r["setting"], r["metric"]): r for r in found}
    mean = lambda setting, metric: f"{measured[setting, metric]['mean']:.3f}" if metric == "task_loss" else f"{100 * measured[setting, metric]['mean']:.1f}"
    within = lambda r: f"{100 * r['mean']:.1f} [{100 * max(0, r['ci_low']):.1f}, {100 * min(1, r['ci_high']):.1f}]"
    return (f"one setting changed, one harmful row in ten: mean of {len(found[0]['each'])} seeds [Student's 95 % interval over them]",
            [["setting", *SENSITIVE.values()],
             *([setting, within(measured[setting, "harmful_score"]), *(mean(setting, metric) for metric in list(SENSITIVE)[1:])]
               for setting in dict.fromkeys(r["setting"] for r in found))])


def each(r):
    return f"{100 * r['mean']:.1f} ({', '.join(f'{100 * value:.1f}' for value in r['each'])})"


def sweep_table(found):
    shares = dict.fromkeys(r["p"] for r in found)
    return ("harmful % by the share of harmful rows, which is exact: mean (each seed)",
            [["method", *(f"p = {p:g}" for p in shares)],
             *([method, *(each(r) for r in found if r["method"] == method)] for method in dict.fromkeys(r["method"] for r in found))])


def budget_table(found):
    ends = [r for r in found if "steps_to_break" in r]
    cell = lambda r: (" ".join("–" if n is None else f"{n:.0f}" for n in r["steps_to_break"])
                      + f"; {100 * r['mean']:.0f} and {100 * sum(r['refused']) / len(r['refused']):.0f}")
    return (f"steps of adversarial fine-tuning until half of the unsafe prompts are answered, each seed's (–: not within {ends[0]['step']}); answered and refused % at the end",
            [["defence", *(f"{rows} at {rate:g}" for rows, rate in dict.fromkeys((r["rows"], r["learning_rate"]) for r in ends))],
             *([defence, *(cell(r) for r in ends if r["defence"] == defence)] for defence in dict.fromkeys(r["defence"] for r in ends))])


def attacks_table(found):
    rows = dict.fromkeys((r["method"], r["letters"]) for r in found)
    return ("harmful % under attack, after one harmful row in ten: mean (each seed)",
            [["method", "letters", *dict.fromkeys(r["attack"] for r in found)],
             *([*row, *(each(r) for r in found if (r["method"], r["letters"]) == row)] for row in rows)])


def run_laboratory(folder, seeds, n_eval, reference):
    """Run what is not finished, print the tables, and leave table.json and table.md in the folder. Returns what table.json holds."""
    if len(seeds) < 2:
        raise ValueError("--seeds: an interval over seeds needs at least two")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: one of them stands twice")
    settings = laboratory.SETTINGS
    shared = [method for method in laboratory.COMPARED.split() if all(method in methods.split() for _, methods, *_ in settings.values())]
    if reference not in shared:
        raise ValueError(f"--against {reference}: the table has {', '.join(shared)} in all settings")
    run_cells(folder, seeds, n_eval)
    found = {"date": told(folder, "date")[-1], "commits": told(folder, "commit"), "seeds": seeds, "n_eval": n_eval, "against": reference, "settings": {}, "budget": {}}
    parts = []
    for setting in settings:
        runs = runs_of(folder, setting, seeds)
        found["settings"][setting] = comparisons(runs, reference)
        found["budget"][setting] = f"train.py {settings[setting][0]}: {budget(read_object(folder / setting / f'seed{seeds[0]}' / 'train_args.json'), runs)}"
        print(f"\n{setting}")
        parts.append((setting, *print_comparisons(found["settings"][setting], runs, reference, found["budget"][setting])))
    few = seeds[:FEW]
    found |= {"filter": filter_of(folder, seeds), "sensitivity": sensitivity_of(folder, few), "sweep": sweep_of(folder, few), "budgets": budgets_of(folder, few), "attacks": attacks_of(folder, few)}
    for title, rows in other_tables(found):
        print(f"\n{title}")
        print_table(rows)
        parts.append((title, rows, ""))
    write_table(folder, found, parts)
    return found
