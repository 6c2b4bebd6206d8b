"""The command line on the real demo model: what it prints, its exit codes, and one line for every mistake."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import edgemistral
from edgemistral.cli import main
from edgemistral.cli.options import size
from edgemistral.demo import ABOUT
from edgemistral.paths import cache_dir
from tests.checkpoints import SMALL, babbler, random_weights, write_hf

DATA = Path(__file__).parents[1] / "data"
SAMPLE = str(DATA / "sample-request.json")
COMMANDS = sorted(main.commands)


@pytest.fixture(scope="module", autouse=True)
def demo():
    path = edgemistral.demo_model()
    with edgemistral.load(path) as model:
        model.engine.prefill([1])   # compiles, so that no command has to say so
    return str(path)


def run(*arguments, stdin=None, code=0):
    """The result of a command that must exit with this code; one that fails says so in one line."""
    result = CliRunner().invoke(main, arguments, input=stdin)
    assert result.exit_code == code, result.output
    if code:
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in result.stderr
    return result


def error_of(*arguments, code=2, stdin=None):
    return run(*arguments, code=code, stdin=stdin).stderr


def process(*arguments, **options):
    return subprocess.Popen([sys.executable, "-m", "edgemistral", *arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, encoding="utf-8", **options)


# ---- help ------------------------------------------------------------------------------------------------------------

def test_the_commands_of_the_contract_exist():
    assert {"quantize", "run", "inspect", "verify", "plan", "eval"} <= set(COMMANDS)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_every_help_page_has_an_example(command):
    text = run(*([command] if command else []), "--help").stdout
    assert f"Example:\n    edgemistral {command or ''}" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_described(command):
    for parameter in main.commands[command].params:
        assert parameter.param_type_name == "argument" or parameter.help


def test_no_command_shows_the_help():
    assert run().stdout == run("--help").stdout


def test_version():
    assert run("--version").stdout.endswith(f"{edgemistral.__version__}\n")


# ---- run -------------------------------------------------------------------------------------------------------------

ANSWER = ("--max-new-tokens", "6", "--seed", "1")


def test_a_prompt_is_answered_once(demo):
    first = run("run", demo, "Hello", *ANSWER)
    assert first.stdout.endswith("\n") and len(first.stdout) > 6 and first.stderr == ""
    by_name = run("run", "demo", "Hello", *ANSWER, "--threads", "2")
    assert (by_name.stdout, by_name.stderr) == (first.stdout, f"{ABOUT}\n")
    story = ["run", demo, "Once upon a time", "--raw", "--max-new-tokens", "12", "--seed"]
    assert run(*story, "2").stdout != run(*story, "1").stdout


def test_greedy_is_temperature_0(demo):
    greedy = run("run", demo, "Hello", "--max-new-tokens", "6", "--greedy").stdout
    assert greedy == run("run", demo, "Hello", "--max-new-tokens", "6", "--temperature", "0").stdout


def test_a_prompt_from_standard_input(demo):
    prompt = "Wo ist\ndas Café?"
    assert run("run", demo, "-", *ANSWER, stdin=prompt + "\n").stdout == run("run", demo, prompt, *ANSWER).stdout


def test_raw_uses_no_template(demo):
    with edgemistral.load(demo) as model:
        expected = "".join(model.complete("Once upon a", 6, seed=1))
    assert run("run", demo, "Once upon a", "--raw", *ANSWER).stdout == expected + "\n"


def test_the_python_api_says_the_same(demo):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    with edgemistral.load(demo) as model:
        expected = "".join(model.chat(messages, 6, seed=1, top_k=40))
    assert run("run", demo, "Hello", "--system", "Be brief.", "--top-k", "40", *ANSWER).stdout == expected + "\n"


def test_without_a_prompt_piped_lines_are_a_chat():
    result = run("run", *ANSWER, stdin="Hello\nAnd then?\n/stats\n")
    assert re.search(r"^context: \d+ of \d+ tokens$", result.stdout, re.M)
    assert len(result.stdout.splitlines()) >= 4


def test_a_piped_line_that_is_no_utf8_is_answered_all_the_same():
    assert run("run", *ANSWER, stdin=b"Caf\xe9?\n").stdout


def test_the_sample_json(demo):
    result = run("run", demo, "--json", SAMPLE)
    [answers] = json.loads(result.stdout)
    assert list(answers) == ["0"] and result.stderr == ""


def test_the_sample_json_from_standard_input_with_a_warning(demo):
    request = {"input_data": {"input_string": ["a", "b"], "parameters": {"max_new_tokens": 3, "top_q": 1}}}
    result = run("run", demo, "--json", "-", stdin=json.dumps(request))
    assert list(json.loads(result.stdout)[0]) == ["0", "1"]
    assert result.stderr == "warning: input_data.parameters.top_q is not known and was ignored\n"


def test_a_full_context_is_said(demo):
    result = run("run", demo, "Once upon a time", "--raw", "--context", "24", "--seed", "1")
    assert result.stderr == "(the context of 24 tokens is full)\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope.safetensors", "Hello"], "there is no file nope.safetensors"),
        (["nope.safetensors"], "there is no file nope.safetensors"),
        ([SAMPLE, "Hello"], "sample-request.json"),
        ([str(DATA), "Hello"], "a directory"),
        (["demo", "Hello", "there"], "unexpected extra argument"),
        (["demo", "Hello", "--temperature", "-1"], "temperature is -1.0"),
        (["demo", "Hello", "--temperature", "warm"], "--temperature"),
        (["demo", "Hello", "--max-new-tokens", "-1"], "max_new_tokens is -1"),
        (["demo", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["demo", "--top-k", "-2"], "top_k is -2"),
        (["demo", "Hello", "--top-p", "1.5"], "top_p is 1.5"),
        (["demo", "Hello", "--seed", "-1"], "seed is -1"),
        (["demo", "Hello", "--context", "0"], "context is 0"),
        (["demo", "Hello", "--context", "99999999"], "context is 99999999"),
        (["demo", "Hello", "--threads", "0"], "threads is 0"),
        (["demo", "Hello", "--kv-bits", "3"], "--kv-bits"),
        (["demo", "Hello", "--nonsense"], "--nonsense"),
        (["demo", "Hello", "--max-ram", "lots"], "'lots' is not a size"),
        (["demo", "Hello", "--greedy", "--temperature", "1"], "exclude each other"),
        (["demo", "--raw"], "--raw needs a PROMPT"),
        (["demo", "Hello", "--raw", "--system", "x"], "takes no --system"),
        (["demo", "Hello", "--json", SAMPLE], "--json takes"),
        (["demo", "--json", SAMPLE, "--seed", "1"], "--json takes"),
        (["demo", "--json", "nope.json"], "nope.json: No such file"),
        (["demo", "--json", __file__], "is not usable JSON"),
        (["demo", "Hello " * 30, "--context", "16"], "more than the context of 16 holds"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    assert message in error_of("run", *arguments)


def test_wrong_input_is_one_line(demo):
    assert "not UTF-8" in error_of("run", demo, "-", stdin=b"\xff\xfe")
    request = json.dumps({"input_data": {"input_string": ["a"], "parameters": {"top_p": 2}}})
    assert "input_data.parameters.top_p" in error_of("run", demo, "--json", "-", stdin=request)


def test_over_the_memory_budget_is_refused(demo):
    assert re.search(r"needs \d+ bytes", error_of("run", demo, "Hello", "--max-ram", "1MiB", code=1))


def test_debug_shows_the_traceback(demo):
    result = CliRunner().invoke(main, ["run", demo, "Hello", "--top-p", "2", "--debug"])
    assert result.exit_code == 2 and "Traceback" in result.stderr and result.stderr.endswith("from 0 to 1\n")


def test_an_unexpected_error_is_one_line_too(monkeypatch, demo):
    monkeypatch.setattr("edgemistral.model.load", lambda *_, **__: {}["missing"])
    assert "KeyError: 'missing' (a bug here: --debug shows where)" in error_of("run", demo, "Hello", code=1)


def test_an_interrupted_quantizer_says_how_to_go_on(monkeypatch, tmp_path):
    def interrupted(source, destination, **options):
        Path(f"{destination}.partial").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("edgemistral_quantize.quantize", interrupted)
    result = CliRunner().invoke(main, ["quantize", str(tmp_path), str(tmp_path / "a.safetensors")])
    assert result.exit_code == 130
    expected = f"interrupted: {tmp_path / 'a.safetensors.partial'} holds what is done, --resume continues it"
    assert result.stderr.rstrip("\n") == expected     # click ends the line of ^C


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    return str(babbler(tmp_path_factory.mktemp("babbler")))


@pytest.mark.skipif(sys.platform == "win32", reason="no signals like these there")
class TestSignals:
    def test_ctrl_c_ends_an_answer_quietly(self, endless):
        child = process("run", endless, "Hello", "--greedy")     # sampled, one answer in a hundred ends at once
        assert child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 130
        assert "Traceback" not in child.stderr.read()
        child.stdout.close()
        child.stderr.close()

    def test_a_reader_that_goes_away_ends_it_quietly(self, endless):
        child = process("run", endless, "Hello", "--greedy")     # sampled, one answer in a hundred ends at once
        assert child.stdout.read(1)
        child.stdout.close()
        assert child.wait(20) == 1
        assert child.stderr.read() == ""
        child.stderr.close()


# ---- the other commands ----------------------------------------------------------------------------------------------

def test_inspect(demo):
    text = run("inspect", demo).stdout
    for expected in ("bits per weight", "n_kv_heads", "rope_theta", "layers.*.wqkv", "source fingerprint"):
        assert expected in text


def test_inspect_as_json_adds_up(demo):
    facts = json.loads(run("inspect", demo, "--json").stdout)
    file_bytes = Path(demo).stat().st_size
    assert facts["file_bytes"] == file_bytes
    header = file_bytes - sum(kind["bytes"] for kind in facts["tensors"])
    assert 0 < header < 65536
    assert facts["bits_per_weight"]["file"] == pytest.approx(8 * file_bytes / facts["weights"])
    assert 4.25 < facts["bits_per_weight"]["layers"] < 5   # sizes that are no multiple of 128 are padded
    config = facts["config"]
    by_name = {kind["name"]: kind for kind in facts["tensors"]}
    assert by_name["layers.*.w2"]["weights"] == config["n_layers"] * config["dim"] * config["hidden_dim"]
    assert by_name["layers.*.w2"]["count"] == config["n_layers"]


def test_verify_finds_damage(demo, tmp_path):
    assert "tensors are whole" in run("verify", demo).stdout
    data = bytearray(Path(demo).read_bytes())
    data[-1] ^= 1
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(data)
    assert "tensor tokenizer is damaged" in error_of("verify", str(damaged), code=1)


def test_plan(demo):
    text = run("plan", demo, "--context", "512").stdout
    planned = json.loads(run("plan", demo, "--context", "512", "--threads", "2", "--json").stdout)
    assert planned["weights_bytes"] == Path(demo).stat().st_size
    assert planned["total_bytes"] == sum(planned[f"{part}_bytes"] for part in ("weights", "kv", "work", "program"))
    assert f"{planned['kv_bytes']:,} bytes" in text
    twice = json.loads(run("plan", demo, "--context", "512", "--kv-bits", "16", "--json").stdout)
    assert twice["kv_bytes"] > 1.5 * planned["kv_bytes"]
    error_of("plan", demo, "--max-ram", "1M", code=1)


def test_eval(demo, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The sun rose over the village, and nobody was awake to see it.", encoding="utf-8")
    result = json.loads(run("eval", demo, str(text), "--json").stdout)
    assert result["perplexity"] > 1 and result["n_tokens"] > 10 and result["mean_kl"] is None
    assert f"{result['perplexity']:.4f}" in run("eval", demo, str(text)).stdout
    for arguments in (["nope.txt"], [str(text), "--reference", str(tmp_path)]):
        error_of("eval", demo, *arguments)
    text.write_bytes(b"\xff")
    assert "not UTF-8" in error_of("eval", demo, str(text))


def test_a_checkpoint_is_quantized_runs_and_is_compared_with_its_source(tmp_path):
    source = str(write_hf(tmp_path / "checkpoint", SMALL, random_weights(SMALL)))
    blob, text = str(tmp_path / "q8.safetensors"), tmp_path / "text.txt"
    assert "Next: edgemistral run" in run("quantize", source, blob, "--bits", "8").stdout
    assert json.loads(run("inspect", blob, "--json").stdout)["recipe"]["bits"] == 8
    assert run("run", blob, "Hi", "--max-new-tokens", "3", "--greedy").stdout
    text.write_text("Nobody was awake to see the sun rise.", encoding="utf-8")
    result = json.loads(run("eval", blob, str(text), "--reference", source, "--json").stdout)
    assert 0 <= result["mean_kl"] < 0.01 and result["top1_agreement"] > 0.9
    assert "top-1 agreement" in run("eval", blob, str(text), "--reference", source).stdout
    (tmp_path / "texts").mkdir()
    assert "ends in .txt" in error_of("eval", blob, str(tmp_path / "texts"))
    for name in ("a.txt", "b.md"):
        (tmp_path / "texts" / name).write_text(f"{name}: nobody was awake.", encoding="utf-8")
    itself = json.loads(run("eval", blob, str(tmp_path / "texts"), "--reference", blob, "--json").stdout)
    assert list(itself["texts"]) == ["a.txt", "b.md"]
    assert itself["n_tokens"] == sum(each["n_tokens"] for each in itself["texts"].values())
    assert itself["flipped"] == 0 and max(itself["kl_percentiles"].values()) < 1e-9
    shown = run("eval", blob, str(tmp_path / "texts"), "--reference", blob).stdout
    assert "b.md" in shown and "flipped" in shown
    error_of("quantize", source, blob)   # exists
    error_of("quantize", str(tmp_path / "missing"), str(tmp_path / "x"))
    error_of("quantize", source, str(tmp_path / "x"), "--max-ram", "5")
    error_of("quantize", source, str(tmp_path / "x"), "--bits", "3")


@pytest.mark.parametrize(
    ("text", "n"),
    [("4096", 4096), ("2GiB", 2 << 30), ("2G", 2 << 30), ("2gb", 2 * 10**9), ("1.5 MiB", 3 << 19), ("7B", 7)],
)
def test_sizes(text, n):
    assert size(text) == n


def test_warmup():
    assert run("warmup").stdout == f"{cache_dir()}: ready\n"


@pytest.mark.slow
def test_after_warmup_nothing_is_compiled(tmp_path):
    environment = {**os.environ, "EDGEMISTRAL_CACHE": str(tmp_path / "größer cache")}
    first = process("warmup", env=environment)
    assert "compiling" in first.communicate()[1] and first.returncode == 0
    for arguments in (["run", "demo", "Hello"], ["bench", "demo", "--prompts", "8", "--rounds", "1"]):
        child = process(*arguments, env=environment)
        assert "compiling" not in child.communicate()[1] and child.returncode == 0
