"""The ablations behind defaults: each a title and its variants."""

from collections.abc import Mapping
from typing import Any

from benchmarks.quality.methods import Preset, Run, run

Ablation = Mapping[str, list[Run]]


def ablations(preset: Preset) -> dict[str, Ablation]:
    """Title -> variants. All at one rate, and local after the synchronous warm-up."""
    K, titled = preset.period, {}

    def variant(name: str, **changes: Any) -> list[Run]:
        at = {"rate": preset.ablation_rate, "warm_up": True} | changes
        return [run(preset, name, seed=seed, **at) for seed in preset.ablation_seeds]

    apart = {"exp_avg": 3 * K, "exp_avg_sq": 6 * K}
    for name in ("DES-LOC", "MT-DAO"):
        fixed = apart if name == "DES-LOC" else {"exp_avg": K, "exp_avg_sq": K}
        titled[f"Period of the parameters, {name}"] = {
            f"K_x {every}, momenta {fixed['exp_avg']} / {fixed['exp_avg_sq']}": variant(
                name, sync_every={"params": every, **fixed}
            )
            for every in (K, K // 4, 4 * K, 16 * K)
        }
    slow, long = preset.slow_beta, 1 - (1 - preset.slow_beta) / 3
    titled["Periods of 32"] = {
        name: variant(name, period=4 * K)
        for name in ("synchronous AdamW", "Local Adam", "DES-LOC", "MT-DAO", "Local ADOPT", "MT-DAO, ADOPT")
    } | {
        f"{name}, beta {long:.4g}": variant(name, period=4 * K, slow={"beta": round(long, 4)})
        for name in ("MT-DAO", "MT-DAO, ADOPT")
    }
    titled["Momenta at equal traffic"] = {
        f"K_u {u or 'never'}, K_v {v or 'never'}": variant("DES-LOC", sync_every={"exp_avg": u, "exp_avg_sq": v})
        for u, v in ((3 * K, 6 * K), (6 * K, 3 * K), (4 * K, 4 * K), (2 * K, None), (None, 2 * K))
    }
    titled["Slow momentum of MT-DAO"] = {
        f"beta {beta:.4g}, weight {weight}": variant("MT-DAO", slow={"beta": round(beta, 4), "weight": weight})
        for beta in (slow, 1 - (1 - slow) * 3, long)
        for weight in (0.9, 0.8, 0.98)
    }
    titled["The raw gradient beside a momentum of 0.9"] = (
        {"weight 1: Local Adam": variant("Local Adam")}
        | {
            f"weight {weight}": variant("MT-DAO", slow={"beta": 0.9, "weight": weight})
            for weight in (0.9, 0.8, 0.6, 0.4)
        }
        | {
            "weight 1, 3x / 6x: DES-LOC": variant("DES-LOC"),
            "weight 0.8, 3x / 6x: DES-LOC-QH": variant("DES-LOC-QH"),
            "weight 1, synchronous": variant("synchronous AdamW"),
            "weight 0.8, synchronous": variant("synchronous QH", slow={"beta": 0.9, "weight": 0.8}),
        }
    )
    titled["Two momenta, 0.9 and slow"] = {"DES-LOC, 0.9 alone": variant("DES-LOC")} | {
        f"weights {first} and {second}": variant("MT-DAO, two momenta", weights=(first, second))
        for first, second in ((0.5, 0.4), (0.8, 0.2), (0.7, 0.3), (0.5, 0.5), (0.3, 0.6))
    }
    titled["Second moment"] = {
        f"{name}, beta2 {beta2:g}": variant(name, beta2=beta2)
        for name in ("synchronous AdamW", "synchronous QH", "Local Adam", "DES-LOC", "MT-DAO", "MT-DAO, two momenta")
        for beta2 in (0.95, 0.99, 0.999)
    }
    titled["Outer step"] = {"DES-LOC, none": variant("DES-LOC")} | {
        f"rate {rate:g}, momentum {momentum:g}": variant("DES-LOC", outer={"lr": rate, "momentum": momentum})
        for rate, momentum in ((1.0, 0.9), (0.7, 0.9), (0.3, 0.9), (0.1, 0.9), (1.0, 0.5), (0.7, 0.5), (1.0, 0.2))
    }
    titled["Fewer synchronous steps"] = {
        f"{name}, {preset.steps} steps": variant(name) for name in ("DES-LOC", "DES-LOC-QH")
    } | {
        f"synchronous AdamW, {steps} steps": variant(
            "synchronous AdamW", steps=None if steps == preset.steps else steps
        )
        for steps in (preset.steps, 3 * preset.steps // 4, preset.steps // 2, 3 * preset.steps // 8)
    }
    titled["Where in the step"] = {
        f"{name}, {when}": variant(name, deslo={} if when == "before_step" else {"average_at": when})
        for name in ("DES-LOC", "MT-DAO")
        for when in ("before_step", "after_step")
    }
    compared = ("synchronous AdamW", "Local Adam", "DES-LOC", "FAVG+OPT", "MT-DAO")
    titled["Another part of the corpus for each replica"] = {
        f"{name}{', own part' if shards else ''}": variant(name, shards=shards)
        for shards in (False, True)
        for name in compared
    }
    titled["Delay"] = {"1": variant("DES-LOC")} | {
        f"{delay}{'' if compensated else ', without beta^d'}": variant(
            "DES-LOC", deslo={"sync_delay": delay}, compensated=compensated
        )
        for delay in (2, 4, 8)
        for compensated in (True, False)
    }
    compared = ("synchronous AdamW", "Local Adam", "DES-LOC", "MT-DAO")
    for count, windows in ((4, 4), (4, 16), (4, 64), (8, 4), (16, 4)):
        sizes = {"replicas": count, "sequences": None if windows == preset.sequences else windows}
        titled[f"{count} replicas, {windows} windows each"] = {name: variant(name, **sizes) for name in compared}
    return {title: variants for title, variants in titled.items() if preset.ablated is None or title in preset.ablated}
