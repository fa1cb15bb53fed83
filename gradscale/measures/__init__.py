"""The measures, by the name that `--measures` takes."""

from __future__ import annotations

from gradscale.measures.coherence import Coherence
from gradscale.measures.dispersion import Dispersion
from gradscale.measures.featurizer import FeaturizerWidth
from gradscale.measures.gaussian_width import GaussianWidth
from gradscale.measures.stiffness import Stiffness

MEASURES: dict[str, type[Coherence | Dispersion | FeaturizerWidth | GaussianWidth | Stiffness]] = {
    "coherence": Coherence,
    "dispersion": Dispersion,
    "gaussian_width": GaussianWidth,
    "featurizer": FeaturizerWidth,
    "stiffness": Stiffness,
}
