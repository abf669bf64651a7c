"""What every script shares: flags and their checks, how it ends when its input is wrong, how it draws."""

import argparse
import io
import math
import os
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError

from minisap.checkpoint import DTYPES, load_config, out_of_memory, read_object, weights_crc32
from minisap.support import distributed as parallel
from minisap.support.errors import NotFinite
from minisap.tokenizer import FORMATS, Tokenizer

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"


class Parser(argparse.ArgumentParser):
    """The script's docstring is its help; a wrong flag is one line, like any other wrong input."""

    def __init__(self, doc, epilog=None):
        super().__init__(
            description=doc,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def group(self, title):
        """add_argument of a group of flags, in --help under this title."""
        return self.add_argument_group(title).add_argument

    def error(self, message):
        raise ValueError(f"{message}; see --help")


def parse_given(parser, argv):
    """The arguments; args.given names those that are not at their defaults."""
    args, defaults = parser.parse_args(argv), vars(parser.parse_args([]))
    args.given = {key for key, value in vars(args).items() if value != defaults[key]}
    return args


def check_given(args, parts):
    """ValueError that names a flag which is given and does nothing. parts: {flag that asks for something: what that makes use of, itself included}."""
    for look, used in parts.items():
        if getattr(args, look) and args.given - used:
            raise ValueError(f"--{min(args.given - used)} has no part in --{look}")


def add_row_flags(add):
    """Which rows: the same flags, and so the same rows, in every script."""
    add(
        "--task",
        nargs="+",
        metavar="FILE",
        help="rows to learn: JSONL {prompt, response} or {messages}, Alpaca JSON; FILE[a:b] "
        "takes a range (default: built in)",
    )
    add(
        "--safety",
        metavar="FILE",
        help="unsafe prompts with a safe and a harmful answer: JSONL {prompt, safe, harmful}, "
        "circuit-breakers JSON, AdvBench CSV (default: built in)",
    )
    add(
        "--benign",
        metavar="FILE",
        help="safe prompts that sound unsafe, to measure over-refusal; probe.py sets them "
        "against those that the file labels unsafe (default: built in)",
    )
    add(
        "--new_format",
        action="store_true",
        help="the synthetic world's built-in task in an output format that the start does not know, so that there is "
        "something to learn",
    )
    add(
        "--pairs",
        type=int,
        default=48,
        help="contrastive pairs, of the safety file, that the method may use in all (default: 48)",
    )
    add(
        "--n_eval",
        type=int,
        default=100,
        help="rows of each file that are held out for evaluation (default: 100)",
    )
    add(
        "--max_len",
        type=int,
        default=256,
        help="tokens of an example; longer responses are cut (default: 256)",
    )
    add(
        "--chat_format", choices=FORMATS, help="(default: what the checkpoint's own template tells)"
    )


def add_step_flags(add):
    """What a step is made of: the same in train.py, and in probe.py, which looks at its gradients."""
    add("--batch_size", type=int, default=8, help="task rows a step (default: 8)")
    add("--pairs_per_step", type=int, default=8, help="contrastive pairs a step (default: 8)")
    add(
        "--safe_answers",
        choices=("own", "file"),
        default="own",
        help="contrast with the start model's own refusals where it refuses, or with the file's safe answers (default: own)",
    )
    add(
        "--lora_targets",
        nargs="+",
        default=["q_proj", "v_proj"],
        help="linear layers with LoRA (default: q_proj v_proj)",
    )
    add(
        "--radius",
        type=float,
        default=0.002,
        help="norm of a probe on hidden states as a share of the layer's hidden-state norm (default: 0.002)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="of LoRA's start, and of which rows come when (default: 0)",
    )


def add_machine_flags(add):
    add(
        "--dtype",
        choices=DTYPES,
        help="of the model (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: cuda where there is one)",
    )
    add(
        "--threads",
        type=int,
        help="CPU threads (default: PyTorch's choice; 1 is faster where other work shares the cores)",
    )


def run(main, interrupted="interrupted"):
    """Call main(). What is wrong with its input becomes one line on stderr and exit status 2, a number that is none status 3; Ctrl-C says `interrupted`."""
    rank = int(os.environ.get("RANK", 0))  # of the processes of torchrun
    error_of = f"error (process {rank})" if rank else "error"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without a κ must not end a run
    try:
        main()
    except NotFinite as error:
        print(f"{error_of}: {error}", file=sys.stderr)
        sys.exit(3)
    except (ValueError, OSError, SafetensorError) as error:  # the last: a disk that is full
        print(f"{error_of}: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        needed = (str(error).splitlines() or ["out of memory"])[0].split("DefaultCPUAllocator: ")[
            -1
        ]
        print(
            f"{error_of}: {needed} Shorter --max_len, smaller batches, --checkpointing or --dtype bfloat16 need less.",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(130)


def pyplot():
    """matplotlib without a screen; ValueError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save_figure(figure, file):
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot().close(figure)
    print(f"written: {file}")


def check_outputs(args):
    """Whether --out and --plot can be written, before hours go into what they are to hold."""
    if args.plot and args.plot.suffix != ".png":
        raise ValueError(f"--plot {args.plot}: the picture is a .png")
    if args.plot:
        pyplot()
    for key in ("out", "plot"):
        file = getattr(args, key)
        if file and (file.is_dir() or not os.access(file.parent, os.W_OK)):
            raise ValueError(f"--{key} {file}: is a folder, or lies in none that can be written")


def parse_layers(text, n_layers):
    """'10-19' or '3,9' as a list of layers; the middle third by default."""
    if text is None:
        return list(range(n_layers // 3, max(2 * n_layers // 3, n_layers // 3 + 1)))
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise ValueError(f"--layers {text}: expected something like 10-19 or 3,9")
    parts = [part.split("-") for part in text.split(",")]
    bounds = [
        (int(part[0]), int(part[-1])) for part in parts
    ]  # of a single layer both are the same
    if any(first > last or last >= n_layers for first, last in bounds):
        raise ValueError(f"--layers {text}: the model has layers 0 to {n_layers - 1}")
    return sorted({j for first, last in bounds for j in range(first, last + 1)})


def check_minimum(args, least, *keys):
    for key in keys:
        value = getattr(args, key)
        if value is not None and not least <= value < math.inf:  # so that NaN is out, too
            raise ValueError(
                f"--{key} {value}: at least {least}" + (", and finite" if value == math.inf else "")
            )


def use_device(args):
    """Check --device, set --threads, and settle --dtype where it is not given: bfloat16 on a GPU, float32 on a CPU."""
    if "LOCAL_RANK" in os.environ and parallel.alone():
        raise ValueError("torchrun: of the scripts, train.py alone runs on several devices")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:  # a torch built without CUDA asserts
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    check_minimum(args, 1, "threads")
    if args.threads:
        torch.set_num_threads(args.threads)


def places(name):
    """Where a checkpoint of this name lies: as a path, then under weights/, from here where that is below."""
    here = WEIGHTS.relative_to(Path.cwd()) if WEIGHTS.is_relative_to(Path.cwd()) else WEIGHTS
    return [path for path in (Path(name), here / name) if (path / "config.json").exists()]


def find_model(flag, name):
    """The checkpoint directory that is meant: a path, or a name under weights/."""
    for path in places(name):
        return path
    inside = sorted(str(file.parent) for file in Path(name).glob("*/config.json"))
    if inside:
        raise ValueError(f"{flag} {name}: no checkpoint itself, but there are {', '.join(inside)}")
    raise ValueError(
        f"{flag} {name}: no checkpoint there or under weights/; "
        "python weights/get.py --list shows what can be fetched"
    )


def find_before(before, start):
    """The checkpoint that --before means; ValueError where it has not the architecture of `start`."""
    before = find_model("--before", before)
    if load_config(before) != load_config(start):
        raise ValueError(f"--before {before}: not the architecture of {start}")
    if weights_crc32(before) == weights_crc32(start):
        raise ValueError(
            f"--before {before}: the same weights as {start}; there is nothing to compare"
        )
    return before


def of_world(name):
    """Whether this is a checkpoint of the synthetic world; False also where there is none."""
    files = [path / "tokenizer_config.json" for path in places(name)[:1]]
    return any(read_object(file).get("chat_format") == "world" for file in files if file.exists())


def load_tokenizer(path, chat_format):
    """The checkpoint's Tokenizer; ValueError where it has ids that the embedding lacks."""
    tokenizer, vocab_size = Tokenizer(path, chat_format), load_config(path).vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding {vocab_size}"
        )
    return tokenizer
