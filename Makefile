# `make demo` and `make test` alone are enough on a fresh machine with Python 3.10 or newer.
PYTHON ?= python3
VENV := .venv
VENV5 := .venv-transformers5
# what accelerate would otherwise ask for or guess; it gives a process one thread if not told
LAUNCH := --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(shell getconf _NPROCESSORS_ONLN)

.PHONY: demo test test-transformers5 notebooks benchmark format clean

demo: $(VENV)/installed
	$(VENV)/bin/accelerate launch $(LAUNCH) training/train.py training/configs/demo.yaml

test: $(VENV)/installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest

# What has to run on both major versions of Transformers, and checkpoints that go from one to the other.
test-transformers5: $(VENV)/installed $(VENV5)/installed
	MEVIT_OTHER_PYTHON=$(CURDIR)/$(VENV)/bin/python $(VENV5)/bin/python -m pytest -m "not slow"

notebooks: $(VENV)/installed
	cd notebooks && PYTHONWARNINGS=ignore ../$(VENV)/bin/jupyter-execute --inplace *.ipynb 2> /dev/null
	$(VENV)/bin/python tests/notebooks/without_stderr.py notebooks/*.ipynb

benchmark: $(VENV)/installed
	$(VENV)/bin/python training/benchmark.py

format: $(VENV)/installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) $(VENV5)

$(VENV)/installed: setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable ".[all]"
	touch $@

$(VENV5)/installed: setup.cfg
	$(PYTHON) -m venv $(VENV5)
	$(VENV5)/bin/python -m pip install --quiet --upgrade pip
	$(VENV5)/bin/python -m pip install --quiet --editable ".[training,dev]" "transformers>=5,<6"
	touch $@
