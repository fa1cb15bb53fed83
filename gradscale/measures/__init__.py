"""The measures, by the name that `--measures` takes."""

from __future__ import annotations

from gradscale.measures.coherence import Coherence
from gradscale.measures.curvature import Curvature
from gradscale.measures.dispersion import Dispersion
from gradscale.measures.effective_gram import EffectiveGram
from gradscale.measures.featurizer import FeaturizerWidth
from gradscale.measures.gaussian_width import GaussianWidth
from gradscale.measures.geometric_complexity import GeometricComplexity
from gradscale.measures.sensitivity import Sensitivity
from gradscale.measures.sharpness import Sharpness
from gradscale.measures.stiffness import Stiffness
from gradscale.measures.tangent_kernel import TangentKernel
from gradscale.measures.worst_case import WorstCase

_Gradients = Coherence | Dispersion | EffectiveGram | GaussianWidth | Stiffness
_Beside = Curvature | FeaturizerWidth | GeometricComplexity | Sensitivity | Sharpness | TangentKernel | WorstCase

MEASURES: dict[str, type[_Gradients | _Beside]] = {
    "coherence": Coherence,
    "dispersion": Dispersion,
    "effective_gram": EffectiveGram,
    "stiffness": Stiffness,
    "gaussian_width": GaussianWidth,
    "featurizer": FeaturizerWidth,
    "geometric_complexity": GeometricComplexity,
    "tangent_kernel": TangentKernel,
    "sensitivity": Sensitivity,
    "sharpness": Sharpness,
    "worst_case": WorstCase,
    "curvature": Curvature,
}
