"""A conversation -> the ids of a prompt: Mistral's own templates, and the choice between them and a checkpoint's Jinja.

The reference of Mistral's templates is mistral-common. Two exist, and the tokenizer itself says which one its weights
were trained on:

    v1      [INST] and [/INST] are ordinary text: Mistral-7B-Instruct v0.1 and v0.2
            <s> {[INST] user [/INST]} {assistant} </s> {[INST] user [/INST]} ...     each {} encoded on its own
            a system text and a blank line stand before the first user text
    v2, v3  [INST] and [/INST] are control ids: v0.3
            <s> [INST] {user} [/INST] {assistant} </s> [INST] {user} [/INST] ...
            a system text and a blank line stand before the last user text; assistant texts lose their trailing spaces
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgemistral.errors import BadRequest
from edgemistral.text import mistral_tools
from edgemistral.text.tokenizer import check_text

if TYPE_CHECKING:
    from edgemistral.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]

BLANK_LINE = "\n\n"
ROLES = ("system", "user", "assistant")
# What Mistral's own Jinja templates give for PROBE, in all their variants of white space.
PROBE = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}, {"role": "user", "content": "V"}]
PLAIN_INST = re.compile(r"<s>\s?\[INST\] U \[/INST\] ?A ?</s>\s?\[INST\] V \[/INST\] ?")
CONTROL_INST = re.compile(r"<s>\s?\[INST\] ?U ?\[/INST\] ?A ?</s>\s?\[INST\] ?V ?\[/INST\] ?")
WITH_SYSTEM = re.compile(r"<s>\s?\[INST\] ?S\n+U ?\[/INST\] ?")


class ChatTemplate(ABC):
    """Conversations -> prompts for one tokenizer."""

    name: str           # for people: "Mistral v1", "Mistral v3", "Jinja" or "none"
    takes_tools: bool   # whether `tools` and messages of role "tool" mean something to it
    first_space = ""    # in Lark: the space before an answer that tokenizers of SentencePiece's kind write and drop

    @abstractmethod
    def encode(self, messages: Messages, tools: Tools | None, add_generation_prompt: bool) -> list[int]:
        """See `Tokenizer.encode_chat`."""

    @abstractmethod
    def check(self, messages: Messages) -> None:
        """Raise BadRequest, whose `field` says for example `messages[2].role`, for what is no conversation."""


def chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The template of a tokenizer's settings. Raises BadInput when it is no Jinja, and names the line."""
    source = tokenizer.settings.chat_template
    inst = {"[INST]", "[/INST]"} <= tokenizer.controls.keys()
    of_mistral = MistralTemplate(tokenizer, inst) if inst or tokenizer.byte_fallback else None
    if source is None:
        return of_mistral or NoTemplate()
    from edgemistral.text.jinja import JinjaTemplate

    jinja = JinjaTemplate(tokenizer, source)
    if of_mistral is not None and tokenizer.byte_fallback and _is_mistrals(jinja, inst):
        return of_mistral
    return jinja


def _is_mistrals(template: Any, inst: bool) -> bool:
    """Whether a Jinja template is one of Mistral's own, told by what it makes of three short messages."""
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    try:
        if not (CONTROL_INST if inst else PLAIN_INST).fullmatch(template.render(PROBE, None, True, names)):
            return False
    except BadRequest:
        return False
    try:
        system = {"role": "system", "content": "S"}
        return WITH_SYSTEM.fullmatch(template.render([system, PROBE[0]], None, True, names)) is not None
    except BadRequest:   # the older ones refuse it
        return True


class NoTemplate(ChatTemplate):
    """Of a model that was not taught any conversation."""

    name, takes_tools = "none", False

    def encode(self, messages: Messages, tools: Tools | None, add_generation_prompt: bool) -> list[int]:
        raise BadRequest(
            "messages need a chat template, which this model has not: continue a raw text (run --raw, /v1/completions), "
            "or give one with quantize --chat-template", "messages",
        )

    def check(self, messages: Messages) -> None:
        self.encode(messages, None, True)


