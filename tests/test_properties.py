"""What holds of all rows, messages, batches and gradients, tried on those that hypothesis finds."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import SPECIALS, tiny_model, write_tokenizer

from minisap import checkpoint
from minisap.data import batch_rows, collate, encode_example, encode_prompt, poison_rows, split_rows
from minisap.model import distinct_prefixes
from minisap.sap import fit_probe, inner, project_out_harm, unit
from minisap.support.distributed import shares
from minisap.tokenizer import FORMATS, Tokenizer

settings.register_profile(
    "offline", max_examples=60, deadline=None, derandomize=True, database=None
)
settings.load_profile("offline")
numbers = st.floats(-1e3, 1e3).map(lambda x: round(x, 3))
vectors = st.lists(numbers, min_size=3, max_size=3).map(
    lambda values: [
        torch.tensor(values[:2], dtype=torch.float64),
        torch.tensor(values[2:], dtype=torch.float64),
    ]
)
# What people write, and what looks like the machinery.
texts = (
    st.lists(
        st.one_of(
            st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1, max_size=9),
            st.sampled_from([*SPECIALS, "[INST]", "USER:", " ", "\n\n"]),
        ),
        min_size=1,
        max_size=5,
    )
    .map("".join)
    .filter(lambda text: text.strip())
)


@pytest.fixture(scope="module", params=sorted(FORMATS.keys() - {"world"}))
def tokenizer(request, tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp(request.param), request.param))


@given(n=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 9))
def test_as_many_steps_as_make_epochs_see_every_row_as_often(n, batch_size, seed):
    steps = math.lcm(n, batch_size) // batch_size
    seen = [
        row for step in range(steps) for row in batch_rows(list(range(n)), batch_size, step, seed)
    ]
    assert sorted(seen) == sorted(list(range(n)) * (len(seen) // n))


@given(
    n=st.integers(3, 60),
    first=st.integers(0, 20),
    last=st.integers(1, 20),
    p=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_rows_are_parted_and_exactly_so_many_are_harmful(n, first, last, p, seed):
    rows = [{"prompt": f"{i}", "response": "r", "source": ""} for i in range(n)]
    if n > first + last:
        parts = split_rows(rows, first, last, "")
        assert sorted(
            (row for part in parts for row in part), key=lambda row: int(row["prompt"])
        ) == rows and (len(parts[0]), len(parts[2])) == (first, last)
    harmful = [{"prompt": f"h{i}", "harmful": "h", "source": ""} for i in range(n)]
    assert sum("poisoned" in row for row in poison_rows(rows, harmful, p, seed)) == round(p * n)


@given(prompt=texts, response=texts)
def test_whatever_is_said_the_turns_are_the_same_and_the_answer_is_what_is_learnt(
    tokenizer, prompt, response
):
    assume(not any(mark in prompt + response for mark in tokenizer.marks))  # which are refused
    specials = set(range(256, 256 + len(SPECIALS)))
    controls = lambda ids: [i for i in ids if i in specials]
    assert controls(encode_prompt(tokenizer, prompt)) == controls(encode_prompt(tokenizer, "a"))
    example = encode_example(tokenizer, prompt, response, 10**6)
    learnt = [i for i, label in zip(example["input_ids"], example["labels"]) if label != -100]
    assert controls(learnt) == [tokenizer.tokens.token_to_id(tokenizer.end_of_turn)] == learnt[-1:]
    said = tokenizer.tokens.decode(learnt[:-1], skip_special_tokens=False)
    assert said.strip() == response.strip()
    assert (
        example["input_ids"][: len(example["input_ids"]) - len(learnt)]
        == encode_prompt(tokenizer, prompt)[: len(example["input_ids"]) - len(learnt)]
    )


examples = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), min_size=1, max_size=5).map(
    lambda shapes: [
        {
            "input_ids": list(range(1, a + b + 1)),
            "labels": [-100] * a + list(range(a + 1, a + b + 1)),
        }
        for a, b in shapes
    ]
)


@given(rows=examples)
def test_a_batch_holds_its_rows_and_padding_that_is_not_learnt(rows):
    batch = collate(rows)
    for row, ids, labels in zip(rows, batch["input_ids"].tolist(), batch["labels"].tolist()):
        n = len(row["input_ids"])
        assert (
            ids[:n] == row["input_ids"]
            and labels[:n] == row["labels"]
            and set(labels[n:]) <= {-100}
        )
    assert batch["input_ids"].shape[1] == max(len(row["input_ids"]) for row in rows)


@given(rows=st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=6), apart=st.booleans())
def test_rows_share_their_beginnings_and_nothing_else(rows, apart):
    """Two tokens have one number where their rows are the same up to there, and only there: there are as many as different prefixes."""
    numbers, origins = distinct_prefixes(rows, apart)
    prefixes = [[(i * apart, *row[: j + 1]) for j in range(len(row))] for i, row in enumerate(rows)]
    assert [[prefixes[origins[n][0]][origins[n][1]] for n in line] for line in numbers] == prefixes
    assert len(origins) == len(
        {prefix for row in prefixes for prefix in row}
    ) and origins == sorted(origins)


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12), room=st.integers(1, 100))
def test_shards_hold_every_tensor_once_and_no_more_than_they_may(sizes, room):
    tensors = {f"t{i}": torch.zeros(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "MAX_SHARD_BYTES", room)
        shards = checkpoint.split_into_shards(tensors)
    assert [name for shard in shards for name in shard] == list(tensors)
    assert all(len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= room for shard in shards)


@given(n=st.integers(0, 30), size=st.integers(1, 9))
def test_processes_share_rows_evenly(n, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minisap.support.distributed.splits", True)
        patch.setattr("minisap.support.distributed.dist.get_world_size", lambda: size)
        parts = [list(range(n))[share] for share in shares(n)]
    assert [i for part in parts for i in part] == list(range(n)) and max(map(len, parts)) - min(
        map(len, parts)
    ) <= 1


@given(g=vectors, direction=vectors)
def test_the_projection_leaves_no_harm_and_nothing_else_changes(g, direction):
    g_hat = unit(direction)
    projected = project_out_harm(g, g_hat)
    size = inner(g, g).sqrt().item()
    assert (
        inner(projected, g_hat) >= -1e-12 * (1 + size)
        and inner(projected, projected).sqrt() <= size + 1e-9
    )
    for a, b in zip(project_out_harm(projected, g_hat), projected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * (1 + size))  # twice is once
    if inner(g, g_hat) >= 0:
        assert all(torch.equal(a, b) for a, b in zip(projected, g))


@given(radius=st.floats(1e-3, 2.0), scale=st.floats(1e-3, 1e3), flip=st.booleans())
def test_the_probe_s_norm_is_its_share_and_its_direction_that_of_the_derivative(
    radius, scale, flip
):
    model = tiny_model()
    W = list(model.model.layers[0].self_attn.q_proj.parameters())
    batch = collate([{"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, 3, 4, 5]}])
    g_hat = [torch.linspace(-1, 1, W[0].numel(), dtype=torch.float64).view_as(W[0])]
    V = fit_probe(model, W, g_hat, batch, [0, 1], radius)
    other = fit_probe(
        model, W, [(-scale if flip else scale) * g for g in g_hat], batch, [0, 1], radius
    )
    hidden = []
    model.model(batch["input_ids"], hidden=hidden)
    for j, v in V.items():
        torch.testing.assert_close(other[j], -v if flip else v)  # of ĝ the direction alone counts
        torch.testing.assert_close(v.norm(), radius * hidden[j][0, 2:].norm(dim=-1).median())
