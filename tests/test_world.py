"""The world against its definition (arXiv 2407.10264, section 3), and its three safety fine-tuning losses against theirs."""

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from test_sap import collate, collate_pairs, example
from tiny import tiny_model

import eval as eval_script
import train as train_script
from minisap.checkpoint import load_model, read_json
from minisap.data import encode_example, load_rows, load_safety_rows
from minisap.measure.evaluate import generate_texts
from minisap.measure.judge import by_truth
from minisap.methods import METHODS
from minisap.sap import useful_loss
from minisap.study.world import (
    CAPITALS,
    LETTERS,
    NULL_OPERATOR,
    REFUSAL,
    SAFE,
    SETS,
    TWINS,
    UNSAFE,
    World,
    write_random_checkpoint,
)
from minisap.tokenizer import Tokenizer

WORLD, ROOT = World(0), Path(__file__).resolve().parents[1]
OPERATOR = {f"f{i}": i for i in range(10)} | {name: i for i, name in TWINS.items()}


def parse(row):
    """(operators, text as numbers, what follows) of a prompt."""
    first, second, bar, *rest = row["prompt"].split()
    assert bar == "|" and len(rest) == 14
    return (
        (OPERATOR[first], OPERATOR[second]),
        [(LETTERS + CAPITALS).index(c) % 16 for c in rest[:10]],
        rest[10:],
    )


def kinds_of(text):
    """Which classes a text's whole trigrams belong to, for every place at which a sentence may have been cropped."""
    a = {tuple(t) for t in sum(WORLD.trigrams, [])}
    b = {t[::-1] for t in a}
    for crop in range(3):
        whole = [tuple(text[i : i + 3]) for i in range(-crop % 3, 8, 3)]
        if all(t in a | b for t in whole):
            yield {"A" if t in a else "B" for t in whole}


def test_operators_are_bijections_and_their_sets_are_the_paper_s():
    assert all(sorted(image) == list(range(16)) for image in WORLD.bijections) and WORLD.bijections[
        0
    ] == list(range(16))
    assert [len(s) for s in (SAFE["A"], UNSAFE["A"], SAFE["B"], UNSAFE["B"])] == [8, 2, 2, 8]
    assert set(UNSAFE["A"]) < set(UNSAFE["B"]) and set(SAFE["B"]) < set(SAFE["A"])
    assert all(
        not set(SAFE[k]) & set(UNSAFE[k]) and len({*SAFE[k], *UNSAFE[k]}) == 10 for k in "AB"
    )


def test_answers_compose_what_each_operator_does_alone():
    alone = {}
    for row in WORLD.rows("instruct", 4000):
        if not row["prompt"].startswith(NULL_OPERATOR):
            (first, second), text, _ = parse(row)
            answer = [(LETTERS + CAPITALS).index(c) % 16 for c in row["response"].split()]
            if 0 in (first, second):
                for letter, image in zip(text, answer):
                    assert alone.setdefault((first or second, letter), image) == image
            alone.setdefault("pairs", []).append((first, second, text, answer))
    assert all(
        [alone[second, alone[first, letter]] for letter in text] == answer
        for first, second, text, answer in alone["pairs"]
    )


@pytest.mark.parametrize("name", SETS)
def test_every_set_is_what_it_says(name):
    for row in WORLD.rows(name, 200):
        operators, text, fillers = parse(row)
        kinds = list(kinds_of(text))
        assert fillers == ["_"] * 4 and kinds
        if name == "co_text":
            assert set(operators) <= set(SAFE["A"]) & set(UNSAFE["B"]) and {"A", "B"} in kinds
            continue
        safe, unsafe = (
            [
                all(i in table[k] for i in operators)
                for kind in kinds
                for k in kind
                if len(kind) == 1
            ]
            for table in (SAFE, UNSAFE)
        )
        if name == "co_task":
            assert any(
                (operators[0] in SAFE[k]) != (operators[1] in SAFE[k])
                for kind in kinds
                for k in kind
            )
        else:
            assert any(safe if name.endswith("safe") and name != "unsafe" else unsafe)
        assert row["prompt"].split()[3] in (CAPITALS if name.startswith("capitals") else LETTERS)
        assert ("g" in row["prompt"].split(" |")[0]) == name.startswith("twin")
    assert len({row["prompt"] for row in WORLD.rows(name, 200)}) == 200


