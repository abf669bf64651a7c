"""Text to token ids and back, and the chat formats, each written out as its family's own template renders it."""

import json
import re
from pathlib import Path

import tokenizers

from minisap.checkpoint import read_object, read_text

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
MAX_BYTES = 10**8  # of tokenizer.json; the largest that we know has 33 MB
# The first of the characters that stand for control tokens in messages, which are words there; Unicode has none in this place.
MARK = "\U00050000"
# The system message that a chatml template spells out, for conversations that have none.
CHATML_SYSTEM = re.compile(r"<\|im_start\|>system(?:\\n|\n)([^{}'\"<]+)<\|im_end\|>")


def llama2(system, turns, generate):
    text = ""
    for i, (role, content) in enumerate(turns):
        if i == 0 and system:
            content = f"<<SYS>>\n{system}\n<</SYS>>\n\n{content}"
        text += (
            f"<s>[INST] {content.strip()} [/INST]" if role == "user" else f" {content.strip()} </s>"
        )
    return text


def llama3(system, turns, generate):
    turns = [("system", system)] * bool(system) + turns + [("assistant", None)] * generate
    text = "<|begin_of_text|>"
    for role, content in turns:
        text += f"<|start_header_id|>{role}<|end_header_id|>\n\n"
        text += "" if content is None else f"{content.strip()}<|eot_id|>"
    return text


def llama31(system, turns, generate):
    """Llama 3.1 and 3.2, whose templates put dates into the system message. Today's is fixed, so that runs can be compared."""
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    head = f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{dates}{(system or '').strip()}<|eot_id|>"
    return head + llama3(None, turns, generate).removeprefix("<|begin_of_text|>")


def chatml(system, turns, generate):
    turns = [("system", system)] * bool(system) + turns
    return (
        "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
        + "<|im_start|>assistant\n" * generate
    )


def zephyr(system, turns, generate):
    turns = [("system", system)] * bool(system) + turns
    return (
        "".join(f"<|{role}|>\n{content}</s>\n" for role, content in turns)
        + "<|assistant|>\n" * generate
    )


def mistral(system, turns, generate):
    """Version 3 of Mistral's template: the system message stands in the last user turn."""
    text, last = "<s>", max(i for i, (role, _) in enumerate(turns) if role == "user")
    for i, (role, content) in enumerate(turns):
        if system and i == last:
            content = f"{system}\n\n{content}"
        text += f"[INST] {content}[/INST]" if role == "user" else f" {content.strip()}</s>"
    return text


def vicuna(system, turns, generate):
    text = (system or VICUNA_SYSTEM) + " "
    for role, content in turns:
        text += f"USER: {content} " if role == "user" else f"ASSISTANT: {content}</s>"
    return text + "ASSISTANT:" * generate


def world(system, turns, generate):
    """The synthetic world's (world.py)."""
    if system:
        raise ValueError("the world's format has no system messages")
    return "".join(
        f"<s> {content} <a>" if role == "user" else f" {content} </s>" for role, content in turns
    )


# What a family's own template contains, as patterns; the first format that has all of its own is the one.
MARKS = {
    "llama3.1": ("Cutting Knowledge Date", r"<\|start_header_id\|>", r"<\|eot_id\|>"),
    "llama3": (r"<\|start_header_id\|>", r"<\|eot_id\|>"),
    "chatml": (r"<\|im_start\|>", r"<\|im_end\|>"),
    "zephyr": (r"<\|user\|>.{0,8}\+ *message\['content'\] *\+ *eos_token",),
    "llama2": ("<<SYS>>", r"\[INST\]"),
    "mistral": (r"\[INST\]", r"\[/INST\]"),
    "vicuna": ("USER:", "ASSISTANT:"),
}
# format: (renderer, end-of-turn token)
FORMATS = {
    "llama2": (llama2, "</s>"),
    "llama3": (llama3, "<|eot_id|>"),
    "llama3.1": (llama31, "<|eot_id|>"),
    "chatml": (chatml, "<|im_end|>"),
    "zephyr": (zephyr, "</s>"),
    "mistral": (mistral, "</s>"),
    "vicuna": (vicuna, "</s>"),
    "world": (world, "</s>"),
}


def find_format(path, settings, vocabulary):
    """Name the chat format of a checkpoint directory from what its own template contains, or without one from its special
    tokens. ValueError if that is unknown."""
    if "chat_format" in settings:
        return settings["chat_format"]
    template = read_template(path, settings) or "\n".join(vocabulary)
    for name, marks in MARKS.items():
        if all(re.search(mark, template) for mark in marks):
            if name == "mistral" and " [/INST]" in template:
                raise ValueError(
                    f"{path}: the chat template of Mistral before v0.3 ('[INST] … [/INST]') is not implemented"
                )
            return name
    raise ValueError(
        f"{path}: no chat template that is known here; choose one with --chat_format {'|'.join(FORMATS)}"
    )


def read_template(path, settings):
    """The checkpoint's chat template, "" without one; of several named ones, the default."""
    if (path / "chat_template.jinja").exists():
        return read_text(path / "chat_template.jinja")
    template = settings.get("chat_template") or ""
    if isinstance(template, list):
        template = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict)
        }.get("default")
    if not isinstance(template, str):
        raise ValueError(
            f"{path / 'tokenizer_config.json'}: chat_template is neither a text nor a list with a default"
        )
    return template


