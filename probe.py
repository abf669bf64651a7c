"""Look inside a model: where unsafe prompts can be told from safe ones, where task and safety pull against each other, and
where SAP's probe would have most effect.

    python probe.py weights/X                                  per layer, with a recommendation for train.py --layers
    python probe.py weights/X --safety FILE --task FILE --plot layers.png
    python probe.py weights/X --precision                      does the probe's direction survive bfloat16?
    python probe.py runs/X/sft --before weights/X --out_dir runs/compared --plot        what did this training do to the model?
    python probe.py --study world --seeds 0 1 2 --out_dir runs/study --plot             the mechanistic study, models included

The last two write records {protocol, seed, set, layer, metric, value} and pictures to OUT_DIR.
"""

from pathlib import Path

import torch

from minisap.checkpoint import DTYPES, load_model, write_json
from minisap.data import built_in, load_prompts, load_safe_prompts, load_splits
from minisap.measure.evaluate import print_table, with_own_refusals
from minisap.run.flags import (
    Parser,
    add_machine_flags,
    add_row_flags,
    add_step_flags,
    check_given,
    check_minimum,
    check_outputs,
    find_before,
    find_model,
    load_tokenizer,
    parse_given,
    pyplot,
    run,
    save_figure,
    use_device,
)
from minisap.run.resume import occupied
from minisap.study.compare import Series, answers_between, measure, print_answers, print_layers
from minisap.study.figures import draw_all
from minisap.study.layers import gradients, linear_probes, precision, recommend
from minisap.study.observations import check_all, print_checks, records_of
from minisap.study.protocols import run_study
from minisap.study.world import World

