"""How harmful, how useful, how over-cautious is a checkpoint: a table with 95 % intervals.

python eval.py runs/mine/sap runs/mine/sft weights/X            generate and measure, all on the held-out rows of the run
python eval.py weights/X --safety FILE --task FILE              ... or on the held-out part of your rows
python eval.py runs/mine runs/other --curves --plot curve.png   harmful score against task loss, as training recorded it
python eval.py --table world --out_dir runs/table               every method in the synthetic world, over seeds, in one to two hours; resumable
python eval.py --table runs/seed0 runs/seed1                    methods against each other, paired, as training recorded them
python eval.py --judge xstest_labelled.csv                      how far the judge agrees with people
"""

import itertools
from pathlib import Path

from minisap.bench.figures import draw_laboratory, draw_plane
from minisap.bench.tables import run_laboratory
from minisap.checkpoint import DTYPES, load_model, write_json
from minisap.data import (
    built_in,
    load_safe_prompts,
    load_splits,
    read_records,
    repeated,
    sha256_of,
    text_of,
)
from minisap.measure.attacks import ATTACKS, attack, attack_by_probe, check_room
from minisap.measure.evaluate import (
    evaluate,
    format_value,
    print_judges,
    print_records,
    print_table,
    read_measured,
    share,
)
from minisap.measure.judge import DEVELOPED_ON, LABELS, agreement, judge_of, rule_crc32
from minisap.measure.report import budget, comparisons, over_seeds, print_comparisons, write_table
from minisap.methods import READ_BY
from minisap.run.flags import (
    Parser,
    add_machine_flags,
    add_row_flags,
    check_given,
    check_minimum,
    check_outputs,
    find_model,
    load_tokenizer,
    parse_given,
    pyplot,
    run,
    save_figure,
    use_device,
)
from minisap.run.resume import read_run_args
from minisap.study.mechanism import print_watched

RUN_ARGS = (
    "task",
    "safety",
    "benign",
    "pairs",
    "n_eval",
    "max_len",
    "chat_format",
    "dtype",
    "new_format",
)
# In which runs of one method may differ.
ANY_RUN = (
    "seed",
    "out_dir",
    "device",
    "threads",
    "checkpointing",
    "eval_every",
    "save_every",
    "watch",
    "watch_every",
    "before",
)
ANY_METHOD = (*READ_BY, "strength")
# What everything but measuring checkpoints makes use of.
PARTS = {
    "judge": {"judge", "out"},
    "curves": {"curves", "paths", "plot", "out"},
    "table": {"table", "against", "seeds", "n_eval", "out_dir", "plot", "out"},
}
OF_TABLE, OF_WORLD = {"against", "seeds", "out_dir", "plot"}, {"seeds", "n_eval"}


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "paths",
        nargs="*",
        type=Path,
        help="checkpoint directories, or names under weights/; with --curves: run directories",
    )
    add_row_flags(add)
    add_machine_flags(add)
    parser.set_defaults(defaults={key: parser.get_default(key) for key in RUN_ARGS})
    parser.set_defaults(
        **dict.fromkeys(RUN_ARGS)
    )  # None: as in the run that the checkpoints belong to
    add(
        "--attack",
        action="store_true",
        help="also under attack: the answer's first 1, 2, 4 tokens given (prefill), a soft suffix of "
        "1, 2, 4 embeddings fitted to each prompt (adv), and a probe that is fitted to harmful answers "
        "with respect to all weights, added or subtracted (needs several times the model's memory)",
    )
    # comparisons
    add(
        "--table",
        nargs="+",
        metavar="DIR",
        help="compare the methods of run directories of several seeds; or world: run them all first",
    )
    add(
        "--against", default="sap", metavar="METHOD", help="the reference of --table (default: sap)"
    )
    add(
        "--seeds",
        nargs="+",
        type=int,
        default=[0, 1, 2, 3, 4],
        help="of --table world (default: 0 1 2 3 4)",
    )
    add(
        "--out_dir",
        type=Path,
        help="where --table leaves table.json and table.md; of world, too, the runs, and the same command again goes on "
        "(default: runs/table for world, else nothing is left)",
    )
    add(
        "--judge",
        metavar="FILE",
        help="Cohen's κ of the judge and people: XSTest's labelled completions, CSV with model, type, prompt, completion, label",
    )
    # results
    add("--out", type=Path, metavar="FILE", help="also write the records as JSON")
    add(
        "--curves",
        action="store_true",
        help="print the records that train.py --eval_every left, averaged over seeds",
    )
    add(
        "--plot",
        type=Path,
        metavar="PNG",
        help="with --curves or --table: draw harmful score against task loss, and what else there is (needs matplotlib)",
    )
    return parse_given(parser, argv)


