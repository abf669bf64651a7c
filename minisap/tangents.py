"""Forward-mode derivatives of what the model spends its time in, by hand. PyTorch's own multiply by the tangents of frozen weights, which
are zero, have none of fused attention, and of the cross-entropy one that cannot be differentiated again.

Within `Tangents` they stand in for the functions of torch.nn.functional. Each returns what PyTorch's would and the tangent of that, both in operations that
autograd knows: the probe on hidden states is the gradient of a tangent.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from minisap.model import widen


def is_moving(x):
    return isinstance(x, torch.Tensor) and unpack_dual(x).tangent is not None


def parts(x):
    """(x, ẋ), ẋ zero where nothing moves."""
    x, dx = unpack_dual(x)
    return x, torch.zeros_like(x) if dx is None else dx


def frozen_linear(x, weight, bias=None):
    """y = x Wᵀ + b;  ẏ = ẋ Wᵀ."""
    x, dx = unpack_dual(x)
    return make_dual(F.linear(x, weight, bias), F.linear(dx, weight))


def causal_attention(q, k, v):
    """q (B, H, T, Dh), k and v (B, K, T, Dh) -> y (B, H, T, Dh) = P v, P = softmax of S = q kᵀ / √Dh, causal.
    ẏ = Ṗ v + P v̇, Ṗ = P ∘ (Ṡ − (P ∘ Ṡ) 1).  In between in float32 or wider."""
    (q, dq), (k, dk), (v, dv), dtype = *map(parts, (q, k, v)), q.dtype
    k, dk, v, dv = (
        widen(x).repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, dk, v, dv)
    )
    q, dq = (widen(x) * x.shape[-1] ** -0.5 for x in (q, dq))
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    P = (q @ k.mT).masked_fill(future, -torch.inf).softmax(-1)
    P_dS = P * (dq @ k.mT + q @ dk.mT)
    dP = torch.addcmul(P_dS, P, P_dS.sum(-1, keepdim=True), value=-1)
    return make_dual((P @ v).to(dtype), (dP @ v + P @ dv).to(dtype))


def cross_entropy(z, targets):
    """z (N, V), targets (N,) -> (N,) log Σ exp z − z[target];  its tangent: softmax(z) · ż − ż[target]."""
    z, dz = unpack_dual(z)
    return make_dual(
        F.cross_entropy(z, targets, reduction="none"),
        (z.softmax(-1) * dz).sum(-1) - dz.gather(1, targets[:, None])[:, 0],
    )


class Tangents(TorchFunctionMode):
    """Within: the functions above, wherever the model calls those they stand for with something that moves."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear and is_moving(args[0]) and not any(map(is_moving, args[1:])):
            return frozen_linear(*args)
        if (
            func is F.scaled_dot_product_attention
            and kwargs.get("is_causal")
            and any(map(is_moving, args))
        ):
            return causal_attention(*args)
        if func is F.cross_entropy and kwargs.get("reduction") == "none" and is_moving(args[0]):
            return cross_entropy(*args)
        return func(*args, **kwargs)


class Called(nn.Module):
    """A model within another, whose forward, which is what functional_call calls, is any function of it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, f):
        return f(self.model)


def derivative_along(model, W, direction, f):
    """d f(model) / dt as W moves by t · direction, at t = 0, by forward-mode differentiation; it can itself be differentiated by all but W.
    (Checkpointing would compute layers anew when nothing moves any more, and rests.)"""
    called, checkpointing = Called(model), model.model.checkpointing
    names = {id(w): name for name, w in called.named_parameters()}
    model.model.checkpointing = False
    try:
        with dual_level(), Tangents():
            moving = {
                names[id(w)]: make_dual(w.detach(), d.to(w.dtype)) for w, d in zip(W, direction)
            }
            return unpack_dual(functional_call(called, moving, (f,))).tangent
    finally:
        model.model.checkpointing = checkpointing
