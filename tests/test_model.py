"""The Python API over a scripted transformer and the demo's tokenizer; the real kernels have their own tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake import FakeTransformer, tiny_config

import edgemistral
from edgemistral.engine import Engine
from edgemistral.errors import BadRequest, Cancelled, ContextOverflow
from edgemistral.model import Model
from edgemistral.tokenizer import Tokenizer

TOKENIZER = Path(edgemistral.__path__[0]) / "demo" / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TOKENIZER.read_bytes())


def scripted(tokenizer, prompt_ids, answer, chunk=64, context=512):
    """A model that answers these prompt ids with this text (or these ids) and then ends."""
    ids = tokenizer.encode(answer) if isinstance(answer, str) else list(answer)
    script = dict(enumerate([*ids, tokenizer.eos_id], len(prompt_ids)))
    config = tiny_config(vocab_size=tokenizer.vocab_size, context=context, bos_id=1, eos_id=tokenizer.eos_id)
    return Model(Engine(FakeTransformer(config, chunk=chunk, script=script)), tokenizer)


USER = [{"role": "user", "content": "Where is it?"}]


def test_chat_streams_the_answer_and_ends(tokenizer):
    answer = "It is in Paris, near the café 🙂."
    model = scripted(tokenizer, tokenizer.encode_chat(USER), answer)
    reply = model.chat(USER, temperature=0)
    pieces = list(reply)
    assert "".join(pieces) == answer == reply.text
    assert len(pieces) > 3
    assert reply.finish_reason == "stop"
    assert reply.usage.prompt_tokens == len(tokenizer.encode_chat(USER))
    assert reply.usage.new_tokens == len(tokenizer.encode(answer))


def test_chat_stops_before_a_stop_string(tokenizer):
    model = scripted(tokenizer, tokenizer.encode_chat(USER), "one two STOP three")
    reply = model.chat(USER, temperature=0, stop=["STOP"])
    assert "".join(reply) == "one two "
    assert reply.finish_reason == "stop"
    assert list(reply) == []


def test_a_stop_string_that_stays_unfinished_is_given_at_the_end(tokenizer):
    model = scripted(tokenizer, tokenizer.encode_chat(USER), "one two STO")
    assert "".join(model.chat(USER, temperature=0, stop="STOP")) == "one two STO"


def test_max_new_tokens_ends_with_length(tokenizer):
    model = scripted(tokenizer, tokenizer.encode_chat(USER), "one two three four")
    reply = model.chat(USER, 2, temperature=0)
    assert "one two three four".startswith("".join(reply))
    assert (reply.finish_reason, reply.usage.new_tokens) == ("length", 2)


def test_the_last_assistant_message_is_continued_with_its_space(tokenizer):
    messages = [*USER, {"role": "assistant", "content": "It is"}]
    model = scripted(tokenizer, tokenizer.encode_chat(messages), "in Paris")
    assert "".join(model.chat(messages, temperature=0)) == " in Paris"


def test_complete_continues_a_raw_text(tokenizer):
    ids = [1, *tokenizer.encode("Once upon a")]
    for prompt in ("Once upon a", ids):
        model = scripted(tokenizer, ids, "time there was")
        assert "".join(model.complete(prompt, temperature=0)) == " time there was"


def test_complete_from_nothing_starts_a_text(tokenizer):
    assert "".join(scripted(tokenizer, [1], "Hello there").complete("", temperature=0)) == "Hello there"


def test_generate_gives_ids(tokenizer):
    ids = tokenizer.encode("in Paris")
    assert list(scripted(tokenizer, [1], ids).generate([1], temperature=0)) == ids


def test_the_next_turn_computes_only_what_is_new(tokenizer):
    model = scripted(tokenizer, tokenizer.encode_chat(USER), "In Paris.")
    answer = "".join(model.chat(USER, temperature=0))
    fake = model.engine._transformer
    fake.calls.clear()
    messages = [*USER, {"role": "assistant", "content": answer}, {"role": "user", "content": "And now?"}]
    reply = model.chat(messages, 1, temperature=0)
    list(reply)
    turn = tokenizer.encode_chat(messages)[len(tokenizer.encode_chat(USER) + tokenizer.encode(answer)):]
    assert fake.calls == [turn]   # from </s> on
    assert reply.usage.cached_tokens == reply.usage.prompt_tokens - len(turn)


def test_a_wrong_argument_raises_at_once(tokenizer):
    model = scripted(tokenizer, [1], "x", context=16)
    for call, field in [
        (lambda: model.chat(USER, temperature=-1), "temperature"),
        (lambda: model.chat(USER, -1), "max_new_tokens"),
        (lambda: model.chat(USER, stop=[""]), "stop[0]"),
        (lambda: model.chat([{"role": "robot", "content": ""}]), "messages[0].role"),
        (lambda: model.chat([]), "messages"),
        (lambda: model.complete([1, 10**6]), "ids"),
        (lambda: model.logits([]), "ids"),
    ]:
        with pytest.raises(BadRequest) as error:
            call()
        assert error.value.field == field
    with pytest.raises(TypeError, match="temprature"):
        model.chat(USER, temprature=1)
    with pytest.raises(ContextOverflow, match="more than the context of 16"):
        model.chat([{"role": "user", "content": "word " * 100}])
    assert model.engine._transformer.calls == []


def test_cancel_keeps_the_text_so_far(tokenizer):
    model = scripted(tokenizer, tokenizer.encode_chat(USER), "one two three four five")
    pieces = []
    reply = model.chat(USER, temperature=0, cancel=lambda: len(pieces) == 2)
    with pytest.raises(Cancelled):
        for piece in reply:
            pieces.append(piece)
    assert reply.text == "".join(pieces) != ""
    assert reply.finish_reason is None


def test_the_context_manager_closes(tokenizer):
    with scripted(tokenizer, [1], "x") as model:
        transformer = model.engine._transformer
    assert transformer.closed
