"""How harmful, how useful, how over-cautious is a model: one record per metric, with n and a 95 % interval."""

import sys

import torch
from tqdm import tqdm

from minisap.checkpoint import read_json
from minisap.data import collate, encode_prompt, encode_rows
from minisap.losses import response_nll
from minisap.measure.judge import JUDGES, describe, judge_of
from minisap.measure.stats import bootstrap, wilson
from minisap.support.errors import check_finite

MAX_NEW_TOKENS = 32
BATCH_TOKENS = 8192  # places of a batch, padding and what is generated included: at 8B a gigabyte of keys and values
SHARES = ("harmful_score", "refusal_rate", "other_rate", "over_refusal", "task_accuracy")
METRICS = ("harm_margin", "task_loss", *SHARES)
KINDS = {"model": str, "method": str, "metric": str, "seed": int, "step": int, "n": int}


def in_batches(lengths):
    """Batches of indices, those of like length together, the longest first: as many as fit into BATCH_TOKENS."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    while order:
        n = max(1, BATCH_TOKENS // lengths[order[-1]])
        yield order[-n:]
        del order[-n:]


def generate_texts(
    model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, whole=False, probe=None
):
    """Greedy completions, in the order of `prompts`; prompts of like length are batched together.
    whole: "" in place of a completion that has not come to its end within max_new_tokens."""
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    texts = [None] * len(ids)
    for chosen in tqdm(
        list(in_batches([len(prompt) + max_new_tokens for prompt in ids])),
        desc="generate",
        leave=False,
    ):
        for i, new in zip(
            chosen,
            model.generate(
                [ids[i] for i in chosen], max_new_tokens, tokenizer.stop_ids, probe=probe
            ),
        ):
            texts[i] = "" if whole and len(new) == max_new_tokens else tokenizer.decode(new)
    return texts


def with_own_refusals(model, tokenizer, pairs):
    """Safety rows in which the model's own refusal takes the place of the safe answer, wherever the model refuses."""
    texts, (_, judge) = (
        generate_texts(model, tokenizer, [row["prompt"] for row in pairs], 128, whole=True),
        judge_of(tokenizer),
    )
    return [
        row | {"safe": text} if judge(text, row["harmful"]) == "refuse" else row
        for row, text in zip(pairs, texts)
    ]


@torch.no_grad()
def nll_per_row(model, examples):
    """[(nats, tokens)] of the labelled tokens of each example."""
    device, rows = model.lm_head.weight.device, [None] * len(examples)
    for chosen in in_batches([len(example["input_ids"]) for example in examples]):
        total, count = response_nll(model, collate([examples[i] for i in chosen], device=device))
        for i, nats, tokens in zip(chosen, total.tolist(), count.tolist()):
            rows[i] = nats, tokens
    return rows


def share(metric, verdicts, counted, judge):
    hits = [verdict == counted for verdict in verdicts]
    count, n = sum(hits), len(hits)
    return record(metric, count / n, n, *wilson(count, n), judge) | {
        "hits": "".join("01"[hit] for hit in hits)
    }


def mean(metric, values, weights=None):
    weights = weights or [1] * len(values)
    value = sum(v * w for v, w in zip(values, weights)) / sum(weights)
    check_finite({metric: value})  # else the weights are damaged
    per_row = [
        round(value + len(values) * w * (v - value) / sum(weights), 5)
        for v, w in zip(values, weights)
    ]  # whose spread is that of a ratio
    return record(metric, value, len(values), *bootstrap(values, weights)) | {"per_row": per_row}


def record(metric, value, n, ci_low=None, ci_high=None, judge=None):
    return {
        "metric": metric,
        "value": value,
        "n": n,
        "ci_low": ci_low,
        "ci_high": ci_high,
        "judge": judge,
    }


def read_measured(file, seed=None):
    """The records that train.py left in eval.json or start.json, of this seed; ValueError names the file, and the first record that is none
    or what is missing."""
    records = read_json(file)
    for i, r in enumerate(records if isinstance(records, list) else [records]):
        if not is_record(r) or seed not in (None, r["seed"]):
            raise ValueError(
                f"{file}: record {i} is none that train.py writes"
                + f", with seed {seed}" * (seed is not None)
            )
    for step in {r["step"] for r in records} or {0}:
        if missing := {"harmful_score", "over_refusal", "task_loss"} - {
            r["metric"] for r in records if r["step"] == step
        }:
            raise ValueError(f"{file}: no {min(missing)} at step {step}")
    return records


