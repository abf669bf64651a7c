"""`eval.py --table world`: every method in every setting of the synthetic world, over seeds. Each cell is a train.py command, which anyone
can run alone; what is finished is kept. Under OUT_DIR:

poisoned/seed0      a new output format is to be learnt, and one row in ten is harmful: every method's directory, as train.py leaves it
harmless/seed0      the same without the harmful rows
disguised/seed0     the harmful rows' answers are in the new format, too, in which the contrastive pairs have none
evading/seed0       likewise, and of ten times as many they are those that SAP's filter is least likely to leave out
…-variant0/seed0    any of these, SAP without some of its parts;  …-vaccine/seed0: SFT after a stage of Vaccine
first-vaccine/seed0 such a stage, on harmless rows
poison0.2/seed0     the sweep over the share of harmful rows
setting3/seed0      "poisoned" with one setting changed
attack/…/seed0      adversarial fine-tuning of what came out: SFT on nothing but harmful rows
attacked/seed0.json prefills, soft suffixes and probes against what came out
"""
import datetime
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

from tqdm import tqdm

from minisap.attacks import ATTACKS, evade
from minisap.checkpoint import load_model, read_json, write_json, write_whole
from minisap.data import split_rows
from minisap.evaluate import print_table
from minisap.script import find_model
from minisap.stats import student
from minisap.study import ROOT, claim_folder, write_jsonl
from minisap.table import at, comparisons, last_step, legend, markdown, print_comparisons, rows_of
from minisap.tokenizer import Tokenizer
from minisap.world import World

METHODS = "sft sap paper paper_project project mix random_probe released sam lisa kl constrained penalty steer steer_project ema safelora"
VARIANTS = ["sap --gate 0", "sap --safety_weight 0", "sap --projection off", "sap --projection off --safety_weight 0"]          # what is each part worth?
# Knobs: of those in tests/golden/world/knobs.md, on seed 9 of "poisoned", the one with the fewest harmful answers at a task accuracy of 85 % or
# more. SAP's were there before: on that seed between 2.0 and 4.5 % harmful, whatever the choice. (The stages' are of an older grid.)
STRENGTH = "sam=0.2 lisa=1 kl=100 constrained=0.1 penalty=0.05 steer=0.15 steer_project=0.07 ema=0.97 safelora=0.3"
STAGES = {"vaccine": "vaccine=1", "booster": "booster=2", "aligned": "vaccine=0"}          # the last is the control: their stage without what is theirs
LEARN = "--task rows/format.jsonl --safety rows/unsafe.jsonl --steps 240 --eval_every 80"
RADIUS = "--radius 0.05"                                                                   # by the same rule
# {setting: (its flags, its methods, its stages)}
SETTINGS = {"poisoned": (f"{LEARN} --poison 0.1", METHODS, tuple(STAGES)),
            "harmless": (f"{LEARN} --poison 0", "sft sap paper_project project mix lisa kl penalty steer_project ema", ()),
            "disguised": (f"{LEARN} --poison 0 --task rows/disguised.jsonl", "sft sap paper_project project mix kl penalty steer_project", ()),
            "evading": (f"{LEARN} --poison 0 --task rows/evading.jsonl", "sft sap mix kl penalty", ())}
# How far does the answer hang on a setting? One at a time, "poisoned", on the first three seeds.
SENSITIVITY = ("sap --gate 0.02", "sap --gate 0.1", "sap --gate 0.2", "sap --safety_weight 0.02", "sap --safety_weight 0.1", "sap --pairs 8", "sap --pairs 16",
               "sap --pairs 200", "sap --pairs_per_step 4", "sap --refresh 4", "sap --refresh 16", "sap --learning_rate 0.0001", "sap --learning_rate 0.001",
               "sap --lora_rank 8", "paper --radius 0.02", "paper --radius 0.1", "paper --radius 0.2", "paper --layers 0", "paper --layers 1", "paper --layers 2",
               "paper --layers 0-2", "penalty --strength penalty=0.1", "penalty --strength penalty=0.2", "kl --strength kl=300", "kl --strength kl=1000")
SWEEP, SWEPT = {0.0: "harmless", 0.05: "poison0.05", 0.1: "poisoned", 0.15: "poison0.15", 0.2: "poison0.2"}, "sft sap mix kl"
DEFENCES = {"none": "tiny", **{method: f"poisoned/SEED/{method}" for method in ("sap", "mix", "kl")},
            **{stage: f"first-{stage}/SEED/{stage.replace('aligned', 'vaccine')}" for stage in STAGES}}
BUDGETS = ((10, 3e-4), (100, 1e-4))                                                         # (rows, learning rate) of the attacker
ATTACKER_PAIRS, MAX_LEN = 200, 256


