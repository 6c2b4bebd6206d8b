"""Writes a blob, tensor by tensor, so that an interrupted run can continue; blob.py describes the file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgemistral.config import ModelConfig
from edgemistral.errors import BadInput
from edgemistral.files import layout, regular
from edgemistral.files.blob import FORMAT, FORMAT_VERSION, NO_DIGEST, SEAL, seal_of, sha256_of
from edgemistral.files.disk import locked
from edgemistral.files.layout import ALIGNMENT, Recipe, TensorSpec
from edgemistral.files.safetensors import MAX_HEADER, METADATA, make_header
from edgemistral.text.spec import TextSpec

SECTOR = 512    # bytes that a disk writes at once, at least


class BlobWriter:
    """Writes a blob tensor by tensor under the name DST.partial, and renames it when it is complete.

    A context manager. Killed at any moment, it leaves no DST (or the old one) and a DST.partial from which `resume`
    continues. Raises BadInput if DST exists (unless `force`), if a DST.partial exists (unless `resume` or `force`) or was
    begun with another config, recipe, calibration or size of tokenizer, if the disk is too small, and on any system error.
    """

    def __init__(
        self,
        dst: str | os.PathLike[str],
        config: ModelConfig,
        recipe: Recipe,
        tokenizer_bytes: int,
        *,
        text: TextSpec | None = None,
        resume: bool = False,
        force: bool = False,
        calibration: Mapping[str, Any] | None = None,
    ) -> None:
        self.dst = Path(dst)
        self.partial = self.dst.with_name(self.dst.name + ".partial")
        self.tensors = {spec.name: spec for spec in layout.tensors(config, recipe, tokenizer_bytes)}
        self._header = _blank_header(config, recipe, text or TextSpec(), calibration, self.tensors.values())
        self.offsets: dict[str, int] = {}
        self.size = len(self._header)   # bytes of the whole file
        for spec in self.tensors.values():
            self.offsets[spec.name] = self.size
            self.size += spec.n_bytes
        self._complete: set[str] = set()

        if self.dst.is_dir():
            raise BadInput(f"{self.dst}: a directory; name the file to write")
        if self.dst.exists() and not force:
            raise BadInput(f"{self.dst}: exists already; pass force to replace it")
        resume = resume and self.partial.exists()
        if self.partial.exists() and not (resume or force):
            raise BadInput(f"{self.partial}: an unfinished run; pass resume to continue it or force to start again")
        with self._system_errors():
            already = self.partial.stat().st_size if resume else 0
            if self.size - already > (free := shutil.disk_usage(self.dst.parent).free):
                raise BadInput(f"{self.dst}: needs {self.size - already} bytes of disk, {free} are free")
            self._file = self._opened()
            if not resume:
                self._file.truncate(0)
        try:
            with self._system_errors():
                if resume:
                    self._read_journal()
                else:
                    self._write_at(0, self._header)
        except BaseException:
            self._file.close()
            if not resume:
                self.partial.unlink(missing_ok=True)
            raise

    def _opened(self) -> io.FileIO:
        """The unfinished file, locked against other writers."""
        regular.check(self.partial, BadInput)
        file = self.partial.open("r+b" if self.partial.exists() else "x+b", buffering=0)
        try:
            whole = os.name == "nt" or locked(file.fileno())
            whole = whole and os.path.samestat(os.fstat(file.fileno()), self.partial.stat())    # else finished just now
        except FileNotFoundError:
            whole = False
        if not whole:
            file.close()
            raise BadInput(f"{self.partial}: another program is writing it")
        return file

    def _read_journal(self) -> None:
        """Use the checksums of an unfinished file, if its header is otherwise the one that we would write."""
        found = bytearray(self._file.read(len(self._header)))
        if self._header.startswith(found):   # empty, or killed before the header was complete
            self._write_at(0, self._header)
            return
        found += self._header[len(found) :]
        for at in range(0, len(found), SECTOR):       # after a power cut: zeros where a sector was not written
            if not any(found[at : at + SECTOR]):
                found[at : at + SECTOR] = self._header[at : at + SECTOR]
        blank = bytearray(found)
        for at in _digest_positions(self._header):
            blank[at : at + len(NO_DIGEST)] = NO_DIGEST.encode()
        if blank != self._header:
            difference = _difference(self._file, self._header)
            raise BadInput(f"{self.partial}: begun with {difference}; pass force to start again")
        self._header = found
        self._write_at(0, found)

    def done(self, name: str) -> bool:
        """Whether the tensor was written, now or by an earlier run, and its bytes match their checksum."""
        digest = self._digest("sha256:" + name)
        if name not in self._complete and digest != NO_DIGEST and not self._is_torn("source_sha256:" + name):
            with self._system_errors():
                if sha256_of(self._file, self.offsets[name], self.tensors[name].n_bytes) == digest:
                    self._complete.add(name)
        return name in self._complete

    def _is_torn(self, key: str) -> bool:
        """Whether a checksum, or its part in one sector of the disk, was never written."""
        at = _digest_position(self._header, key)
        cut = min(len(NO_DIGEST), SECTOR - at % SECTOR)
        digest = self._digest(key)
        return any(part and not part.strip("0") for part in (digest[:cut], digest[cut:]))

    def source_sha256(self, name: str) -> str:
        """The checksum of the source of a finished tensor."""
        return self._digest("source_sha256:" + name)

    def write(self, name: str, pieces: Iterable[Any], source_sha256: Callable[[], str]) -> None:
        """Write one tensor from C-contiguous buffers that together have exactly its size.

        `source_sha256` is called after the last piece (the source is read while the pieces are made).
        """
        spec, digest, n_bytes = self.tensors[name], hashlib.sha256(), 0
        for piece in pieces:
            view = memoryview(piece).cast("B")
            if n_bytes + view.nbytes > spec.n_bytes:
                raise ValueError(f"tensor {name} is larger than its {spec.n_bytes} bytes")
            digest.update(view)
            with self._system_errors():
                self._write_at(self.offsets[name] + n_bytes, view)
            n_bytes += view.nbytes
        if n_bytes != spec.n_bytes:
            raise ValueError(f"tensor {name} has {n_bytes} bytes instead of {spec.n_bytes}")
        # No fsync here: `resume` checks the checksum, and writes a tensor again that did not reach the disk.
        self._fill_in("source_sha256:" + name, source_sha256())
        self._fill_in("sha256:" + name, digest.hexdigest())
        self._complete.add(name)

    def finish(self) -> Path:
        """Seal the header, write everything to the disk and rename the file; returns its path."""
        if missing := [name for name in self.tensors if name not in self._complete]:
            raise ValueError(f"tensor {missing[0]} was not written")
        with self._system_errors():
            os.fsync(self._file.fileno())   # all data first: a sealed header promises complete tensors
            self._fill_in(SEAL, NO_DIGEST)   # an earlier run may have been killed after its seal
            self._fill_in(SEAL, seal_of(bytes(self._header[8:]), NO_DIGEST))
            os.fsync(self._file.fileno())
            if os.name == "nt":
                self._file.close()           # an open file cannot be renamed there
            self.partial.replace(self.dst)   # while locked, so that no other process begins to write it
            self._file.close()
            _sync_directory(self.dst.parent)
        return self.dst

    def _digest(self, key: str) -> str:
        at = _digest_position(self._header, key)
        return self._header[at : at + len(NO_DIGEST)].decode("ascii", "replace")

    def _fill_in(self, key: str, digest: str) -> None:
        at = _digest_position(self._header, key)
        self._header[at : at + len(NO_DIGEST)] = digest.encode()
        with self._system_errors():
            self._write_at(at, digest.encode())

    def _write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._file.seek(offset)
        rest = memoryview(data)
        while rest:   # the file is unbuffered, and the system may write only a part
            rest = rest[self._file.write(rest) :]

    @contextlib.contextmanager
    def _system_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            raise BadInput(f"{self.partial}: cannot be written: {problem.strerror or problem}") from None

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if all(self._digest("sha256:" + name) == NO_DIGEST for name in self.tensors):
            self.partial.unlink(missing_ok=True)   # nothing in it to resume from


def _blank_header(
    config: ModelConfig, recipe: Recipe, text: TextSpec, calibration: Mapping[str, Any] | None, specs: Iterable[TensorSpec]
) -> bytearray:
    """The first bytes of a file, up to its data, with zeros for all checksums."""
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": json.dumps(config.to_dict()),
        "recipe": json.dumps(recipe.to_dict()),
        "text": json.dumps(text.to_dict()),
        **({} if calibration is None else {"calibration": json.dumps(calibration)}),
        SEAL: NO_DIGEST,
    }
    tensors = [(spec.name, spec.dtype, spec.shape) for spec in specs]
    for name, _, _ in tensors:
        metadata["sha256:" + name] = metadata["source_sha256:" + name] = NO_DIGEST
    return bytearray(make_header(tensors, metadata, ALIGNMENT))


def _digest_position(header: bytearray, key: str) -> int:
    opening = f'"{key}":"'.encode()
    return header.index(opening) + len(opening)


def _digest_positions(header: bytearray) -> Iterator[int]:
    for match in re.finditer(rb'sha256[^"]*":"', header):
        yield match.end()


def _difference(file: io.FileIO, header: bytearray) -> str:
    """The difference between an unfinished file and one that begins with `header`, for a message."""
    file.seek(0)
    length = min(int.from_bytes(file.read(8), "little"), MAX_HEADER)
    try:
        theirs, ours = (json.loads(text)[METADATA] for text in (file.read(length), bytes(header[8:])))
        changed = [key for key in ("format_version", "config", "recipe", "text") if theirs[key] != ours[key]]
        changed += ["calibration"] if theirs.get("calibration") != ours.get("calibration") else []
    except (ValueError, KeyError, TypeError, AttributeError):
        return "something else than a blob"
    return f"another {' and '.join(changed)}" if changed else "a tokenizer of another size"


def _sync_directory(path: Path) -> None:
    """Make a rename in it permanent; Windows has no such call and needs none."""
    if os.name != "nt":
        directory = os.open(path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
