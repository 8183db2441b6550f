"""One model in a process of its own, which answers a line of JSON for each line that it reads.

A process of its own, because the peak of a process's memory is only one model's where no other was
in it; and one that stays, so that the rounds of several models can alternate.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, Optional

import torch

from nibblock import _measure
from nibblock._report_cli import models

WINDOW, PREFILL, DECODE, PROMPT = 512, 512, 32, 16
_CHARACTERS = 24  # of text for a token at the most; a longer text is not tokenized whole


class Session:
    """The model that the process holds."""

    def __init__(self) -> None:
        self.model: Optional[torch.nn.Module] = None
        self.ids = torch.zeros(0, dtype=torch.int64)
        self.before = 0
        self.limit = 0

    def load(self, candidate: dict[str, Any], text: str, tokens: int, threads: int):
        import transformers
        import transformers.models.llama.modeling_llama  # what a model imports is not its memory

        if threads:
            torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        source = models.Candidate(**{**candidate, "files": tuple(candidate["files"])})
        tokenizer = models.load_tokenizer(source)
        self.ids = _encode(tokenizer, Path(text), tokens)
        _measure.forget_peak()
        self.before = _measure.memory("VmRSS")
        start = time.perf_counter()
        self.model = models.load(source)
        seconds = time.perf_counter() - start
        config = self.model.config.get_text_config()
        vocabulary = config.vocab_size
        if int(self.ids.max()) >= vocabulary:
            raise ValueError(
                f"report: {Path(source.base).name} must have a tokenizer of its vocabulary of "
                f"{vocabulary}, got token {int(self.ids.max())}"
            )
        self.limit = getattr(config, "max_position_embeddings", None) or WINDOW + DECODE
        return {
            "load_seconds": seconds,
            "bytes": _measure.model_bytes(self.model),
            "weights": _measure.weight_count(self.model),
            "text_tokens": len(self.ids),
            "text_hash": hashlib.sha256(self.ids.numpy().tobytes()).hexdigest(),
            "prefill_tokens": len(self._prompt(PREFILL)),
            "decode_tokens": self._count(),
            "threads": torch.get_num_threads(),
        }

    def _prompt(self, length: int) -> torch.Tensor:
        length = max(1, min(length, self.limit - 1))
        return self.ids.repeat(-(-length // len(self.ids)))[:length]

    def _count(self) -> int:
        return max(2, min(DECODE, self.limit - len(self._prompt(PROMPT))))

    def warm(self):
        """One prefill and one decode: the first call of a kernel is slow; and the memory that a
        deployed model takes, before the logits of whole windows are asked for."""
        self.prefill()
        self.decode()
        return {"peak_bytes": _measure.memory("VmHWM") - self.before}

    def perplexity(self):
        window = max(2, min(WINDOW, self.limit))
        found = _measure.perplexity(self.model, self.ids, window)
        return {"perplexity": found if found < float("inf") else None, "window": window}

    def prefill(self):
        prompt = self._prompt(PREFILL)
        return {"rate": len(prompt) / _measure.prefill_seconds(self.model, prompt)}

    def decode(self):
        _, seconds = _measure.decode(self.model, self._prompt(PROMPT), self._count())
        return {"rate": 1 / seconds}


def _encode(tokenizer: Any, path: Path, tokens: int) -> torch.Tensor:
    text = path.read_text(encoding="utf-8")[: _CHARACTERS * tokens]
    ids = tokenizer(text, return_tensors="pt").input_ids[0][:tokens].long()
    if len(ids) < 2:
        raise ValueError(f"report: --text must hold at least 2 tokens, got {len(ids)}")
    return ids


def serve(lines: Any, answer: Callable[[dict[str, Any]], None]) -> None:
    """Answers until the lines end; what a user can cause becomes {"error": one line}."""
    session = Session()
    for line in lines:
        request = json.loads(line)
        try:
            answer(getattr(session, request.pop("do"))(**request))
        except (ImportError, OSError, ValueError, TypeError, RuntimeError) as error:
            if sys.flags.dev_mode:
                raise
            text = (str(error).strip() or repr(error)).splitlines()[0]
            answer({"error": text})


def main() -> int:
    # Answers go where the parent listens; anything that a library prints goes to standard error.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)

        def answer(value: dict[str, Any]) -> None:
            out.write(json.dumps(value, allow_nan=False) + "\n")
            out.flush()

        serve(sys.stdin, answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
