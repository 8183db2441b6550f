"""The keys by which a transformers model knows what is tied, after its layers were quantised."""

from __future__ import annotations

from torch import nn

from nibblock.nn import Int4Embedding, Int4Linear


def rename_tied_keys(model: nn.Module) -> None:
    """Lets transformers' `tie_weights` tie `packed` where it used to tie `weight`.

    Such a model keeps {"lm_head.weight": "model.embed_tokens.weight"} and assigns the second to the
    first; quantised modules have no such Parameter to assign.
    """
    for module in model.modules():
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            keys = getattr(module, attribute, None)
            if isinstance(keys, dict):
                renamed = {}
                for target, source in keys.items():
                    pair = (_packed_key(module, target), _packed_key(module, source))
                    both = pair[0] != target and pair[1] != source
                    renamed.update([pair if both else (target, source)])
                if renamed != keys:
                    setattr(module, attribute, renamed)


def _packed_key(model: nn.Module, key: str) -> str:
    path, _, leaf = key.rpartition(".")
    module = model
    for part in path.split(".") if path else ():
        module = getattr(module, "_modules", {}).get(part)
        if module is None:
            return key
    quantised = leaf == "weight" and isinstance(module, (Int4Linear, Int4Embedding))
    return f"{path}.packed" if quantised else key
