"""Experts in whole models: `accelerate`, its report, generation, `save` and `load`, training."""

from __future__ import annotations

import copy
import json

import nibblock as nb
import pytest
import torch
from torch import nn

transformers = pytest.importorskip(
    "transformers", reason="the transformers package is not installed"
)

from expert_samples import Layer, dense_experts, error, routing  # noqa: E402

CONFIG = nb.Int4Config(group_size=32)
TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35], [8, 97, 93, 23, 84, 62]])

SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    max_position_embeddings=64,
)
MODELS = {
    "Mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "Qwen3Moe": dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=48, head_dim=16),
    "Qwen2Moe": dict(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=64,
    ),
    "DeepseekV3": dict(
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        moe_intermediate_size=48,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
    "GptOss": dict(num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=4),
    "Olmoe": dict(num_experts=4, num_experts_per_tok=2),
    "GraniteMoe": dict(num_local_experts=4, num_experts_per_tok=2),
}


def tiny(name="Mixtral", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **MODELS[name], **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():  # as if trained: routers that prefer some experts, gates that bend
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model.to(dtype).eval()


def quiet(model, config=CONFIG, **options):
    return nb.accelerate(model, config, progress=False, **options)


def experts_of(model) -> dict[str, nb.Int4Experts]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nb.Int4Experts)}


def dequantised(model, dense):
    """The dense model with the weights that the quantised one stands for."""
    out = copy.deepcopy(dense)
    modules = dict(out.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, nb.Int4Experts):
            modules[name].load_state_dict(module.dequantize(), strict=False)
        elif isinstance(module, nb.Int4Linear):
            modules[name].weight.data = module.dequantize()
    return out


def reasons(report):
    return {row.name: row.reason for row in report.kept}


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_model_computes_what_its_dequantised_weights_say(name, implementation):
    dense = tiny(name)
    model = copy.deepcopy(dense)
    report = quiet(model)
    rows = [row for row in report.replaced if row.kind.endswith("Experts")]
    assert len(rows) == len(experts_of(model)) == (1 if name == "DeepseekV3" else 2)
    assert not [row for row in report.kept if "xperts" in row.name.rpartition(".")[2]]
    other = dequantised(model, dense)
    other.set_experts_implementation(implementation)
    with torch.no_grad():
        assert error(model(TOKENS).logits, other(TOKENS).logits) < 2e-2


