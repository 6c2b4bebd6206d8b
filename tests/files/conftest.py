from __future__ import annotations

from pathlib import Path

import pytest

from tests.files.written import write


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("blob") / "modèle 模型.safetensors")
