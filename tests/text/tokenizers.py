"""Small tokenizers of every kind, and the chat templates of public fine-tunes, written anew."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from edgemistral.text.bpe import BPETokenizer
from edgemistral.text.chat import JinjaTemplate
from edgemistral.text.sentencepiece import SentencePieceTokenizer
from edgemistral.text.tokenizer import Tokenizer

SMALL = Path(__file__).parents[1] / "data" / "tokenizer.model"   # 2048 pieces
TEXTS: list[str] = json.loads((Path(__file__).parents[1] / "data" / "texts.json").read_text(encoding="utf-8"))

SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|end_of_turn|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "[INST]", "[/INST]",
)
ORDINARY = ("<tool_call>", "</tool_call>", "<|user|>", "<|assistant|>")   # added tokens that are no special ones
KINDS = ("sentencepiece", "sentencepiece, not legacy", "byte-level", "prepending", "metaspace")

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'system' %}\n{{ '<|system|>\\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
    "openchat": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ 'GPT4 Correct ' + m['role'].title() + ': ' + m['content'] + '<|end_of_turn|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"
    ),
    "alpaca": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n{% elif m.role == 'user' %}"
        "### Instruction:\n{{ m.content | trim }}\n\n{% else %}### Response:\n{{ m.content }}{{ eos_token }}\n\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
    "vicuna": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system = messages[0]['content'] %}"
        "{% else %}{% set loop_messages = messages %}{% set system = 'A chat between a user and an assistant.' %}{% endif %}"
        "{{ bos_token + system.strip() }}{% for m in loop_messages %}{% if m['role'] == 'user' %}"
        "{{ ' USER: ' + m['content'].strip() }}{% else %}{{ ' ASSISTANT: ' + m['content'].strip() + eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set s = '<<SYS>>\\n' + messages[0]['content'].strip() + '\\n<</SYS>>\\n\\n' %}{% else %}{% set rest = messages %}"
        "{% set s = '' %}{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (s if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
        "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
        "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral v1": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% else %}{{ raise_exception('Only user and "
        "assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    "mistral v3": (
        "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}"
        "{%- else %}{%- set rest = messages %}{%- endif %}\n{{- bos_token }}\n{%- for m in rest %}\n"
        "    {%- if m['role'] == 'user' %}\n        {%- if loop.last and system is defined %}\n"
        "            {{- '[INST] ' + system + '\\n\\n' + m['content'] + '[/INST]' }}\n        {%- else %}\n"
        "            {{- '[INST] ' + m['content'] + '[/INST]' }}\n        {%- endif %}\n    {%- else %}\n"
        "        {{- ' ' + m['content'] + eos_token }}\n    {%- endif %}\n{%- endfor %}\n"
    ),
    "tekken": (
        "{{- bos_token }}{%- for m in messages %}{%- if m['role'] == 'user' %}{{- '[INST]' + m['content'] + '[/INST]' }}"
        "{%- elif m['role'] == 'system' %}{{- '[INST]' + m['content'] + '[/INST]' }}"
        "{%- else %}{{- m['content'] + eos_token }}{%- endif %}{%- endfor %}"
    ),
    "hermes": (
        "{{ bos_token }}{% if tools %}<|im_start|>system\nYou may call: {% for tool in tools %}{{ tool | tojson }}\n"
        "{% endfor %}Answer with <tool_call>\n{\"name\": ...}\n</tool_call><|im_end|>\n{% endif %}{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{% for call in m.tool_calls %}<tool_call>\n"
        "{{ call.function | tojson }}\n</tool_call>{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "generation, break and date": (
        "{{ strftime_now('%Y') }}{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{{ eos_token }}{% endfor %}"
    ),
}


@cache
def description(kind: str) -> str:
    """The tokenizer.json of a kind; for the SentencePiece kinds the one that transformers would convert the model to."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    if kind == "byte-level":
        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet)
        library.train_from_iterator(TEXTS, trainer)
    else:
        model = SentencePieceProcessor(model_proto=SMALL.read_bytes())
        pieces = {model.id_to_piece(i): i for i in range(model.vocab_size())}
        merges = sorted(
            (token_id, left, piece[n:]) for piece, token_id in pieces.items() if token_id > 258
            for n in range(1, len(piece)) if (left := piece[:n]) in pieces and piece[n:] in pieces
        )
        library = Library(models.BPE(
            pieces, [(left, right) for _, left, right in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        ))
        if kind in ("metaspace", "sentencepiece, not legacy"):
            library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        library.decoder = decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
        ])
        library.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    library.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    library.add_tokens([AddedToken(text, normalized=False) for text in ORDINARY])
    return library.to_str()


def reference(kind: str, template: str | None) -> Any:
    """transformers' tokenizer of a kind."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(description(kind)), chat_template=template, bos_token="<s>",
        eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False,
    )


def ours(kind: str, template: str) -> Tokenizer:
    """Our tokenizer of a kind."""
    chat = JinjaTemplate(template, {"bos_token": "<s>", "eos_token": "</s>"})
    if not kind.startswith("sentencepiece"):
        return BPETokenizer(description(kind).encode(), bos_id=1, eos_id=2, chat=chat)
    tokens = json.loads(description(kind))["added_tokens"]
    added = {token["id"]: (token["content"], token["special"]) for token in tokens if token["id"] > 2}
    return SentencePieceTokenizer(SMALL.read_bytes(), added=added, chat=chat, legacy=kind == "sentencepiece")
