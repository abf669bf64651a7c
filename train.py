"""Fine-tune a safety-aligned Llama with one or several methods from the same start, on the same batches, and measure each.

    python train.py                                               SFT and SAP in the synthetic world, half a minute on a CPU
    python train.py --new_format --out_dir runs/format            ... where there is a new output format to learn
    python train.py --model runs/aligned/mix                      SAP on the built-in rows, in plain English, of a model that refuses (see README)
    python train.py --model X --method sft sap --poison 0.1       two methods, one table
    python train.py --model X --task FILE --safety FILE           your rows; FILE[a:b] takes a range of them

Writes OUT_DIR/METHOD/ as a checkpoint directory (merged weights, config, tokenizer) with adapter/, log.jsonl and eval.json.
"""

import itertools
import json
import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from textwrap import shorten

import torch
from tqdm import tqdm

from minisap.alignment import ALIGN
from minisap.baselines import ENDINGS, STRENGTH
from minisap.checkpoint import (
    DTYPES,
    load_model,
    name_chat_format,
    save_adapter,
    save_model,
    weights_crc32,
    write_json,
)
from minisap.data import (
    batch_rows,
    built_in,
    collate,
    encode_pairs,
    encode_rows,
    load_safe_prompts,
    load_safety_rows,
    load_splits,
    poison_rows,
    repeated,
    sha256_of,
    sources,
    step_batches,
)
from minisap.lora import merge_lora
from minisap.measure.evaluate import (
    evaluate,
    print_records,
    read_measured,
    record,
    with_own_refusals,
)
from minisap.methods import FILTERS, METHODS, PAIRLESS, filter_rows, own_mistakes
from minisap.optimize import learning_rate_at, trainable, update
from minisap.run.checks import settle
from minisap.run.flags import (
    Parser,
    add_machine_flags,
    add_row_flags,
    add_step_flags,
    of_world,
    run,
)
from minisap.run.memory import check_memory
from minisap.run.resume import claim_out_dir, load_state, save_state
from minisap.sap import copies, put
from minisap.study.mechanism import Watch, print_watched
from minisap.support import distributed as parallel
from minisap.support.errors import NotFinite, check_finite

# Other defaults for models of the synthetic world, which are tiny.
WORLD = {
    "method": ["sft", "sap"],
    "steps": 120,
    "batch_size": 32,
    "pairs_per_step": 16,
    "learning_rate": 3e-4,
    "warmup": 20,
    "lora_rank": 0,
    "layers": "0,1",
    "radius": 0.1,
    "gate": 0.05,
    "safety_weight": 0.05,
    "threads": 1,
}

UNSAFE_ABOVE = 1 / 2  # the start's harmful score beyond which it has little safety to keep


# The first sentence of every method's docstring.
METHODS_TOLD = "methods:\n" + "\n".join(
    f"  {name:14} {shorten((method.__doc__ or '').split('. ')[0], 150, placeholder=' …')}"
    for name, method in METHODS.items()
)