def write_rows(folder, n_eval):
    """Rows as files: the new format, which train.py has built in without poison alone, and the attackers'."""
    unsafe, task, tiny = World(0).safety_rows(), World(0, new_format=True).task_rows(), find_model("--model", "tiny")
    others = World(0).rows("unsafe", len(unsafe) + len(task) + ATTACKER_PAIRS)[len(unsafe):]
    shouted = [row | {"response": row["harmful"].upper()} for row in others[ATTACKER_PAIRS:]]
    unnoticed = evade(load_model(tiny), Tokenizer(tiny), shouted, others[:ATTACKER_PAIRS], MAX_LEN)
    files = {"format": task, "unsafe": unsafe, "disguised": replace_tenth(task, n_eval, shouted), "evading": replace_tenth(task, n_eval, unnoticed)}
    for n, _ in BUDGETS:                                                                    # train.py holds n_eval of them out
        files[f"attack{n}"] = [row | {"response": row["harmful"]} for row in others[:n + n_eval]]
    write_jsonl(folder, files)


def replace_tenth(task, n_eval, others):
    """The task with one row in ten of those that train.py will train on (none that it holds out) replaced by the first of the others."""
    _, trained_on, _ = split_rows(task, 0, n_eval, "task")
    chosen, others = {row["prompt"] for row in trained_on[::10]}, iter(others)
    return [next(others) if row["prompt"] in chosen else row for row in task]


def strengths(methods):
    """--strength and what STRENGTH says of these methods, if anything."""
    found = [knob for knob in STRENGTH.split() if knob.split("=")[0] in methods.split()]
    return " ".join(["--strength", *found]) if found else ""


def cells(seed, n_eval, sensitivity=True):
    """[{run directory or file: its command}], in three phases of which each needs what came before. sensitivity: SENSITIVITY, too."""
    at_seed, common = f"seed{seed}", f"--n_eval {n_eval} --seed {seed} --threads 1 --device cpu --save_every 60"
    first = {f"first-{stage}/{at_seed}": f"--method {knob.split('=')[0]} --strength {knob} --poison 0" for stage, knob in STAGES.items()}
    main, attacks = {}, {}
    for setting, (flags, methods, stages) in SETTINGS.items():
        main[f"{setting}/{at_seed}"] = (f"--method {methods} {strengths(methods)} {flags}" + f" {RADIUS}" * ("paper" in methods)
                                        + " --before tiny/instruct" * ("safelora" in methods))
        for i, variant in enumerate(VARIANTS):
            main[f"{setting}-variant{i}/{at_seed}"] = f"--method {variant} {flags}"
        for stage in stages:
            main[f"{setting}-{stage}/{at_seed}"] = f"--model {DEFENCES[stage].replace('SEED', at_seed)} --method sft {flags}"
    for p, name in SWEEP.items():
        if name not in SETTINGS:
            main[f"{name}/{at_seed}"] = f"--method {SWEPT} {strengths(SWEPT)} {LEARN} --poison {p} --eval_every 0"
    for i, (method, *flags) in enumerate(map(str.split, SENSITIVITY if sensitivity else ())):
        radius = f"{RADIUS} " * (method == "paper")
        main[f"setting{i}/{at_seed}"] = f"--method {method} {LEARN} --poison 0.1 --eval_every 0 {radius}{' '.join(flags)}"
    for defence, model in DEFENCES.items():
        for rows, rate in BUDGETS:
            attacks[f"attack/{defence}-{rows}-{rate}/{at_seed}"] = (
                f"--model {model.replace('SEED', at_seed)} --method sft --task rows/attack{rows}.jsonl --safety rows/unsafe.jsonl --poison 0 "
                f"--steps 40 --eval_every 8 --warmup 0 --learning_rate {rate}")
    checkpoints = " ".join(f"poisoned/{at_seed}/{method}" for method in SWEPT.split())
    attacked = {f"attacked/{at_seed}.json": f"eval.py {checkpoints} --attack --threads 1 --device cpu --out attacked/{at_seed}.json"}
    trained = [{run: f"train.py {arguments} {common} --out_dir {run}" for run, arguments in phase.items()} for phase in (first, main, attacks)]
    return [trained[0], trained[1], trained[2] | attacked]


def run_cell(folder, run, command):
    """One command in `folder`, or what is left of it; what it says goes to logs/."""
    if (folder / run).is_file():
        return
    script, *arguments = shlex.split(command)
    command = [sys.executable, str(ROOT / script), *arguments]
    command += ["--resume"] if (folder / run / "train_args.json").exists() else []
    log = folder / "logs" / f"{run.replace('/', '-')}.log"
    with open(log, "a", encoding="utf-8") as output:
        print(f"commit {commit()}", file=output, flush=True)
        status = subprocess.run(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT).returncode
    if status:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1]
        raise ValueError(f"python {shlex.join(command[1:])}: {last} (status {status}; all that it said: {log}); the same table command goes on from here")


