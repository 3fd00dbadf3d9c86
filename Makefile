# make demo       train a small model for one to five minutes, sample it, write pictures to demo/
# make test       check the style and run all tests
# make quick      run a subset of the tests, in less than a minute
# make reference  add pytorch-fast-transformers, for --backend fast-transformers and its tests
# make benchmark-sampling, make benchmark-training   compare speed with pytorch-fast-transformers
# make comparison  compare linear, softmax and Reformer attention; results in comparison/
# make gpu        run the GPU's tests, and measure training and sampling on it, within 9 minutes
# make clean      remove the virtual environment and the demo

PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The demo: a small model of the embedded 28x28 digits.
ITERATIONS = 1200
MODEL = --dataset mnist-10k --recipe fast --n_layers 3 --n_heads 3 --batch_size 8 \
        --precision auto --log_frequency 100 --evaluate_frequency 100000 \
        --save_to 'demo/mnist.{}.pth' --continue_from 'demo/mnist.{}.pth'

# Two processes of tests, each with one thread.
TWO = OMP_NUM_THREADS=1

.PHONY: demo test quick reference benchmark-sampling benchmark-training comparison gpu clean

demo: .venv/installed
	$(BIN)/python main.py $(MODEL) --iterations $(ITERATIONS)
	$(BIN)/python prediction.py 'demo/mnist.{}.pth' --index 0-60 --offset 0 \
	    --save_grid demo/samples.png
	$(BIN)/python prediction.py 'demo/mnist.{}.pth' --index 5 --save_gif demo/completion.gif
	@echo 'Samples are in demo/samples.png, an animation of one being completed in demo/completion.gif.'

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(TWO) $(BIN)/python -m pytest -n 2

# The unit tests that need neither a compiler nor seconds.
quick: .venv/installed-test
	$(BIN)/ruff check .
	$(TWO) $(BIN)/python -m pytest -n 2 -m 'not slow' tests/unit

reference: .venv/installed-reference

benchmark-sampling: reference
	$(BIN)/python -m benchmarks.sampling_speed

benchmark-training: reference
	$(BIN)/python -m benchmarks.training_speed

comparison: .venv/installed
	$(BIN)/python -m benchmarks.comparison --json comparison/speed.json --plot comparison/speed.png

gpu: .venv/installed-test
	$(BIN)/python -m benchmarks.gpu

clean:
	rm -rf .venv demo

# The stamps record what is installed, so that nothing is installed twice.
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