def parse_args(argv=None):
    parser = Parser(__doc__, epilog=METHODS_TOLD)
    add = parser.group("what to train")
    add(
        "--model",
        default="tiny",
        help="a checkpoint directory, or a name under weights/: see weights/get.py --list (default: tiny, "
        f"whose world has other defaults: {', '.join(f'--{key} {value}' for key, value in WORLD.items() if key != 'method')})",
    )
    add(
        "--method",
        nargs="+",
        choices=METHODS,
        default=["sap"],
        help="one or several, each from the same start (default: sap; in the world sft sap)",
    )
    add("--out_dir", type=Path, help="run directory (default: runs/MODEL)")
    add(
        "--resume",
        action="store_true",
        help="go on with the run in OUT_DIR (on a CPU, to the same bytes as without the "
        "interruption); more methods may join it",
    )
    add = parser.group("rows")
    add_row_flags(add)
    add(
        "--poison",
        type=float,
        help="share of the task rows to replace by harmful ones (default: 0.1 of built-in rows; 0 of yours, and for alignment)",
    )
    add = parser.group("training")
    add("--steps", type=int, default=60, help="(default: 60)")
    add_step_flags(add)
    add("--learning_rate", type=float, default=5e-4, help="AdamW's (default: 5e-4)")
    add(
        "--schedule",
        choices=("constant", "cosine"),
        default="constant",
        help="of the learning rate: cosine falls to 0 (default: constant)",
    )
    add(
        "--warmup",
        type=int,
        default=0,
        help="steps in which the learning rate rises from 0 (default: 0)",
    )
    add(
        "--clip",
        type=float,
        default=1.0,
        help="largest norm of a step's gradient; 0: no limit (default: 1.0)",
    )
    add("--lora_rank", type=int, default=8, help="0 trains all weights (default: 8)")
    add(
        "--lora_alpha",
        type=float,
        default=16,
        help="LoRA's branch is scaled by alpha / rank (default: 16)",
    )
    add = parser.group("machine")
    add_machine_flags(add)
    add(
        "--checkpointing",
        action="store_true",
        help="keep of each layer its input alone for the backward pass, of the head no logits, and compute the rest anew there: the same numbers, "
        "with less memory, in more time; the pass that fits the paper's probe keeps all",
    )
    add = parser.group("SAP (sap)")
    add(
        "--gate",
        type=float,
        default=0.5,
        help="sap leaves out the rows of which a beginning of the answer has a loss that falls along ĝ faster, per token, than "
        "this share of how fast the safety loss rises; 0: none (default: 0.5)",
    )
    add(
        "--projection",
        choices=("on", "off"),
        default="on",
        help="then project the harmful component out of sap's gradient (default: on)",
    )
    add(
        "--safety_weight",
        type=float,
        default=0.02,
        help="λ: then add λ times the safety loss's gradient (default: 0.02)",
    )
    add(
        "--refusal_weight",
        type=float,
        default=0.0,
        help="μ: and μ times that of the pairs' refusals' cross-entropy; against identity shifting, see README (default: 0)",
    )
    add(
        "--refresh",
        type=int,
        default=1,
        help="sap, paper, paper_project: take ĝ anew, and what is made of it (λ ∇L_safe; the paper's probe), every so many steps alone, which is cheaper "
        "(default: 1)",
    )
    add = parser.group("the paper's SAP (paper, paper_project), and other probes")
    add("--layers", help="layers that carry a probe, as 10-19 or 3,9 (default: the middle third)")
    add(
        "--epsilon",
        type=float,
        default=0.0,
        help="fit the probe by finite difference over ε‖W‖ (default: 0, the exact derivative)",
    )
    add = parser.group("rivals")
    add(
        "--strength",
        nargs="+",
        default=[],
        metavar="METHOD=VALUE",
        help="a rival's one knob, see minisap/baselines.py (default: "
        + " ".join(f"{method}={value}" for method, value in STRENGTH.items())
        + ")",
    )
    add = parser.group("records")
    add(
        "--watch",
        choices=("mechanism",),
        help="also log, every --watch_every steps and at the last, where the weights go with respect to safety: see Watch in minisap/study/mechanism.py",
    )
    add("--watch_every", type=int, default=10, help="(default: 10)")
    add(
        "--before",
        help="for --watch and safelora: the checkpoint before its safety training, whose directions ΔW is compared with",
    )
    add(
        "--eval_every",
        type=int,
        default=0,
        help="also evaluate every so many steps (default: 0, only before and after)",
    )
    add(
        "--save_every",
        type=int,
        default=10,
        help="save the state for --resume every so many steps; less often where that took over a twentieth of the time (default: 10)",
    )
    if of_world(parser.parse_known_args(argv)[0].model):
        parser.set_defaults(**WORLD)
    return parser.parse_args(argv)


def look_at_start(args, start, tokenizer, pairs, measure):
    """Leave in OUT_DIR the start's measures, start.json, and, where there are pairs, these as every method will use them, pairs.json; what is there stays."""
    start_file, pairs_file = args.out_dir / "start.json", args.out_dir / "pairs.json"
    if start_file.exists() and (pairs_file.exists() or not pairs):
        return
    model = load_model(start, DTYPES[args.dtype], args.device)
    if not start_file.exists():
        write_json(start_file, measure(model, "start", 0))
    if pairs and not pairs_file.exists():
        write_json(
            pairs_file,
            with_own_refusals(model, tokenizer, pairs) if args.safe_answers == "own" else pairs,
        )


def warn_of_start(args, records):
    """Where sap is to keep a safety that is not there."""
    answered = next(r["value"] for r in records if r["metric"] == "harmful_score")
    if answered > UNSAFE_ABOVE and set(args.method) & set(FILTERS):
        print(
            f"the start answers {100 * answered:.0f} % of the unsafe prompts: it has little safety to keep; tune it for safety first, for instance by "
            "--method mix --poison 0, and start from what that leaves in OUT_DIR/mix"
        )


def reset_peak(args):
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(args.device)


