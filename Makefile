# make demo · test · faults · soak · lint · bench · lab · notebooks. Each sets up .venv when it has to; PY=python takes the active environment.
PYTHON ?= python3
PY ?= .venv/bin/python
ready := $(if $(filter .venv/%,$(PY)),.venv/.installed)

.PHONY: help demo test faults soak lint bench lab notebooks

help:
	@echo "make demo       CLIP and ProtoCLIP on drawn shapes: data, teacher, training, evaluation, comparison"
	@echo "make test       the tests"
	@echo "make faults     the fault suite whole: 40 kills, full disks, damaged and hostile files; make test has a part of it"
	@echo "make soak       half an hour of training, its memory and file handles counted"
	@echo "make lint       ruff over code and notebooks"
	@echo "make bench      what ProtoCLIP costs beside CLIP, measured: reports/benchmarks/table.md"
	@echo "make lab        JupyterLab on the notebooks"
	@echo "make notebooks  write the settings of TrainConfig into the parameters cell of notebook 03"

demo: $(ready)
	$(PY) -m protoclip_lab run demo

test: $(ready)
	$(PY) -m pytest

faults: $(ready)
	ALL_FAULTS=1 $(PY) -m pytest tests/faults

soak: $(ready)
	$(PY) -m tests.faults.soak

lint: $(ready)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: $(ready)
	$(PY) -m tests.bench

lab: $(ready)
	$(PY) -m jupyterlab notebooks

notebooks: $(ready)
	$(PY) tests/notebooks/parameters_cell.py notebooks/03_train.ipynb

# The stamp is written last, so a set-up that was cut short is taken up again.
.venv/.installed: pyproject.toml
	@command -v $(PYTHON) > /dev/null || { echo "no $(PYTHON) here: install Python 3.10 or later, or make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("$(PYTHON) is Python %d.%d; 3.10 or later is needed: make PYTHON=python3.12" % v[:2])'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --editable '.[bench,collect,demo,test]'
	touch $@
