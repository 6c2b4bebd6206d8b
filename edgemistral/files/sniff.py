"""Recognizes a file with a wrong name by its first bytes: one phrase for an error message."""

from __future__ import annotations

from pathlib import Path

from edgemistral.errors import BadInput
from edgemistral.files import regular

SNIFFED = 512   # bytes that are examined

MAGICS: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "a GGUF file (`edgemistral quantize FILE.gguf DST` makes a model file of it)"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; `git lfs pull` in its folder fetches that"),
    (b"tjgg", "a GGML file of 2023 (GGUF replaced this format); get the model as safetensors or GGUF"),
    (b"fmgg", "a GGML file of 2023 (GGUF replaced this format); get the model as safetensors or GGUF"),
    (b"lmgg", "a GGML file of 2023 (GGUF replaced this format); get the model as safetensors or GGUF"),
    (b"PK\3\4", "a zip archive: PyTorch's pickle format, which can run code and is not read; get the safetensors files"),
    (b"\x80\x02", "a Python pickle, which can run code and is not read; get the safetensors files"),
    (b"\x80\x03", "a Python pickle, which can run code and is not read; get the safetensors files"),
    (b"\x80\x04", "a Python pickle, which can run code and is not read; get the safetensors files"),
    (b"\x80\x05", "a Python pickle, which can run code and is not read; get the safetensors files"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\xfd7zXZ", "an xz archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"\x93NUMPY", "a NumPy array, not a model"),
    (b"\x89HDF", "an HDF5 file (Keras); get the model as safetensors"),
    (b"%PDF", "a PDF document"),
)
WEB_PAGE = "an HTML page, as servers send for a login or an error, not the file itself; download it again"


def describe(start: bytes) -> str | None:
    """A phrase for a file that begins with these bytes (a few hundred, or the whole file); None: unknown."""
    if not start:
        return "an empty file; is the download complete?"
    for magic, what in MAGICS:
        if start.startswith(magic):
            return what
    if start[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<!--", b"<?xml")):
        return WEB_PAGE
    if len(start) >= 8 and not start.strip(b"\0"):
        return "nothing but zeros at its start: a download that was not finished"
    return None


def describe_text(start: bytes) -> str | None:
    """The same for a file that should be binary: a short text in its place is quoted."""
    what = describe(start)
    if what is None and len(start) >= 8 and start[:8].isascii():
        text = start.decode("utf-8", "replace").split("\n")[0].strip()
        if text[:60].isprintable() and "\ufffd" not in text[:60]:
            what = f"a text that begins with {text[:60]!r}; download the file again"
    return what


def describe_file(path: Path) -> str | None:
    """`describe` of the beginning of a file; None also if it cannot be read."""
    try:
        with path.open("rb") as file:
            return describe(file.read(SNIFFED))
    except OSError:
        return None


def refuse_other_files(path: Path, error: type[BadInput]) -> None:
    """Raise `error` for a file that is certainly not what its name says, or for a broken link."""
    if path.is_symlink() and not path.exists():
        raise error(f"{path}: a link to a file that is not there; is the download complete?")
    try:
        with regular.reading(path, error) as file:
            what = describe(file.read(SNIFFED))
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror or problem}") from None
    if what is not None:
        raise error(f"{path}: {what}")