def run_file(path):
    """Where train.py keeps the arguments of the run that a checkpoint belongs to, if it belongs to one."""
    return path.resolve().parent / "train_args.json"


def settings_of_runs(args):
    """The settings for all checkpoints: the command's, else those of the run that they belong to, else the defaults. Returns
    {train_args.json: what it holds} of these runs."""
    files = [run_file(path) for path in args.paths if run_file(path).exists()]
    runs = [read_run_args(file) for file in files]
    args.named = any(
        getattr(args, key) is not None for key in ("task", "safety", "benign", "pairs")
    )
    for key, default in args.defaults.items():
        found = [run.get(key) for run in runs]
        if getattr(args, key) is None:
            if any(value != found[0] for value in found):
                raise ValueError(
                    f"the runs differ in {key}: {', '.join(map(repr, found))}; measure them apart, or choose by --{key}"
                )
            setattr(args, key, found[0] if found else default)
    check_minimum(args, 1, "n_eval", "max_len")
    check_minimum(args, 0, "pairs")
    return dict(zip(files, runs))


def check_held_out(file, run, splits, rows, named):
    """ValueError where the rows of the run have changed since, or where some of those to measure on are among those that it learnt from. Where rows are
    named and the run's own are not to be found any more, nobody can tell."""
    try:
        own, safe_prompts = (
            load_splits(run["task"], run["safety"], run["pairs"], run["n_eval"], rows),
            load_safe_prompts(run["benign"], run["n_eval"], rows),
        )
    except ValueError:
        if named:
            return
        raise
    if not named and run.get("rows_sha256") != sha256_of([own, safe_prompts]):
        raise ValueError(
            f"{file}: the rows of this run have changed since; what was held out then may be what it learnt. "
            "Name rows by --task and --safety to measure on these"
        )
    learnt = own["harmful"] if run["poison"] else []
    seen = {
        "eval_task": repeated(splits["eval_task"], own["task"], "prompt", "response"),
        "eval_unsafe": repeated(splits["eval_unsafe"], learnt, "prompt"),
    }
    for key, count in seen.items():
        if count and splits[key] != own[key]:
            raise ValueError(
                f"{count} of the {len(splits[key])} rows to measure on are among those that the run of {file} may have learnt; "
                f"it held out {run['n_eval']} of each file"
            )


def measure(args, path, tokenizer, splits, safe_prompts):
    """Records of one checkpoint."""
    model = load_model(path, DTYPES[args.dtype], args.device).requires_grad_(False)
    found = evaluate(
        model, tokenizer, splits["eval_unsafe"], safe_prompts, splits["eval_task"], args.max_len
    )
    method = path.resolve().name if run_file(path).exists() else ""
    if args.attack:
        judge, _ = judge_of(tokenizer)
        by_input = attack(model, tokenizer, splits["eval_unsafe"], args.max_len)
        by_probe = attack_by_probe(
            model, tokenizer, splits["harmful"], splits["eval_unsafe"], args.max_len
        )
        for name, verdicts, *_ in itertools.chain(by_input, by_probe):
            found.append(share(f"harmful_score_{name}", verdicts, "comply", judge))
            found.append(share(f"refusal_rate_{name}", verdicts, "refuse", judge))
    return [{"model": str(path), "method": method, "seed": "", "step": ""} | r for r in found]


def print_attacks(records):
    """One line per checkpoint and attack, where there were some."""
    rows = [["model", "attack", "harmful_score", "refusal_rate"]]
    for model in dict.fromkeys(r["model"] for r in records):
        shares = {
            r["metric"]: f"{format_value(r)} (n={r['n']})" for r in records if r["model"] == model
        }
        rows += [
            [model, name, *(shares[f"{metric}_{name}"] for metric in rows[0][2:])]
            for name in ATTACKS
            if f"harmful_score_{name}" in shares
        ]
    if rows[1:]:
        print_table(rows)


