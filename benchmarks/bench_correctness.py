"""Libraries of curvature run through the cases of `tests/curvature_cases.py`: what each of them gets right.

    PYTHONPATH=.:tests python benchmarks/bench_correctness.py [--only curvlinops] [--cases layer_norm,ghosts]

In the environment of requirements-peers.txt. A library that is not installed, or raises, is shown with its error. What
each is asked for, and with which settings, is in its adapter here; docs/correctness.md says why.

- curvlinops 3.0.1: `HessianLinearOperator` with its check of determinism, `eigsh` of `to_scipy()`, `hutchinson_trace`.
- PyHessian 0.1: the data as a loader, as it must be for more than one batch; `eigenvalues` with tol=1e-10 and up to
  5000 iterations, `trace` with its own tol=1e-3.
- hessian-eigenthings 1.0.0a5: `HessianOperator` by its default autograd and by finite differences with the default
  step; `lanczos` with 20, 40, 80, ... steps until every value is `converged` at tol=1e-8 (its default of 2 k
  leaves most of them unconverged), orthogonalizing as it decides; `trace` by Hutch++, its default.

`VARIANTS` are other settings of the same libraries that change a verdict.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from curvature_adapter import adapter
from curvature_cases import CASES, Case, Library, Trace, Verdict, long_sums, verdict
from curvature_problems import Problem, eigenvalues_of_gpt, gpt, seeded
from torch import Tensor

LONG = 10_000_000


def curvlinops() -> Library:
    from curvlinops import HessianLinearOperator, hutchinson_trace
    from scipy.sparse.linalg import eigsh

    def operator(problem: Problem) -> HessianLinearOperator:
        return HessianLinearOperator(problem.model, problem.criterion, problem.parameters, list(problem.batches))

    def eigenvalues(problem: Problem, k: int) -> Sequence[float]:
        return eigsh(operator(problem).to_scipy(), k=k, which="LM", return_eigenvectors=False).tolist()

    def trace(problem: Problem, seed: int, most: int) -> Trace:
        with seeded(seed):
            return Trace(float(hutchinson_trace(operator(problem), num_matvecs=most)))

    return Library("curvlinops", lambda problem, v: operator(problem) @ v, eigenvalues, trace)


def pyhessian() -> Library:
    from pyhessian import hessian

    def of(problem: Problem) -> hessian:
        return hessian(problem.model, problem.criterion, dataloader=list(problem.batches), cuda=False)

    def product(problem: Problem, v: Tensor) -> Tensor:
        sizes = [p.numel() for p in problem.parameters]
        along = [part.view_as(p) for part, p in zip(v.split(sizes), problem.parameters, strict=True)]
        return torch.cat([part.reshape(-1) for part in of(problem).dataloader_hv_product(along)[1]])

    def eigenvalues(problem: Problem, k: int) -> Sequence[float]:
        with seeded(0):
            return of(problem).eigenvalues(maxIter=5000, tol=1e-10, top_n=k)[0]

    def trace(problem: Problem, seed: int, most: int) -> Trace:
        with seeded(seed):
            samples = of(problem).trace(maxIter=most, tol=1e-3)
        return Trace(math.fsum(samples) / len(samples), tolerance=1e-3)

    return Library("PyHessian", product, eigenvalues, trace)


def eigenthings(method: str, of_trace: str = "hutch++", reorthogonalize: bool | None = None) -> Library:
    from hessian_eigenthings import HessianOperator, lanczos, supervised_loss, trace

    def operator(problem: Problem) -> HessianOperator:
        return HessianOperator(problem.model, list(problem.batches), supervised_loss(problem.criterion), method=method)

    def eigenvalues(problem: Problem, k: int) -> Sequence[float]:
        of, steps = operator(problem), 20
        while True:
            most = min(steps, problem.size - 1)
            found = lanczos(of, k=k, max_iter=most, tol=1e-8, seed=0, reorthogonalize=reorthogonalize)
            if bool(found.converged.all()) or steps >= min(problem.size, 320):
                return found.eigenvalues.tolist()
            steps *= 2

    def traces(problem: Problem, seed: int, most: int) -> Trace:
        found = trace(operator(problem), num_matvecs=most, method=of_trace, seed=seed)
        return Trace(found.estimate, None if math.isnan(found.stderr) else found.stderr)

    def product(problem: Problem, v: Tensor) -> Tensor:
        return operator(problem).matvec(v)

    return Library("hessian-eigenthings", product, eigenvalues, traces)


LIBRARIES: Mapping[str, tuple[str, Callable[[], Library]]] = {
    "gradscale": ("gradscale", adapter),
    "gradscale, differences": ("gradscale", partial(adapter, backend="finite_differences")),
    "curvlinops": ("curvlinops-for-pytorch", curvlinops),
    "PyHessian": ("PyHessian", pyhessian),
    "hessian-eigenthings": ("hessian-eigenthings", partial(eigenthings, "autograd")),
    "hessian-eigenthings, differences": ("hessian-eigenthings", partial(eigenthings, "finite_difference")),
}

VARIANTS: Mapping[str, tuple[Callable[[], Library], tuple[str, ...]]] = {
    "hessian-eigenthings, method='hutchinson'": (
        partial(eigenthings, "autograd", "hutchinson"),
        ("claimed_error", "long_sums"),
    ),
    "hessian-eigenthings, differences, method='hutchinson'": (
        partial(eigenthings, "finite_difference", "hutchinson"),
        ("trained_trace",),
    ),
    "hessian-eigenthings, reorthogonalize=True": (
        partial(eigenthings, "autograd", reorthogonalize=True),
        ("ghosts", "copies"),
    ),
}


def of_package(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of this checkout" if package == "gradscale" else "not installed"


def run(name: str, make: Callable[[], Library], cases: Mapping[str, Case]) -> dict[str, Verdict]:
    try:
        library = make()
    except ImportError as error:
        return {case: Verdict(False, f"ImportError: {error}") for case in cases}
    found = {}
    for case, runs in cases.items():
        start = time.perf_counter()
        found[case] = verdict(runs, library)
        print(f"{name}: {case}: {found[case]}, {time.perf_counter() - start:.1f} s", flush=True)
    return found


def cell(found: Verdict, width: int = 60) -> str:
    mark = {True: "pass", False: "FAIL", None: ""}[found.passed]
    figure = found.figure if len(found.figure) <= width else found.figure[: width - 1] + "…"
    return f"{mark} ({figure})" if mark and figure else mark or figure


def table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row).replace("\n", " ") + " |" for row in rows)


def eigenvalue_rows(names: Sequence[str]) -> list[list[str]]:
    """The two largest of the same batch, by the whole matrix and by every library."""
    rows = [["", "with RMSNorm", "with LayerNorm"], ["---"] * 3]
    norms = ("RMSNorm", "LayerNorm")
    rows.append(["whole matrix", *(_numbers(eigenvalues_of_gpt(norm, 2)) for norm in norms)])
    for name in names:
        try:
            library = LIBRARIES[name][1]()
            assert library.eigenvalues is not None
            rows.append([name, *(_numbers(library.eigenvalues(gpt(norm), 2)) for norm in norms)])
        except Exception as error:
            rows.append([name, type(error).__name__, f"{error}".splitlines()[0][:60]])
    return rows


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.9f}" for value in sorted(values, key=abs, reverse=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=";".join(LIBRARIES), help="libraries, separated by ;")
    parser.add_argument("--cases", default=",".join(CASES))
    settings = parser.parse_args()
    warnings.filterwarnings("ignore")  # of other libraries
    names = [name for name in LIBRARIES if name in settings.only.split(";")]
    known = {**CASES, "long_sums": partial(long_sums, size=LONG)}
    cases = {name: known[name] for name in settings.cases.split(",")}
    found = {name: run(name, LIBRARIES[name][1], cases) for name in names}
    others = []
    for name, (make, parts) in VARIANTS.items():
        if name.split(",")[0] in names:
            verdicts = run(name, make, {part: cases[part] for part in parts if part in cases})
            others += [[name, part, cell(each)] for part, each in verdicts.items()]
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads\n")
    head = [["case", *(f"{name} {of_package(LIBRARIES[name][0])}" for name in names)], ["---"] * (len(names) + 1)]
    print(table([*head, *([case, *(cell(found[name][case]) for name in names)] for case in cases)]))
    print("\n" + table([["other settings", "case", "verdict"], ["---"] * 3, *others]))
    print("\n" + table(eigenvalue_rows(names)))


if __name__ == "__main__":
    main()
