# `make demo` and `make test` alone are enough on a fresh machine with Python 3.10 or newer.
PYTHON ?= python3
VENV := .venv
VENV4 := .venv-transformers4
VENV_OLDEST := .venv-oldest
CORES := $(shell getconf _NPROCESSORS_ONLN)
# what accelerate would otherwise ask for or guess; it gives a process one thread if not told
LAUNCH := --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(CORES)
# one process of tests for each core; each keeps to one thread, the tests of a file stay together, and where a process
# ends the run ends, since what waits for its tests would wait for ever
PYTEST := -m pytest -n $(CORES) --dist loadfile --max-worker-restart 0

.PHONY: demo web test test-fast test-transformers4 test-oldest torture docs notebooks benchmark format clean

demo: $(VENV)/installed
	$(VENV)/bin/accelerate launch $(LAUNCH) training/train.py training/configs/demo.yaml

# The demo in the browser: trains and exports it if that is not done yet.
web: runs/demo-web/page.json
	$(VENV)/bin/python -m modeling_mevit.onnx.serve runs/demo-web

runs/demo/metrics.json:
	$(MAKE) demo

runs/demo-web/page.json: runs/demo/metrics.json $(VENV)/installed
	$(VENV)/bin/mevit calibrate runs/demo --data demo --max-accuracy-drop 0.02 --confidence 0.95 --bound difference \
		--output runs/demo-calibrated || $(VENV)/bin/mevit calibrate runs/demo --data demo --max-cost 0.6 \
		--output runs/demo-calibrated
	rm -rf runs/demo-web
	$(VENV)/bin/mevit export runs/demo-calibrated runs/demo-web --cascade --web --examples demo

test: $(VENV)/installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python $(PYTEST)

# No training run, no export: what to run while changing code.
test-fast: $(VENV)/installed
	$(VENV)/bin/python $(PYTEST) -m "not slow"

# What has to run on both major versions of Transformers, checkpoints and exports that go from one to the other, and
# what needs Optimum, which runs on 4.57 alone.
test-transformers4: $(VENV)/installed $(VENV4)/installed
	MEVIT_OTHER_PYTHON=$(CURDIR)/$(VENV)/bin/python $(VENV4)/bin/python $(PYTEST) -m "not one_major"

# The fast tests on the oldest versions that setup.cfg allows. Downloads several GB.
test-oldest: $(VENV_OLDEST)/installed
	$(VENV_OLDEST)/bin/python $(PYTEST) -m "not slow"

# Every attempt to break the project that docs/reliability.md tells of; writes docs/attempts.md.
torture: $(VENV)/installed
	$(VENV)/bin/python -m tests.torture

docs: $(VENV)/installed
	$(VENV)/bin/mkdocs build --strict

notebooks: $(VENV)/installed
	cd notebooks && PYTHONWARNINGS=ignore ../$(VENV)/bin/jupyter-execute --inplace *.ipynb
	$(VENV)/bin/python tests/notebooks/without_stderr.py notebooks/*.ipynb

benchmark: $(VENV)/installed
	$(VENV)/bin/python training/benchmarks/training_step.py

format: $(VENV)/installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) $(VENV4) $(VENV_OLDEST) site

$(VENV)/installed: setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -qq --upgrade pip
	$(VENV)/bin/python -m pip install -qq --editable ".[all,dev]" "transformers>=5,<6"
	touch $@

# What both majors need lies in .venv alone, since PyTorch with CUDA takes over 5 GB; packages here come before it.
$(VENV4)/installed: $(VENV)/installed
	$(PYTHON) -m venv $(VENV4)
	$(VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$($(VENV4)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth"
	$(VENV4)/bin/python -m pip install -qq --upgrade pip
	$(VENV4)/bin/python -m pip install -qq --editable ".[all,optimum,dev]"
	touch $@

$(VENV_OLDEST)/installed: setup.cfg tests/oldest.py
	$(PYTHON) -m venv $(VENV_OLDEST)
	$(VENV_OLDEST)/bin/python -m pip install -qq --upgrade pip
	$(VENV_OLDEST)/bin/python tests/oldest.py > $(VENV_OLDEST)/constraints.txt
	$(VENV_OLDEST)/bin/python -m pip install -qq --constraint $(VENV_OLDEST)/constraints.txt --editable ".[train,dev]"
	touch $@
