"""The Triton kernels on an NVIDIA GPU: the interpreter's cases again, and what only a GPU can show.

pytest -m gpu          or: make gpu-check
"""

from __future__ import annotations

import nibblock as nb
import pytest
import torch
import triton_cases
import triton_cases_masked
import triton_cases_tuned

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
CASES = {**triton_cases.CASES, **triton_cases_masked.CASES, **triton_cases_tuned.CASES}


@pytest.fixture
def device():
    return torch.device("cuda")


@pytest.mark.parametrize("name", CASES)
def test_kernel(name, device):
    CASES[name](device)


def int4_layer(device, n=512, k=256):
    torch.manual_seed(0)
    return nb.Int4Linear.from_linear(torch.nn.Linear(k, n), group_size=64).to(device)


def test_module_moves_as_bytes_and_agrees_with_the_cpu(device):
    layer = int4_layer("cpu")
    there = int4_layer(device)
    assert torch.equal(there.packed.cpu(), layer.packed)
    assert sum(p.numel() for p in there.parameters()) == sum(p.numel() for p in layer.parameters())
    for name, value in layer.state_dict().items():
        assert torch.equal(there.state_dict()[name].cpu(), value)
    x = torch.randn(5, 256)
    torch.testing.assert_close(there(x.to(device)).cpu(), layer(x), atol=1e-3, rtol=1e-3)
    assert torch.equal(there.dequantize().cpu(), layer.dequantize())


def test_gradients_agree_with_the_cpu(device):
    torch.manual_seed(0)
    made = []
    for where in ("cpu", device):
        torch.manual_seed(0)
        layer = nb.AdapterLinear(int4_layer("cpu"), block=32, blocks=0.2, rank=4).to(where)
        x = torch.randn(70, 256).to(where).requires_grad_()
        with torch.no_grad():
            layer.values.copy_(torch.randn(layer.values.shape))
        layer(x).square().sum().backward()
        made.append([x.grad.cpu(), layer.values.grad.cpu()])
    for cpu, gpu in zip(*made):
        torch.testing.assert_close(gpu, cpu, atol=2e-2, rtol=2e-3)


