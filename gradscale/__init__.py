"""gradscale: per-example gradients of transformers, measured at scale.

Everything is imported on first use, so that `import gradscale` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradscale.checkpoints import load_state_dict as load_state_dict
    from gradscale.checkpoints import load_weights as load_weights
    from gradscale.errors import GradscaleError as GradscaleError
    from gradscale.errors import OutOfMemory as OutOfMemory
    from gradscale.errors import ShardsFailed as ShardsFailed
    from gradscale.interventions.clipping import DynamicClipping as DynamicClipping
    from gradscale.interventions.gaussian_perturbation import GaussianPerturbation as GaussianPerturbation
    from gradscale.interventions.hessian_trace import HessianTracePenalty as HessianTracePenalty
    from gradscale.interventions.label_noise import LabelNoise as LabelNoise
    from gradscale.interventions.robust_mean import MedianOfMeans as MedianOfMeans
    from gradscale.interventions.robust_mean import Winsorized as Winsorized
    from gradscale.interventions.sharpness_aware import SAM as SAM
    from gradscale.interventions.state import StepState as StepState
    from gradscale.measures.coherence import Coherence as Coherence
    from gradscale.measures.curvature import Curvature as Curvature
    from gradscale.measures.dispersion import Dispersion as Dispersion
    from gradscale.measures.effective_gram import EffectiveGram as EffectiveGram
    from gradscale.measures.featurizer import FeaturizerWidth as FeaturizerWidth
    from gradscale.measures.frame import estimates_frame as estimates_frame
    from gradscale.measures.gaussian_width import GaussianWidth as GaussianWidth
    from gradscale.measures.geometric_complexity import GeometricComplexity as GeometricComplexity
    from gradscale.measures.gram_width import width_of_gram as width_of_gram
    from gradscale.measures.measure import Estimate as Estimate
    from gradscale.measures.measure import Gathering as Gathering
    from gradscale.measures.measure import MicroBatch as MicroBatch
    from gradscale.measures.measure import Observation as Observation
    from gradscale.measures.sensitivity import Sensitivity as Sensitivity
    from gradscale.measures.sharpness import Sharpness as Sharpness
    from gradscale.measures.stiffness import Stiffness as Stiffness
    from gradscale.measures.tangent_kernel import TangentKernel as TangentKernel
    from gradscale.measures.worst_case import WorstCase as WorstCase
    from gradscale.run.attach import attach as attach
    from gradscale.run.batch_gradients import batch_coherence as batch_coherence
    from gradscale.run.check_measure import check_measure as check_measure
    from gradscale.run.covariance_spectrum import covariance_spectrum as covariance_spectrum
    from gradscale.run.engine_hessian import engine_hessian as engine_hessian
    from gradscale.run.features import featurizer_width as featurizer_width
    from gradscale.run.job import Progress as Progress
    from gradscale.run.job import measure as measure
    from gradscale.run.leave_out import LeaveOutGap as LeaveOutGap
    from gradscale.run.leave_out import leave_out_gap as leave_out_gap
    from gradscale.run.sign_stiffness import sign_stiffness as sign_stiffness
    from gradscale.run.spectrum import spectrum as spectrum
    from gradscale.run.spectrum_plan import SLQ as SLQ
    from gradscale.run.spectrum_plan import Deflated as Deflated
    from gradscale.run.spectrum_plan import Hutchinson as Hutchinson
    from gradscale.run.spectrum_plan import Norms as Norms
    from gradscale.run.spectrum_plan import Stability as Stability
    from gradscale.run.stiffness_between import stiffness_between as stiffness_between
    from gradscale.run.stiffness_distance import stiffness_by_distance as stiffness_by_distance
    from gradscale.run.tangent_spectrum import tangent_spectrum as tangent_spectrum
    from gradscale.run.training_path import gradient_variances as gradient_variances
    from gradscale.run.training_path import path_length as path_length
    from gradscale.run.training_path import perturbation_integral as perturbation_integral
    from gradscale.run.training_path import training_complexity as training_complexity
    from gradscale.run.training_path import training_path as training_path
    from gradscale.run.training_path import variance_sum as variance_sum
    from gradscale.run.trajectory import feature_norms as feature_norms
    from gradscale.run.trajectory import path_complexity as path_complexity
    from gradscale.run.trajectory_bounds import rademacher_bound as rademacher_bound
    from gradscale.run.trajectory_domination import gradient_domination as gradient_domination
    from gradscale.run.widths import tuple_width as tuple_width
    from gradscale.run.widths import width as width
    from gradscale.sketches.gaussian import GaussianSketch as GaussianSketch
    from gradscale.store.results import Run as Run
    from gradscale.store.results import open_run as open_run
    from gradscale.store.spectra import Spectrum as Spectrum
    from gradscale.task import Examples as Examples
    from gradscale.task import Task as Task
    from gradscale.task import TensorExamples as TensorExamples
    from gradscale.tasks.tables import JsonlExamples as JsonlExamples
    from gradscale.tasks.tables import ParquetExamples as ParquetExamples

__version__ = "0.1.0"

_HOMES = {
    "load_state_dict": "gradscale.checkpoints",
    "load_weights": "gradscale.checkpoints",
    "GradscaleError": "gradscale.errors",
    "OutOfMemory": "gradscale.errors",
    "ShardsFailed": "gradscale.errors",
    "DynamicClipping": "gradscale.interventions.clipping",
    "GaussianPerturbation": "gradscale.interventions.gaussian_perturbation",
    "HessianTracePenalty": "gradscale.interventions.hessian_trace",
    "LabelNoise": "gradscale.interventions.label_noise",
    "MedianOfMeans": "gradscale.interventions.robust_mean",
    "Winsorized": "gradscale.interventions.robust_mean",
    "SAM": "gradscale.interventions.sharpness_aware",
    "StepState": "gradscale.interventions.state",
    "Coherence": "gradscale.measures.coherence",
    "Curvature": "gradscale.measures.curvature",
    "Dispersion": "gradscale.measures.dispersion",
    "EffectiveGram": "gradscale.measures.effective_gram",
    "FeaturizerWidth": "gradscale.measures.featurizer",
    "estimates_frame": "gradscale.measures.frame",
    "GaussianWidth": "gradscale.measures.gaussian_width",
    "GeometricComplexity": "gradscale.measures.geometric_complexity",
    "width_of_gram": "gradscale.measures.gram_width",
    "Estimate": "gradscale.measures.measure",
    "Gathering": "gradscale.measures.measure",
    "MicroBatch": "gradscale.measures.measure",
    "Observation": "gradscale.measures.measure",
    "Stiffness": "gradscale.measures.stiffness",
    "Sensitivity": "gradscale.measures.sensitivity",
    "Sharpness": "gradscale.measures.sharpness",
    "TangentKernel": "gradscale.measures.tangent_kernel",
    "WorstCase": "gradscale.measures.worst_case",
    "attach": "gradscale.run.attach",
    "batch_coherence": "gradscale.run.batch_gradients",
    "covariance_spectrum": "gradscale.run.covariance_spectrum",
    "check_measure": "gradscale.run.check_measure",
    "engine_hessian": "gradscale.run.engine_hessian",
    "featurizer_width": "gradscale.run.features",
    "Progress": "gradscale.run.job",
    "measure": "gradscale.run.job",
    "LeaveOutGap": "gradscale.run.leave_out",
    "leave_out_gap": "gradscale.run.leave_out",
    "sign_stiffness": "gradscale.run.sign_stiffness",
    "spectrum": "gradscale.run.spectrum",
    "SLQ": "gradscale.run.spectrum_plan",
    "Deflated": "gradscale.run.spectrum_plan",
    "Hutchinson": "gradscale.run.spectrum_plan",
    "Norms": "gradscale.run.spectrum_plan",
    "Stability": "gradscale.run.spectrum_plan",
    "stiffness_by_distance": "gradscale.run.stiffness_distance",
    "stiffness_between": "gradscale.run.stiffness_between",
    "tangent_spectrum": "gradscale.run.tangent_spectrum",
    "gradient_variances": "gradscale.run.training_path",
    "path_length": "gradscale.run.training_path",
    "perturbation_integral": "gradscale.run.training_path",
    "training_complexity": "gradscale.run.training_path",
    "training_path": "gradscale.run.training_path",
    "variance_sum": "gradscale.run.training_path",
    "feature_norms": "gradscale.run.trajectory",
    "path_complexity": "gradscale.run.trajectory",
    "rademacher_bound": "gradscale.run.trajectory_bounds",
    "gradient_domination": "gradscale.run.trajectory_domination",
    "tuple_width": "gradscale.run.widths",
    "width": "gradscale.run.widths",
    "GaussianSketch": "gradscale.sketches.gaussian",
    "Run": "gradscale.store.results",
    "open_run": "gradscale.store.results",
    "Spectrum": "gradscale.store.spectra",
    "Examples": "gradscale.task",
    "Task": "gradscale.task",
    "TensorExamples": "gradscale.task",
    "JsonlExamples": "gradscale.tasks.tables",
    "ParquetExamples": "gradscale.tasks.tables",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gradscale' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
