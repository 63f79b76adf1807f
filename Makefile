# `make` lists the targets. All but `gpu` run in .venv, which is made when it is missing, by PYTHON.

READY = PYTHON='$(PYTHON)' .ci/venv
RUN := .venv/bin/python
GPU_PYTHON = $(or $(PYTHON),python3)

.PHONY: help demo test check lint types docs bench bench-compare sweep compat deepspeed faults ptx support hub release-check gpu clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

demo: ## fine-tune a real model with and without the penalty (ARGS: options of str-kernels demo)
	@$(READY) demo
	.venv/bin/str-kernels demo $(ARGS)

test: ## run all tests on every core, one torch thread a worker (ARGS: options of pytest)
	@$(READY) dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n logical --maxprocesses 8 --dist worksteal $(ARGS)

check: lint types ## ruff, mypy and the arrows between folders, as CI runs them

lint:
	@$(READY) dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	.venv/bin/lint-imports

types:
	@$(READY) dev
	$(RUN) -m mypy -p str_kernels
	$(RUN) -m mypy examples

bench: ## microbenchmarks of each op, saved in .benchmarks (ARGS: options of pytest-benchmark)
	@$(READY) dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest bench --benchmark-only --benchmark-autosave \
	  --benchmark-columns=median,iqr,rounds --benchmark-storage=.benchmarks $(ARGS)

bench-compare: ## the last two runs of `make bench`, side by side
	@$(READY) dev
	@set -- $$(ls .benchmarks/*/*.json 2>/dev/null | sort | tail -n 2); \
	  test $$# -eq 2 || { echo "make bench-compare: two saved runs are needed, there is $$#" >&2; exit 1; }; \
	  .venv/bin/pytest-benchmark --storage=.benchmarks compare "$$@" --columns=median,iqr,rounds \
	    --group-by=group,name --name=short $(ARGS)

sweep: ## attach() on every model type of transformers, tiny: docs/support/models.csv (ARGS: --types ...)
	@$(READY) dev
	OMP_NUM_THREADS=1 PYTHONPATH=tests/integrations $(RUN) tests/integrations/every_model/sweep.py $(ARGS)

compat: ## the tests of integrations/ on older and newer releases, in .nox (ARGS: options of nox)
	@$(READY) dev
	$(RUN) -m nox -s compat $(ARGS)

deepspeed: ## the tests of ZeRO on this machine's CPU, in .nox (ARGS: options of pytest)
	@$(READY) dev
	$(RUN) -m nox -s deepspeed -- $(ARGS)

faults: ## kill a fine-tuning at 100 places where it writes, go on, and count (STR_FAULTS: how many)
	@$(READY) dev
	STR_FAULTS=$(or $(STR_FAULTS),100) OMP_NUM_THREADS=1 $(RUN) -m pytest -q -s -k kill_at_any_write \
	  tests/integrations/finetune/test_finetune_faults.py

ptx: ## the kernels' PTX executed, all codes and every test marked gpu; goes on (ARGS: --minutes 30 ...)
	@$(READY) dev
	PYTHONPATH=. $(RUN) tests/ptx/every.py $(ARGS)

support: ## docs/support.md, from what sweep, compat and the tests hold
	@$(READY) dev
	PYTHONPATH=.:tests:tests/integrations $(RUN) tests/integrations/pages/support.py

docs: ## the documentation, as pages to open in build/site (ARGS: options of mkdocs build)
	@$(READY) dev
	$(RUN) docs/site/troubleshooting.py
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build $(ARGS)

hub: ## build/hub: the loss as a kernel of the Hugging Face `kernels` library
	@$(READY) dev
	$(RUN) -m bench hub $(ARGS)

PYTHONS = 3.11 3.12 3.13
release-check: ## build, check and try what would be published (PYTHONS: 3.11 3.12 3.13, those there)
	@$(READY) dev
	$(RUN) -m nox -s build $(addprefix smoke-,$(PYTHONS)) hub dependencies $(ARGS)

# Only the files with such tests are collected: the others import what this Python may not have. Its
# warnings are not ours to turn into errors. The tests compile some 500 kernels, which several workers
# do sooner, where pytest-xdist is there.
GPU_WORKERS = $(shell $(GPU_PYTHON) -c 'import xdist' 2>/dev/null && printf '%s' '-n 8')
gpu: ## kernel tests and a timing table on this machine's GPU, in PYTHON as it is, nothing installed
	@$(GPU_PYTHON) -c "$$NEEDS_GPU"
	PYTHONPATH=. $(GPU_PYTHON) -m pytest -W default -m 'gpu and not slow' $(GPU_WORKERS) \
	  $(or $(shell grep -l 'mark\.gpu' -r tests),$(error no test is marked gpu))
	PYTHONPATH=. $(GPU_PYTHON) -m bench.gpu $(RESULTS)

define NEEDS_GPU
import sys
try:
    import numpy, pytest, safetensors, torch, triton
except ImportError as missing:
    sys.exit(f"make gpu: {sys.executable} has no {missing.name}; name another: make gpu PYTHON=python3")
if not torch.cuda.is_available():
    sys.exit(f"make gpu: torch {torch.__version__} sees no GPU")
endef
export NEEDS_GPU

clean: ## remove .venv, builds and caches
	rm -rf .venv .venv.old .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
