"""One sentence per mistake, the same from the typed function, the fake and the raw operator.

The typed function and the fake raise TypeError or ValueError; torch.ops.nibblock.* raises
RuntimeError, all that the stable ABI can raise. Nothing is changed by a call that raises.
"""

from __future__ import annotations

import nibblock as nb
import numpy as np
import pytest
import reference as ref
import torch
from harness import native, packed_of, torch_packed
from nibblock.ops._checks import format_code
from torch._subclasses.fake_tensor import FakeTensorMode

WEIGHT = ref.random_weight(np.random.default_rng(40), 20, 100, 32, 4, True)
PACKED = torch_packed(WEIGHT)
FORMAT = {"group_size": 32, "bits": 4, "affine": True, "scale_dtype": torch.float32}

# What each op is called with when all is well; the order is the schema's.
GOOD = {
    "int4_linear": {
        "x": torch.ones(3, 100),
        "packed": PACKED,
        "bias": torch.ones(20),
        "out_features": 20,
        **FORMAT,
        "compute": "bf16",
    },
    "int4_linear_dx": {
        "grad": torch.ones(3, 20),
        "packed": PACKED,
        "in_features": 100,
        **FORMAT,
        "compute": "bf16",
    },
    "int4_dequantize": {
        "packed": PACKED,
        "out_features": 20,
        "in_features": 100,
        **FORMAT,
        "dtype": torch.float32,
    },
    "int4_embedding": {
        "indices": torch.tensor([[1, 2], [0, 19]]),
        "packed": PACKED,
        "num_embeddings": 20,
        "embedding_dim": 100,
        **FORMAT,
        "dtype": torch.float32,
    },
}

BLOB = [PACKED.numel()]
FLOATS = "must be float32, bfloat16 or float16"


def size_sentence(n, k, group=32, bits=4, affine=True, scale="float32", got=BLOB):
    """What a blob of another size than its format's is answered with."""
    need = ref.geometry(n, k, group, bits, affine, scale)["bytes"]
    return (
        f"packed must be a contiguous [{need}] for out_features={n}, in_features={k}, "
        f"group_size={group}, bits={bits}, affine={affine}, got {got}"
    )


