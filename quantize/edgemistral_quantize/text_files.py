"""What a checkpoint says about text: its tokenizer, its added tokens, its chat template, its ends of turn, its defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from edgemistral.config import ids_of
from edgemistral.errors import BadCheckpoint, BadConfig, BadInput
from edgemistral.text.chat import MistralTemplate
from edgemistral.text.settings import DEFAULTS, TextSettings, check_defaults
from edgemistral.text.tokenizer import Tokenizer, open_tokenizer

SENTENCEPIECE = ("tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v2", "tokenizer.model.v1")
HUGGING_FACE = "tokenizer.json"
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
MAX_TEMPLATE = 1 << 20   # bytes


@dataclass(frozen=True)
class TextFiles:
    """Everything about text that goes from a source into a blob, whatever kind of source it is.

    A folder gives it through `read_text_files`; a reader of another format fills it itself.
    """

    kind: Literal["sentencepiece", "tokenizers"]   # how `tokenizer` is read
    tokenizer: bytes                               # a tokenizer.model, or a tokenizer.json
    added: dict[int, tuple[str, bool]] = field(default_factory=dict)   # id -> (text, special) beyond `tokenizer` itself
    chat_template: str | None = None               # Jinja; None: Mistral's own, if the tokenizer is one of theirs
    bos_id: int | None = None                      # None: neither the files nor the tokenizer have one
    end_ids: tuple[int, ...] = ()                  # ids that end an answer; the first is the model's own end of text
    defaults: dict[str, Any] = field(default_factory=dict)   # sampling: temperature, top_p, top_k, repetition_penalty
    names: dict[str, str] = field(default_factory=dict)      # for the template: bos_token, eos_token; missing: from ids
    legacy: bool = True                            # SentencePiece: each text between two added tokens begins with a space
    add_bos: bool = True                           # a raw text begins with <s>
    files: tuple[Path, ...] = ()                   # that were read

    @property
    def settings(self) -> TextSettings:
        """As a blob stores it."""
        return TextSettings(
            self.kind, self.added, self.chat_template, self.names, self.add_bos and self.bos_id is not None, self.legacy,
            self.defaults,
        )

    def open(self, vocab_size: int | None = None, name: str = "tokenizer") -> Tokenizer:
        """The tokenizer, checked. Raises BadInput."""
        return open_tokenizer(self.tokenizer, self.settings, vocab_size, name, self.end_ids)


def read_text_files(
    folder: Path, config: Mapping[str, Any], chat_template: str | None = None, vocab_size: int | None = None
) -> TextFiles:
    """Of a folder in Hugging Face or Mistral layout.

    config: the content of config.json, or {}. chat_template: overrides the folder's. vocab_size: of the model; added
    tokens beyond it that the template does not write are left out, for the model cannot meet them.
    Raises BadCheckpoint and BadConfig, naming the file.
    """
    reader = _Folder(folder)
    described = reader.object("tokenizer_config.json")
    special = reader.object("special_tokens_map.json")
    generation = reader.object("generation_config.json")
    template = chat_template if chat_template is not None else _find_template(reader, described)
    names = {
        name: content for name in NAMES
        if (content := _token_text(described.get(name, special.get(name)))) is not None
    }
    added = _find_added(reader, described, special)
    if vocab_size is not None:
        added = {i: token for i, token in added.items() if i < vocab_size or (template and token[0] in template)}
    add_bos = described.get("add_bos_token")
    text = TextFiles(
        "sentencepiece", b"", added, template, names=names, legacy=described.get("legacy") is not False,
        add_bos=add_bos if isinstance(add_bos, bool) else True,
    )
    text, tokenizer = _find_tokenizer(reader, text, None if isinstance(add_bos, bool) else HUGGING_FACE)
    try:
        bos_id, end_ids = _ends(config, generation, tokenizer, names, vocab_size)
    except BadConfig as problem:
        raise BadConfig(f"{folder}: {problem}") from None
    defaults = _defaults(generation, folder / "generation_config.json")
    return replace(text, bos_id=bos_id, end_ids=end_ids, defaults=defaults, files=tuple(reader.files))


def read_template(path: Path) -> str:
    """The text of a file with a chat template. Raises BadInput."""
    try:
        data = path.read_bytes()
        if len(data) > MAX_TEMPLATE:
            raise BadInput(f"{path}: too large for a chat template")
        return data.decode("utf-8-sig")
    except OSError as problem:
        raise BadInput(f"{path}: cannot be read: {problem.strerror or problem}") from None
    except UnicodeDecodeError as problem:
        raise BadInput(f"{path}: not UTF-8 (byte {problem.start})") from None


class _Folder:
    """Files of a folder, which may be missing; those that were read are remembered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[Path] = []

    def bytes(self, name: str) -> bytes | None:
        path = self.folder / name
        if not path.is_file():
            return None
        self.files.append(path)
        try:
            return path.read_bytes()
        except OSError as problem:
            raise BadCheckpoint(f"{path}: cannot be read: {problem.strerror or problem}") from None

    def text(self, name: str) -> str | None:
        data = self.bytes(name)
        try:
            return None if data is None else data.decode("utf-8-sig")
        except UnicodeDecodeError as problem:
            raise BadCheckpoint(f"{self.folder / name}: not UTF-8 (byte {problem.start})") from None

    def object(self, name: str) -> dict[str, Any]:
        """The JSON object in a file, {} if it is not there. Not strict: these files have numbers beyond 64 bits."""
        text = self.text(name)
        if text is None:
            return {}
        try:
            value = json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 20 else float(digits))
        except (ValueError, RecursionError) as problem:
            raise BadCheckpoint(f"{self.folder / name}: not usable JSON: {problem}") from None
        if not isinstance(value, dict):
            raise BadCheckpoint(f"{self.folder / name}: not a JSON object")
        return value


