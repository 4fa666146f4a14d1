"""``deslo plan``: what a config will move, wait for and save on a link, before anything runs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from deslo_plugin.cli.config_file import given
from deslo_plugin.cli.model_size import count_parameters, parse_count
from deslo_plugin.cli.output import Json, command, show, show_json
from deslo_plugin.cli.plan_report import PlanReport
from deslo_plugin.config.schema import Config
from deslo_plugin.config.switch import refuse_after_the_end
from deslo_plugin.errors import ConfigError, require
from deslo_plugin.planning.comparison import GRADIENT_BYTES, Job
from deslo_plugin.planning.forecast import Link, compute_seconds


@command
def plan(
    config: Annotated[Path | None, typer.Option(help="JSON or YAML; without it the papers' default.")] = None,
    params: Annotated[str | None, typer.Option(help="Parameters of the model: 350M, 1.3B, 124439808.")] = None,
    model: Annotated[
        str | None, typer.Option(help="In place of it: an HF config.json, or package.module:function.")
    ] = None,
    replicas: Annotated[int, typer.Option(min=2, help="Replicas that average: usually nodes.")] = 2,
    replica_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks of one replica, if the config does not say.")
    ] = None,
    gbps: Annotated[
        float | None, typer.Option(help="Gbit/s from one replica to the others, all its ranks together.")
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Of one all-reduce of next to nothing; 0 by default.")
    ] = None,
    link: Annotated[Path | None, typer.Option(help="In place of both: what deslo probe --json printed.")] = None,
    step_ms: Annotated[
        float | None, typer.Option(help="Of one optimizer step without communication between replicas.")
    ] = None,
    tokens_per_step: Annotated[
        float | None, typer.Option(help="In place of it: tokens of a step, of all replicas,")
    ] = None,
    peak_tflops: Annotated[float | None, typer.Option(help="with the peak of one rank,")] = None,
    mfu: Annotated[float | None, typer.Option(help="and the share of it that training reaches, such as 0.4.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of the whole run.")] = 100_000,
    target: Annotated[
        str | None, typer.Option(help="Ask what reaches it: the share of time that computes, such as 95%.")
    ] = None,
    gradient_dtype: Annotated[str | None, typer.Option(help="In which synchronous training sends gradients.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw hours over bandwidth into this file: .png, .svg or .pdf.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Bytes, waits, hours and memory of a config on a link, beside synchronous training and other periods."""
    file = given(config)
    refuse_after_the_end(file.config, steps, "--steps")
    size, numel = _replica_size(file.config, replica_size), _numel(params, model)
    step_s, computed = _step_seconds(step_ms, tokens_per_step, peak_tflops, mfu, numel, replicas * size)
    dtype, why = _gradient_dtype(gradient_dtype, file.blocks)
    job = Job(file.config, numel, replicas, size, step_s, steps, dtype)
    name = "the papers' default" if config is None else str(config)
    reasons, where = {"step": computed, "gradients": why}, _link(gbps, latency_ms, link)
    outlook = PlanReport(job, where, name, reasons, file.left_out, _share(target))
    if plot is not None:
        from deslo_plugin.cli.plot import draw

        draw(outlook, plot)
    if as_json:
        show_json(outlook.as_dict())
    else:
        show(*outlook.shown())


def _replica_size(config: Config, wanted: int | None) -> int:
    size = config.deslo.replica_size
    if size == "auto":
        if wanted is None:
            raise ConfigError(
                "--replica-size",
                "the ranks of one replica, which the config leaves to the job",
                "none",
                "give it: usually the GPUs of a node",
            )
        return wanted
    if wanted not in (None, size):
        raise ConfigError("--replica-size", f"{size}, as deslo.replica_size", str(wanted), "remove one of them")
    return size


def _numel(params: str | None, model: str | None) -> int:
    if (params is None) == (model is None):
        raise ConfigError(
            "--params, --model", "one of them", "none" if params is None else "both", "say what is trained"
        )
    return count_parameters(model) if model is not None else parse_count(require(params))


