"""The tables that `python -m nibblock report` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from nibblock._report import format_bytes
from nibblock._report_cli.facts import (
    Changes,
    Facts,
    FinetuneFacts,
    FolderFacts,
    GGUFFacts,
    LayerFacts,
    ModelFacts,
    TrainedFacts,
)
from nibblock._report_cli.measure import Measured
from nibblock.bench.table import render

SHORT = 12  # digits of a fingerprint, as in the messages of `load`


def facts_text(facts: Facts, layers: bool = False) -> str:
    """The facts of one path; with `layers` a row for each layer too."""
    show = {
        ModelFacts: _model,
        TrainedFacts: _trained,
        GGUFFacts: _gguf,
        FolderFacts: _folder,
        FinetuneFacts: _finetune,
    }[type(facts)]
    lines = show(facts)
    rows = facts.saved.rows if getattr(facts, "saved", None) else getattr(facts, "rows", ())
    if layers and rows:
        lines += ["", _layers(rows)]
    return "\n".join(lines)


def _share(value: Optional[float]) -> str:
    return "-" if value is None else f"{value:.2%}"


def _number(value: Optional[float]) -> str:
    return "-" if value is None else f"{value:.4g}"


def _written(facts: Any) -> str:
    by = f"nibblock {facts.library}" if facts.library else "a nibblock that did not say its version"
    return f"format {facts.version}, written by {by}, {format_bytes(facts.file_bytes)}"


def _model(facts: ModelFacts) -> list[str]:
    lines = [f"{facts.path}: a whole model, {_written(facts)}"]
    cells = [
        (
            kind,
            size["layers"],
            size["weights"],
            format_bytes(size["bytes"]),
            _share(size["of_float32"]),
            _share(size["of_bfloat16"]),
            _number(size["bits_per_weight"]),
        )
        for kind, size in facts.by_kind().items()
    ]
    head = ("kind", "layers", "weights", "bytes", "of float32", "of bfloat16", "bits a weight")
    lines.append(render(head, cells))
    groups = facts.summary()["groups"]
    if groups:
        parts = [f"{n} of {'a row' if g == '-1' else g}" for g, n in groups.items()]
        lines.append(f"layers by group: {', '.join(parts)}")
    if facts.tied:
        lines.append("tied: " + ", ".join(f"{a} to {b}" for a, b in facts.tied.items()))
    return lines


def _trained(facts: TrainedFacts) -> list[str]:
    values = facts.summary()
    adapter = facts.what == "adapters"
    what = f"adapter {facts.name!r}" if adapter else "a sparse update"
    kind = "adapter" if adapter else "masked"
    sizes = ", ".join(str(size) for size in values["block_sizes"])
    ranks = ", ".join(str(rank) for rank in values["ranks"] if rank)
    lines = [
        f"{facts.path}: {what}, {_written(facts)}",
        f"layers   {len(facts.rows)} {kind}, {len(facts.trained)} tensors besides",
        f"blocks   {facts.blocks} of {facts.all_blocks} ({_share(values['density'])} of these "
        f"layers) of size {sizes or '-'}" + (f", rank {ranks}" if ranks else ""),
        f"bytes    {format_bytes(values['bytes'][kind])} in layers ("
        f"{_share(values['of_float32'])} of their float32, {_share(values['of_bfloat16'])} of "
        f"bfloat16), {format_bytes(values['bytes']['dense'])} besides",
        f"base     {facts.base[:SHORT]} (all layers of the file together)",
        f"norm     {_number(facts.norm)} "
        + ("of what it adds" if adapter else "of the weights in its blocks"),
    ]
    for name, tensor in facts.trained.items():
        lines.append(f"besides  {name} {tensor['shape']} {tensor['dtype']}")
    return lines


def _layers(rows: Sequence[LayerFacts]) -> str:
    blocks = any(row.blocks is not None for row in rows)
    head = ["layer", "kind", "shape", "dtype", "bytes"]
    head += ["block", "blocks", "density", "rank", "norm", "base"] if blocks else ["group", "tied"]
    cells = []
    for row in rows:
        shape = " x ".join(str(size) for size in row.shape)
        line: list[Any] = [row.name, row.kind, shape, row.dtype, format_bytes(row.bytes)]
        if blocks:
            line += [_or_dash(row.block), _or_dash(row.blocks)]
            line += [_share(row.density), _or_dash(row.rank), _number(row.norm)]
            line.append((row.base or "-")[:SHORT])
        else:
            order = " reordered" if row.column_order else ""
            line += [f"{_or_dash(row.group_size)}{order}", row.tied or "-"]
        cells.append(line)
    return render(head, cells, left=(0, 1))


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _gguf(facts: GGUFFacts) -> list[str]:
    values = facts.summary()
    lines = [
        f"{facts.path}: GGUF of architecture {facts.architecture or 'unknown'}, "
        f"{format_bytes(facts.file_bytes)}, {values['weights']} weights, "
        f"{_number(values['bits_per_weight'])} bits a weight"
    ]
    cells = [
        (kind, t["tensors"], t["weights"], format_bytes(t["bytes"]))
        for kind, t in facts.types.items()
    ]
    lines.append(render(("type", "tensors", "weights", "bytes"), cells))
    if facts.layers is None:
        lines.append(f"load_gguf refuses it: it must {facts.refusal.partition(' must ')[2]}")
        return lines
    n = facts.layers
    lines.append(
        f"load_gguf: {n['int4']} tensors exactly in 4 bits, {n['int8']} exactly in 8, {n['dense']} "
        f"dense, {n['vectors']} norms and biases; {format_bytes(facts.bytes_here)} with dense ones "
        f"in float32"
    )
    return lines


def _folder(facts: FolderFacts) -> list[str]:
    dtypes = ", ".join(f"{name} {format_bytes(size)}" for name, size in facts.dtypes.items())
    lines = [
        f"{facts.path}: transformers folder, {facts.architecture or 'no architecture named'}, "
        f"{facts.parameters} parameters, {format_bytes(facts.file_bytes)} of weights"
        + (f" ({dtypes})" if dtypes else "")
    ]
    if facts.saved is not None:
        lines += _model(facts.saved)
    if facts.plan is not None:
        lines += ["accelerate(model) would do this:", str(facts.plan)]
    return lines


def _finetune(facts: FinetuneFacts) -> list[str]:
    from nibblock._finetune import report

    lines = [f"{facts.path}: runs of finetune, {format_bytes(facts.file_bytes)}"]
    if facts.results:
        lines.append(report.table(facts.results))
    for run in facts.runs:
        s = run.settings
        asked = ", ".join(f"{key} {s[key]}" for key in sorted(s) if s[key] not in ("", 0, False))
        kept = (
            "no whole checkpoint"
            if run.checkpoint_step is None
            else f"checkpoint of step {run.checkpoint_step}, {format_bytes(run.checkpoint_bytes)}"
        )
        left = f"; {run.file}, {format_bytes(run.file_bytes)}" if run.file else ""
        lines.append(f"{run.name}: {run.state}; {kept}{left}")
        lines.append(f"{run.name}: {asked}")
    return lines


def changes_text(found: Changes, layers: bool = False) -> str:
    """What changed from one file to another; every layer with `layers`, else those that did."""
    total = found.to_dict()
    rows = [
        row for row in (*found.rows, *found.trained)
        if layers or row.first_only or row.second_only or row.norm != 0
    ]  # fmt: skip
    over = "" if found.what == "adapters" else ", over the blocks that both hold"
    lines = [
        f"{found.first} -> {found.second}: {total['both']} blocks in both, {total['first_only']} "
        f"only in the first, {total['second_only']} only in the second; |second - first| over "
        f"|first|{over}: {_share(found.relative)}"
    ]
    if rows:
        cells = [
            (r.name, r.both, r.first_only, r.second_only, _number(r.norm), _share(r.relative))
            for r in rows
        ]
        head = ("layer", "both", "first only", "second only", "norm of difference", "of the first")
        lines.append(render(head, cells))
    same = len(found.rows) + len(found.trained) - len(rows)
    if same:
        lines.append(f"{same} layers are the same in both")
    return "\n".join(lines)


def measured_text(rows: Sequence[Measured], text: str) -> str:
    """One line a model, and what a reader must know beside it."""
    from nibblock import _native

    names = [Path(row.path).name for row in rows]
    names = names if len(set(names)) == len(names) else [row.path for row in rows]
    priced = rows[0].price is not None
    head = ["model", "base as", "perplexity", "prefill tok/s", "decode tok/s", "ms a token"]
    head += ["peak MB", "memory MB", "disk MB", "load s"]
    head += ["1 M read", "1 M written"] if priced else []
    cells = []
    for name, row in zip(names, rows):
        line = [
            name,
            row.form,
            "not finite" if row.perplexity is None else f"{row.perplexity:.4f}",
            f"{row.prefill_rate:.0f}",
            f"{row.decode_rate:.1f}",
            f"{1e3 / row.decode_rate:.2f}",
            *(f"{size / 1e6:.1f}" for size in (row.peak_bytes, row.bytes, row.disk_bytes)),
            f"{row.load_seconds:.2f}",
        ]
        if priced:
            line += [f"{row.cost(rate):.4g}" for rate in (row.prefill_rate, row.decode_rate)]
        cells.append(line)
    one = rows[0]
    lines = [
        render(head, cells, left=(0, 1)),
        f"perplexity of {one.text_tokens} tokens of {text} in windows of {one.window}; prefill of "
        f"{one.prefill_tokens}, decode of {one.decode_tokens} tokens: medians of "
        f"{len(one.prefill)} alternating rounds; {one.threads} threads, {_native.cpu_isa()}",
        "peak: resident memory of the model's own process above that of its imports, while it "
        "loads, reads a prompt and decodes",
        "times are of this machine at this moment: compare them within this table only",
    ]
    for name, row in zip(names, rows):
        sizes = [(r.window, r.prefill_tokens, r.decode_tokens) for r in (one, row)]
        if sizes[0] != sizes[1]:
            window, prefill, decode = sizes[1]
            lines.append(
                f"{name} has another context: windows of {window}, prefill of {prefill}, decode of "
                f"{decode} tokens"
            )
    if len({row.text_hash for row in rows}) > 1:
        lines.append("the tokenizers cut the text differently: perplexities do not compare")
    return "\n".join(lines)