def _find_template(reader: _Folder, described: Mapping[str, Any]) -> str | None:
    """As transformers does: chat_template.jinja, chat_template.json, then tokenizer_config.json."""
    found: Any = reader.text("chat_template.jinja")
    where = "chat_template.jinja"
    if found is None:
        where = "chat_template.json"
        found = reader.object(where).get("chat_template")
    if found is None:
        where = "tokenizer_config.json"
        found = described.get("chat_template")
    named = {}
    if isinstance(found, list):   # of named ones
        found = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
    if isinstance(found, dict):
        named, found = found, found.get("default")
        if found is None and named:
            raise BadCheckpoint(
                f"{reader.folder / where}: has chat templates {', '.join(map(str, named))[:200]} but no default; "
                "give one with --chat-template"
            )
    tool_use = named.get("tool_use") or reader.text("additional_chat_templates/tool_use.jinja")
    if found is None:
        return None
    if not isinstance(found, str) or not isinstance(tool_use, str | None):
        raise BadCheckpoint(f"{reader.folder / where}: its chat_template is no text")
    if tool_use is not None and tool_use != found:
        return f"{{% if tools %}}{tool_use}{{% else %}}{found}{{% endif %}}"
    return found


def _find_added(
    reader: _Folder, described: Mapping[str, Any], special: Mapping[str, Any]
) -> dict[int, tuple[str, bool]]:
    """id -> (text, special) of all tokens that the files of transformers name."""
    more = special.get("additional_special_tokens") or described.get("additional_special_tokens") or []
    specials = {_token_text(value) for value in (*special.values(), *(more if isinstance(more, list) else []))}
    specials |= {_token_text(value) for name, value in described.items() if name.endswith("_token")}
    added: dict[int, tuple[str, bool]] = {}
    for text, token_id in reader.object("added_tokens.json").items():
        if type(token_id) is not int or token_id < 0 or not text:
            raise BadCheckpoint(f"{reader.folder / 'added_tokens.json'}: {text[:80]!r} has id {str(token_id)[:80]!r}")
        added[token_id] = (text, text in specials)
    decoder = described.get("added_tokens_decoder") or {}
    for key, token in decoder.items() if isinstance(decoder, dict) else ():
        content = _token_text(token)
        if not key.isdecimal() or len(key) > 9 or not content:
            where = reader.folder / "tokenizer_config.json"
            raise BadCheckpoint(f"{where}: added_tokens_decoder has {key[:80]!r}: {str(token)[:80]!r}")
        added[int(key)] = (content, bool(token.get("special")) if isinstance(token, dict) else False)
    return added


