# make demo   the main job on a synthetic world: nothing needed but git, make and Python 3.11 or 3.12
# make tune-demo   the learning-rate search for two label fractions, on the same world
# make test   ruff, the type checker and pytest, in an environment of its own making
# make chaos  kills drivers, workers and nodes, damages every kind of file that is read, fills a disk, compares with
#             undisturbed runs, and prints what each fault cost; SLIDR_CHAOS_ROUNDS=3 make chaos: three times, at other moments
VENV   := .venv
BIN    := $(VENV)/bin
PYTHON := $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1 && echo $$p && break; done)

export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo tune-demo test chaos lint install lock container-check clean

demo: $(VENV)/.installed
	$(BIN)/slidr demo configs/demo.yaml

# Before the search, where neither the demo nor an earlier call has left a student: one that is taught for 100 steps.
tune-demo: $(VENV)/.installed
	$(BIN)/slidr demo-data configs/demo.yaml
	test -f runs/demo/student.pt || test -f runs/tune_demo_student/student.pt || $(BIN)/slidr pretrain configs/demo.yaml \
	  --run.name tune_demo_student --run.resume --optim.max_steps 100 --run.score_frames 4 --data.max_val_frames 4
	$(BIN)/slidr tune configs/tune/demo.yaml \
	  --student.weights $$(ls runs/tune_demo_student/student.pt runs/demo/student.pt 2>/dev/null | tail -1)

test: lint
	$(BIN)/python -m pytest

chaos: $(VENV)/.installed
	SLIDR_CHAOS_RESULTS=results/chaos.json $(BIN)/python -m pytest -m chaos

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "slidr needs Python 3.11 or 3.12 on the PATH; found: $$(python3 --version 2>&1)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@

# Resolves pyproject.toml afresh in a scratch environment and rewrites the lock file.
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet torch==2.13.0 && build/lock/bin/pip install --quiet '.[dev]'
	{ sed -n '/^#/p' requirements.lock; build/lock/bin/pip freeze --exclude slidr \
	  | sed 's/^torch==.*/torch==2.13.0/'; } > build/requirements.lock
	mv build/requirements.lock requirements.lock && rm -rf build/lock

# The Dockerfile's steps without docker, in a scratch folder and a virtual environment of its own: minutes.
container-check:
	$(PYTHON) tools/container_steps.py

# Only what can be made again for nothing: no data set, no superpixels, no other run.
clean:
	rm -rf $(VENV) build data/demo runs/demo runs/tune_demo runs/tune_demo_student
