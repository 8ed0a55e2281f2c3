# From nothing but Python 3.10+ and pip:
#   make quickstart   generate RefShapes, train the tiny Shared-RIS on it, evaluate, draw predictions
#   make test         run the test suite
#   make overfit      train every small model until it knows 16 sentences by heart (some minutes)
#   make gpu          on a machine with an NVIDIA GPU: tests, speed, memory, training -> docs/gpu.md
# All first make $(VENV) with everything in it (about 3 GB to download), once.
# make PYTHON=python3.12 quickstart chooses the interpreter; VENV=dir puts it elsewhere.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check
INSTALLED = $(VENV)/.ris_d2-installed

.PHONY: quickstart test overfit gpu

quickstart: $(INSTALLED)
	@$(BIN)/python -W ignore::FutureWarning tools/quickstart.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -q

overfit: $(INSTALLED)
	$(BIN)/python -m pytest -q -m overfit

gpu: $(INSTALLED)
	$(BIN)/python -W ignore::FutureWarning tools/gpu_page.py

# pip itself is left as it is: from 26.3 on it refuses the sdist that the installer downloads, which
# then takes a detour. torch and setuptools come first because that sdist's setup.py imports them,
# OpenCV because detectron2 does.
$(INSTALLED): setup.py tools/install_detectron2.py
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("ris_d2 needs Python 3.10 or later, and $(PYTHON) is " + sys.version.split()[0] + "; choose one with PYTHON=...")'
	@echo "[1/4] virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/4] torch and OpenCV: about 3 GB, one or two minutes on a fast line"
	@$(PIP_INSTALL) torch torchvision opencv-python-headless 'setuptools>=70.1'
	@echo "[3/4] detectron2"
	@$(BIN)/python tools/install_detectron2.py
	@echo "[4/4] ris_d2 (editable) and what it requires"
	@$(PIP_INSTALL) --quiet --no-build-isolation -e '.[beit3,dev]'
	@touch $@
