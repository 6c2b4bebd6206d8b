"""What llama.cpp makes of texts and prompts: a program of its own, since a build for another CPU ends its process.

    python -m tests.quantize.llama_cpp_answers MODEL.gguf < questions > answers

questions: {"texts": [...], "rendered": [...], "prompts": [[ids], ...], "tokens": N}
answers: {"texts": [[ids], ...], "rendered": [[ids], ...], "prompts": [[ids], ...]}

Texts are what people write. Rendered is what a template gives. Prompts are answered with at most N tokens.
"""

from __future__ import annotations

import json
import sys

import llama_cpp


def main(model: str) -> None:
    questions = json.load(sys.stdin)
    context = max(map(len, questions["prompts"]), default=0) + questions["tokens"] + 8
    llama = llama_cpp.Llama(model, n_ctx=context, n_threads=2, verbose=False)
    texts = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in questions["texts"]]
    rendered = [llama.tokenize(text.encode(), add_bos=False, special=True) for text in questions["rendered"]]
    prompts = []
    for prompt in questions["prompts"]:
        llama.reset()
        answer: list[int] = []
        for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
            if llama_cpp.llama_vocab_is_eog(llama._model.vocab, token) or len(answer) == questions["tokens"]:
                break
            answer.append(int(token))
        prompts.append(answer)
    json.dump({"texts": texts, "rendered": rendered, "prompts": prompts}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
