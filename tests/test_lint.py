"""House rules that ruff and clang-format do not know: lengths, leftovers, what may be included."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("csrc", "python", "tests", "bench", "triton_kernels")
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")
FILES = [
    ROOT / "setup.py",
    *(f for name in FOLDERS for f in sorted((ROOT / name).rglob("*")) if f.suffix in SUFFIXES),
]
WIDE = re.compile(r"_(avx2|avx512|amx)")
# The only system headers of a file compiled with wide flags: none of them defines a function that a
# baseline file could end up calling.
PLAIN = {"immintrin.h", "stdint.h", "stddef.h", "string.h", "stdlib.h", "math.h", "time.h"}


def text_of(path):
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_short_and_finished(path):
    lines = text_of(path).split("\n")
    assert len(lines) <= (801 if path.suffix == ".cu" else 501)
    for number, line in enumerate(lines, 1):
        where = f"{path.relative_to(ROOT)}:{number}"
        # A schema is one line, whatever its length: it is searched for and compared as a whole.
        assert len(line) <= 100 or path.name == "schema.cpp", where
        assert "\t" not in line, where
        if path != Path(__file__).resolve():
            assert not re.search(r"\b(TODO|FIXME|XXX)\b", line), where
            assert not re.search(r"[\"' (=](/root/|/home/|/work/)", line), where


def test_wide_files_include_no_library_code():
    for path in FILES:
        if path.suffix == ".cpp" and WIDE.search(path.name) and "tests" not in path.parts:
            headers = set(re.findall(r"#include <(.*?)>", text_of(path)))
            assert headers <= PLAIN, path


def test_kernels_are_torch_free_and_glue_is_on_the_stable_abi():
    for path in FILES:
        if path.suffix not in (".cpp", ".h", ".cu", ".cuh") or "tests" in path.parts:
            continue
        headers = re.findall(r"#include [<\"]((?:torch|ATen|c10)/.*?)[>\"]", text_of(path))
        glue = path.name.startswith("torch_") or path.name == "schema.cpp" or "glue" in path.parts
        assert glue or not headers, path
        for header in headers:
            assert header.startswith(("torch/csrc/stable/", "torch/headeronly/",
                                      "torch/csrc/inductor/aoti_torch/c/")), path  # fmt: skip