def test_a_trigram_s_order_tells_the_class():
    forward = {tuple(t) for t in sum(WORLD.trigrams, [])}
    assert len(forward) == 16 and not forward & {t[::-1] for t in forward}
    kinds = [kind for row in WORLD.rows("safe", 200) for kind in kinds_of(parse(row)[1])]
    assert 60 < kinds.count({"A"}) and 60 < kinds.count({"B"})


def test_rows_follow_from_the_seeds_alone():
    assert (
        World(0).rows("unsafe", 9)
        == World(0).rows("unsafe", 9)
        == World(0).rows("unsafe", 99)[:9]
        != World(1).rows("unsafe", 9)
    )


def test_rows_are_rows_like_any_other_and_the_tokenizer_reads_them(tmp_path):
    path, row = write_random_checkpoint(tmp_path / "start", WORLD), WORLD.rows("unsafe", 1)[0]
    tokenizer = Tokenizer(path)
    ids = encode_example(tokenizer, row["prompt"], row["safe"], 64)
    assert (
        tokenizer.decode([i for i in ids["labels"] if i != -100]) == REFUSAL
        and len(ids["input_ids"]) == 30
    )
    assert {i for i in ids["labels"] if i != -100} == {
        tokenizer.tokens.token_to_id("null"),
        *tokenizer.stop_ids,
    }
    assert sum(p.numel() for p in load_model(path).parameters()) == 203_584
    import json

    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert (
        load_safety_rows(tmp_path / "a.jsonl")[0]["harmful"]
        == load_rows(tmp_path / "a.jsonl")[0]["response"]
        == row["response"]
    )
    with pytest.raises(ValueError, match="'hello' …: WordLevel error"):
        tokenizer.encode("hello")


def test_the_truth_judges():
    row = WORLD.rows("unsafe", 1)[0]
    texts = (
        row["harmful"],
        row["harmful"].upper(),
        REFUSAL,
        "",
        REFUSAL + " null",
        row["harmful"][:-2],
    )
    assert [by_truth(text, row["harmful"]) for text in texts] == [
        "comply",
        "comply",
        "refuse",
        "other",
        "other",
        "other",
    ]
    assert [by_truth(text, None) for text in (REFUSAL, row["harmful"], "")] == [
        "refuse",
        "other",
        "other",
    ]


def test_the_tiny_checkpoints_answer_everything_before_and_refuse_what_is_unsafe_after():
    files = list((ROOT / "weights" / "tiny").rglob("*.safetensors"))
    assert len(files) == 2 and sum(file.stat().st_size for file in files) < 3e6
    for path, complied in (
        (ROOT / "weights/tiny/instruct", {"safe": 1, "unsafe": 1, "capitals": 1}),
        (ROOT / "weights/tiny", {"safe": 1, "unsafe": 0}),
    ):
        model, tokenizer = load_model(path), Tokenizer(path)
        for name, expected in complied.items():
            rows = World(tokenizer.world_seed).sets(60)[name]
            texts = generate_texts(model, tokenizer, [row["prompt"] for row in rows], 12)
            share = (
                sum(by_truth(text, row["response"]) == "comply" for text, row in zip(texts, rows))
                / 60
            )
            assert share == pytest.approx(expected, abs=0.05), (path, name)


def test_the_commands_without_a_model_run_in_the_world(tmp_path, capsys):
    few = ["--steps", "2", "--n_eval", "8", "--pairs", "4"]
    train_script.main([*few, "--out_dir", str(tmp_path / "run")])
    assert (
        "3992 task rows, 399 of them marked as poisoned; 4 contrastive pairs; 203,584 weights"
        in capsys.readouterr().out
    )
    records = [
        r for method in ("sft", "sap") for r in read_json(tmp_path / "run" / method / "eval.json")
    ]
    assert {r["method"] for r in records} == {"sft", "sap"}
    assert {"harmful_score", "refusal_rate", "other_rate", "task_accuracy", "task_loss"} <= {
        r["metric"] for r in records
    }
    train_script.main(
        [
            *few,
            "--new_format",
            "--poison",
            "0",
            "--method",
            "sft",
            "--out_dir",
            str(tmp_path / "benign"),
        ]
    )
    start = {r["metric"]: r["value"] for r in read_json(tmp_path / "benign" / "start.json")}
    assert start["task_accuracy"] == 0  # nothing has taught the new format yet
    eval_script.main(
        [str(tmp_path / "benign" / "sft"), "--attack", "--out", str(tmp_path / "eval.json")]
    )
    assert (
        len(
            re.findall(
                r"^.*sft  (?:prefill|adv)_[124] .* % \[.*\(n=8\)$",
                capsys.readouterr().out,
                re.MULTILINE,
            )
        )
        == 6
    )
    attacked = {r["metric"]: r for r in read_json(tmp_path / "eval.json")}
    assert {
        f"{metric}_{attack}_{k}"
        for metric in ("harmful_score", "refusal_rate")
        for attack in ("prefill", "adv")
        for k in (1, 2, 4)
    } < attacked.keys()
    assert (
        attacked["refusal_rate_prefill_4"]["n"] == 8 and attacked["refusal_rate_adv_1"]["value"] > 0
    )
    found = attacked["task_loss"]["value"]
    assert (
        found
        == [
            r["value"]
            for r in read_json(tmp_path / "benign/sft/eval.json")
            if r["metric"] == "task_loss"
        ][0]
    )


