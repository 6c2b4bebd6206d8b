"""Reads the text files of a checkpoint into one `TextSpec`: tokenizer, template, ends of turn, defaults."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemistral.errors import BadCheckpoint, BadInput
from edgemistral.files import regular, strict_json
from edgemistral.generate.sampler import SamplingParams
from edgemistral.text.chat import JinjaTemplate, end_of_turn, is_mistrals_own
from edgemistral.text.spec import TextSpec
from edgemistral.text.tokenizer import Tokenizer
from edgemistral_quantize import tekken

SENTENCEPIECE = ("tokenizer.model", *(f"tokenizer.model.{version}" for version in ("v7m1", "v7", "v3", "v2", "v1")))
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
MAX_TEMPLATE = 1 << 18     # characters


@dataclass(frozen=True)
class TextFiles:
    """data: the bytes of the tokenizer's file `path`; spec: everything else about text."""

    spec: TextSpec
    data: bytes
    path: Path
    bos_id: int | None
    eos_id: int             # of the sentence, for the model's config


def read_text_files(directory: Path, config: Mapping[str, Any], chat_template: Path | None = None) -> TextFiles:
    """The text of a checkpoint in a directory. config: the fields of config.json or params.json.

    chat_template: a file with a template to use instead of the checkpoint's. BadCheckpoint names the file that is wrong.
    """
    found = _Found(directory)
    kind, path, data = _tokenizer_file(directory)
    special = {name: text for name in SPECIAL if (text := found.special(name)) is not None}
    added = found.added()
    ends = [*_ids(config.get("eos_token_id"), "config.json: eos_token_id"),
            *_ids(found.generation.get("eos_token_id"), "generation_config.json: eos_token_id")]
    begins = [*_ids(config.get("bos_token_id"), "config.json: bos_token_id"),
              *_ids(found.generation.get("bos_token_id"), "generation_config.json: bos_token_id")]
    spec = TextSpec(
        kind=kind,
        added=tuple((token_id, text, control) for token_id, (text, control) in sorted(added.items())),
        special=special,
        legacy=found.tokenizer.get("legacy") is not False,
        defaults=_defaults(found.generation, directory / "generation_config.json"),
    )
    version = None
    if path.name == tekken.NAME:
        read = tekken.read_tekken(path, data)
        data, version = read.described, read.version
        special = {"bos_token": tekken.BOS, "eos_token": tekken.EOS, **special}
    if kind == "tokenizers":
        texts = {text: token_id for token_id, (text, _) in added.items()} | _vocabulary(data)
        begins = [*_known(special.get("bos_token"), texts), *begins]
        ends = [*_known(special.get("eos_token"), texts), *ends]
        if not ends:
            raise BadCheckpoint(f"{directory}: no file says which token ends a turn (eos_token_id in config.json)")
        said = found.tokenizer.get("add_bos_token", None if version is None else True)
        spec = dataclasses.replace(
            spec, bos_id=begins[0] if begins else None, adds_bos=_adds_bos(data, begins, said)
        )
        eos_id = ends[0]
        tokenizer = _made(spec, data, path, eos_id)
    else:
        spec = dataclasses.replace(spec, adds_bos=found.tokenizer.get("add_bos_token") is not False)
        tokenizer = _made(spec, data, path, None)
        eos_id = tokenizer.eos_id
        spec = dataclasses.replace(spec, added=tuple(token for token in spec.added if token[0] >= _size(tokenizer)))
        texts = {text: token_id for token_id, text in tokenizer.markup.items()}
        ends = [*_known(special.get("eos_token"), texts), *ends]
    special = {"bos_token": _text(tokenizer, tokenizer.bos_id), "eos_token": _text(tokenizer, eos_id), **special}
    template, tools = _templates(found, chat_template)
    turn_end = None
    if template is not None:
        where = chat_template or found.template_file
        try:
            JinjaTemplate(template, special, tools)
        except BadInput as problem:
            raise BadCheckpoint(f"{where}: {problem}") from None
        if not tokenizer.bytes_split_characters and is_mistrals_own(template, special):
            template = tools = None
        else:
            turn_end = end_of_turn(template, special, {text: token_id for token_id, text in tokenizer.markup.items()})
    ends = [*([] if turn_end is None else [turn_end]), *ends]
    if version is not None and template is None:
        if version not in tekken.VERSIONS:
            raise BadCheckpoint(f"{path}: is of version {version!r}, whose chat template is not built in; supported: "
                                f"{', '.join(tekken.VERSIONS)}; others need quantize --chat-template FILE")
        spec = dataclasses.replace(spec, mistral_version=tekken.VERSIONS[version])
        if missing := sorted(tekken.MARKS[tekken.VERSIONS[version]] - set(tokenizer.control.values())):
            raise BadCheckpoint(f"{path}: special_tokens lacks {missing[0]}")
    spec = dataclasses.replace(
        spec,
        chat_template=template,
        tool_template=tools,
        special=special if template is not None else {},
        # The defaults are those of Mistral's own models, so that both layouts of a checkpoint give the same blob.
        end_ids=() if set(ends) <= {eos_id} else tuple(dict.fromkeys(ends)),
        turn_end_id=None if not ends or ends[0] == eos_id else ends[0],
    )
    return TextFiles(spec, data, path, tokenizer.bos_id, eos_id)


