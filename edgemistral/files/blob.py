"""The blob: one model (config, tokenizer, packed weights) in one file that is mapped and never copied.

A blob is a valid safetensors file (safetensors.py shows the bytes), with these rules:

* Its tensors are exactly those of `layout.tensors`, in that order, one after another; layout.py describes their bytes.
* The data starts at a multiple of 64 bytes, and so does every tensor in it.
* Its metadata holds
      format             "edgemistral"
      format_version     "2", or "1", in which `text` is missing and means its defaults
      config             the JSON of `ModelConfig.to_dict`
      recipe             the JSON of `Recipe`: {"bits": 4, "output_bits": 8}; with "eight": [NAME, ...] if some of the
                         layers' matrices have 8 bits instead of 4
      text               the JSON of `TextSpec.to_dict`: the kind of tokenizer, chat template, ends of turn, ...
      sha256:NAME        of the stored bytes of tensor NAME, 64 hexadecimal digits
      source_sha256:NAME of the values that NAME was made of: the rows of the checkpoint's tensors in the order in which
                         NAME stores them, without padding, in the checkpoint's own dtype; rotary pairs as
                         (i, i + head_dim / 2), so that it does not depend on the layout of the checkpoint
      calibration        how the weights were calibrated, if they were: the JSON of {"method": "fast", "version": 3,
                         "text_sha256": …, "tokens": …}; not needed to read the weights
      header_sha256      of the whole header (padding included) with these 64 digits replaced by zeros
* Unknown metadata is ignored.

While a blob is being written, its name is NAME.partial and its checksums are zeros; a tensor's checksums are filled in when
the tensor is complete. So the header is the journal from which an interrupted run continues. A file whose `header_sha256` is
still zero is not a blob yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import mmap
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig
from edgemistral.errors import BadBlob, BadConfig, BadInput, DamagedBlob
from edgemistral.files import layout, lost, regular, strict_json
from edgemistral.files.disk import share
from edgemistral.files.layout import ALIGNMENT, Recipe, TensorSpec
from edgemistral.files.safetensors import Header, read_header
from edgemistral.text.spec import TextSpec

FORMAT = "edgemistral"
FORMAT_VERSION = "2"
READ_VERSIONS = ("1", "2")
SEAL = "header_sha256"
NO_DIGEST = "0" * 64
HASH_PIECE = 1 << 22   # bytes read at a time

DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("u1"), "F32": np.dtype("<f4"), "BF16": np.dtype("<u2")}


class Blob:
    """An open blob: its description, and its bytes as a read-only mapping. Made by `Blob.open`; a context manager."""

    path: Path
    config: ModelConfig
    recipe: Recipe
    text: TextSpec
    metadata: dict[str, str]
    tensors: dict[str, TensorSpec]   # in file order
    offsets: dict[str, int]          # of each tensor, in bytes from the start of the file
    data: NDArray[np.uint8]          # (file size,), read-only: the mapping of the whole file

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Check and map an open file; use `Blob.open`."""
        header = read_header(file, path, BadBlob)
        self.path, self.metadata = path, header.metadata
        _check_format(header, path)
        self.config, self.recipe, self.text = _read_config(header, path), _read_recipe(header, path), _read_text(header, path)
        self.tensors, self.offsets = _check_tensors(header, self.config, self.recipe, path)
        share(file.fileno())
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        lost.watch(self._map, path)
        self.data = np.frombuffer(self._map, dtype=np.uint8)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Blob:
        """Map a blob in milliseconds, after checking everything except the bytes of its tensors.

        Raises BadBlob, naming the file and the tensor or field, if the file cannot be read, is not a blob of this
        format version, or its tensors are not exactly those of its config.
        """
        path = Path(path)
        if path.is_dir():
            raise BadBlob(f"{path}: a directory, not a blob; `edgemistral quantize` makes one of a checkpoint")
        try:
            with regular.reading(path, BadBlob) as file:
                return cls(path, file)
        except OSError as problem:
            raise BadBlob(f"{path}: cannot be read: {problem.strerror or problem}") from None

    def array(self, name: str) -> NDArray[Any]:
        """A read-only view of one tensor in its shape and type: uint8, float32, or the bits of bfloat16 as uint16."""
        spec, offset = self.tensors[name], self.offsets[name]
        return self.data[offset : offset + spec.n_bytes].view(DTYPES[spec.dtype]).reshape(spec.shape)

    def verify(self, progress: Callable[[int], object] | None = None) -> None:
        """Recompute every checksum; raises DamagedBlob for the first tensor that fails.

        `progress` is called with the number of bytes that were read since the last call.
        """
        for name, spec in self.tensors.items():
            try:   # read the file, not the mapping: a disk error is then an exception instead of a crash
                with self.path.open("rb") as file:
                    digest = sha256_of(file, self.offsets[name], spec.n_bytes, progress)
            except OSError as problem:
                raise DamagedBlob(f"{self.path}: tensor {name} cannot be read: {problem.strerror}", name) from None
            if digest != self.metadata["sha256:" + name]:
                raise DamagedBlob(f"{self.path}: tensor {name} is damaged: its checksum does not match", name)

    def let_go(self, offset: int, size: int) -> None:
        """Let this process drop these bytes from memory (Linux); they are read again when used. Whole pages."""
        self._map.madvise(mmap.MADV_DONTNEED, offset, size)

    def close(self) -> None:
        """Release the mapping; it is unmapped with the last array made from it."""
        del self.data
        with contextlib.suppress(BufferError):   # arrays of it are still in use
            self._map.close()

    def __enter__(self) -> Blob:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_format(header: Header, path: Path) -> None:
    if header.metadata.get("format") != FORMAT:
        raise BadBlob(f"{path}: a safetensors file but not a blob; `edgemistral quantize` makes one of a checkpoint")
    version = header.metadata.get("format_version", "")
    if version not in READ_VERSIONS:
        raise BadBlob(f"{path}: has format version {version[:20]!r}; this edgemistral reads {' and '.join(READ_VERSIONS)}")
    seal = header.metadata.get(SEAL, "")
    if seal == NO_DIGEST:
        raise BadBlob(f"{path}: unfinished; `edgemistral quantize --resume` continues it under its .partial name")
    if not _is_digest(seal) or seal != seal_of(header.text, seal):
        raise BadBlob(f"{path}: its header is damaged: {SEAL} does not match")


