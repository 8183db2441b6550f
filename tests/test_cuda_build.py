"""The CUDA library without a GPU: compiled for every architecture, its budgets, symbols, loading.

Objects are kept in build/cuda-<hash of the sources and flags>, so only a change compiles again; the
figures of ptxas are left beside them as resources.json.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from nibblock import _cuda

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SOURCES = sorted(CSRC.glob("*/cuda*.cu"))
GLUE = sorted(CSRC.glob("*/torch_cuda*.cpp"))
# Read by a kernel only through torch's shim: absent from a CPU torch.
ONLY_CUDA_TORCH = "aoti_torch_get_current_cuda_stream"

nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="nvcc is not installed (CUDA toolkit)"
)
gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def setup_module_of():
    spec = importlib.util.spec_from_file_location("nibblock_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SETUP = setup_module_of()


def run(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def key_of(*more: str) -> str:
    """Of everything a .cu can include; the glue and the CPU's kernels are not among it."""
    patterns = (
        *("*/cuda*.cu", "*/cuda*.cuh", "*/cuda*.h", "common/*.h", "int4_linear/int4_linear.h"),
        *("masked_update/masked_update.h", "block_sparse_linear/block_sparse_linear.h"),
    )
    files = {f for pattern in patterns for f in CSRC.glob(pattern)}
    sha = hashlib.sha256("".join(more).encode())
    for f in sorted(files):
        sha.update(f.name.encode() + f.read_bytes())
    return sha.hexdigest()[:16]


@pytest.fixture(scope="module")
def compiled():
    """The folder of one object and one log for each .cu, compiled as setup.py compiles them."""
    version = run("nvcc", "--version").stdout
    folder = ROOT / "build" / f"cuda-{key_of(version, *SETUP.NVCC_FLAGS, str(SETUP.CUDA_CODE))}"
    if not (folder / "done").exists():
        for old in folder.parent.glob("cuda-*"):
            shutil.rmtree(old)
        folder.mkdir(parents=True)

        def build(source):
            name = f"{source.parent.name}-{source.name}"
            target = folder / f"{name}.o"
            flags = [*SETUP.NVCC_FLAGS, *SETUP.cuda_code_of(source)]
            done = run("nvcc", *flags, "-c", source, "-o", target, timeout=900)
            return name, done.stdout + done.stderr

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for name, log in pool.map(build, SOURCES):
                (folder / f"{name}.log").write_text(log)
        (folder / "done").touch()
    return folder


def kernels(folder: Path) -> list[dict]:
    return [k for log in sorted(folder.glob("*.log")) for k in SETUP.ptxas_facts(log.read_text())]


def shape_of(kernel: str) -> tuple[int, ...]:
    """Token tiles, bits, affine, adapter of a decode kernel, from its mangled name."""
    found = re.search(r"DecodeShapeILi(\d+)ELi(\d+)ELb([01])ELb([01])E", kernel)
    return tuple(map(int, found.groups()))


@nvcc
@pytest.mark.slow
def test_registers_and_spills(compiled):
    """Every instantiation for 8.0 and 9.0: no spills, no stack, blocks enough on a multiprocessor.

    A multiprocessor has 65536 registers. Up to 16 rows of x the kernel lives on bytes in flight:
    at least 4 blocks of 128 threads must fit. Beyond, one block of 256 threads.
    """
    every = kernels(compiled)
    (compiled / "resources.json").write_text(json.dumps(every, indent=1))
    facts = [k for k in every if "DecodeShape" in k["kernel"]]
    for kernel in facts:
        kernel["shape"] = shape_of(kernel["kernel"])
    assert {k["arch"] for k in facts} == {"sm_80", "sm_90a"}
    # Two architectures, two types, affine or not: 4 tiles at 4 and 8 bits, 3 with an adapter.
    assert len(facts) == 2 * 2 * 2 * (4 + 4 + 3)
    for kernel in facts:
        assert kernel["spills"] == 0, kernel
        assert kernel["stack"] == 0, kernel
        limit = 65536 // (4 * 128) if kernel["shape"][0] <= 2 else 65536 // 256
        assert kernel["registers"] <= limit, kernel


