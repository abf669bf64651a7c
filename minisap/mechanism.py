"""What safety fine-tuning did to a model: the measures of arXiv 2407.10264, for any two checkpoints of one architecture.

â       hidden activations of an MLP (after the gate, before down_proj) at the last prompt token
a       its input there
ΔW      W_after − W_before of a layer's MLP input matrices, gate_proj over up_proj: (2 · intermediate_size, hidden_size)
"""
import torch

from minisap.data import encode_prompt
from minisap.model import widen

ENERGY = 0.99                                                               # the share of ‖W‖² that spans its column space


@torch.no_grad()
def mlp_streams(model, tokenizer, prompts):
    """(a, â) of every layer at the last prompt token: (layers, prompts, D) and (layers, prompts, M), float32 or wider, on the CPU."""
    streams = [[], []]
    for prompt in prompts:
        seen, handles = [], []
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.down_proj):       # whose inputs are a and â
                handles.append(linear.register_forward_pre_hook(lambda module, inputs: seen.append(widen(inputs[0][0, -1]).cpu())))
        try:
            model.model(torch.tensor([encode_prompt(tokenizer, prompt)], device=model.lm_head.weight.device))
        finally:
            for handle in handles:
                handle.remove()
        streams[0].append(torch.stack(seen[0::2]))
        streams[1].append(torch.stack(seen[1::2]))
    return tuple(torch.stack(stream, dim=1) for stream in streams)


def tau(x, unsafe_mean, safe_mean):
    """τ(x) = ‖â − μ_unsafe‖ − ‖â − μ_safe‖ of every row of x (n, M): above 0, the prompt looks safe."""
    return (x - unsafe_mean).norm(dim=-1) - (x - safe_mean).norm(dim=-1)


def clusters(unsafe, safe):
    """Two clouds (n, M): {"separation": mean τ of safe − of unsafe prompts, "fisher": squared distance of the means over the sum
    of the total variances, "sigma1_unsafe", "sigma1_safe": share of the largest eigenvalue in the trace of the covariance}."""
    means = unsafe.mean(0), safe.mean(0)
    spread = [(x - mean).pow(2).sum() / (len(x) - 1) for x, mean in zip((unsafe, safe), means)]
    share = lambda x: (torch.linalg.svdvals(x - x.mean(0))[0] ** 2 / (x - x.mean(0)).pow(2).sum()).item()
    return {"separation": (tau(safe, *means).mean() - tau(unsafe, *means).mean()).item(),
            "fisher": ((means[0] - means[1]).pow(2).sum() / sum(spread)).item(),
            "sigma1_unsafe": share(unsafe), "sigma1_safe": share(safe)}


def mlp_matrix(model, layer):
    """The layer's gate_proj over its up_proj, both of which read a: (2M, D)."""
    mlp = model.model.layers[layer].mlp
    return torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach().to("cpu", torch.float64)


def column_space(W_before, delta, random_draws=200, seed=0):
    """How far ΔW leaves the column space of W_before. With P the projector on the top-r left singular vectors that hold 99 % of
    the energy of W_before, sin θ = ‖(I − P) u‖: {"sin_theta": its mean over the left singular vectors of ΔW, weighted by σ²,
    "sin_theta_top": of the first, "sin_theta_random": mean over random directions}. 1: in the left null space."""
    U, sigma, _ = torch.linalg.svd(W_before, full_matrices=False)
    energy = sigma.pow(2).cumsum(0) / sigma.pow(2).sum()
    U = U[:, :int((energy < ENERGY).sum()) + 1]
    u, s, _ = torch.linalg.svd(delta, full_matrices=False)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(len(U), random_draws, generator=generator, dtype=U.dtype)
    sine = lambda v: (1 - (U.T @ v).pow(2).sum(0)).clamp(min=0).sqrt()
    return {"sin_theta": (sine(u) @ s.pow(2) / s.pow(2).sum()).item(), "sin_theta_top": sine(u[:, :1]).item(),
            "sin_theta_random": sine(random / random.norm(dim=0)).mean().item(), "rank": U.shape[1]}


def row_space(delta, a):
    """How much ΔW sees of unit-normalised inputs a (n, D): {"delta_a": ‖ΔW a‖, "delta_a_top": |σ₁ v₁ᵀ a|}, means over rows."""
    a = (a / a.norm(dim=-1, keepdim=True)).to(delta)
    _, sigma, Vt = torch.linalg.svd(delta, full_matrices=False)
    return {"delta_a": (a @ delta.T).norm(dim=-1).mean().item(), "delta_a_top": (sigma[0] * a @ Vt[0]).abs().mean().item()}


def lipschitz(model, tokenizer, prompts):
    """At the last prompt token, means over prompts: {"lipschitz": ‖∇_E max_j logit_j‖ with E the prompt's embeddings,
    "lipschitz_relative": ‖E‖ ‖∇_E log(max_j logit_j − mean_j logit_j)‖, which no scaling of E or of the logits changes}."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=model.lm_head.weight.device)
        E = model.model.embed_tokens(ids).detach()
        probe = {-1: torch.zeros_like(E, requires_grad=True)}
        logits = widen(model.lm_head(model.model(ids, probe)[0, -1]))
        raw, = torch.autograd.grad(logits.max(), probe[-1], retain_graph=True)
        relative, = torch.autograd.grad((logits.max() - logits.mean()).log(), probe[-1])
        found.append((widen(raw).norm().item(), (widen(E).norm() * widen(relative).norm()).item()))
    return {name: sum(column) / len(found) for name, column in zip(("lipschitz", "lipschitz_relative"), zip(*found))}


@torch.no_grad()
def interpolate(model, before, after, alpha):
    """Put W_before + α (W_after − W_before) into `model`, of all weights; α beyond 1 extrapolates."""
    for w, b, a in zip(model.parameters(), before.parameters(), after.parameters()):
        w.copy_(b + alpha * (a - b))
