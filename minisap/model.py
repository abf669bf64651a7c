"""The Llama family in plain PyTorch: Llama 2, 3, 3.1 and 3.2, Vicuna, TinyLlama, SmolLM2, Mistral, Qwen2 and Qwen2.5.

Shapes   B batch, T tokens, S cached + new tokens, D hidden_size, H n_heads, K n_kv_heads, Dh head_dim, V vocab_size.
Names    Every parameter is called as in the public safetensors files, so that loading is one strict comparison.
The probe is an argument of `forward`: x_j = layer_j(x_{j-1}) + v_j  (SAP, arXiv 2505.16737).
"""

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minisap.config import LlamaConfig


def rope_frequencies(config: LlamaConfig, device=None) -> torch.Tensor:
    """Radians per position of each rotated pair, (Dh/2,), float32 as in training of the public checkpoints."""
    exponent = (
        torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    )
    frequency = 1.0 / config.rope_theta**exponent
    if config.rope_scaling is None:
        return frequency
    # Llama 3.1: wavelengths beyond the old context are stretched by `factor`, short ones stay, a linear ramp lies between.
    s = config.rope_scaling
    turns = (
        s["original_max_position_embeddings"] * frequency / (2 * math.pi)
    )  # full turns within the old context
    ramp = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
    return torch.lerp(frequency / s["factor"], frequency, ramp.clamp(0, 1))


def rope_of(config, positions, dtype):
    """(cos, sin) with which `rotate` turns tokens at positions (B, T), both (B, T, 1, Dh); of sin the first half is negative."""
    angle = positions[..., None, None] * rope_frequencies(config, positions.device)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def widen(x):
    """In float32 or wider (not .float(): that would round float64 down): sums of squares over- and underflow in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(x, cos, sin):
    """RoPE in Hugging Face's split-half layout: feature i turns with feature i + Dh/2.  x: (B, T, heads, Dh)."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = widen(x)
        mean_square = (wide * wide).sum(-1, keepdim=True) / x.shape[-1]
        return self.weight * (wide * torch.rsqrt(mean_square + self.eps)).to(x.dtype)


def distinct_prefixes(rows, apart=False):
    """(numbers, origins) of rows, lists of ids: what a causal model makes of a token depends on it and those before it, its prefix, alone,
    so that rows which begin alike have their beginning in common. numbers: of every row's tokens those of their prefixes, in the order in
    which they come up; origins: of every number the (row, column) where it does. apart: no two rows have anything in common."""
    known, numbers, origins = {}, [], []
    for i, row in enumerate(rows):
        number, line = -1 - i * apart, []
        for j, token in enumerate(row):
            number = known.setdefault((number, token), len(known))
            line.append(number)
            if number == len(origins):
                origins.append((i, j))
        numbers.append(line)
    return numbers, origins


class Prefixes(NamedTuple):
    """By which N tokens stand for the B · T of a batch: what rows have in common at their beginning once, and no padding. (F.embedding has
    a faster derivative than an index.)"""

    number: torch.Tensor  # (B, T): which of the N stands for each; any of them, for padding
    origin: torch.Tensor  # (N,): which of the B · T each is taken from

    @classmethod
    def of(cls, rows, T, device, apart=False, left=False):
        """Of rows, lists of ids, that are padded to T on the right, or on the left."""
        numbers, origins = distinct_prefixes(rows, apart)
        pads = [(T - len(row)) * left for row in rows]
        whole = [[0] * pad + line + [0] * (T - pad - len(line)) for pad, line in zip(pads, numbers)]
        integers = lambda numbers: torch.tensor(numbers, dtype=torch.long, device=device)
        return cls(
            integers(whole).reshape(len(rows), T),
            integers([i * T + pads[i] + j for i, j in origins]),
        )

    def fold(self, x):
        """(B, T, ·) -> (1, N, ·)."""
        return F.embedding(self.origin, x.flatten(0, 1))[None]

    def unfold(self, x):
        """(1, N, ·) -> (B, T, ·); what comes out for padding means nothing."""
        return F.embedding(self.number, x[0])


class KVCache:
    """Keys and values of one layer, (B, K, S, Dh), written in place as tokens arrive."""

    def __init__(self, config, batch, length, device, dtype):
        shape = (batch, config.n_kv_heads, length, config.head_dim)
        self.k, self.v = (torch.empty(shape, device=device, dtype=dtype) for _ in "kv")
        self.used = 0

    def append(self, k, v):
        new = slice(self.used, self.used + k.shape[2])
        self.k[:, :, new], self.v[:, :, new], self.used = k, v, new.stop
        return self.k[:, :, : self.used], self.v[:, :, : self.used]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, Dh, bias = config.hidden_size, config.head_dim, config.qkv_bias
        self.head_dim = Dh
        self.q_proj = nn.Linear(D, config.n_heads * Dh, bias=bias)
        self.k_proj = nn.Linear(D, config.n_kv_heads * Dh, bias=bias)
        self.v_proj = nn.Linear(D, config.n_kv_heads * Dh, bias=bias)
        self.o_proj = nn.Linear(config.n_heads * Dh, D, bias=False)

    def forward(self, x, rope, mask, cache, prefixes=None):
        """x (B, T, D) -> (B, T, D).  rope: (cos, sin) of every token, see rotate.  mask (B, 1, T, S) or None for causal.
        cache: this layer's KVCache while generating, else None.  prefixes: x is (1, N, D), as is what is returned; each row attends by itself."""
        by_head = lambda one: one.unflatten(2, (-1, self.head_dim))  # (B, T, heads, Dh)
        q, k = (
            rotate(by_head(project(x)), *rope).flatten(2) for project in (self.q_proj, self.k_proj)
        )
        v = self.v_proj(x)
        if prefixes is not None:  # they are of N tokens so far
            q, k, v = map(prefixes.unfold, (q, k, v))
        q, k, v = (
            by_head(one).transpose(1, 2) for one in (q, k, v)
        )  # (B, H, T, Dh), and (B, K, T, Dh) twice
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, S, Dh)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        y = y.transpose(1, 2).flatten(2)  # (B, T, H · Dh)
        return self.o_proj(y if prefixes is None else prefixes.fold(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x, streams=None):
        hidden = F.silu(self.gate_proj(x)) * self.up_proj(x)
        if streams is not None:
            streams.append((x, hidden))
        return self.down_proj(hidden)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rope, mask, cache, prefixes=None, mlp_streams=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, prefixes)
        return x + self.mlp(self.post_attention_layernorm(x), mlp_streams)


