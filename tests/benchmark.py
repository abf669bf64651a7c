"""Time and memory of our steps beside those of transformers and peft: the same weights, rows and threads, in one run, each
in a process of its own. On a CPU they step in turn, and all stay in memory (the defaults: 16 GB); on a GPU each runs to its end before the next.

    pip install transformers peft && python tests/benchmark.py --json benchmark.json     smollm2-135m-q4, about a quarter of an hour on two cores
    python tests/benchmark.py --model X --dtype bfloat16 --device cuda --ours            ours alone, of any checkpoint

Rows are the built-in ones, three to a conversation. Seconds are medians over --repetitions, after one more, each of two steps of which the
second counts. "of the peak": the FLOPs that `flops` counts, as a share of what this machine does in one large matrix product.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minisap.checkpoint import DTYPES, load_config, load_model  # noqa: E402
from minisap.data import (
    batch_rows,
    collate,
    collate_pairs,
    encode_pairs,
    encode_prompt,
    encode_rows,
)  # noqa: E402
from minisap.lora import add_lora  # noqa: E402
from minisap.losses import prefixes_of  # noqa: E402
from minisap.measure.evaluate import print_table  # noqa: E402
from minisap.methods import FORWARD_BATCHES, METHODS, RELEASED_EPSILON, RELEASED_LAYERS, RELEASED_LR  # noqa: E402
from minisap.optimize import update  # noqa: E402
from minisap.run import demo  # noqa: E402
from minisap.run.flags import find_model, parse_layers  # noqa: E402
from minisap.run.memory import estimate, largest_batches  # noqa: E402
from minisap.sap import harmful_direction, slopes_of  # noqa: E402
from minisap.tokenizer import Tokenizer  # noqa: E402
from train import parse_args  # noqa: E402

NEW_TOKENS, PROMPTS = 64, 32
ESTIMATED = {
    "sft": "sft",
    "sap, 1 epoch": "sap",
    "paper_project": "paper_project",
}  # whose memory train.py would tell beforehand


def joined(rows, keys, n=3):
    """Every n rows as one."""
    return [
        {key: " ".join(row[key] for row in rows[i : i + n]) for key in keys}
        | {"source": rows[i]["source"]}
        for i in range(0, len(rows) - n, n)
    ]


def encoded(args):
    """(examples of the task, contrastive pairs)."""
    tokenizer = Tokenizer(args.model)
    task = encode_rows(tokenizer, joined(demo.task_rows(), ("prompt", "response")), args.max_len)
    return task, encode_pairs(
        tokenizer, joined(demo.safety_rows()[::5], ("prompt", "safe", "harmful"), 2), args.max_len
    )


def options(args):
    """train.py's arguments for what is measured here, the methods' knobs at their defaults."""
    flags = {
        "--model": "none",
        "--batch_size": args.batch_size,
        "--pairs_per_step": args.pairs,
        "--dtype": args.dtype,
        "--device": args.device,
    }
    return parse_args([str(part) for flag in flags.items() for part in flag])


def batches(args):
    """Functions of the step: (examples of the task, batch, contrast)."""
    task, pairs = encoded(args)
    examples = lambda step: batch_rows(task, args.batch_size, step, 0)
    return (
        examples,
        lambda step: collate(examples(step), device=args.device),
        lambda step: collate_pairs(batch_rows(pairs, args.pairs, step, 0), args.device),
    )


def synchronised(args):
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def load(args):
    return load_model(args.model, DTYPES[args.dtype], args.device)


def ours(args, method):
    """step(i) of a method as train.py takes it."""
    model, asked = load(args), options(args)
    W, state = add_lora(model), {"step": 0}
    optimizer, (_, batch, contrast) = torch.optim.AdamW(W, lr=1e-5, weight_decay=0.0), batches(args)
    asked.layers = parse_layers(asked.layers, model.config.n_layers)

    def step(i):
        grads, _ = METHODS[method](model, W, batch(i), contrast(i), asked, state)
        update(optimizer, W, grads, 1.0, 1e-5)

    return step


def ours_filter(args):
    """step(i) is what sap does before its first step, for the rows of FORWARD_BATCHES steps: each row is asked once, and `report` divides."""
    model = load(args)
    W, (examples, _, contrast) = add_lora(model), batches(args)
    g_hat = harmful_direction(model, W, contrast(0))

    def step(i):
        slopes_of(
            model,
            W,
            g_hat,
            [row for j in range(FORWARD_BATCHES) for row in examples(i + j)],
            min_tokens=1,
            batch_size=FORWARD_BATCHES * args.batch_size,
        )

    return step


def theirs(args, released=False):
    """step(i) by transformers and peft: SFT, or the three passes of the paper's released schedule: L_safe; the task at W + ε ‖W‖ ĝ, for V;
    the task at W with the V of the batch before, for W and V."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype]).to(
        args.device
    )
    model = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    )
    W = [w for w in model.parameters() if w.requires_grad]
    optimizer, (_, batch, contrast) = torch.optim.AdamW(W, lr=1e-5, weight_decay=0.0), batches(args)
    nll = lambda one: model(input_ids=one["input_ids"], labels=one["labels"]).loss
    layers = (
        [
            base.model.layers[base.config.num_hidden_layers * j // 32].mlp.down_proj
            for j in RELEASED_LAYERS
        ]
        if released
        else []
    )
    V = [
        torch.zeros(
            layer.out_features, device=args.device, dtype=DTYPES[args.dtype], requires_grad=True
        )
        for layer in layers
    ]
    for layer, v in zip(layers, V):
        layer.register_forward_hook(lambda _, inputs, output, v=v: output + v)

    def step(i):
        here = batch(i)
        g = torch.autograd.grad(nll(here), [*W, *V])
        for w, g_w in zip(W, g):
            w.grad = g_w
        torch.nn.utils.clip_grad_norm_(W, 1.0)
        optimizer.step()
        if released:
            pairs = contrast(i)
            direction = torch.autograd.grad(nll(pairs["safe"]) - nll(pairs["harmful"]), W)
            size = torch.stack([d.norm() for d in direction]).norm()
            shift = [
                RELEASED_EPSILON * torch.stack([w.detach().norm() for w in W]).norm() * d / size
                for d in direction
            ]
            with torch.no_grad():
                torch._foreach_add_(W, shift)
            there = torch.autograd.grad(nll(here), V)
            with torch.no_grad():
                torch._foreach_sub_(W, shift)
                for v, a, b in zip(V, there, g[len(W) :]):
                    v.copy_(RELEASED_LR * torch.sign(a - b))  # AdamW's first step from zero

    return step


def our_generation(args):
    model, tokenizer = load(args), Tokenizer(args.model)
    ids = [encode_prompt(tokenizer, row["prompt"]) for row in demo.task_rows(PROMPTS)]
    return lambda i: model.generate(ids, NEW_TOKENS)


def their_generation(args):
    from transformers import AutoModelForCausalLM

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype]).to(args.device),
        Tokenizer(args.model),
    )
    ids = [encode_prompt(tokenizer, row["prompt"]) for row in demo.task_rows(PROMPTS)]
    T = max(map(len, ids))
    padded = torch.tensor([[0] * (T - len(row)) + row for row in ids], device=args.device)
    mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in ids], device=args.device)
    return lambda i: model.generate(
        input_ids=padded,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )


