"""The table and the plot at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HEADER = (
    "method",
    "trained",
    "loss",
    "perplexity",
    "select s",
    "train s",
    "total s",
    "peak MB",
    "state MB",
    "file MB",
)


def table(results: list[dict[str, Any]]) -> str:
    """One line for each method, the chosen one first; the ratios to it follow where there are
    several."""
    lines = [HEADER, *(_line(r) for r in results)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    text = []
    for line in lines:
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))]
        text.append("  ".join(cells).rstrip())
    text.insert(1, "  ".join("-" * w for w in widths))
    for result in results:
        text += [f"{label(result)}: {note}" for note in result["notes"]]
        if result["stopped"]:
            text.append(f"{label(result)}: stopped at step {result['steps']}: {result['stopped']}")
    text += _ratios(results)
    return "\n".join(text)


def label(result: dict[str, Any]) -> str:
    settings = result["settings"]
    muon = settings.get("optimizer") == "muon"  # earlier runs name neither
    int8 = settings.get("compute") == "int8"
    return settings["method"] + " muon" * muon + " int4" * settings["int4"] + " int8" * int8


def _line(result: dict[str, Any]) -> tuple[str, ...]:
    seconds, before, best = result["seconds"], result["before"], result["best"]
    share = result["trained"] / max(1, result["weights"])
    return (
        label(result),
        f"{result['trained'] / 1e6:.2f} M ({share:.1%})",
        f"{before['loss']:.4f} > {best['loss']:.4f}",
        f"{before['perplexity']:.2f} > {best['perplexity']:.2f}",
        f"{seconds['select']:.1f}",
        f"{seconds['train']:.1f}",
        f"{seconds['total']:.1f}",
        *(f"{result[k] / 1e6:.1f}" for k in ("peak_bytes", "state_bytes", "file_bytes")),
    )


def time_to(result: dict[str, Any], loss: float) -> float | None:
    """Seconds of selection and training until an evaluation was at `loss` or below; or None."""
    for evaluation in result["evaluations"]:
        if evaluation["loss"] <= loss:
            return result["seconds"]["select"] + evaluation["seconds"]
    return None


def _ratios(results: list[dict[str, Any]]) -> list[str]:
    full = next((r for r in results if r["settings"]["method"] == "full"), None)
    if full is None or results[0] is full:
        return []
    target = 1.01 * full["best"]["loss"]
    theirs = time_to(full, target)
    parts = []
    for result in results:
        if result is full:
            continue
        ours = time_to(result, target)
        if ours is None:
            reached = "not reached"
        else:
            reached = f"{ours / theirs:.2f}x" if theirs else "none: full starts there"
        same = [
            f"{name} {result[key] / full[key]:.2f}x"
            for name, key in (("peak", "peak_bytes"), ("state", "state_bytes"))
        ]
        parts.append(
            f"{label(result)} against full: time to a loss 1 % above its best {reached}, "
            + ", ".join(same)
        )
    return parts


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Validation loss over seconds (selection included), and what each method costs beside the
    dearest.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "finetune: the plot needs matplotlib, which is not installed; "
            "pip install nibblock[finetune]"
        ) from error
    figure, (curve, bars) = plt.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True)
    for result in results:
        begun = result["seconds"]["select"]
        xs = [begun + e["seconds"] for e in result["evaluations"]]
        curve.plot(xs, [e["loss"] for e in result["evaluations"]], "o-", label=label(result), ms=3)
    curve.set_xlabel("seconds, selection included")
    curve.set_ylabel("validation loss")
    curve.grid(True, alpha=0.25)
    curve.legend(fontsize=8)
    costs = (
        ("seconds", lambda r: r["seconds"]["total"]),
        ("peak memory", lambda r: r["peak_bytes"]),
        ("training state", lambda r: r["state_bytes"]),
        ("file", lambda r: r["file_bytes"]),
    )
    width = 0.8 / len(results)
    for index, result in enumerate(results):
        shares = [
            figure_of(result) / max(1e-12, *(figure_of(r) for r in results))
            for _, figure_of in costs
        ]
        bars.bar([i + index * width for i in range(len(costs))], shares, width, label=label(result))
    bars.set_xticks([i + 0.4 - width / 2 for i in range(len(costs))])
    bars.set_xticklabels([name for name, _ in costs])
    bars.set_ylabel("share of the dearest method")
    bars.grid(True, axis="y", alpha=0.25)
    bars.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
