"""The facts of a whole model's file, from its header."""

from __future__ import annotations

from typing import Any

from nibblock._file_checks import check_fields
from nibblock._report_cli.facts import LayerFacts, ModelFacts
from nibblock._report_cli.tensor_file import TensorFacts, TensorFile
from nibblock._stored_parts import sections, units_of
from nibblock.ops._block_checks import grid

_FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_PACKED = {"rows": int, "columns": int, "group_size": int, "bits": int, "affine": bool}
_FIELDS = {
    "linear": {**_PACKED, "scale_dtype": str, "bias": bool},
    "embedding": {**_PACKED, "scale_dtype": str},
    "experts": {**_PACKED, "scale_dtype": str, "experts": int},
    "block_sparse": {"rows": int, "columns": int, "block": int, "bias": bool},
}


def describe_model(path: str, file: TensorFile) -> ModelFacts:
    """The facts of a model's file; `path` as it was given.

    Raises:
        ValueError: metadata or tensors are missing, or do not fit each other.
    """
    header = file.header()
    shared, used = header["shared"], set()
    rows = []
    for name, record in header["layers"].items():
        _check_record(file, name, record)
        source = shared.get(name, "")
        rows.append(_layer(file, name, record, source, used))
    tied = {key: str(other) for key, other in header["tied"].items()}
    for key, other in tied.items():
        file.need(other)
        if key in file.tensors:
            raise _damaged(file, f"{key} tied to {other} and also in the file")
    rest: dict[str, list[TensorFacts]] = {}
    for key, tensor in file.tensors.items():
        if key not in used:
            rest.setdefault(key.rpartition(".")[0] or key, []).append(tensor)
    rows += [_dense(name, tensors) for name, tensors in rest.items()]
    return ModelFacts(
        path=path,
        file_bytes=file.file_bytes,
        version=file.raw()["version"],
        library=file.library(),
        rows=tuple(rows),
        tied={**shared, **tied},
    )


def _damaged(file: TensorFile, got: str) -> ValueError:
    return ValueError(f"report: {file.path.name} must have whole metadata, got {got}")


def _check_record(file: TensorFile, name: str, record: Any) -> None:
    try:
        check_fields({name: record}, **_FIELDS[record["kind"]])
    except (KeyError, TypeError) as error:
        raise _damaged(file, repr(error)) from error
    sizes = [record["rows"], record["columns"], record.get("experts", 1)]
    if min(sizes) < 0 or record.get("bits", 4) not in (4, 8):
        raise _damaged(file, f"{name} of {sizes} in {record.get('bits')} bits")


def _layer(
    file: TensorFile, name: str, record: dict[str, Any], source: str, used: set[str]
) -> LayerFacts:
    rows, columns = record["rows"], record["columns"]
    shape, fields = (rows, columns), {}
    if record["kind"] == "block_sparse":
        parts, kind, module = ["values", "blocks"], "block-sparse", "linear"
        block = record["block"]
        values = file.need(f"{name}.values")
        blocks = values.shape[0] if values.shape else 0
        if values.shape != (blocks, block, block) or block < 1:
            raise _damaged(file, f"{name}.values of shape {list(values.shape)}, block {block}")
        if file.need(f"{name}.blocks").shape != (blocks, 2):
            raise _damaged(file, f"{name}.blocks for {blocks} blocks of another number")
        high, wide = grid(rows, columns, block)
        fields = {"block": block, "blocks": blocks, "all_blocks": high * wide}
        dtype = _FLOATS.get(values.dtype, values.dtype)
    else:
        parts, kind = ["qweight", "scales"] + ["offsets"] * record["affine"], f"int{record['bits']}"
        module, dtype = record["kind"], record["scale_dtype"]
        fields, stored_bits = {"group_size": record["group_size"]}, record["bits"]
        if record.get("palette"):
            parts.append("palette")
            stored_bits = 4
        if dtype == "int8":
            parts += map(units_of, sections(record))
        if module == "experts":
            shape = (record["experts"], rows, columns)
        if record.get("column_order"):
            order = file.need(f"{name}.column_order")
            if order.shape != (*shape[:-2], columns):
                raise _damaged(file, f"{name}.column_order of shape {list(order.shape)}")
            fields.update(column_order=True, fixed_bytes=order.bytes)
    own = [] if source else [f"{name}.{part}" for part in parts]
    weights = 0 if source else rows * columns * record.get("experts", 1)
    for part in parts:  # what a tied layer reads must be there too
        file.need(f"{source or name}.{part}")
    if kind.startswith("int"):
        codes = file.tensors[f"{source or name}.qweight"].shape
        if codes != (*shape[:-1], (columns * stored_bits + 7) // 8):
            raise _damaged(file, f"{name}.qweight of shape {list(codes)} for {list(shape)}")
    if fields.get("column_order"):
        own.append(f"{name}.column_order")
    if record.get("bias"):
        own.append(f"{name}.bias")
        weights += file.need(f"{name}.bias").numbers
    used.update(own)
    held = sum(file.tensors[key].bytes for key in own)
    return LayerFacts(
        name, kind, shape, held, weights, module=module, dtype=dtype, tied=source, **fields
    )


def _dense(name: str, tensors: list[TensorFacts]) -> LayerFacts:
    largest = max(tensors, key=lambda t: (len(t.shape) > 1, t.numbers))
    dtypes = dict.fromkeys(_FLOATS.get(t.dtype, t.dtype) for t in tensors)
    return LayerFacts(
        name,
        "dense" if len(largest.shape) > 1 else "vectors",
        largest.shape,
        sum(t.bytes for t in tensors),
        sum(t.numbers for t in tensors if t.is_float),
        fixed_bytes=sum(t.bytes for t in tensors if not t.is_float),
        dtype=", ".join(dtypes),
    )