IN_OUT_DIR = Path(".")  # --plot without a file
# What every look makes use of.
PARTS = {
    "before": {
        "model",
        "before",
        "attack",
        "out_dir",
        "plot",
        "safety",
        "benign",
        "pairs",
        "n_eval",
        "max_len",
        "chat_format",
        "dtype",
        "device",
        "threads",
    },
    "study": {"study", "seeds", "out_dir", "plot", "n_eval", "threads"},
    "precision": {
        "precision",
        "model",
        "out",
        "task",
        "safety",
        "pairs",
        "n_eval",
        "max_len",
        "chat_format",
        "new_format",
        "batch_size",
        "pairs_per_step",
        "safe_answers",
        "lora_targets",
        "radius",
        "seed",
        "dtype",
        "device",
        "threads",
    },
}


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("model", nargs="?", help="a checkpoint directory, or a name under weights/")
    # what
    add(
        "--before",
        help="compare with this checkpoint, which MODEL was trained from: clusters of prompts, where ΔW lies, sensitivity, "
        "the path between the two (arXiv 2407.10264)",
    )
    add(
        "--attack",
        action="store_true",
        help="with --before: under prefills and soft suffixes, too (on a CPU, hours for a real model)",
    )
    add(
        "--study",
        choices=("world",),
        help="make every model of that paper in the synthetic world, and compare them, on the CPU: about "
        "25 minutes a seed; what is finished in OUT_DIR is kept",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the study (default: 0 1 2)")
    add("--out_dir", type=Path, help="with --before or --study: where records and pictures go")
    add_row_flags(add)
    # how
    add(
        "--batches",
        type=int,
        default=4,
        help="batches over which gradients are averaged (default: 4)",
    )
    add_step_flags(add)
    add(
        "--precision",
        action="store_true",
        help="compare the probe's direction in bfloat16 and float32 with that in float64",
    )
    add_machine_flags(add)
    # results
    add("--out", type=Path, metavar="FILE", help="also write the numbers as JSON")
    add(
        "--plot",
        type=Path,
        metavar="PNG",
        nargs="?",
        const=IN_OUT_DIR,
        help="draw them per layer; with --before or --study no file is named: the pictures go to OUT_DIR (needs matplotlib)",
    )
    return parse_given(parser, argv)


def look_inside(args, model, splits, tokenizer):
    """One row of numbers per layer, printed with what they mean."""
    unsafe = load_prompts(args.benign, args.n_eval, "unsafe") if args.benign else []
    unsafe = unsafe or [row["prompt"] for row in splits["eval_unsafe"]]
    probes = linear_probes(
        model,
        tokenizer,
        unsafe,
        load_safe_prompts(
            args.benign, args.n_eval, built_in(tokenizer, args.new_format, args.task)
        ),
    )
    rows = [
        {"layer": j, **p, **g}
        for j, (p, g) in enumerate(zip(probes, gradients(args, model, splits, tokenizer)))
    ]
    print_table(
        [
            [
                "layer",
                "accuracy",
                "95 %",
                "AUROC",
                "task_cosine",
                "probe_cosine",
                "gap_norm",
                "effect",
            ]
        ]
        + [
            [
                str(r["layer"]),
                f"{r['accuracy']:.3f}",
                f"[{r['ci_low']:.3f}, {r['ci_high']:.3f}]",
                f"{r['auroc']:.3f}",
                f"{r['task_cosine']:+.4f}",
                f"{r['probe_cosine']:+.4f}",
                f"{r['gap_norm']:.3g}",
                f"{r['effect']:.3g}",
            ]
            for r in rows
        ]
    )
    print(
        f"accuracy, AUROC: a linear probe of unsafe against safe prompts at the last prompt token, n = {rows[0]['n']} held out\n"
        "task_cosine: of the task's and the safety gradient in W; below 0, a descent step on the task is a step toward harm\n"
        "probe_cosine: of SAP's direction and the task gradient in V; below 0, the probe lowers the task loss by itself\n"
        "gap_norm: of ∇_V L_su, per unit of V\n"
        "effect: change of <task gradient, unit safety gradient> by a probe as large as the layer's hidden states\n"
        f"the third of the layers with the largest effect: --method paper --layers {recommend([r['effect'] for r in rows])}"
    )
    return rows


def plot_layers(rows, file):
    labels = {
        "auroc": "linear probe, AUROC\nunsafe against safe",
        "task_cosine": "cos(∇_W L_useful, ∇_W L_safe)",
        "probe_cosine": "cos(∇_V L_su, ∇_V L_useful)",
        "gap_norm": "norm of ∇_V L_su",
        "effect": "effect of a probe of\nthe layer's own norm",
    }
    figure, axes = pyplot().subplots(len(labels), sharex=True, figsize=(7, 8))
    for axis, (key, label) in zip(axes, labels.items()):
        axis.plot(
            [row["layer"] for row in rows], [row[key] for row in rows], marker="o", markersize=3
        )
        axis.set_ylabel(label, fontsize=8)
        axis.axhline({"auroc": 0.5}.get(key, 0), color="grey", linewidth=0.5)
    axes[-1].set(xlabel="layer", xticks=[row["layer"] for row in rows][:: max(1, len(rows) // 10)])
    save_figure(figure, file)


def compare(args, splits, tokenizer):
    """The checkpoint and the one before it: compare.json, two tables, pictures."""
    rows = built_in(tokenizer, args.new_format, args.task)
    model, before = (
        load_model(path, DTYPES[args.dtype], args.device).requires_grad_(False)
        for path in (args.model, args.before)
    )
    if isinstance(rows, World):
        if args.safety or args.benign:
            raise ValueError(
                "--safety, --benign: a model of the synthetic world is looked at on the sets of that world"
            )
        sets = rows.sets(args.n_eval)
    else:
        safe = [
            {"prompt": prompt, "harmful": None}
            for prompt in load_safe_prompts(args.benign, args.n_eval, rows)
        ]
        sets = {"safe": safe, "unsafe": splits["eval_unsafe"]}
    args.out_dir.mkdir(parents=True, exist_ok=True)
    records = [
        {"protocol": "before", "seed": None} | r
        for r in measure(before, tokenizer, sets, args.max_len, None, args.attack)
    ]
    for look in (
        lambda: measure(model, tokenizer, sets, args.max_len, before, args.attack),
        lambda: answers_between(before, model, tokenizer, sets),
    ):
        records += [{"protocol": "after", "seed": None} | r for r in look()]
        write_json(
            args.out_dir / "compare.json", records
        )  # the second look needs room for a third model
    print_layers(Series(records))
    print_answers(Series(records))
    print(
        f"n = {min(map(len, sets.values()))} prompts a set; what is measured is told in minisap/study/mechanism.py\n"
        f"written: {args.out_dir / 'compare.json'}"
    )
    write_pictures(args, records)


def write_pictures(args, records):
    if args.plot:
        draw_all(records, args.out_dir)


def study(args):
    """The whole study, printed as observations that hold or do not."""
    torch.set_num_threads(args.threads or 1)  # fastest for models this small
    records = run_study(args.out_dir, list(dict.fromkeys(args.seeds)), args.n_eval)
    checks = check_all(records)
    write_json(args.out_dir / "study.json", records + records_of(checks))
    write_json(args.out_dir / "checks.json", checks)
    print_answers(Series(records))
    print_checks(checks)
    print(f"written: {args.out_dir / 'study.json'}")
    write_pictures(args, records)


def check_args(args):
    if args.before:
        args.dtype = args.dtype or "float32"  # in half precision much of a small ΔW is rounding
    if args.study:
        args.device = "cpu"
    use_device(args)
    check_minimum(args, 1, "pairs", "n_eval", "max_len", "batches", "batch_size", "pairs_per_step")
    check_minimum(args, 0, "seed", "radius")
    if bool(args.model) == bool(args.study):
        raise ValueError("give a checkpoint, or --study world, which makes its own")
    check_given(args, PARTS)
    if "seeds" in args.given and not args.study:
        raise ValueError("--seeds are of --study; did you mean --seed?")
    if args.attack and not args.before:
        raise ValueError(
            "--attack has a part in --before alone; eval.py --attack measures one checkpoint"
        )
    if not (args.before or args.study):
        if args.plot == IN_OUT_DIR or args.out_dir:
            raise ValueError(
                "--plot PNG and --out FILE are for one checkpoint; --out_dir is for --before and --study"
            )
        return check_outputs(args)
    if not args.out_dir or args.out or args.plot not in (None, IN_OUT_DIR):
        raise ValueError(
            "--before and --study write several files: give --out_dir DIR, no --out, and --plot without a file"
        )
    if args.plot:
        pyplot()
    if args.before and (args.out_dir.is_file() or occupied(args.out_dir)):
        raise ValueError(f"--out_dir {args.out_dir}: holds something else; choose another")
    if args.study and min(args.seeds) < 0:
        raise ValueError(f"--seeds {min(args.seeds)}: at least 0")


def main(argv=None):
    args = parse_args(argv)
    check_args(args)
    if args.study:
        return study(args)
    args.model = find_model("model", args.model)
    args.before = args.before and find_before(args.before, args.model)
    tokenizer = load_tokenizer(args.model, args.chat_format)
    splits = load_splits(
        args.task,
        args.safety,
        args.pairs,
        args.n_eval,
        built_in(tokenizer, args.new_format, args.task),
    )
    if args.before:
        return compare(args, splits, tokenizer)
    if not args.radius:
        raise ValueError("--radius 0: there would be no probe to look at")
    if "lm_head" in args.lora_targets:
        raise ValueError("--lora_targets lm_head: it lies in no layer, and this table is per layer")
    model = load_model(args.model, DTYPES[args.dtype], args.device)
    if args.safe_answers == "own":
        splits["pairs"] = with_own_refusals(model, tokenizer, splits["pairs"])
    if args.precision:
        del model  # precision loads its own, one at a time
        rows = precision(args, splits, tokenizer)
    else:
        rows = look_inside(args, model, splits, tokenizer)
    if args.out:
        write_json(args.out, rows)
    if args.plot:
        plot_layers(rows, args.plot)


if __name__ == "__main__":
    run(main, "interrupted; a study goes on with what is finished by the same command")
