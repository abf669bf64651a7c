"""What is computed once, or not at all: the same numbers as without, by fewer FLOPs, which PyTorch counts."""
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from benchmark import flops
from minisap.data import collate, collate_pairs
from minisap.lora import add_lora
from minisap.sap import row_slopes, safety_loss, share, token_nll, unit, useful_loss
from minisap.tangents import Attention, FrozenLinear, TokenNLL
from tiny import BASE, tiny_model

MODEL = BASE | {"num_hidden_layers": 3}


def example(*ids, prompt=2):
    return {"input_ids": list(ids), "labels": [-100] * prompt + list(ids[prompt:])}


ROWS = [example(5, 6, 7, 8, 9, 10), example(5, 6, 7, 3), example(5, 6, 7, 8, 9, 10), example(4, 6, 7, 8, 9), example(5, 6, 0, 0, 0, 0, 0, 0, prompt=3)]
BATCH = collate(ROWS)                   # the second row's padding looks like the last one's tokens


@pytest.fixture
def model():
    return tiny_model(MODEL)


def counted(value):
    """FLOPs of value(), forward and backward, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        value()
    return counter.get_total_flops()


def by_logits(model, batch, probe=None):
    """The mean cross-entropy by every logit of every row."""
    return F.cross_entropy(model(batch["input_ids"], probe)[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize("per_token", [False, True])
def test_shared_tokens_change_neither_loss_nor_gradients(per_token, model):
    """Those of the weights, and of a probe; one that differs from token to token keeps them apart."""
    D, W = model.config.hidden_size, list(model.parameters())
    V = {j: torch.randn(*BATCH["input_ids"].shape[:2 * per_token], D, generator=torch.Generator().manual_seed(j + 1), dtype=W[0].dtype).requires_grad_() for j in (-1, 1)}
    found, expected = (torch.autograd.grad(loss(model, BATCH, V), [*W, *V.values()]) for loss in (useful_loss, by_logits))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert len(share(BATCH, per_token).first) == (6 + 4 + 6 + 5 + 8 if per_token else 6 + 1 + 0 + 5 + 6)


def test_hidden_states_are_those_of_every_row(model):
    whole, shared = [], []
    model.model(BATCH["input_ids"], hidden=whole)
    token_nll(model, BATCH, hidden=shared)
    for a, b in zip(whole, shared, strict=True):
        torch.testing.assert_close(a[BATCH["labels"] != -100], b[BATCH["labels"] != -100])


def test_a_row_that_comes_twice_and_padding_cost_nothing_but_attention_and_logits(model):
    """(Of those the counter sees the logits alone: fused attention on a CPU is not counted.)"""
    config, batches = model.config, [collate(rows) for rows in (ROWS[:1], [ROWS[0], ROWS[0]], ROWS)]
    for batch in batches:
        tokens, labels = len(share(batch).first), (batch["labels"][:, 1:] != -100).sum().item()
        attention = 4 * config.hidden_size * config.hidden_size * (1 + config.n_kv_heads / config.n_heads)
        each = config.n_layers * (attention + 6 * config.hidden_size * config.intermediate_size)
        with torch.no_grad():
            assert counted(lambda: useful_loss(model, batch)) == tokens * each + 2 * labels * config.hidden_size * config.vocab_size


LINEAR = [torch.randn(3, 5, 6), torch.randn(4, 6), torch.randn(4)]
HEADS = [torch.randn(2, 4, 5, 6), torch.randn(2, 2, 5, 6), torch.randn(2, 2, 5, 6)]
CLASSES = [3 * torch.randn(7, 11), torch.arange(7)]


@pytest.mark.parametrize("function, ours, arguments, moving", [
    (F.linear, FrozenLinear.apply, LINEAR, 1), (F.linear, FrozenLinear.apply, LINEAR[:2], 1), (lambda z, y: F.cross_entropy(z, y, reduction="none"), TokenNLL.apply, CLASSES, 1),
    (lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True), lambda *qkv: Attention.apply(*qkv)[0], HEADS, 3)])
def test_tangents_by_hand_are_the_limits_of_differences(function, ours, arguments, moving):
    """Central ones, in float64; and the value is PyTorch's."""
    arguments = [x.double() if x.is_floating_point() else x for x in arguments]
    tangents, h = [torch.randn_like(x) for x in arguments[:moving]], 1e-6
    moved = lambda step: function(*(x + step * t for x, t in zip(arguments, tangents)), *arguments[moving:])
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(ours(*map(forward_ad.make_dual, arguments, tangents), *arguments[moving:]))
    torch.testing.assert_close(value, function(*arguments))
    torch.testing.assert_close(tangent, (moved(h) - moved(-h)) / (2 * h), rtol=1e-6, atol=1e-8)


def test_slopes_cost_two_forward_passes_and_what_lora_and_attention_take(model):
    """Of a linear layer that is frozen, what moves goes through once; PyTorch's own forward mode would multiply by its tangent, of zeros, too."""
    batch, pairs = collate(ROWS), collate_pairs([(ROWS[1], ROWS[2])])
    with torch.no_grad():
        forward = counted(lambda: useful_loss(model, batch))
    W = add_lora(model, r=1)
    direction = unit(torch.autograd.grad(safety_loss(model, pairs), W))
    config, (B, T), tokens = model.config, batch["input_ids"].shape, len(share(batch).first)
    attention = config.n_layers * 7 * 2 * B * T * T * config.hidden_size                        # q k, P v; (q̇, q) (k, k̇), twice as wide; Ṗ v, P v̇, and one to spare
    lora = config.n_layers * 2 * 6 * tokens * 4 * config.hidden_size
    assert forward < counted(lambda: row_slopes(model, W, direction, batch)) < 2 * forward + attention + lora


def test_the_benchmark_s_flops_are_those_that_pytorch_counts(model):
    """But for attention, which the counter does not see on a CPU."""
    whole, tokens = flops(model.config, BATCH, 1), len(share(BATCH).first)
    B, T = BATCH["input_ids"].shape
    attention = model.config.n_layers * 2 * B * T * T * model.config.hidden_size
    with torch.no_grad():
        assert counted(lambda: useful_loss(model, BATCH)) == whole - attention
        assert counted(lambda: by_logits(model, BATCH)) == flops(model.config, BATCH, 1, shared=False) - attention
