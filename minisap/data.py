"""Rows from files, teacher-forced examples, and batches that are a pure function of (seed, step).

A task row    {"prompt": text or messages, "response": text, "source": "file:line"}
A safety row  {"prompt": text, "safe": text, "harmful": text, "source": "file:line"}
A batch       {"input_ids": (B, T) long, "labels": (B, T) long, -100 where no loss is taken}
"""

import csv
import hashlib
import io
import json
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from minisap.checkpoint import parse_json, read_json, read_text
from minisap.measure.judge import REFUSALS
from minisap.run import demo
from minisap.study.world import World


def read_records(path, conversations=False):
    """[(record, "file:line")] of a .jsonl, .json or .csv file, or of a range of its rows: FILE[a:b]; a record is an object, or with
    `conversations` also a bare list of messages. ValueError names the file and the line (row, in JSON)."""
    path, chosen = re.fullmatch(r"(.*?)(?:\[(\d*:\d*)\])?", str(path), re.DOTALL).groups()
    path, chosen = Path(path), slice(*(int(i) if i else None for i in (chosen or ":").split(":")))
    if path.suffix == ".json":
        records = read_json(path)
        if not isinstance(records, list):
            raise ValueError(f"{path}: expected a list of rows, found {type(records).__name__}")
        found = [(record, f"{path}: row {i}") for i, record in enumerate(records, 1)]
    elif path.suffix in (".jsonl", ".csv"):
        text = read_text(path)
        found = list(read_csv(path, text) if path.suffix == ".csv" else read_jsonl(path, text))
    else:
        raise ValueError(f"{path}: rows are read from .jsonl, .json or .csv")
    if not found[chosen]:
        raise ValueError(
            f"{path}: no rows" + (f" in this range; the file has {len(found)}" if found else "")
        )
    for record, source in found:
        if not isinstance(record, dict) and not (conversations and isinstance(record, list)):
            raise ValueError(f"{source}: expected an object, found {type(record).__name__}")
    return found[chosen]


def read_jsonl(path, text):
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield parse_json(line, f"{path}:{number}"), f"{path}:{number}"


def read_csv(path, text):
    """(record, "file:line") of every row; ValueError at a row with more or fewer fields than the header, or an open quote."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for record in reader:
            if None in record or None in record.values():
                raise ValueError(
                    f"{path}:{reader.line_num}: {len(reader.fieldnames)} fields expected; "
                    "is a comma or a quote not quoted?"
                )
            yield record, f"{path}:{reader.line_num}"
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num + 1}: {error}") from None


def text_of(record, key, source):
    """The non-empty text under `key`."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"{source}: {key} is {'missing' if value is None else 'empty' if value == '' else repr(value)[:40]}"
        )
    return value


def load_rows(path) -> list[dict]:
    """Task rows of JSONL {prompt, response} or {messages: [...]} (or the messages alone), or of Alpaca JSON {instruction, input, output}.
    Of a conversation the last assistant turn is the response and all before it the prompt. A row may say `poisoned`, as those of
    poison_rows do: to be counted, nothing more."""
    marked = lambda record: (
        {"poisoned": True} if isinstance(record, dict) and record.get("poisoned") else {}
    )
    return [
        task_row(record, source) | {"source": source} | marked(record)
        for record, source in read_records(path, conversations=True)
    ]


def task_row(record, source):
    """{prompt, response} of a record in any of load_rows' formats; ValueError names `source` and the key."""
    record = {"messages": record} if isinstance(record, list) else record
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list):
            raise ValueError(
                f"{source}: messages is {messages!r:.40}; expected a list of {{role, content}}"
            )
        roles = [
            text_of(message, "role", source)
            for message in messages
            if text_of(message, "content", source)
        ]
        if len(roles) < 2 or roles[-1] != "assistant":
            raise ValueError(f"{source}: messages must end with an assistant turn after a user's")
        *prompt, last = messages
        return {"prompt": prompt, "response": last["content"]}
    response = text_of(record, "output" if "instruction" in record else "response", source)
    return {"prompt": prompt_of(record, source), "response": response}


def prompt_of(record, source):
    """The text under `prompt`, AdvBench's `goal`, or Alpaca's `instruction` and `input`."""
    if "instruction" in record:
        prompt = text_of(record, "instruction", source)
        if record.get("input") not in (None, ""):
            prompt += f"\n\n{text_of(record, 'input', source).strip()}"
        return prompt
    return text_of(record, "goal" if "goal" in record else "prompt", source)


def load_safety_rows(path) -> list[dict]:
    """Safety rows of JSONL {prompt, safe, harmful}, of circuit-breakers JSON {prompt, llama3_output, output or response},
    or of AdvBench CSV goal,target, where one of REFUSALS becomes the safe answer."""
    return [
        safety_row(i, record, source) | {"source": source}
        for i, (record, source) in enumerate(read_records(path))
    ]


