"""Experts modules of transformers at small sizes, and their forward in float64."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import torch
from reference import Weight
from torch import nn

# folder of transformers.models, class, gate of the oracle
KINDS = {
    "mixtral": ("MixtralExperts", "silu"),
    "qwen3_moe": ("Qwen3MoeExperts", "silu"),
    "deepseek_v3": ("DeepseekV3Experts", "silu"),
    "olmoe": ("OlmoeExperts", "silu"),
    "jamba": ("JambaExperts", "silu"),
    "phimoe": ("PhimoeExperts", "silu"),
    "granitemoe": ("GraniteMoeExperts", "silu"),
    "lfm2_moe": ("Lfm2MoeExperts", "silu"),  # its act_fn is a function
    "aria": ("AriaExperts", "silu"),  # transposed
    "gpt_oss": ("GptOssExperts", "interleaved"),  # transposed, biases, a gate of its own
    "openai_privacy_filter": ("OpenAIPrivacyFilterExperts", "clamped"),
    "minimax_m3_vl": ("MiniMaxM3VLExperts", "clamped"),
    "deepseek_v4": ("DeepseekV4Experts", "clamped_silu"),
    "nemotron_h": ("NemotronHExperts", "relu2"),  # no gate
    "muse_spark": ("MuseSparkExperts", "silu"),  # a norm behind down_proj
}
ALPHA, LIMIT = 1.702, 0.8


def dense_experts(kind="mixtral", experts=4, hidden=64, inner=96, dtype=torch.float32, seed=0):
    """A dense experts module that runs transformers' eager forward."""
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    config = SimpleNamespace(
        **dict.fromkeys(
            ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), experts
        ),
        **dict.fromkeys(("hidden_size", "moe_hidden_size"), hidden),
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), inner),
        moe_latent_size=None,
        hidden_act="silu",
        mlp_hidden_act="relu2",
        swiglu_alpha=ALPHA,
        swiglu_limit=LIMIT,
        post_norm_eps=1e-5,
        _experts_implementation="eager",
    )
    out = getattr(module, KINDS[kind][0])(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in out.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return out.to(dtype).eval()


class Layer(nn.Module):
    """What `accelerate` takes: a tree with experts in it."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, *args):
        return self.experts(*args)


def routing(tokens, experts, slots, seed=0, dtype=torch.float32):
    """(top_k_index, top_k_weights) as a router gives them."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator).softmax(-1)
    values, index = scores.topk(slots, -1)
    return index, values.to(dtype)


def dequantised(module) -> dict[str, torch.Tensor]:
    """Each projection in float64 [E, N, K], from the state dict and the formula alone."""
    out = {}
    state = module.state_dict()
    for name, projection in module.projections.items():
        parts = [state.get(f"{name}.{part}") for part in ("qweight", "scales", "offsets")]
        columns, form = projection._columns, (projection.group_size, projection.bits)
        dense = []
        for index in range(len(parts[0])):
            arrays = [None if part is None else part[index].numpy() for part in parts]
            dense.append(torch.from_numpy(Weight(*arrays, columns, *form).dense()))
        out[name] = torch.stack(dense)
    return out


def gate64(how: str, up: torch.Tensor) -> torch.Tensor:
    if how == "relu2":
        return up.relu().square()
    if how == "interleaved":
        gate, up = up[::2], up[1::2]
    else:
        gate, up = up.chunk(2)
    if how != "silu":
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
    if how in ("silu", "clamped_silu"):
        return gate / (1 + (-gate).exp()) * up
    return gate / (1 + (-ALPHA * gate).exp()) * (up + 1)


def forward64(kind, weights, module, x, index, scale) -> torch.Tensor:
    """One token and one slot after the other, in float64; weights: [E, N, K] by name."""
    up, down = weights.values()
    biases = [p.double() for name, p in module.named_parameters() if name.endswith("_bias")]
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        for j in range(index.shape[1]):
            e = int(index[t, j])
            if e == len(up):
                continue
            h = up[e] @ x[t].double()
            h = gate64(KINDS[kind][1], h + biases[0][e] if biases else h)
            y = down[e] @ h
            y = y + biases[1][e] if biases else y
            if kind == "muse_spark":
                norm = module.post_expert_norm
                y = y * (1 + norm.weight.double())
                y = y / (y.square().mean() + norm.eps).sqrt()
            out[t] += scale[t, j].double() * y
    return out.detach()


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the whole tensor, relative to its norm."""
    y, expected = y.detach().double(), expected.detach().double()
    size = expected.norm()
    return float((y - expected).norm() / size) if size else float(y.norm())