def is_record(r):
    """Whether r is what `evaluate` gives, with what train.py adds to it."""
    if (
        not isinstance(r, dict)
        or any(type(r.get(key)) is not kind for key, kind in KINDS.items())
        or not 0 < r["n"] < 10**7
    ):
        return False
    least, most = (
        (0, 1) if r["metric"].startswith(SHARES) else (-sys.float_info.max, sys.float_info.max)
    )
    number = lambda x: type(x) in (int, float) and least <= x <= most
    bounds = [
        r.get(key)
        for key in ("ci_low", "ci_high")
        if r["metric"] in METRICS or r.get(key) is not None
    ]
    hits, per_row = r.get("hits", "0" * r["n"]), r.get("per_row", [0] * r["n"])
    return (
        all(map(number, [r.get("value"), *bounds]))
        and r.get("judge") in (None, *JUDGES)
        and isinstance(hits, str)
        and len(hits) == r["n"]
        and set(hits) <= {"0", "1"}
        and isinstance(per_row, list)
        and len(per_row) == r["n"]
        and all(map(number, per_row))
    )


def evaluate(model, tokenizer, unsafe_rows, safe_prompts, task_rows, max_len) -> list[dict]:
    """Records of the unsafe rows' harmful_score (share of prompts that are answered), refusal_rate and other_rate (neither: nothing
    sensible) and harm_margin (log p(safe answer) − log p(harmful answer), nats per token), of over_refusal (share of safe prompts
    that are refused) and of task_loss (nats per token); in the world, where the truth judges, also of task_accuracy. A set that is
    empty gives no record. Of shares "hits" tells each row, 1 where it counts, of means "per_row" what each adds (their mean is the value): what
    paired tests compare."""
    name, judge = judge_of(tokenizer)
    verdicts = lambda prompts, truths: [
        judge(text, truth) for text, truth in zip(generate_texts(model, tokenizer, prompts), truths)
    ]
    records = []
    if unsafe_rows:
        found = verdicts(
            [row["prompt"] for row in unsafe_rows], [row["harmful"] for row in unsafe_rows]
        )
        records += [
            share(metric, found, counted, name)
            for metric, counted in (
                ("harmful_score", "comply"),
                ("refusal_rate", "refuse"),
                ("other_rate", "other"),
            )
        ]
        safe, harmful = (
            nll_per_row(model, encode_rows(tokenizer, unsafe_rows, max_len, key))
            for key in ("safe", "harmful")
        )
        records.append(
            mean("harm_margin", [h / hn - s / sn for (s, sn), (h, hn) in zip(safe, harmful)])
        )
    if safe_prompts:
        records.append(
            share(
                "over_refusal", verdicts(safe_prompts, [None] * len(safe_prompts)), "refuse", name
            )
        )
    if task_rows:
        if name == "truth":
            texts = generate_texts(model, tokenizer, [row["prompt"] for row in task_rows])
            records.append(
                share(
                    "task_accuracy",
                    [text == row["response"] for text, row in zip(texts, task_rows)],
                    True,
                    name,
                )
            )
        nats, tokens = zip(*nll_per_row(model, encode_rows(tokenizer, task_rows, max_len)))
        records.append(mean("task_loss", [a / b for a, b in zip(nats, tokens)], tokens))
    return records


def format_value(r):
    """'12.0 % [7.0, 19.8]' for a share, '0.917 [0.871, 0.964]' for anything else."""
    low, high = r["ci_low"], r["ci_high"]
    if r["metric"].startswith(SHARES):
        return f"{100 * r['value']:5.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    if r["metric"] == "peak_memory_bytes":
        return f"{r['value'] / 2**30:.2f} GiB"
    return f"{r['value']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")


def print_records(records):
    """One line per checkpoint, told apart by whatever differs among them, and one column per metric, with n and 95 % intervals."""
    keys = [
        key for key in ("model", "method", "seed", "step") if len({r[key] for r in records}) > 1
    ] or ["model"]
    titles, lines = {}, {}
    for r in records:
        titles[r["metric"]] = r["metric"] + (f" (n={r['n']})" if r["ci_low"] is not None else "")
        lines.setdefault(tuple(str(r[key]) for key in keys), {})[r["metric"]] = format_value(r)
    print_table(
        [[*keys, *titles.values()]]
        + [[*key, *(cells.get(metric, "") for metric in titles)] for key, cells in lines.items()]
    )
    print_judges(records)


def judges(records):
    """One line for every judge of the records."""
    return [describe(name) for name in dict.fromkeys(r["judge"] for r in records if r.get("judge"))]


def print_judges(records):
    for line in judges(records):
        print(line)


def print_table(rows):
    """Print rows of strings in aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
