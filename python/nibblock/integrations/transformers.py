"""Building and loading transformers models on demand.

transformers is optional: nothing here imports it before it is needed, and its absence is one
ImportError that names the extra to install.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_transformers(caller: str, *extra: str) -> ModuleType:
    """The transformers module, version 5 or newer; `extra` names packages needed besides.

    Raises:
        ImportError: one is missing or too old; the message names the caller and the extra to
        install.
    """
    for name in ("transformers", *extra):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"{caller}: needs the {name} package, which is not installed; "
                "pip install nibblock[transformers]"
            ) from error
    module = importlib.import_module("transformers")
    if int(module.__version__.split(".")[0]) < 5:  # older ones keep rope_theta elsewhere
        raise ImportError(
            f"{caller}: transformers must be 5 or newer, got {module.__version__}; "
            "pip install -U nibblock[transformers]"
        )
    return module


def empty_model(config: Any, dtype: torch.dtype, caller: str) -> PreTrainedModel:
    """A causal language model whose parameters are on the meta device and whose buffers are real.

    Args:
        config: a transformers configuration.
        dtype: of the parameters, written into the configuration.
        caller: the name that an ImportError gives.
    Returns:
        the model; every parameter, and every buffer that a file would hold, is still to be filled.
    Raises:
        ValueError: transformers cannot build this configuration; the text is its reason, one line.
    """
    transformers = require_transformers(caller)
    config.dtype = dtype
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # strict validation raises types of its own
        raise ValueError(last_line(error)) from error
    _fill_buffers(model)
    return model


def last_line(error: Exception) -> str:
    """What an error of transformers says, in one line: its last, where the reason stands."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[-1].strip()


def _fill_buffers(model: PreTrainedModel) -> None:
    """Computes the buffers that no file holds (rotary frequencies and the like), off meta.

    Constructors make them, on meta like everything else; `_init_weights` makes them again, for
    `from_pretrained` starts on meta too. On Parameters that are still on meta it does nothing.
    """
    places = {
        f"{name}.{key}": (module._buffers, key)
        for name, module in model.named_modules()
        for key in module._non_persistent_buffers_set
        if module._buffers.get(key) is not None
    }
    tries = []
    # (Initial values of other things may be drawn: nobody shall see that.)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for start in (0, 1) if places else ():  # what nothing computes keeps what it started from
            for buffers, key in places.values():
                buffers[key] = torch.empty_like(buffers[key], device="cpu").fill_(start)
            _initialize(model, model)
            tries.append([buffers[key] for buffers, key in places.values()])
    for name, first, second in zip(places, *tries):
        if first.is_meta or second.is_meta or not torch.equal(first, second):
            raise ValueError(f"buffer {name}, which no file holds, is computed by nothing")


def _initialize(module: Any, owner: Any) -> None:
    """Calls the `_init_weights` of the innermost transformers model around each module, children
    first.
    """
    owner = module if hasattr(module, "_init_weights") else owner
    for child in module.children():
        _initialize(child, owner)
    owner._init_weights(module)


def build_empty(
    model_type: str,
    values: dict[str, Any],
    dtype: torch.dtype,
    rope_divisors: np.ndarray | None = None,
) -> PreTrainedModel:
    """As `empty_model`, of an architecture by name and with rotary frequencies of the file's own.

    Args:
        model_type: transformers' name of the architecture ("llama", "gemma3_text", ...).
        values: the configuration.
        dtype: of the parameters, written into the configuration.
        rope_divisors: [head_dim / 2] float32 that divide the plain rotary frequencies, or None.
    Returns:
        the model; every parameter is still to be filled.
    Raises:
        ValueError: transformers cannot build this configuration; the text is its reason, one line.
    """
    transformers = require_transformers("load_gguf")
    try:
        config = transformers.AutoConfig.for_model(model_type, **values)
    except Exception as error:  # strict validation raises types of its own
        raise ValueError(last_line(error)) from error
    model = empty_model(config, dtype, "load_gguf")
    if rope_divisors is not None:
        # The file's own divisors win over a formula: they are what the model was quantised with.
        theta = config.rope_parameters["rope_theta"]
        half = len(rope_divisors)
        plain = 1.0 / (theta ** (torch.arange(half, dtype=torch.float32) * 2 / (2 * half)))
        exact = plain / torch.from_numpy(np.ascontiguousarray(rope_divisors, dtype=np.float32))
        rotary = model.model.rotary_emb
        rotary.inv_freq = exact
        rotary.original_inv_freq = exact.clone()
    return model


def load_config(path: str | os.PathLike[str], caller: str) -> tuple[Any, Any]:
    """(configuration, generation configuration or None) of a local transformers folder.

    Code in the folder is not run.

    Raises:
        ValueError: transformers has no causal language model of this type, or refuses a value; the
        text is the reason, one line.
    """
    transformers = require_transformers(caller)
    path = os.fspath(path)
    local = {"local_files_only": True}
    values, _ = transformers.PretrainedConfig.get_config_dict(path, **local)
    kind = values.get("model_type")
    known = transformers.CONFIG_MAPPING
    if kind not in known or known[kind] not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"model_type {kind!r}, of which transformers has none")
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, **local)
        generation = None
        if os.path.isfile(os.path.join(path, "generation_config.json")):
            generation = transformers.GenerationConfig.from_pretrained(path, **local)
    except Exception as error:  # strict validation raises types of its own
        raise ValueError(last_line(error)) from error
    return config, generation


def load_folder(path: str | os.PathLike[str], dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model from a local transformers folder, in eval mode; never downloads.

    Raises:
        FileNotFoundError: not a folder that holds config.json.
    """
    path = os.fspath(path)
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise FileNotFoundError(
            f"load_folder: path must be a transformers folder with config.json, got {path!r}"
        )
    transformers = require_transformers("load_folder")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, local_files_only=True
    )
    return model.eval()


def load_folder_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer of a local transformers folder; never downloads."""
    transformers = require_transformers("load_folder")
    return transformers.AutoTokenizer.from_pretrained(os.fspath(path), local_files_only=True)


def empty_folder(path: str | os.PathLike[str]) -> PreTrainedModel:
    """The causal language model that a folder's configuration describes, for `nibblock.load`.

    Parameters are on the meta device where every buffer that no file holds can be made again from
    the configuration, as rotary embeddings can; else the whole model is made, with random weights.
    """
    transformers = require_transformers("load_folder")
    config = transformers.AutoConfig.from_pretrained(os.fspath(path), local_files_only=True)
    build = transformers.AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model = build(config)
    for name, module in list(model.named_modules()):
        if any(module._buffers.get(key) is not None for key in module._non_persistent_buffers_set):
            try:
                made = type(module)(config=config)
            except TypeError:
                return build(config).eval()
            model.set_submodule(name, made)
    return model.eval()
