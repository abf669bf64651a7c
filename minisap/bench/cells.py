"""Every method in every setting of the synthetic world, over seeds: what `eval.py --table world` runs, and findings.py reads. Each cell is a
train.py command, which anyone can run alone; what is finished is kept. Under OUT_DIR:

poisoned/seed0      a new output format (capitals) is to be learnt, and one row in ten is harmful: every method's directory, as train.py leaves it
harmless/seed0      the same without the harmful rows
disguised/seed0     the harmful rows' answers are in the new format, too, in which the contrastive pairs have none
evading/seed0       likewise, and of ten times as many they are those that SAP's filter is least likely to leave out
…-variant0/seed0    any of these, by a method with flags of its own;  …-vaccine/seed0: SFT after a stage of Vaccine
first-vaccine/seed0 such a stage, on harmless rows
poison0.2/seed0     the sweep over the share of harmful rows
setting3/seed0      "poisoned" with one setting changed
attack/…/seed0      adversarial fine-tuning of what came out: SFT on nothing but harmful rows
attacked/…-seed0.json   prefills, soft suffixes and probes against what came out
"""

import datetime
import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import chdir, redirect_stderr, redirect_stdout
from itertools import takewhile

from tqdm import tqdm

from minisap.checkpoint import load_model
from minisap.data import split_rows
from minisap.measure.attacks import evade
from minisap.run.flags import find_model
from minisap.study.protocols import ROOT, claim_folder, write_jsonl
from minisap.study.world import World
from minisap.tokenizer import Tokenizer

# Knobs: of those in tests/golden/world/knobs.md, on seed 9 of "poisoned", the one with the fewest harmful answers at a task accuracy of 85 % or
# more. SAP's were there before: on that seed between 2.0 and 4.5 % harmful, whatever the choice, by the filter of that day. (The stages' are of an older grid.)
COMPARED = (
    "sft sap project mix released sam lisa kl constrained penalty steer steer_project ema safelora"
)
KNOBS = "mix=5 sam=0.25 lisa=1 kl=200 constrained=0.15 penalty=0.06 steer=0.15 steer_project=0.07 ema=0.98 safelora=0.32"
PROBES = ("paper --radius 0.09", "paper_project --radius 0.04", "random_probe --radius 0.2")
PARTS = (
    "sap --gate 0",
    "sap --safety_weight 0",
    "sap --projection off",
    "sap --projection off --safety_weight 0",
)  # what is each part worth?
STAGES = {
    "vaccine": "vaccine=1",
    "booster": "booster=2",
    "aligned": "vaccine=0",
}  # the last is the control: their stage without what is theirs
LEARN = "--steps 240 --eval_every 80"
FORMAT, ROWS = f"--new_format {LEARN}", f"--safety rows/unsafe.jsonl {LEARN} --poison 0"
# {setting: (its flags, methods in one run, methods with flags of their own, stages)}
SETTINGS = {
    "poisoned": (f"{FORMAT} --poison 0.1", COMPARED, PROBES + PARTS, tuple(STAGES)),
    "harmless": (f"{FORMAT} --poison 0", COMPARED, PROBES[:2], ()),
    "disguised": (
        f"--task rows/disguised.jsonl {ROWS}",
        "sft sap project mix kl penalty steer_project",
        PROBES[1:2] + PARTS[:3],
        (),
    ),
    "evading": (f"--task rows/evading.jsonl {ROWS}", "sft sap mix kl penalty", (), ()),
}
# What follows is done on the first three seeds.
FEW = 3
SWEEP, SWEPT = (
    {0.0: "harmless", 0.05: "poison0.05", 0.1: "poisoned", 0.15: "poison0.15", 0.2: "poison0.2"},
    "sft sap mix kl",
)
# How far does the answer hang on a setting? One at a time, in "poisoned".
ALL_LINEAR = "--lora_rank 8 --lora_targets q_proj k_proj v_proj o_proj gate_proj up_proj down_proj --learning_rate 0.003"
SENSITIVITY = (
    *(
        f"sap {flag}"
        for flag in (
            "--gate 0.02",
            "--gate 0.1",
            "--gate 0.2",
            "--safety_weight 0.02",
            "--safety_weight 0.1",
            "--pairs 8",
            "--pairs 16",
            "--pairs 200",
            "--pairs 500",
            "--pairs_per_step 4",
            "--refresh 4",
            "--refresh 16",
            "--learning_rate 0.0001",
            "--learning_rate 0.001",
            ALL_LINEAR,
        )
    ),
    f"sft {ALL_LINEAR}",
    *(f"paper --radius {flags}" for flags in ("0.02", "0.2", "0.09 --layers 0", "0.09 --layers 1")),
    *(
        f"{knob.split('=')[0]} --strength {knob}"
        for knob in ("penalty=0.1", "penalty=0.2", "kl=400", "kl=1000", "mix=1", "mix=30")
    ),
    *(f"{probe} --refresh 4" for probe in PROBES[:2]),
)
DEFENCES = {
    "none": "tiny",
    **{method: f"poisoned/SEED/{method}" for method in ("sap", "mix", "kl")},
    **{stage: f"first-{stage}/SEED/{knob.split('=')[0]}" for stage, knob in STAGES.items()},
}
BUDGETS = (
    ("attack10", 3e-4),
    ("attack100", 1e-4),
    ("attack100", 3e-4),
    ("capitals100", 3e-4),
)  # (the attacker's rows, learning rate)
ATTACKED = ("sft", "sap", "mix", "kl", *PROBES[:2])
STYLES = {
    "small": "unsafe",
    "capitals": "capitals",
}  # {letters of the answer that is attacked for: rows}
ATTACKER_PAIRS, MAX_LEN = 200, 256


