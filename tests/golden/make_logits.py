"""Record logits.json with transformers (a development dependency): `python tests/golden/make_logits.py SmolLM2-135M-Instruct.Q4_1.gguf`.

For each tiny configuration of tests/tiny.py, and for one real prompt on the GGUF file that weights/get.py converts: logits and
greedy tokens."""

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from tiny import CONFIGS, write_checkpoint

PROMPT = [{"role": "user", "content": "What is the capital of France?"}]


def record(path, ids, new_tokens, **more):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", **more
    ).eval()
    with torch.no_grad():
        for w in model.parameters() if more else ():  # as the converted checkpoint stores them
            w.copy_(w.bfloat16())
    input_ids = torch.tensor([ids])
    with torch.no_grad():
        logits = model(input_ids).logits[0]
        tokens = model.generate(
            input_ids,
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
    return logits, tokens[0, len(ids) :].tolist()


def main():
    golden = {
        "made_with": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "tiny": {},
    }
    ids = [
        1,
        5,
        17,
        80,
        33,
        2,
        64,
        9,
        11,
        5,
        41,
        77,
        8,
        90,
        23,
        7,
        61,
        30,
        12,
        3,
        55,
        44,
        71,
        19,
        28,
        95,
        6,
        50,
    ]
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(folder, config, shards=3 if name.startswith("sharded") else 1)
            logits, tokens = record(folder, ids, new_tokens=16)
        golden["tiny"][name] = {
            "input_ids": ids,
            "logits": [[round(x, 5) for x in row] for row in logits[-8:].tolist()],
            "tokens": tokens,
        }
    gguf = Path(
        sys.argv[1]
    )  # read by transformers itself, so that our conversion is put to the test as well
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ids = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=False)
    logits, tokens = record(gguf.parent, ids, new_tokens=16, gguf_file=gguf.name)
    golden["real"] = {
        "messages": PROMPT,
        "input_ids": ids,
        "last_logits": [round(x, 5) for x in logits[-1, ::64].tolist()],
        "tokens": tokens,
    }
    (Path(__file__).parent / "logits.json").write_text(json.dumps(golden) + "\n")


main()
