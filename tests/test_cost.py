"""What is computed once, or not at all: the same numbers as without, by fewer FLOPs, which PyTorch counts."""

import pytest
import torch
import torch.nn.functional as F
from benchmark import flops, probe_flops
from tiny import BASE, tiny_model
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.utils.flop_counter import FlopCounterMode

from minisap import tangents
from minisap.data import collate, collate_pairs
from minisap.lora import add_lora
from minisap.losses import prefixes_of, token_nll
from minisap.sap import probe_gradient, row_slopes, safety_loss, unit, useful_loss
from minisap.tangents import Tangents

MODEL = BASE | {"num_hidden_layers": 3}


def example(*ids, prompt=2):
    return {"input_ids": list(ids), "labels": [-100] * prompt + list(ids[prompt:])}


ROWS = [
    example(5, 6, 7, 8, 9, 10),
    example(5, 6, 7, 3),
    example(5, 6, 7, 8, 9, 10),
    example(4, 6, 7, 8, 9),
    example(5, 6, 0, 0, 0, 0, 0, 0, prompt=3),
]
BATCH = collate(ROWS)  # the second row's padding looks like the last one's tokens


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
    return F.cross_entropy(
        model(batch["input_ids"], probe)[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )


@pytest.mark.parametrize("per_token", [False, True])
def test_what_is_computed_once_changes_neither_loss_nor_gradients(per_token, model):
    """Those of the weights, and of a probe; one that differs from token to token keeps them apart."""
    D, W = model.config.hidden_size, list(model.parameters())
    V = {
        j: torch.randn(
            *BATCH["input_ids"].shape[: 2 * per_token],
            D,
            generator=torch.Generator().manual_seed(j + 1),
            dtype=W[0].dtype,
        ).requires_grad_()
        for j in (-1, 1)
    }
    found, expected = (
        torch.autograd.grad(loss(model, BATCH, V), [*W, *V.values()])
        for loss in (useful_loss, by_logits)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert len(prefixes_of(BATCH, per_token).origin) == (
        5 + 3 + 5 + 4 + 7 if per_token else 5 + 0 + 0 + 4 + 5
    )
    assert len(prefixes_of(BATCH, per_token, whole=True).origin) == (
        6 + 4 + 6 + 5 + 8 if per_token else 6 + 1 + 0 + 5 + 6
    )


def test_hidden_states_are_those_of_every_row(model):
    whole, shared = [], []
    model.model(BATCH["input_ids"], hidden=whole)
    token_nll(model, BATCH, hidden=shared)
    for a, b in zip(whole, shared, strict=True):
        torch.testing.assert_close(a[BATCH["labels"] != -100], b[BATCH["labels"] != -100])


def linear_flops(config, tokens):
    """Of every layer's matrices (k and v have half as many heads as q)."""
    return (
        2
        * tokens
        * config.n_layers
        * 3
        * config.hidden_size
        * (config.hidden_size + config.intermediate_size)
    )


def head_flops(config, rows):
    return (
        2
        * sum(label != -100 for row in rows for label in row["labels"])
        * config.hidden_size
        * config.vocab_size
    )


@pytest.mark.parametrize(
    "rows, tokens", [(ROWS[:1], 5), ([ROWS[0], ROWS[0]], 5), ([ROWS[0], ROWS[3]], 9), (ROWS, 14)]
)
def test_what_rows_have_in_common_what_follows_the_last_prediction_and_padding_cost_nothing_but_attention_and_logits(
    rows, tokens, model
):
    """(Of those the counter sees the logits alone: fused attention on a CPU is not counted.)"""
    with torch.no_grad():
        found = counted(lambda: useful_loss(model, collate(rows)))
    assert found == linear_flops(model.config, tokens) + head_flops(model.config, rows)


def test_prompts_are_computed_once_and_answered_as_alone(model):
    """Where a probe is each token's own, nothing is shared, and answers are the same, too."""
    prompts, apart = (
        [[5, 6, 7, 8], [5, 6, 7], [5, 6, 9, 9], [3]],
        {-1: torch.zeros(4, 4, model.config.hidden_size, dtype=torch.float64)},
    )
    answers = lambda probe: model.generate(prompts, 3, probe=probe)
    assert answers(None) == answers(apart) == [model.generate([prompt], 3)[0] for prompt in prompts]
    saved = counted(lambda: answers(apart)) - counted(lambda: answers(None))
    assert saved == linear_flops(model.config, (4 + 3 + 4 + 1) - (4 + 0 + 2 + 1))


RANDOM = torch.Generator().manual_seed(0)
LINEAR, HEADS = (
    [torch.randn(shape, generator=RANDOM) for shape in shapes]
    for shapes in (((3, 5, 6), (4, 6), (4,)), ((2, 4, 5, 6), (2, 2, 5, 6), (2, 2, 5, 6)))
)
CLASSES = [3 * torch.randn(7, 11, generator=RANDOM), torch.arange(7)]
linear, attention, cross_entropy = (
    F.linear,
    lambda *qkv: F.scaled_dot_product_attention(
        *qkv, attn_mask=None, is_causal=True, enable_gqa=True
    ),
    lambda z, y: F.cross_entropy(z, y, reduction="none"),
)


@pytest.mark.parametrize(
    "function, arguments, moving",
    [
        (linear, LINEAR, 1),
        (linear, LINEAR[:2], 1),
        (linear, LINEAR, 2),
        (linear, LINEAR, 3),
        (cross_entropy, CLASSES, 1),
        (attention, HEADS, 1),
        (attention, HEADS, 2),
        (attention, HEADS, 3),
    ],
)
def test_tangents_by_hand_are_the_limits_of_differences(function, arguments, moving):
    """Central ones, in float64, whichever of the arguments move; and the value is PyTorch's."""
    arguments = [x.double() if x.is_floating_point() else x for x in arguments]
    tangents, h = (
        [torch.randn(x.shape, generator=RANDOM, dtype=x.dtype) for x in arguments[:moving]],
        1e-6,
    )
    moved = lambda step: function(
        *(x + step * t for x, t in zip(arguments, tangents)), *arguments[moving:]
    )
    with dual_level(), Tangents():
        value, tangent = unpack_dual(
            function(*map(make_dual, arguments, tangents), *arguments[moving:])
        )
    torch.testing.assert_close(value, function(*arguments))
    torch.testing.assert_close(tangent, (moved(h) - moved(-h)) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "function, arguments, moving",
    [(linear, LINEAR, 1), (cross_entropy, CLASSES, 1), (attention, HEADS, 3)],
)
def test_tangents_by_hand_in_half_precision_are_those_in_double(function, arguments, moving, dtype):
    def tangent(dtype):
        moved = [make_dual(x.to(dtype), torch.ones_like(x).to(dtype)) for x in arguments[:moving]]
        return unpack_dual(
            function(
                *moved, *(x.to(dtype) if x.is_floating_point() else x for x in arguments[moving:])
            )
        ).tangent

    with dual_level(), Tangents():
        torch.testing.assert_close(
            tangent(dtype).double(), tangent(torch.float64), rtol=0.02, atol=0.03
        )


def test_the_model_calls_the_tangents_by_hand(model, monkeypatch):
    """By the way in which it calls what they stand for; in the first layer nothing that the key is made from moves."""
    calls = []
    for name in ("frozen_linear", "causal_attention", "cross_entropy"):
        monkeypatch.setattr(
            tangents,
            name,
            lambda *args, name=name, function=getattr(tangents, name): (
                calls.append(name) or function(*args)
            ),
        )
    W = add_lora(model, r=1)
    row_slopes(model, W, [torch.ones_like(w) for w in W], BATCH, min_tokens=1)
    assert calls == [
        "causal_attention",
        *["frozen_linear"] * 4,
        *[*["frozen_linear"] * 3, "causal_attention", *["frozen_linear"] * 4] * 2,
        "frozen_linear",
        "cross_entropy",
    ]


def test_a_slope_costs_two_forward_passes_and_the_probe_its_way_back_from_it(model):
    """Through a linear layer that is frozen what moves goes once. (PyTorch's own forward mode multiplies by its tangent, of zeros, too.)"""
    W, pairs, r, tokens = add_lora(model, r=1), collate_pairs([(ROWS[1], ROWS[2])]), 1, 14
    direction, config = unit(torch.autograd.grad(safety_loss(model, pairs), W)), model.config
    (B, T), D = BATCH["input_ids"].shape, config.hidden_size
    inputs = (
        2 * tokens * 2 * D * D
    )  # q, k and v of the first layer, into which nothing goes that moves
    lora = (
        3 * 2 * tokens * r * (4 * D - D // 2)
    )  # of each layer: each of q's and v's two products, itself and with either factor's tangent
    heads = 6 * 2 * B * T * T * D  # likewise: q k, P v; q̇ k, q k̇; Ṗ v, P v̇
    slope = (
        2 * (linear_flops(config, tokens) + head_flops(config, ROWS))
        - inputs
        + config.n_layers * (lora + heads)
    )
    assert counted(lambda: row_slopes(model, W, direction, BATCH, min_tokens=1)) == slope
    # The probe's gradient takes the way back of x and of ẋ, too, down to the lowest probed layer, and none through a weight.
    probe = {
        lowest: counted(
            lambda: probe_gradient(model, W, direction, BATCH, list(range(lowest, config.n_layers)))
        )
        for lowest in (1, 2)
    }
    assert probe[2] == slope + 2 * head_flops(config, ROWS)
    assert (
        probe[1]
        == probe[2] + 2 * linear_flops(config, tokens) // config.n_layers + lora + 2 * heads
    )  # of each product either factor
    # The benchmark's count leaves out LoRA, and takes attention for fused: two products, a half of each.
    fused = 2 * B * T * T * D
    assert probe_flops(config, BATCH, 1) == probe[1] + inputs - config.n_layers * (
        lora + heads
    ) - lora - 2 * heads + 2 * fused * (config.n_layers + 1)


def test_the_benchmark_s_flops_are_those_that_pytorch_counts(model):
    """But for attention, which the counter does not see on a CPU."""
    B, T = BATCH["input_ids"].shape
    unseen = model.config.n_layers * 2 * B * T * T * model.config.hidden_size
    with torch.no_grad():
        assert counted(lambda: useful_loss(model, BATCH)) == flops(model.config, BATCH, 1) - unseen
        assert (
            counted(lambda: by_logits(model, BATCH))
            == flops(model.config, BATCH, 1, distinct=False) - unseen
        )
