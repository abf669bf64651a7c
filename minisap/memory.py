"""How much memory a method takes at most, told before it takes it: its own step, on models of the same width with two layers and with three, is
counted tensor by tensor. Every further layer adds what the third added (tests/test_memory.py: to a thousandth; the first two are not like the others)."""
import weakref
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minisap import parallel
from minisap.checkpoint import DTYPES
from minisap.data import batch_rows, collate, in_one_row, step_batches
from minisap.methods import FIRST, METHODS, ROWS_PER_ROW
from minisap.model import Llama
from minisap.optimize import trainable, update
from minisap.sap import NotFinite, row_slopes

GIB = 2**30


class Counted(TorchDispatchMode):
    """Within: `live` are the bytes of the tensors that were made here, on this device, and are still there; `peak` the most that there were.
    What a kernel takes for itself, and what an allocator keeps, is not seen."""

    def __init__(self, device):
        super().__init__()
        self.device, self.known, self.live, self.peak = torch.device(device), set(), 0, 0

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


def random_model(config, dtype, device):
    """A model of this shape, never wider than dtype. Its matrices are random, of rank one: quick to make where there are many."""
    with torch.device("meta"):
        model = Llama(config)
    model = model.to(dtype).to_empty(device=device)
    model.tie()
    noise = lambda n: torch.randn(n, generator=torch.Generator(device).manual_seed(n), dtype=torch.float32, device=device).to(dtype)       # (not from the run's own generators)
    with torch.no_grad():
        for w in model.parameters():
            torch.mul(noise(w.shape[0])[:, None], 0.02 * noise(w.shape[1]), out=w) if w.dim() == 2 else w.fill_(1)
    return model


def largest(examples, size, args):
    """Which of them make up the run's largest batch: by its places, padding included, then by its labels. (One epoch tells.)"""
    labels = [sum(label != -100 for label in example["labels"]) for example in examples]
    room = lambda chosen: (max(len(examples[i]["labels"]) for i in chosen), sum(labels[i] for i in chosen))
    return max((batch_rows(range(len(examples)), size, step, args.seed) for step in range(min(args.steps, 1 + len(examples) // size))), key=room)


def peaks_of(args, method, config, rows, pairs, asked):
    """Bytes at the peak of a step that is not the first, and of what comes before the first, if anything does."""
    with Counted(args.device) as counted, parallel.together():
        model = random_model(config, DTYPES[args.dtype], args.device)
        W, model.model.checkpointing = trainable(model, args), args.checkpointing
        options, before = Namespace(**vars(args) | {"layers": list(range(config.n_layers))}), 0
        if method in FIRST:
            row_slopes(model, W, W, collate(asked, device=args.device))
            before, counted.peak = counted.peak, counted.live
        optimizer = torch.optim.AdamW(W)
        update(optimizer, W, [torch.zeros_like(w) for w in W], args.clip, 0.0)              # makes the optimizer's moments
        with suppress(NotFinite):                                       # random weights may give no number; what it took is counted by then
            grads, _ = METHODS[method](model, W, *step_batches(rows, pairs, args.device), options, {"step": 0})
            update(optimizer, W, grads, args.clip, 0.0)
    return counted.peak, before


def rooms(args, task, pairs):
    """What of a run takes the most room: a step's rows, its contrastive pairs, and rows that a method looks at before its first step."""
    rows = [task[i] for i in largest(task, args.batch_size, args)]
    step_pairs = [pairs[i] for i in largest([in_one_row(*pair) for pair in pairs], args.pairs_per_step, args)]
    return rows, step_pairs, sorted(task, key=lambda example: len(example["labels"]))[-ROWS_PER_ROW * args.batch_size:]


def estimate(args, method, config, task, pairs):
    """Bytes that training by this method takes at its peak."""
    peaks_at = lambda n: peaks_of(args, method, replace(config, n_layers=n), *rooms(args, task, pairs))
    if config.n_layers <= 3:
        return max(peaks_at(config.n_layers))
    return max(two + (three - two) * (config.n_layers - 2) for two, three in zip(peaks_at(2), peaks_at(3)))


def free_memory(device):
    """Bytes, or None where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    file = Path("/proc/meminfo")
    found = dict(line.split(":") for line in file.read_text().splitlines()) if file.exists() else {}
    return 1024 * int(found["MemAvailable"].split()[0]) if "MemAvailable" in found else None


def check_memory(args, methods, config, task, pairs):
    """Print what will be taken by that of the methods which takes most; ValueError where that is more than is free."""
    most, method = max((estimate(args, method, config, task, pairs), method) for method in methods)
    with torch.device("meta"):
        weights = sum(w.numel() for w in Llama(config).parameters()) * DTYPES[args.dtype].itemsize
    free = free_memory(args.device)
    told = f"{method} takes about {most / GIB:.2f} GiB at its peak, of which the weights are {weights / GIB:.2f}"
    if free is not None and most > free:
        raise ValueError(f"{told}; {free / GIB:.2f} are free on {args.device}. A smaller --batch_size, --pairs_per_step or --max_len, --checkpointing or --dtype bfloat16 need less")
    print(told)