def within_vocabulary(text: TextFiles, vocab_size: int) -> TextSpec:
    """The spec without added tokens that have no row in the embeddings (the tokenizer grew, the embeddings did not): the model
    cannot use them. BadCheckpoint: its template uses one, or an end of turn is outside the vocabulary.
    """
    spec, where = text.spec, text.path.parent
    added = {token_id: content for token_id, content, _ in spec.added}
    if spec.kind == "tokenizers":
        added |= {token_id: content for content, token_id in _vocabulary(text.data).items()}
    beyond = {token_id: content for token_id, content in added.items() if token_id >= vocab_size}
    templates = (spec.chat_template or "") + (spec.tool_template or "")
    for token_id, content in beyond.items():
        if content in templates:
            raise BadCheckpoint(f"{where}: the chat template uses {content[:40]!r}, token {token_id}, but the embeddings have "
                                f"{vocab_size} rows; they were not resized for the added tokens")
    ends = [token_id for token_id in spec.end_ids if token_id not in beyond]
    if outside := [token_id for token_id in ends if token_id >= vocab_size]:
        raise BadCheckpoint(f"{where}: eos_token_id {outside[0]} in config.json or generation_config.json is outside the "
                            f"vocabulary of {vocab_size}")
    return dataclasses.replace(
        spec, added=tuple(token for token in spec.added if token[0] < vocab_size), end_ids=tuple(ends),
        turn_end_id=None if spec.turn_end_id in beyond else spec.turn_end_id,
    )


class _Found:
    """The JSON files next to the tokenizer; a missing file is empty."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tokenizer = self._object("tokenizer_config.json")
        self.special_map = self._object("special_tokens_map.json")
        self.added_tokens = self._object("added_tokens.json")
        self.generation = self._object("generation_config.json")
        self.template_file = directory / "tokenizer_config.json"

    def special(self, name: str) -> str | None:
        """The text of a token such as bos_token."""
        value = self.tokenizer.get(name, self.special_map.get(name))
        if isinstance(value, Mapping):
            value = value.get("content")
        return value if isinstance(value, str) else None

    def added(self) -> dict[int, tuple[str, bool]]:
        """id -> text, and whether it is a control token; a token without further description is one."""
        found: dict[int, tuple[str, bool]] = {}
        for text, token_id in self.added_tokens.items():
            if type(token_id) is not int or token_id < 0:
                raise BadCheckpoint(f"{self.directory / 'added_tokens.json'}: {text!r:.40} has id {token_id!r:.20}")
            found[token_id] = text, True
        decoder, where = self.tokenizer.get("added_tokens_decoder") or {}, self.directory / "tokenizer_config.json"
        if not isinstance(decoder, Mapping):
            raise BadCheckpoint(f"{where}: added_tokens_decoder is not an object")
        for key, token in decoder.items():
            if not str(key).isdecimal() or not isinstance(token, Mapping) or not isinstance(token.get("content"), str):
                raise BadCheckpoint(f"{where}: added_tokens_decoder[{key!r:.20}] is not a token")
            found[int(key)] = token["content"], token.get("special") is not False
        return found

    def templates(self) -> dict[str, str]:
        """The checkpoint's templates by name."""
        jinja, as_json = self.directory / "chat_template.jinja", self.directory / "chat_template.json"
        value = self.tokenizer.get("chat_template")
        if regular.there(jinja):
            self.template_file, value = jinja, _read_text(jinja)
        elif value is None and regular.there(as_json):
            self.template_file, value = as_json, self._object(as_json.name).get("chat_template")
        if isinstance(value, str):
            value = [{"name": "default", "template": value}]
        elif isinstance(value, Mapping):
            value = [{"name": name, "template": template} for name, template in value.items()]
        found: dict[str, str] = {}
        for path in sorted((self.directory / "additional_chat_templates").glob("*.jinja")):    # as transformers 5 saves them
            found[path.stem] = _read_text(path)
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(item, Mapping) or not isinstance(item.get("template"), str):
                raise BadCheckpoint(f"{self.template_file}: chat_template is neither a text nor a list of named texts")
            found[str(item.get("name"))] = item["template"]
        return found

    def _object(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        if not regular.there(path):
            return {}
        fields = strict_json.parse(_read_bytes(path), str(path), BadCheckpoint)
        if not isinstance(fields, dict):
            raise BadCheckpoint(f"{path}: not a JSON object")
        return fields


def _tokenizer_file(directory: Path) -> tuple[Any, Path, bytes]:
    as_json = directory / "tokenizer.json"
    for name in SENTENCEPIECE:
        path = directory / name
        if regular.there(path):
            data = _read_bytes(path)
            if regular.there(as_json) and not _is_sentencepiece(data):     # such as Llama 3's, of another kind
                break
            return "sentencepiece", path, data
    if regular.there(as_json):
        return "tokenizers", as_json, _read_bytes(as_json)
    as_tekken = directory / tekken.NAME
    if as_tekken.is_file():
        return "tokenizers", as_tekken, _read_bytes(as_tekken)
    hint = "; vocab.json alone is not read: transformers' save_pretrained makes a tokenizer.json of it" if (
        directory / "vocab.json").is_file() else ""
    raise BadCheckpoint(f"{directory}: no tokenizer.model, tokenizer.json or {tekken.NAME}: copy it from the base (original) "
                        f"model{hint}")


def _is_sentencepiece(data: bytes) -> bool:
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_proto=data)
    except (RuntimeError, ValueError):
        return False
    return True


