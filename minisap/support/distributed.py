"""One run on several devices: `torchrun --nproc_per_node N train.py …` starts N processes, each with the whole model. Of every batch each computes its
share of the rows, and what a method sees is whole: the losses of all rows, and gradients that are sums over all processes. One of them, the
lead, measures and writes."""

import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

LONGEST_WAIT = timedelta(hours=12)  # for the lead, while it measures
splits = False  # whether batches are split at the moment


def join(device):
    """Join the processes of torchrun, if it started this one; what all of them print, the lead prints. Returns the device: a GPU of its own for each.
    ValueError where there is none."""
    if "LOCAL_RANK" not in os.environ:
        return device
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise ValueError(
                f"--nproc_per_node: there are {torch.cuda.device_count()} GPUs, and none is left for {device}"
            )
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=LONGEST_WAIT)
    if not leads():
        sys.stdout = open(os.devnull, "w")
    return device


def alone():
    return not dist.is_initialized()


def leads():
    return alone() or dist.get_rank() == 0


def leave():
    if not alone():
        dist.destroy_process_group()


def wait():
    """Until every process is here; the end where the lead has come to its own, and said why."""
    try:
        if not alone():
            dist.barrier()
    except RuntimeError:
        if leads():
            raise
        sys.exit(1)


def least(number, device):
    """The smallest of what all processes give."""
    if alone():
        return number
    smallest = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return smallest.item()


@contextmanager
def together():
    """Within: batches are split, and every process does the same."""
    global splits
    splits = not alone()
    try:
        yield
    finally:
        splits = False


def shares(n):
    """[slice of n rows] of every process; all of them for one that is alone."""
    size = dist.get_world_size() if splits else 1
    return [slice(n * i // size, n * (i + 1) // size) for i in range(size)]


def mine(n):
    return shares(n)[dist.get_rank() if splits else 0]


class Gather(torch.autograd.Function):
    """What every process has, (n_i,), as one tensor, (Σ n_i,); back goes to each its own part, as the losses that follow are the same for all."""

    @staticmethod
    def forward(ctx, own, counts):
        ctx.counts = counts
        parts = [own.new_empty(max(counts)) for _ in counts]
        dist.all_gather(parts, F.pad(own, (0, max(counts) - len(own))))
        return torch.cat([part[:n] for part, n in zip(parts, counts)])

    @staticmethod
    def backward(ctx, gradient):
        return gradient.split(ctx.counts)[dist.get_rank()], None

    @staticmethod
    def jvp(ctx, tangent, _):
        return Gather.apply(tangent, ctx.counts)


def gathered(own, labelled):
    """What every process has of its rows' labelled tokens, as one tensor in the order of the batch. labelled: (B, T), True where there is a label."""
    return (
        Gather.apply(own, [int(labelled[share].sum()) for share in shares(len(labelled))])
        if splits
        else own
    )


def summed(tensors):
    """Tensors whose parts lie with the processes, whole. (Theirs are overwritten.)"""
    tensors = list(tensors)
    if splits:
        tensors = [t.contiguous() for t in tensors]
        for t in tensors:
            dist.all_reduce(t)
    return tensors
