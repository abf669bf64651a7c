"""What train.py's arguments must be, and what is settled by them: before any rows are read."""

from pathlib import Path

from minisap.alignment import ALIGN
from minisap.baselines import STAGES, UNSPLIT, parse_strength
from minisap.checkpoint import load_config
from minisap.methods import PAIRLESS, READ_BY
from minisap.run.flags import (
    check_minimum,
    find_before,
    find_model,
    load_tokenizer,
    parse_layers,
    use_device,
)
from minisap.run.resume import check_out_dir
from minisap.support import distributed as parallel


def settle(args, defaults):
    """(start, config, tokenizer): what the arguments name is there, and what depends on it, or on other arguments, is settled in them. defaults: the
    arguments of a command without flags."""
    args.dtype = args.dtype or ("float32" if args.lora_rank == 0 else None)
    args.device = parallel.join(args.device)
    use_device(args)
    check_args(args, defaults)
    start = find_model("--model", args.model)
    args.out_dir = args.out_dir or Path("runs") / start.resolve().name
    if parallel.leads():
        check_out_dir(args)  # before any work
    config, tokenizer = load_config(start), load_tokenizer(start, args.chat_format)
    args.chat_format, args.layers = (
        tokenizer.chat_format,
        parse_layers(args.layers, config.n_layers),
    )
    if args.before:
        args.before = find_before(args.before, start)
    return start, config, tokenizer


def aligns(args):
    """Whether a method is among them that takes the task's answers for good ones, which poison would spoil."""
    return bool(set(args.method) & {*ALIGN, *STAGES, "pretrain"})


def check_args(args, defaults):
    """Settle what depends on other arguments, and check every number; ValueError names what is wrong. defaults: the arguments of a command without flags."""
    args.poison = (
        args.poison if args.poison is not None else 0.0 if args.task or aligns(args) else 0.1
    )
    if not 0 <= args.poison <= 1:
        raise ValueError(f"--poison {args.poison}: a share from 0 to 1")
    check_minimum(
        args,
        1,
        "steps",
        "batch_size",
        "pairs_per_step",
        "pairs",
        "n_eval",
        "max_len",
        "save_every",
        "watch_every",
        "refresh",
    )
    check_minimum(
        args,
        0,
        "radius",
        "gate",
        "epsilon",
        "safety_weight",
        "refusal_weight",
        "learning_rate",
        "clip",
        "lora_rank",
        "lora_alpha",
        "eval_every",
        "seed",
        "warmup",
    )
    if not args.lora_rank and args.dtype in ("bfloat16", "float16"):
        raise ValueError(
            f"--lora_rank 0 with --dtype {args.dtype}: most steps would be lost in rounding; use --dtype float32"
        )
    if len(set(args.method)) < len(args.method):
        raise ValueError(f"--method {' '.join(args.method)}: one of them stands twice")
    strength = parse_strength(args.strength)
    if not args.resume:  # methods that are there already may read what these do not
        check_read(args, defaults)
    args.strength = strength
    if "safelora" in args.method and not args.before:
        raise ValueError(
            "safelora projects onto what safety training wrote: give --before, the checkpoint before it"
        )
    if args.before and not (args.watch or "safelora" in args.method):
        raise ValueError(
            "--before: is what --watch mechanism and safelora compare with; give one of them"
        )
    whole = sorted(set(args.method) & set(UNSPLIT))
    if whole and not parallel.alone():
        raise ValueError(
            f"{whole[0]} looks at more than the losses of rows, and is not split over processes: run it without torchrun"
        )
    for flag, idle, reader in (
        ("lora_targets", not args.lora_rank, "--lora_rank"),
        ("lora_alpha", not args.lora_rank, "--lora_rank"),
        ("watch_every", not args.watch, "--watch"),
    ):
        if idle and getattr(args, flag) != getattr(defaults, flag):
            raise ValueError(f"--{flag}: has no part without {reader}")
    if args.lora_rank and not args.lora_alpha:
        raise ValueError("--lora_alpha 0: LoRA would have no effect")
    needy = [method for method in args.method if method not in PAIRLESS] + ["--poison"] * (
        args.poison > 0
    )
    if args.task and not args.safety and needy:
        raise ValueError(f"{needy[0]} needs safety rows beside --task: give --safety FILE")


def check_read(args, defaults):
    """ValueError that names a flag, or a knob of --strength, which is given and which none of the methods reads."""
    given = {
        f"--{flag}": methods
        for flag, methods in READ_BY.items()
        if getattr(args, flag) != getattr(defaults, flag)
    }
    for flag, methods in (
        given | {f"--strength {knob}": [knob.split("=")[0]] for knob in args.strength}
    ).items():
        if not set(methods) & set(args.method):
            raise ValueError(
                f"{flag}: --method {' '.join(args.method)} does not read it; {', '.join(methods)} would"
            )
