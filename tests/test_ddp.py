"""Several processes: DistributedDataParallel reduces packed gradients only; fully_shard works."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nibblock as nb
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo backend"
)

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6

# The README's example, run as it stands.
EXAMPLE = """\
import nibblock as nb
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)  # the same model in every process
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
nb.sparse_update(model, {"0": [[0, 0], [5, 1]], "2": [[1, 6]]})
parallel = DistributedDataParallel(model)
optimizer = nb.optim.MaskedAdamW(nb.trainable_parameters(model), lr=1e-2, max_norm=1.0)

x, y = torch.randn(32, 64), torch.randn(32, 64)
for step in range(20):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(parallel(x[rank::world]), y[rank::world])
    loss.backward()  # all-reduces three 32 x 32 blocks, not two weights
    optimizer.step()
    dist.all_reduce(loss.detach_())
    if rank == 0 and step % 19 == 0:
        print(f"step {step}: loss {loss.item() / world:.4f}")
if rank == 0:
    nb.save(model, "update.safetensors")  # the blocks alone
dist.destroy_process_group()
"""

# A thread of torch's gloo backend takes the interpreter's lock once more when its last reduction is
# done; DistributedDataParallel keeps these threads alive past destroy_process_group, and one that
# asks while the interpreter ends aborts the process (torch alone does so too: pytorch pull request
# 179291). On two busy cores that is one run in some hundreds, hence the wait.
BEFORE_EXIT = """
import time

time.sleep(1)
"""


def model_of():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32))
    return nb.sparse_update(model, {"0": [[0, 0], [1, 1], [2, 1]], "2": [[0, 1], [0, 2]]})


def batch(step):
    gen = torch.Generator().manual_seed(step)
    return torch.randn(12, 64, generator=gen), torch.randn(12, 32, generator=gen)


def train(model, optimizer, rank=0, world=1):
    losses = []
    for step in range(STEPS):
        x, y = (t.chunk(world)[rank] for t in batch(step))
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        loss = loss.detach().clone()
        if world > 1:
            dist.all_reduce(loss)
        losses.append(loss.item() / world)
    return losses


def ddp(rank, how):
    model = model_of()
    if rank:
        with torch.no_grad():  # DDP brings every process to the first one's values
            model[0].values.zero_()
    reduced = []
    more = {"gradient_as_bucket_view": True} if how == "masked" else {}
    parallel = DistributedDataParallel(model, **more)

    def count(state, bucket):
        reduced.append(bucket.buffer().numel())
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        return allreduce_hook(dist.group.WORLD, bucket)

    parallel.register_comm_hook(None, count)
    values = nb.trainable_parameters(model)
    if how == "torch":
        optimizer = torch.optim.AdamW(values, lr=0.02)
    else:
        optimizer = nb.optim.MaskedAdamW(values, lr=0.02, max_norm=0.5)
    losses = train(parallel, optimizer, rank, 2)
    assert sum(reduced) == STEPS * sum(v.numel() for v in values)
    return losses, [layer.weight.detach().clone() for layer in (model[0], model[2])]


def sharded(rank, how):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = model_of()
    base = [layer.weight.detach().clone() for layer in (model[0], model[2])]
    mesh = init_device_mesh("cpu", (2,))
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    values = nb.trainable_parameters(model)
    with pytest.raises(TypeError, match="MaskedAdamW: params must be whole tensors, got a DTensor"):
        nb.optim.MaskedAdamW(values)
    losses = train(model, torch.optim.AdamW(values, lr=0.02), rank, 2)
    state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v
             for k, v in model.state_dict().items()}  # fmt: skip
    whole = model_of()
    whole.load_state_dict(state)
    layers = (whole[0], whole[2])
    assert all(torch.equal(m.original_weight(), w) for m, w in zip(layers, base))
    return losses, [layer.weight.detach().clone() for layer in layers]


def _worker(rank, folder, work, how):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        torch.save(work(rank, how), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def two(folder, work, how=""):
    mp.spawn(_worker, (str(folder), work, how), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("how", ["masked", "torch"])
def test_two_processes_train_as_one(tmp_path, how):
    """The gradients' mean over two halves is another order of sums: 1e-5, not bits."""
    (ours, weights), (again, others) = two(tmp_path, ddp, how)
    assert ours == again
    assert all(torch.equal(a, b) for a, b in zip(weights, others))
    single = model_of()
    values = nb.trainable_parameters(single)
    make = torch.optim.AdamW if how == "torch" else nb.optim.MaskedAdamW
    more = {} if how == "torch" else {"max_norm": 0.5}
    like = train(single, make(values, lr=0.02, **more))
    torch.testing.assert_close(ours, like, rtol=1e-5, atol=0)
    for weight, layer in zip(weights, (single[0], single[2])):
        layer.sync()
        torch.testing.assert_close(weight, layer.weight, rtol=1e-4, atol=1e-5)


def test_fully_shard_with_an_optimiser_of_torch(tmp_path):
    (ours, weights), (again, _) = two(tmp_path, sharded)
    assert ours == again
    single = model_of()
    like = train(single, torch.optim.AdamW(nb.trainable_parameters(single), lr=0.02))
    torch.testing.assert_close(ours, like, rtol=1e-5, atol=0)
    for weight, layer in zip(weights, (single[0], single[2])):
        layer.sync()
        torch.testing.assert_close(weight, layer.weight, rtol=1e-4, atol=1e-5)


def test_example_of_the_readme(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    (tmp_path / "train.py").write_text(EXAMPLE + BEFORE_EXIT)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NIBBLOCK")}
    environment.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    torchrun = subprocess.Popen(
        [sys.executable, *command], cwd=tmp_path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = torchrun.communicate(timeout=240)
    finally:
        if torchrun.poll() is None:  # with its two workers
            os.killpg(torchrun.pid, signal.SIGKILL)
    assert torchrun.returncode == 0, err[-3000:]
    first, last = (float(line.split()[-1]) for line in out.splitlines())
    assert last < first
    from safetensors import safe_open

    with safe_open(str(tmp_path / "update.safetensors"), framework="pt") as file:
        header = json.loads(file.metadata()["nibblock"])
        assert file.get_tensor("0.weight").shape == (2, 32, 32)
    assert header["kind"] == "sparse_update"


def test_the_readme_shows_this_example():
    text = (ROOT / "README.md").read_text()
    if "DistributedDataParallel(" not in text:
        pytest.skip("README.md shows no example of several processes yet")
    assert EXAMPLE in text
