# make demo   train a small model for two minutes, sample it, write pictures
# make test   lint and all tests
# make clean  forget the virtual environment and the demo

PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint clean

# A stamp records what was installed, so that nothing is done twice.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-test: .venv/installed requirements-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest

clean:
	rm -rf .venv demo
