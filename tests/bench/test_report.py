"""bench/RESULTS.md and bench/results/tables.md: current, and of nothing that `make bench` does not make."""

from __future__ import annotations

import json
import re
from pathlib import Path

from bench import harness, report, run_all, summary


def test_the_reports_are_what_the_results_give():
    for path, text in report.texts().items():
        assert path.read_text(encoding="utf-8") == text, "run: python -m bench.run_all --report"


def test_every_section_is_made_by_make_bench():
    assert {command for _, _, command, _ in report.SECTIONS} <= set(run_all.COMMANDS)
    for command in run_all.COMMANDS:
        line = run_all.command_line(command, Path("folder"), "python-avx2")
        assert "WORK" not in " ".join(line) and "PYTHON" not in line
        assert (report.REPORT.parents[1] / command.split()[1]).is_file()


def test_every_result_names_its_commit_and_no_share_is_over_100_percent():
    for path in harness.RESULTS.rglob("*.json"):
        assert summary.origin(json.loads(path.read_text(encoding="utf-8")))
    for cell in re.findall(r"\| (\d+)% \|", "".join(report.texts().values())):
        assert int(cell) <= 100


def test_results_begin_with_a_summary_of_twenty_lines():
    lines = "\n".join(summary.summary()).splitlines()
    assert 15 <= len(lines) <= 22
    assert report.texts()[report.REPORT].split("\n\n")[2] == "\n".join(lines)


def test_a_result_is_saved_with_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "OF_MACHINE", tmp_path)
    harness.save("what", "python bench/what.py", {"figure": 1})
    saved = json.loads((tmp_path / "what.json").read_text(encoding="utf-8"))
    assert saved["figure"] == 1 and saved["command"] == "python bench/what.py"
    assert saved["commit"] is None or re.fullmatch(r"[0-9a-f]{7,}\+?", saved["commit"])