SUBJECTS = {
    "sft": lambda args: ours(args, "sft"),
    "sap": lambda args: ours(args, "sap"),
    "sap_filter": ours_filter,
    "paper_project": lambda args: ours(args, "paper_project"),
    "generate": our_generation,
    "load": lambda args: lambda i: load(args),
}
THEIRS = {
    "hf_sft": theirs,
    "hf_released": lambda args: theirs(args, released=True),
    "hf_generate": their_generation,
}


def flops(config, batch, passes, distinct=True):
    """FLOPs of `passes` forward passes of a batch: 2 per weight of the layers and token, 2 per weight of the head and label, and 4 · T · heads · width
    of a head per place for causal attention's two products, halved. With LoRA a backward pass is about one forward pass: frozen weights have no gradient.
    What rows begin with in common counts once, padding not; without `distinct` every place counts, and has logits."""
    B, T = batch["input_ids"].shape
    tokens, labels = (
        (len(prefixes_of(batch).origin), (batch["labels"][:, 1:] != -100).sum().item())
        if distinct
        else (B * T, B * T)
    )
    D, M, heads = config.hidden_size, config.intermediate_size, config.n_heads * config.head_dim
    layer = 2 * D * heads + 2 * D * config.n_kv_heads * config.head_dim + 3 * D * M
    return passes * (
        config.n_layers * (2 * layer * tokens + 2 * heads * T * B * T)
        + 2 * D * config.vocab_size * labels
    )


