"""Text to rows of tokens: documents, a split without leakage, packing, and the order of steps."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SUFFIXES = (".txt", ".md", ".rst", ".text", ".py", ".tex", ".html")
BLOCK = 4000  # characters of a block that is cut out of a longer document
WHOLE = 20  # with fewer documents than this, each is cut into blocks


def read_documents(path: str) -> list[str]:
    """The documents of a text file or of a folder's text files, in the order of their names.

    Args:
        path: a UTF-8 file; a folder, searched through for files with a text suffix; or "" for the
            help topics of the standard library.
    Returns:
        non-empty texts.
    Raises:
        FileNotFoundError: no such path. ValueError: a file that is not UTF-8, or no text at all.
    """
    if not path:
        from nibblock._demo import english_text

        return [english_text()]
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(
            f"finetune: --data must be a file or folder that exists, got {path!r}"
        )
    files = [place]
    if place.is_dir():
        files = sorted(f for f in place.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"finetune: --data must be UTF-8 text, got other bytes in {file.name}"
            ) from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        kinds = " ".join(SUFFIXES)
        raise ValueError(f"finetune: --data must hold text ({kinds}), got none in {path!r}")
    return texts


def blocks_of(documents: Iterable[str]) -> list[str]:
    """What is dealt to training and validation: whole documents where there are many of them,
    otherwise pieces of about 4000 characters cut at blank lines. Of equal pieces the first stays.
    """
    documents = list(documents)
    if len(documents) >= WHOLE:
        pieces = documents
    else:
        pieces = [piece for text in documents for piece in _pieces(text)]
    unique: dict[bytes, str] = {}
    for piece in pieces:
        unique.setdefault(hashlib.sha256(piece.strip().encode()).digest(), piece)
    return list(unique.values())


def _pieces(text: str) -> list[str]:
    pieces, current = [], ""
    for paragraph in text.split("\n\n"):
        while len(paragraph) > 2 * BLOCK:  # a text without blank lines
            pieces.append(paragraph[:BLOCK])
            paragraph = paragraph[BLOCK:]
        current += paragraph + "\n\n"
        if len(current) >= BLOCK:
            pieces.append(current)
            current = ""
    return [p for p in (*pieces, current) if p.strip()]


def split(blocks: list[str], valid: float, seed: int) -> tuple[list[str], list[str]]:
    """(training, validation): whole blocks drawn at random until `valid` of the characters are in
    validation; both in their first order.

    Raises:
        ValueError: fewer than two blocks.
    """
    if len(blocks) < 2:
        raise ValueError(
            f"finetune: --data must hold at least 2 blocks of text to split, got {len(blocks)}"
        )
    generator = torch.Generator().manual_seed(seed)
    wanted = valid * sum(len(b) for b in blocks)
    chosen: set[int] = set()
    for index in torch.randperm(len(blocks), generator=generator).tolist()[: len(blocks) - 1]:
        chosen.add(index)
        wanted -= len(blocks[index])
        if wanted <= 0:
            break
    return (
        [b for i, b in enumerate(blocks) if i not in chosen],
        [b for i, b in enumerate(blocks) if i in chosen],
    )


def pack(tokenizer: Any, blocks: list[str], seq: int) -> torch.Tensor:
    """Rows of `seq` tokens: the blocks one after another, each closed by the end token.

    Args:
        tokenizer: of transformers.
        blocks: texts.
        seq: tokens a row; what does not fill the last row is left out.
    Returns:
        int64 [rows, seq].
    """
    end = tokenizer.eos_token_id
    stream: list[int] = []
    for block in blocks:
        stream += tokenizer(block, add_special_tokens=False, verbose=False).input_ids
        stream += [] if end is None else [end]
    rows = len(stream) // seq
    return torch.tensor(stream[: rows * seq], dtype=torch.int64).view(rows, seq)


@dataclass(frozen=True)
class Order:
    """Which rows each step sees.

    Rows are dealt to steps once; every epoch goes through these steps in another order. So a
    prefix cache finds the batches of the first epoch again, and each step depends on (seed, step)
    alone: a resumed run needs no state of a sampler.
    """

    rows: int
    per_step: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return self.rows // self.per_step

    def __post_init__(self) -> None:
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"finetune: --data must hold at least {self.per_step} training rows for one step, "
                f"got {self.rows}; give more text or fewer --tokens"
            )

    def indices(self, step: int) -> torch.Tensor:
        """int64 [per_step]: the rows of a step, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        rows = _permutation(self.rows, self.seed, 0)
        group = int(_permutation(self.steps_per_epoch, self.seed, epoch + 1)[place])
        return rows[group * self.per_step : (group + 1) * self.per_step]


def _permutation(count: int, seed: int, epoch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)
