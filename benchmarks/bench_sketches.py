"""How far the cosines of sketched gradients are off, beside a dense Gaussian sketch of the same size.

    python benchmarks/bench_sketches.py [--subjects digits,text,hard,entries] [--dims 512,4096] [--markdown]

The error is that of <Sx, Sy> / (|x| |y|), with exact norms, against the exact cosine in float64: its root mean square
over pairs of examples and over seeds. A dense Gaussian sketch has exactly sqrt(mean (1 + c^2) / K), c the exact
cosine; the ratio is to that, at the K numbers that the scheme stores. Its standard error comes from the spread over
seeds: the pairs of one seed share a sketch. Dense maps take as many seeds as their entries allow, or are left out;
`gaussian, drawn` draws the sketches of B examples from their Gram matrix, which has the same distribution.

The peers' rows are the two-sided projections of `peer_sketches.py` at no more than K numbers in all. They cover
matrices alone, and are compared with the exact cosines of those. LoGra's scale differs from layer to layer, so that
exact norms would be of no use to it: its cosines take the sketches' own, as its users' do.

Shapes: B examples, F families of them, K numbers of a sketch, S seeds.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import peer_sketches
import subjects
import torch
from bench_gradients import Rows, machine, show
from subjects import Subject, exact_gram
from torch import Tensor

from gradscale.sketches import Sketch, parse_sketch
from gradscale.sketches.kronecker import KroneckerSketch

RANKS = (16, 32, 64)  # of `kronecker`
BAR = 1.15  # of the default at K = 4096
FEWEST = 5  # seeds that say something of their spread
DENSE = {"gaussian": 9e8, "rademacher": 4e9}  # entries of their matrices that may be made, over all seeds: 100 s, 40 s
Images = Callable[[int], Tensor]  # seed -> [B, K] float64


class Scheme(NamedTuple):
    name: str
    stored: int  # K
    images: Images
    seeds: int
    exact: Tensor  # [B, B]: the inner products that it estimates
    own_norms: bool = False


class Errors(NamedTuple):
    """Mean squares over the pairs of each family."""

    found: Tensor  # [S, F]
    expected: Tensor  # [F]: a dense Gaussian's


def cosines(products: Tensor, sq_norms: Tensor) -> Tensor:
    lengths = sq_norms.sqrt()
    return products / lengths[:, None] / lengths


def by_family(squares: Tensor, families: Mapping[str, slice]) -> Tensor:
    """[F]: the means of `squares` [B, B] over the pairs of each family."""
    means = []
    for part in families.values():
        block = squares[part, part]
        one, other = torch.triu_indices(*block.shape, offset=1)
        means.append(block[one, other].mean())
    return torch.stack(means)


def measured(scheme: Scheme, families: Mapping[str, slice]) -> Errors:
    exact = cosines(scheme.exact, scheme.exact.diagonal())
    found = []
    for seed in range(scheme.seeds):
        images = scheme.images(seed)
        products = images @ images.T
        norms = products.diagonal() if scheme.own_norms else scheme.exact.diagonal()
        found.append(by_family((cosines(products, norms) - exact).square(), families))
    return Errors(torch.stack(found), by_family((1 + exact.square()) / scheme.stored, families))


def rms(squares: Tensor) -> tuple[float, float]:
    """The root of the mean of [S] mean squares, and its standard error."""
    root = math.sqrt(float(squares.mean()))
    return root, float(squares.std()) / math.sqrt(len(squares)) / (2 * root) if root else 0.0


def ratio(errors: Errors) -> tuple[float, float]:
    """To the dense Gaussian's, over all families."""
    return rms(errors.found.mean(dim=1) / errors.expected.mean())


def ratios(errors: Errors) -> list[tuple[float, float]]:
    """To the dense Gaussian's, of each family."""
    return [rms(column) for column in (errors.found / errors.expected).T]


# Schemes


def image_of(make: Callable[[int], Sketch], subject: Subject, seed: int) -> Tensor:
    sketch = make(seed).bind(subject.sizes)
    return torch.stack([sketch.apply(name, grads) for name, grads in subject.grads.items()]).sum(dim=0).double()


def drawn(root: Tensor, dim: int, seed: int) -> Tensor:
    """Of a dense Gaussian: rows with the covariance root root^T / K."""
    generator = torch.Generator().manual_seed(seed)
    return root @ torch.randn(root.shape[1], dim, generator=generator, dtype=root.dtype) / math.sqrt(dim)