def test_nothing_waits_for_the_device(device):
    layer = nb.AdapterLinear(int4_layer("cpu"), block=32, blocks=0.2).to(device)
    x = torch.randn(70, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()  # compiles, and fills caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rows", [1, 128])
def test_graph_capture_replays(rows, device):
    layer = int4_layer(device)
    x = torch.randn(rows, 256, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, layer(x))


def test_results_repeat_and_do_not_depend_on_the_stream(device):
    layer = int4_layer(device)
    x = torch.randn(3, 256, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        first = layer(x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            again = [layer(x) for _ in range(20)]
        torch.cuda.current_stream().wait_stream(side)
        assert all(torch.equal(first, y) for y in again)


def test_a_tile_call_allocates_no_dense_weight(device):
    layer = int4_layer(device, 4096, 4096)
    x = torch.randn(128, 4096, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        layer(x)
        assert torch.cuda.max_memory_allocated() - before < 4096 * 4096


def test_compile_and_autocast(device):
    layer = int4_layer(device)
    x = torch.randn(3, 256, device=device)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_explain_and_warmup(device):
    layer = int4_layer(device)
    explanation = nb.explain(layer, torch.ones(3, 256, device=device))
    assert explanation.kernel == "int4_linear.cuda.triton.few"
    assert len(explanation.refused) == 2
    assert nb.warmup(layer, tokens=(1, 128), backward=True) == 1


def test_opcheck(device):
    layer = int4_layer(device)
    x = torch.randn(3, 256, device=device, requires_grad=True)
    arguments = (x, layer.packed, None, *layer._args)
    torch.library.opcheck(torch.ops.nibblock.int4_linear.default, arguments)
    layout = nb.ops.block_layout(torch.tensor([[0, 1], [1, 0]], device=device), 64, 64, 32)
    values = torch.randn(2, 32, 32, device=device, requires_grad=True)
    x = torch.randn(3, 64, device=device, requires_grad=True)
    arguments = (x, values, layout, None, None, 64, 32)
    torch.library.opcheck(torch.ops.nibblock.block_sparse_linear.default, arguments)


def test_masked_optimizer_step_captures(device):
    values = torch.nn.Parameter(torch.randn(4, 32, 32, device=device))
    weight = torch.zeros(128, 128, device=device)
    blocks = torch.tensor([[0, 1], [1, 0], [2, 2], [3, 3]], dtype=torch.int32, device=device)
    grad, m, v = (torch.randn(4, 32, 32, device=device) for _ in range(3))
    v.square_()
    age = torch.zeros(4, dtype=torch.int32, device=device)

    def step():
        nb.ops.masked_adamw_block_(
            [values.detach()], [grad], [m], [v], [age], [weight], [blocks], block=32, lr=1e-3
        )

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    graph.replay()
    assert age.tolist() == [3, 3, 3, 3]
    assert torch.equal(weight[:32, 32:64], values.detach()[0])


def test_a_list_first_met_in_a_capture(device):
    """Its table of pointers is copied by the graph, from memory that lives as long as it does."""
    kind = dict(device=device, dtype=torch.float32)

    def step(p, g, m, v, age):
        index = torch.tensor([[0, 0]], dtype=torch.int32, device=device)
        return lambda: nb.ops.masked_adamw_block_(
            [p], [g], [m], [v], [age], [], [index], block=32, lr=1e-3
        )

    def make():
        p, g = (torch.randn(1, 32, 32, **kind) for _ in range(2))
        states = torch.zeros(1, 32, 32, **kind), torch.zeros(1, 32, 32, **kind)
        return p, g, *states, torch.zeros(1, device=device, dtype=torch.int32)

    step(*make())()  # compiles; another list
    tensors = make()
    again = [t.clone() for t in tensors]
    run = step(*tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    junk = [torch.full((64,), -1, dtype=torch.int64).pin_memory() for _ in range(100)]
    for _ in range(3):
        graph.replay()
        step(*again)()
    del junk
    assert tensors[-1].tolist() == [3]
    assert all(torch.equal(a, b) for a, b in zip(tensors, again))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_tensor_runs_on_its_own_gpu():
    for device in (torch.device("cuda", 1), torch.device("cuda", 0)):
        layer = int4_layer(device)
        y = layer(torch.ones(3, 256, device=device))
        assert y.device == device
        assert torch.cuda.current_device() == 0


def test_a_tuned_file_is_read_at_the_first_launch(device, monkeypatch, tmp_path):
    """What the tuner writes is what a launch takes; a candidate gives the same result."""
    from nibblock import _tune
    from nibblock.bench.gpu_timing import graph_seconds

    layer = (512, 256)
    jobs = [job for job in _tune.jobs(["int4"], [layer]) if job.shape.rows == 16]
    level = torch.cuda.get_device_capability()
    entries, left = _tune.tune(
        jobs, 10 * level[0] + level[1], lambda calls: graph_seconds(calls, rounds=2), 60
    )
    assert not left
    assert len(entries) == 1
    assert not [row for row in entries[0]["candidates"] if "rejected" in row]
    name = torch.cuda.get_device_name()
    facts = {"gpu": name, "capability": list(level), "versions": {}, "date": ""}
    monkeypatch.setenv(_tune._tuned.VARIABLE, str(tmp_path))
    _tune.write(tmp_path, facts, entries)
    assert _tune._tuned.lookup(name, jobs[0].shape) == entries[0]["config"]
    _tune._tuned.forget()


@pytest.mark.parametrize("mode", ["gain", "sketch", "exact"])
def test_a_model_is_scored_where_it_is(device, mode):
    """The same blocks as on the CPU but where scores are within rounding of each other, and the
    generators as they were."""

    def select(where):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(96, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)
        ).to(where)
        batches = [(torch.randn(40, 96).to(where), torch.randn(40, 64).to(where)) for _ in range(3)]
        return nb.select_blocks(
            model, batches, lambda m, b: (m(b[0]) - b[1]).square().mean(), 0.2, 16, mode=mode,
            progress=False,
        )  # fmt: skip

    state = torch.cuda.get_rng_state()
    there, here = select(device), select("cpu")
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert there.predicted_time is None
    for name, scores in here.scores.items():
        assert there.scores[name].device.type == "cpu"
        torch.testing.assert_close(there.scores[name], scores, rtol=0.05, atol=0.05)
    same = {(n, *b) for n, bs in here.items() for b in bs.tolist()}
    found = {(n, *b) for n, bs in there.items() for b in bs.tolist()}
    assert len(same & found) >= 0.9 * len(same)