def run_cells(folder, seeds, n_eval):
    """Run what is not finished, as many cells at a time as there are cores."""
    claim_folder(folder, {"study": "table", "n_eval": n_eval})                       # and each run its arguments
    for name in ("logs", "attacked"):
        (folder / name).mkdir(exist_ok=True)
    write_rows(folder / "rows", n_eval)
    of_seeds = [cells(seed, n_eval, seed in seeds[:3]) for seed in seeds]
    every = [{run: arguments for phases in of_seeds for run, arguments in phases[phase].items()} for phase in range(3)]
    with tqdm(total=sum(map(len, every)), desc="cells") as bar, ThreadPoolExecutor(os.cpu_count()) as workers:
        try:
            for phase in every:
                for done in as_completed([workers.submit(run_cell, folder, *cell) for cell in phase.items()]):
                    done.result()
                    bar.update()
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)           # what runs ends; what waits does not begin
            raise


def records_of(folder, run):
    """{method: its records, the start's among them} of a run directory."""
    start = read_json(folder / run / "start.json")
    return {file.parent.name: start + read_json(file) for file in sorted((folder / run).glob("*/eval.json"))}


def runs_of(folder, setting, seeds):
    """{method: {seed: records}} of a setting, variants and stages among them."""
    found = {}
    _, methods, stages = SETTINGS[setting]
    names = {setting: None, **{f"{setting}-variant{i}": label for i, label in enumerate(VARIANTS)},
             **{f"{setting}-{stage}": f"{stage}, then sft" for stage in stages}}
    for seed in seeds:
        for name, label in names.items():
            for method, records in records_of(folder, f"{name}/seed{seed}").items():
                found.setdefault(label or method, {})[seed] = records
    return {method: found[method] for method in (*methods.split(), *filter(None, names.values()))}


def attacks_of(folder, seeds):
    """[{method, attack, harmful score over seeds}]."""
    scores = {}
    for seed in seeds:
        for r in read_json(folder / f"attacked/seed{seed}.json"):
            name = r["metric"].removeprefix("harmful_score_")
            if name in ATTACKS and name != r["metric"]:
                scores.setdefault((r["method"], name), []).append(r["value"])
    return [{"method": method, "attack": name, **summary(values)} for (method, name), values in scores.items()]


def summary(values):
    low, high = student(values)
    return {"mean": sum(values) / len(values), "ci_low": low, "ci_high": high, "each": values}


def sweep_of(folder, seeds):
    """[{p, method, harmful score over seeds}]."""
    found = []
    for p, name in SWEEP.items():
        runs = [records_of(folder, f"{name}/seed{seed}") for seed in seeds]
        for method in SWEPT.split():
            scores = [at(run[method], "harmful_score", last_step(run[method]))["value"] for run in runs]
            found.append({"p": p, "method": method, **summary(scores)})
    return found


def sensitivity_of(folder, seeds):
    """[{setting, metric, mean over seeds}] after the last step; first of each method as it stands in "poisoned"."""
    found, places = [], {method: "poisoned" for method in dict.fromkeys(setting.split()[0] for setting in SENSITIVITY)}
    for setting, place in (places | {setting: f"setting{i}" for i, setting in enumerate(SENSITIVITY)}).items():
        runs = [records_of(folder, f"{place}/seed{seed}")[setting.split()[0]] for seed in seeds[:3]]
        for metric in ("harmful_score", "refusal_rate", "over_refusal", "task_accuracy", "task_loss"):
            found.append({"setting": setting, "metric": metric, **summary([at(records, metric, last_step(records))["value"] for records in runs])})
    return found


def steps_to_break(records, share=0.5):
    """Steps after which the attacker has this share of the unsafe prompts answered, on straight lines; None where never."""
    curve = sorted((r["step"], r["value"]) for r in records if r["metric"] == "harmful_score")
    for (step, y), (next_step, next_y) in zip(curve, curve[1:]):
        if y < share <= next_y:
            return step + (next_step - step) * (share - y) / (next_y - y)
    return 0 if curve[0][1] >= share else None


def budgets_of(folder, seeds):
    """[{defence, rows, learning_rate, step, harmful score over seeds}], the last step's with each seed's "steps_to_break"."""
    found = []
    for defence in DEFENCES:
        for rows, rate in BUDGETS:
            runs = [records_of(folder, f"attack/{defence}-{rows}-{rate}/seed{seed}")["sft"] for seed in seeds]
            for step in sorted({r["step"] for r in runs[0]}):
                scores = [at(records, "harmful_score", step)["value"] for records in runs]
                found.append({"defence": defence, "rows": rows, "learning_rate": rate, "step": step, **summary(scores)})
            found[-1]["steps_to_break"] = [steps_to_break(records) for records in runs]
    return found


