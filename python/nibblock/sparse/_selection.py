"""`Selection`: which blocks of which layers to train, with the scores that chose them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import torch

from nibblock.ops import _block_checks

KIND = "selection"
_VERSION = 1
_LONG = 40  # rows of a table above which layers of one pattern share a line


@dataclass
class Selection(Mapping[str, torch.Tensor]):
    """Layer name -> int32 [Z, 2] (row block, column block), for the layers that have any.

    What `add_adapters(blocks=)` and `sparse_update` take. Prints as a table.

    Attributes:
        blocks: the mapping itself, in forward order; sorted by row block, then column block.
        scores: layer name -> float32 [ceil(N/B), ceil(K/B)] of every layer that was considered, in
            forward order; what was compared.
        shapes: layer name -> (N, K), of the same layers.
        block: B. method: what the scores are.
        first: the lowest trained layer in forward order; "" if nothing is selected.
        depth_cut: share of the backward's input gradients that need not be computed, because no
            block below `first` is trained.
        predicted_time: a training step's time over full fine-tuning's, by the cost model; None
            where no forward was seen (magnitude and random without batches).
        seconds: what the scoring took, forward and backward included.
        bytes: memory of the statistics while scoring, all shards together.
        skipped: layer name -> why it was not considered.
        options: the arguments of the call that made it.
    """

    blocks: dict[str, torch.Tensor]
    scores: dict[str, torch.Tensor]
    shapes: dict[str, tuple[int, int]]
    block: int
    method: str
    first: str = ""
    depth_cut: float = 0.0
    predicted_time: Optional[float] = None
    seconds: float = 0.0
    bytes: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __eq__(self, other: object) -> bool:
        """Whether the same blocks of the same size are chosen."""
        if not isinstance(other, Selection):
            return NotImplemented
        return (
            self.block == other.block
            and list(self) == list(other)
            and all(torch.equal(self[name], other[name]) for name in self)
        )

    # --- figures ---------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """How many blocks are selected."""
        return sum(len(index) for index in self.blocks.values())

    @property
    def total(self) -> int:
        """How many blocks the considered layers have."""
        return sum(self._blocks_of(name) for name in self.shapes)

    @property
    def density(self) -> float:
        """The selected share of them."""
        return self.count / max(1, self.total)

    def _blocks_of(self, name: str) -> int:
        rows, columns = _block_checks.grid(*self.shapes[name], self.block)
        return rows * columns

    def mask(self, name: str) -> torch.Tensor:
        """The choice in one considered layer as bool [ceil(N/B), ceil(K/B)]."""
        out = torch.zeros(_block_checks.grid(*self.shapes[name], self.block), dtype=torch.bool)
        index = self.blocks.get(name)
        if index is not None:
            out[index[:, 0].long(), index[:, 1].long()] = True
        return out

    def overlap(self, other: Selection) -> float:
        """The share of this selection's blocks that the other one has too."""
        both = sum(
            int((self.mask(name) & other.mask(name)).sum()) for name in self if name in other
        )
        return both / max(1, self.count)

    # --- text ------------------------------------------------------------------------------------

    def __str__(self) -> str:
        whole = sum(float(s.clamp(min=0).sum()) for s in self.scores.values())
        groups: dict[tuple, list[str]] = {}
        fold = len(self.shapes) > _LONG
        for name, shape in self.shapes.items():
            pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name) if fold else name
            groups.setdefault((pattern, shape), []).append(name)
        lines = [("layer", "shape", "blocks", "of", "density", "score")]
        for (pattern, shape), names in groups.items():
            chosen = sum(len(self.blocks.get(n, ())) for n in names)
            of = sum(self._blocks_of(n) for n in names)
            caught = sum(float(self.scores[n][self.mask(n)].clamp(min=0).sum()) for n in names)
            lines.append(
                (
                    pattern if len(names) == 1 else f"{pattern} x{len(names)}",
                    f"{shape[0]} x {shape[1]}",
                    str(chosen),
                    str(of),
                    f"{100 * chosen / max(1, of):.2f}%",
                    f"{100 * caught / whole:.1f}%" if whole > 0 else "-",
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(6)]
        table = [
            "  ".join(
                [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]
            )
            for line in lines
        ]
        table.insert(1, "-" * len(table[0]))
        return "\n".join([*table, self._summary()])

    def _summary(self) -> str:
        text = f"{self.count} of {self.total} blocks of {self.block} ({100 * self.density:.2f}%)"
        text += f" by {self.method}, in {len(self)} of {len(self.shapes)} layers"
        if self.first:
            text += f"; lowest {self.first}, {100 * self.depth_cut:.0f}% of the backward not needed"
        if self.predicted_time is not None:
            text += f"; a step {self.predicted_time:.2f} of full fine-tuning's"
        if self.seconds:
            text += f"; scored in {self.seconds:.1f} s with {self.bytes} bytes"
        return text

    def __repr__(self) -> str:
        return f"<nibblock selection: {self._summary()}>"

    # --- files -----------------------------------------------------------------------------------

    def save(self, path: Union[str, os.PathLike]) -> None:
        """Writes a safetensors file: blocks and scores, and everything else as JSON in its header.

        The file appears whole or not at all. Raises ImportError without safetensors, OSError as the
        file system says.
        """
        from nibblock import _files

        safetensors = _files._safetensors()
        tensors = {f"blocks.{n}": t for n, t in self.blocks.items()}
        tensors.update({f"scores.{n}": t for n, t in self.scores.items()})
        header = {
            "kind": KIND,
            "version": _VERSION,
            "block": self.block,
            "method": self.method,
            "layers": list(self.blocks),
            "shapes": {n: list(s) for n, s in self.shapes.items()},
            "first": self.first,
            "depth_cut": self.depth_cut,
            "predicted_time": self.predicted_time,
            "seconds": self.seconds,
            "bytes": self.bytes,
            "skipped": self.skipped,
            "options": self.options,
        }
        _files._write(Path(path), _files._pack(safetensors, tensors, header))

    @classmethod
    def load(cls, path: Union[str, os.PathLike]) -> Selection:
        """Reads a file of `save`.

        Raises:
            ValueError: not such a file, or a damaged one. FileNotFoundError: no such file.
            ImportError: safetensors is not installed.
        """
        from nibblock import _files

        op = "Selection.load"
        safetensors = _files._safetensors()
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{op}: path must name a file, got {str(path)!r}")
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(_files._KEY, "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (safetensors.SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{op}: {path.name} must be a whole file, got: {error}") from error
        if header.get("kind") != KIND:
            raise ValueError(f"{op}: {path.name} must be written by Selection.save, got another")
        if header.get("version") != _VERSION:
            raise ValueError(
                f"{op}: {path.name} must be of version {_VERSION}, got "
                f"{header.get('version')!r}; update nibblock"
            )
        try:
            shapes = {n: (int(s[0]), int(s[1])) for n, s in header["shapes"].items()}
            blocks = {n: tensors[f"blocks.{n}"] for n in header["layers"]}
            for name, index in blocks.items():
                _block_checks.check_blocks(op, index, *shapes[name], header["block"])
            return cls(
                blocks=blocks,
                scores={n: tensors[f"scores.{n}"] for n in shapes},
                shapes=shapes,
                **{
                    key: header[key]
                    for key in (
                        "block", "method", "first", "depth_cut", "predicted_time", "seconds",
                        "bytes", "skipped", "options",
                    )
                },
            )  # fmt: skip
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{op}: {path.name} must be whole, got: {error!r}") from error

    # --- picture ---------------------------------------------------------------------------------

    def plot(self, path: Union[str, os.PathLike]) -> None:
        """Draws the scores of every layer as a heat map, its selected blocks beside it.

        Layers of one kind stand in one column, numbered ones below each other.

        Args:
            path: a file name whose suffix matplotlib knows (.png, .svg, .pdf).
        Raises:
            ImportError: matplotlib is not installed.
        """
        from nibblock.sparse import _plot

        _plot.plot(self, path)
