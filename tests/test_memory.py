"""That what a run will take is known beforehand: against the allocator's own account of a whole model's steps, and for a run too large,
before anything is written."""

import itertools
import os
from dataclasses import replace

import pytest
import torch
from test_sap import example
from tiny import BASE
from torch.profiler import ProfilerActivity, profile

import train as train_script
from minisap.baselines import STRENGTH
from minisap.config import LlamaConfig
from minisap.data import batch_rows, step_batches
from minisap.methods import FILTERS, METHODS
from minisap.model import Llama
from minisap.optimize import trainable, update
from minisap.run import memory
from minisap.run.memory import estimate, free_memory, largest_batches
from minisap.support.errors import NotFinite

CONFIG = LlamaConfig.from_hf(BASE | {"num_hidden_layers": 7})
TIED = replace(CONFIG, vocab_size=4000, tie_word_embeddings=True)
ROWS = [example(i, 6, n=20 + i % 5) for i in range(12)]
PAIRS = [(example(20 + i, 10, n=46), example(30 + i, 10, n=48)) for i in range(6)]


def options(*flags):
    args = train_script.parse_args(
        [
            "--model",
            "none",
            "--batch_size",
            "4",
            "--pairs_per_step",
            "3",
            "--steps",
            "3",
            "--device",
            "cpu",
            "--dtype",
            "float32",
            *flags,
        ]
    )
    args.strength, args.layers = STRENGTH, list(range(7))
    return args


def allocated(args, method, config, rows, pairs, first_rows):
    """Bytes at the peak of a run on these rows alone, as the CPU's allocator counts them: it knows of no tensors, and sees what kernels take."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model = Llama(config)
        W, model.model.checkpointing = trainable(model, args), args.checkpointing
        optimizer, state = torch.optim.AdamW(W), {}
        if method in FILTERS:
            FILTERS[method](model, W, first_rows, pairs, args)
        for state["step"] in (0, 1, 9):  # the tenth is lisa's other one
            grads, _ = METHODS[method](model, W, *step_batches(rows, pairs), args, state)
            update(optimizer, W, grads, args.clip, 1e-3)
            del grads
    events = sorted(
        (event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    return max(itertools.accumulate(event.nbytes() for event in events))


CASES = [
    *(
        (method, CONFIG, ())
        for method in ("sft", "sap", "paper_project", "kl", "released", "vaccine", "lisa")
    ),
    *(
        ("sap", CONFIG, flags)
        for flags in (
            ("--checkpointing",),
            ("--lora_rank", "0"),
            ("--checkpointing", "--lora_rank", "0"),
        )
    ),
    ("paper_project", CONFIG, ("--checkpointing",)),
    ("sft", TIED, ()),
    ("sap", TIED, ("--refresh", "4")),
    ("paper_project", TIED, ("--lora_rank", "0")),
]


@pytest.mark.parametrize("method, config, flags", CASES)
def test_what_small_models_take_tells_what_the_whole_one_takes(method, config, flags):
    args = options(*flags)
    batches = largest_batches(args, config, ROWS, PAIRS)
    within = 0.025 if (method, *flags) == ("paper_project", "--checkpointing") else 0.02
    assert estimate(args, method, config, batches) == pytest.approx(
        allocated(args, method, config, *batches), rel=within
    )


def test_a_filter_that_gives_no_number_does_not_hide_what_the_steps_take(monkeypatch):
    def stop(*args):
        raise NotFinite

    args = options()
    batches = largest_batches(args, CONFIG, ROWS, PAIRS)
    monkeypatch.setitem(memory.FILTERS, "sap", stop)
    ends_early = estimate(args, "sap", CONFIG, batches)
    monkeypatch.delitem(memory.FILTERS, "sap")
    assert ends_early == estimate(args, "sap", CONFIG, batches)


def test_the_longest_rows_are_not_the_largest_where_they_have_most_in_common():
    """Sixteen rows that differ in the last tokens alone, and sixteen shorter ones that have nothing in common."""
    alike = [{"input_ids": [1] * 50 + [i] * 6, "labels": [-100] * 50 + [i] * 6} for i in range(16)]
    rows = alike + [
        {"input_ids": [20 + i] * 54, "labels": [-100] * 48 + [20 + i] * 6} for i in range(16)
    ]
    args, config = options("--steps", "8"), replace(CONFIG, n_layers=3)
    chosen, pairs, first_rows = largest_batches(args, config, rows, PAIRS)
    assert estimate(args, "sap", config, (chosen, pairs, first_rows)) == pytest.approx(
        allocated(args, "sap", config, chosen, pairs, rows), rel=0.025
    )
    assert not any(row in alike for row in first_rows)


@pytest.mark.parametrize("vocab_size, more", [(96, "places"), (100_000, "labels")])
def test_no_batch_of_the_run_takes_more_than_the_one_that_is_counted(vocab_size, more):
    """One has a long row with two labels, the others short rows full of them."""
    rows = [
        {"input_ids": [i] * n, "labels": [-100] * (n - labels) + [i] * labels}
        for i, (n, labels) in enumerate([(48, 2)] + 7 * [(40, 38)])
    ]
    args, config = (
        options("--batch_size", "2", "--steps", "4"),
        replace(CONFIG, vocab_size=vocab_size),
    )
    chosen, pairs, _ = largest_batches(args, config, rows, PAIRS)
    assert (rows[0] in chosen) == (more == "places")
    others = [[rows[i] for i in batch_rows(range(len(rows)), 2, step, 0)] for step in range(4)]
    assert allocated(args, "sft", config, chosen, pairs, rows) == max(
        allocated(args, "sft", config, other, pairs, rows) for other in others
    )


def test_a_run_that_cannot_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 10_000)
    told = r"^sap takes about 0\.\d\d GiB at its peak \(the weights: 0\.00; free on cpu: 0\.00\); less is needed with a smaller --batch_size, --pairs_per_step or --max_len, or "
    with pytest.raises(
        ValueError, match=told + "--checkpointing, or LoRA in place of --lora_rank 0$"
    ):
        train_script.main(
            ["--steps", "2", "--n_eval", "4", "--device", "cpu", "--out_dir", str(tmp_path / "run")]
        )
    with pytest.raises(ValueError, match=told + "--dtype bfloat16$"):
        train_script.main(
            [
                "--steps",
                "2",
                "--n_eval",
                "4",
                "--device",
                "cpu",
                "--lora_rank",
                "2",
                "--checkpointing",
                "--out_dir",
                str(tmp_path / "run"),
            ]
        )
    assert not (tmp_path / "run").exists()


def test_what_is_free_is_what_the_system_says(monkeypatch):
    page = os.sysconf("SC_PAGE_SIZE")
    if os.path.exists("/proc/meminfo"):
        assert (
            page * os.sysconf("SC_AVPHYS_PAGES") / 2
            < free_memory("cpu")
            < page * os.sysconf("SC_PHYS_PAGES")
        )
        whole = free_memory("cpu")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of torchrun
        assert free_memory("cpu") == pytest.approx(whole / 2, rel=0.2)
