"""How much memory training by a method takes, told before it takes it: its own steps on two models of the same width, of two and of three
layers, are counted tensor by tensor, and to every part of a step (up to a gradient, or an update) a further layer adds what the third one
added. (Not the first: what lies below it needs no gradient. Not on tensors without data: where the labels are decides how many logits there
are.) What --watch, --before and the measures take is not counted."""

import os
import weakref
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minisap.baselines import LISA_PERIOD
from minisap.checkpoint import DTYPES
from minisap.data import batch_rows, rows_of_run, step_batches
from minisap.methods import FILTERS, FORWARD_BATCHES, METHODS, own_mistakes
from minisap.model import Llama, distinct_prefixes
from minisap.optimize import trainable, update
from minisap.sap import by_length
from minisap.support import distributed as parallel
from minisap.support.errors import NotFinite

GIB = 2**30
TOLERANCE = 1.1  # how far an estimate may be off
SMALL = 50  # how far the rough count of `room` may be


class Counted(TorchDispatchMode):
    """Within: `live` are the bytes of the tensors that were made here, on this device, and are still there; `peak` the most that there were since the last
    `mark`, and `peaks` those before. What a kernel takes for itself, and what an allocator keeps, is not seen."""

    def __init__(self, device):
        super().__init__()
        self.device, self.known, self.live, self.peak, self.peaks = (
            torch.device(device),
            set(),
            0,
            0,
            [],
        )

    def mark(self):
        self.peaks.append(self.peak)
        self.peak = self.live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and x.device.type == self.device.type:
                self.count(x.untyped_storage())
        return found

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.known.discard(key)
        self.live -= size


class EveryGradient(TorchFunctionMode):
    """Within: `then` is called after every torch.autograd.grad."""

    def __init__(self, then):
        super().__init__()
        self.then = then

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func is torch.autograd.grad:
            self.then()
        return found


def random_model(config, dtype, device):
    """A model of this shape, made without a copy in float32. Its matrices are random and of rank one, which takes little time."""
    with torch.device("meta"):
        model = Llama(config)
    model, generator = (
        model.to(dtype).to_empty(device=device),
        torch.Generator(device).manual_seed(0),
    )  # not the run's own
    model.tie()
    with torch.no_grad():
        for w in model.parameters():
            left, right = (
                torch.randn(n, generator=generator, device=device).to(dtype)
                for n in (w.shape[0], w.shape[-1])
            )
            torch.mul(left[:, None], 0.02 * right, out=w) if w.dim() == 2 else w.fill_(1)
    return model


def room(batch, config, apart=False):
    """About how many numbers are kept for a backward pass of these examples: some of every token in every layer, and the logits of every label.
    apart: if they had nothing in common."""
    rows, labels = (
        [example["input_ids"] for example in batch],
        sum(label != -100 for example in batch for label in example["labels"]),
    )
    tokens, places = (
        len(distinct_prefixes(rows, apart)[1]),
        len(rows) * max(map(len, rows)),
    )  # in the latter attention is computed
    return (
        config.n_layers
        * (
            tokens * (6 * config.hidden_size + 4 * config.intermediate_size)
            + places * 6 * config.hidden_size
        )
        + labels * 3 * config.vocab_size
    )


def largest(batches, config):
    """Of batches of examples, or of pairs of them, that which takes most."""
    single = lambda batch: [
        example for one in batch for example in (one if isinstance(one, tuple) else [one])
    ]
    return max(batches, key=lambda batch: room(single(batch), config))


