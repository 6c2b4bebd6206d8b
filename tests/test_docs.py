"""What the documents say of the tree is so: links, files, imports, the README's speeds."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
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


def test_the_runtime_imports_the_quantizer_inside_three_functions():
    found = set()
    for path in (ROOT / "edgemistral").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
            if any(module.split(".")[0] == "edgemistral_quantize" for module in modules):
                assert node not in tree.body, path
                found.add(path.relative_to(ROOT / "edgemistral").as_posix())
    assert found == {"cli/quantize.py", "warm_up.py", "measure/reference.py"}


def test_the_readme_is_short_and_its_speeds_are_measured():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) < 700
    for folder, name in (("znver5", "Zen 5"), ("znver4", "Zen 4")):
        summary = json.loads((ROOT / "bench" / "results" / folder / "peers_q4.json").read_text())["summary"]
        cells = [f"{s['ours']:.1f} | {s['theirs']:.1f} | {s['ratio']:.2f} x" for s in (summary["decode"], summary["prefill"])]
        assert f"| {name} | {' | '.join(cells)} |" in text


def test_the_readme_has_its_order_and_its_picture():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)", text, re.M) == [
        "Install", "Three commands", "What you can rely on", "What it reads", "Where it runs", "How fast", "From Python",
        "The server", "More",
    ]
    assert text.index("](docs/chat.png)") < text.index("## Install")
    assert (ROOT / "docs" / "chat.png").stat().st_size < 200_000


def test_every_page_can_be_reached():
    """In the menu of the site, or from the list of decisions."""
    menu = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert {name for name in menu if "/" not in name} == pages, "list it in mkdocs.yml"
    for name in menu:
        assert (ROOT / "docs" / name).exists(), name


def test_commands_in_the_documents_exist():
    """Each `edgemistral COMMAND --option` of README and docs/."""
    from edgemistral.cli import main

    named = 0
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        if path.name != "help.md":
            text = path.read_text(encoding="utf-8")
            for line in re.findall(r"^ *edgemistral (.+)$|`edgemistral ([^`]+)`", text, re.M):
                words = "".join(line).split("#")[0].split()
                command = main.commands[words[0]]
                options = {name for parameter in command.params for name in parameter.opts} | {"--help"}
                assert {word for word in words if word.startswith("--")} <= options, line
                named += 1
    assert named > 15


def test_the_site_has_no_broken_links(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Map a blob and prepare to run it" in (tmp_path / "python" / "index.html").read_text("utf-8")
