"""The tables of docs/results-without-switch.md, from finished runs."""

import math
import statistics
from collections.abc import Sequence

from benchmarks.quality.ablations import ablations
from benchmarks.quality.choice import Chosen, at_best_rate
from benchmarks.quality.ledger import Ledger
from benchmarks.quality.methods import LOCAL, SYNCHRONOUS, Preset, Run, tuning

STARTS = {True: "Local after the synchronous warm-up", False: "Local from the first step"}
PAIRS = (  # what the papers compare
    ("DES-LOC", "Local Adam"),
    ("FAVG+OPT", "DES-LOC"),
    ("FAVG-OPT", "DES-LOC"),
    ("DES-LOC-Nesterov", "DES-LOC"),
    ("DES-LOC-QH", "DES-LOC"),
    ("DES-LOC-QH", "synchronous AdamW"),
    ("MT-DAO", "synchronous QH"),
    ("MT-DAO", "synchronous AdamW"),
    ("MT-DAO", "Local Adam"),
    ("MT-DAO, ADOPT", "synchronous QH, ADOPT"),
    ("MT-DAO, ADOPT", "synchronous ADOPT"),
    ("MT-DAO, ADOPT", "Local ADOPT"),
    ("MT-DAO, two momenta", "MT-DAO"),
    ("MT-DAO, two momenta", "DES-LOC"),
)


def tables(preset: Preset, ledger: Ledger) -> dict[str, str]:
    """Title -> table, in the order of the document."""
    chosen = at_best_rate(preset, ledger)
    named = {STARTS[warm_up]: methods_table(warm_up, ledger, chosen) for warm_up in preset.starts}
    named["pairs"] = pairs_table(preset, ledger, chosen)
    if len(preset.starts) > 1:
        named["warm-up"] = warm_up_table(ledger, chosen)
    named["rates"] = rates_table(preset, ledger)
    return named | {title: ablation_table(title, preset, ledger) for title in ablations(preset)}


def methods_table(warm_up: bool, ledger: Ledger, chosen: Chosen) -> str:
    """Every method at its best rate, over all seeds; perplexities against synchronous AdamW's of the same seed."""
    first = chosen["synchronous AdamW", False]
    columns = [
        STARTS[warm_up],
        "rate",
        "validation, nats",
        "lowest to highest",
        "perplexity, %",
        "MB sent",
        "times less",
        "cosine of progress",
        "of momentum",
    ]
    rows = []
    for name in (*SYNCHRONOUS, *LOCAL):
        runs = chosen[name, warm_up and name in LOCAL]
        ends = [ledger.final(each) for each in runs]
        sent, all_sent = (ledger[each[0]]["bytes"] for each in (runs, first))
        rows.append(
            [
                name,
                f"{runs[0].blocks['optimizer']['params']['lr']:g}",
                nats(ends),
                spread(ends),
                against(runs, first, ledger),
                f"{sent / 1e6:.1f}",
                f"{all_sent / sent:.1f}",
                cosine(runs, "progress", ledger),
                cosine(runs, "momentum", ledger),
            ]
        )
    return markdown(columns, rows)


def pairs_table(preset: Preset, ledger: Ledger, chosen: Chosen) -> str:
    """Perplexities of one method against another's of the same seed, each at its best rate."""
    rows = [
        [
            f"{name} against {other}",
            *(
                against(chosen[name, warm_up], chosen[other, warm_up and other in LOCAL], ledger)
                for warm_up in preset.starts
            ),
        ]
        for name, other in PAIRS
    ]
    return markdown(
        ["perplexity, %", *(STARTS[warm_up].replace("Local", "local", 1) for warm_up in preset.starts)], rows
    )


def warm_up_table(ledger: Ledger, chosen: Chosen) -> str:
    """Perplexities after the warm-up against those without one, of the same seed, each at its best rate."""
    rows = [[name, against(chosen[name, True], chosen[name, False], ledger)] for name in LOCAL]
    return markdown(["the warm-up brings", "perplexity, %"], rows)


def rates_table(preset: Preset, ledger: Ledger) -> str:
    """The grid of rates: validation at the end on the first seed."""
    columns = ["nats at the end, by rate", "warm-up", *(f"{rate:g}" for rate in preset.rates)]
    started = lambda name, warm_up: "" if name in SYNCHRONOUS else "yes" if warm_up else "no"
    rows = [
        [name, started(name, warm_up), *(nats([ledger.final(each)]) for each in grid.values())]
        for (name, warm_up), grid in tuning(preset).items()
    ]
    return markdown(columns, rows)


def ablation_table(title: str, preset: Preset, ledger: Ledger) -> str:
    """Variants at one rate; perplexities against the first's of the same seed."""
    variants = ablations(preset)[title]
    first = next(iter(variants.values()))
    columns = [title, "validation, nats", "perplexity, %", "MB sent", "cosine of progress", "of momentum"]
    rows = [
        [
            name,
            nats([ledger.final(each) for each in runs]),
            against(runs, first, ledger),
            f"{ledger[runs[0]]['bytes'] / 1e6:.1f}",
            cosine(runs, "progress", ledger),
            cosine(runs, "momentum", ledger),
        ]
        for name, runs in variants.items()
    ]
    return markdown(columns, rows)


def against(runs: Sequence[Run], first: Sequence[Run], ledger: Ledger) -> str:
    pairs = [(ledger.final(each), ledger.final(base)) for each, base in zip(runs, first)]
    if runs == first:
        return ""
    if any(end is None for pair in pairs for end in pair):
        return "diverged"
    percent = [math.expm1(end - base) * 100 for end, base in pairs]
    return f"{statistics.mean(percent):+.1f}" + (
        f" ({min(percent):+.1f} to {max(percent):+.1f})" if len(percent) > 1 else ""
    )


def nats(ends: Sequence[float | None]) -> str:
    return "diverged" if None in ends else f"{statistics.mean(ends):.3f}"


def spread(ends: Sequence[float | None]) -> str:
    return "" if None in ends else f"{min(ends):.3f} to {max(ends):.3f}"


def cosine(runs: Sequence[Run], of: str, ledger: Ledger) -> str:
    seen = [ledger[each][of] for each in runs]
    return "" if None in seen else f"{statistics.mean(seen):.2f}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
