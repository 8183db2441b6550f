"""`python -m nibblock.bench.sanitize`: the CUDA C++ kernels, small, under compute-sanitizer.

memcheck finds addresses outside allocations, racecheck hazards in shared memory. Both slow a kernel
down by orders of magnitude, hence the small shapes; tests/test_cuda_device.py compares results.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import torch
from nibblock import _cuda

TOOLS = ("memcheck", "racecheck")


def masked_steps() -> None:
    """Every block edge and pair of types, ragged, an odd row stride, more tensors than a launch."""
    types = (torch.float32, torch.bfloat16)
    for edge in (16, 32, 64, 128):
        for dtype in types:
            for weight in types:
                n, k = edge + 5, 2 * edge - 3
                count = 46 if edge == 16 else 2
                values = [_random(4, edge, edge, dtype=dtype) for _ in range(count)]
                grads = [torch.randn_like(v) for v in values]
                m = [torch.zeros(v.shape, device="cuda") for v in values]
                v = [torch.zeros_like(s) for s in m]
                ages = [torch.zeros(4, dtype=torch.int32, device="cuda") for _ in values]
                blocks = [
                    torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.int32).cuda()
                    for _ in values
                ]
                weights = [_random(n, k + 1, dtype=weight)[:, :k] for _ in values]
                lists = (values, grads, m, v, ages, weights, blocks)
                _cuda.masked_adamw_block_(*lists, block=edge, lr=1e-3)
                _cuda.masked_sgd_block_(
                    values, grads, m, ages, weights, blocks, block=edge, lr=1e-3, momentum=0.9
                )


def weight_gradients() -> None:
    """Every block edge and type, tails in all directions, one and several parts of the tokens."""
    from nibblock import ops

    for edge in (32, 64, 128):
        for dtype in (torch.bfloat16, torch.float16):
            for m in (33, 600):
                n, k = edge + 5, 2 * edge - 3
                index = torch.tensor([[0, 0], [0, 1], [1, 1]])
                layout = ops.block_layout(index, n, k, edge).cuda()
                g, x = _random(m, n, dtype=dtype), _random(m, k, dtype=dtype)
                for out in (torch.float32, dtype):
                    _cuda.block_weight_grad(g, x, layout, block=edge, dtype=out)


def int4_products() -> None:
    """4 and 8 bits, rows of x that take each kernel, odd N and K, several shares of a tile."""
    from nibblock import ops

    n, k = 70, 577
    for bits in (4, 8):
        codes = torch.randint(0, 256, (n, -(-k // 2) if bits == 4 else k), dtype=torch.uint8)
        scales = torch.rand(n, -(-k // 64)).half()
        packed = ops.int4_pack(codes, scales, in_features=k, group_size=64, bits=bits).cuda()
        for rows in (1, 16, 32, 64):
            x = _random(rows, k, dtype=torch.bfloat16)
            _cuda.int4_linear(x, packed, None, n, 64, bits, False, torch.float16)


def _random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


PARTS = (masked_steps, weight_gradients, int4_products)


def main(argv: list[str]) -> int:
    why = _cuda.refusal()
    if why:
        print(f"sanitize: left out: no CUDA C++ kernel can run: {why}", file=sys.stderr)
        return 0  # as the tests skip by name; gpu-check goes on with the Triton kernels
    if argv == ["--child"]:
        for part in PARTS:
            part()
            torch.cuda.synchronize()
            print(f"sanitize: {part.__name__} ran", flush=True)
        return 0
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("sanitize: left out: compute-sanitizer is not on the PATH; it comes with the CUDA "
              "toolkit", file=sys.stderr)  # fmt: skip
        return 0
    for check in TOOLS:
        command = [tool, "--tool", check, "--error-exitcode", "1", sys.executable, "-m",
                   "nibblock.bench.sanitize", "--child"]  # fmt: skip
        print(f"sanitize: {check}", flush=True)
        if subprocess.run(command).returncode:
            print(f"sanitize: {check} found errors, or a call failed", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