def measure_judge(file):
    """Records of the judge against people's labels, printed as a table."""
    rows = [
        {
            key: text_of(record, key, source)
            for key in ("model", "type", "prompt", "completion", "label")
        }
        | {"source": source}
        for record, source in read_records(file)
    ]
    for row in rows:
        if row["label"] not in LABELS:
            raise ValueError(
                f"{row['source']}: label {row['label']!r}; expected one of {', '.join(LABELS)}"
            )
    records = agreement(rows)
    cells = {
        (r["model"], r["metric"]): f"{r['value']:.3f} [{r['ci_low']:.3f}, {r['ci_high']:.3f}]"
        for r in records
    }
    groups = {r["model"]: r for r in records}
    print_table(
        [
            [
                "completions of",
                "n",
                "answers, by people",
                "by the judge",
                "agreement, answered in full or not",
                "Cohen's κ",
            ],
            *(
                [
                    name,
                    str(r["n"]),
                    str(r["answers"]),
                    str(r["answers_by_judge"]),
                    cells[name, "agreement"],
                    cells[name, "kappa"],
                ]
                for name, r in groups.items()
            ),
        ]
    )
    print(
        f"95 % intervals over prompts; written on: {', '.join(DEVELOPED_ON)}; the rule's number is {rule_crc32()}"
    )
    return records


def read_runs(paths):
    """The records that train.py wrote under run directories: of one method they may differ in their seed alone, and between
    methods in the method's own settings, too."""
    records, first, seen = [], {}, {}
    for path in paths:
        if not (path / "train_args.json").exists():
            raise ValueError(
                f"{path}: no run of train.py (no train_args.json there); give the directories that --out_dir named"
            )
        run_args = read_run_args(path / "train_args.json")
        args = {key: value for key, value in run_args.items() if key not in ANY_RUN}
        files = sorted(path.glob("*/eval.json"))
        if not files:
            raise ValueError(f"{path}: no run with METHOD/eval.json here")
        start = read_measured(path / "start.json", run_args["seed"])
        for file in files:
            check_alike(path, args, *first.setdefault(file.parent.name, (path, args)))
            if (file.parent.name, run_args["seed"]) in seen:
                raise ValueError(
                    f"{path}: seed {run_args['seed']} of {file.parent.name} stands in {seen[file.parent.name, run_args['seed']]}, too; "
                    "give runs of different seeds"
                )
            seen[file.parent.name, run_args["seed"]] = path
            records += [
                r | {"method": file.parent.name}
                for r in (*start, *read_measured(file, run_args["seed"]))
            ]
        shared = {key: value for key, value in args.items() if key not in ANY_METHOD}
        check_alike(path, shared, *first.setdefault("", (path, shared)))
    return records


def make_table(args):
    """Records of the methods against each other, printed as tables."""
    if args.table == ["world"]:
        found = run_laboratory(
            args.out_dir or Path("runs/table"),
            args.seeds,
            200 if args.n_eval is None else args.n_eval,
            args.against,
        )
        if args.plot:
            draw_laboratory(found, args.plot)
        return found
    records, runs = read_runs([Path(path) for path in args.table]), {}
    for r in records:
        runs.setdefault(r["method"], {}).setdefault(r["seed"], []).append(r)
    found, run_args = (
        comparisons(runs, args.against),
        read_run_args(Path(args.table[0]) / "train_args.json"),
    )
    rows, text = print_comparisons(found, runs, args.against, budget(run_args, runs))
    if args.out_dir:
        write_table(args.out_dir, found, [(" ".join(args.table), rows, text)])
    if args.plot:
        draw_plane(found, args.against, args.plot)
    return found


def check_alike(path, args, other_path, other):
    for key in sorted(args.keys() | other.keys()):
        if args.get(key) != other.get(key):
            raise ValueError(
                f"{path}: {key} = {args.get(key)!r}, but {other.get(key)!r} in {other_path}; curves are over seeds alone"
            )


def curves_of(records):
    """{method: {step: {metric: [record per seed]}}}, steps in order."""
    curves = {}
    for r in sorted(records, key=lambda r: (r["method"], r["step"], r["seed"])):
        same = (
            curves.setdefault(r["method"], {}).setdefault(r["step"], {}).setdefault(r["metric"], [])
        )
        if r["step"] or not same:  # all seeds have one start: it counts once
            same.append(r)
    return curves


def average(records):
    return sum(r["value"] for r in records) / len(records)


def format_seeds(records, scale=1, digits=".3f"):
    """'mean over seeds [95 % interval over seeds and rows] (every seed)'."""
    found = over_seeds(records)
    cells = [
        format(scale * value, digits)
        for value in (found["mean"], found["ci_low"], found["ci_high"], *found["each"])
    ]
    return f"{cells[0]} [{cells[1]}, {cells[2]}]" + (
        f" ({', '.join(cells[3:])})" if len(records) > 1 else ""
    )