def probe_flops(config, batch, lowest):
    """FLOPs of fitting the paper's probe: what is computed, and how it moves along ĝ, and of both the way back to the lowest probed layer."""
    return flops(config, batch, 2) + flops(
        replace(config, n_layers=config.n_layers - 1 - lowest), batch, 2
    )


def matmul_peak(args, n=4096):
    """FLOP/s of a product of two (n, n) matrices: the best of ten."""
    a, b = (torch.randn(n, n, dtype=DTYPES[args.dtype], device=args.device) for _ in range(2))
    seconds = []
    for _ in range(10):
        began = synchronised(args)
        a @ b
        seconds.append(synchronised(args) - began)
    return 2 * n**3 / min(seconds)


def measured(args, names):
    """({name: median seconds}, {name: bytes at the peak})."""
    seconds, peaks = {name: [] for name in names}, {}
    for group in [names] if args.device == "cpu" else [[name] for name in names]:
        workers = {
            name: subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--subject", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for name in group
        }
        for i in range(1 + args.repetitions):
            for name, worker in workers.items():
                if i <= 3 or not name.endswith(("generate", "load")):
                    print(i, file=worker.stdin, flush=True)
                    told = worker.stdout.readline() or sys.exit(
                        f"{name} ended with status {worker.wait()}"
                    )
                    seconds[name].append(float(told))
        for name, worker in workers.items():
            peaks[name] = int(worker.communicate()[0])
    return {name: statistics.median(of_name[1:]) for name, of_name in seconds.items()}, peaks


