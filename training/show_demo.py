"""What `make demo` shows: a checkpoint becomes a blob, the model card's sample conversation is answered, and what is next."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from edgemistral_quantize import quantize

import edgemistral
from edgemistral.terminal import compile_notice, human_bytes

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "models" / "demo"
SAMPLE = ROOT / "tests" / "data" / "sample-request.json"
NEXT = """
That was the demo model: 8 million parameters, travel talk only. For the real one, get mistralai/Mistral-7B-Instruct-v0.2
(models/README.md tells how); then, with .venv/bin on your path:

    edgemistral quantize ~/Mistral-7B-Instruct-v0.2 mistral-q4.safetensors     # 14.5 GB -> 4.1 GB, once, in minutes
    edgemistral run mistral-q4.safetensors                                     # chat
    edgemistral serve mistral-q4.safetensors                                   # chat page, OpenAI interface

To talk on with the small one: edgemistral run"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, compile_notice():
        blob = Path(folder) / "demo-q4.safetensors"
        print(f"$ edgemistral quantize models/demo {blob}", flush=True)
        quantize(CHECKPOINT, blob)
        before, after = (path.stat().st_size for path in (CHECKPOINT / "model.safetensors", blob))
        print(f"{human_bytes(before)} -> {human_bytes(after)}\n")
        with edgemistral.load(blob) as model:
            messages = json.loads(SAMPLE.read_text("utf-8"))["input_data"]["input_string"]
            for message in messages:
                print(f"{message['role']}: {message['content']}\n")
            print("assistant: ", end="", flush=True)
            for piece in model.chat(messages, temperature=0):
                print(piece, end="", flush=True)
            print()
    print(NEXT)


if __name__ == "__main__":
    main()
