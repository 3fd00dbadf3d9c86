# make demo       train a small model for about two minutes, sample it, write pictures to demo/
# make test       check the style and run all tests
# make reference  add pytorch-fast-transformers, for --backend fast-transformers and its tests
# make benchmark-sampling, make benchmark-training   both beside pytorch-fast-transformers
# make clean      forget the virtual environment and the demo

PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The demo's two stages: most of the way with large steps, the rest with small ones.
ITERATIONS = 1200
MORE_ITERATIONS = 1700
MODEL = --dataset digits --n_layers 4 --n_heads 4 --optimizer adam --batch_size 16 \
        --log_frequency 50 --save_to 'demo/digits.{}.pth' --continue_from 'demo/digits.{}.pth'

.PHONY: demo test reference benchmark-sampling benchmark-training clean

demo: .venv/installed
	$(BIN)/python main.py $(MODEL) --lr 2e-3 --iterations $(ITERATIONS)
	$(BIN)/python main.py $(MODEL) --lr 3e-4 --iterations $(MORE_ITERATIONS)
	$(BIN)/python prediction.py 'demo/digits.{}.pth' --recurrent --index 0-60 --offset 0 \
	    --temperature 0.8 --save_grid demo/samples.png
	$(BIN)/python prediction.py 'demo/digits.{}.pth' --recurrent --index 5 --offset 24 \
	    --save_gif demo/completion.gif
	@echo 'The samples are in demo/samples.png, an image being completed in demo/completion.gif.'

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

reference: .venv/installed-reference

benchmark-sampling: reference
	$(BIN)/python -m benchmarks.sampling

benchmark-training: reference
	$(BIN)/python -m benchmarks.training

clean:
	rm -rf .venv demo

# The stamps record what was installed, so that nothing is done twice.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/installed-test: .venv/installed requirements-test.txt
	$(PIP) -r requirements-test.txt
	touch $@

.venv/installed-reference: .venv/installed reference/install.sh
	sh reference/install.sh $(BIN)/python
	touch $@
