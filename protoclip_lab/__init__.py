"""protoclip_lab: a research workbench for prototypical image-text pretraining (ProtoCLIP, arXiv 2206.10996)."""

__version__ = "0.1.0"