@pytest.mark.parametrize("name", MODELS)
def test_generation_token_by_token(name):
    dense = tiny(name)
    model = copy.deepcopy(dense)
    quiet(model)
    with torch.no_grad():
        out = model.generate(
            TOKENS[:1], max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        assert out.shape == (1, 14)
        logits = dequantised(model, dense)(out).logits[0, 5:-1]
    # Each token that the cached decoding chose is one that the dense model would choose, up to ties
    # within the rounding of activations.
    chosen = logits.gather(1, out[0, 6:, None])[:, 0]
    assert (chosen >= logits.max(1).values - 2e-2 * logits.abs().max()).all()
    again = model.generate(
        TOKENS[:1], max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert torch.equal(again, out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models(dtype):
    dense = tiny("Qwen3Moe", dtype)
    model = copy.deepcopy(dense)
    quiet(model, where="*.experts")
    with torch.no_grad():
        logits, expected = (m(TOKENS).logits for m in (model, dequantised(model, dense)))
    assert logits.dtype == dtype
    assert error(logits, expected) < 5e-2


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_gradients_of_embeddings_routers_and_inputs(name):
    dense = tiny(name)
    model = copy.deepcopy(dense)
    quiet(model, where="*.experts")
    found = []
    for one in (model, dequantised(model, dense)):
        embedded = one.get_input_embeddings()(TOKENS).detach().requires_grad_()
        one(inputs_embeds=embedded).logits.square().mean().backward()
        routers = {n: p.grad for n, p in one.named_parameters() if "gate." in n or "router." in n}
        assert routers
        found.append({"inputs": embedded.grad, **routers})
    for key, grad in found[1].items():
        assert grad.abs().sum() > 0
        assert error(found[0][key], grad) < 3e-2, key


def test_training_with_checkpoints_moves_what_is_dense():
    model = tiny()
    quiet(model)
    model.train()
    model.gradient_checkpointing_enable()
    packed = [p.clone() for p in model.parameters() if p.dtype == torch.uint8]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = [p for p in model.parameters() if p.dtype == torch.uint8]
    assert all(torch.equal(a, b) for a, b in zip(packed, after))


def test_compiled_model():
    model = tiny()
    quiet(model)
    with torch.no_grad():
        expected = model(TOKENS).logits
        compiled = torch.compile(model, backend="aot_eager")
        # Compiled, the forwards between the products are transformers' own: other last places.
        assert error(compiled(TOKENS).logits, expected) < 1e-4


# --- report ---------------------------------------------------------------------------------------


def test_bytes_where_experts_dominate():
    model = tiny(hidden_size=256, intermediate_size=512, vocab_size=64)
    report = quiet(model, nb.Int4Config(group_size=128))
    assert report.model_bytes_before / report.model_bytes_after > 4.5
    (row, _) = [row for row in report if row.kind == "MixtralExperts"]
    assert (row.name, row.action) == ("model.layers.0.mlp.experts", "int4")
    assert row.shape == (4, 1024, 256)
    assert row.bytes_before == 4 * 4 * (1024 * 256 + 256 * 512)
    held = experts_of(model)[row.name]
    assert row.bytes_after == sum(w.packed.numel() for w in held.projections.values())
    assert row.bytes_before / row.bytes_after > 6
    assert "model.layers.*.mlp.experts x2" in str(report)
    assert "4 x 1024 x 256" in str(report)
    facts = json.loads(json.dumps(report.to_dict()))
    assert [4, 1024, 256] in [row["shape"] for row in facts["rows"]]
    assert {row.reason for row in quiet(model)} == {"already quantised"}


def test_where_skip_and_bits():
    report = quiet(tiny(), skip="*.0.mlp.experts", where="*.experts")
    assert reasons(report)["model.layers.0.mlp.experts"] == "in skip"
    assert [row.name for row in report.replaced] == ["model.layers.1.mlp.experts"]
    report = quiet(tiny(), where=lambda name, module: "attn" in name)
    assert reasons(report)["model.layers.0.mlp.experts"] == "not selected by where"
    report = quiet(tiny(), nb.Int4Config(group_size=32, bits=8), where="*.experts")
    assert {row.action for row in report.replaced} == {"int8"}


def test_block_sparse_leaves_experts_dense():
    model = tiny()
    report = quiet(model, nb.BlockSparseConfig(density=0.5, block=16))
    text = "experts are not pruned, only held in 4 or 8 bits"
    assert reasons(report)["model.layers.0.mlp.experts"] == text
    assert not experts_of(model)


def test_peft_reads_the_parameters_itself():
    peft = pytest.importorskip("peft", reason="the peft package is not installed")
    model = tiny()
    peft_config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["0.mlp.experts.gate_up_proj"]
    )
    wrapped = peft.get_peft_model(model, peft_config)
    report = quiet(wrapped, where="*mlp.experts*")
    (reason,) = [r for n, r in reasons(report).items() if "0.mlp.experts" in n]
    assert reason == "wrapped by ParamWrapper, which reads its gate_up_proj"
    assert len(experts_of(wrapped)) == 1
    wrapped(TOKENS)


# --- how it is replaced ---------------------------------------------------------------------------


def test_a_single_module_is_refused():
    for module in (dense_experts(), nb.Int4Experts(dense_experts())):
        with pytest.raises(ValueError, match="or Int4Experts.from_experts"):
            quiet(module)


def test_weights_of_two_modules_stay_dense():
    model = nn.ModuleList([Layer(dense_experts()), Layer(dense_experts())])
    model[1].experts.down_proj = model[0].experts.down_proj
    report = quiet(model)
    assert reasons(report) == {
        "0.experts": "its weight is tied to 1.experts, which stays dense",
        "1.experts": "its weight is tied to 0.experts, which stays dense",
    }


def test_a_module_in_two_places_is_replaced_in_both(tmp_path):
    def build(seed, tied=True):
        first = dense_experts(seed=seed)
        second = first if tied else dense_experts(seed=seed + 1)
        return nn.ModuleDict({"a": Layer(first), "b": Layer(second)})

    model = build(0)
    report = quiet(model)
    assert len(report) == 1
    assert model["a"].experts is model["b"].experts
    nb.save(model, tmp_path / "m")
    x, (index, scale) = torch.randn(3, 64), routing(3, 4, 2)
    for tied in (True, False):
        other = nb.load(tmp_path / "m", build(5, tied))
        assert (other["a"].experts is other["b"].experts) is tied
        for place in "ab":
            assert torch.equal(other[place](x, index, scale), model["a"](x, index, scale))
    untied = build(0, tied=False)
    quiet(untied)
    nb.save(untied, tmp_path / "m")
    with pytest.raises(ValueError, match="b.experts must be as a.experts in the file"):
        nb.load(tmp_path / "m", build(0))


def test_hooks_attributes_and_mode_move_along():
    model = Layer(dense_experts())
    model.experts.tag = {"rank": 3}
    model.train()
    seen = []
    handle = model.experts.register_forward_hook(lambda *args: seen.append(1))
    quiet(model)
    args = (torch.randn(2, 64), *routing(2, 4, 2))
    model(*args)
    handle.remove()
    model(*args)
    assert seen == [1]
    assert model.experts.tag == {"rank": 3}
    assert model.experts.training
    assert model.experts.num_experts == 4
    assert model.experts.down_proj.weight.dtype == torch.float32


def test_nothing_changes_when_a_weight_is_not_finite():
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 5, 7] = float("nan")
    modules = [id(m) for m in model.modules()]
    text = r"accelerate: model.layers.1.mlp.experts: down_proj: expert 3: .*finite"
    with pytest.raises(ValueError, match=text):
        quiet(model)
    assert [id(m) for m in model.modules()] == modules


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Mixtral", "DeepseekV3", "GptOss"])
def test_save_and_load_bitwise(name, tmp_path):
    model = tiny(name)
    quiet(model)
    with torch.no_grad():
        expected = model(TOKENS).logits
    nb.save(model, tmp_path / "m")
    nb.save(model, tmp_path / "again")
    assert (tmp_path / "m").read_bytes() == (tmp_path / "again").read_bytes()
    changed = tiny(name)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.zero_()
    accelerated = tiny(name)
    quiet(accelerated, nb.Int4Config(group_size=64, bits=8, symmetric=True))
    for other in (changed, accelerated):
        assert nb.load(tmp_path / "m", other) is other
        with torch.no_grad():
            assert torch.equal(other(TOKENS).logits, expected)
        assert other.state_dict().keys() == model.state_dict().keys()


def test_load_into_a_model_without_data(tmp_path):
    source = Layer(dense_experts("gpt_oss"))
    quiet(source)
    nb.save(source, tmp_path / "m")
    other = nb.load(tmp_path / "m", Layer(dense_experts("gpt_oss", seed=2).to("meta")))
    args = (torch.randn(3, 64), *routing(3, 4, 2))
    assert torch.equal(other(*args), source(*args))


def test_a_norm_behind_the_experts_is_saved_too(tmp_path):
    source = Layer(dense_experts("muse_spark"))
    quiet(source)
    nb.save(source, tmp_path / "m")
    other = nb.load(tmp_path / "m", Layer(dense_experts("muse_spark", seed=2)))
    args = (torch.randn(3, 64), *routing(3, 4, 2))
    assert torch.equal(other(*args), source(*args))


def test_files_that_do_not_fit(tmp_path):
    source = Layer(dense_experts())
    quiet(source)
    path = tmp_path / "m"
    nb.save(source, path)
    for other, text in [
        (Layer(dense_experts(experts=3)), r"file's down_proj \[4, 64, 96\], .* got down_proj \[3"),
        (Layer(dense_experts("nemotron_h")), r"got down_proj \[4, 64, 96\], up_proj \[4, 96, 64\]"),
        (Layer(nn.Identity()), "experts that can be held in 4 or 8 bits .* got Identity: Identity"),
        (nn.ModuleDict(), "be a module of experts in the model, got none"),
    ]:
        modules = list(other.modules())
        with pytest.raises(ValueError, match="load: experts must .*" + text):
            nb.load(path, other)
        assert [id(m) for m in other.modules()] == [id(m) for m in modules]
    dense = Layer(dense_experts())
    nb.save(dense, path)
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj must be dense as in the file"):
        nb.load(path, source)


# --- the rest of the package ----------------------------------------------------------------------


def loss_fn(model, batch):
    return model(batch, labels=batch).loss


def test_blocks_and_adapters_pass_experts_by(tmp_path):
    model = tiny()
    quiet(model, where="*.experts")
    selection = nb.select_blocks(model, [TOKENS], loss_fn, density=0.2, block=16)
    assert not any("experts" in name for name in selection.blocks)
    nb.sparse_update(model, selection)
    optimizer = nb.optim.MaskedAdamW(nb.trainable_parameters(model), lr=1e-2)
    before = loss_fn(model, TOKENS)
    before.backward()
    optimizer.step()
    assert loss_fn(model, TOKENS) < before
    nb.save(model, tmp_path / "update")
    other = tiny()
    quiet(other, where="*.experts")
    nb.load(tmp_path / "update", other)
    with torch.no_grad():
        assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)
    nb.unmask(model, revert=True)

    quiet(model)
    report = nb.add_adapters(model, nb.AdapterConfig(density=0.1, block=16))
    assert not any("experts" in row.name.rpartition(".")[2] for row in report)
    loss_fn(model, TOKENS).backward()
    nb.save(model, tmp_path / "adapter")
    other = tiny()
    quiet(other)
    nb.load(tmp_path / "adapter", other)
    with torch.no_grad():
        assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)
