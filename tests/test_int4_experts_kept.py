"""Which experts `accelerate` leaves dense, and the reasons that its report gives."""

from __future__ import annotations

import nibblock as nb
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

transformers = pytest.importorskip(
    "transformers", reason="the transformers package is not installed"
)

from expert_samples import Layer, dense_experts  # noqa: E402


def quiet(model):
    return nb.accelerate(model, nb.Int4Config(group_size=32), progress=False)


class OwnExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 64, 64))


def changed(change, kind="mixtral"):
    experts = dense_experts(kind)
    change(experts)
    return Layer(experts)


def swapped(name, value):
    def change(experts):
        experts._parameters[name] = nn.Parameter(value)

    return change


class Subclass(type(dense_experts())):
    def helper(self):
        return 0


class Overridden(type(dense_experts())):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(hidden_states, top_k_index, top_k_weights) * 2


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


KEPT = {
    "OwnExperts is not decorated": lambda: Layer(OwnExperts()),
    "Subclass has helper of its own": lambda: changed(lambda e: setattr(e, "__class__", Subclass)),
    "Overridden has a forward of its own": lambda: changed(
        lambda e: setattr(e, "__class__", Overridden)
    ),
    "MixtralExperts has a forward of its own": lambda: changed(
        lambda e: e.__dict__.update(forward=None)
    ),
    "MixtralExperts has a _apply_gate of its own": lambda: changed(
        lambda e: e.__dict__.update(_apply_gate=None)
    ),
    "its weights are parametrised": lambda: changed(
        lambda e: parametrize.register_parametrization(e, "down_proj", Half())
    ),
    "its weights are on the meta device": lambda: changed(lambda e: e.to("meta")),
    "its gate_up_proj is float64": lambda: changed(lambda e: e.double()),
    "its down_proj is [4, 64, 95], not": lambda: changed(
        swapped("gate_up_proj", torch.zeros(4, 192, 64))
    ),
    "its weights are empty": lambda: changed(swapped("down_proj", torch.zeros(4, 64, 0))),
    "its down_proj is [4, 64], not a matrix": lambda: changed(
        swapped("down_proj", torch.zeros(4, 64))
    ),
    "its down_proj is not a Parameter": lambda: changed(
        lambda e: e.register_parameter("down_proj", None)
    ),
    "holds more than its projections: scale": lambda: changed(
        lambda e: e.register_parameter("scale", nn.Parameter(torch.ones(4)))
    ),
    "holds more than its projections: seen": lambda: changed(
        lambda e: e.register_buffer("seen", torch.ones(4))
    ),
    "its down_proj_bias is not a Parameter": lambda: changed(
        lambda e: e.register_parameter("down_proj_bias", None), "gpt_oss"
    ),
    "its experts are spread over processes": lambda: changed(
        lambda e: e.__dict__.update(_is_expert_parallel=True)
    ),
    "hooks on its state dict": lambda: changed(
        lambda e: e.register_state_dict_post_hook(lambda *args: None)
    ),
    "it has no is_transposed": lambda: changed(lambda e: e.__dict__.pop("is_transposed")),
}


@pytest.mark.parametrize("text", KEPT)
def test_what_is_kept_and_why(text):
    model = KEPT[text]()
    if text == "its down_proj is [4, 64, 95], not":
        model.experts.down_proj = nn.Parameter(torch.zeros(4, 64, 95))
        text = "its gate_up_proj is [4, 192, 64], not [4, 190, 64]"
    experts = model.experts
    report = quiet(model)
    assert model.experts is experts
    (row,) = report
    assert row.name == "experts"
    assert text in row.reason
    assert row.bytes_before == row.bytes_after
    assert str(report)


def test_other_experts_of_transformers_are_kept():
    from transformers.models.dbrx.modeling_dbrx import DbrxExpertGLU
    from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextExperts

    config = Llama4TextConfig(hidden_size=32, intermediate_size=32, num_local_experts=2)
    glu = DbrxExpertGLU(
        transformers.models.dbrx.configuration_dbrx.DbrxFFNConfig(
            hidden_size=32, ffn_hidden_size=32, moe_num_experts=2
        )
    )
    report = quiet(nn.ModuleDict({"llama4": Llama4TextExperts(config), "dbrx": glu}))
    for row in report:
        assert "not decorated with transformers' use_experts_implementation" in row.reason
    assert [row.shape for row in report] == [(2, 32, 64), (64, 32)]
