"""Measures of image and text features: pure functions here, run over whole data sets by ``evaluation.suite``."""

from protoclip_lab.evaluation.clusters import agreement, grouping
from protoclip_lab.evaluation.gap import modality_gap
from protoclip_lab.evaluation.probes import knn, linear_probe
from protoclip_lab.evaluation.prompts import zero_shot
from protoclip_lab.evaluation.ranking import retrieval

__all__ = ["agreement", "grouping", "knn", "linear_probe", "modality_gap", "retrieval", "zero_shot"]