def safety_row(i, record, source):
    """{prompt, safe, harmful} of a record in any of load_safety_rows' formats; AdvBench's i-th takes REFUSALS by turns."""
    if "goal" in record:
        prompt, safe, harmful = (
            text_of(record, "goal", source),
            REFUSALS[i % len(REFUSALS)],
            text_of(record, "target", source),
        )
    elif "llama3_output" in record:
        prompt, safe = text_of(record, "prompt", source), text_of(record, "llama3_output", source)
        harmful = text_of(record, "output" if "output" in record else "response", source)
    else:
        prompt, safe, harmful = (
            text_of(record, key, source) for key in ("prompt", "safe", "harmful")
        )
    if safe.strip() == harmful.strip():  # of such pairs ĝ would be the direction of rounding errors
        raise ValueError(f"{source}: the safe and the harmful answer are the same")
    return {"prompt": prompt, "safe": safe, "harmful": harmful}


def load_prompts(path, n, label) -> list[str]:
    """At most n prompts, in shuffled order, of a file with `prompt`, `goal` or `instruction` (and `input`) in each row; of rows
    that carry a `label`, those with this one (a row without is safe)."""
    records = [
        (record, source)
        for record, source in read_records(path)
        if record.get("label", "safe") == label
    ]
    return shuffle([prompt_of(record, source) for record, source in records])[:n]


def built_in(tokenizer, new_format=False, task=None):
    """Where rows come from without a file: the checkpoint's own world, or plain English."""
    if new_format and (task or tokenizer.chat_format != "world"):
        raise ValueError("--new_format: is of the synthetic world's built-in task alone")
    return World(tokenizer.world_seed, new_format) if tokenizer.chat_format == "world" else demo


def load_safe_prompts(path, n, built_in=demo) -> list[str]:
    """At most n safe prompts of a file, or of the built-in rows."""
    prompts = load_prompts(path, n, "safe") if path else shuffle(built_in.safe_prompts())[:n]
    if not prompts:
        raise ValueError(f"{path}: no row is labelled safe")
    return prompts


def sha256_of(rows) -> str:
    """A digest of rows, by which two runs are known to use the same."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def shuffle(rows) -> list:
    """In an order that is always the same, whatever the seed of the run."""
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def repeated(held_out, rows, *keys):
    """How many of the rows that are held out stand among the others, too, as far as these keys tell."""
    text = lambda row: json.dumps([row[key] for key in keys])
    seen = set(map(text, rows))
    return sum(text(row) in seen for row in held_out)


def split_rows(rows, first, last, source):
    """(the first rows, the rows between, the last rows) in an order shuffled once, the same for every seed."""
    if len(rows) <= first + last:
        apart = f"{first} (--pairs) + {last}" if first else last
        raise ValueError(
            f"{source}: {len(rows)} rows are too few to set {apart} (--n_eval) of them apart"
        )
    shuffled = shuffle(rows)
    return shuffled[:first], shuffled[first : len(rows) - last], shuffled[len(rows) - last :]


def load_splits(task, safety, n_pairs, n_eval, built_in=demo) -> dict:
    """The rows of a run, each used for one thing: {"task", "eval_task"} from the task files, {"pairs" (the method's contrastive
    rows), "harmful" (poison is drawn from these), "eval_unsafe"} from the safety file. None means the built-in rows."""
    task_rows = [row for file in task for row in load_rows(file)] if task else built_in.task_rows()
    safety_rows = load_safety_rows(safety) if safety else built_in.safety_rows()
    _, train, eval_task = split_rows(task_rows, 0, n_eval, " ".join(task or ["built-in task"]))
    pairs, harmful, eval_unsafe = split_rows(
        safety_rows, n_pairs, n_eval, safety or "built-in safety rows"
    )
    return {
        "task": train,
        "eval_task": eval_task,
        "pairs": pairs,
        "harmful": harmful,
        "eval_unsafe": eval_unsafe,
    }


def poison_rows(rows, safety_rows, p, seed):
    """Replace exactly round(p·n) of the n task rows by harmful ones, at places and in an order that `seed` decides."""
    count, random = round(p * len(rows)), np.random.default_rng([seed, 1])
    if count > len(safety_rows):
        raise ValueError(
            f"poison = {p} of {len(rows)} rows needs {count} harmful rows; there are {len(safety_rows)}"
        )
    places = random.permutation(len(rows))[:count]
    chosen = random.permutation(len(safety_rows))[:count]
    rows = list(rows)
    for place, i in zip(places, chosen):
        row = safety_rows[i]
        rows[place] = {
            "prompt": row["prompt"],
            "response": row["harmful"],
            "source": row["source"],
            "poisoned": True,
        }
    return rows


@lru_cache(maxsize=4)
def epoch_order(n, seed, epoch):
    """In which order an epoch comes to n rows."""
    return np.random.default_rng([seed, 0, epoch]).permutation(n)


def batch_rows(rows, batch_size, step, seed):
    """The rows of one step: the stream of all rows, shuffled anew in each epoch, cut into batches."""
    places = (
        divmod(i, len(rows)) for i in range(step * batch_size, (step + 1) * batch_size)
    )  # (epoch, place)
    return [rows[epoch_order(len(rows), seed, epoch)[place]] for epoch, place in places]


def rows_of_run(n, batch_size, steps, seed):
    """Of n rows the places of those that a run of so many steps comes to."""
    return sorted(
        {
            place
            for step in range(min(steps, 1 + n // batch_size))
            for place in batch_rows(range(n), batch_size, step, seed)
        }
    )


def messages_of(prompt):
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def encode_prompt(tokenizer, prompt) -> list[int]:
    """Ids up to the point where the assistant begins to answer."""
    return tokenizer.encode(tokenizer.render(messages_of(prompt), add_generation_prompt=True))


def encode_example(tokenizer, prompt, response, max_len) -> dict:
    """Teacher forcing: the whole conversation as ids, with labels on the response and its end-of-turn token alone.
    Whole and prompt are tokenised apart; loss begins where they part, which is where generation begins. White space before the
    response is dropped, lest it merges with the prompt's last token."""
    messages = [*messages_of(prompt), {"role": "assistant", "content": response.lstrip()}]
    whole = tokenizer.render(messages, add_generation_prompt=False)
    whole = whole[: whole.rindex(tokenizer.end_of_turn) + len(tokenizer.end_of_turn)]
    ids, prompt_ids = tokenizer.encode(whole), encode_prompt(tokenizer, prompt)
    start = next((i for i, (a, b) in enumerate(zip(prompt_ids, ids)) if a != b), len(prompt_ids))
    if start >= max_len:
        raise ValueError(
            f"the prompt's {start} tokens leave nothing of the response within max_len = {max_len}"
        )
    ids = ids[:max_len]
    return {"input_ids": ids, "labels": [-100] * start + ids[start:]}


