"""python bench/crash.py [--minutes 2] [--kind NAME]: kill -9, power cuts, full disks at random moments; promises are checked.

Adds to bench/results/crash.json. The promise of each kind:

    quantize    a killed run leaves no model file or a complete one; `resume` ends with the bytes of a run that was never killed
    two         of two runs on one file, one is refused; the result is complete
    session     after kill -9, everything reported as saved is there, and nothing that was never written
    store       a segment of the KV store is complete or not found; earlier segments stay
    power       unsynced writes of a model file are dropped, sector by sector; the same promise as quantize
    power, session    the same for a session file; the same promise as session
    full        the disk is full after a random number of bytes: one error of ours, and existing files stay
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import harness
from edgemistral.errors import EdgeMistralError

RECORD = harness.RESULTS / "crash.json"
Check = Callable[[Path, random.Random], int]       # runs one slice below a folder; returns how many kills it was


class Lost(AssertionError):
    """A promise that was not kept."""


def forked(work: Callable[[], None], after: float | None = None) -> tuple[int, bytes]:
    """Run `work` in a child, and kill it `after` seconds; (exit status, its output on descriptor 3)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writer, 3)
        code = 1
        try:
            work()
            code = 0
        except EdgeMistralError as error:
            os.write(3, f"\nerror {error}".encode())
            code = 2
        finally:
            os._exit(code)
    os.close(writer)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    said = b"".join(iter(lambda: os.read(reader, 1 << 16), b""))
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise Lost(what)


def is_whole(path: Path) -> None:
    from edgemistral.files.blob import Blob

    with Blob.open(path) as blob:
        blob.verify()


class Quantizing:
    """A small checkpoint and the blob of a run that was not killed."""

    def __init__(self, folder: Path) -> None:
        from edgemistral_quantize import quantize

        from tests.checkpoints import random_weights, small_config, write_hf

        config = small_config(n_layers=6, hidden_dim=896)
        self.source, self.quantize = write_hf(folder / "source", config, random_weights(config)), quantize
        begun = time.monotonic()
        status, _ = forked(lambda: self.run(folder / "whole"))
        self.seconds = time.monotonic() - begun
        expect(status == 0, "a run that nobody kills fails")
        self.digest = hashlib.sha256((folder / "whole").read_bytes()).hexdigest()

    def run(self, dst: Path, **options: bool) -> None:
        self.quantize(self.source, dst, calibrate="none", progress=False, **options)

    def finish(self, dst: Path) -> None:
        partial = dst.with_name(dst.name + ".partial")
        if not dst.exists():
            status, said = forked(lambda: self.run(dst, resume=True))
            expect(status == 0, f"resume fails: {said!r}")
        expect(hashlib.sha256(dst.read_bytes()).hexdigest() == self.digest, "another model file than without kills")
        expect(not partial.exists(), "a partial file is left")
        dst.unlink()

    def kills(self, folder: Path, chance: random.Random) -> int:
        dst, kills = folder / "killed", 0
        for _ in range(chance.randint(1, 6)):
            status, said = forked(lambda: self.run(dst, resume=True), chance.uniform(0, 1.1 * self.seconds))
            kills += status == -signal.SIGKILL
            expect(status in (0, -signal.SIGKILL), f"resume fails: {said!r}")
            if dst.exists():
                is_whole(dst)
                break
        self.finish(dst)
        return kills

    def two(self, folder: Path, chance: random.Random) -> int:
        """A second run starts while the first one works; sometimes the first one is killed."""
        dst = folder / "two"

        def both() -> None:
            first = os.fork()
            if first == 0:
                code = 1
                try:
                    self.run(dst, resume=True, force=True)
                    code = 0
                finally:
                    os._exit(code)
            time.sleep(chance.uniform(0, self.seconds / 2))
            try:
                self.run(dst, resume=True, force=chance.random() < 0.5)
            except EdgeMistralError as error:
                expect("another program" in str(error) or "exists" in str(error), str(error))
            if chance.random() < 0.5:
                os.kill(first, signal.SIGKILL)
            os.waitpid(first, 0)

        status, said = forked(both)
        expect(status == 0, f"two runs: {said!r}")
        if dst.exists():
            is_whole(dst)
        self.finish(dst)
        return 1

    def full(self, folder: Path, chance: random.Random) -> int:
        """A limit on the size of files simulates a full disk."""
        dst = folder / "full"
        limit = chance.randrange(1, 2 * (folder.parent / "whole").stat().st_size)

        def work() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            self.run(dst, resume=True)

        status, said = forked(work)
        expect(status in (0, 2), f"a full disk ends with {status}: {said!r}")
        self.finish(dst)
        return 1

    def power(self, folder: Path, chance: random.Random) -> int:
        """Record every write of the blob, write the file that a power cut would leave, and resume with it."""
        from edgemistral.files import blob_writer
        from tests.crash import SECTOR
        from tests.files.written import write

        events: list[tuple[str, int, bytes]] = []
        write_at, sync = blob_writer.BlobWriter._write_at, os.fsync

        def recorded(self: blob_writer.BlobWriter, offset: int, data: bytes) -> None:
            events.append(("write", offset, bytes(data)))
            write_at(self, offset, data)

        try:
            blob_writer.BlobWriter._write_at = recorded  # type: ignore[method-assign, assignment]
            os.fsync = lambda file: events.append(("sync", 0, b""))  # type: ignore[assignment]
            whole = write(folder / "recorded").read_bytes()
        finally:
            blob_writer.BlobWriter._write_at, os.fsync = write_at, sync  # type: ignore[method-assign]
        (folder / "recorded").unlink()
        states = [b""]                     # of the file, after each event
        for kind, offset, data in events:
            state = bytearray(states[-1].ljust(offset + len(data), b"\0") if kind == "write" else states[-1])
            state[offset : offset + len(data)] = data
            states.append(bytes(state))
        for _ in range(20):
            cut, share = chance.randint(0, len(events)), chance.choice((0.0, 0.1, 0.5, 0.9, 1.0))
            synced = max((n for n, event in enumerate(events[:cut]) if event[0] == "sync"), default=-1) + 1
            image = bytearray()
            for at in range(0, len(states[cut]), SECTOR):      # each sector as it was at some moment since
                state = states[cut if chance.random() < share else chance.randint(synced, cut)]
                image += state[at : at + SECTOR].ljust(min(SECTOR, len(states[cut]) - at), b"\0")
            (folder / "cut.partial").write_bytes(image)
            expect(write(folder / "cut", resume=True).read_bytes() == whole, f"another file after a cut at {cut}")
            (folder / "cut").unlink()
        return 20


