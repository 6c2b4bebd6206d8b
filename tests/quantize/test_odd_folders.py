"""Folders as people have them, after public reports: read where that is right, else refused by a line that helps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgemistral_quantize import quantize
from edgemistral_quantize.checkpoint import Checkpoint
from safetensors.numpy import save_file

from edgemistral.errors import BadInput
from tests.checkpoints import SMALL, hf_name, random_weights, save, small_config, write_hf, write_mistral
from tests.text.tokenizers import TEMPLATES, description

WEIGHTS = random_weights(SMALL)
NAMED = {hf_name(name): values for name, values in WEIGHTS.items()}
ADDED = {"<|im_start|>": 2048, "<|im_end|>": 2049}
HI = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "c", SMALL, WEIGHTS)


def output(source: Path) -> bytes:
    return b"".join(strip.tobytes() for strip in Checkpoint(source).strips("output", 1 << 24))


def put(folder: Path, name: str, content: Any) -> Path:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def prompt(folder: Path, **more: Any) -> list[int]:
    return Checkpoint(folder).tokenizer_of_text.encode_chat(HI, **more)


# ---- weights ----

@pytest.mark.parametrize("beside", ["stale index", "index and shards", "shards"])
def test_a_whole_file_counts_before_its_shards(folder: Path, beside: str) -> None:
    whole = output(folder)
    other = random_weights(SMALL, seed=1)
    (folder / "model.safetensors").rename(folder / "kept")
    write_hf(folder, SMALL, other, shards=2, index=beside != "shards")
    (folder / "kept").rename(folder / "model.safetensors")
    if beside == "stale index":
        for path in folder.glob("model-*"):
            path.unlink()
    assert output(folder) == whole


def test_shards_count_where_the_whole_file_is_a_pointer(folder: Path) -> None:
    whole = output(folder)
    write_hf(folder, SMALL, WEIGHTS, shards=2)
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64)
    assert output(folder) == whole


def test_names_in_capitals(folder: Path) -> None:
    whole = output(folder)
    (folder / "model.safetensors").rename(folder / "MODEL.SAFETENSORS")
    assert output(folder) == whole


def with_biases(folder: Path) -> None:
    bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(SMALL.q_dim, np.float32)}
    save(folder / "model.safetensors", NAMED | bias, "BF16")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def moved(name: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / "model.safetensors").rename(folder / name)

    return spoil


def deepspeed(folder: Path) -> None:
    moved("global_step9/states.pt")(folder)
    put(folder, "zero_to_fp32.py", "")


def other_layout(folder: Path) -> None:
    moved("consolidated.safetensors")(folder)


def zeros_at_the_end(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def renamed_config(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").rename(folder / name)


def fields(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: write_hf(folder, SMALL, WEIGHTS, **changes)


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()
    put(folder, "vocab.json", {})


def word_piece(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()
    put(folder, "tokenizer.json", {"version": "1.0", "added_tokens": [], "model": {"type": "WordPiece", "vocab": {"a": 0}}})


def templates(value: Any) -> Callable[[Path], object]:
    return lambda folder: put(folder, "tokenizer_config.json", {"chat_template": value})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (with_biases, r"q_proj.bias does not belong to a model with this config; supported: models without biases"),
        (without_weights, "no safetensors files with weights; is the download complete?"),
        (moved("onnx/model_q4.onnx"), "its folder onnx has model_q4.onnx: a format that is not read"),
        (moved("original/consolidated.00.pth"), "its folder original has consolidated.00.pth: a format that is not read"),
        (moved("weights/model.safetensors"), "its folder weights has model.safetensors: give that folder"),
        (moved("fsdp_0/__0_0.distcp"), "__0_0.distcp: a part that FSDP wrote; accelerate merge-weights joins them"),
        (deepspeed, "DeepSpeed's own parts are there: run its zero_to_fp32.py"),
        (other_layout, "consolidated.safetensors belongs to the layout with params.json, which is not there"),
        (zeros_at_the_end, "model.norm.weight is nothing but zeros; was the download finished?"),
        (renamed_config("config (1).json"), r"config \(1\).json is there: rename it"),
        (renamed_config("config.json.txt"), "config.json.txt is there: rename it"),
        (fields(layer_types=["full_attention", "sliding_attention"]), "layer_types mixes full_attention and sliding_attention"),
        (fields(eos_token_id="2"), "eos_token_id is '2': it must be a token id or a list of them"),
        (fields(eos_token_id=50000), "eos_token_id 50000 in config.json or generation_config.json is outside the vocabulary"),
        (no_tokenizer, "no tokenizer.model, tokenizer.json or tekken.json: .*; vocab.json alone is not read"),
        (word_piece, "a model of type 'WordPiece'; supported: BPE"),
        (templates([{"name": "rag", "template": "{{ messages }}"}, {"name": "tool_use", "template": "{{ messages }}"}]),
         "chat templates named rag, tool_use and none named default"),
        (templates("chatml"), "the chat template does not use `messages`: 'chatml'"),
        (templates("{% for m in messages %}\n{{ m.content }\n{% endfor %}"), "line 2 of the chat template"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(folder)
    with pytest.raises(BadInput, match=message) as caught:
        list(Checkpoint(folder).strips("norm", 1 << 20))
    assert "\n" not in str(caught.value)


def test_weights_of_hugging_face_beside_params(tmp_path: Path) -> None:
    folder = write_mistral(tmp_path / "c", SMALL, WEIGHTS)
    (folder / "consolidated.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(BadInput, match=r"model.safetensors belongs to the layout with config.json, which is not there"):
        Checkpoint(folder)


def test_a_misspelt_path_is_helped(folder: Path) -> None:
    good = folder.rename(folder.with_name("Mistral-7B-Instruct"))
    for name in ("Mistral-7b-Instruct", "Mistral-7B-Instuct", "Mistral-7B-Instruct "):
        with pytest.raises(BadInput, match="no such directory or file; Mistral-7B-Instruct is there"):
            Checkpoint(good.with_name(name))


# ---- text ----

def test_templates_in_a_folder_of_their_own(folder: Path) -> None:
    """As transformers 5 saves more than one."""
    put(folder, "added_tokens.json", ADDED)
    put(folder, "chat_template.jinja", TEMPLATES["chatml"])
    put(folder, "additional_chat_templates/tool_use.jinja", "T{{ tools | length }}{{ messages[0].content }}")
    tokenizer = Checkpoint(folder).tokenizer_of_text
    assert tokenizer.chat.takes_tools
    assert tokenizer.encode_chat(HI)[0] == ADDED["<|im_start|>"]
    assert tokenizer.encode_chat(HI, tools=TOOLS) == tokenizer.encode("T1Hi")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json"])
@pytest.mark.parametrize("empty", ["", " \n", None])
def test_an_empty_template_is_none(folder: Path, name: str, empty: str | None) -> None:
    own = prompt(folder)
    assert prompt(put(folder, name, {"chat_template": empty})) == own


def test_no_end_is_minus_one(folder: Path) -> None:
    write_hf(folder, SMALL, WEIGHTS, eos_token_id=-1, pad_token_id=-1)
    assert Checkpoint(folder).tokenizer_of_text.end_ids == {2}


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_added_tokens_without_a_row_in_the_embeddings(tmp_path: Path, kind: str) -> None:
    """The tokenizer grew, the embeddings did not: of no use to the model, unless its template writes such a token."""
    rows = 2048
    if kind == "byte-level":
        listed = json.loads(description(kind))["added_tokens"]
        rows = next(token["id"] for token in listed if token["content"] == "<|im_start|>")
    config = small_config(n_layers=1, vocab_size=rows)
    folder = write_hf(tmp_path / "c", config, random_weights(config))
    if kind == "byte-level":
        (folder / "tokenizer.model").unlink()
        put(folder, "tokenizer.json", description(kind))
    else:
        put(folder, "added_tokens.json", ADDED)
    put(folder, "tokenizer_config.json", {"chat_template": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
                                          "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|im_end|>"})
    tokenizer = Checkpoint(folder).tokenizer_of_text
    assert max(tokenizer.markup) < rows == tokenizer.vocab_size
    assert max(prompt(folder)) < rows
    put(folder, "tokenizer_config.json", {"chat_template": TEMPLATES["chatml"], "bos_token": "<s>", "eos_token": "</s>"})
    with pytest.raises(BadInput, match=rf"uses '<\|im_start\|>', token {rows}, but the embeddings have {rows} rows"):
        Checkpoint(folder)


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    config = small_config(n_layers=1)
    folder = write_hf(tmp_path / "c", config, random_weights(config), eos_token_id=[2, 2049])
    put(folder, "added_tokens.json", ADDED)
    put(folder, "generation_config.json", {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2049, 2]})
    put(folder, "tokenizer_config.json", {"chat_template": TEMPLATES["chatml"], "eos_token": "<|im_end|>"})
    first, second = (quantize(folder, tmp_path / name, calibrate="none", progress=False).read_bytes() for name in "ab")
    assert first == second


def test_the_head_of_a_value_model_is_named(folder: Path) -> None:
    save_file(NAMED | {"v_head.summary.weight": np.ones((1, SMALL.dim), np.float32)}, folder / "model.safetensors")
    with pytest.raises(BadInput, match=r"v_head.summary.weight does not belong to a model with this config$"):
        Checkpoint(folder)
