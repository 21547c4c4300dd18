# The only set-up: `make test` and `make demo` create the virtual environment if it is not there.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
# other releases: make check VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt
CONSTRAINTS ?= constraints.txt
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: test check lint format demo bench others clean

test: lint check

# one thread a worker: two workers of two threads on two cores mostly wait for each other
check: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.installed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

demo: $(VENV)/.installed
	$(PY) -m demp_fx.cli train examples/digits.yaml --overwrite
	@echo "open runs/digits/report.html"

bench: $(VENV)/.bench
	$(PY) -m benchmarks

# torch goes first and pinned: left to the resolver it can bring gigabytes of CUDA libraries.
# torchvision and timm are wanted for their networks alone, so without what they depend on.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) $$(grep '^torch==' $(CONSTRAINTS))
	$(PIP) -e '.[dev,train]'
	$(PIP) --no-deps torchvision timm
	touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(PIP) --no-deps torch-pruning==1.6.1
	touch $@

# other people's networks for `python -m benchmarks.zoo --suite pytorchcv` and the like
others: $(VENV)/.bench
	$(PIP) --no-deps pytorchcv==0.0.74 segmentation-models-pytorch==0.6.0 \
	  vit-pytorch==1.26.11 einops==0.8.2

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