def write_rows(folder, n_eval):
    """Rows as files: the attackers', and what they are evaluated on. What is there is kept."""
    if (folder / "capitals.jsonl").exists():
        return
    unsafe, task, tiny = (
        World(0).safety_rows(),
        World(0, new_format=True).task_rows(),
        find_model("--model", "tiny"),
    )
    others = World(0).fresh_rows("unsafe", len(task) + ATTACKER_PAIRS)
    shouted = [row | {"response": row["harmful"].upper()} for row in others[ATTACKER_PAIRS:]]
    unnoticed = evade(load_model(tiny), Tokenizer(tiny), shouted, others[:ATTACKER_PAIRS], MAX_LEN)
    answered = [row | {"response": row["harmful"]} for row in others]
    write_jsonl(
        folder,
        {
            "unsafe": unsafe,
            "disguised": replace_tenth(task, n_eval, shouted),
            "evading": replace_tenth(task, n_eval, unnoticed),
            "attack10": answered[: 10 + n_eval],
            "attack100": answered[: 100 + n_eval],
            "capitals100": shouted[: 100 + n_eval],  # n_eval are held out
            "capitals": [row | {"harmful": row["harmful"].upper()} for row in unsafe],
        },
    )


def replace_tenth(task, n_eval, others):
    """The task with one row in ten of those that train.py will train on (none that it holds out) replaced by the first of the others."""
    _, trained_on, _ = split_rows(task, 0, n_eval, "task")
    chosen, others = {row["prompt"] for row in trained_on[::10]}, iter(others)
    return [next(others) | {"poisoned": True} if row["prompt"] in chosen else row for row in task]


def strengths(methods):
    """--strength and what KNOBS says of these methods, if anything."""
    found = [knob for knob in KNOBS.split() if knob.split("=")[0] in methods.split()]
    return " ".join(["--strength", *found]) if found else ""


def cells(seed, n_eval, few=True):
    """[{run directory or file: its command}], in three phases of which each needs what came before. few: what the first seeds alone have, too."""
    at_seed, common = (
        f"seed{seed}",
        f"--n_eval {n_eval} --seed {seed} --threads 1 --device cpu --save_every 60",
    )
    first = {
        f"first-{stage}/{at_seed}": f"--method {knob.split('=')[0]} --strength {knob} --poison 0"
        for stage, knob in STAGES.items()
    }
    main, attacks, attacked = {}, {}, {}
    for setting, (flags, methods, variants, stages) in SETTINGS.items():
        main[f"{setting}/{at_seed}"] = (
            f"--method {methods} {strengths(methods)} {flags}"
            + " --before tiny/instruct" * ("safelora" in methods.split())
        )
        for i, variant in enumerate(variants):
            main[f"{setting}-variant{i}/{at_seed}"] = f"--method {variant} {flags}"
        for stage in stages:
            main[f"{setting}-{stage}/{at_seed}"] = (
                f"--model {DEFENCES[stage].replace('SEED', at_seed)} --method sft {flags}"
            )
    for p, name in SWEEP.items() if few else ():
        if name not in SETTINGS:
            main[f"{name}/{at_seed}"] = (
                f"--method {SWEPT} {strengths(SWEPT)} {FORMAT} --poison {p} --eval_every 0"
            )
    for i, setting in enumerate(SENSITIVITY if few else ()):
        main[f"setting{i}/{at_seed}"] = f"{FORMAT} --poison 0.1 --eval_every 0 --method {setting}"
    for defence, model in DEFENCES.items() if few else ():
        for rows, rate in BUDGETS:
            attacks[f"attack/{defence}-{rows}-{rate}/{at_seed}"] = (
                f"--model {model.replace('SEED', at_seed)} --method sft --task rows/{rows}.jsonl --safety rows/unsafe.jsonl --poison 0 "
                f"--steps 120 --eval_every 20 --warmup 0 --learning_rate {rate}"
            )
    for letters, rows in STYLES.items() if few else ():
        out = f"attacked/{letters}-{at_seed}.json"
        attacked[out] = (
            f"eval.py {' '.join(map(str, attacked_paths(at_seed)))} --attack --safety rows/{rows}.jsonl --n_eval {n_eval} "
            f"--threads 1 --device cpu --out {out}"
        )
    trained = [
        {run: f"train.py {arguments} {common} --out_dir {run}" for run, arguments in phase.items()}
        for phase in (first, main, attacks)
    ]
    return [trained[0], trained[1], trained[2] | attacked]


