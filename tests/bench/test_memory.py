"""What the benchmarks of long conversations stand on: a filled session is an ordinary one, and a group limits a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edgemistral
from bench import memory_cgroup
from bench.filled_session import write_filled
from edgemistral.demo import demo_model


def test_a_filled_session_opens_whole_and_goes_on(tmp_path):
    ids = np.random.default_rng(0).integers(3, 500, 1000).astype(np.int32)
    write_filled(tmp_path / "a.session", Path(demo_model()), ids)
    with edgemistral.load(demo_model(), threads=1) as model, model.session(tmp_path / "a.session") as session:
        assert session.notice == "" and session.ids.tolist() == ids.tolist()
        generation = model.generate([*ids.tolist(), 5], 2, temperature=0, session=session)
        next(generation, None)
        assert generation.usage.cached_tokens == 1000


def test_a_group_limits_a_process_or_says_why_not():
    try:
        with memory_cgroup.limited(64 << 20) as group:
            code = "import sys; sys.path.insert(0, '.'); from bench import memory_cgroup; from pathlib import Path; "
            code += f"memory_cgroup.join(Path({str(group.folder)!r})); bytearray(1 << 28)"
            done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
            assert done.returncode, "256 MiB within 64"
            assert group.peak is None or 0 < group.peak <= 64 << 20
    except memory_cgroup.NoCgroup as problem:
        pytest.skip(str(problem))
    assert not group.folder.exists()