def root_of(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt()


def ours(subject: Subject, dim: int, seeds: int, exact: Tensor) -> list[Scheme]:
    def named(name: str, make: Callable[[int], Sketch], number: int) -> Scheme:
        return Scheme(name, dim, partial(image_of, make, subject), number, exact)

    def parsed(name: str, seed: int) -> Sketch:
        return parse_sketch(f"{name}:{dim}", seed)

    def of_rank(rank: int, seed: int) -> Sketch:
        return KroneckerSketch(dim, seed, rank)

    default = parse_sketch(f"default:{dim}", 0).bind(subject.sizes).scheme
    title = f"default: {default['name']}, version {default['version']}"
    schemes = [named(title, partial(parsed, "default"), seeds), named("srht", partial(parsed, "srht"), seeds // 2)]
    schemes += [named(f"kronecker, rank {rank}", partial(of_rank, rank), seeds // 2) for rank in RANKS]
    for name, entries in DENSE.items():
        number = min(seeds // 2, int(entries / dim / sum(subject.sizes.values())))
        if number >= FEWEST and (name != "gaussian" or subject.note):  # of drawn gradients, only from the Gram matrix
            schemes.append(named(name, partial(parsed, name), number))
    schemes.append(Scheme("gaussian, drawn", dim, partial(drawn, root_of(exact), dim), 5 * seeds, exact))
    return schemes


def peers(subject: Subject, dim: int, seeds: int, exact: Tensor) -> list[Scheme]:
    """`exact` is of the matrices alone."""
    matrices = subject.matrices
    p = peer_sketches.rank_for(dim, len(matrices))
    stored, size = p * p * len(matrices), f"{p} x {p} of {len(matrices)}"

    def two_sided(draw: peer_sketches.Draw, seed: int) -> Tensor:
        return peer_sketches.two_sided(matrices, p, draw, seed)

    return [
        Scheme(f"bergson, signs {size}", stored, partial(two_sided, peer_sketches.signs), seeds // 2, exact),
        Scheme(f"bergson, normals {size}", stored, partial(two_sided, peer_sketches.normals), seeds // 2, exact),
        Scheme(f"LoGra {size}, own norms", stored, partial(peer_sketches.logra, matrices, p), seeds // 2, exact, True),
    ]


# Tables


def error_rows(subject: Subject, dim: int, seeds: int) -> tuple[Rows, Errors]:
    """The rows of a table, and the errors of the default."""
    whole = exact_gram(subject.grads.values())
    schemes = ours(subject, dim, seeds, whole)
    if subject.matrices:
        of_matrices = exact_gram(subjects.Whole(grads) for grads in subject.matrices.values())
        schemes += peers(subject, dim, seeds, of_matrices)
    found = [(scheme, measured(scheme, subject.families)) for scheme in schemes]
    return [_row(scheme, errors, subject) for scheme, errors in found], found[0][1]


def _row(scheme: Scheme, errors: Errors, subject: Subject) -> tuple[str, ...]:
    error, spread = rms(errors.found.mean(dim=1))
    dense = math.sqrt(float(errors.expected.mean()))
    each = ratios(errors)
    worst = max(range(len(each)), key=lambda i: each[i][0])
    row = (scheme.name, str(scheme.stored), str(scheme.seeds), f"{error:.4f} ± {spread:.4f}", f"{dense:.4f}")
    row = (*row, plus_minus(ratio(errors)))
    return row if len(each) == 1 else (*row, f"{plus_minus(each[worst])} {list(subject.families)[worst]}")


HEADER = ("scheme", "K", "seeds", "rms error", "dense Gaussian, exact", "ratio")


def plus_minus(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.3f} ± {pair[1]:.3f}"


def error_table(subject: Subject, dims: Sequence[int], seeds: int) -> tuple[Rows, dict[int, Errors]]:
    header = HEADER if len(subject.families) == 1 else (*HEADER, "worst family")
    rows: Rows = [header]
    defaults = {}
    for dim in dims:
        more, defaults[dim] = error_rows(subject, dim, seeds)
        rows += more
    return rows, defaults


def family_table(found: Mapping[str, tuple[Subject, Errors]]) -> Rows:
    """The default's ratio, by family and subject."""
    families = next(iter(found.values()))[0].families
    columns = [[plus_minus(pair) for pair in ratios(errors)] for _, errors in found.values()]
    return [("family", *found), *zip(families, *columns, strict=True)]


def pairs_in(subject: Subject) -> str:
    count = sum(math.comb(part.stop - part.start, 2) for part in subject.families.values())
    examples = max(part.stop for part in subject.families.values())
    return f"{subject.name}: {examples} gradients, {count} pairs{', ' + subject.note if subject.note else ''}"


def check_peers() -> str:
    means = ", ".join(f"{name} {mean:.3f}" for name, mean in peer_sketches.check_means().items())
    try:
        beside = f"{peer_sketches.difference_from_bergson():.0e} relative to what bergson itself collects"
    except ImportError as problem:
        beside = f"not held to bergson: {problem}"
    return f"peers' definitions: mean of |Sx|^2 / |x|^2 over what is stated: {means}; difference {beside}"


def subjects_of(kind: str, examples: int) -> list[Callable[[], Subject]]:
    return {
        "digits": [partial(subjects.digits, examples)],
        "text": [partial(subjects.text, examples)],
        "hard": [partial(subjects.hard, *shape) for shape in subjects.SHAPES],
        "entries": [partial(subjects.single_entries, *shape) for shape in subjects.SHAPES[:2]],
    }[kind]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", default="digits,text,hard,entries")
    parser.add_argument("--dims", default="512,4096")
    parser.add_argument("--examples", type=int, default=32, help="of a model")
    parser.add_argument("--seeds", type=int, default=40, help="of the default scheme; others take half as many")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markdown", action="store_true", help="a section for RESULTS.md")
    return parser.parse_args()


def main() -> None:
    settings = arguments()
    if "OMP_WAIT_POLICY" not in os.environ:  # threads that spin while others hold their core
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OMP_WAIT_POLICY": "passive"})
    torch.set_num_threads(settings.threads)
    dims = [int(dim) for dim in settings.dims.split(",")]
    if settings.markdown:
        print(f"## {datetime.date.today()}\n\n`python {' '.join(sys.argv)}`\n")
    print(machine(settings.threads), check_peers(), sep="\n", flush=True)
    for kind in filter(None, settings.subjects.split(",")):
        families = {}
        for make in subjects_of(kind, settings.examples):
            subject = make()
            rows, defaults = error_table(subject, dims, settings.seeds)
            show(pairs_in(subject), rows, markdown=settings.markdown)
            families[subject.name] = subject, defaults[dims[-1]]
            if dims[-1] == 4096:
                value, spread = ratio(defaults[4096])
                print(f"\nbar of the default at K=4096: {BAR}, came out {value:.3f} ± {spread:.3f}", flush=True)
        if len(families) > 1:
            title = f"The default's ratio by family, K={dims[-1]}"
            show(title, family_table(families), markdown=settings.markdown)


if __name__ == "__main__":
    main()
