"""What frozen features tell apart: nearest neighbours, linear classifiers, few examples of each class."""

from mmcl.evaluation.probes.few_shot import FewShotResult, few_shot
from mmcl.evaluation.probes.linear import LinearProbe, choose_probe, fit_logistic, fit_ridge
from mmcl.evaluation.probes.neighbours import neighbour_accuracy, neighbour_votes

__all__ = [
    "FewShotResult",
    "LinearProbe",
    "choose_probe",
    "few_shot",
    "fit_logistic",
    "fit_ridge",
    "neighbour_accuracy",
    "neighbour_votes",
]