class Decoder(nn.Module):
    """Everything below the output head: input_ids (B, T) -> final hidden states (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing = False  # True: of each layer its input alone is kept for the backward pass, which computes the rest anew

    def forward(
        self,
        input_ids,
        probe=None,
        positions=None,
        mask=None,
        caches=None,
        prefixes=None,
        hidden=None,
        mlp_streams=None,
    ):
        """probe {layer: v}: v is added to that layer's output (-1: to the embeddings) and broadcasts to (B, T, D).
        positions (B, T): place of each token, default 0…T-1.  mask (B, 1, T, S): True where attention is allowed, default
        causal.  prefixes: a Prefixes, by which what rows have in common is computed once (with the probe of its origin), and padding not at all: what
        is returned for that means nothing.  hidden: a list that receives every layer's output, (B, T, D), probe included.  mlp_streams: one that receives
        every MLP's input (B, T, D) and hidden activations (B, T, M), with prefixes (1, N, ·)."""
        fold, unfold = (
            (prefixes.fold, prefixes.unfold) if prefixes is not None else (lambda x: x, lambda x: x)
        )
        probe = {
            j: v if v.dim() == 1 else fold(v.expand(*input_ids.shape, -1))
            for j, v in (probe or {}).items()
        }
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        if prefixes is not None:
            input_ids, positions = (
                x.expand(input_ids.shape).flatten()[prefixes.origin][None]
                for x in (input_ids, positions)
            )  # (1, N)
        x = self.embed_tokens(input_ids)  # (B, T, D), or (1, N, D)
        rope = rope_of(self.config, positions, x.dtype)
        if -1 in probe:
            x = x + probe[-1].to(x.dtype)
        keeps = (
            not self.checkpointing
            or caches
            or mlp_streams is not None
            or not torch.is_grad_enabled()
        )
        for j, layer in enumerate(self.layers):
            if keeps:
                x = layer(x, rope, mask, caches[j] if caches else None, prefixes, mlp_streams)
            else:
                x = checkpoint(layer, x, rope, mask, None, prefixes, use_reentrant=False)
            if j in probe:
                x = x + probe[j].to(x.dtype)
            if hidden is not None:
                hidden.append(unfold(x))
        return unfold(self.norm(x))


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self):
        """One tensor for embedding and head where the config says so (to be called again after tensors were replaced)."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids, probe=None):
        """input_ids (B, T) -> logits (B, T, V). Right padding needs no mask: attention is causal."""
        return self.lm_head(self.model(input_ids, probe))

    @torch.no_grad()
    def generate(
        self, prompts, max_new_tokens, stop_ids=(), temperature=0.0, generator=None, probe=None
    ):
        """Continue each prompt (a list of token ids): greedily, or by sampling at a temperature > 0. A probe of shape (B, T, D) acts on
        the prompts, which are padded on the left, one of shape (D,) on what is new, too. Returns one list of new ids per prompt, cut
        before its first stop id."""
        device, B, longest = self.lm_head.weight.device, len(prompts), max(map(len, prompts))
        ids = torch.tensor(
            [[0] * (longest - len(p)) + list(p) for p in prompts], device=device
        )  # left padding
        pads = torch.tensor([longest - len(p) for p in prompts], device=device)[:, None]  # (B, 1)
        place = torch.arange(longest + max_new_tokens, device=device)  # of every key
        # A query sees the keys up to its own that are not padding; a padding query sees itself, lest its softmax is empty.
        allowed = (place[None, :, None] >= place) & (
            (place >= pads)[:, None] | (place[:, None] == place)
        )  # (B, S, S)
        caches = [
            KVCache(self.config, B, len(place), device, self.lm_head.weight.dtype)
            for _ in self.model.layers
        ]
        prefixes = Prefixes.of(prompts, longest, device, apart=per_token(probe), left=True)
        new, done, start = [], torch.zeros(B, dtype=torch.bool, device=device), 0
        stop = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
        for end in range(longest, longest + max_new_tokens):
            positions = (place[start:end] - pads).clamp(min=0)
            x = self.model(
                ids, probe, positions, allowed[:, None, start:end, :end], caches, prefixes
            )
            ids, start, prefixes = (
                pick(self.lm_head(x[:, -1]), temperature, generator)[:, None],
                end,
                None,
            )  # (B, 1)
            probe = {j: v for j, v in (probe or {}).items() if v.dim() == 1}
            new.append(ids)
            done |= torch.isin(ids[:, 0], stop)
            if done.all():
                break
        return [cut_at_stop(row, set(stop_ids)) for row in torch.cat(new, dim=1).tolist()]


def per_token(probe):
    """Whether a probe differs from token to token, so that rows which begin alike need not stay alike."""
    return any(v.dim() > 1 for v in (probe or {}).values())


def pick(logits, temperature, generator):
    """Next token ids (B,) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(widen(logits) / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def cut_at_stop(ids, stop_ids):
    return ids[: next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))]
