"""Whatever is no regular file is refused at once, by every command that opens files."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from edgemistral_quantize import quantize

from edgemistral.errors import BadBlob, BadCheckpoint, BadInput, BadSession, EdgeMistralError
from edgemistral.files import regular
from edgemistral.files.blob import Blob
from edgemistral.files.session import summary
from tests.checkpoints import SMALL, random_weights, write_hf

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")


def others(folder):
    """One of each kind, by the word that its refusal has."""
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "folder").mkdir()
    (folder / "device").symlink_to("/dev/zero")
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(str(folder / "socket"))
    bound.close()
    return {"FIFO": folder / "fifo", "loop": folder / "loop", "directory": folder / "folder", "device": folder / "device",
            "socket": folder / "socket"}


def test_others_are_refused_with_the_word_for_them(tmp_path):
    for word, path in others(tmp_path).items():
        with pytest.raises(BadInput, match=word):
            regular.read(path, BadInput)
        with pytest.raises(BadBlob, match=f"{path.name}.*{word}"):
            Blob.open(path)
        with pytest.raises(BadSession, match=f"{path.name}.*{word}"):
            summary(path)
        assert regular.there(path)
    with pytest.raises(BadInput, match="No such file"):
        regular.read(tmp_path / "nothing", BadInput)
    with pytest.raises(BadInput, match="zero byte"):
        regular.read(Path("a\0b"), BadInput)


@pytest.mark.parametrize("name", [
    "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.model", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "chat_template.jinja", "chat_template.json",
])
def test_a_checkpoint_with_one_in_place_of_a_file_is_refused(tmp_path, name):
    source = write_hf(tmp_path / "source", SMALL, random_weights(SMALL))
    if name.endswith("index.json"):      # beside a whole model.safetensors nobody reads it
        (source / "model.safetensors").unlink()
    for kind in ("fifo", "loop"):
        (source / name).unlink(missing_ok=True)
        os.mkfifo(source / name) if kind == "fifo" else (source / name).symlink_to(source / name)
        with pytest.raises(EdgeMistralError, match=name.replace(".", r"\.")) as refused:
            quantize(source, tmp_path / "out", progress=False)
        assert isinstance(refused.value, BadInput)
        assert ("FIFO" if kind == "fifo" else "link") in str(refused.value)


def test_a_file_alone_and_an_adapter(tmp_path):
    source = write_hf(tmp_path / "source", SMALL, random_weights(SMALL))
    for word, path in others(tmp_path).items():
        if word != "directory":
            with pytest.raises(BadCheckpoint, match=path.name):
                quantize(path, tmp_path / "out", progress=False)
        adapter = tmp_path / f"adapter-{path.name}"
        adapter.mkdir()
        (adapter / "adapter_config.json").symlink_to(path)
        with pytest.raises(BadCheckpoint, match="adapter_config"):
            quantize(source, tmp_path / "out", lora=adapter, progress=False)


def test_the_command_line_takes_what_a_shell_pipes(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    command = [sys.executable, "-m", "edgemistral", "eval", "demo"]
    refused = subprocess.run([*command, tmp_path / "fifo"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and "FIFO" in refused.stderr and refused.stderr.count("\n") == 1
    read, write = os.pipe()
    os.write(write, b"x" * 10)
    os.close(write)
    assert regular.read(Path(f"/dev/fd/{read}"), BadInput, pipes=True) == b"x" * 10
    os.close(read)