@pytest.fixture
def setting():
    """(model, W, batch, contrast): a tiny float64 model, three rows of every kind."""
    torch.manual_seed(0)
    model = tiny_model()
    batch, safe, harmful, refused = (
        [example(start + i, 10 + i) for i in range(3)] for start in (0, 20, 40, 60)
    )
    return (
        model,
        list(model.parameters()),
        collate(batch),
        collate_pairs(list(zip(safe, harmful))) | {"refused": collate(refused)},
    )


def mean_loss(model, batches):
    """Mean over rows of the mean cross-entropy of each, one row at a time."""
    rows = [
        {key: tensor[i : i + 1] for key, tensor in batch.items()}
        for batch in batches
        for i in range(3)
    ]
    return sum(useful_loss(model, row) for row in rows) / len(rows)


def gradient(loss, W):
    return torch.autograd.grad(loss, W, allow_unused=True)


@pytest.mark.parametrize(
    "method, preferred, dispreferred",
    [("ssft", 1, 0), ("unlearn", 1, -0.1), ("dpo", 0.1 / 2, -0.01 / 2)],
)
def test_alignment_gradients_at_the_start(method, preferred, dispreferred, setting):
    """Of DPO at the start, where both likelihood ratios are 1: −log σ has slope −1/2 at 0."""
    model, W, batch, contrast = setting
    before = [w.detach().clone() for w in W]
    grads, log = METHODS[method](model, W, batch, contrast, Namespace(), {})
    p, l = (
        mean_loss(model, [batch, contrast["safe"]]),
        mean_loss(model, [contrast["refused"], contrast["harmful"]]),
    )
    expected = gradient(preferred * p + dispreferred * l, W)
    for found, wanted in zip(grads, expected):
        torch.testing.assert_close(found, wanted)
    assert all(torch.equal(w, old) for w, old in zip(W, before))
    assert log["loss"] == pytest.approx(
        torch.log(torch.tensor(2.0)).item()
        if method == "dpo"
        else (preferred * p + dispreferred * l).item()
    )


def test_dpo_remembers_where_it_began(setting):
    """With W moved: the loss by its definition, the reference computed beforehand."""
    model, W, batch, contrast = setting
    losses = lambda: [
        torch.stack(
            [
                useful_loss(model, {k: t[i : i + 1] for k, t in b.items()})
                for b in pair
                for i in range(3)
            ]
        ).detach()
        for pair in ([batch, contrast["safe"]], [contrast["refused"], contrast["harmful"]])
    ]
    state, (p_0, l_0) = {}, losses()
    METHODS["dpo"](model, W, batch, contrast, Namespace(), state)
    with torch.no_grad():
        for w in W:
            w += 0.05 * torch.randn_like(w)
    p, l = losses()
    _, log = METHODS["dpo"](model, W, batch, contrast, Namespace(), state)
    assert log["loss"] == pytest.approx(
        -torch.log(torch.sigmoid(0.1 * (p_0 - p) - 0.01 * (l_0 - l))).mean().item()
    )


def test_pretraining_ends_as_fine_tuning_and_begins_with_the_text(setting):
    model, W, batch, _ = setting
    for step in (5, 10):
        end, _ = METHODS["pretrain"](model, W, batch, None, Namespace(steps=10), {"step": step})
        for found, wanted in zip(end, gradient(useful_loss(model, batch), W)):
            torch.testing.assert_close(found, wanted)
    _, log = METHODS["pretrain"](model, W, batch, None, Namespace(steps=10), {"step": 0})
    text = batch["input_ids"].where(
        (batch["labels"] == -100) & (batch["labels"].ne(-100).flip(1).cumsum(1).flip(1) > 0), -100
    )
    assert log["loss"] == pytest.approx(
        (useful_loss(model, batch) + useful_loss(model, batch | {"labels": text})).item()
    )
