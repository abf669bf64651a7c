"""Safety-Aware Probing (arXiv 2505.16737), one function per line of its Algorithm 1."""
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def response_nll(model, batch, probe=None, hidden=None):
    """(sum, count), both (B,): negative log-likelihood of each row's labelled tokens in nats, and how many they are."""
    x = model.model(batch["input_ids"], probe, hidden=hidden)                       # (B, T, D)
    targets = batch["labels"][:, 1:]                                                # the token after each position
    rows, columns = (targets != -100).nonzero(as_tuple=True)
    logits = model.lm_head(x[rows, columns])                                        # logits only where a label is
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(wide, targets[rows, columns], reduction="none")
    total = torch.zeros(len(targets), dtype=nll.dtype, device=nll.device)
    return total.index_add(0, rows, nll), (targets != -100).sum(1)


def useful_loss(model, batch, probe=None, hidden=None):
    total, count = response_nll(model, batch, probe, hidden)
    return total.sum() / count.sum()


def safety_loss(model, safe, harmful):
    safe_total, safe_count = response_nll(model, safe)
    harmful_total, harmful_count = response_nll(model, harmful)
    return (safe_total / safe_count - harmful_total / harmful_count).mean()


def inner(a, b):
    return sum((x * y).sum() for x, y in zip(a, b))


def unit(tensors):
    norm = torch.sqrt(inner(tensors, tensors))
    return [t / norm if norm > 0 else torch.zeros_like(t) for t in tensors]


def harmful_direction(model, W, safe, harmful):
    return unit(torch.autograd.grad(safety_loss(model, safe, harmful), W))