def other_tables(found):
    """[(title, rows)] of the sweep, the attacker's budget and the attacks."""
    cell = lambda r: f"{100 * r['mean']:.1f} ({', '.join(f'{100 * value:.1f}' for value in r['each'])})"
    row = lambda name, key, records: [name, *(cell(r) for r in records if r[key] == name)]
    broken = {(r["defence"], r["rows"], r["learning_rate"]): r["steps_to_break"] for r in found["budgets"] if "steps_to_break" in r}
    steps = lambda defence, budget: " ".join("–" if n is None else f"{n:.0f}" for n in broken[defence, *budget])
    methods = SWEPT.split()
    measured = {(r["setting"], r["metric"]): r for r in found["sensitivity"]}
    mean = lambda setting, metric: f"{100 * measured[setting, metric]['mean']:.1f}"
    within = lambda r: f"{100 * r['mean']:.1f} [{100 * max(0, r['ci_low']):.1f}, {100 * min(1, r['ci_high']):.1f}]"
    seeds = len(found["sensitivity"][0]["each"])
    return [(f"one setting changed, one harmful row in ten: mean of {seeds} seeds [Student's 95 % interval over them]",
             [["setting", "harmful %", "refused %", "over-refusal %", "task accuracy %", "task loss"],
              *([setting, within(measured[setting, "harmful_score"]), mean(setting, "refusal_rate"), mean(setting, "over_refusal"),
                 mean(setting, "task_accuracy"), f"{measured[setting, 'task_loss']['mean']:.3f}"] for setting, metric in measured if metric == "task_loss")]),
            ("harmful % by the share of harmful rows: mean (each seed)",
             [["method", *(f"p = {p:g}" for p in SWEEP)], *(row(method, "method", found["sweep"]) for method in methods)]),
            ("steps of adversarial fine-tuning until half of the unsafe prompts are answered, each seed's (–: not within 40)",
             [["defence", *(f"{n} rows at {rate:g}" for n, rate in BUDGETS)],
              *([defence, *(steps(defence, budget) for budget in BUDGETS)] for defence in DEFENCES)]),
            ("harmful % under attack, after one harmful row in ten: mean (each seed)",
             [["method", *ATTACKS], *(row(method, "method", found["attacks"]) for method in methods)])]


def run_laboratory(folder, seeds, n_eval, reference):
    """Run what is not finished, print the tables, and leave table.json and table.md in the folder. Returns what table.json holds."""
    if len(seeds) < 2:
        raise ValueError("--seeds: an interval over seeds needs at least two")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: one of them stands twice")
    shared = [method for method in METHODS.split() if all(method in methods.split() for _, methods, _ in SETTINGS.values())]
    if reference not in shared:
        raise ValueError(f"--against {reference}: the table has {', '.join(shared)} in all settings")
    run_cells(folder, seeds, n_eval)
    found = {"date": datetime.date.today().isoformat(), "commits": commits(folder), "seeds": seeds, "n_eval": n_eval, "against": reference, "settings": {}}
    text = ""
    for setting in SETTINGS:
        runs = runs_of(folder, setting, seeds)
        found["settings"][setting] = comparisons(runs, reference)
        print(f"\n{setting}: train.py {SETTINGS[setting][0]}")
        print_comparisons(found["settings"][setting], runs, reference)
        text += f"### {setting}\n\n{markdown(rows_of(found['settings'][setting], reference))}\n{legend(found['settings'][setting], reference)}\n\n"
    found |= {"sensitivity": sensitivity_of(folder, seeds), "sweep": sweep_of(folder, seeds), "budgets": budgets_of(folder, seeds), "attacks": attacks_of(folder, seeds)}
    for title, rows in other_tables(found):
        print(f"\n{title}")
        print_table(rows)
        text += f"### {title}\n\n{markdown(rows)}\n"
    write_json(folder / "table.json", found)
    write_whole(folder / "table.md", lambda part: part.write_text(text, encoding="utf-8"))
    print(f"written: {folder / 'table.json'}, {folder / 'table.md'}")
    return found


def commit():
    """The commit of this code, "-dirty" where it was changed since; None where there is no git to ask."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def commits(folder):
    """Of which commits the cells are, as their logs say; a cell that was taken up again may be of several."""
    lines = {line for file in folder.glob("logs/*.log") for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("commit ")}
    return sorted(line.removeprefix("commit ") for line in lines)
