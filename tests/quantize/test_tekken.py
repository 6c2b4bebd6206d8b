"""tekken.json: ids and prompts equal mistral-common's, of a small file made here and of the real one."""

from __future__ import annotations

import base64
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from edgemistral_quantize.checkpoint import Checkpoint
from edgemistral_quantize.tekken import SPECIAL, read_tekken

from edgemistral.errors import BadCheckpoint, BadRequest
from edgemistral.text.tokenizer import Tokenizer
from tests.checkpoints import random_weights, small_config, write_hf, write_mistral
from tests.text.tokenizers import TEXTS

PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
N_SPECIAL, N_WORDS = 40, 400
CONFIG = small_config(n_layers=1, vocab_size=N_SPECIAL + N_WORDS)


def named(*texts: str) -> list[dict[str, Any]]:
    return [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(texts)]


def small_tekken(version: str = "v3", **changes: Any) -> dict[str, Any]:
    """The most frequent parts of some texts as tokens, single bytes first; `changes` replace fields."""
    counted: Counter[bytes] = Counter()
    for text in TEXTS:
        data = text.encode()[:300]
        counted.update(data[at : at + n] for n in range(2, 6) for at in range(len(data) - n))
    # A token is made of two others, so that any of them can be reached.
    tokens = {bytes([byte]): None for byte in range(256)}
    for token, times in sorted(counted.items(), key=lambda item: (len(item[0]), -item[1], item[0])):
        of_two = any(token[:n] in tokens and token[n:] in tokens for n in range(1, 5))
        if len(tokens) < N_WORDS + 50 and times > 3 and of_two:
            tokens[token] = None
    special = named(*SPECIAL, "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]")
    encoded = [base64.b64encode(token).decode() for token in tokens]
    vocab = [{"rank": rank, "token_bytes": token, "token_str": None} for rank, token in enumerate(encoded)]
    return {
        "config": {"pattern": PATTERN, "num_vocab_tokens": len(vocab), "default_vocab_size": N_SPECIAL + N_WORDS,
                   "default_num_special_tokens": N_SPECIAL, "version": version},
        "vocab": vocab, "special_tokens": special, "version": 1, "type": "tekken", **changes,
    }


def write(folder: Path, **more: Any) -> Path:
    path = folder / "tekken.json"
    path.write_text(json.dumps(small_tekken(**more)), encoding="utf-8")
    return path


def checkpoint(folder: Path, layout: str = "mistral", **more: Any) -> Path:
    """A folder whose tokenizer is a tekken.json alone."""
    made = (write_hf if layout == "hf" else write_mistral)(folder / "c", CONFIG, random_weights(CONFIG))
    (made / "tokenizer.model").unlink()
    write(made, **more)
    return made


