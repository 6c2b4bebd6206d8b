"""Session files and the KV store: nothing that was not written there is ever found, unless its checksums were made anew."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.files import OfFiles
from tests.fuzz.harness import Failed

LENGTH = 300      # positions: a full segment and a part of one


class Sessions(OfFiles):
    name = "session"
    planted = "data is not compared with its checksums (files.records.intact)"

    def prepare(self) -> None:
        super().prepare()
        from edgemistral.runtime.segments import SegmentPool
        from tests.runtime.test_session import CONFIG, make, open_file

        self.pool = SegmentPool(CONFIG, budget=1 << 30)
        path = self.folder / "a.session"
        make(path, self.pool, range(3, 3 + LENGTH), json.dumps({"messages": [{"role": "user", "content": "a"}], "written": {}}))
        self.seed = path.read_bytes()
        file = open_file(path, self.pool)
        self.slot, self.data_start = file.header.slot_bytes, file.header.start
        file.close()
        size = int.from_bytes(self.seed[24:28], "little")
        self.fields = json.loads(self.seed[28 : 28 + size])

    def make(self, chance: Random) -> Any:
        kind = chance.randrange(5)
        if kind == 0:
            return {"header": mutate.as_text(chance, mutate.value(chance, self.fields)), "digest": chance.random() < 0.95}
        if kind == 1:
            slot = chance.randrange(2)
            return {"slot": slot, "state": chance.randrange(1, 2**32), "digest": chance.random() < 0.9}
        starts = (0, 65536, 65536 + self.slot, self.data_start, len(self.seed) - 2048, len(self.seed) // 2)
        edits = []
        for _ in range(chance.choice((1, 1, 2, 5, 50))):
            at = chance.choice(starts) + chance.choice((0, chance.randrange(64), chance.randrange(2000),
                chance.randrange(60000)))
            edits.append([at % len(self.seed), chance.choice((0, 255, chance.randrange(256)))])
        return {"edits": edits, "size": chance.choice((0, 0, 0, -1, -2048, -65536, chance.randrange(-len(self.seed), 0), 4096))}

    def run(self, given: Any) -> str:
        import zlib

        from edgemistral.files.session import SessionFile, summary
        from edgemistral.files.session_header import HEAD, STATE, digest_of
        from edgemistral.model import Model
        from edgemistral.runtime.session import FileSequence
        from tests.runtime.test_session import check, open_file

        data = bytearray(self.seed)
        if "header" in given:
            text = given["header"].encode("utf-8", "surrogatepass")
            magic, version, _ = HEAD.unpack(bytes(data[: HEAD.size]))
            head = HEAD.pack(magic, version, len(text)) + text
            data[: len(head) + 32] = head + (digest_of(head) if given["digest"] else bytes(32))
        elif "slot" in given:
            at, chance = 65536 + given["slot"] * self.slot, Random(given["state"])
            state = bytes(data[at : at + self.slot])
            size = STATE.size + 1176 + STATE.unpack(state[: STATE.size])[2]
            if chance.random() < 0.5:      # notes that say something else, or unpack to much
                notes = zlib.compress(b" " * chance.choice((10, 10**6, 10**8)) if chance.random() < 0.2
                                      else mutate.as_text(chance, mutate.value(chance, {"messages": [{"role": "user",
                                      "content": ""}],
                                                                                        "written": {"0": [1]}})).encode())
                made = state[:16] + len(notes).to_bytes(8, "little") + state[STATE.size : STATE.size + 1176] + notes
            else:
                made = mutate.data(chance, state[:size])
            made = (made + (digest_of(made) if given["digest"] else b""))[: self.slot]
            data[at : at + len(made)] = made
        else:
            for at, value in given["edits"]:
                data[at] = value
            data = data[: given["size"]] if given["size"] < 0 else data + bytes(given["size"])
        path = self.work / "a.session"
        path.write_bytes(data)
        summary(path)
        inspected = SessionFile.inspect(path)
        inspected.close()
        sequence = FileSequence(self.pool, open_file(path, self.pool))
        try:
            ids = sequence.ids.tolist()
            if ids != list(range(3, 3 + len(ids))):
                raise Failed("ids that were never written")
            try:
                check(sequence)
            except AssertionError as error:
                raise Failed(f"data that was never written: {error}") from None
            del Model
        finally:
            sequence.close()
        return "all" if len(ids) == LENGTH else "cut back"

    def plant(self) -> None:
        from edgemistral.files import records

        records.intact = lambda record, data, geometry: len(record.ids)


class Stores(OfFiles):
    name = "store"
    planted = "data is not compared with its checksums (files.records.intact)"

    def prepare(self) -> None:
        super().prepare()
        import numpy as np

        from edgemistral.files import records
        from edgemistral.files.kv_store import KVStore
        from edgemistral.runtime.segments import SegmentPool
        from edgemistral.runtime.session import geometry_of
        from tests.runtime.test_session import CONFIG

        self.root = records.root_of({"blob": "x"})
        self.geometry = geometry_of(SegmentPool(CONFIG, budget=1 << 30))
        self.ids = np.arange(3, 3 + 512, dtype=np.int32)
        self.content = np.random.default_rng(0).integers(0, 256, self.geometry.stride, np.uint8)
        store, parent = KVStore(self.folder / "seed", self.root, self.geometry, 1 << 30), self.root
        for number in range(2):
            part = self.ids[256 * number :][:256]
            assert store.put(number, parent, part, self.content)
            parent = records.chain_of(parent, part)
        self.files = [store._path(records.chain_of(self.root, self.ids[:256])), store._path(parent)]
        self.seeds = [path.read_bytes() for path in self.files]

    def make(self, chance: Random) -> Any:
        which = chance.randrange(2)
        size = len(self.seeds[which])
        used = self.geometry.data_bytes
        edits = [[chance.choice((chance.randrange(used), size - 2048 + chance.randrange(1176))), chance.randrange(256)]
                 for _ in range(chance.choice((1, 2, 20)))]
        return {"file": which, "edits": edits, "size": chance.choice((0,) * 6 + (-1, 1, -2048, -size, 4096)),
                "kind": chance.choice(("",) * 12 + ("fifo", "loop", "folder", "empty", "device", "html"))}

    def run(self, given: Any) -> str:
        import shutil

        import numpy as np

        from edgemistral.files.kv_store import KVStore
        from tests.fuzz.files import put_other

        folder = self.work / "store"
        shutil.rmtree(folder, ignore_errors=True)
        store = KVStore(folder, self.root, self.geometry, 1 << 30)
        for number, (path, data) in enumerate(zip(self.files, self.seeds, strict=True)):
            target, made = store._own / path.name, bytearray(data)
            if number == given["file"]:
                if given["kind"]:
                    put_other(target, given["kind"])
                    continue
                for at, value in given["edits"]:
                    made[at] = value
                made = made[: given["size"]] if given["size"] < 0 else made + bytes(given["size"])
            target.write_bytes(made)
        store.known(self.ids)
        found = store.load(self.ids)
        used = self.geometry.data_bytes
        for mapping in found:
            if not np.array_equal(np.frombuffer(mapping, np.uint8)[:used], self.content[:used]):
                raise Failed("data that was never stored")
        store.files()
        store._make_room(self.root)
        return f"{len(found)} found"

    def plant(self) -> None:
        from edgemistral.files import records

        records.intact = lambda record, data, geometry: len(record.ids)
