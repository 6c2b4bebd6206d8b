"""A conversation of two turns. The second reads only its new tokens: the KV cache still holds the first."""

import sys

import edgemistral

path = sys.argv[1] if len(sys.argv) > 1 else edgemistral.demo_model()
messages = []
with edgemistral.load(path) as model:
    for question in ("What should I see in Paris?", "And in Rome?"):
        messages.append({"role": "user", "content": question})
        print(f"> {question}")
        answer = ""
        for piece in model.chat(messages, max_new_tokens=60, temperature=0.7, top_p=0.9, seed=1):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})
