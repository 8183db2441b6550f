"""Compiles recorded launches for GPUs that need not be there, and reads what the code costs.

`record` runs a wrapper without launching anything, `compile_launch` turns what it would have
launched into machine code for a compute capability. Tests do this for every shipped configuration;
`nb.warmup` has the same effect on a GPU through real launches.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Callable

import triton
from nibblock.triton_kernels import _common
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

# Shared memory one program may use, bytes: compute capability 8.0 and 9.0.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


def record(call: Callable[[], Any], capability: int) -> list:
    """(kernel, arguments, options) of every launch that `call` would make on a GPU of that compute
    capability; nothing is launched.
    """
    _common.RECORDS, _common.TARGET = [], capability
    try:
        call()
        return _common.RECORDS
    finally:
        _common.RECORDS, _common.TARGET = None, 0


def source(launch: tuple) -> tuple[ASTSource, dict[str, Any], str]:
    """What Triton's launcher would compile for a launch: source, options, a name for people.

    As there: integers of 1 and None become constants, pointers and integers divisible by 16 are
    known to be.
    """
    kernel, args, given = launch
    names = [p.name for p in kernel.params]
    options = {k: v for k, v in given.items() if k in _OPTIONS and k not in names}
    values = dict(zip(names, args))
    values.update({k: v for k, v in given.items() if k in names})
    signature, constants, attributes = {}, {}, {}
    shown = []
    for at, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (free and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(at,)] = value
            if parameter.is_constexpr:
                shown.append(f"{parameter.name}={value}")
            continue
        signature[parameter.name] = mangle_type(value)
        if hasattr(value, "data_ptr"):
            shown.append(f"{parameter.name}:{signature[parameter.name]}")
            if not parameter.do_not_specialize_on_alignment:
                attributes[(at,)] = [["tt.divisibility", 16]]
        elif free and type(value) is int and value % 16 == 0:
            attributes[(at,)] = [["tt.divisibility", 16]]
    shown += [f"{k}={v}" for k, v in sorted(options.items())]
    name = f"{kernel.fn.__name__}({' '.join(shown)})"
    return ASTSource(kernel, signature, constants, attributes), options, name


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, bytes of stack a thread (spills) and of static shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(tool), "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "stack": found["STACK"] + found["LOCAL"]}


def compile_launch(launch: tuple, capability: int) -> dict[str, Any]:
    """Compiles one recorded launch.

    Args:
        launch: from `record`. capability: 80 or 90.
    Returns:
        name, capability, registers, stack (bytes; more than zero means spills), shared (bytes),
        tensor_cores ("wgmma", "mma" or ""), wide_copies (16-byte copies to shared memory), ptx and
        cubin.
    """
    src, options, name = source(launch)
    done = triton.compile(src, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = done.asm["ptx"]
    units = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else ""
    return {
        "name": name,
        "capability": capability,
        **resources(done.asm["cubin"]),
        "shared": done.metadata.shared,
        "tensor_cores": units,
        "wide_copies": len(re.findall(r"cp\.async\.cg\S* \[[^\]]*\], \[[^\]]*\], 0x10", ptx)),
        "ptx": ptx,
        "cubin": done.asm["cubin"],
    }