def train(args, method, start, task, pairs, measure, watch_of, out_dir):
    """Fine-tune by one method, from the start or from its saved state, and write its directory. Returns its records."""
    model = load_model(start, DTYPES[args.dtype], args.device)
    W, model.model.checkpointing = trainable(model, args), args.checkpointing
    watch = watch_of(model, W) if args.watch and parallel.leads() else None
    reset_peak(args)
    optimizer = torch.optim.AdamW(W, lr=args.learning_rate, weight_decay=0.0)
    state, records = load_state(out_dir, W, optimizer)
    if method in FILTERS and not state["step"]:  # W are the start's
        filter_rows(args, method, model, W, task, pairs, state, out_dir)
    elif method in FILTERS and "kept" not in state:
        raise ValueError(
            f"{out_dir}: was saved by another version's filter; remove it to begin anew"
        )
    kept, due = state["kept"] if method in FILTERS else [True] * len(task), 0.0
    with open(
        out_dir / "log.jsonl" if parallel.leads() else os.devnull, "a", encoding="utf-8"
    ) as log_file:
        for step in tqdm(
            range(state["step"], args.steps),
            initial=state["step"],
            total=args.steps,
            desc=method,
            disable=not parallel.leads(),
        ):
            began = time.perf_counter()
            places = batch_rows(range(len(task)), args.batch_size, step, args.seed)
            rows, step_pairs = (
                [task[i] for i in places if kept[i]],
                batch_rows(pairs, args.pairs_per_step, step, args.seed),
            )
            batch, contrast = step_batches(rows, step_pairs, args.device)
            with parallel.together(), own_mistakes(method):
                grads, log = METHODS[method](model, W, batch, contrast, args, state)
            looks = watch and (step % args.watch_every == 0 or step + 1 == args.steps)
            W_before = copies(W) if looks else None
            log |= {"left_out": args.batch_size - len(rows)} if method in FILTERS else {}
            try:
                check_finite(log)
                log |= {
                    "step": step,
                    "norm": update(optimizer, W, grads, args.clip, learning_rate_at(step, args)),
                }
                del grads
                state["step"], state["seconds"] = (
                    step + 1,
                    state["seconds"] + time.perf_counter() - began,
                )
                if args.device.startswith("cuda"):
                    state["peak"] = max(
                        state.get("peak", 0), torch.cuda.max_memory_allocated(args.device)
                    )
                if looks:
                    log |= watch(
                        model,
                        W,
                        W_before,
                        collate([task[i] for i in places], device=args.device),
                        contrast,
                    )
                    check_finite(log)
                    reset_peak(args)  # what watching took for a moment is not the method's
            except NotFinite as error:
                raise NotFinite(
                    f"{method}, step {step}: {error}; its rows: {sources(rows) or 'none'}; its pairs: {sources(safe for safe, _ in step_pairs)}. What was "
                    "saved before stays; a smaller --learning_rate, --radius or --safety_weight, or a wider --dtype, may help"
                ) from None
            log_file.write(json.dumps(log) + "\n")
            if (
                args.eval_every
                and (step + 1) % args.eval_every == 0
                and step + 1 < args.steps
                and parallel.leads()
            ):
                W_trained = apply_ending(args, method, model, W, state)
                records += measure(model, method, step + 1)
                put(W, W_trained)
                reset_peak(args)  # nor what measuring took
            if (
                (step + 1) % args.save_every == 0
                and time.perf_counter() >= due
                or step + 1 == args.steps
            ):
                log_file.flush()
                due = save_state(out_dir, W, optimizer, state, records)
    return (
        finish(args, method, model, W, state, records, measure, start, out_dir)
        if parallel.leads()
        else []
    )


def apply_ending(args, method, model, W, state):
    """What a method does to W when its training is done. Returns W as it was, where it changes."""
    W_trained = copies(W) if method in ENDINGS else []
    if method in ENDINGS:
        before = args.before and load_model(args.before, torch.float32, args.device)
        ENDINGS[method](model, W, args, state, before)
    return W_trained


def finish(args, method, model, W, state, records, measure, start, out_dir):
    """Save the adapter, merge it, measure what is left (the very weights that are written), and save that."""
    apply_ending(args, method, model, W, state)
    if args.lora_rank:
        save_adapter(model, out_dir / "adapter", start)
        merge_lora(model)
    cost = [record("seconds", state["seconds"], args.steps)]
    if args.device.startswith("cuda"):
        cost.append(record("peak_memory_bytes", state["peak"], 1))
    records += [
        {"model": str(start), "method": method, "seed": args.seed, "step": args.steps} | r
        for r in cost
    ]
    records += measure(model, method, args.steps)
    save_model(model, out_dir, start)
    name_chat_format(out_dir, args.chat_format)
    write_json(out_dir / "eval.json", records)
    return records


