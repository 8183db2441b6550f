"""`MaskedMuon` in fine-tuning, and on blocks that no `MaskedLinear` owns: those of adapters."""

from __future__ import annotations

import dataclasses
import json

import nibblock as nb
import pytest
import torch
from finetune_samples import tiny_llama
from masked_samples import bits, linear_of, masked
from nibblock._finetune import cli, methods, report
from nibblock._finetune.loop import train
from nibblock.optim import MaskedAdamW, MaskedMuon
from test_finetune import RUN, arguments, here, place, text_task  # noqa: F401  (two are fixtures)
from torch import nn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_blocks_of_adapters_move_as_those_of_a_masked_layer(dtype, max_norm):
    """And so does any stack of squares; a masked one and one that is not square do not."""
    layer = masked(64, 96, kind=dtype)  # whole blocks alone
    start = torch.zeros_like(layer.values)
    with torch.no_grad():
        layer.values.zero_()
    layer.sync()
    adapter = nb.AdapterLinear(linear_of(64, 96, dtype), 16, layer.blocks, dtype=dtype)
    loose = [nn.Parameter(torch.ones(3, 16, 16)), nn.Parameter(torch.ones(3, 16, 8))]
    masks = {loose[0]: torch.ones(3, 16, 16, dtype=torch.bool)}
    blocks = [layer.values, adapter.values, nn.Parameter(start.clone())]
    rule = {"lr": 0.02, "weight_decay": 0.1, "max_norm": max_norm}
    optimizers = [MaskedMuon([p], **rule) for p in blocks]
    others = MaskedMuon(loose, lr=0.02, masks=masks)
    twins = [p.detach().clone().requires_grad_() for p in loose]
    by_adamw = MaskedAdamW(twins, lr=0.02, weight_decay=0.0, masks={twins[0]: masks[loose[0]]})
    for seed in range(4):
        gen = torch.Generator().manual_seed(seed)
        grad = torch.randn(start.shape, generator=gen).to(dtype)
        for p in blocks:
            p.grad = grad.clone()
        for p, twin in zip(loose, twins):
            p.grad = torch.randn(p.shape, generator=gen)
            twin.grad = p.grad.clone()
        for optimizer in (*optimizers, others, by_adamw):
            optimizer.step()
        for p, optimizer in zip(blocks[1:], optimizers[1:]):
            assert torch.equal(bits(p.detach()), bits(layer.values.detach()))
            mine, first = optimizer.state[p], optimizers[0].state[layer.values]
            assert mine.keys() == first.keys()
            assert all(torch.equal(mine[name], first[name]) for name in first)
        for p, twin in zip(loose, twins):
            assert torch.equal(p, twin)
    assert not torch.equal(layer.values, start)
    again = MaskedMuon([adapter.values], lr=0.02)
    again.load_state_dict(optimizers[1].state_dict())
    kept, first = again.state[adapter.values], optimizers[1].state[adapter.values]
    assert all(torch.equal(kept[name], first[name]) for name in first)
    came_from = torch.arange(len(start) - 1, -1, -1)
    before = {name: value.clone() for name, value in kept.items()}
    again.move_blocks(adapter.values, came_from)
    for name, value in again.state[adapter.values].items():
        assert torch.equal(value, before[name].flip(0)), name
    adapter.values.grad = torch.ones_like(adapter.values)
    again.step()
    assert again.state[adapter.values]["age"].tolist() == [5] * len(start)


def test_muon_trains_adapters():
    run = dataclasses.replace(RUN, method="adapter", optimizer="muon", lr=0.0, weight_decay=0.1)
    model, task = tiny_llama(2), text_task()
    prepared = methods.prepare(model, task, run.checked())
    assert type(prepared.optimizer) is nb.optim.MaskedMuon
    assert prepared.clips
    values = [m.values for m in prepared.model.modules() if isinstance(m, nb.AdapterLinear)]
    first, *_, last = (e["loss"] for e in train(task, prepared, run).evaluations)
    assert last < first - 1e-3
    assert values
    assert all("momentum_buffer" in prepared.optimizer.state[v] for v in values)


def test_muon_and_int8_on_an_int4_base(place, tmp_path, here, capsys):  # noqa: F811
    extra = ["--method", "adapter", "--int4", "--compute", "int8", "--optimizer", "muon"]
    extra += ["--baselines", "full", "--json", "--out", str(tmp_path / "out")]
    assert cli.main(arguments(place, *extra)) == 0
    ours, full = json.loads(capsys.readouterr().out)["results"]
    assert [report.label(r) for r in (ours, full)] == ["adapter muon int4 int8", "full"]
    assert ours["best"]["loss"] < ours["before"]["loss"]


def test_muon_trains_blocks_with_less_state():
    records, kinds = [], (nb.optim.MaskedAdamW, nb.optim.MaskedMuon)
    for name, kind in zip(("adamw", "muon"), kinds):
        run = dataclasses.replace(RUN, method="masked", optimizer=name, lr=0.0, weight_decay=0.1)
        model, task = tiny_llama(2), text_task()
        prepared = methods.prepare(model, task, run.checked())
        assert type(prepared.optimizer) is kind
        (group,) = prepared.optimizer.param_groups
        assert (group["lr"], group["weight_decay"]) == (run.learning_rate, 0.1)
        assert prepared.clips
        assert prepared.optimizer.max_norm == run.max_norm
        records.append(train(task, prepared, run))
        first, *_, last = (e["loss"] for e in records[-1].evaluations)
        assert last < first - 1e-3
    assert records[1].state_bytes < records[0].state_bytes
    assert records[1].losses != records[0].losses
