# Everything a person or CI runs. `make` alone lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Without a GPU: TORCH_INDEX=<the index of CPU wheels that PyTorch's install page names> saves gigabytes of CUDA libraries.
TORCH_INDEX ?=

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,tensorboard,qlora]'
	touch $@

setup: $(READY)   ## create .venv and install the pinned requirements

demo: $(READY)    ## the controlled-sentiment experiment, from the packaged model to a verdict
	$(BIN)/preftune demo

test: $(READY)    ## lint, types and tests, as CI runs them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n auto

proof: $(READY)   ## the paper's experiments, redone: figures and pictures into docs/proofs
	set -e; for script in proofs/[a-z]*_*.py; do $(BIN)/python $$script; done

mutate: $(READY)  ## break the source on purpose, one small change at a time: every parity test must fail
	$(BIN)/python tests/mutate.py

model: $(READY)   ## rebuild the packaged film-review model and its scorers from the NLTK corpora (about an hour)
	$(MAKE) -C examples/controlled_sentiment PYTHON=$(abspath $(BIN))/python

clean:            ## remove .venv and caches
	rm -rf $(VENV) build .pytest_cache .ruff_cache

# The dtypes that are timed: without AVX512-BF16 or AMX, bfloat16 says nothing.
DTYPES ?= float32 bfloat16
STEP = $(BIN)/python benchmarks/dpo_step.py --trl $(TRL) --hh $(HH)
bench: $(READY)  ## every benchmark, hours: make bench TRL=<python that has trl> HH=<harmless-base-test.jsonl.gz>
	set -e; for dtype in $(DTYPES); do \
	$(STEP) --dtype $$dtype --smaller 512 --recomputed 4096; \
	$(STEP) --dtype $$dtype --sizes 1 --no-checkpointing --recomputed 4096 --name hh-ones; \
	$(STEP) --dtype $$dtype --profile four --sizes 8 4 2 1; \
	$(STEP) --dtype $$dtype --profile summaries; \
	$(STEP) --dtype $$dtype --profile chat; \
	$(STEP) --dtype $$dtype --profile long; \
	$(BIN)/python benchmarks/store_sweep.py --hh $(HH) --dtype $$dtype; \
	$(BIN)/python benchmarks/rates.py --hh $(HH) --dtype $$dtype --profile-ops; \
	$(BIN)/python benchmarks/head_memory.py --dtype $$dtype; \
	$(BIN)/python benchmarks/memory.py --hh $(HH) --dtype $$dtype; \
	done
	$(BIN)/python benchmarks/split.py --dtypes $(DTYPES)

.PHONY: help setup demo test proof mutate bench model clean