def read_rows(args, tokenizer):
    """(splits, safe prompts, task examples, pairs of examples): the rows, each for its one use, and those to train on as ids."""
    rows_of = built_in(tokenizer, args.new_format, args.task)
    splits = load_splits(args.task, args.safety, args.pairs, args.n_eval, rows_of)
    safe_prompts = load_safe_prompts(args.benign, args.n_eval, rows_of)
    if args.watch and min(len(splits["eval_unsafe"]), len(safe_prompts)) < 2:
        raise ValueError(
            "--watch mechanism: clusters need 2 unsafe and 2 safe prompts; raise --n_eval"
        )
    rows = poison_rows(splits["task"], splits["harmful"], args.poison, args.seed)
    task = [
        example | {"poisoned": "poisoned" in row}
        for row, example in zip(rows, encode_rows(tokenizer, rows, args.max_len))
    ]
    if set(args.method) & set(ALIGN):  # the same prompts, refused
        refusals = itertools.cycle(rows_of.REFUSALS)
        refused = encode_rows(
            tokenizer, [row | {"response": text} for row, text in zip(rows, refusals)], args.max_len
        )
        task = [example | {"refused": other} for example, other in zip(task, refused)]
    encode_rows(tokenizer, splits["eval_task"], args.max_len)  # whether they fit
    pairs = encode_pairs(tokenizer, splits["pairs"] + splits["eval_unsafe"], args.max_len)[
        : len(splits["pairs"])
    ]
    return splits, safe_prompts, task, pairs


def prepare(args):
    """(start, tokenizer, splits, safe prompts, task examples): every check that can be made before anything is written."""
    start, config, tokenizer = settle(args, parse_args(["--model", args.model]))
    splits, safe_prompts, task, pairs = read_rows(args, tokenizer)
    args.rows_sha256, args.model_crc32 = (
        sha256_of([splits, safe_prompts]),
        weights_crc32(start),
    )  # --resume notices others
    model = load_model(
        start, device="meta"
    )  # the checkpoint's names and shapes are as its config says
    n_weights, n_trained = (
        sum(w.numel() for w in some) for some in (list(model.parameters()), trainable(model, args))
    )
    print(
        f"{len(task)} task rows, {sum(example['poisoned'] for example in task)} of them marked as poisoned; {args.pairs} contrastive pairs; {n_trained:,} weights to train"
    )
    if seen := repeated(splits["eval_task"], splits["task"], "prompt", "response"):
        print(
            f"{seen} of the {len(splits['eval_task'])} held-out rows of the task are, word for word, among those to train on: their loss is no loss on new rows"
        )
    if unfinished := [
        method for method in args.method if not (args.out_dir / method / "eval.json").exists()
    ]:
        check_memory(args, unfinished, config, n_weights, task, pairs)
    return start, tokenizer, splits, safe_prompts, task


def fine_tune(args, start, tokenizer, splits, safe_prompts, task):
    """Measure the start, then run every method that is not finished. Returns all records."""

    def measure(model, method, step):
        try:
            found = evaluate(
                model,
                tokenizer,
                splits["eval_unsafe"],
                safe_prompts,
                splits["eval_task"],
                args.max_len,
            )
        except NotFinite as error:
            raise NotFinite(
                f"{method}, measured at step {step}: {error}; the weights are damaged"
            ) from None
        return [
            {"model": str(start), "method": method, "seed": args.seed, "step": step} | r
            for r in found
        ]

    def watch_of(model, W):
        before = args.before and load_model(args.before, torch.float32, args.device)
        return Watch(model, W, tokenizer, splits["eval_unsafe"], safe_prompts, args.max_len, before)

    paired = bool(set(args.method) - set(PAIRLESS))
    with claim_out_dir(args) if parallel.leads() else nullcontext():
        if parallel.leads():
            look_at_start(args, start, tokenizer, splits["pairs"] if paired else [], measure)
        parallel.wait()
        pairs = encode_pairs(
            tokenizer,
            load_safety_rows(args.out_dir / "pairs.json") if paired else splits["pairs"],
            args.max_len,
        )
        records = read_measured(args.out_dir / "start.json")
        warn_of_start(args, records)
        for method in args.method:
            out_dir = args.out_dir / method
            done = out_dir / "eval.json"
            records += (
                read_measured(done)
                if done.exists()
                else train(args, method, start, task, pairs, measure, watch_of, out_dir)
            )
            parallel.wait()  # what the lead has written is there for all
            if parallel.leads():
                shutil.rmtree(
                    out_dir / "state", ignore_errors=True
                )  # all is done: nothing is left to resume
    return records


def main(argv=None):
    args = parse_args(argv)
    records = fine_tune(args, *prepare(args))
    print_records([r for r in records if r["step"] in (0, args.steps)])
    if args.watch:
        print_watched([args.out_dir])
    print(f"written: {', '.join(str(args.out_dir / method) for method in args.method)}")
    parallel.leave()


if __name__ == "__main__":
    run(main, "interrupted; the same command with --resume goes on from the last saved step")
