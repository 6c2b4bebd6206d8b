"""The Python API over a scripted transformer and the demo's tokenizer, then on the demo model itself."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import edgemistral
from edgemistral.errors import BadRequest, Cancelled, ContextOverflow, OutOfMemoryBudget
from edgemistral.files.blob import Blob
from edgemistral.generate.engine import Engine
from edgemistral.model import Model
from edgemistral.runtime.plan import plan
from edgemistral.text.sentencepiece import SentencePieceTokenizer
from tests.fake import FakeTransformer, tiny_config

TOKENIZER = Path(__file__).parent / "data" / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePieceTokenizer(TOKENIZER.read_bytes())


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


def test_every_token_tells_where_its_text_begins(tokenizer):
    answer = "two é🙂 STOP three"
    model = scripted(tokenizer, tokenizer.encode_chat(USER), answer)
    reply = model.chat(USER, temperature=0, stop=" STOP", top_logprobs=2)
    assert "".join(reply) == "two é🙂"
    given = [i for i, start in zip(reply.token_ids, reply.starts, strict=True) if start < len(reply.text)]
    assert tokenizer.decode(given) == "two é🙂"
    assert len(reply.logprobs) == len(reply.token_ids)
    assert [top.top[0][0] for top in reply.logprobs] == reply.token_ids   # greedy


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
    fake.steps.clear()
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


@pytest.fixture(scope="module")
def demo():
    with edgemistral.load(edgemistral.demo_model(), threads=2) as model:
        yield model


def test_the_second_turn_on_real_kernels_says_what_a_fresh_model_says(demo):
    first = "".join(demo.chat(USER, 20, seed=1))
    turns = [*USER, {"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
    reply = demo.chat(turns, 20, seed=2)
    text = "".join(reply)
    assert reply.usage.cached_tokens > 10
    with edgemistral.load(demo.path, threads=1) as fresh:
        assert "".join(fresh.chat(turns, 20, seed=2)) == text


def test_a_dropped_answer_harms_no_other(demo):
    expected = "".join(demo.chat(USER, 8, seed=3))
    dropped = demo.chat([{"role": "user", "content": "Something else"}], seed=4)
    next(dropped)
    assert "".join(demo.chat(USER, 8, seed=3)) == expected
    assert next(dropped)   # and it can still go on


def test_logits_of_a_position_are_those_of_a_prefill(demo):
    ids = demo.tokenizer.encode_chat(USER)
    np.testing.assert_array_equal(demo.logits(ids)[-1], demo.engine.prefill(ids))


def test_a_failed_load_lets_go_of_the_file(tmp_path):
    blob = tmp_path / "blob.safetensors"
    blob.write_bytes(edgemistral.demo_model().read_bytes())
    for arguments, error in [({"context": 0}, BadRequest), ({"kv_bits": 5}, BadRequest), ({"threads": -1}, BadRequest),
                             ({"max_ram": 1000}, OutOfMemoryBudget)]:
        with pytest.raises(error):
            edgemistral.load(blob, **arguments)
    blob.unlink()   # Windows refuses while it is mapped


def test_the_plan_is_what_the_transformer_takes():
    from edgemistral.runtime.transformer import Transformer

    blob = Blob.open(edgemistral.demo_model())
    planned = plan(blob, context=300, threads=3)
    tracemalloc.start()
    try:
        transformer = Transformer(blob, context=300, kv_bits=8, threads=3)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    transformer.close()
    assert planned.work_bytes <= taken < planned.work_bytes + 100_000   # Python's own objects beside the arrays
    assert planned.weights_bytes == edgemistral.demo_model().stat().st_size
