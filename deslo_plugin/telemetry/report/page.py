"""A report as a page and as Markdown: one table, runs side by side, and the charts under it."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from urllib.parse import quote

from deslo_plugin.telemetry.report.run import Run

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff }
body { max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse } th, td { padding: .25rem .9rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #888 }
figure { margin: 2rem 0 } figcaption { font-weight: 600 } svg { max-width: 100%; height: auto } small { color: #666 }
"""


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """The table; the first row holds the runs' names, the first column what is told of them."""
    states = dict.fromkeys(state for run in runs for state in run.bytes)
    measured = dict.fromkeys(state for run in runs for state in run.drift)

    def row(title: str, cell: Callable[[Run], str]) -> list[str]:
        return [title, *(cell(run) for run in runs)]

    return [
        row("", lambda run: run.name),
        row("replicas x ranks", lambda run: f"{run.replicas} x {run.replica_size}"),
        row("periods", _periods),
        row("steps", lambda run: f"{run.steps:,}" + ("" if run.ended else ", not ended")),
        *([row("switched after step", lambda run: str(run.switched or "-"))] if any(r.switched for r in runs) else []),
        row("restarts", lambda run: str(run.processes - 1)),
        row("tokens", lambda run: _large(run.tokens) if run.tokens else "-"),
        row("final loss", lambda run: "-" if run.final_loss is None else f"{run.final_loss:.4f}"),
        *(row(f"bytes of a rank: {state}", partial(_sent, state=state)) for state in states),
        row("bytes in total", lambda run: _bytes(sum(run.bytes.values()))),
        row("times fewer than synchronous", lambda run: f"{run.reduction:.1f}" if run.reduction else "-"),
        row("seconds", lambda run: f"{run.seconds:.1f}"),
        row("seconds waited, mean (most)", lambda run: f"{sum(run.exposed) / run.found:.2f} ({max(run.exposed):.2f})"),
        row("% waited", lambda run: f"{100 * sum(run.exposed) / run.found / run.seconds:.2g}" if run.seconds else "-"),
        *(row(f"last cosine: {state}", partial(_last, state=state)) for state in measured),
    ]


def notes(runs: Sequence[Run]) -> list[str]:
    """What the figures do and do not say."""
    return [
        "Final loss: mean of the last twentieth of the logged steps and of the replicas, each on its own batches.",
        "Bytes: what one rank hands to averages. Cosine: of a replica's state with its mean, 1 if replicas agree.",
        *(f"{run.name}: files of {run.found} of {run.replicas} replicas." for run in runs if run.found != run.replicas),
    ]


def html(runs: Sequence[Run], charts: Mapping[str, str]) -> str:
    """One file without scripts that loads nothing; ``charts``: title -> inline SVG."""
    names, *body = rows(runs)
    head = "".join(f"<th>{escape(cell)}</th>" for cell in names)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    figures = "".join(
        f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in charts.items()
    )
    title = escape(", ".join(run.name for run in runs))
    small = "".join(f"<p><small>{escape(note)}</small></p>" for note in notes(runs))
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>deslo report</title>'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{lines}</tbody></table>"
        f"{small}{figures}</body></html>\n"
    )


def markdown(runs: Sequence[Run], picture: str | None = None) -> str:
    """The table, the notes, and a link to ``picture``."""
    names, *body = [[_escaped(cell) for cell in row] for row in rows(runs)]
    lines = ["| " + " | ".join(row) + " |" for row in (names, ["---"] + ["---:"] * len(runs), *body)]
    lines += [
        "",
        *(f"- {_escaped(note)}" for note in notes(runs)),
        *(["", f"![charts]({quote(picture)})"] if picture else []),
    ]
    return "\n".join(lines) + "\n"


def _escaped(cell: str) -> str:
    """Text as it is: names of runs are those of folders, which anybody may have given."""
    return re.sub(r"([\\`*\[\]|~$!#])", r"\\\1", escape(" ".join(cell.split()), quote=False))


def _periods(run: Run) -> str:
    groups = (
        " / ".join(str(period or "never") for period in group["periods"].values()) for group in run.start["groups"]
    )
    return "; ".join(dict.fromkeys(groups))  # of param groups, where they differ


def _last(run: Run, state: str) -> str:
    return f"{run.drift[state][-1].cosine:.4f}" if state in run.drift else "-"


def _sent(run: Run, state: str) -> str:
    return _bytes(run.bytes.get(state))


def _bytes(count: int | None) -> str:
    return "-" if count is None else f"{_large(count)}B"


def _large(count: float) -> str:
    """1234567 -> "1.23 M"."""
    for unit in ("", "k", "M", "G"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} T"