def _find_tokenizer(reader: _Folder, text: TextFiles, bos_of: str | None) -> tuple[TextFiles, Tokenizer]:
    """The SentencePiece model, or tokenizer.json where there is none or where the template is the model's own.

    Where both are, tokenizer.json is what transformers trained a fine-tune with; Mistral's own templates are encoded
    as mistral-common does, which reads the SentencePiece model. bos_of: read there whether a raw text begins with <s>.
    """
    folder = reader.folder
    name = next((name for name in SENTENCEPIECE if (folder / name).is_file()), None)
    both = (folder / HUGGING_FACE).is_file()
    if name is not None:
        first = replace(text, tokenizer=reader.bytes(name) or b"")
        try:
            opened = first.open(name=name)
        except BadInput as problem:
            if not both:
                raise BadCheckpoint(f"{folder}: {problem}") from None
        else:
            if isinstance(opened.chat, MistralTemplate):   # built in: the same blob from either layout
                bare = replace(first, chat_template=None, names={}, legacy=True, added={})
                pieces = bare.open(name=name)
                added = {
                    i: token for i, token in text.added.items()
                    if i >= pieces.n_words or pieces.piece(i) != token[0] or token[0] not in pieces.controls
                }
                return replace(bare, added=added), replace(bare, added=added).open(name=name)
            if not both:
                return first, opened
    if not both:
        tekken = "; tekken.json is not read, tokenizer.json is" if (folder / "tekken.json").is_file() else ""
        raise BadCheckpoint(f"{folder}: no {SENTENCEPIECE[0]} (a SentencePiece model) and no {HUGGING_FACE}{tekken}")
    data = reader.bytes(HUGGING_FACE) or b""
    second = replace(text, kind="tokenizers", tokenizer=data)
    try:
        tokenizer = second.open(name=HUGGING_FACE)
        if bos_of is not None and not _writes_bos(json.loads(data).get("post_processor"), tokenizer):
            second = replace(second, add_bos=False)
    except BadInput as problem:
        raise BadCheckpoint(f"{folder}: {problem}") from None
    return second, tokenizer


def _writes_bos(part: Any, tokenizer: Tokenizer) -> bool:
    """Whether a post-processor of tokenizer.json puts the begin-of-text token before a text."""
    if not isinstance(part, dict):
        return False
    if any(_writes_bos(each, tokenizer) for each in part.get("processors") or ()):
        return True
    single = part.get("single") or [{}]
    first = single[0].get("SpecialToken", {}).get("id") if isinstance(single[0], dict) else None
    return first is not None and tokenizer.controls.get(first) == tokenizer.bos_id


def _ends(
    config: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: Tokenizer, names: Mapping[str, str],
    vocab_size: int | None,
) -> tuple[int | None, tuple[int, ...]]:
    """bos_id, and all ids that end an answer: of config.json, of generation_config.json, of the tokenizer."""
    begins = [*ids_of(config, "bos_token_id"), *ids_of(generation, "bos_token_id")]
    ends = [*ids_of(generation, "eos_token_id")]
    for ids, name, own in ((begins, "bos_token", tokenizer.bos_id), (ends, "eos_token", tokenizer.eos_id)):
        if names.get(name) in tokenizer.controls:
            ids.append(tokenizer.controls[names[name]])
        if own >= 0:
            ids.append(own)
    if vocab_size is not None:   # those of config.json are the config's to refuse
        ends = [token_id for token_id in ends if token_id < vocab_size]
    ends = [*ids_of(config, "eos_token_id"), *ends]
    if not ends:
        raise BadConfig("eos_token_id is missing, and neither generation_config.json nor the tokenizer has it")
    return (begins[0] if begins else None), tuple(dict.fromkeys(ends))


def _defaults(generation: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The model's own sampling arguments."""
    defaults = {name: generation[name] for name in DEFAULTS if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        defaults = {name: value for name, value in defaults.items() if name == "repetition_penalty"}
        defaults["temperature"] = 0
    if defaults.get("top_k") == -1:   # vLLM's word for all
        defaults["top_k"] = 0
    try:
        check_defaults(defaults)
    except BadInput as problem:
        raise BadCheckpoint(f"{path}: {problem}") from None
    return defaults


def _token_text(token: Any) -> str | None:
    """Of a token as transformers saves it: a text, or an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
