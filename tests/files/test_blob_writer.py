"""Writing a blob: what exists is kept, what the disk refuses is said, and an interrupted run goes on."""

from __future__ import annotations

import errno
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from edgemistral.errors import BadBlob, BadInput
from edgemistral.files.blob import Blob
from edgemistral.files.blob_writer import BlobWriter
from edgemistral.files.layout import Recipe
from tests.checkpoints import small_config
from tests.files.written import CONFIG, RECIPE, SOURCE, TOKENIZER, content, write


def test_an_existing_file_is_kept_unless_forced(path: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_bytes(b"precious")
    with pytest.raises(BadInput, match="exists already"):
        write(mine)
    with pytest.raises(BadInput, match="exists already"):
        write(mine, resume=True)
    assert mine.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [mine]
    assert write(mine, force=True).read_bytes() == path.read_bytes()
    assert list(tmp_path.iterdir()) == [mine]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="a directory"):
        write(tmp_path)
    with pytest.raises(BadInput, match="No such file or directory"):
        write(tmp_path / "no" / "folder")


def test_a_full_disk_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(BadInput, match=r"needs \d+ bytes of disk, 1000 are free"):
        write(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    import resource

    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))      # as a disk does, it takes a part of a write
    try:
        with pytest.raises(BadInput, match="File too large") as caught:
            write(tmp_path / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "b.partial" in str(caught.value)
    assert not (tmp_path / "b").exists()


def test_sizes_are_checked(tmp_path: Path) -> None:
    with BlobWriter(tmp_path / "b", CONFIG, RECIPE, 10) as writer:
        with pytest.raises(ValueError, match="larger than its 768 bytes"):
            writer.write("norm", [bytes(768), b"x"], lambda: SOURCE)
        with pytest.raises(ValueError, match="767 bytes instead of 768"):
            writer.write("norm", [bytes(767)], lambda: SOURCE)
        with pytest.raises(ValueError, match="tok_embeddings was not written"):
            writer.finish()
    assert list(tmp_path.iterdir()) == []   # there was nothing to resume from


class Stop(Exception):
    pass


def begin(path: Path, n_tensors: int, **options: bool) -> None:
    """Write some tensors and stop in the middle of the next one."""
    def interrupted(whole: bytes) -> Any:
        yield whole[:100]
        raise Stop

    with pytest.raises(Stop), BlobWriter(path, CONFIG, RECIPE, len(TOKENIZER), **options) as writer:
        for i, name in enumerate(writer.tensors):
            whole = content(writer, name)
            writer.write(name, [whole] if i < n_tensors else interrupted(whole), lambda: SOURCE)


@pytest.mark.parametrize("n_tensors", [1, 5, 17])
def test_resume_goes_on(path: Path, tmp_path: Path, n_tensors: int) -> None:
    target = tmp_path / "b"
    begin(target, n_tensors)
    with pytest.raises(BadBlob, match=r"unfinished|truncated"):
        Blob.open(tmp_path / "b.partial")
    with pytest.raises(BadInput, match="an unfinished run"):
        write(target)
    with BlobWriter(target, CONFIG, RECIPE, len(TOKENIZER), resume=True) as writer:
        assert [writer.done(name) for name in writer.tensors] == [i < n_tensors for i in range(len(writer.tensors))]
        assert writer.source_sha256("tok_embeddings") == SOURCE
    assert write(target, resume=True).read_bytes() == path.read_bytes()
    assert list(tmp_path.iterdir()) == [target]


def test_resume_does_not_trust_damaged_tensors(path: Path, tmp_path: Path) -> None:
    begin(tmp_path / "b", 6)
    with (tmp_path / "b.partial").open("r+b") as file, Blob.open(path) as blob:
        file.seek(blob.offsets["layers.0.wqkv"] + 5)
        file.write(b"?")
    with BlobWriter(tmp_path / "b", CONFIG, RECIPE, len(TOKENIZER), resume=True) as writer:
        assert not writer.done("layers.0.wqkv")
        assert writer.done("layers.0.wqkv.row_scales")
    assert write(tmp_path / "b", resume=True).read_bytes() == path.read_bytes()


def test_resume_with_nothing_there_begins(path: Path, tmp_path: Path) -> None:
    assert write(tmp_path / "a", resume=True).read_bytes() == path.read_bytes()
    for n_bytes in (0, 7, 200):   # killed before the header was whole
        (tmp_path / "b.partial").write_bytes(path.read_bytes()[:n_bytes])
        assert write(tmp_path / "b", resume=True, force=True).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("config", "recipe", "tokenizer_bytes", "message"),
    [
        (small_config(n_layers=1, vocab_size=50, rope_theta=1e4), RECIPE, len(TOKENIZER), "another config"),
        (CONFIG, Recipe(8, 8), len(TOKENIZER), "another recipe"),
        (CONFIG, RECIPE, 100, "a tokenizer of another size"),
    ],
)
def test_resume_of_something_else(
    tmp_path: Path, config: Any, recipe: Recipe, tokenizer_bytes: int, message: str
) -> None:
    begin(tmp_path / "b", 3)
    before = (tmp_path / "b.partial").read_bytes()
    with pytest.raises(BadInput, match=f"begun with {message}"):
        BlobWriter(tmp_path / "b", config, recipe, tokenizer_bytes, resume=True)
    assert (tmp_path / "b.partial").read_bytes() == before
    (tmp_path / "b.partial").write_bytes(b"somebody's own file")
    with pytest.raises(BadInput, match="something else than a blob"):
        write(tmp_path / "b", resume=True)


def test_a_rename_that_fails_leaves_the_whole_partial(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(*_: object) -> None:
        raise PermissionError(errno.EACCES, "in use by another process")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", replace)
        with pytest.raises(BadInput, match="in use by another process"):
            write(tmp_path / "b")
    assert write(tmp_path / "b", resume=True).read_bytes() == path.read_bytes()
