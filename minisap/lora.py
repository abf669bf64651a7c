"""LoRA (arXiv 2106.09685): y = W x + (alpha / r) B A x, with W frozen and B zero at the start."""

import math

import torch
import torch.nn as nn


class LoRALinear(nn.Linear):
    """A linear layer that keeps its name and frozen weight and gains lora_A (r, in) and lora_B (out, r)."""

    def __init__(self, linear, r, alpha, generator):
        nn.Module.__init__(self)  # nn.Linear's would allocate a second weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / r
        dtype, bound = (
            torch.promote_types(linear.weight.dtype, torch.float32),
            1 / math.sqrt(linear.in_features),
        )
        A = (
            torch.rand(r, linear.in_features, generator=generator, dtype=torch.float64) * 2 - 1
        ) * bound  # as peft
        self.lora_A = nn.Parameter(A.to(linear.weight.device, dtype))
        self.lora_B = nn.Parameter(
            torch.zeros(linear.out_features, r, device=linear.weight.device, dtype=dtype)
        )

    def forward(self, x):
        low_rank = self.scale * (
            x.to(self.lora_A.dtype) @ self.lora_A.T
        )  # scaled here, where it is small
        return super().forward(x) + (low_rank @ self.lora_B.T).to(x.dtype)


def lora_layers(model):
    """[(name, parent, attribute, layer)] of every LoRALinear."""
    return [found for found in linear_layers(model) if isinstance(found[3], LoRALinear)]


def linear_layers(model):
    return [
        (f"{name}.{attribute}".lstrip("."), parent, attribute, layer)
        for name, parent in model.named_modules()
        for attribute, layer in parent.named_children()
        if isinstance(layer, nn.Linear)
    ]


def add_lora(model, r=8, alpha=16, targets=("q_proj", "v_proj"), seed=0) -> list[nn.Parameter]:
    """Freeze the model and give every linear layer called as one of `targets` a LoRA branch (float32 or wider).
    Returns W, the new parameters, [A, B, A, B, …] from the first layer to the last. Deterministic in `seed`."""
    model.requires_grad_(False)
    generator, W = torch.Generator().manual_seed(seed), []
    if "lm_head" in targets and model.config.tie_word_embeddings:
        raise ValueError(
            "lora targets: lm_head is tied to the embedding here, and would change it too when merged"
        )
    unknown = set(targets) - {attribute for _, _, attribute, _ in linear_layers(model)}
    if unknown:
        raise ValueError(f"lora targets {sorted(unknown)} are not linear layers of this model")
    for _, parent, attribute, layer in linear_layers(model):
        if attribute in targets:
            setattr(parent, attribute, LoRALinear(layer, r, alpha, generator))
            W += [getattr(parent, attribute).lora_A, getattr(parent, attribute).lora_B]
    return W


@torch.no_grad()
def merge_lora(model):
    """Add every LoRA branch into its frozen weight, in place, and return to plain linear layers."""
    for _, parent, attribute, layer in lora_layers(model):
        layer.weight.copy_(
            layer.weight + layer.scale * (layer.lora_B @ layer.lora_A)
        )  # promoted, then rounded once
        del layer.lora_A, layer.lora_B
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        setattr(parent, attribute, plain)
