"""Every Python block of README.md runs, in order, in one fresh process and an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def python_blocks(text):
    """[(first line, source)] of the ```python blocks."""
    return [
        (text.count("\n", 0, found.start(1)) + 1, found.group(1))
        for found in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    ]


def test_readme_blocks_run(tmp_path):
    blocks = python_blocks((ROOT / "README.md").read_text())
    assert blocks
    # Padded with empty lines, so that a traceback names the README's own line.
    script = tmp_path / "blocks.py"
    lines = []
    for first, source in blocks:
        lines += [""] * (first - 1 - len(lines)) + source.rstrip("\n").split("\n")
    script.write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True, timeout=900,
        env={k: v for k, v in os.environ.items() if not k.startswith("NIBBLOCK")},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#\s]+)\)", (ROOT / "README.md").read_text()):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_figures_are_those_of_the_results():
    """No figure without its file: python -m nibblock bench readme writes them."""
    from nibblock.bench import readme

    for path, text in readme.documents().items():
        assert path.read_text() == text, path.name
