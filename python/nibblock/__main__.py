"""`python -m nibblock COMMAND`: one module per command, imported only when it is asked for."""

from __future__ import annotations

import importlib
import sys

from nibblock._errors import BackendUnavailable

# command -> (module with `main(argv) -> int`, what it does)
COMMANDS = {
    "info": ("nibblock._info", "versions, CPU, kernels and a self-test"),
    "demo": ("nibblock._demo", "a real model, dense beside nibblock"),
    "bench": ("nibblock.bench.cli", "measure an operator or a model beside its baselines"),
    "finetune": ("nibblock._finetune.cli", "train a model's most important blocks, with baselines"),
    "report": ("nibblock._report_cli.cli", "what files hold, what changed, how models compare"),
    "tune": ("nibblock._tune", "measure launch configurations on this GPU, for later runs"),
    "convert": ("nibblock._convert", "a GGUF file or transformers folder to safetensors"),
}


def usage() -> str:
    lines = ["usage: python -m nibblock COMMAND [options]   (COMMAND --help lists them)", ""]
    return "\n".join(lines + [f"  {name:<9} {text}" for name, (_, text) in COMMANDS.items()])


def main(argv: list[str]) -> int:
    """Runs one command; returns its exit code: 0 done, 1 failed, 2 wrong usage."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        names = ", ".join(COMMANDS)
        print(f"nibblock: command must be one of {names}, got {name}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(COMMANDS[name][0]).main(rest)
    except (BackendUnavailable, ImportError, OSError, ValueError) as error:
        # What a user can cause reads as one line; `python -X dev` shows where it came from.
        if sys.flags.dev_mode:
            raise
        text = str(error)
        if not text.startswith("nibblock"):
            text = (
                f"nibblock {text}" if text.startswith(f"{name}: ") else f"nibblock {name}: {text}"
            )
        print(text, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