def _templates(found: _Found, given: Path | None) -> tuple[str | None, str | None]:
    """The template for chats, and one for chats with tools if it is different."""
    if given is not None:
        return read_template(given), None
    templates = {name: text for name, text in found.templates().items() if text.strip()}
    if len(templates) > 1 and "default" not in templates:
        raise BadCheckpoint(f"{found.template_file}: chat templates named {', '.join(templates)[:100]} and none named default; "
                            "choose one with quantize --chat-template FILE")
    chosen = templates.get("default", next(iter(templates.values()), None))
    tools = templates.get("tool_use")
    return (
        None if chosen is None else _checked_template(chosen, found.template_file),
        None if tools is None or tools == chosen else _checked_template(tools, found.template_file),
    )


def read_template(path: Path) -> str:
    """The text of a file with a chat template. BadCheckpoint: it cannot be read, or is too long."""
    return _checked_template(_read_text(path), path)


def _checked_template(text: str, path: Path) -> str:
    if len(text) > MAX_TEMPLATE:
        raise BadCheckpoint(f"{path}: a chat template of {len(text)} characters; at most {MAX_TEMPLATE} are read")
    return text


def _defaults(generation: Mapping[str, Any], path: Path) -> dict[str, float]:
    """The model's own sampling parameters."""
    found = {name: generation[name] for name in SAMPLING if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        found = {name: value for name, value in found.items() if name == "repetition_penalty"} | {"temperature": 0.0}
    try:
        SamplingParams(**found)
    except (BadInput, TypeError) as problem:
        raise BadCheckpoint(f"{path}: {problem}") from None
    return found


def _ids(value: Any, what: str) -> list[int]:
    """A list of ids from None, one id or a list; -1 means None."""
    values = [] if value is None or value == -1 else value if isinstance(value, list) else [value]
    if any(type(each) is not int or each < 0 for each in values):
        raise BadCheckpoint(f"{what} is {value!r:.60}: it must be a token id or a list of them")
    return values


def _known(text: str | None, ids: Mapping[str, int]) -> list[int]:
    return [ids[text]] if text is not None and text in ids else []


def _vocabulary(data: bytes) -> dict[str, int]:
    """The added tokens of a tokenizer.json by their texts."""
    try:
        return {str(token["content"]): int(token["id"]) for token in json.loads(data).get("added_tokens") or []}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}          # making the tokenizer raises the error


def _adds_bos(data: bytes, begins: Iterable[int], said: Any) -> bool:
    """Whether texts begin with bos_id: from tokenizer_config.json, or else from the tokenizer itself."""
    if isinstance(said, bool):
        return said
    from tokenizers import Tokenizer as Library

    try:
        first = Library.from_str(data.decode()).encode("a").ids[:1]
    except Exception:      # making the tokenizer raises the error
        return False
    return bool(set(first) & set(begins))


def _made(spec: TextSpec, data: bytes, path: Path, eos_id: int | None) -> Tokenizer:
    try:
        return spec.tokenizer(data, None, path.name, eos_id)
    except BadInput as problem:
        raise BadCheckpoint(f"{path.parent}: {problem}") from None


def _size(tokenizer: Tokenizer) -> int:
    """The number of pieces of a SentencePiece model, without added tokens."""
    return int(getattr(tokenizer, "_n_pieces", 0))


def _text(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "" if token_id is None else tokenizer.markup.get(token_id, "")


def _read_text(path: Path) -> str:
    try:
        return regular.read(path, BadCheckpoint).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadCheckpoint(f"{path}: not UTF-8 text (byte {error.start})") from None


def _read_bytes(path: Path) -> bytes:
    return regular.read(path, BadCheckpoint)