def _read_config(header: Header, path: Path) -> ModelConfig:
    try:
        return ModelConfig.from_dict(strict_json.parse(header.metadata.get("config", ""), "config", BadConfig))
    except BadConfig as problem:
        raise BadBlob(f"{path}: {problem}") from None


def _read_recipe(header: Header, path: Path) -> Recipe:
    fields = strict_json.parse(header.metadata.get("recipe", ""), f"{path}: recipe", BadBlob)
    try:
        recipe = Recipe.from_dict(fields)
    except ValueError as problem:
        raise BadBlob(f"{path}: recipe is {str(fields)[:80]}, {problem}") from None
    if strangers := [name for name in recipe.eight if name not in header.tensors]:
        raise BadBlob(f"{path}: recipe names {strangers[0][:80]}, which is not in the file")
    return recipe


def _read_text(header: Header, path: Path) -> TextSpec:
    fields = strict_json.parse(header.metadata.get("text", "{}"), f"{path}: text", BadBlob)
    try:
        return TextSpec.from_dict(fields)
    except BadInput as problem:
        raise BadBlob(f"{path}: {problem}") from None


def _check_tensors(
    header: Header, config: ModelConfig, recipe: Recipe, path: Path
) -> tuple[dict[str, TensorSpec], dict[str, int]]:
    """The tensors and their offsets, after checking that they are exactly those of the config and lie in its order."""
    if header.data_start % ALIGNMENT:
        raise BadBlob(f"{path}: its data starts at {header.data_start}, not at a multiple of {ALIGNMENT}")
    tokenizer = header.tensors.get("tokenizer")
    specs: dict[str, TensorSpec] = {}
    offsets: dict[str, int] = {}
    end = header.data_start
    # The layout is a generator and the first missing tensor ends the loop: no config can make it run for long.
    for spec in layout.tensors(config, recipe, tokenizer.n_bytes if tokenizer else 0):
        entry = header.tensors.get(spec.name)
        if entry is None:
            raise BadBlob(f"{path}: tensor {spec.name} is missing")
        if (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
            found, wanted = f"{entry.dtype} {list(entry.shape)}", f"{spec.dtype} {list(spec.shape)}"
            raise BadBlob(f"{path}: tensor {spec.name} is {found}, its config asks for {wanted}")
        if entry.offset != end:
            raise BadBlob(f"{path}: tensor {spec.name} lies at {entry.offset}, not at {end}")
        for key in ("sha256:" + spec.name, "source_sha256:" + spec.name):
            if not _is_digest(header.metadata.get(key, "")):
                raise BadBlob(f"{path}: {key} is not 64 hexadecimal digits")
        specs[spec.name], offsets[spec.name] = spec, end
        end += entry.n_bytes
    if unknown := sorted(set(header.tensors) - set(specs)):
        raise BadBlob(f"{path}: tensor {unknown[0][:80]!r} does not belong to its config")
    if not specs["tokenizer"].n_bytes:
        raise BadBlob(f"{path}: tensor tokenizer is empty")
    return specs, offsets


def _is_digest(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def seal_of(text: bytes, seal: str) -> str:
    """The checksum of a header's text, taken with zeros in place of the checksum itself."""
    return hashlib.sha256(text.replace(seal.encode(), NO_DIGEST.encode(), 1)).hexdigest()


def sha256_of(
    file: BinaryIO | io.FileIO, offset: int, n_bytes: int, progress: Callable[[int], object] | None = None
) -> str:
    """The SHA-256 of a range of a file, or of the part that exists."""
    digest = hashlib.sha256()
    file.seek(offset)
    while n_bytes and (piece := file.read(min(n_bytes, HASH_PIECE))):
        digest.update(piece)
        n_bytes -= len(piece)
        if progress:
            progress(len(piece))
    return digest.hexdigest()
