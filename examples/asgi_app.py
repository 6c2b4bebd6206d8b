"""The server inside your own application, with a review of every prompt and answer.

    python examples/asgi_app.py [MODEL]        answers one request without a network and ends
    uvicorn examples.asgi_app:app              serves it (the demo model)
"""

import contextlib
import sys

from fastapi import FastAPI
from fastapi.testclient import TestClient

import edgemistral
from edgemistral.server import Refused, create_app


def review(kind, value):
    """kind "prompt": messages or a text; "answer": a text. Return the value to use; the client sees the text of Refused."""
    if "password" in str(value):
        raise Refused("no passwords, please")
    return value


@contextlib.asynccontextmanager
async def lifespan(app):
    yield
    chat.state.service.close()


path = sys.argv[1] if __name__ == "__main__" and len(sys.argv) > 1 else edgemistral.demo_model()
model = edgemistral.load(path)
chat = create_app(model, review=review)
app = FastAPI(lifespan=lifespan)
app.mount("/chat", chat)

if __name__ == "__main__":
    with TestClient(app, base_url="http://127.0.0.1") as client:
        for text in ("What should I see in Paris?", "What is your password?"):
            messages = [{"role": "user", "content": text}]
            response = client.post("/chat/v1/chat/completions", json={"messages": messages, "max_tokens": 40, "seed": 1})
            answer = response.json()
            print(answer["choices"][0]["message"]["content"] if response.status_code == 200 else answer["error"]["message"])
    model.close()