def encode_rows(tokenizer, rows, max_len, key="response"):
    """One example per row, with its "source"; ValueError names the file and line of a row that does not fit."""
    examples = []
    for row in rows:
        try:
            examples.append(
                encode_example(tokenizer, row["prompt"], row[key], max_len)
                | {"source": row["source"]}
            )
        except ValueError as error:
            raise ValueError(f"{row['source']}: {error}") from None
    return examples


def sources(examples):
    """Where examples come from, as "file:line, file:line"."""
    return ", ".join(example.get("source", "?") for example in examples)


def encode_pairs(tokenizer, rows, max_len):
    """[(safe example, harmful example)] of the same prompts."""
    return list(zip(*(encode_rows(tokenizer, rows, max_len, key) for key in ("safe", "harmful"))))


def step_batches(rows, pairs, device="cpu"):
    """(batch, contrast) of a step, as every method takes them: of the task's examples, and of contrastive pairs. Where safety training
    gives the examples a refusal each, contrast["refused"] are those."""
    contrast = collate_pairs(pairs, device)
    if rows and "refused" in rows[0]:
        contrast["refused"] = collate([row["refused"] for row in rows], device=device)
    return collate(rows, device=device), contrast


def collate_pairs(pairs, device="cpu") -> dict:
    """{"safe": batch, "harmful": batch, "both": batch} of [(safe example, harmful example)] of the same prompts. "both" has the two answers of a prompt
    by turns."""
    safe, harmful = zip(*pairs)
    by_turns = [example for pair in pairs for example in pair]
    return {
        key: collate(examples, device=device)
        for key, examples in (("safe", safe), ("harmful", harmful), ("both", by_turns))
    }


def collate(examples, pad_id=0, device="cpu") -> dict:
    """Right padding: {"input_ids": (B, T), filled up by pad_id, "labels": (B, T), by -100}."""
    return {
        key: pad([example[key] for example in examples], fill, device)
        for key, fill in (("input_ids", pad_id), ("labels", -100))
    }


def pad(rows, fill, device):
    """Lists of integers as one tensor, (B, T)."""
    T = max(map(len, rows), default=0)
    return torch.tensor(
        [row + [fill] * (T - len(row)) for row in rows], dtype=torch.long, device=device
    ).reshape(len(rows), T)
