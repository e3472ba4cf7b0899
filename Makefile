# Everything on a fresh machine with Python >= 3.10: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := configs/vp/digits_ddpmpp_continuous.py

.PHONY: env demo gallery docs test test-slow matrix audit lint clean

env: $(VENV)/.ready

$(VENV)/.ready: setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "expected Python >= 3.10, got " + sys.version.split()[0] + "; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar off --quiet -e '.[test]'
	touch $@

demo: env
	$(BIN)/python main.py --config $(DEMO) --workdir runs/demo --mode train
	$(BIN)/python main.py --config $(DEMO) --workdir runs/demo --mode eval
	@echo "The report: runs/demo/report.html"

gallery: env
	$(BIN)/python -m benchmarks.gallery $(ARGS)

docs: env
	$(BIN)/python -m sphinx --fail-on-warning --keep-going docs build/docs
	@echo "The site: build/docs/index.html"

lint: env
	$(BIN)/ruff check .
	$(BIN)/pyright --warnings

test: lint
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadgroup --durations=10

test-slow: env
	$(BIN)/python -m pytest -m slow -n 2 --dist loadgroup --durations=10

# The suite with the oldest and the newest versions; ARGS=all for every Python found.
matrix:
	$(PYTHON) .ci/matrix.py $(ARGS)

# What is known to be wrong with the packages that are installed; asks PyPI.
audit: env
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip freeze --exclude-editable > $(VENV)/audit/installed.txt
	$(VENV)/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement $(VENV)/audit/installed.txt

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache runs/demo
