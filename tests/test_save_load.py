"""`load` keeps what the model is: its ties, hooks, dtypes and fused calls; what `save` refuses."""

from __future__ import annotations

import nibblock as nb
import pytest
import torch
from test_accelerate import TOKENS, Model, quiet
from torch import nn

pytest.importorskip("safetensors", reason="the safetensors package is not installed")

CONFIG = nb.Int4Config(group_size=32)
SPARSE = nb.BlockSparseConfig(density=0.5)
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def saved(path, model, config=CONFIG):
    """A file of the accelerated model."""
    nb.accelerate(model, config, progress=False)
    nb.save(model, path)
    return model


class Twice(nn.Module):
    """One linear under two names, and its bias under a third."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.b = self.a
        self.bias = self.a.bias

    def forward(self, x):
        return self.b(self.a(x)) + self.bias


@pytest.mark.parametrize("one, other", [(CONFIG, SPARSE), (SPARSE, CONFIG)])
def test_a_layer_of_another_kind_leaves_only_what_was_set_on_it(tmp_path, one, other):
    expected = saved(tmp_path / "m", Twice(), one)
    model = Twice()
    model.a.tag = "here"
    nb.accelerate(model, other, progress=False)
    nb.load(tmp_path / "m", model)
    assert model.a.__dict__.keys() - expected.a.__dict__.keys() == {"tag"}
    assert torch.equal(model(X), expected(X))


class Apart(Twice):
    """The same names without a tie."""

    def __init__(self):
        super().__init__()
        self.b, self.bias = nn.Linear(64, 64), nn.Parameter(torch.ones(64))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("config", [CONFIG, SPARSE])
def test_what_is_one_stays_one(tmp_path, config, device):
    model = saved(tmp_path / "m", Twice(), config)
    with torch.device(device):
        other = Twice()
    nb.load(tmp_path / "m", other)
    assert other.a is other.b
    assert other.bias is other.a.bias
    assert len(list(other.parameters())) == len(list(model.parameters()))
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda m: None, "b must be as a in the file, for they are one module in the model"),
        (lambda m: setattr(m, "b", m.a), "a.bias must be as bias in the file, for they are one te"),
    ],
)
def test_a_tie_that_the_file_does_not_have_is_refused(tmp_path, change, text):
    model = Apart()
    change(model)
    saved(tmp_path / "m", model)
    other = Twice()
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=f"^load: {text}.*got another; untie them in the model$"):
        nb.load(tmp_path / "m", other)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    assert nb.load(tmp_path / "m", Apart())(X).equal(model(X))


def test_tied_dense_tensors_that_differ_are_refused(tmp_path):
    model = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
    with torch.no_grad():
        model[1].weight.fill_(2)
    nb.save(model, tmp_path / "m")
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"^load: 1\.weight must be as 0\.weight in the file"):
        nb.load(tmp_path / "m", model)


@pytest.mark.parametrize("config", [CONFIG, SPARSE])
def test_hooks_and_the_bias_parameter_stay(tmp_path, config):
    saved(tmp_path / "m", nn.Sequential(nn.Linear(64, 64)), config)
    model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    calls, bias = [], model[0].bias.requires_grad_(False)
    handle = model[0].register_forward_hook(lambda *args: calls.append(1))
    nb.load(tmp_path / "m", model)
    assert model[0].bias is bias
    assert bias.dtype == torch.bfloat16
    assert not bias.requires_grad
    with torch.no_grad():
        model(X.bfloat16())
    handle.remove()
    with torch.no_grad():
        model(X.bfloat16())
    assert calls == [1]


def test_a_bias_of_another_dtype_is_refused(tmp_path):
    saved(tmp_path / "m", nn.Sequential(nn.Linear(64, 64)))
    with pytest.raises(ValueError, match=r"^load: 0\.bias must be .* in the model, got float64$"):
        nb.load(tmp_path / "m", nn.Sequential(nn.Linear(64, 64)).double())


class Attention(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, n) for n in (64, 32, 32))

    def forward(self, x):
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def test_fused_linears_are_fused_again(tmp_path):
    model = saved(tmp_path / "m", nn.Sequential(Attention(0)))
    other = nn.Sequential(Attention(1))
    nb.accelerate(other, CONFIG, fuse=True, progress=False)
    nb.load(tmp_path / "m", other)
    (group,) = other[0]._int4_groups
    assert group.siblings == [other[0].q_proj, other[0].k_proj, other[0].v_proj]
    assert other[0].q_proj._fused[0] is group
    with torch.no_grad():
        torch.testing.assert_close(other(X), model(X), rtol=1e-5, atol=1e-5)


class Stateful(nn.Linear):
    """A linear with a forward and a state of its own."""

    state = torch.arange(3)

    def forward(self, x):
        return super().forward(x)

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


def test_extra_state(tmp_path):
    model = nn.Sequential(Stateful(64, 64), nn.Linear(64, 64))
    model[0].state = torch.arange(5)
    saved(tmp_path / "m", model)
    other = nb.load(tmp_path / "m", nn.Sequential(Stateful(64, 64), nn.Linear(64, 64)))
    assert torch.equal(other[0].state, torch.arange(5))
    assert torch.equal(other(X), model(X))
    plain = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with pytest.raises(ValueError, match=r"^load: model must hold 0\._extra_state of m"):
        nb.load(tmp_path / "m", plain)
    nb.save(plain, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"^load: plain must hold 0\._extra_state of the model"):
        nb.load(tmp_path / "plain", nn.Sequential(Stateful(64, 64), nn.Linear(64, 64)))
    model[0].state = {"step": 3}
    with pytest.raises(TypeError, match=r"^save: 0\._extra_state must be a Tensor, .* got dict; "):
        nb.save(model, tmp_path / "m")


def test_a_missing_folder_is_named(tmp_path):
    path = tmp_path / "missing" / "m.safetensors"
    with pytest.raises(FileNotFoundError, match="^save: path must lie in a folder") as caught:
        nb.save(nn.Sequential(nn.Linear(4, 4)), path)
    assert repr(str(path)) in str(caught.value)
    assert "\n" not in str(caught.value)


# --- files ----------------------------------------------------------------------------------------

pytest_safetensors = pytest.importorskip("safetensors", reason="needs the safetensors package")


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("target", ["dense", "accelerated", "other format", "meta"])
def test_save_and_load(tmp_path, embeddings, target):
    torch.manual_seed(1)
    model = Model().eval()
    quiet(model, nb.Int4Config(group_size=64, embeddings=embeddings, symmetric=True))
    path = tmp_path / "model.safetensors"
    nb.save(model, path)
    torch.manual_seed(2)
    other = Model().eval()
    if target == "accelerated":
        quiet(other, nb.Int4Config(group_size=64, embeddings=embeddings, symmetric=True))
    elif target == "other format":
        quiet(other, nb.Int4Config(group_size=32, bits=8, embeddings=embeddings))
    elif target == "meta":
        other = other.to("meta")
    assert nb.load(path, other) is other
    assert torch.equal(other(TOKENS), model(TOKENS))
    assert not any(p.is_meta for p in other.parameters())
    tied = (
        (other.head.packed, other.embed.packed)
        if embeddings
        else (other.head.weight, other.embed.weight)
    )
    assert tied[0] is tied[1]
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    nb.save(other, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_tied_tensors_are_written_once(tmp_path):
    model = Model()
    quiet(model, nb.Int4Config(group_size=32, embeddings=True))
    nb.save(model, tmp_path / "a.safetensors")
    dense = tmp_path / "b.safetensors"
    nb.save(Model(), dense)
    total = sum(p.numel() * 4 for p in Model().parameters())
    assert total < dense.stat().st_size < total + 4000
    with pytest_safetensors.safe_open(str(tmp_path / "a.safetensors"), framework="pt") as file:
        names = set(file.keys())
    assert "embed.qweight" in names
    assert "head.qweight" not in names


def test_load_refuses_and_leaves_the_model_unchanged(tmp_path):
    path = tmp_path / "model.safetensors"
    model = Model(tied=False)
    quiet(model)
    nb.save(model, path)

    def refused(other, text, file=path):
        before = [
            (id(m), {k: v.clone() for k, v in m._parameters.items() if v is not None})
            for m in other.modules()
        ]
        with pytest.raises(ValueError, match=text):
            nb.load(file, other)
        for (key, parameters), m in zip(before, other.modules()):
            assert key == id(m)
            for name, value in parameters.items():
                assert torch.equal(value, m._parameters[name])

    refused(
        Model(width=32, tied=False),
        r"blocks\.0\.up must have the file's shape \[128, 64\], got \[64, 32\]",
    )
    refused(Model(vocabulary=50, tied=False), r"head must have the file's shape \[100, 64\]")
    other = Model(tied=False)
    other.blocks[1].down = nn.Linear(128, 64)
    refused(other, r"blocks\.1\.down must have no bias as in the file, got a bias")
    other = Model(tied=False)
    other.blocks[1].down = nn.Identity()
    refused(other, r"blocks\.1\.down must be an nn\.Linear in the model, got Identity")
    other = Model(tied=False)
    other.extra = nn.Parameter(torch.ones(3))
    refused(other, "must hold extra of the model")
    other = Model(tied=False)
    other.norm = nn.Identity()
    refused(other, r"model must hold norm\.\w+ of model")
    other = Model(tied=False)
    other.norm = nn.LayerNorm(32)
    refused(other, r"norm\.\w+ must have the file's shape \[64\], got \[32\]")

    data = path.read_bytes()
    for cut in (0, 4, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:cut])
        refused(Model(tied=False), "must be a whole safetensors file", tmp_path / "cut")
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "foreign")
    refused(Model(tied=False), "must be written by nibblock.save", tmp_path / "foreign")
    with pytest.raises(FileNotFoundError, match="load: path must name a file"):
        nb.load(tmp_path / "missing", Model())


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    nb.save(Model(), path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        nb.save(Model(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(ValueError, match="must hold data, got a tensor on the meta device"):
        nb.save(Model().to("meta"), path)
