"""Build of nibblock: sources -> a ninja file of our own -> libraries inside the package.

    libnibblock_kernels.so   csrc/common, csrc/<op>/cpu*.cpp       torch-free kernels
    libnibblock_cpu.so       csrc/schema.cpp, csrc/glue, csrc/<op>/torch_cpu*.cpp
                             operators for torch, on its stable ABI (any torch >= 2.11 loads it)
    _native.<abi>.so         csrc/native                           pybind11, NumPy in and out
    libnibblock_cuda.so      csrc/<op>/cuda*.cu, torch_cuda*.cpp   only with CUDA, see below

Each file's instruction set follows from its name (ISA_FLAGS); everything else is x86-64-v2, so the
library loads and runs on any such machine and enters wide code only after asking the CPU.

Environment: CXX (g++), MAX_JOBS, CUDA_HOME (else nvcc on the PATH), NIBBLOCK_CUDA:
    auto    CUDA where both nvcc and a torch built for CUDA are there
    0       never
    1       CUDA, without a GPU and against a CPU torch too; no nvcc is an error
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
TORCH_MIN = (2, 11)
TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11: major byte, minor byte

PACKAGE_DIR = {
    "nibblock": "python/nibblock",
    "nibblock.triton_kernels": "triton_kernels",
    "nibblock.bench": "bench",
}

# Kernels never throw, and a clean-up table would bring a weak symbol with it.
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-fno-exceptions"]
# g++ 12 warns of its own _mm512_undefined_*() inside avx512fintrin.h.
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *QUIET]
AMX = ["-mamx-tile", "-mamx-int8", "-mamx-bf16"]
# First match wins: NAME_avx512_vnni.cpp, NAME_avx512_vnni_int8.cpp -> avx512_vnni.
ISA_FLAGS = {
    "avx512_vnni": [*AVX512, "-mavx512vnni"],
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "avx512": AVX512,
    "avx2": AVX2,
    "amx": [*AVX512, "-mavx512vnni", "-mavx512bf16", *AMX],
}
# A folder of SIMDe's headers: every kernel file runs on a CPU with AVX2 alone (`make emulate`).
EMULATE = os.environ.get("NIBBLOCK_EMULATE_AVX512")
# Bindings do no arithmetic, and pybind11 takes twice as long to compile at -O3.
BINDINGS = {
    f"native/{name}.cpp"
    for name in (
        "block_scores", "block_select", "block_sparse", "linear", "masked_update", "module",
        "native", "quantize",
    )
}  # fmt: skip
# Contraction off everywhere: whether a * b + c rounds once is decided in the source, not by -O3.
COMMON_FLAGS = [
    "-std=c++17", "-O3", "-march=x86-64-v2", "-ffp-contract=off", "-DNDEBUG", "-fPIC", "-pthread",
    "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra", "-Wno-psabi",
]  # fmt: skip
# Machine code for compute capability 8.0 (runs on 8.x) and 9.0, and portable code that a driver
# compiles for everything newer; 9.0a alone where the file name says sm90a. Contraction off and the
# log kept, as above.
CUDA_CODE = [("80", "sm_80"), ("90a", "sm_90a"), ("80", "compute_80")]
NVCC_FLAGS = [
    "-std=c++17", "-O3", "-fmad=false", "-DNDEBUG", "-Xptxas", "-v", "-Xcompiler",
    "-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-Wall",
]  # fmt: skip
NVCC_MIN = (12, 4)
LINK_FLAGS = ["-shared", "-pthread", "-Wl,-rpath,'$$ORIGIN'", "-Wl,-z,defs", "-Wl,--as-needed"]


def stop(message: str) -> None:
    raise SystemExit(f"nibblock: {message}")


def isa_of(source: Path) -> str | None:
    for isa in ISA_FLAGS:
        if re.search(rf"_{isa}(_|\.)", source.name):
            return isa
    return None


def isa_flags(source: Path) -> list[str]:
    isa = isa_of(source)
    if EMULATE and isa not in (None, "avx2") and source.parent.name != "native":
        # (SIMDe last: /usr/include must not come before the compiler's own headers.)
        folders = [f"-isystem{ROOT / 'tests/cpp/avx512'}", f"-idirafter{EMULATE}"]
        return [*AVX2, *map(quoted, folders), "-w", "-DNIBBLOCK_EMULATE_AMX"]
    return ISA_FLAGS[isa] if isa else []


def cuda_code_of(source: Path) -> list[str]:
    only = CUDA_CODE[1:2] if "sm90a" in source.name else CUDA_CODE
    return [f"-gencode=arch=compute_{virtual},code={real}" for virtual, real in only]


def find_cuda(torch_cuda: str | None) -> tuple[dict | None, str]:
    """Where nvcc and its runtime are, or None and why CUDA is left out."""
    choice = os.environ.get("NIBBLOCK_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        stop(f"NIBBLOCK_CUDA must be auto, 0 or 1, got {choice!r}")
    if choice == "0":
        return None, "NIBBLOCK_CUDA=0"
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if not nvcc:
        where = f"in CUDA_HOME={home}" if home else "on the PATH"
        if choice == "1":
            stop(f"NIBBLOCK_CUDA=1 needs nvcc, and there is none {where}; install the CUDA toolkit "
                 "or use NIBBLOCK_CUDA=0")  # fmt: skip
        return None, f"NIBBLOCK_CUDA=auto and no nvcc {where}"
    if choice == "auto" and not torch_cuda:
        return None, "NIBBLOCK_CUDA=auto and torch is a CPU build; NIBBLOCK_CUDA=1 builds it anyway"
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    if not found or tuple(map(int, found.groups())) < NVCC_MIN:
        need, got = ".".join(map(str, NVCC_MIN)), text.splitlines()[-1]
        stop(f"nvcc must be {need} or newer, got {got!r}; use NIBBLOCK_CUDA=0")
    # nvcc may be a script that calls the real one: it says itself where its toolkit lies.
    with tempfile.NamedTemporaryFile(suffix=".cu") as empty:
        done = subprocess.run([nvcc, "--dryrun", empty.name], capture_output=True, text=True)
    root = re.search(r"TOP=(\S+)", done.stderr)
    root = Path(root.group(1) if root else nvcc).resolve()
    folders = [root / "lib64", root / "targets/x86_64-linux/lib", root / "lib"]
    runtime = next((f for f in folders if (f / "libcudart_static.a").exists()), None)
    if runtime is None:
        stop(f"no libcudart_static.a in nvcc's toolkit {root}; install its runtime library")
    return dict(nvcc=nvcc, version=".".join(found.groups()), runtime=runtime), ""


def find_compiler() -> tuple[str, str]:
    """The C++ compiler and its version line; stops when it cannot build every kernel."""
    if platform.machine() not in ("x86_64", "AMD64"):
        stop(f"machine must be x86-64, got {platform.machine()}")
    cxx = os.environ.get("CXX") or "g++"
    if not shutil.which(cxx.split()[0]):
        stop(f"no C++ compiler {cxx!r}; type: apt-get install g++ (12 or newer), or set CXX")
    version = subprocess.run(
        [*cxx.split(), "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    with tempfile.TemporaryDirectory() as tmp:
        probe = Path(tmp) / "probe.cpp"
        probe.write_text("#include <immintrin.h>\nvoid f() { _tile_dpbf16ps(0, 1, 2); }\n")
        flags = ["-std=c++17", "-march=x86-64-v2", *ISA_FLAGS["amx"]]
        command = [*cxx.split(), *flags, "-c", str(probe), "-o", f"{probe}.o"]
        if subprocess.run(command, capture_output=True).returncode:
            stop(f"compiler must know AMX (g++ 12 or newer), got {version}; type: apt-get install "
                 "g++-12, then set CXX=g++-12")  # fmt: skip
    return cxx, version


def find_ninja() -> str:
    if importlib.util.find_spec("ninja"):
        import ninja

        path = Path(ninja.BIN_DIR) / "ninja"
        if path.exists():
            return str(path)
    found = shutil.which("ninja")
    if not found:
        stop("no ninja; type: pip install ninja")
    return found


def find_torch() -> tuple[Path, str, str | None]:
    """torch's folder, version and CUDA version, read from its version file: importing it would take
    seconds."""
    spec = importlib.util.find_spec("torch")
    if not spec or not spec.origin:
        stop("no torch in this Python; type: pip install 'torch>=2.11', then "
             "pip install --no-build-isolation .")  # fmt: skip
    folder = Path(spec.origin).parent
    facts = runpy.run_path(str(folder / "version.py"))
    version = str(facts["__version__"])
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < TORCH_MIN:
        stop(f"torch must be 2.11 or newer, got {version}; type: pip install 'torch>=2.11'")
    return folder, version, facts.get("cuda")


def find_pybind11() -> tuple[str, str]:
    if not importlib.util.find_spec("pybind11"):
        stop("no pybind11; type: pip install pybind11")
    import pybind11

    return pybind11.get_include(), pybind11.__version__


def git_id() -> str | None:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None


def libraries(
    torch_dir: Path, pybind_include: str, cuda: dict | None, torch_cuda: str | None
) -> list[dict]:
    """Name, sources, include flags and link flags of each library, in link order."""
    shared = ("common", "glue", "native")
    ops = [d for d in sorted(CSRC.iterdir()) if d.is_dir() and d.name not in shared]
    kernels = sorted((CSRC / "common").glob("*.cpp"))
    kernels += [f for d in ops for f in sorted(d.glob("cpu*.cpp"))]
    glue = [CSRC / "schema.cpp", *sorted((CSRC / "glue").glob("*.cpp"))]
    glue += [f for d in ops for f in sorted(d.glob("torch_cpu*.cpp"))]
    torch_flags = [quoted(f"-isystem{torch_dir}/include"), f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    includes = [sysconfig.get_path("include"), pybind_include]
    native_flags = [quoted(f"-isystem{folder}") for folder in includes]
    ours = ["-L.", "-lnibblock_kernels"]
    # libstdc++ first: torch's libraries export parts of it, and ours must not depend on that.
    torch_libs = ["-lstdc++", quoted(f"-L{torch_dir}/lib"), "-ltorch", "-ltorch_cpu", "-lc10"]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    # A Python module leaves CPython's symbols to the interpreter: -z defs would refuse them.
    libs = [
        dict(name="libnibblock_kernels.so", sources=kernels, flags=[], link=[]),
        dict(name="libnibblock_cpu.so", sources=glue, flags=torch_flags, link=[*ours, *torch_libs]),
        dict(name=f"_native{suffix}", sources=sorted((CSRC / "native").glob("*.cpp")),
             flags=native_flags, link=[*ours, "-Wl,-z,undefs"]),
    ]  # fmt: skip
    if cuda:
        # One function, torch's current stream, lives in a CUDA torch alone. Against a CPU torch it
        # stays open, and libtorch.so is named so that it is found where the library runs.
        stream = ["-ltorch_cuda"] if torch_cuda else ["-Wl,-z,undefs,--no-as-needed", "-ltorch"]
        runtime = [quoted(f"-L{cuda['runtime']}"), "-lcudart_static", "-ldl", "-lrt"]
        sources = [f for d in ops for f in sorted(d.glob("cuda*.cu"))]
        sources += [f for d in ops for f in sorted(d.glob("torch_cuda*.cpp"))]
        libs.append(
            dict(name="libnibblock_cuda.so", sources=sources, flags=[*torch_flags, "-DUSE_CUDA"],
                 link=[*torch_libs, *stream, *runtime, "-Wl,--exclude-libs,ALL"])
        )  # fmt: skip
    return libs


def quoted(path: Path | str) -> str:
    """For a command in the ninja file; paths of `build` lines escape spaces and colons instead."""
    return shlex.quote(str(path)).replace("$", "$$")


def escaped(path: Path | str) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def write_ninja(path: Path, cxx: str, libs: list[dict], cuda: dict | None) -> None:
    common = [*COMMON_FLAGS, quoted(f"-ffile-prefix-map={ROOT}/=")]
    common += ["-DNIBBLOCK_EMULATE_AVX512"] if EMULATE else []
    lines = [
        f"cxx = {cxx}",
        f"nvcc = {quoted(cuda['nvcc']) if cuda else 'false'} -ccbin {cxx.split()[0]}",
        f"nvccflags = {' '.join(NVCC_FLAGS)}",
        # Messages that name a source file say csrc/..., not where this checkout lies.
        f"flags = {' '.join(common)}",
        f"ldflags = {' '.join(LINK_FLAGS)}",
        "rule compile",
        "  command = $cxx $flags $more -MMD -MF $out.d -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "  description = compile $out",
        # What ptxas says of registers and spills is kept beside the object, and shown on failure.
        "rule nvcc",
        "  command = $nvcc $nvccflags $code -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || "
        "{ cat $out.log; exit 1; }",
        "  deps = gcc",
        "  depfile = $out.d",
        "  description = nvcc $out",
        "rule link",
        "  command = $cxx $ldflags -o $out $in $libs",
        "  description = link $out",
    ]
    for lib in libs:
        objects = []
        for source in lib["sources"]:
            target = "obj/" + str(source.relative_to(CSRC)) + ".o"
            if source.suffix == ".cu":
                lines += [f"build {target}: nvcc {escaped(source)}"]
                lines += [f"  code = {' '.join(cuda_code_of(source))}"]
                objects.append(target)
                continue
            binding = str(source.relative_to(CSRC)) in BINDINGS
            more = [*lib["flags"], *isa_flags(source), *(["-O1"] if binding else [])]
            lines += [f"build {target}: compile {escaped(source)}", f"  more = {' '.join(more)}"]
            objects.append(target)
        alone = lib["name"] in ("libnibblock_kernels.so", "libnibblock_cuda.so")
        kernels = "" if alone else " | libnibblock_kernels.so"
        lines += [f"build {lib['name']}: link {' '.join(objects)}{kernels}"]
        lines += [f"  libs = -Wl,-soname,{lib['name']} {' '.join(lib['link'])}"]
    text = "\n".join(lines) + "\n"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def ptxas_facts(log: str) -> list[dict]:
    """Registers, stack, spills of every kernel that `ptxas -v` reports: [{arch, kernel, ...}]."""
    found = re.findall(
        r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        log,
        re.S,
    )
    return [
        dict(arch=arch, kernel=name, registers=int(registers), stack=int(stack),
             spills=int(stores) + int(loads))
        for name, arch, stack, stores, loads, registers in found
    ]  # fmt: skip


def cuda_facts(work: Path, cuda: dict, lib: dict) -> dict:
    """What build_info.json says of the CUDA library."""
    logs = [work / "obj" / f"{f.relative_to(CSRC)}.o.log" for f in lib["sources"]]
    kernels = [k for log in logs if log.exists() for k in ptxas_facts(log.read_text())]
    times = {}  # of each object's last compilation, from ninja's own log
    for line in (work / ".ninja_log").read_text().splitlines()[1:]:
        begin, end, _, name, _ = line.split("\t")
        if name.endswith(".cu.o"):
            times[name] = (int(end) - int(begin)) / 1000
    return dict(nvcc=cuda["version"], code=[real for _, real in CUDA_CODE], kernels=kernels,
                bytes=(work / lib["name"]).stat().st_size,
                compile_seconds=round(sum(times.values()), 1))  # fmt: skip


def build_native(destination: Path) -> None:
    start = time.monotonic()
    cxx, cxx_version = find_compiler()
    ninja = find_ninja()
    torch_dir, torch_version, torch_cuda = find_torch()
    cuda, without = find_cuda(torch_cuda)
    pybind_include, pybind_version = find_pybind11()
    libs = libraries(torch_dir, pybind_include, cuda, torch_cuda)
    work = ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI')}"
    work.mkdir(parents=True, exist_ok=True)
    destination.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds of one checkout take turns
        write_ninja(work / "build.ninja", cxx, libs, cuda)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        if subprocess.run([ninja, "-C", str(work), "-j", jobs]).returncode:
            stop("the build failed; the compiler's first error above says where")
        info = {
            "torch_built_against": torch_version,
            "torch_target": "2.11",
            "python_built_against": platform.python_version(),
            "pybind11": pybind_version,
            "compiler": cxx_version,
            "flags": COMMON_FLAGS,
            "isa_files": {
                str(f.relative_to(CSRC)): ISA_FLAGS[isa_of(f)]
                for lib in libs for f in lib["sources"] if isa_of(f)
            },
            "libraries": [lib["name"] for lib in libs],
            "cuda": cuda_facts(work, cuda, libs[-1]) if cuda else None,
            "cuda_left_out": without or None,
            "git": git_id(),
        }  # fmt: skip
        for name, content in [
            *((lib["name"], (work / lib["name"]).read_bytes()) for lib in libs),
            ("build_info.json", json.dumps(info, indent=1).encode()),
        ]:
            # Rename over the old file: a process that has it mapped keeps what it has.
            part = destination / f".{name}.part"
            part.write_bytes(content)
            part.chmod(0o755 if ".so" in name else 0o644)
            part.replace(destination / name)
        if not cuda:  # one of an earlier build would not fit its neighbours
            (destination / "libnibblock_cuda.so").unlink(missing_ok=True)
    print(f"nibblock: built {', '.join(lib['name'] for lib in libs)}")
    if cuda:
        facts = info["cuda"]
        size = f"{facts['bytes'] / 2**20:.1f} MiB, {facts['compile_seconds']} s of nvcc"
        print(f"nibblock: CUDA {facts['nvcc']}, {len(facts['kernels'])} kernels, {size}")
    else:
        print(f"nibblock: left out CUDA: {without}")
    print(f"nibblock: {time.monotonic() - start:.1f} s, {cxx_version}, torch {torch_version}")
    sys.stdout.flush()


class BuildNative(build_ext):
    def run(self) -> None:
        in_tree = self.inplace or getattr(self, "editable_mode", False)
        build_native(ROOT / "python/nibblock" if in_tree else Path(self.build_lib) / "nibblock")

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class CleanBuildPy(build_py):
    """Starts from an empty folder: a file deleted from the tree is not in the next wheel."""

    def run(self) -> None:
        if not getattr(self, "editable_mode", False):
            shutil.rmtree(Path(self.build_lib) / "nibblock", ignore_errors=True)
        super().run()


def packages() -> dict[str, str]:
    found = dict(PACKAGE_DIR)
    for init in sorted((ROOT / "python/nibblock").rglob("__init__.py")):
        folder = init.parent.relative_to(ROOT / "python")
        found.setdefault(".".join(folder.parts), str(Path("python") / folder))
    return found


if __name__ == "__main__":
    os.chdir(ROOT)
    setup(
        packages=sorted(packages()),
        package_dir=packages(),
        package_data={"nibblock": ["py.typed"], "nibblock.triton_kernels": ["configs/*.json"]},
        include_package_data=False,
        # The extension only marks the wheel as one for this platform and Python.
        ext_modules=[Extension("nibblock._native", sources=[])],
        cmdclass={"build_ext": BuildNative, "build_py": CleanBuildPy},
        zip_safe=False,
    )
