"""Streaming: pieces join to exactly what a decode of everything gives, and stop strings never leak."""

import itertools
import json
import random
import time
from pathlib import Path

import mistral_common
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgemistral.errors import BadRequest
from edgemistral.text.sentencepiece import SentencePieceTokenizer
from edgemistral.text.stream import StopStrings, StreamDecoder
from edgemistral.text.tokenizer import Tokenizer

TEXTS: list[str] = json.loads((Path(__file__).parents[1] / "data" / "texts.json").read_text(encoding="utf-8"))
REFERENCE = Path(mistral_common.__file__).parent / "data"
MODELS = {
    "small": Path(__file__).parents[1] / "data" / "tokenizer.model",
    "v1": REFERENCE / "tokenizer.model.v1",
    "v3": REFERENCE / "mistral_instruct_tokenizer_240323.model.v3",
}
N_PADDING = 10
few_letters = st.text("ab\u00e9", max_size=30)


@pytest.fixture(scope="module", params=MODELS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    model = MODELS[request.param].read_bytes()
    return SentencePieceTokenizer(model, SentencePieceTokenizer(model).n_words + N_PADDING)


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*map(decoder.push, ids), decoder.flush()]


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """The byte-fallback ids that spell `data`, which encode() uses only where it has no better piece."""
    zero = next(i for i in range(tokenizer.n_words) if tokenizer.byte(i) == 0)
    return [zero + byte for byte in data]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_texts_come_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == text.replace("▁", " ")


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_decode_of_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    special, byte = st.integers(0, 2), st.sampled_from(byte_ids(tokenizer, bytes(range(256))))
    lead = st.sampled_from(byte_ids(tokenizer, b"\xc2\xe2\xed\xf0\xf4\x80\xbf\xa0\x9f\x90\x8f"))
    space = st.sampled_from([tokenizer.encode(" ")[-1], tokenizer.encode("  a")[0]])
    padding = st.integers(tokenizer.n_words, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(st.one_of(special, byte, lead, space, padding, st.integers(0, tokenizer.n_words - 1))))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=12))
def test_any_bytes_stream_as_they_decode(tokenizer: Tokenizer, raw: bytes) -> None:
    ids = byte_ids(tokenizer, raw)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_is_shown_when_it_is_whole(tokenizer: Tokenizer) -> None:
    assert stream(tokenizer, byte_ids(tokenizer, "é€😀".encode())) == ["", "é", "", "", "€", "", "", "", "😀", ""]
    assert stream(tokenizer, byte_ids(tokenizer, b"\xf0\x9f\x98")) == ["", "", "", "\ufffd" * 3]
    assert stream(tokenizer, byte_ids(tokenizer, b"\x80\xffA")) == ["\ufffd", "\ufffd", "A", ""]
    comma = tokenizer.encode("a,")[-1]
    assert stream(tokenizer, [*byte_ids(tokenizer, b"\xe2\x82"), comma]) == ["", "", "\ufffd\ufffd,", ""]


def test_only_the_first_space_of_a_text_is_dropped(tokenizer: Tokenizer) -> None:
    the = tokenizer.encode("the")[0]
    assert tokenizer.piece(the) == "▁the"
    assert stream(tokenizer, [the, the]) == ["the", " the", ""]
    assert stream(tokenizer, [tokenizer.bos_id, the, tokenizer.eos_id, the]) == ["", "the", "", " the", ""]
    assert stream(tokenizer, [*byte_ids(tokenizer, b"A"), the]) == ["A", " the", ""]


def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadRequest, match="vocabulary"):
        StreamDecoder(tokenizer).push(tokenizer.vocab_size)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The plain twin of StopStrings: cut before the longest stop string at the first place where one is complete."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[:end - max(lengths)], True
    return text, False


@settings(max_examples=1000, deadline=None)
@given(text=few_letters, stops=st.lists(st.text("ab\u00e9", min_size=1, max_size=6), max_size=4), data=st.data())
@example(text="aab", stops=["ab"], data=None)
def test_stop_strings_cut_every_split_alike_and_never_leak(
    text: str, stops: list[str], data: st.DataObject | None
) -> None:
    places = data.draw(st.lists(st.integers(0, len(text)))) if data else range(len(text))
    bounds = [0, *sorted(places), len(text)]
    kept, found = cut(text, stops)
    stopper, emitted = StopStrings(stops), ""
    for start, end in itertools.pairwise(bounds):
        emitted += stopper.push(text[start:end])
        # What is out by now is right whatever follows: it holds no beginning of a stop string that may still complete.
        assert kept.startswith(emitted)
        safe, ended = cut(text[:end], stops)
        begun = max((n for stop in stops for n in range(len(stop)) if safe.endswith(stop[:n])), default=0)
        assert emitted == (safe if ended else safe[:len(safe) - begun])
    assert stopper.stopped == found
    assert emitted + stopper.flush() == kept
    assert stopper.flush() == ""


def test_nothing_comes_after_a_stop() -> None:
    stopper = StopStrings(["</s>", "\nUser:"])
    assert [stopper.push(p) for p in ("Hi", " there<", "/s", "!\nUs", "er", ": more", "even more")] == [
        "Hi", " there", "", "</s!", "", "", "",
    ]  # fmt: skip
    assert stopper.stopped
    assert stopper.flush() == ""


def test_one_stop_may_be_a_plain_string_and_none_passes_all() -> None:
    stopper = StopStrings("END")
    assert stopper.push("the END.") == "the "
    assert stopper.stopped
    assert StopStrings().push("anything") == "anything"


@pytest.mark.parametrize(("stops", "field"), [
    (3, "stop"), ("", "stop[0]"), ([None], "stop[0]"), (["\ud800"], "stop[0]"), (["a", ""], "stop[1]"),
])
def test_bad_stops_name_their_field(stops: object, field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        StopStrings(stops)   # type: ignore[arg-type]
    assert caught.value.field == field


def test_streaming_takes_linear_time(tokenizer: Tokenizer) -> None:
    """The worst case of a naive search (a stop string that almost completes) and a held run of invalid bytes."""
    stopper = StopStrings(["a" * 2000 + "b", "a" * 1999 + "c"])
    decoder = StreamDecoder(tokenizer)
    rng, ids = random.Random(0), [*byte_ids(tokenizer, b"\xe2\x82"), tokenizer.bos_id]
    start = time.perf_counter()
    text = "".join(stopper.push("aa") for _ in range(20_000)) + stopper.flush()
    for _ in range(50_000):
        decoder.push(rng.choice(ids))
    assert text == "a" * 40_000
    assert time.perf_counter() - start < 10   # quadratic: minutes
