"""What the documents say of the tree is so: links, files, imports, the README's speeds."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path for folder in (".", "bench", "bench/results", "docs", "docs/decisions", "examples", "models", "models/demo")
    for path in (ROOT / folder).glob("*.md")
)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not re.match(r"\w+:", target):
            assert (path.parent / target).exists(), target


def test_contributing_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for row in re.findall(r"^\| (`.*?) \|", text, re.M):
        folder = ROOT
        for name in re.findall(r"`([^`]+)`", row):
            path = ROOT / name if "/" in name else folder / name
            assert path.exists(), name
            folder = path if path.is_dir() else path.parent
    folders = [ROOT, ROOT / "tests", ROOT / "edgemistral", *(ROOT / "edgemistral").iterdir()]
    for name in re.findall(r"`([\w./-]+\.(?:py|yml|txt))`", text):
        assert any((folder / name).exists() for folder in folders), name


def test_every_folder_of_the_package_is_described():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in (ROOT / "edgemistral").iterdir():
        if path.is_dir() and path.name != "__pycache__":
            assert f"`edgemistral/{path.name}/" in text, path.name


def test_every_decision_is_listed():
    records = {path.name for path in (ROOT / "docs" / "decisions").glob("2*.md")}
    listed = re.findall(r"\((2[^)]+\.md)\)", (ROOT / "docs" / "decisions" / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(records)


def test_the_runtime_imports_the_quantizer_inside_four_functions():
    found = set()
    for path in (ROOT / "edgemistral").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
            if any(module.split(".")[0] == "edgemistral_quantize" for module in modules):
                assert node not in tree.body, path
                found.add(path.relative_to(ROOT / "edgemistral").as_posix())
    assert found == {"cli/quantize.py", "demo/__init__.py", "warm_up.py", "measure/reference.py"}


def test_the_readme_is_short_and_its_speeds_are_measured():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) < 700
    for folder, name in (("znver5", "Zen 5"), ("znver4", "Zen 4")):
        summary = json.loads((ROOT / "bench" / "results" / folder / "peers_q4.json").read_text())["summary"]
        cells = [f"{s['ours']:.1f} | {s['theirs']:.1f} | {s['ratio']:.2f} x" for s in (summary["decode"], summary["prefill"])]
        assert f"| {name} | {' | '.join(cells)} |" in text