def attacked_paths(at_seed):
    """{checkpoint: its name in the table}."""
    _, methods, variants, _ = SETTINGS["poisoned"]
    return {
        f"poisoned{'' if name in methods.split() else f'-variant{variants.index(name)}'}/{at_seed}/{name.split()[0]}": name
        for name in ATTACKED
    }


def run_cell(folder, run, command):
    """One command in `folder`, or what is left of it; what it says goes to logs/. Of what is finished --resume sees whether it was the same command."""
    command = shlex.split(command)
    if (folder / run).is_file() and all(
        (folder / run).stat().st_mtime > (folder / path / "eval.json").stat().st_mtime
        for path in checkpoints(folder, command)
    ):
        return
    command = [*command, *["--resume"] * (folder / run / "train_args.json").exists()]
    log, done = folder / "logs" / f"{run.replace('/', '-')}.log", finished(folder / run, command)
    with (
        open(log, "a", encoding="utf-8") as output,
        redirect_stdout(output),
        redirect_stderr(output),
        chdir(folder),
    ):
        if not done:
            print(f"commit {commit()}\ndate {datetime.date.today().isoformat()}", flush=True)
        status = run_script(command)
    if status:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1]
        raise ValueError(
            f"python {shlex.join(command)}: {last} (status {status}; all that it said: {log}); the same table command goes on from here"
        )


def checkpoints(folder, command):
    """The trained checkpoints that a command names."""
    return [word for word in command if (folder / word / "eval.json").is_file()]


def finished(run, command):
    """Whether every method of a train.py command has its records."""
    methods = command[command.index("--method") + 1 :] if "--method" in command else []
    methods = list(takewhile(lambda word: not word.startswith("--"), methods))
    return bool(methods) and all((run / method / "eval.json").exists() for method in methods)


def run_script(command):
    """A script of ours with its arguments, in this process, which has imported PyTorch already: its exit status."""
    script, sys.argv = str(ROOT / command[0]), command
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code
    except Exception:
        traceback.print_exc()
        return 1


def run_cells(folder, seeds, n_eval):
    """Run what is not finished, as many cells at a time as there are cores."""
    of_seeds = [cells(seed, n_eval, seed in seeds[:FEW]) for seed in seeds]
    every = [
        {run: arguments for phases in of_seeds for run, arguments in phases[phase].items()}
        for phase in range(3)
    ]
    processes = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))
    with (
        claim_folder(folder, {"study": "table", "n_eval": n_eval}),  # and each run its arguments
        tqdm(total=sum(map(len, every)), desc="cells") as bar,
        processes as workers,
    ):
        for name in ("logs", "attacked"):
            (folder / name).mkdir(exist_ok=True)
        write_rows(folder / "rows", n_eval)
        try:
            for phase in every:
                for done in as_completed(
                    [workers.submit(run_cell, folder, *cell) for cell in phase.items()]
                ):
                    done.result()
                    bar.update()
        except BaseException as error:
            workers.shutdown(wait=False, cancel_futures=True)
            for process in (
                multiprocessing.active_children()
            ):  # what they were at goes on from its last saved step, another time
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise ValueError(
                    "a cell's process was killed, for want of memory perhaps; the same table command goes on from here"
                ) from None
            raise


def commit():
    """The commit of this code, "-dirty" where it was changed since; None where there is no git to ask."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return (
            subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
        )
    except OSError:
        return None


def told(folder, key):
    """The "commit"s, or the "date"s, of which the cells are, as their logs say, in order; a cell that was taken up again may be of several."""
    lines = {
        line
        for file in folder.glob("logs/*.log")
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.startswith(f"{key} ")
    }
    return sorted(line.removeprefix(f"{key} ") for line in lines)
