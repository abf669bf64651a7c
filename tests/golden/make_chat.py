"""Record chat.json: `python tests/golden/make_chat.py TEMPLATES`.

TEMPLATES holds NAME.jinja, the chat_template of each family's own tokenizer_config.json: llama2, llama3, llama3.1, zephyr,
smollm2 and qwen2.5. Vicuna publishes no template, so FastChat (fschat), with which it was trained, renders it; Mistral's is
rendered by mistral-common. Development dependencies: jinja2, fschat, mistral-common."""

import json
import sys
from pathlib import Path

from fastchat.conversation import get_conv_template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

CONVERSATIONS = [
    [("user", "Hello")],
    [("user", "Hello"), ("assistant", "Hi there"), ("user", "Who are you?")],
    [("system", "Be brief."), ("user", "Hello")],
    [
        ("system", "Be brief."),
        ("user", "Hello"),
        ("assistant", "Hi there"),
        ("user", "Who are you?"),
    ],
]
TOKENS = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "llama3.1": ("<|begin_of_text|>", "<|eot_id|>"),
}


def jinja(text, name):
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        text
    )  # as transformers does
    bos, eos = TOKENS.get(name, ("<s>", "</s>"))
    return lambda turns: template.render(
        messages=[{"role": r, "content": c} for r, c in turns],
        add_generation_prompt=True,
        bos_token=bos,
        eos_token=eos,
    )


def vicuna(turns):
    conversation = get_conv_template("vicuna_v1.1")
    for role, content in turns:
        if role == "system":
            conversation.set_system_message(content)
        else:
            conversation.append_message(conversation.roles[role == "assistant"], content)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def mistral(turns):
    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    request = ChatCompletionRequest(
        messages=[kinds[role](content=content) for role, content in turns]
    )
    text = (
        MistralTokenizer.v3().encode_chat_completion(request).text
    )  # shows SentencePiece's space and newline marks
    return text.replace("▁", " ").replace("<0x0A>", "\n")


renderers = {
    path.stem: jinja(path.read_text(), path.stem)
    for path in sorted(Path(sys.argv[1]).glob("*.jinja"))
}
renderers |= {"vicuna": vicuna, "mistral": mistral}
golden = {
    name: [
        {"messages": [{"role": r, "content": c} for r, c in turns], "text": render(turns)}
        for turns in CONVERSATIONS
    ]
    for name, render in renderers.items()
}
(Path(__file__).parent / "chat.json").write_text(
    json.dumps(golden, indent=1, ensure_ascii=False) + "\n"
)
