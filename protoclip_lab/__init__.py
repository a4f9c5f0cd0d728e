"""protoclip_lab: a research workbench for prototypical image-text pretraining (ProtoCLIP, arXiv 2206.10996)."""

import os

__version__ = "0.1.0"

# torch and faiss each bring an OpenMP pool, and idle threads spin. On two cores with one busy neighbour a training step
# took 0.62 s so, and 0.38 s when they sleep; alone, 0.25 s both ways. Read when torch is loaded, hence here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