# Every kernel of an op whose instantiations have one budget: how many there are for one
# architecture, and the most registers that leave `threads` on a multiprocessor.
LISTED = {
    "masked_block_step": dict(count=2 * 3, registers=65536 // 1024),
    "block_weight_grad": dict(count=2 * 3, registers=None),
}


@nvcc
@pytest.mark.slow
@pytest.mark.parametrize("name", LISTED)
def test_budgets_of_masked_steps_and_weight_gradients(compiled, name):
    """No spills, no stack. Masked steps: 1024 threads on a multiprocessor. Weight gradients: two
    blocks of 256 threads, or three of 128."""
    facts = [k for k in kernels(compiled) if name in k["kernel"]]
    (compiled / f"resources-{name}.json").write_text(json.dumps(facts, indent=1))
    assert len(facts) == 2 * LISTED[name]["count"]
    assert {k["arch"] for k in facts} == {"sm_80", "sm_90a"}
    for kernel in facts:
        assert kernel["spills"] == 0, kernel
        assert kernel["stack"] == 0, kernel
        limit = LISTED[name]["registers"]
        if limit is None:
            limit = 65536 // (3 * 128) if "GradShapeILi32E" in kernel["kernel"] else 65536 // 512
        assert kernel["registers"] <= limit, kernel


@nvcc
@pytest.mark.slow
def test_tile_kernels_and_their_budgets(compiled):
    """For 9.0a alone: no spills, no stack, 384 threads in 65536 registers, and products that run
    asynchronously (ptxas says where it makes them wait for each other)."""
    facts = [k for k in kernels(compiled) if "int4_tile" in k["kernel"]]
    # Two types, 4 and 8 bits: two tiles, affine or not, and the sums of x.
    assert len(facts) == 2 * 2 * (2 * 2 + 1)
    for kernel in facts:
        assert kernel["arch"] == "sm_90a", kernel
        assert kernel["spills"] == 0, kernel
        assert kernel["stack"] == 0, kernel
        limit = 65536 // 384 // 8 * 8 if "TileShape" in kernel["kernel"] else 64
        assert kernel["registers"] <= limit, kernel
    logs = sorted(compiled.glob("int4_linear-cuda_tile_sm90a_*.log"))
    assert len(logs) == 4
    for log in logs:
        assert "serialized" not in log.read_text(), log.name


def cuobjdump() -> str | None:
    spec = importlib.util.find_spec("triton")
    inside = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else None
    return str(inside) if inside and inside.exists() else shutil.which("cuobjdump")


@nvcc
@pytest.mark.slow
@pytest.mark.skipif(cuobjdump() is None, reason="neither triton nor CUDA's cuobjdump is installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_machine_code_is_what_the_source_asks_for(compiled, arch):
    """Tensor core products, asynchronous 16-byte copies, no local memory, 16-byte shared loads."""
    target = compiled / "int4_linear-cuda_decode_bf16_4.cu.o"
    text = run(cuobjdump(), "-sass", "-arch", arch, target).stdout
    functions = re.split(r"\n\s*Function : ", text)[1:]
    assert len(functions) == 14
    for code in functions:
        tiles, _, affine, adapter = shape_of(code)
        # Four steps of 2 x 2 products for each 8 tokens, half as many again for the offsets.
        fewest = 4 * tiles * (4 + 2 * affine)
        products = len(re.findall(r"\bHMMA\.16816\.F32\.BF16", code))
        assert products > fewest if adapter else products == fewest
        assert len(re.findall(r"\bLDGSTS\.E\.BYPASS\.128", code)) >= 4
        assert len(re.findall(r"\bLDS\.128", code)) >= 4
        assert not re.findall(r"\b(LDL|STL|ATOMS|RED)\b", code)
        # The one atomic counts arrivals; sums have none.
        assert len(re.findall(r"\bATOMG?\.", code)) <= 1


def functions_of(target: Path, arch: str) -> list[str]:
    text = run(cuobjdump(), "-sass", "-arch", arch, target).stdout
    return re.split(r"\n\s*Function : ", text)[1:]


@nvcc
@pytest.mark.slow
@pytest.mark.skipif(cuobjdump() is None, reason="neither triton nor CUDA's cuobjdump is installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_machine_code_of_masked_steps_and_weight_gradients(compiled, arch):
    """16-byte accesses and no contraction in the steps; in the products transposed matrix loads,
    asynchronous 16-byte copies, and of atomics the one that counts arrivals."""
    steps = functions_of(compiled / "masked_update-cuda.cu.o", arch)
    assert len(steps) == 6
    for code in steps:
        states = 4 if "AdamWStep" in code else 2 if "SgdStepILb1E" in code else 0
        entries = 2 if "Float32" in code else 1  # 16-byte accesses of 8 entries
        assert len(re.findall(r"\bLDG\.E\.128", code)) >= 2 * entries + states
        assert len(re.findall(r"\bSTG\.E\.128", code)) >= entries + states
        assert not re.findall(r"\b(LDL|STL|ATOM\w*|RED)\b", code)
    grads = functions_of(compiled / "block_sparse_linear-cuda.cu.o", arch)
    assert len(grads) == 6
    for code in grads:
        block = int(re.search(r"GradShapeILi(\d+)E", code).group(1))
        products = 32 if block == 128 else 16  # of one stage: two deep, 4 x 4 or 2 x 4
        assert len(re.findall(r"\bHMMA\.16816\.F32", code)) == products
        assert len(re.findall(r"\bLDSM\.16\.MT88\.4", code)) == (12 if block == 128 else 8)
        assert len(re.findall(r"\bLDGSTS\.E\.BYPASS\.128", code)) >= 4
        assert not re.findall(r"\b(LDL|STL|ATOMS|RED)\b", code)
        assert len(re.findall(r"\bATOMG?\.", code)) <= 1


@nvcc
@pytest.mark.slow
@pytest.mark.skipif(cuobjdump() is None, reason="neither triton nor CUDA's cuobjdump is installed")
def test_machine_code_of_the_tile_kernels(compiled):
    """Warpgroup products with fragments in registers, bulk and tensor copies, barriers, registers
    handed over; sums without atomics."""
    target = compiled / "int4_linear-cuda_tile_sm90a_bf16_4.cu.o"
    text = run(cuobjdump(), "-sass", "-arch", "sm_90a", target).stdout
    functions = [f for f in re.split(r"\n\s*Function : ", text)[1:] if "TileShape" in f]
    assert len(functions) == 4
    for code in functions:
        tokens = re.search(r"TileShapeILi(\d+)E", code).group(1)
        # Eight for each of the three ways through a stage: groups of 32, 64, 128 and more.
        assert len(re.findall(rf"\bHGMMA\.64x{tokens}x16\.F32\.BF16 R\d+, R\d+, ", code)) == 24
        assert re.findall(r"\bUTMALDG\.2D\b", code)
        assert re.findall(r"\bUBLKCP\b", code)
        assert len(re.findall(r"\bUSETMAXREG", code)) == 2
        assert re.findall(r"\bSYNCS\.PHASECHK", code)
        assert not re.findall(r"\b(LDL|STL|RED)\b", code)
        assert len(re.findall(r"\bATOMG?\.", code)) <= 1


@pytest.fixture(scope="module")
def library(compiled, tmp_path_factory):
    """libnibblock_cuda.so as setup.py links it against a CPU torch, and a stub of the one symbol
    that only a CUDA torch has."""
    folder = tmp_path_factory.mktemp("cuda_library")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NIBBLOCK_CUDA", "1")
        patch.delenv("CUDA_HOME", raising=False)
        cuda, _ = SETUP.find_cuda(None)
    torch_dir = Path(torch.__file__).parent
    lib = SETUP.libraries(torch_dir, sysconfig.get_path("include"), cuda, None)[-1]
    assert lib["name"] == "libnibblock_cuda.so"
    assert sorted(lib["sources"]) == sorted([*SOURCES, *GLUE])
    objects = list(compiled.glob("*.o"))
    for source in GLUE:
        target = folder / f"{source.parent.name}-{source.name}.o"
        flags = [f.strip("'") for f in (*SETUP.COMMON_FLAGS, *lib["flags"]) if f != "-O3"]
        run("g++", *flags, "-c", source, "-o", target, timeout=600)
        objects.append(target)
    out = folder / lib["name"]
    link = [f for f in (*SETUP.LINK_FLAGS, *lib["link"]) if "ORIGIN" not in f]
    run("g++", "-o", out, *objects, *(f.strip("'") for f in link))
    stub = folder / "libstub.so"
    (folder / "stub.c").write_text(f"int {ONLY_CUDA_TORCH}(int d, void** s) {{ return 1; }}\n")
    run("g++", "-x", "c", "-shared", "-fPIC", folder / "stub.c", "-o", stub)
    return out, stub


@nvcc
@gxx
@pytest.mark.slow
def test_symbols(library):
    """Undefined: torch's stable ABI and the C library. Defined for others: our own names alone."""
    out, _ = library
    undefined = [
        line.split()[-1] for line in run("nm", "-D", "--undefined-only", out).stdout.splitlines()
    ]
    foreign = [
        name for name in undefined
        if "@" not in name and not name.startswith(("aoti_torch_", "torch_", "_ITM_", "__gmon_s"))
    ]  # fmt: skip
    assert not foreign
    there = run("nm", "-D", "--defined-only", Path(torch.__file__).parent / "lib/libtorch_cpu.so")
    known = {line.split()[-1] for line in there.stdout.splitlines()}
    missing = [n for n in undefined if n.startswith(("aoti_torch_", "torch_")) and n not in known]
    assert set(missing) <= {ONLY_CUDA_TORCH}
    defined = [
        line.split()[-1] for line in run("nm", "-D", "--defined-only", out).stdout.splitlines()
    ]
    assert defined
    # torch's headers leave weak typeinfo of theirs behind; CUDA's static runtime nothing.
    assert not [name for name in defined if name.startswith(("cuda", "cu"))]
    for ours in ("int4_linear_cuda_plan", "masked_block_cuda_run", "weight_grad_cuda_run"):
        assert [name for name in defined if ours in name], ours
    assert out.stat().st_size < 10e6


@nvcc
@gxx
@pytest.mark.slow
def test_loads_and_refuses_without_a_gpu(library):
    """In a process of its own: the op registers beside the CPU's, rows are read, and a call on a
    machine without a device comes back as an error of CUDA's, not as a crash."""
    out, stub = library
    code = f"""
        import ctypes, torch, nibblock
        ctypes.CDLL({str(stub)!r}, mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library({str(out)!r})
        print(torch.ops.nibblock._int4_linear_cuda.default._schema)
        lib = ctypes.CDLL({str(out)!r})
        lib.nibblock_cuda_int4_row.restype = ctypes.c_bool
        name, serves, proven = ctypes.c_char_p(), ctypes.c_char_p(), ctypes.c_int(5)
        i = 0
        while lib.nibblock_cuda_int4_row(i, *map(ctypes.byref, (name, serves, proven))):
            print(name.value.decode(), "|", serves.value.decode(), "|", proven.value)
            i += 1
        try:
            x, packed = torch.zeros(1, 8), torch.zeros(8)
            torch.ops.nibblock._int4_linear_cuda(x, packed, None, 0, None, None, 32, "")
        except (NotImplementedError, RuntimeError) as error:  # which one is asserted below
            print(type(error).__name__)
    """
    done = run(sys.executable, "-c", textwrap.dedent(code), timeout=300)
    lines = done.stdout.strip().splitlines()
    assert lines[0].startswith("nibblock::_int4_linear_cuda(Tensor x, Tensor packed, Tensor? bias")
    assert [line.split(" | ")[0].rsplit(".", 1)[1] for line in lines[1:-1]] == [
        "m8", "m16", "m32", "m64", "m64", "m128",
    ]  # fmt: skip
    assert all(line.endswith("| 0") for line in lines[1:-1]), "a row is proven by a result file"
    assert lines[-1] == "NotImplementedError"


@nvcc
@gxx
@pytest.mark.slow
def test_masked_steps_and_weight_gradients_load_and_refuse(library):
    """Their ops register, their rows are unproven, and tensors of the CPU find no kernel."""
    out, stub = library
    code = f"""
        import ctypes, torch, nibblock
        ctypes.CDLL({str(stub)!r}, mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library({str(out)!r})
        ops, lib = torch.ops.nibblock, ctypes.CDLL({str(out)!r})
        name, serves, proven = ctypes.c_char_p(), ctypes.c_char_p(), ctypes.c_int(5)
        for which in ("masked", "weight_grad"):
            ask = getattr(lib, f"nibblock_cuda_{{which}}_row")
            ask.restype, i = ctypes.c_bool, 0
            while ask(i, *map(ctypes.byref, (name, serves, proven))):
                print(name.value.decode(), proven.value)
                i += 1
        g = torch.zeros(4, 32)
        layout = nibblock.ops.block_layout(torch.tensor([[0, 0]]), 32, 32, 32)
        one = torch.zeros(1, 32, 32)
        step = ([one], [one], [one], [one], [layout[:1]], [], [layout[:2]], 32)
        numbers = (1e-3, 0.9, 0.999, 1e-8, 0.0, False, None, None, "")
        for call in (
            lambda: ops._block_weight_grad_cuda(g, g, layout, 32, torch.float32, ""),
            lambda: ops._masked_adamw_block_cuda_(*step, *numbers),
        ):
            try:
                call()
            except (NotImplementedError, RuntimeError) as error:  # which one is asserted below
                print(type(error).__name__)
    """
    done = run(sys.executable, "-c", textwrap.dedent(code), timeout=300)
    assert done.stdout.split("\n")[:-1] == [
        "masked_adamw_block.cuda.sm80.list 0",
        "masked_sgd_block.cuda.sm80.list 0",
        *(f"block_weight_grad.cuda.sm80.b{block} 0" for block in (32, 64, 128)),
        *("NotImplementedError",) * 2,
    ]


# --- what the build and the package say -----------------------------------------------------------


def test_choice_of_cuda(monkeypatch, tmp_path):
    monkeypatch.setenv("NIBBLOCK_CUDA", "0")
    assert SETUP.find_cuda("13.0") == (None, "NIBBLOCK_CUDA=0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("NIBBLOCK_CUDA", "auto")
    cuda, why = SETUP.find_cuda("13.0")
    assert cuda is None
    assert "no nvcc" in why
    monkeypatch.setenv("NIBBLOCK_CUDA", "1")
    with pytest.raises(SystemExit, match="NIBBLOCK_CUDA=1 needs nvcc"):
        SETUP.find_cuda("13.0")
    # A toolkit that is too old is an error even under auto: it was found and would be used.
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "nvcc"
    fake.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("NIBBLOCK_CUDA", "auto")
    cuda, why = SETUP.find_cuda(None)
    assert cuda is None
    assert "CPU build" in why
    with pytest.raises(SystemExit, match=r"nvcc must be 12\.4 or newer, got .*11\.8"):
        SETUP.find_cuda("13.0")


def test_ptxas_facts_are_read():
    text = """
ptxas info    : Compiling entry function '_Z1a' for 'sm_80'
ptxas info    : Function properties for _Z1a
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 8 bytes cumulative stack size
ptxas info    : Compile time = 1.0 ms
ptxas info    : Compiling entry function '_Z1b' for 'sm_90a'
ptxas info    : Function properties for _Z1b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 56 registers, used 1 barriers
"""
    assert SETUP.ptxas_facts(text) == [
        dict(arch="sm_80", kernel="_Z1a", registers=80, stack=8, spills=16),
        dict(arch="sm_90a", kernel="_Z1b", registers=56, stack=0, spills=0),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_forced_call_is_refused_with_the_reason():
    reason = _cuda.refusal()
    assert reason
    assert _cuda.rows() == []
    with pytest.raises(_cuda.BackendUnavailable, match="int4_linear: no CUDA C\\+\\+ kernel can"):
        _cuda.int4_linear(torch.zeros(1, 64), torch.zeros(8), None, 16, 32, 4, False, torch.float16)
    with pytest.raises(_cuda.BackendUnavailable, match="block_weight_grad: no CUDA C\\+\\+ kernel"):
        _cuda.block_weight_grad(torch.zeros(1, 32), torch.zeros(1, 32), torch.zeros(4), block=32)
    step = dict(block=32, lr=1e-3)
    with pytest.raises(
        _cuda.BackendUnavailable, match="masked_adamw_block_: no CUDA C\\+\\+ kernel"
    ):
        _cuda.masked_adamw_block_([], [], [], [], [], [], [], **step)
    with pytest.raises(_cuda.BackendUnavailable, match="masked_sgd_block_: no CUDA C\\+\\+ kernel"):
        _cuda.masked_sgd_block_([], [], [], [], [], [], **step)
