"""Forward-mode derivatives of what the model spends its time in, by hand. PyTorch's own multiply by the tangents of frozen weights, which are zero, have none of fused
attention, and take the softmax apart: with these a slope takes 0.6 times as long.

Within `Tangents` they stand in for the functions of torch.nn.functional. Of every Function: forward computes what PyTorch's would, jvp, of
the tangents of its arguments, the tangent of that.
"""
import torch
import torch.nn.functional as F
from torch.autograd.forward_ad import unpack_dual
from torch.overrides import TorchFunctionMode

from minisap.model import widen


class FrozenLinear(torch.autograd.Function):
    """y = x Wᵀ + b;  ẏ = ẋ Wᵀ."""

    @staticmethod
    def forward(x, weight, bias=None):
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def jvp(ctx, x, *_):
        return F.linear(x, *ctx.saved_tensors)


class CausalAttention(torch.autograd.Function):
    """y = P v, P = softmax of S = q kᵀ / √Dh, causal.  ẏ = Ṗ v + P v̇, Ṗ = P ∘ (Ṡ − (P ∘ Ṡ) 1)."""

    @staticmethod
    def forward(q, k, v):
        """q (B, H, T, Dh), k and v (B, K, T, Dh) -> (y (B, H, T, Dh), P (B, H, T, T), in float32 or wider)."""
        k, v = for_heads(q, k, v)
        future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        P = scores(q, k, q.shape[-1]).masked_fill_(future, -torch.inf).softmax(-1)
        return (P @ widen(v)).to(q.dtype), P

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs, output[1])

    @staticmethod
    def jvp(ctx, dq, dk, dv):
        q, k, v, P = ctx.saved_tensors
        k, v, dk, dv = for_heads(q, k, v, dk, dv)
        dP = scores(torch.cat((dq, q), dim=-1), torch.cat((k, dk), dim=-1), q.shape[-1]).mul_(P)
        dP.addcmul_(P, dP.sum(-1, keepdim=True), value=-1)
        return (dP @ widen(v) + P @ widen(dv)).to(q.dtype), dP


def for_heads(q, *grouped):
    """Keys and values (B, K, T, Dh) of every head of q, (B, H, T, Dh)."""
    return [x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in grouped]


def scores(q, k, size):
    return (widen(q) * size ** -0.5) @ widen(k).transpose(-1, -2)


class TokenNLL(torch.autograd.Function):
    """nll = log Σ exp z − z[target];  its tangent: softmax(z) · ż − ż[target]."""

    @staticmethod
    def forward(z, targets):
        """z (N, V), targets (N,) -> (N,)."""
        return F.cross_entropy(z, targets, reduction="none")

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, dz, _):
        z, targets = ctx.saved_tensors
        return z.softmax(-1).mul_(dz).sum(-1) - dz.gather(1, targets[:, None])[:, 0]


class Tangents(TorchFunctionMode):
    """Within: the functions above, wherever the model calls those they stand for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear and all(w is None or unpack_dual(w).tangent is None for w in args[1:]):
            return FrozenLinear.apply(*args)
        if func is F.scaled_dot_product_attention and kwargs.get("is_causal"):
            return CausalAttention.apply(*args)[0]
        if func is F.cross_entropy and kwargs == {"reduction": "none"}:
            return TokenNLL.apply(*args)
        return func(*args, **kwargs)
