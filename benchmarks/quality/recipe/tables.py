"""The tables of docs/results.md, from finished runs."""

import math
import statistics
from collections.abc import Iterable

from benchmarks.quality.findings import markdown
from benchmarks.quality.recipe.methods import ABLATED, BETAS, BUDGET, CORE, ENDS, OUTER, RECIPE
from benchmarks.quality.recipe.parts import BUDGET_OF_ADAM, FIRST, TUNED, Runs, best, one_rate
from benchmarks.quality.recipe.settings import SETTINGS
from benchmarks.quality.recipe.trial import CONSTANT, DECAYED, MOMENTS

REFERENCE = "synchronous ADOPT"
SENT = "vectors sent after the switch"
Ends = dict[int, float]
"""Seed -> nats."""


def tables(runs: Runs) -> dict[str, str]:
    """Title -> table, in the order of the document; those whose runs are finished."""
    named = {"recipe": recipe(runs), "gaps": gaps(runs), "ends": ends(runs), "betas": betas(runs)}
    named["budget"] = single(runs, FIRST, [*CORE[1:], *BUDGET], "")
    named["budget, Adam"] = single(runs, "Adam", [*CORE, *BUDGET_OF_ADAM], "")
    named["ablations"] = single(runs, FIRST, [*CORE, *ABLATED], "")
    for setting in ("one node", FIRST, "8 replicas"):
        named[f"outer step, {setting}"] = single(runs, setting, [*CORE[1:], *OUTER], f"{SETTINGS[setting].replicas} x")
    return {title: table for title, table in named.items() if table.count("\n") > 1}


def at(runs: Runs, setting: str, method: str, lr: float, moment: str) -> Ends:
    """Nats of all seeds that have been run."""
    case = (setting, method, lr)
    found = {run["seed"]: run for run in runs if (run["setting"], run["method"], run["lr"]) == case and moment in run}
    return {seed: run[moment] for seed, run in sorted(found.items())}


def tuned(runs: Runs, setting: str, method: str, moment: str) -> Ends:
    """Nats at the rate that is best for ``moment`` on the first seed."""
    rates = best(runs, setting, method)
    return at(runs, setting, method, rates[moment], moment) if rates else {}


def reference(runs: Runs, setting: str, moment: str) -> Ends:
    """Synchronous training on the batches of ``setting``, which need no replicas: as at the first setting for those
    that only divide its batch otherwise."""
    return tuned(runs, setting if REFERENCE in TUNED.get(setting, ()) else FIRST, REFERENCE, moment)


def recipe(runs: Runs) -> str:
    """Every method at the first setting, at its best rate for each moment."""
    columns = ["", *(f"{moment}: nats (rate)" for moment in MOMENTS), *(f"{moment}, %" for moment in MOMENTS)]
    columns += [SENT, "cosine of progress", "of momentum"]
    rows = []
    for method in RECIPE:
        if not (rates := best(runs, FIRST, method)):
            continue
        found = [tuned(runs, FIRST, method, moment) for moment in MOMENTS]
        cells = [f"{statistics.mean(each.values()):.4f} ({rates[m]:g})" for each, m in zip(found, MOMENTS)]
        cells += [against(each, reference(runs, FIRST, moment)) for each, moment in zip(found, MOMENTS)]
        cells += [mean(at(runs, FIRST, method, rates[CONSTANT], key), digits) for key, digits in TOLD.items()]
        rows.append([method, *cells])
    return markdown(columns, rows)


TOLD = {"sent": 0, "cosine of progress": 2, "cosine of momentum": 2}


def gaps(runs: Runs) -> str:
    """What local methods lack of synchronous ADOPT in each setting, all tuned alike."""
    columns = ["setting", "synchronous, nats", *(f"{method}, {moment}, %" for method in CORE[1:] for moment in ENDED)]
    rows = []
    for setting in TUNED:
        if not all(best(runs, setting, method) for method in CORE[1:]):
            continue
        bases = [reference(runs, setting, moment) for moment in ENDED]
        cells = [" / ".join(mean(base, 3) for base in bases)]
        for method in CORE[1:]:
            cells += [against(tuned(runs, setting, method, m), base, loss=True) for m, base in zip(ENDED, bases)]
        rows.append([setting, *cells])
    return markdown(columns, rows)


ENDED = (CONSTANT, DECAYED)


def ends(runs: Runs) -> str:
    """The decay of the rate gone through in other ways, from the mean of the replicas."""
    base = reference(runs, FIRST, DECAYED)
    columns = ["in the decay", *(f"{method}: nats" for method in CORE[1:]), *(f"{method}, %" for method in CORE[1:])]
    names = {"as before": DECAYED} | {"as before, mean over its last tenth": f"{DECAYED}, mean over time"}
    rows = []
    for name, moment in (names | {end: f"decayed, {end}" for end in ENDS}).items():
        found = [at(runs, FIRST, method, one_rate(FIRST), moment) for method in CORE[1:]]
        if all(found):
            rows.append([name, *(mean(each, 4) for each in found), *(against(each, base) for each in found)])
    return markdown(columns, rows)


def betas(runs: Runs) -> str:
    """The slow momentum's numbers, at one rate."""
    rows = []
    for name, method in BETAS.items():
        cells = []
        for moment in MOMENTS:
            cells.append(against(at(runs, FIRST, name, one_rate(FIRST), moment), reference(runs, FIRST, moment)))
        if all(cells):
            known = [mean(at(runs, FIRST, name, one_rate(FIRST), key), 2) for key in tuple(TOLD)[1:]]
            rows.append([f"{method.beta:g}", f"{method.weight:g}", f"{method.lr_factor:g}", *cells, *known])
    columns = ["beta", "weight", "rate x", *(f"{moment}, %" for moment in MOMENTS)]
    return markdown([*columns, "cosine of progress", "of momentum"], rows)


def single(runs: Runs, setting: str, methods: Iterable[str], of: str) -> str:
    """Methods at one rate, against synchronous training at its best."""
    rows = []
    for method in methods:
        found = [at(runs, setting, method, one_rate(setting), moment) for moment in ENDED]
        if all(found):
            less = [against(each, reference(runs, setting, moment)) for each, moment in zip(found, ENDED)]
            sent = mean(at(runs, setting, method, one_rate(setting), "sent"), 0)
            rows.append([f"{of} {method}".strip(), *(mean(each, 4) for each in found), *less, sent])
    columns = [*(f"{moment}: nats" for moment in ENDED), *(f"{moment}, %" for moment in ENDED), SENT]
    return markdown(["", *columns], rows)


def mean(found: Ends, digits: int) -> str:
    values = [value for value in found.values() if value is not None]
    return f"{statistics.mean(values):.{digits}f}" if values else ""


def against(found: Ends, base: Ends, loss: bool = False) -> str:
    """Perplexity above that of the same seed, in percent: mean, lowest to highest; with ``loss`` that of the loss
    too."""
    pairs = [(value, base[seed]) for seed, value in found.items() if seed in base]
    if not pairs or found == base:
        return ""
    if any(math.isinf(value) for pair in pairs for value in pair):
        return "diverged"
    percent = [math.expm1(value - other) * 100 for value, other in pairs]
    said = f"{statistics.mean(percent):+.2f}"
    if len(percent) > 1:
        said += f" ({min(percent):+.2f} to {max(percent):+.2f})"
    if loss:
        said += f"; loss {statistics.mean((value / other - 1) * 100 for value, other in pairs):+.2f}"
    return said