def serve(args):
    """A subject in this process: for every number that comes in, two steps, and the second's seconds go out; at the end, the peak of its memory."""
    step = (SUBJECTS | THEIRS)[args.subject](args)
    for i in map(int, sys.stdin):
        step(FORWARD_BATCHES * 2 * i)
        began = synchronised(args)
        step(FORWARD_BATCHES * (2 * i + 1))
        print(synchronised(args) - began, flush=True)
    if args.device.startswith("cuda"):
        print(torch.cuda.max_memory_allocated())
    else:  # (getrusage's would begin at the peak of the process that started this one)
        (line,) = (
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
        print(1024 * int(line.split()[1]))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="smollm2-135m-q4")
    add("--ours", action="store_true", help="without transformers and peft")
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", default="cpu")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--batch_size", type=int, default=8)
    add("--pairs", type=int, default=4, help="contrastive pairs a step")
    add("--max_len", type=int, default=128)
    add("--repetitions", type=int, default=6)
    add("--json", type=Path, metavar="FILE")
    add("--subject", choices=[*SUBJECTS, *THEIRS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = find_model("--model", args.model)
    torch.set_num_threads(args.threads)
    if args.subject:
        return serve(args)
    names = [*SUBJECTS] + [*THEIRS] * (not args.ours)
    config = load_config(args.model)
    estimated = {
        name: estimate(
            options(args), method, config, largest_batches(options(args), config, *encoded(args))
        )
        for name, method in ESTIMATED.items()
    }
    report(args, matmul_peak(args), *measured(args, names), estimated)


def report(args, peak, seconds, peaks, estimated):
    """Print the table, and write the JSON."""
    config, (_, batch, contrast) = load_config(args.model), batches(args)
    task, both = batch(0), contrast(0)["both"]
    distinct = [len(prefixes_of(one).origin) for one in (task, both)]
    filtering = (
        seconds.pop("sap_filter") / FORWARD_BATCHES
    )  # of as many rows as a step has: a run asks each row of the task once
    seconds |= {
        f"sap, {epochs} epoch{'s' * (epochs > 1)}": seconds["sap"] + filtering / epochs
        for epochs in (1, 3)
    }
    peaks |= {
        name: max(peaks["sap"], peaks["sap_filter"]) for name in seconds if name.startswith("sap,")
    }
    counted = {
        "sft": flops(config, task, 2),
        "hf_sft": flops(config, task, 2, distinct=False),
        "sap": flops(config, task, 2) + flops(config, both, 2),
    }
    counted["sap, 1 epoch"] = counted["sap"] + flops(
        config, task, 2
    )  # forward mode: what is computed, and how it moves
    counted["paper_project"] = counted["sap"] + probe_flops(
        config, task, parse_layers(None, config.n_layers)[0]
    )
    print(
        f"{args.model.name}, {args.dtype}, {args.device}, {args.threads} threads; a step's {task['input_ids'].numel()} task tokens and {both['input_ids'].numel()} contrastive ones, "
        f"padding included, of which {distinct[0]} and {distinct[1]} are computed (what rows begin with in common once, padding not); matrix products at {peak / 1e9:.0f} GFLOP/s; by FLOPs alone sap would take "
        f"{counted['sap, 1 epoch'] / counted['sft']:.2f} × sft in one epoch, paper_project {counted['paper_project'] / counted['sft']:.2f}"
    )
    print_table(
        [
            ["", "seconds", "× sft", "of the peak", "peak memory, GiB", "estimated"],
            *(
                [
                    name,
                    f"{s:.3f}",
                    f"{s / seconds['sft']:.2f}",
                    f"{100 * counted[name] / s / peak:.0f} %" if name in counted else "",
                    *(
                        f"{found[name] / 2**30:.2f}" if name in found else ""
                        for found in (peaks, estimated)
                    ),
                ]
                for name, s in seconds.items()
            ),
        ]
    )
    one, three = seconds["sap, 1 epoch"], seconds["sap, 3 epochs"]
    found = {
        "sft_step_s": seconds["sft"],
        "sap_step_s": one,
        "sap_filter_s": filtering,
        "sap_over_sft": one / seconds["sft"],
        "sap_over_sft_3_epochs": three / seconds["sft"],
        "sap_flops_over_sft": counted["sap, 1 epoch"] / counted["sft"],
        "paper_step_s": seconds["paper_project"],
        "paper_flops_over_sft": counted["paper_project"] / counted["sft"],
        "load_s": seconds["load"],
    }
    if not args.ours:
        found |= {
            "hf_sft_step_s": seconds["hf_sft"],
            "hf_released_step_s": seconds["hf_released"],
            "sft_speedup": seconds["hf_sft"] / seconds["sft"],
            "sap_speedup": seconds["hf_released"] / one,
            "generate_speedup": seconds["hf_generate"] / seconds["generate"],
        }
    found |= {
        "peak_bytes": peaks,
        "estimated_bytes": estimated,
        "matmul_flops": peak,
        "device": args.device,
        "dtype": args.dtype,
        "tokens_per_step": task["input_ids"].numel(),
        "distinct_tokens_per_step": distinct[0],
    }
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
