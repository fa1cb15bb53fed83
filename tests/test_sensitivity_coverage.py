"""Promise: the stated errors of `sensitivity` hold the truth as often as they say.

Shapes: n examples, P entries of the weights, N draws.
"""

from __future__ import annotations

import numpy as np
from test_measure_laws import assert_honest
from test_probing import measured
from test_sharpness import Squares

from gradscale.measures.sensitivity import Sensitivity

N, ROWS, P, SIGMA = 20, 60, 12, 0.3


def test_the_errors_of_gradient_and_value_are_honest() -> None:
    """Examples and draws anew in every run. `gradient` speaks of draws: its truth is of the halves that there are."""
    at, scale = tuple(np.linspace(-1, 1, P)), np.linspace(0.5, 2, P)  # the scale of the columns of x in Squares
    value = SIGMA**2 * (scale**2).sum() / 2  # of the population
    scores: dict[str, list[float]] = {"gradient": [], "value": []}
    for seed in range(220):
        task = Squares(ROWS, at, at, seed)
        x = task.examples().tensors["x"].numpy()
        even, odd = (part.T @ part / len(part) for part in (x[::2], x[1::2]))
        truth = {"gradient": SIGMA**2 * (even * odd).sum(), "value": value}
        found = measured(task, Sensitivity(SIGMA, num_draws=N, seed=seed), ROWS, ROWS)
        for name, exact in truth.items():
            estimate = found[name, "all"]
            assert estimate.stderr is not None
            scores[name].append(float((estimate.value - exact) / estimate.stderr))
    for parts in scores.values():
        assert_honest(parts, N - 1)
