# Every target works on a fresh clone and, once it ran, without a network.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --disable-pip-version-check -q -c constraints.txt
SETUP  := settings.ini setup.py pyproject.toml constraints.txt $(wildcard i2i_mamba_nb/csrc/*.h i2i_mamba_nb/csrc/*.cpp)
export PATH := $(abspath $(BIN)):$(PATH)
# Threads that wait spin shortly: fast on a quiet machine, not slowed down by a busy one (bench/threads.py)
export GOMP_SPINCOUNT ?= 1000
.DELETE_ON_ERROR:
.PHONY: demo test lab bench export run clean

demo: $(VENV)/ok-run
	i2i-mamba demo --out out

test: $(VENV)/ok-test
	OMP_NUM_THREADS=1 nbdev_test --n_workers 2 --timing
	OMP_NUM_THREADS=2 python -m pytest -q tests
	ruff check

lab: $(VENV)/ok-lab
	jupyter lab --no-browser $(if $(filter 0,$(shell id -u)),--allow-root) nbs

# Scans take a quarter of an hour, the others one to eight minutes each, alone on the machine (`prepare`, not in the list: half an hour); `make bench BENCH=scan` for one of them
BENCH ?= scan mixers auto network models cpu_ideas loader
bench: $(VENV)/ok-dev
	for name in $(BENCH); do OMP_NUM_THREADS=2 python bench/$$name.py || exit 1; done

# For those who write: clean and export the notebooks, then README.md from index.ipynb
export: $(VENV)/ok-dev
	nbdev_clean && nbdev_export
	python tools/build_readme.py nbs/index.ipynb README.md

# For those who write: execute notebooks for committing, `make run NB="nbs/1_ssm/10_recurrence.ipynb"`; all without NB; one thread, so that the last bits repeat
run: $(VENV)/ok-dev
	OMP_NUM_THREADS=1 python tools/run_nb.py $(if $(NB),$(NB),$$(git ls-files 'nbs/*.ipynb'))

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# setuptools first and no build isolation: a rebuild needs no network
$(VENV)/ok-run: $(SETUP) | $(BIN)/python
	$(PIP) setuptools
	$(PIP) --no-build-isolation -e .
	touch $@

$(VENV)/ok-dev: $(VENV)/ok-run
	$(PIP) --no-build-isolation -e ".[dev]"
	touch $@

# Triton is large and has wheels for Linux only; without it its tests are skipped
$(VENV)/ok-test: $(VENV)/ok-dev
	$(PIP) --no-build-isolation -e ".[dev,triton]" || echo "triton cannot be installed here: its tests will be skipped"
	touch $@

$(VENV)/ok-lab: $(VENV)/ok-dev
	$(PIP) --no-build-isolation -e ".[dev,lab]"
	touch $@

clean:
	rm -rf $(VENV) build out *.egg-info i2i_mamba_nb/csrc/*.so