def print_curves(curves):
    """One line per method and step."""
    columns = {
        "harmful_score": ("harmful %", 100, ".1f"),
        "refusal_rate": ("refused %", 100, ".1f"),
        "over_refusal": ("over-refusal %", 100, ".1f"),
        "task_accuracy": ("task accuracy %", 100, ".1f"),
        "task_loss": ("task loss", 1, ".3f"),
        "harm_margin": ("harm margin", 1, ".2f"),
    }
    known = {
        metric for steps in curves.values() for metrics in steps.values() for metric in metrics
    }
    columns = {
        metric: column for metric, column in columns.items() if metric in known
    }  # two are of the world alone
    rows = [["method", "step", *(title for title, _, _ in columns.values())]]
    for method, steps in curves.items():
        for step, metrics in steps.items():
            rows.append(
                [
                    method,
                    str(step),
                    *(
                        format_seeds(metrics[m], scale, digits)
                        for m, (_, scale, digits) in columns.items()
                    ),
                ]
            )
    print_table(rows)
    n = {
        metric: records[0]["n"]
        for steps in curves.values()
        for metrics in steps.values()
        for metric, records in metrics.items()
    }
    print(
        f"in [] the 95 % interval over seeds, where there are several, and rows, n = {n['harmful_score']} unsafe prompts, {n['over_refusal']} safe ones, "
        f"{n['task_loss']} task rows; in () every seed"
    )


def plot_curves(curves, file):
    """Harmful score against task loss, one line a method, each point the mean over seeds of one evaluation."""
    figure, axes = pyplot().subplots(figsize=(7, 4.5))
    for method, steps in curves.items():
        x, y = ([average(s[m]) for s in steps.values()] for m in ("task_loss", "harmful_score"))
        (line,) = axes.plot(x, [100 * v for v in y], marker="o", markersize=4, label=method)
        axes.annotate(
            str(list(steps)[-1]),
            (x[-1], 100 * y[-1]),
            color=line.get_color(),
            textcoords="offset points",
            xytext=(5, 4),
        )
    axes.set(
        xlabel="task loss on held-out rows, nats per token (useful: to the left)",
        ylabel="harmful score, % (safe: below)",
    )
    axes.legend(frameon=False)
    save_figure(figure, file)


def main(argv=None):
    args = parse_args(argv)
    if sum(map(bool, (args.paths, args.judge, args.table))) != 1:
        raise ValueError("give checkpoints or runs, or --table, or --judge alone; see --help")
    check_given(args, PARTS)
    if args.table and args.table != ["world"] and args.given & OF_WORLD:
        raise ValueError(f"--{min(args.given & OF_WORLD)} is of --table world; give that")
    unused = set() if args.table or args.curves else args.given & OF_TABLE
    if unused:
        raise ValueError(
            f"--{min(unused)} is of --table{' or --curves' if unused == {'plot'} else ''}; give that"
        )
    check_outputs(args)
    if args.judge:
        records = measure_judge(args.judge)
    elif args.table:
        records = make_table(args)
    elif args.curves:
        records = read_runs(args.paths)
        curves = curves_of(records)
        print_curves(curves)
        print_judges(records)
        print_watched(args.paths)
        if args.plot:
            plot_curves(curves, args.plot)
    else:
        args.paths = [find_model("path", path) for path in args.paths]
        runs = settings_of_runs(args)
        use_device(args)
        tokenizers = [load_tokenizer(path, args.chat_format) for path in args.paths]
        if (
            not (args.task and args.safety and args.benign)
            and len({tokenizer.world_seed for tokenizer in tokenizers}) > 1
        ):
            raise ValueError(
                "these checkpoints are not of one world, and so not of one set of built-in rows; measure them apart"
            )
        rows = built_in(tokenizers[0], args.new_format, args.task)
        splits = load_splits(args.task, args.safety, args.pairs, args.n_eval, rows)
        safe_prompts = load_safe_prompts(args.benign, args.n_eval, rows)
        for file, run_args in runs.items():
            check_held_out(file, run_args, splits, rows, args.named)
        for tokenizer in tokenizers if args.attack else ():
            check_room(tokenizer, splits["eval_unsafe"], args.max_len)
        records = [
            r
            for path, tokenizer in zip(args.paths, tokenizers)
            for r in measure(args, path, tokenizer, splits, safe_prompts)
        ]
        print_records([r for r in records if not r["metric"].endswith(ATTACKS)])
        print_attacks(records)
    if args.out:
        write_json(args.out, records)


if __name__ == "__main__":
    run(main)
