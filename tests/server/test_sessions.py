"""Sessions named in requests, and conversations longer than the context."""

from __future__ import annotations

import threading

import pytest

from edgemistral.errors import BadInput
from edgemistral.session import SessionFolder
from tests.serving import USER, Server, fake_model

NEXT = {"role": "user", "content": "And then?"}


def chat(server, messages, **fields):
    return server.post({"messages": messages, "temperature": 0, "max_tokens": 8, **fields})


def test_a_named_session_outlives_the_server(tmp_path):
    with Server(session_dir=tmp_path / "kept") as server:
        first = chat(server, USER, session="mine").json()
        server.model.close()
    files = list((tmp_path / "kept").iterdir())
    assert [path.name for path in files] == ["mine.session"] and files[0].stat().st_mode & 0o077 == 0
    follow = [*USER, {"role": "assistant", "content": first["choices"][0]["message"]["content"]}, NEXT]
    with Server(session_dir=tmp_path / "kept") as server:
        assert chat(server, follow).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        server.model.engine._kept.evict_all()
        usage = chat(server, follow, session="mine").json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["total_tokens"] - 1
        server.model.close()


def test_requests_for_one_session_take_turns(tmp_path):
    with Server(session_dir=tmp_path) as server:
        alone = [chat(server, [{"role": "user", "content": f"{n}?"}]).json()["choices"] for n in range(4)]
        answers = {}

        def ask(n):
            answers[n] = chat(server, [{"role": "user", "content": f"{n}?"}], session="one").json()["choices"]

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [answers[n] for n in range(4)] == alone
        server.model.close()


@pytest.mark.parametrize("name", ["", "..", "../a", "a/b", "a\\b", "a.b", "CON", "a" * 101, "ü", "a\n", 5])
def test_a_name_is_no_path(tmp_path, name):
    with Server(session_dir=tmp_path / "kept") as server:
        answer = chat(server, USER, session=name)
        assert answer.status_code == 422 and answer.json()["error"]["param"] == "session"
    assert list(tmp_path.rglob("*.session")) == []


def test_without_a_folder_or_with_a_foreign_file_it_is_refused(tmp_path):
    with Server() as server:
        answer = chat(server, USER, session="mine")
        assert answer.status_code == 422 and "--session-dir" in answer.json()["error"]["message"]
    (tmp_path / "mine.session").write_text("something else")
    with Server(session_dir=tmp_path) as server:
        answer = chat(server, USER, session="mine")
        assert answer.status_code == 409
        assert answer.json()["error"]["message"] == "mine.session: not a session file; it was left as it is"
    with pytest.raises(BadInput, match="cannot be the folder of sessions"):
        SessionFolder(tmp_path / "mine.session")


def test_few_sessions_stay_open_and_all_are_found_again(tmp_path):
    with fake_model() as model:
        folder = SessionFolder(tmp_path, most=2)
        for n in range(5):
            "".join(model.chat([{"role": "user", "content": f"{n}?"}], 5, temperature=0, session=folder.get(model, f"s{n}")))
        assert len(folder._open) == 2
        assert folder.get(model, "s0").messages[0]["content"] == "0?"
        assert folder.get(model, "s0") is folder.get(model, "s0")


def test_sessions_that_fill_the_budget_do_not_stay_open(tmp_path):
    with fake_model() as model:
        folder = SessionFolder(tmp_path)
        model.engine._transformer.pool.capacity = 3
        for n in range(6):
            "".join(model.chat([{"role": "user", "content": f"{n}?"}], 5, temperature=0, session=folder.get(model, f"s{n}")))
        assert sum(len(held.sequence.segments) for held in folder._open.values()) <= 4
        assert folder.get(model, "s0").messages[0]["content"] == "0?"


def test_a_conversation_over_the_context_loses_its_oldest_turns_if_it_may(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}]
    for n in range(30):
        messages += [{"role": "user", "content": f"question {n} " * 8}, {"role": "assistant", "content": f"answer {n} " * 8}]
    messages.append(NEXT)
    with Server() as server:
        refused = chat(server, messages)
        assert refused.status_code == 400 and "more than the context of 512" in refused.json()["error"]["message"]
        usage = chat(server, messages, on_overflow="drop-oldest").json()["usage"]
        dropped = usage["dropped_messages"]
        assert dropped == list(range(1, 1 + len(dropped))) and len(dropped) % 2 == 0 and usage["prompt_tokens"] <= 504
        assert "dropped_messages" not in chat(server, USER, on_overflow="drop-oldest").json()["usage"]
        assert chat(server, USER, on_overflow="x").status_code == 422
