"""Measures of image and text features: pure functions here, run over whole data sets by ``evaluation.suite``."""

from protoclip_lab.evaluation.clusters import agreement, grouping, separation
from protoclip_lab.evaluation.gap import gap_sweep, modality_gap, separability
from protoclip_lab.evaluation.probes import knn, linear_probe
from protoclip_lab.evaluation.prompts import zero_shot
from protoclip_lab.evaluation.ranking import retrieval

__all__ = ["agreement", "gap_sweep", "grouping", "knn", "linear_probe"]
__all__ += ["modality_gap", "retrieval", "separability", "separation", "zero_shot"]