class MistralTemplate(ChatTemplate):
    """Mistral's own templates, whose ids are those of mistral-common."""

    first_space = '" "'   # every answer is a text of its own

    def __init__(self, tokenizer: Tokenizer, control_inst: bool) -> None:
        self._tokenizer = tokenizer
        controls = tokenizer.controls
        self._inst = (controls["[INST]"], controls["[/INST]"]) if control_inst else None
        self.name = "Mistral v3" if control_inst else "Mistral v1"
        self.takes_tools = control_inst and all(text in controls for text in mistral_tools.CONTROLS)

    def encode(self, messages: Messages, tools: Tools | None, add_generation_prompt: bool) -> list[int]:
        """As in mistral-common, consecutive messages of one role become one, with a blank line between the texts that
        are not empty, and an empty user turn stands before a conversation that has only a system text or that the
        assistant opens. Stricter than it: a system message may only stand at the beginning (it would move it there
        silently). An empty assistant message before the end gives just </s>, which is what a model that answered
        nothing has written."""
        if tools and not self.takes_tools:
            raise BadRequest("tools: this model's chat template has no place for them", "tools")
        if self.takes_tools and (tools or _speaks_of_tools(messages)):
            return self._with_tools(messages, tools, add_generation_prompt)
        system, turns = chat_turns(messages)
        tokenizer = self._tokenizer
        last_user = max(i for i, (role, _) in enumerate(turns) if role == "user")
        system_at = last_user if self._inst else 0
        ids = [tokenizer.bos_id]
        for i, (role, text) in enumerate(turns):
            if role == "user":
                ids += self._user_turn(system + BLANK_LINE + text if system and i == system_at else text)
            else:
                ids += tokenizer.encode(text.rstrip(" ") if self._inst else text)
                if i + 1 < len(turns) or not add_generation_prompt:
                    ids.append(tokenizer.eos_id)
        return ids

    def check(self, messages: Messages) -> None:
        if self.takes_tools and _speaks_of_tools(messages):
            self._with_tools(messages, None, True)
        else:
            chat_turns(messages)

    def _with_tools(self, messages: Messages, tools: Tools | None, add_generation_prompt: bool) -> list[int]:
        """A conversation with tools, calls of them or their results; mistral_tools.py shows it."""
        tokenizer, controls = self._tokenizer, self._tokenizer.controls
        talk = [m if _is_talk(m) else {"role": "assistant", "content": "-"} for m in check_list(messages)]
        system, _ = chat_turns(talk)   # checks what is said
        said = [(i, message) for i, message in enumerate(messages) if message["role"] != "system"]
        users = [i for i, message in said if message["role"] == "user"]
        if not users:
            raise BadRequest("messages: tools need a user message", "messages")
        ids, run = [tokenizer.bos_id], [""]
        for at, (i, message) in enumerate(said):
            field, following = f"messages[{i}]", said[at + 1][1] if at + 1 < len(said) else None
            if message["role"] == "tool":
                text = tokenizer.encode(mistral_tools.result_text(message, field))
                ids += [controls["[TOOL_RESULTS]"], *text, controls["[/TOOL_RESULTS]"]]
            elif message.get("tool_calls"):
                text = tokenizer.encode(mistral_tools.calls_text(message, field))
                ids += [controls["[TOOL_CALLS]"], *text, tokenizer.eos_id]
            else:   # what one role says in several messages is one turn
                run.append(message["content"])
                if following is not None and following["role"] == message["role"] and _is_talk(following):
                    continue
                whole, run = BLANK_LINE.join(filter(None, run)), [""]
                if message["role"] == "user":
                    if i == users[-1]:
                        whole = system + BLANK_LINE + whole if system else whole
                        if tools:
                            described = tokenizer.encode(mistral_tools.tools_text(tools))
                            ids += [controls["[AVAILABLE_TOOLS]"], *described, controls["[/AVAILABLE_TOOLS]"]]
                    ids += self._user_turn(whole)
                else:
                    ids += tokenizer.encode(whole.rstrip(" "))
                    if following is not None or not add_generation_prompt:
                        ids.append(tokenizer.eos_id)
        return ids

    def _user_turn(self, text: str) -> list[int]:
        if self._inst is None:
            return self._tokenizer.encode(f"[INST] {text} [/INST]")
        begin, end = self._inst
        return [begin, *self._tokenizer.encode(text), end]


def _is_talk(message: Mapping[str, Any]) -> bool:
    """Whether a message is a text, and neither calls tools nor brings their result."""
    return message.get("role") != "tool" and not (message.get("role") == "assistant" and message.get("tool_calls"))


def _speaks_of_tools(messages: Messages) -> bool:
    return not all(map(_is_talk, check_list(messages)))


def chat_turns(messages: Messages) -> tuple[str, list[tuple[str, str]]]:
    """Messages -> the system text and turns (role, text) that alternate and begin with the user.

    Raises BadRequest, whose `field` says for example `messages[2].role`.
    """
    merged: list[tuple[str, list[str]]] = []
    for i, message in enumerate(check_list(messages)):
        field = f"messages[{i}]"
        for key in ("role", "content"):
            if key not in message:
                raise BadRequest(f"{field}.{key} is missing", f"{field}.{key}")
        role, content = message["role"], check_text(message["content"], f"{field}.content")
        if role not in ROLES:
            raise BadRequest(f"{field}.role is {role!r:.40}: must be system, user or assistant", f"{field}.role")
        if role == "system" and merged and merged[-1][0] != "system":
            raise BadRequest(f"{field}.role is 'system', which may only come first", f"{field}.role")
        if not merged or merged[-1][0] != role:
            merged.append((role, []))
        if content:
            merged[-1][1].append(content)
    turns = [(role, BLANK_LINE.join(texts)) for role, texts in merged]
    if len(turns) == 1 and turns[0][0] == "assistant":
        raise BadRequest(
            "messages[0].role is 'assistant': a conversation needs a system or a user message", "messages[0].role"
        )
    system = turns.pop(0)[1] if turns[0][0] == "system" else ""
    if not turns or turns[0][0] != "user":
        turns.insert(0, ("user", ""))
    return system, turns


def check_list(messages: object) -> Messages:
    """The messages if they are a list of objects that is not empty, else BadRequest."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise BadRequest(f"messages must be a list of messages, not {type(messages).__name__}", "messages")
    if not messages:
        raise BadRequest("messages is empty: a conversation needs a message", "messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            field = f"messages[{i}]"
            raise BadRequest(f"{field} must be an object with role and content, not {type(message).__name__}", field)
    return messages