def varied(n: int) -> list[str]:
    rng = random.Random(5)
    letters = ("ab", "abc", "etaoin shrdlu", "xyz \n", "éàü ", "中文字的 ", "12 3", "<s>[INST]/", "🙂é\u0301")
    texts = [*TEXTS, *SPECIAL]
    texts += ["".join(rng.choice(rng.choice(letters)) for _ in range(rng.randint(1, 60))) for _ in range(n)]
    return texts + [bytes(rng.randrange(256) for _ in range(40)).decode("utf-8", "replace") for _ in range(n // 10)]


def same_ids(ours: Tokenizer, theirs: Any, texts: list[str]) -> None:
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, bos=False, eos=False), text
        assert ours.decode(ids) == text


def test_ids_equal_those_of_mistral_common(tmp_path: Path) -> None:
    tekken = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    folder = checkpoint(tmp_path)
    same_ids(Checkpoint(folder).tokenizer_of_text, tekken.Tekkenizer.from_file(folder / "tekken.json"), varied(1500))


@pytest.mark.slow
def test_ids_of_the_real_one(tmp_path: Path) -> None:
    common = pytest.importorskip("mistral_common")
    tekken = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    path = Path(common.__file__).parent / "data" / "tekken_240911.json"
    from edgemistral.text.bpe import BPETokenizer

    ours = BPETokenizer(read_tekken(path, path.read_bytes()).described, 131072, bos_id=1, eos_id=2)
    same_ids(ours, tekken.Tekkenizer.from_file(path), varied(5000))


CONVERSATIONS = [
    [("user", "Hi!")],
    [("system", "Be brief."), ("user", "  What is [INST] here? </s>\n")],
    [("user", "a"), ("assistant", "b  "), ("user", "c")],
    [("system", " s "), ("user", "one\ntwo"), ("assistant", "é 🙂"), ("user", "x"), ("assistant", "y"),
     ("user", "[/SYSTEM_PROMPT]")],
]


@pytest.mark.parametrize("version", ["v3", "v7", "v11", "v13"])
@pytest.mark.parametrize("layout", ["hf", "mistral"])
def test_prompts_equal_those_of_mistral_common(tmp_path: Path, version: str, layout: str) -> None:
    pytest.importorskip("mistral_common")
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    folder = checkpoint(tmp_path, layout, version=version)
    ours, theirs = Checkpoint(folder).tokenizer_of_text, MistralTokenizer.from_file(str(folder / "tekken.json"))
    for conversation in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in conversation]
        request = ChatCompletionRequest.from_openai(messages)
        assert ours.encode_chat(messages) == theirs.encode_chat_completion(request).tokens, conversation
    assert ours.chat.takes_tools == (version == "v3")
    if version != "v3":
        with pytest.raises(BadRequest, match="no place for them"):
            ours.encode_chat([{"role": "user", "content": "x"}], tools=[{"function": {"name": "f"}}])


def test_tools_of_v3_equal_those_of_mistral_common(tmp_path: Path) -> None:
    pytest.importorskip("mistral_common")
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    folder = checkpoint(tmp_path)
    function = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [
            {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
        ]},
        {"role": "tool", "content": "3", "tool_call_id": "abcdefghi", "name": "f"},
    ]
    theirs = MistralTokenizer.from_file(str(folder / "tekken.json"))
    wanted = theirs.encode_chat_completion(ChatCompletionRequest.from_openai(messages, tools=tools)).tokens
    assert Checkpoint(folder).tokenizer_of_text.encode_chat(messages, tools=tools) == wanted


def test_a_template_beside_it_is_used(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "hf", version="v99")
    with pytest.raises(BadCheckpoint, match=r"tekken.json: is of version 'v99', .* quantize --chat-template FILE"):
        Checkpoint(folder)
    template = "{{ bos_token }}{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = Checkpoint(folder).tokenizer_of_text
    ids = tokenizer.encode_chat([{"role": "user", "content": "[INST]"}])
    assert ids == [1, 3, *tokenizer.encode("[INST]"), 4]
    assert 3 not in tokenizer.encode("[INST]")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": 3}, "config and vocab are missing"),
        ({"vocab": []}, "vocab has 0 tokens, config asks for 400"),
        ({"vocab": [{"rank": 0, "token_bytes": "AA=="}] * 700}, r"vocab\[1\] is .*: not the token of that rank"),
        ({"vocab": [3] * 700}, r"vocab\[0\] is 3: not the token of that rank"),
        ({"special_tokens": [{"rank": 1, "token_str": "<s>"}]}, r"special_tokens\[0\] is .*: not the token of that rank"),
        ({"special_tokens": named("<s>")}, "lacks <s> or </s>"),
        ({"special_tokens": named("<s>", "</s>")}, r"special_tokens lacks \[/INST\]"),
        ({"special_tokens": named("<s>", "</s>", "<s>")}, "has a text twice"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = checkpoint(tmp_path, **changes)
    with pytest.raises(BadCheckpoint, match=message) as caught:
        Checkpoint(folder)
    assert str(folder / "tekken.json") in str(caught.value)
    assert "\n" not in str(caught.value)