def largest_batches(args, config, task, pairs):
    """(rows, pairs, rows before the first step): of what a run computes at once, the largest; of what its steps do, the first epoch's."""
    epoch = lambda examples, size: (
        batch_rows(examples, size, step, args.seed)
        for step in range(min(args.steps, 1 + len(examples) // size))
    )
    asked = [task[i] for i in rows_of_run(len(task), args.batch_size, args.steps, args.seed)]
    first = (
        [asked[i] for i in places] for places in by_length(asked, FORWARD_BATCHES * args.batch_size)
    )
    return (
        largest(epoch(task, args.batch_size), config),
        largest(epoch(pairs, args.pairs_per_step), config),
        largest(first, config),
    )


def peaks_of(args, method, config, rows, pairs, first_rows):
    """Bytes at the peak of every part of a method's steps, and of what it does before the first. A part ends with a gradient, or with an update."""
    with (
        Counted(args.device) as counted,
        EveryGradient(counted.mark),
        parallel.together(),
        own_mistakes(method),
    ):
        model = random_model(config, DTYPES[args.dtype], args.device)
        W, model.model.checkpointing = trainable(model, args), args.checkpointing
        counted.peak = counted.live
        options = Namespace(
            **vars(args) | {"layers": list(range(config.n_layers)), "steps": FORWARD_BATCHES}
        )  # a run that comes to all of first_rows
        if method in FILTERS:
            with suppress(NotFinite):  # random weights may give no number
                FILTERS[method](model, W, first_rows, pairs, options)
            counted.mark()
        optimizer, state = torch.optim.AdamW(W), {}
        update(
            optimizer, W, [torch.zeros_like(w) for w in W], args.clip, 0.0
        )  # makes the optimizer's moments
        counted.mark()
        for state["step"] in (0, LISA_PERIOD - 1):
            with suppress(NotFinite):
                grads, _ = METHODS[method](
                    model, W, *step_batches(rows, pairs, args.device), options, state
                )
                update(optimizer, W, grads, args.clip, 0.0)
            grads = None  # its room is free before the next
            counted.mark()
    return counted.peaks


def estimate(args, method, config, batches):
    """Bytes that training by this method takes at its peak. batches: largest_batches."""
    peaks_at = lambda n: peaks_of(args, method, replace(config, n_layers=n), *batches)
    if config.n_layers <= 3:
        return max(peaks_at(config.n_layers))
    two, three = peaks_at(2), peaks_at(3)
    if len(two) != len(three):  # one came to an end before the other
        two, three = [max(two)], [max(three)]
    return max(b + (b - a) * (config.n_layers - 3) for a, b in zip(two, three))


def free_memory(device):
    """Bytes that each of this machine's processes may still take; infinite where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    available = [
        1024 * int(line.split()[1])
        for line in (meminfo.read_text() if meminfo.exists() else "").splitlines()
        if line.startswith("MemAvailable:")
    ]
    limit = (
        [int(group.read_text())] if group.exists() and group.read_text().strip().isdecimal() else []
    )  # a container's
    return min([float("inf"), *available, *limit]) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check_memory(args, methods, config, n_weights, task, pairs):
    """Print what that of the methods takes which takes most; ValueError where that cannot fit. Of runs so small that this is out of the
    question nothing is said."""
    free = parallel.least(free_memory(args.device), args.device)
    longest = sorted(task, key=lambda example: len(example["input_ids"]))[
        -FORWARD_BATCHES * args.batch_size :
    ]
    if SMALL * 4 * (n_weights + room(longest, config, apart=True)) < free:
        return
    batches = largest_batches(args, config, task, pairs)
    most, method = max((estimate(args, method, config, batches), method) for method in methods)
    most = -parallel.least(-most, args.device)  # so that all processes come to the same end
    told = f"{method} takes about {most / GIB:.2f} GiB at its peak (the weights: {n_weights * DTYPES[args.dtype].itemsize / GIB:.2f}; free on {args.device}: {free / GIB:.2f})"
    if most > TOLERANCE * free:
        less = {
            "a smaller --batch_size, --pairs_per_step or --max_len": True,
            "--checkpointing": not args.checkpointing and not method.startswith("paper"),
            "LoRA in place of --lora_rank 0": not args.lora_rank,
            "--dtype bfloat16": args.lora_rank and DTYPES[args.dtype].itemsize > 2,
        }
        raise ValueError(
            f"{told}; less is needed with {', or '.join(advice for advice, helps in less.items() if helps)}"
        )
    print(told)
