"""What a finished spectrum run fell short of, and what to ask for next time: said once, when the command ends."""

from __future__ import annotations

from typing import Any

import pandas as pd

from gradscale.store.spectra import EIGENVALUE, Spectrum

_BLOCKS = 10  # shards that give a jackknife error worth having
_ANEW = "into another --out"


def shortfalls(run: Spectrum) -> list[str]:
    """A line for each: eigenvalues that did not converge, errors larger than asked for or unknown, undefined values.

    Raises: GradscaleError as `Spectrum.estimates`.
    """
    plan, estimates = run.plan, run.estimates()
    whole = estimates[estimates["scope"] == "all"]
    said = [_unconverged(run), _trace_error(plan, whole), _one_shard(plan, whole), _undefined(plan, whole)]
    return [line for line in said if line]


def _unconverged(run: Spectrum) -> str:
    frame = run.spectra()
    found = frame[frame["kind"] == EIGENVALUE]
    lacking = found[~found["converged"].astype(bool)]
    if not len(lacking):
        return ""
    return (
        f"{len(lacking)} of {len(found)} eigenvalues have not converged{_at(lacking)}; their residuals are in "
        f"`gradscale show`; raise --max-steps ({run.plan['max_steps']} here) or --basis-cap, or ask for fewer, {_ANEW}"
    )


def _trace_error(plan: dict[str, Any], whole: pd.DataFrame) -> str:
    asked = plan.get("trace") or {}
    found = whole[whole["name"] == "trace_sample"]
    value, stderr = found["value"].abs(), found["stderr"]
    if asked.get("relative") is None and asked.get("stderr") is None:
        return ""
    limit = value * asked["relative"] if asked.get("relative") is not None else asked["stderr"]
    short = found[stderr > limit]
    if not len(short):
        return ""
    worst = (short["stderr"] / short["value"].abs()).max()
    wanted = f"{asked['relative']:.2g} of it" if asked.get("relative") is not None else f"{asked['stderr']:.3g}"
    return (
        f"the trace's standard error over probes is still {worst:.2g} of it, more than the {wanted} asked for, after "
        f"{asked['max_probes']} probes{_at(short)}; raise --trace-probes, or take --trace-method hutch++, {_ANEW}"
    )


def _one_shard(plan: dict[str, Any], whole: pd.DataFrame) -> str:
    examples, size = plan["examples"], plan["shard_size"]
    by_probes = (plan.get("trace") or {}).get("method") == "hutchinson" and (whole["name"] == "trace").any()
    if not by_probes or examples > size or examples < 2:
        return ""
    better = max(1, examples // _BLOCKS)
    return (
        f"all {examples} examples are in one shard, so that `trace` has no error over examples (`trace_sample` has "
        f"that over probes); --shard-size {better} gives {-(-examples // better)} shards, {_ANEW}"
    )


def _undefined(plan: dict[str, Any], whole: pd.DataFrame) -> str:
    found = whole[whole["name"].isin(["log_determinant", "effective_dimension"])]
    lacking = found[found["value"].isna()]
    if not len(lacking):
        return ""
    names = " and ".join(lacking["name"].unique())
    shift = (plan.get("density") or {}).get("shift")
    return (
        f"{names}: undefined{_at(lacking)}, as some eigenvalue lies at or below -{shift:g}, minus the shift; take a "
        f"larger --shift, or --operator ggn, whose eigenvalues are not negative, {_ANEW}"
    )


def _at(rows: pd.DataFrame) -> str:
    steps = sorted({int(step) for step in rows["step"]})
    return f" at step {steps[0]}" if len(steps) == 1 else f" at {len(steps)} steps, the last of them {steps[-1]}"