class Tokenizer:
    """tokenizer.json through the `tokenizers` library, with the chat format of the checkpoint directory `path`."""

    def __init__(self, path, chat_format=None):
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{file}: missing")
        if file.stat().st_size > MAX_BYTES:  # read, it takes ten times as much
            raise ValueError(
                f"{file}: {file.stat().st_size:,} bytes; no tokenizer has more than {MAX_BYTES:,}"
            )
        try:
            self.tokens = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{file}: {error}") from None
        self.tokens.no_padding()  # a file may ask for both; neither is meant for training
        self.tokens.no_truncation()
        config = path / "tokenizer_config.json"
        settings = read_object(config) if config.exists() else {}
        self.chat_format = chat_format or find_format(path, settings, self.tokens.get_vocab())
        if not isinstance(self.chat_format, str) or self.chat_format not in FORMATS:
            raise ValueError(
                f"{config}: chat_format = {self.chat_format!r} is unknown; known: {', '.join(FORMATS)}"
            )
        self.render_turns, self.end_of_turn = FORMATS[self.chat_format]
        self.vocab_size = max(self.tokens.get_vocab().values(), default=-1) + 1
        if self.vocab_size > 2**20:  # the library would count up to there
            raise ValueError(f"{file}: an id of {self.vocab_size - 1} is beyond any vocabulary")
        whole = json.loads(self.tokens.to_str())
        self.marks, unknown = (
            self.as_words(whole),
            whole["model"].get("unk_token"),
        )  # any text may come to the latter
        control = sorted(
            {token for token, _ in self.marks.values()} - {unknown}, key=len, reverse=True
        )
        self.control_ids, self.control = (
            {self.tokens.token_to_id(token) for token in control},
            re.compile("|".join(map(re.escape, control)) or "(?!)"),
        )
        if self.tokens.token_to_id(self.end_of_turn) is None:
            raise ValueError(
                f"{path}: chat_format {self.chat_format} ends a turn with {self.end_of_turn}, which is no token here"
            )
        self.stop_ids = {self.tokens.token_to_id(self.end_of_turn)}
        self.bos = [
            i for i in self.tokens.encode("").ids[:1] if i not in self.stop_ids
        ]  # what the file puts first
        self.world_seed = settings.get("world_seed")
        if self.chat_format == "world" and (
            type(self.world_seed) is not int or self.world_seed < 0
        ):
            raise ValueError(
                f"{config}: world_seed = {self.world_seed!r}; a checkpoint of the synthetic world has its number there"
            )
        found = (
            CHATML_SYSTEM.search(read_template(path, settings))
            if self.chat_format == "chatml"
            else None
        )
        self.default_system = found and found[1]

    def encode(self, text) -> list[int]:
        """Ids of a text in which special tokens are written out, but for those that render has marked as words of a message. A BOS is added where the
        tokenizer's own rules add one and the text does not already begin with it."""
        ids = []
        try:
            for part in re.split(f"([{''.join(self.marks)}])", text) if self.marks else [text]:
                new = (
                    self.marks[part][1]
                    if part in self.marks
                    else self.tokens.encode(part, add_special_tokens=False).ids
                )
                surplus = (
                    0
                    if part in self.marks
                    else sum(i in self.control_ids for i in new) - len(self.control.findall(part))
                )
                if surplus:
                    raise ValueError(
                        "a control token in other letters, which this tokenizer takes for the token itself"
                        if surplus > 0
                        else "this tokenizer does not find a control token where the chat format has one"
                    )
                ids += new
        except (
            Exception
        ) as error:  # the library's is plain: a word that a word-level vocabulary lacks
            known = (
                f"; the synthetic world's model knows the {len(self.tokens.get_vocab())} words of minisap/study/world.py alone"
                * (self.world_seed is not None)
            )
            raise ValueError(f"{text[:40]!r} …: {error}{known}") from None
        return ids if ids[:1] == self.bos else self.bos + ids

    def as_words(self, whole):
        """Of the file's content {mark: (control token, its ids as the mere text that it is in a message)}. A control token is one that the
        file calls special, or that the chat format writes."""
        written = self.render_turns(
            None if self.chat_format == "world" else "-",
            [("user", ""), ("assistant", ""), ("user", "")],
            True,
        )
        added = [
            token.content
            for token in self.tokens.get_added_tokens_decoder().values()
            if token.special or token.content.strip() and token.content in written
        ]
        words = tokenizers.Tokenizer.from_str(json.dumps(whole | {"added_tokens": []}))
        return {
            chr(ord(MARK) + i): (token, words.encode(token, add_special_tokens=False).ids)
            for i, token in enumerate(added)
        }

    def mark(self, content):
        """A message in which every control token is marked, so that it ends no turn and begins none. ValueError where the vocabulary has it
        as a word, and where the message has our marks."""
        if any(mark in content for mark in self.marks):
            raise ValueError(
                f"a message holds the character {ascii(next(mark for mark in self.marks if mark in content))}, which stands for a control token here"
            )
        for mark, (token, ids) in self.marks.items():
            if token in content and self.tokens.token_to_id(token) in ids:
                raise ValueError(
                    f"a message holds {token}, which this tokenizer can't tell from the end or the beginning of a turn"
                )
            content = content.replace(token, mark)
        return content

    def decode(self, ids) -> str:
        return self.tokens.decode(ids, skip_special_tokens=True)

    def render(self, messages, add_generation_prompt=True) -> str:
        """The conversation [{"role", "content"}, …] as one string: an optional system message, then user and assistant by turns."""
        turns = [(message["role"], self.mark(message["content"])) for message in messages]
        system = turns.pop(0)[1] if turns and turns[0][0] == "system" else self.default_system
        expected = ["user", "assistant"] * len(turns)
        if not turns or [role for role, _ in turns] != expected[: len(turns)]:
            raise ValueError(
                "roles must be system (optional), user, assistant, user, …; "
                f"found {', '.join(message['role'] for message in messages)}"
            )
        return self.render_turns(system, turns, add_generation_prompt)
