"""What is trained, and how a gradient becomes a step."""

import math

import torch

from minisap.lora import add_lora
from minisap.support.errors import check_finite


def trainable(model, args):
    """W: LoRA's parameters, or with --lora_rank 0 all of the model's."""
    if args.lora_rank:
        return add_lora(model, args.lora_rank, args.lora_alpha, args.lora_targets, args.seed)
    return list(model.parameters())


def learning_rate_at(step, args):
    """A linear rise over the first --warmup steps, then constant, or half a cosine to 0."""
    if step < args.warmup:
        return args.learning_rate * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.learning_rate * (
        (1 + math.cos(math.pi * done)) / 2 if args.schedule == "cosine" else 1
    )


def update(optimizer, W, grads, clip, learning_rate):
    """Clip the gradient to a norm of at most `clip` (0: no limit) and let the optimizer follow it. Returns the norm before.
    NotFinite, and no step, where that is."""
    optimizer.param_groups[0]["lr"] = learning_rate
    for w, g in zip(W, grads):
        w.grad = g
    norm = torch.nn.utils.clip_grad_norm_(W, clip or math.inf).item()
    check_finite({"the gradient's norm": norm})
    optimizer.step()
    optimizer.zero_grad()  # the next gradient needs the room
    return norm
