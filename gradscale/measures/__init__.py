"""The measures, by the name that `--measures` takes."""

from __future__ import annotations

from gradscale.measures.coherence import Coherence
from gradscale.measures.dispersion import Dispersion
from gradscale.measures.effective_gram import EffectiveGram
from gradscale.measures.featurizer import FeaturizerWidth
from gradscale.measures.gaussian_width import GaussianWidth

MEASURES: dict[str, type[Coherence | Dispersion | EffectiveGram | FeaturizerWidth | GaussianWidth]] = {
    "coherence": Coherence,
    "dispersion": Dispersion,
    "effective_gram": EffectiveGram,
    "gaussian_width": GaussianWidth,
    "featurizer": FeaturizerWidth,
}