# (op, what is changed, exception, sentence)
CASES = [
    ("int4_linear", {"x": torch.ones(3, 100).long()}, TypeError, f"x {FLOATS}, got int64"),
    ("int4_linear", {"x": torch.ones(3, 100).double()}, TypeError, f"x {FLOATS}, got float64"),
    ("int4_linear", {"x": torch.ones(3, 100).bool()}, TypeError, f"x {FLOATS}, got bool"),
    ("int4_linear", {"x": torch.ones(3, 100).cfloat()}, TypeError, f"x {FLOATS}, got complex64"),
    (
        "int4_linear",
        {"x": torch.tensor(1.0)},
        ValueError,
        "x must have at least 1 dimension, got a scalar",
    ),
    ("int4_linear", {"bias": torch.ones(20).long()}, TypeError, f"bias {FLOATS}, got int64"),
    ("int4_linear", {"bias": torch.ones(21)}, ValueError, "bias must be [20], got [21]"),
    ("int4_linear", {"bias": torch.ones(1, 20)}, ValueError, "bias must be [20], got [1, 20]"),
    ("int4_linear", {"bias": torch.tensor(1.0)}, ValueError, "bias must be [20], got []"),
    ("int4_linear", {"x": torch.ones(3, 129)}, ValueError, size_sentence(20, 129)),
    ("int4_linear", {"x": torch.ones(0, 0)}, ValueError, size_sentence(20, 0)),
    ("int4_linear", {"out_features": 33}, ValueError, size_sentence(33, 100)),
    ("int4_linear", {"out_features": 0, "bias": None}, ValueError, size_sentence(0, 100)),
    ("int4_linear", {"bits": 8}, ValueError, size_sentence(20, 100, bits=8)),
    ("int4_linear", {"affine": False}, ValueError, size_sentence(20, 100, affine=False)),
    (
        "int4_linear",
        {"scale_dtype": torch.float16},
        ValueError,
        size_sentence(20, 100, scale="float16"),
    ),
    ("int4_linear", {"out_features": -1}, ValueError, "out_features must be at least 0, got -1"),
    *[
        (op, {"packed": PACKED.view(torch.int8)}, TypeError, "packed must be uint8, got int8")
        for op in GOOD
    ],
    *[
        (
            op,
            {"packed": PACKED.view(2, -1)},
            ValueError,
            size_sentence(20, 100, got=[2, PACKED.numel() // 2]),
        )
        for op in GOOD
    ],
    *[
        (
            op,
            {"group_size": group},
            ValueError,
            f"group_size must be 32, 64, 128, 256 or -1 (whole row), got {group}",
        )
        for op in GOOD
        for group in (0, 16, 96, -2)
    ],
    *[
        (
            op,
            {"group_size": group, "bits": 8},
            ValueError,
            f"group_size must be 16, 32, 64, 128, 256 or -1 (whole row), got {group}",
        )
        for op in GOOD
        for group in (0, 8, 48)
    ],
    *[(op, {"bits": 3}, ValueError, "bits must be 4 or 8, got 3") for op in GOOD],
    *[
        (
            op,
            {"scale_dtype": torch.bfloat16},
            TypeError,
            "scale_dtype must be float16, float32 or int8, got bfloat16",
        )
        for op in GOOD
    ],
    *[
        (op, {"compute": "fp8"}, ValueError, 'compute must be "bf16" or "int8", got "fp8"')
        for op in ("int4_linear", "int4_linear_dx")
    ],
    *[
        (op, {"dtype": torch.float64}, TypeError, f"dtype {FLOATS}, got float64")
        for op in ("int4_dequantize", "int4_embedding")
    ],
    ("int4_linear_dx", {"grad": torch.ones(3, 20).long()}, TypeError, f"grad {FLOATS}, got int64"),
    (
        "int4_linear_dx",
        {"grad": torch.tensor(1.0)},
        ValueError,
        "grad must have at least 1 dimension, got a scalar",
    ),
    ("int4_linear_dx", {"grad": torch.ones(3, 33)}, ValueError, size_sentence(33, 100)),
    ("int4_linear_dx", {"in_features": 300}, ValueError, size_sentence(20, 300)),
    ("int4_linear_dx", {"in_features": -5}, ValueError, "in_features must be at least 0, got -5"),
    ("int4_dequantize", {"in_features": 300}, ValueError, size_sentence(20, 300)),
    (
        "int4_embedding",
        {"num_embeddings": 40},
        ValueError,
        size_sentence(40, 100),
    ),
    (
        "int4_embedding",
        {"indices": torch.ones(2)},
        TypeError,
        "indices must be int64 or int32, got float32",
    ),
    (
        "int4_embedding",
        {"embedding_dim": -1},
        ValueError,
        "in_features must be at least 0, got -1",
    ),
]


def name_of(case):
    op, changed, _, _ = case
    value = next(iter(changed.values()))
    text = f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else str(value)
    return f"{op}-{next(iter(changed))}-{text}".replace("torch.", "")


def tensors(arguments):
    return {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("op, changed, error, sentence", CASES, ids=map(name_of, CASES))
def test_one_sentence_from_three_places(op, changed, error, sentence):
    arguments = {**GOOD[op], **changed}
    before = {k: (v.clone(), v._version) for k, v in tensors(arguments).items()}
    full = f"{op}: {sentence}"

    typed = dict(arguments)
    first = [typed.pop(k) for k in list(typed)[: 2 if "packed" in list(typed)[1:2] else 1]]
    with pytest.raises(error) as typed_error:
        getattr(nb.ops, op)(*first, **typed)
    assert str(typed_error.value) == full

    raw = getattr(torch.ops.nibblock, op)
    with pytest.raises(RuntimeError) as raw_error:
        raw(*arguments.values())
    assert full in str(raw_error.value)

    meta = [v.to("meta") if isinstance(v, torch.Tensor) else v for v in arguments.values()]
    with pytest.raises(error) as meta_error:
        raw(*meta)
    assert str(meta_error.value) == full

    with FakeTensorMode() as mode, pytest.raises(error) as fake_error:
        raw(
            *[mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in arguments.values()]
        )
    assert str(fake_error.value) == full

    for k, v in tensors(arguments).items():
        assert v._version == before[k][1], f"{k} was written to"
        assert torch.equal(v, before[k][0])


@pytest.mark.parametrize("op", list(GOOD))
def test_the_good_calls_are_good(op):
    """What the cases above start from works, and its fake has the same shape, dtype and strides."""
    raw = getattr(torch.ops.nibblock, op)
    y = raw(*GOOD[op].values())
    meta = raw(*[v.to("meta") if isinstance(v, torch.Tensor) else v for v in GOOD[op].values()])
    assert meta.is_meta
    assert (meta.shape, meta.dtype, meta.stride()) == (y.shape, y.dtype, y.stride())


def test_the_twin_speaks_as_the_op():
    for op, changed, _, sentence in CASES:
        if op == "int4_linear":
            # (a format that cannot be is refused where it would become a code)
            x, packed, bias, *form = {**GOOD[op], **changed}.values()
            with pytest.raises((RuntimeError, TypeError, ValueError)) as error:
                torch.ops.nibblock._int4_linear_forward(x, packed, bias, format_code(*form))
            assert f"int4_linear: {sentence}" in str(error.value)


@pytest.mark.parametrize("op, other", [
    ("int4_linear", "packed"),
    ("int4_linear", "bias"),
    ("int4_linear_dx", "packed"),
    ("int4_embedding", "packed"),
])  # fmt: skip
def test_tensors_on_two_devices(op, other):
    first = next(iter(GOOD[op]))
    for moved, stays in ((other, first), (first, other)):
        arguments = {**GOOD[op], moved: GOOD[op][moved].to("meta")}
        where = {k: v.device for k, v in tensors(arguments).items()}
        wrong = next(k for k in where if where[k] != where[first])
        full = f"{op}: {wrong} must be on {where[first]}, where {first} is, got {where[wrong]}"
        typed = dict(arguments)
        head = [typed.pop(first), typed.pop("packed")]
        with pytest.raises(ValueError) as error:
            getattr(nb.ops, op)(*head, **typed)
        assert str(error.value) == full, f"{moved} on meta, {stays} on cpu"
        with pytest.raises((RuntimeError, ValueError)) as error:
            getattr(torch.ops.nibblock, op)(*arguments.values())
        assert full in str(error.value)


@pytest.mark.parametrize("index", [-1, 20, 2**40, -(2**62)])
def test_indices_out_of_range(index):
    """Refused before anything is read; only a fake, which sees no values, lets them pass."""
    arguments = {**GOOD["int4_embedding"], "indices": torch.tensor([0, index, 3])}
    full = f"int4_embedding: indices must be in [0, 20), got {index}"
    typed = dict(arguments)
    head = [typed.pop("indices"), typed.pop("packed")]
    with pytest.raises(ValueError) as error:
        nb.ops.int4_embedding(*head, **typed)
    assert str(error.value) == full
    with pytest.raises(RuntimeError) as error:
        torch.ops.nibblock.int4_embedding(*arguments.values())
    assert full in str(error.value)


@pytest.mark.parametrize("op", list(GOOD))
def test_not_a_tensor(op):
    arguments = dict(GOOD[op])
    head = [arguments.pop(k) for k in list(arguments)[: 2 if op != "int4_dequantize" else 1]]
    for i in range(len(head)):
        wrong = [[1.0, 2.0] if i == j else v for j, v in enumerate(head)]
        with pytest.raises(TypeError, match=f"^{op}: .* must be a Tensor, got list"):
            getattr(nb.ops, op)(*wrong, **arguments)


@pytest.mark.parametrize("op, changed, error, sentence", [
    ("int4_linear", {"out_features": 20.0}, TypeError, "out_features must be int, got float"),
    ("int4_linear", {"out_features": "20"}, TypeError, "out_features must be int, got str"),
    ("int4_linear", {"bits": 4.0}, TypeError, "bits must be int, got float"),
    ("int4_linear", {"group_size": 32.0}, TypeError, "group_size must be int, got float"),
    ("int4_linear", {"compute": None}, ValueError, 'compute must be "bf16" or "int8", got None'),
    ("int4_linear_dx", {"in_features": 1e2}, TypeError, "in_features must be int, got float"),
    ("int4_linear_dx", {"compute": 8}, ValueError, 'compute must be "bf16" or "int8", got 8'),
    ("int4_dequantize", {"in_features": 1e2}, TypeError, "in_features must be int, got float"),
    ("int4_embedding", {"embedding_dim": 1e2}, TypeError, "in_features must be int, got float"),
])  # fmt: skip
def test_options_of_another_type(op, changed, error, sentence):
    """The dispatcher refuses them in five lines; the typed function says it in one."""
    typed = {**GOOD[op], **changed}
    head = [typed.pop(k) for k in list(typed)[: 2 if op != "int4_dequantize" else 1]]
    with pytest.raises(error) as caught:
        getattr(nb.ops, op)(*head, **typed)
    assert str(caught.value) == f"{op}: {sentence}"


CODES = (torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 2), torch.ones(4, 2))
PACK = {"in_features": 64, "group_size": 32}
UNPACK = {"out_features": 20, "in_features": 100, **FORMAT}
WIDE = torch.tensor([[0.0] * 32, [3e38, -3e38] * 16])
META = "must hold data, got a tensor on the meta device"


@pytest.mark.parametrize("call, error, text", [
    (lambda: nb.ops.int4_pack(None, *CODES[1:], **PACK), TypeError,
     "int4_pack: qweight must be a Tensor, got NoneType"),
    (lambda: nb.ops.int4_pack(CODES[0], None, **PACK), TypeError,
     "int4_pack: scales must be a Tensor, got NoneType"),
    (lambda: nb.ops.int4_pack(*CODES[:2], [1.0], **PACK), TypeError,
     "int4_pack: offsets must be a Tensor, got list"),
    (lambda: nb.ops.int4_pack(*CODES, **{**PACK, "in_features": 64.0}), TypeError,
     "int4_pack: in_features must be int, got float"),
    (lambda: nb.ops.int4_pack(*[t.to("meta") for t in CODES], **PACK), ValueError,
     f"int4_pack: qweight {META}"),
    (lambda: nb.ops.int4_unpack(PACKED.to("meta"), **UNPACK), ValueError,
     f"int4_unpack: packed {META}"),
    (lambda: nb.ops.int4_quantize(torch.ones(4, 64).to("meta"), group_size=32), ValueError,
     f"int4_quantize: weight {META}"),
    (lambda: nb.ops.int4_quantize(torch.ones(4, 64), group_size=32, importance=[1.0] * 64),
     TypeError, "int4_quantize: importance must be a Tensor, got list"),
    (lambda: nb.ops.int4_quantize(torch.full((4, 64), torch.inf), group_size=32), ValueError,
     "int4_quantize: weight must be finite, got inf in row 0, column 0"),
    (lambda: nb.ops.int4_quantize(torch.ones(4, 64), group_size=32, progress=3), TypeError,
     "int4_quantize: progress must be None or a callable(done, total), got int"),
    *[(lambda bits=bits, method=method: nb.ops.int4_quantize(
        WIDE, group_size=32, bits=bits, method=method), ValueError,
       "int4_quantize: weight must span at most 3.4e38 (float32's largest number) in every group, "
       "got more in row 1, group 0; scale the weight")
      for bits in (4, 8) for method in ("rtn", "mse")],
])  # fmt: skip
def test_packing_and_quantising_refuse_in_one_line(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text


@pytest.mark.parametrize("bits", [4, 8])
def test_the_widest_weights_come_back_finite(bits):
    for weight, symmetric in ((WIDE, True), (WIDE / 2, False)):
        parts = nb.ops.int4_quantize(weight, group_size=32, bits=bits, symmetric=symmetric)
        form = {"in_features": 32, "group_size": 32, "bits": bits}
        packed = nb.ops.int4_pack(*parts, **form)
        form.update(affine=not symmetric, scale_dtype=torch.float32)
        back = nb.ops.int4_dequantize(packed, out_features=2, **form)
        torch.testing.assert_close(back, weight, rtol=0.2, atol=0)


def test_the_sentence_survives_compilation():
    """Under torch.compile(fullgraph=True) the fake's words reach the user."""

    def call(x):
        good = {**GOOD["int4_linear"], "x": x}
        return torch.ops.nibblock.int4_linear(*good.values())

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with pytest.raises(
        RuntimeError, match=r"int4_linear: x must be float32, bfloat16 or float16, got int64"
    ):
        compiled(torch.ones(3, 100).long())


def test_native_module_refuses_before_it_writes():
    x, packed = np.ones((2, 100), np.float32), packed_of(WEIGHT)
    y = np.full((2, 20), 5, np.float32)

    def run(**changed):
        call = {"x": x, "packed": packed, "bias": None, "compute": "bf16", "y": y, **WEIGHT.format}
        native.int4_linear_run("forward", None, **{**call, **changed})

    for changed, error, words in (
        ({"x": x[:, :99]}, ValueError, "x must be"),
        ({"x": x.astype(np.float64)}, TypeError, "x must be"),
        ({"x": x.T.copy().T}, ValueError, "x must be contiguous"),
        ({"packed": packed[:-1]}, ValueError, "packed must be"),
        ({"packed": packed.view(np.int8)}, TypeError, "packed must be uint8"),
        ({"bias": np.ones(19, np.float32)}, ValueError, "bias must be"),
        ({"bias": np.ones(20)}, TypeError, "bias must be"),
        ({"y": y[:, :19]}, ValueError, "y must be"),
        ({"y": y.astype(np.float16)}, TypeError, "y must be"),
        ({"compute": "fp8"}, ValueError, "compute must be"),
        ({"group_size": 48}, ValueError, "group_size must be"),
        ({"bits": 5}, ValueError, "bits must be"),
        ({"scale_dtype": "bfloat16"}, TypeError, "scale_dtype must be"),
        ({"x_dtype": "bfloat16"}, TypeError, "x_dtype must be"),
        ({"threads": 0}, ValueError, "threads must be"),
        ({"out_features": -1}, ValueError, "out_features must be"),
    ):
        with pytest.raises(error, match=f"^int4_linear_run: {words}.*, got "):
            run(**changed)
        assert (y == 5).all(), changed
    run()
    assert (y != 5).any()
