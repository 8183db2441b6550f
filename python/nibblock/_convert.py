"""`python -m nibblock convert SRC DST`: a GGUF file or transformers folder to int4 safetensors.

A folder that is quantised already (`nb.load_quantized` lists the formats) keeps its codes and
scales.

DST ending in .safetensors is that one file, for `nb.load(DST, model)`. Any other DST is a folder
that gets model.safetensors with the configuration and tokenizer beside it, so that it stands on
its own:

    config = transformers.AutoConfig.from_pretrained(DST)
    model = transformers.AutoModelForCausalLM.from_config(config)
    nb.load(f"{DST}/model.safetensors", model)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The converter's options."""
    parser.add_argument("source", metavar="SRC", help="a GGUF file or a local transformers folder")
    parser.add_argument("target", metavar="DST", help="a .safetensors file, or a folder to be made")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="float32",
        help="of norms, biases, dense weights (float32)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the report as JSON, and no table"
    )
    group = parser.add_argument_group("GGUF files, which keep their own groups")
    group.add_argument(
        "--requantize",
        action="store_true",
        help="round linears and embeddings stored as floats to 8 bits instead of leaving them so",
    )
    group = parser.add_argument_group("transformers folders that are not quantised")
    group.add_argument(
        "--group-size",
        type=int,
        default=128,
        help="32, 64, 128, 256 or -1; with 8 bits also 16 (128)",
    )
    group.add_argument("--symmetric", action="store_true", help="scales only, no offsets")
    group.add_argument("--bits", type=int, default=4, help="4 or 8 (4)")
    group.add_argument("--method", default="rtn", help="rtn or mse (rtn)")
    group.add_argument("--embeddings", action="store_true", help="embeddings in 8 bits too")


def main(argv: list[str] | None = None) -> int:
    """Runs the converter.

    Returns:
        0; or 2 after one line on stderr when SRC cannot be read or DST cannot be written.
    """
    parser = argparse.ArgumentParser(prog="python -m nibblock convert", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """As `main`, for arguments already parsed."""
    try:
        _convert(arguments)
    except (ImportError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _convert(arguments: argparse.Namespace) -> None:
    import nibblock as nb
    from nibblock.formats.gguf import load_tokenizer
    from nibblock.formats.quantized import is_quantized
    from nibblock.integrations.transformers import load_folder, load_folder_tokenizer

    source, target = Path(arguments.source), Path(arguments.target)
    if not source.exists():
        raise FileNotFoundError(
            f"convert: SRC must be a file or folder that exists, got {str(source)!r}"
        )
    single = target.suffix == ".safetensors"
    if not single and target.exists() and not target.is_dir():
        raise ValueError(
            f"convert: DST must be a .safetensors file or a folder, got {str(target)!r}"
        )
    dtype = _DTYPES[arguments.dtype]
    if source.is_file():
        model = nb.load_gguf(source, dtype=dtype, requantize=arguments.requantize)
        report = model.nibblock_report
    elif is_quantized(source):
        model = nb.load_quantized(source, dtype=dtype)
        report = model.nibblock_report
    else:
        config = nb.Int4Config(
            group_size=arguments.group_size,
            symmetric=arguments.symmetric,
            bits=arguments.bits,
            method=arguments.method,
            embeddings=arguments.embeddings,
        )
        model = load_folder(source, dtype)
        report = nb.accelerate(model, config, progress=False if arguments.json else None)
    if not arguments.json:
        print(report)
    if not single:
        tokenizer = load_tokenizer(source) if source.is_file() else load_folder_tokenizer(source)
        target.mkdir(parents=True, exist_ok=True)
        model.config.save_pretrained(target)
        model.generation_config.save_pretrained(target)
        tokenizer.save_pretrained(target)
        target = target / "model.safetensors"
    nb.save(model, target)
    size = target.stat().st_size
    if arguments.json:
        facts = {"file": str(target), "file_bytes": size, "report": report.to_dict()}
        print(json.dumps(facts, indent=1))
    else:
        print(f"{target}: {size / 1e6:.1f} MB")