def _step_seconds(
    step_ms: float | None, tokens: float | None, peak_tflops: float | None, mfu: float | None, numel: int, ranks: int
) -> tuple[float, str]:
    """(seconds, where they come from)"""
    estimate = {"--tokens-per-step": tokens, "--peak-tflops": peak_tflops, "--mfu": mfu}
    known = [name for name, value in estimate.items() if value is not None]
    if step_ms is not None and known:
        raise ConfigError("--step-ms", f"it or {', '.join(estimate)}", "both", "keep the measured one")
    if step_ms is None and len(known) < len(estimate):
        raise ConfigError(
            "--step-ms",
            "the measured time of a step, or all of " + ", ".join(estimate),
            f"only {', '.join(known)}" if known else "none",
            "measure a step on one replica, without its peers",
        )
    given = {"--step-ms": step_ms} if step_ms is not None else estimate
    for name, value in ((name, require(value)) for name, value in given.items()):
        if not 0 < value < float("inf") or (name == "--mfu" and value > 1):
            raise ConfigError(
                name, "a number in (0, 1]" if name == "--mfu" else "a number > 0", f"{value:g}", "correct it"
            )
    if step_ms is not None:
        return step_ms / 1e3, "as given"
    tokens, peak_tflops, mfu = require(tokens), require(peak_tflops), require(mfu)
    seconds = compute_seconds(numel, tokens, peak_tflops * 1e12 * ranks, mfu)
    return seconds, f"6 d D / (MFU S) = 6 x {numel:.4g} x {tokens:g} / ({mfu:g} x {ranks} x {peak_tflops:g}e12)"


def _share(target: str | None) -> float | None:
    """0.95 for "95%" and for "0.95"."""
    if target is None:
        return None
    try:
        share = float(target.removesuffix("%")) / (100 if target.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError("--target", "a share in (0, 1], such as 95% or 0.95", repr(target), "correct it")
    return share


def _gradient_dtype(wanted: str | None, blocks: Mapping[str, Any]) -> tuple[str, str]:
    """(dtype, where it comes from)"""
    if wanted is not None:
        if wanted not in GRADIENT_BYTES:
            raise ConfigError("--gradient-dtype", f"one of {', '.join(GRADIENT_BYTES)}", repr(wanted), "choose one")
        return wanted, "as given"
    for block, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if isinstance(blocks.get(block), Mapping) and blocks[block].get("enabled") is True:
            return dtype, f"{block} of the config"
    return "float32", "as of float32 parameters; --gradient-dtype bfloat16 halves them"


def _link(gbps: float | None, latency_ms: float | None, path: Path | None) -> Link:
    if (gbps is None) == (path is None):
        raise ConfigError(
            "--gbps, --link",
            "one of them",
            "none" if gbps is None else "both",
            "give Gbit/s, or measure: torchrun ... -m deslo_plugin.cli probe --json > link.json",
        )
    if path is not None:
        if latency_ms is not None:
            raise ConfigError("--latency-ms", "none beside --link, which has it", f"{latency_ms:g}", "remove it")
        gbps, latency_ms = _measured(path)
    gbps, latency_ms = require(gbps), latency_ms or 0.0
    if not 0 < gbps < float("inf"):
        raise ConfigError("--gbps", "a number > 0", f"{gbps:g}", "correct it")
    if not 0 <= latency_ms < float("inf"):
        raise ConfigError("--latency-ms", "a number >= 0", f"{latency_ms:g}", "correct it")
    return Link(gbps, latency_ms / 1e3)


def _measured(path: Path) -> tuple[float, float]:
    try:
        measured: Any = json.loads(path.read_text())
        return float(measured["gbit_per_s"]), float(measured["latency_ms"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            "--link", "what deslo probe --json printed", f"{str(path)!r} ({error!r})", "measure again"
        ) from error