def sessions(folder: Path, chance: random.Random) -> int:
    """A child writes and saves; what it reports as saved is compared with the file after its end."""
    from edgemistral.runtime.segments import SegmentPool
    from edgemistral.runtime.session import FileSequence
    from tests.runtime.test_session import CONFIG, check, compute, open_file

    path, promised = folder / "a.session", 0
    path.unlink(missing_ok=True)
    kills = chance.randint(1, 5)
    for _ in range(kills):
        def work() -> None:
            pool = SegmentPool(CONFIG, budget=1 << 30)
            sequence = FileSequence(pool, open_file(path, pool))
            check(sequence)
            os.write(3, b"had %d\n" % sequence.length)
            while True:
                if sequence.length > 1800 or chance.random() < 0.1:
                    cut = chance.randint(0, sequence.length)
                    os.write(3, b"may %d\n" % (cut // 64 * 64))
                    sequence.cut(cut)
                os.write(3, b"may %d\n" % (sequence.length // 64 * 64))
                compute(sequence, [chance.randint(3, 9) for _ in range(chance.choice((1, 5, 70, 300)))])
                sequence.save(f"{sequence.length}")
                os.write(3, b"saved %d\n" % sequence.length)

        chance.random()
        status, said = forked(work, chance.uniform(0.005, 0.25))
        expect(status == -signal.SIGKILL, f"a session fails: {status} {said[-300:]!r}")
        words = [line.split() for line in said.decode().splitlines() if line.count(" ") == 1]
        for word, number in words:
            if word == "had":
                expect(int(number) >= promised, f"{number} tokens are left of {promised}")
            promised = int(number) if word in ("saved", "had") else min(promised, int(number))

    def look() -> None:
        pool = SegmentPool(CONFIG, budget=1 << 30)
        sequence = FileSequence(pool, open_file(path, pool))
        check(sequence)
        os.write(3, b"%d" % sequence.length)

    status, said = forked(look)
    expect(status == 0 and int(said) >= promised, f"after the last kill: {status} {said!r} of {promised}")
    return kills


def power_of_sessions(folder: Path, chance: random.Random) -> int:
    from edgemistral.runtime.segments import SegmentPool
    from tests.runtime.test_session import CONFIG, check_crashes

    pool = SegmentPool(CONFIG, budget=1 << 30)
    check_crashes(folder, pool, chance.randrange(2**32), 20)
    pool.close()
    return 20


def stores(folder: Path, chance: random.Random) -> int:
    """A child stores segments of a chain; every one whose `put` returned is found, with its bytes."""
    import numpy as np

    from edgemistral.files import records
    from edgemistral.files.kv_store import KVStore
    from edgemistral.runtime.segments import SegmentPool
    from edgemistral.runtime.session import geometry_of
    from tests.crash import content
    from tests.runtime.test_session import CONFIG

    geometry, root = geometry_of(SegmentPool(CONFIG, budget=0)), records.root_of({"blob": "x"})
    shutil.rmtree(folder / "store", ignore_errors=True)
    ids = np.array([chance.randint(3, 200) for _ in range(256 * 40)], np.int32)
    promised = 0
    for _ in range(chance.randint(1, 4)):
        def work() -> None:
            store, parent = KVStore(folder / "store", root, geometry, 1 << 30), root
            for number in range(40):
                part = ids[256 * number :][:256]
                data = np.zeros(geometry.stride, np.uint8)
                data[: geometry.data_bytes] = content(part, geometry.data_bytes)
                expect(store.put(number, parent, part, data), "put refuses")
                os.write(3, b"%d\n" % (number + 1))
                parent = records.chain_of(parent, part)

        _, said = forked(work, chance.uniform(0.002, 0.1))
        promised = max([promised, *(int(line) for line in said.split(b"\n")[:-1])])
        found = KVStore(folder / "store", root, geometry, 1 << 30).load(ids)
        expect(len(found) >= promised, f"{len(found)} segments are left of {promised}")
        for number, mapping in enumerate(found):
            wanted = content(ids[256 * number :][:256], geometry.data_bytes)
            there = np.frombuffer(mapping, np.uint8)[: geometry.data_bytes]
            expect(bool((there == wanted).all()), "bytes that were never stored")
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--kind", action="append")
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    top = Path(tempfile.mkdtemp(prefix="crash-"))
    failed = False
    try:
        folder = top / "work"
        folder.mkdir()
        quantizing = Quantizing(top)
        kinds: dict[str, Check] = {
            "quantize": quantizing.kills, "two": quantizing.two, "full": quantizing.full, "power": quantizing.power,
            "session": sessions, "store": stores, "power, session": power_of_sessions,
        }
        chosen = arguments.kind or list(kinds)
        for kind in chosen:
            begun, kills, lost, number = time.monotonic(), 0, [], 0
            while time.monotonic() - begun < 60 * arguments.minutes / len(chosen):
                number += 1
                shutil.rmtree(folder)
                folder.mkdir()
                try:
                    kills += kinds[kind](folder, random.Random(f"{kind} {seed} {number}"))
                except (Lost, AssertionError, EdgeMistralError) as error:
                    lost.append(f"seed {seed}, slice {number}: {error}")
            print(f"{kind:16} {kills:6} kills in {number} slices, {len(lost)} lost", *lost[:3], sep="\n    ", flush=True)
            record(kind, kills, len(lost))
            failed |= bool(lost)
    finally:
        shutil.rmtree(top, ignore_errors=True)
    return int(failed)


def record(kind: str, kills: int, lost: int) -> None:
    """Add to the counts of this tree on this machine."""
    content = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {"runs": []}
    key = {"commit": harness.commit(), "machine": harness.machine()["cpu"]}
    run = next((one for one in content["runs"] if all(one[name] == value for name, value in key.items())), None)
    if run is None:
        content["runs"].append(run := {**key, "kinds": {}})
    old = run["kinds"].get(kind, {"kills": 0, "lost": 0})
    run["kinds"][kind] = {"kills": old["kills"] + kills, "lost": old["lost"] + lost}
    content |= {"commit": key["commit"], "command": "python bench/crash.py"}
    RECORD.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
