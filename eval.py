"""How harmful, how useful, how over-cautious is a checkpoint: a table with 95 % intervals.

    python eval.py runs/mine/sap runs/mine/sft weights/X            generate and measure, on the rows of the run
    python eval.py weights/X --safety FILE --task FILE              ... or on rows of yours (their held-out part)
    python eval.py runs/mine runs/other --curves --plot curve.png   harmful score against task loss, as training recorded it
"""
import argparse
from pathlib import Path

import torch

from minisap.checkpoint import DTYPES, load_model, read_json, write_json
from minisap.data import load_safe_prompts, load_splits
from minisap.evaluate import evaluate, print_records, print_table
from minisap.script import pyplot, run
from minisap.tokenizer import FORMATS, Tokenizer

RUN_ARGS = {"task": None, "safety": None, "benign": None, "pairs": 48, "n_eval": 100, "max_len": 256}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("paths", nargs="+", type=Path, help="checkpoint directories; with --curves: run directories")
    # rows: as in train.py; what is not given is as in the run that a checkpoint belongs to, else built in
    add("--task", nargs="+", metavar="FILE")
    add("--safety", metavar="FILE")
    add("--benign", metavar="FILE")
    add("--pairs", type=int, help="rows of the safety file that were the method's, and are left out (default: 48)")
    add("--n_eval", type=int, help="held-out rows of each file (default: 100)")
    add("--max_len", type=int)
    add("--chat_format", choices=FORMATS)
    # how
    add("--dtype", choices=DTYPES, default="bfloat16" if torch.cuda.is_available() else "float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int)
    # results
    add("--out", type=Path, metavar="FILE", help="also write the records as JSON")
    add("--curves", action="store_true", help="print the records that train.py --eval_every left, averaged over seeds")
    add("--plot", type=Path, metavar="PNG", help="with --curves: draw harmful score against task loss (needs matplotlib)")
    return parser.parse_args(argv)


def measure(args, path):
    """Records of one checkpoint, on the held-out rows of the run it belongs to unless the command says otherwise."""
    run_file = path.parent / "train_args.json"
    run = read_json(run_file) if run_file.exists() else {}
    rows = {key: getattr(args, key) or run.get(key, default) for key, default in RUN_ARGS.items()}
    splits = load_splits(rows["task"], rows["safety"], rows["pairs"], rows["n_eval"])
    tokenizer = Tokenizer(path, args.chat_format)
    model = load_model(path, DTYPES[args.dtype], args.device)
    found = evaluate(model, tokenizer, splits["eval_unsafe"], load_safe_prompts(rows["benign"], rows["n_eval"]), splits["eval_task"],
                     rows["max_len"])
    return [{"model": str(path), "method": path.name if run else "", "seed": run.get("seed", ""), "step": ""} | r for r in found]


def read_runs(paths):
    """The records that train.py wrote under the run directories."""
    records = []
    for path in paths:
        files = sorted(path.glob("*/eval.json"))
        if not files:
            raise ValueError(f"{path}: no run with METHOD/eval.json here")
        for file in files:
            start = [r | {"method": file.parent.name} for r in read_json(path / "start.json")]
            records += start + read_json(file)
    return records


def average_over_seeds(records):
    """{method: {step: {metric: [value per seed]}}}, steps in order."""
    curves = {}
    for r in sorted(records, key=lambda r: (r["method"], r["step"], r["seed"])):
        curves.setdefault(r["method"], {}).setdefault(r["step"], {}).setdefault(r["metric"], []).append(r["value"])
    return curves


def print_curves(curves):
    """One line per method and step: mean over seeds, and in brackets the value of every seed."""
    rows = [["method", "step", "harmful %", "over-refusal %", "task loss"]]
    for method, steps in curves.items():
        for step, metrics in steps.items():
            cells = [seeds(metrics[m], 100, 1) for m in ("harmful_score", "over_refusal")] + [seeds(metrics["task_loss"], 1, 3)]
            rows.append([method, str(step), *cells])
    print_table(rows)


def seeds(values, scale, digits):
    each = ", ".join(f"{scale * v:.{digits}f}" for v in values)
    return f"{scale * sum(values) / len(values):.{digits}f}" + (f" ({each})" if len(values) > 1 else "")


def plot_curves(curves, file):
    """Harmful score against task loss, one line a method, each point the mean over seeds of one evaluation."""
    figure, axes = pyplot().subplots(figsize=(7, 4.5))
    for method, steps in curves.items():
        x, y = ([sum(s[m]) / len(s[m]) for s in steps.values()] for m in ("task_loss", "harmful_score"))
        line, = axes.plot(x, [100 * v for v in y], marker="o", markersize=4, label=method)
        axes.annotate(str(list(steps)[-1]), (x[-1], 100 * y[-1]), color=line.get_color(), textcoords="offset points", xytext=(5, 4))
    axes.set(xlabel="task loss on held-out rows, nats per token (useful: to the left)", ylabel="harmful score, % (safe: below)")
    axes.invert_xaxis()
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    print(f"written: {file}")


def main(argv=None):
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.plot and not args.curves:
        raise ValueError("--plot draws the curves that --curves prints; give both")
    if args.plot:
        pyplot()
    if args.curves:
        records = read_runs(args.paths)
        curves = average_over_seeds(records)
        print_curves(curves)
        if args.plot:
            plot_curves(curves, args.plot)
    else:
        records = [r for path in args.paths for r in measure(args, path)]
        print_records(records)
    if args.out:
        write_json(args.out, records)


if __name__ == "__main__":
    run(main)
