"""What a folder says about text: templates, added tokens, ends of turn and defaults, from whichever file has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from edgemistral_quantize import quantize
from edgemistral_quantize.text_files import TextFiles, read_text_files

from edgemistral.errors import BadCheckpoint, BadConfig, BadInput
from edgemistral.files.blob import Blob
from edgemistral.text.chat import MistralTemplate
from tests.checkpoints import TOKENIZER, random_weights, small_config, write_hf
from tests.text.tokenizers import TEMPLATES, description

CHATML = TEMPLATES["chatml"]
HUGE = 1000000000000000019884624838656   # as transformers writes "no limit"


def folder(path: Path, sentencepiece: bool = True, **files: Any) -> Path:
    """A folder with these files; `_json` and `_jinja` at the end of a name are its ending."""
    path.mkdir(exist_ok=True)
    if sentencepiece:
        (path / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    for name, content in files.items():
        stem, _, ending = name.rpartition("_")
        text = content if isinstance(content, str) else json.dumps(content)
        (path / f"{stem}.{ending}").write_text(text, encoding="utf-8")
    return path


def read(path: Path, config: dict[str, Any] | None = None, **files: Any) -> TextFiles:
    return read_text_files(folder(path, **files), config or {"bos_token_id": 1, "eos_token_id": 2})


@pytest.mark.parametrize("files", [
    {"tokenizer_config_json": {"chat_template": CHATML, "model_max_length": HUGE}},
    {"tokenizer_config_json": {"chat_template": [{"name": "default", "template": CHATML}]}},
    {"chat_template_jinja": CHATML, "tokenizer_config_json": {"chat_template": "old"}},
    {"chat_template_json": {"chat_template": CHATML}},
    {"chat_template_jinja": "\ufeff" + CHATML},
])
def test_a_template_is_found_wherever_it_is(tmp_path: Path, files: dict[str, Any]) -> None:
    assert read(tmp_path, **files).chat_template == CHATML


def test_a_template_for_tools_beside_the_usual_one(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools }} tools"}]
    chat = read(tmp_path, tokenizer_config_json={"chat_template": templates}).open().chat
    user = [{"role": "user", "content": "x"}]
    assert chat.takes_tools
    assert chat.encode(user, None, True) != chat.encode(user, [{"name": "f"}], True)


def test_named_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="rag but no default"):
        read(tmp_path, tokenizer_config_json={"chat_template": [{"name": "rag", "template": "x"}]})


def test_added_tokens_and_ends_of_turn_are_the_union_of_all_files(tmp_path: Path) -> None:
    text = read(
        tmp_path, {"bos_token_id": 1, "eos_token_id": [2050, 2]},
        added_tokens_json={"<|im_start|>": 2049, "<|im_end|>": 2050},
        tokenizer_config_json={
            "eos_token": {"content": "<|im_end|>"},
            "added_tokens_decoder": {"2051": {"content": "<|done|>", "special": True}, "2052": {"content": "<note>"}},
        },
        generation_config_json={"eos_token_id": [2051], "temperature": 0.6, "top_p": 0.9, "do_sample": True},
    )
    assert text.end_ids == (2050, 2, 2051)
    assert text.added == {
        2049: ("<|im_start|>", False), 2050: ("<|im_end|>", True), 2051: ("<|done|>", True), 2052: ("<note>", False),
    }
    assert text.defaults == {"temperature": 0.6, "top_p": 0.9}
    tokenizer = text.open(2060)
    assert tokenizer.decode([2050, 2052, 2059]) == "<note>"
    assert [tokenizer.is_padding(i) for i in (2047, 2052, 2053)] == [False, False, True]


def test_null_and_absent_ids_come_from_the_other_files(tmp_path: Path) -> None:
    null = {"bos_token_id": None, "eos_token_id": None}
    text = read(tmp_path, null, generation_config_json={"bos_token_id": 1, "eos_token_id": 5})
    assert (text.bos_id, text.end_ids) == (1, (5, 2))
    assert (read(tmp_path / "other", {"eos_token_id": None}).bos_id, read(tmp_path / "other", {}).end_ids) == (1, (2,))
    with pytest.raises(BadConfig, match="eos_token_id is 'x'"):
        read(tmp_path, {"eos_token_id": "x"})


def test_no_sampling_is_temperature_zero(tmp_path: Path) -> None:
    assert read(tmp_path, generation_config_json={"do_sample": False, "top_p": 0.5}).defaults == {"temperature": 0}
    with pytest.raises(BadCheckpoint, match=r"generation_config\.json: temperature is -1"):
        read(tmp_path, generation_config_json={"temperature": -1})


def test_tokenizer_json_alone(tmp_path: Path) -> None:
    files = {"tokenizer_json": description("byte-level"), "chat_template_jinja": CHATML}
    text = read(tmp_path, {"eos_token_id": 2}, sentencepiece=False, **files)
    assert (text.kind, text.bos_id, text.end_ids, text.add_bos) == ("tokenizers", 1, (2,), False)
    assert text.open().chat.name == "Jinja"


def test_tokenizer_json_is_read_beside_a_model_where_the_template_is_not_mistrals(tmp_path: Path) -> None:
    both = {"tokenizer_json": description("prepending")}
    assert read(tmp_path / "a", **both).kind == "sentencepiece"
    assert read(tmp_path / "b", **both, chat_template_jinja=CHATML).kind == "tokenizers"
    assert isinstance(read(tmp_path / "a", **both).open().chat, MistralTemplate)


def test_broken_files_are_named(tmp_path: Path) -> None:
    for files, message in (
        ({"tokenizer_config_json": "{"}, "tokenizer_config.json: not usable JSON"),
        ({"added_tokens_json": {"<a>": "x"}}, "added_tokens.json: '<a>' has id 'x'"),
        ({"chat_template_jinja": "{% if %}"}, "chat template, line 1"),
        ({"sentencepiece": False, "tokenizer_json": '{"model": {"type": "Unigram"}}'}, "tokenizer.json holds a Unigram model"),
        ({"sentencepiece": False, "tekken_json": "{}"}, "no tokenizer.json; tekken.json is not read"),
    ):
        with pytest.raises(BadCheckpoint, match=message) as caught:
            read(tmp_path / str(abs(hash(message))), **files)
        assert "\n" not in str(caught.value)


def test_all_of_it_travels_in_the_blob_and_twice_the_same(tmp_path: Path) -> None:
    config = small_config(vocab_size=2080)
    source = write_hf(tmp_path / "source", config, random_weights(config), eos_token_id=[2050, 2])
    folder(
        source, added_tokens_json={"<|im_start|>": 2049, "<|im_end|>": 2050}, tokenizer_config_json={"chat_template": CHATML},
        generation_config_json={"top_k": 40},
    )
    first, second = (quantize(source, tmp_path / name, progress=False) for name in ("a.safetensors", "b.safetensors"))
    assert first.read_bytes() == second.read_bytes()
    with Blob.open(first) as blob:
        assert blob.config.end_ids == (2050, 2)
        assert blob.text.defaults == {"top_k": 40}
        assert blob.text.chat_template == CHATML
    mine = tmp_path / "mine.jinja"
    mine.write_text("{{ messages[0].content }}", encoding="utf-8")
    with Blob.open(quantize(source, tmp_path / "c.safetensors", progress=False, chat_template=mine)) as blob:
        assert blob.text.chat_template == "{{ messages[0].content }}"
    with pytest.raises(BadInput, match=r"none\.jinja: cannot be read"):
        quantize(source, tmp_path / "d.safetensors", progress=False, chat_template=tmp_path / "none.jinja")


def test_what_mistrals_own_files_say_again_is_left_out(tmp_path: Path) -> None:
    plain = read(tmp_path / "a")
    again = read(tmp_path / "b", tokenizer_config_json={
        "bos_token": "<s>", "eos_token": "</s>", "legacy": False, "chat_template": TEMPLATES["mistral v1"],
        "added_tokens_decoder": {"1": {"content": "<s>", "special": True}, "2": {"content": "</s>", "special": True}},
    })
    assert again.settings == plain.settings
    assert read(tmp_path / "c", added_tokens_json={"[PAD]": 2048}).added == {2048: ("[PAD]", False)}
