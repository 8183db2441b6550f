"""The libraries hold what they may hold, and the wheel runs where nothing else of ours is.

The clean environment is a new venv whose site-packages gets links to the installed distributions
that torch and numpy require, and to nothing else: torch is used where it lies (a copy would be a
gigabyte), while no editable install, no optional package and no file of this checkout can be
imported.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from pathlib import Path

import nibblock
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(nibblock.__file__).resolve().parent
OBJECTS = ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI')}" / "obj"
NATIVE = f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
LIBRARIES = ("libnibblock_kernels.so", "libnibblock_cpu.so", NATIVE)


def run(*command, **options):
    """The finished process; its output is in the message when it failed."""
    options.setdefault("timeout", 600)
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def clean_environment(**more):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "NIBBLOCK"))}
    return {**kept, **more}


# --- the libraries --------------------------------------------------------------------------------


def undefined_symbols(library):
    lines = run("nm", "-D", "--undefined-only", PACKAGE / library).stdout.splitlines()
    return [line.split()[-1] for line in lines if line.strip()]


def test_operators_use_only_the_stable_abi():
    ours = {
        line.split()[-1]
        for line in run("nm", "-D", "--defined-only", PACKAGE / LIBRARIES[0]).stdout.splitlines()
    }
    foreign = [
        name for name in undefined_symbols("libnibblock_cpu.so")
        if "@" not in name  # a version tag: libc, libm, libstdc++
        and name not in ours
        and not name.startswith(("aoti_torch_", "torch_", "_ITM_", "__gmon_start__"))
    ]  # fmt: skip
    assert not foreign


@pytest.mark.parametrize("library", [LIBRARIES[0], NATIVE])
def test_kernels_and_module_are_torch_free(library):
    assert not [name for name in undefined_symbols(library) if "torch" in name or "c10" in name]
    needed = re.findall(r"NEEDED.*\[(.*?)\]", run("readelf", "-d", PACKAGE / library).stdout)
    assert not [name for name in needed if "torch" in name or "gomp" in name or "c10" in name]


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_do_not_name_the_checkout(library):
    assert str(ROOT).encode() not in (PACKAGE / library).read_bytes()


def compiled_flags():
    """Object -> its own flags, as the ninja file has them."""
    if not OBJECTS.exists():
        pytest.skip("no build folder beside this checkout: its objects cannot be examined")
    flags, target = {}, None
    for line in (OBJECTS.parent / "build.ninja").read_text().splitlines():
        found = re.match(r"build (obj/\S+): compile", line)
        if found:
            target = OBJECTS.parent / found.group(1)
        elif line.startswith("  more =") and target:
            flags[target] = line.split("=", 1)[1].split()
    return flags


def test_wide_registers_stay_in_their_files():
    for target, flags in compiled_flags().items():
        if "-mavx512f" in flags:
            continue
        code = run("objdump", "-d", "--no-show-raw-insn", target).stdout
        assert "%zmm" not in code, target
        if "-mavx2" not in flags:
            assert "%ymm" not in code, target


def test_wide_files_define_no_shared_function():
    # A weak (COMDAT) function compiled with wide flags could become the copy that every file uses.
    for target, flags in compiled_flags().items():
        if "-mavx2" in flags:
            weak = [
                line for line in run("nm", "--defined-only", target).stdout.splitlines()
                if re.search(r" [WVu] ", line)
            ]  # fmt: skip
            assert not weak, target


def test_no_flag_ties_the_build_to_this_machine():
    text = (ROOT / "setup.py").read_text() + json.dumps(nibblock.info()["build"])
    assert "-march=native" not in text
    assert "-ffast-math" not in text


def test_one_openmp_runtime_and_nothing_optional_is_loaded():
    code = """
        import sys, nibblock, torch
        layer = nibblock.Int4Linear.from_linear(torch.nn.Linear(256, 512))
        layer(torch.randn(64, 256))
        maps = open("/proc/self/maps").read().split()
        print(sorted({m.rsplit("/", 1)[-1] for m in maps if "libgomp" in m or "libiomp" in m}))
        print([m for m in ("triton", "transformers", "gguf", "matplotlib") if m in sys.modules])
        print(torch.cuda.is_initialized())
    """
    out = run(sys.executable, "-c", textwrap.dedent(code), env=clean_environment()).stdout
    assert len(json.loads(out.split("\n")[0].replace("'", '"'))) == 1
    assert out.split("\n")[1:3] == ["[]", "False"]


# --- the build's own errors -----------------------------------------------------------------------


@pytest.mark.parametrize("settings, text", [
    ({"NIBBLOCK_CUDA": "1", "CUDA_HOME": "/nowhere"}, "nibblock: NIBBLOCK_CUDA=1 needs nvcc"),
    ({"NIBBLOCK_CUDA": "yes"}, "nibblock: NIBBLOCK_CUDA must be auto, 0 or 1, got 'yes'"),
    ({"CXX": "no-such-compiler"}, "nibblock: no C++ compiler 'no-such-compiler'; type: apt-get"),
])  # fmt: skip
def test_build_says_what_is_missing(settings, text, tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path],
        cwd=ROOT, env=clean_environment(**settings), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith(text)
    assert not list(tmp_path.iterdir())


# --- the wheel ------------------------------------------------------------------------------------


def required_by(*names):
    """The distributions that these require here, themselves included; extras left out."""
    seen, queue = {}, list(names)
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in seen:
            continue
        seen[name] = importlib.metadata.distribution(name)
        for text in seen[name].requires or []:
            requirement = Requirement(text)
            if not requirement.marker or requirement.marker.evaluate({"extra": ""}):
                queue.append(requirement.name)
    return seen


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps",
        "--no-index", "-w", folder, ROOT, env=clean_environment(), cwd=folder,
    )  # fmt: skip
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def clean_python(wheel, tmp_path_factory):
    """A Python that has torch, numpy, what these require, and the wheel."""
    venv = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    (site,) = venv.glob("lib/python*/site-packages")
    for distribution in required_by("torch", "numpy").values():
        base = Path(distribution.locate_file(""))
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if (base / top).exists() and not (site / top).exists():
                (site / top).symlink_to(base / top)
    python = venv / "bin" / "python"
    run(
        sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", "--no-index",
        wheel, env=clean_environment(),
    )  # fmt: skip
    return python


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in (*LIBRARIES, "build_info.json", "py.typed", "__main__.py", "bench/__init__.py",
                 "triton_kernels/__init__.py", "ops/int4_linear.py"):  # fmt: skip
        assert f"nibblock/{name}" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"nibblock"}
    assert not [name for name in names if "results" in name or "test_" in name or ".part" in name]
    assert [name for name in names if name.endswith("LICENSE")]
    assert "linux" in wheel.name
    assert wheel.stat().st_size < 20e6


def test_wheel_runs_in_a_clean_environment(clean_python, tmp_path):
    code = """
        import torch, nibblock
        linear = torch.nn.Linear(300, 118)
        x = torch.randn(5, 300)
        layer = nibblock.Int4Linear.from_linear(linear, group_size=32)
        y = torch.nn.functional.linear(x, layer.dequantize(), linear.bias)
        assert (layer(x) - y).abs().max() <= 1e-2 * y.abs().max()
        for module in ("transformers", "gguf", "pytest"):
            try:
                __import__(module)
            except ImportError:
                continue
            raise SystemExit(f"{module} is there: this environment is not clean")
        print(nibblock.__file__)
    """
    out = run(
        clean_python, "-c", textwrap.dedent(code), cwd=tmp_path, env=clean_environment()
    ).stdout
    assert str(clean_python.parent.parent) in out
    facts = run(
        clean_python, "-m", "nibblock", "info", "--json", cwd=tmp_path, env=clean_environment()
    ).stdout
    facts = json.loads(facts)
    assert facts["self_test"]
    assert all(row["ok"] for row in facts["self_test"])
    assert facts["build"]["torch_target"] == "2.11"


def test_command_line_in_a_clean_environment(clean_python, tmp_path):
    where = dict(cwd=tmp_path, env=clean_environment())
    usage = run(clean_python, "-m", "nibblock", "--help", **where).stdout
    commands = re.findall(r"^  (\w+) ", usage, re.M)
    assert {"info", "demo", "bench", "convert"} <= set(commands)
    for command in commands:
        run(clean_python, "-m", "nibblock", command, "--help", **where)


def test_missing_extra_names_the_install_line(clean_python, tmp_path):
    code = "import nibblock, torch; nibblock.save(torch.nn.Linear(2, 2), 'model.safetensors')"
    done = subprocess.run(
        [clean_python, "-c", code], cwd=tmp_path, env=clean_environment(), capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError")
    assert "pip install nibblock[transformers]" in last.replace("'", "")
    assert not list(tmp_path.iterdir())


def test_load_errors_compare_versions(clean_python, tmp_path):
    (source,) = clean_python.parent.parent.glob("lib/python*/site-packages/nibblock")
    copy = tmp_path / "nibblock"
    shutil.copytree(source, copy)
    (copy / "libnibblock_cpu.so").write_bytes(b"not a library")
    for spoil, text in ((None, "cannot be loaded"), (copy / "libnibblock_cpu.so", "is missing")):
        if spoil:
            spoil.unlink()
        done = subprocess.run(
            [clean_python, "-c", "import nibblock"], cwd=tmp_path, env=clean_environment(),
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("ImportError: nibblock: libnibblock_cpu.so")
        assert text in last
        assert "built against torch" in last
        assert "running torch" in last


def test_level_above_the_cpu_is_refused(clean_python, tmp_path):
    done = subprocess.run(
        [clean_python, "-c", "import nibblock"], cwd=tmp_path, capture_output=True, text=True,
        env=clean_environment(NIBBLOCK_ISA="avx9000"), timeout=120,
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert "BackendUnavailable: nibblock: NIBBLOCK_ISA must be one of scalar, avx2" in last
