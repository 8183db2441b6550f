"""How a call reaches a Triton kernel: registration, the table's rows, refusals. Needs no Triton."""

from __future__ import annotations

import sys

import nibblock as nb
import pytest
import torch
from nibblock.ops import _triton, _triton_masked
from nibblock.triton_kernels import _table

muon_direction = sys.modules["nibblock.ops.muon_direction"]  # the name is the function's, too

# The shorter forwards of nn/_lean.py and the look-ahead of optim/_plan.py: hints and calls that a
# model on a GPU never meets.
CPU_ONLY = {
    *("_rms_norm", "_rms_norm_forward", "_rms_norm_grad", "_add_rms_norm", "_attend"),
    *("_rotated", "_rotated_forward", "_silu_product", "_silu_product_forward"),
    *("_silu_product_grad", "_int4_siblings", "_int4_mlp", "_int4_layer_end"),
    *("_softmax_grad_", "_fetch_lines", "_causal_attention", "_causal_attention_grad"),
}
BY_TORCH = {"muon_direction_"}  # its CUDA body is torch's batched products


def test_every_operator_has_a_cuda_body():
    names = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("nibblock::")
    }
    assert names - CPU_ONLY - BY_TORCH == {*_triton.BODIES, *_triton_masked.BODIES}
    for name in names - CPU_ONLY:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nibblock::{name}", "CUDA"), name


@pytest.mark.parametrize("found", (0.0, 1.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_body_of_muon_by_torch(dtype, found):
    gen = torch.Generator().manual_seed(0)
    grads = [torch.randn(z, 32, 32, generator=gen).to(dtype) * 1e-25 for z in (3, 1)]
    grads[0][1] = 0
    momenta = [torch.randn(g.shape, generator=gen) * 1e-25 for g in grads]
    more = (0.8, True, 5, True, torch.tensor([2.0]), torch.tensor([found]))
    results = []
    for body in (torch.ops.nibblock.muon_direction_.default, muon_direction.batched):
        out, states = [torch.empty_like(g) for g in grads], [m.clone() for m in momenta]
        states[0][1] = 0
        body(out, grads, states, *more)
        results.append((out, states))
    for ours, by_torch in zip(*results):
        for a, b in zip(ours, by_torch):
            tight = {"rtol": 1e-5, "atol": 1e-30} if ours is results[0][1] else {}
            torch.testing.assert_close(b, a, **tight)
    (first, _), _ = results[0]
    assert bool(first[0].any()) == (not found)
    assert not first[1].any()


def test_rows_are_unique_complete_and_say_what_never_ran():
    rows = [row for table in _table.TABLE.values() for row in table]
    assert len({row.id for row in rows}) == len(rows)
    for op, table in _table.TABLE.items():
        assert all(row.id.startswith(f"{op}.cuda.triton.") for row in table)
        assert table[-1].serves(5000, torch.float32)  # the last row takes what is left
    facts = nb.info()["gpu_kernels"]
    assert set(facts) == set(_table.TABLE)
    for row in facts["int4_linear"]:
        assert row["state"] == "not yet run on hardware"
        assert row["available"] == (not row["reason"])


def on_a_gpu(monkeypatch, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(_triton, "missing", lambda: None)
    _triton.refusal.cache_clear()
    monkeypatch.setattr(_triton, "refusal", _triton.refusal.__wrapped__)


def test_choose_names_the_kernel_and_why_not_the_others(monkeypatch):
    on_a_gpu(monkeypatch)
    device = torch.device("cuda", 0)
    for rows, dtype, kind in (
        (1, torch.bfloat16, "few"), (64, torch.float32, "few"), (65, torch.bfloat16, "tile"),
        (1024, torch.bfloat16, "dequantize"), (1024, torch.float16, "tile"),
    ):  # fmt: skip
        choice = _triton.choose("int4_linear", rows, dtype, device)
        assert choice["kernel"] == f"int4_linear.cuda.triton.{kind}"
        assert len(choice["refused"]) == 2
        assert all(reason for _, reason in choice["refused"])
        assert choice["level"] == "sm 9.0 (not yet run on hardware)"


def test_an_old_gpu_is_refused(monkeypatch):
    on_a_gpu(monkeypatch, (7, 5))
    choice = _triton.choose("int4_linear", 1, torch.float16, torch.device("cuda", 0))
    assert choice["kernel"] is None
    assert "compute capability must be 8.0 or higher, got 7.5" in choice["refused"][0][1]


def test_without_triton_the_text_says_what_to_install(monkeypatch):
    monkeypatch.setattr(_triton.importlib.util, "find_spec", lambda name: None)
    _triton.missing.cache_clear()
    try:
        layer = nb.Int4Linear(64, 16)
        with pytest.raises(nb.BackendUnavailable, match=r"pip install nibblock\[triton\]"):
            _triton.BODIES["_int4_linear_forward"](
                torch.ones(1, 64), layer.packed, None, nb.ops._checks.format_code(*layer._args)
            )
    finally:
        _triton.missing.cache_clear()


def test_warmup_leaves_a_cpu_model_alone():
    assert nb.warmup(nb.Int4Linear(64, 16)) == 0
