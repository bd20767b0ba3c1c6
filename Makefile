# Everything starts from a fresh clone: each target makes .venv, installs, builds and runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# PIP_CONSTRAINT also holds inside pip's isolated builds; the pinned torch is what keeps a CPU machine on the CPU build.
CONSTRAINTS ?= constraints.txt
export PIP_CONSTRAINT := $(CURDIR)/$(CONSTRAINTS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# An editable install sees edits of Python files by itself.
SOURCES := pyproject.toml CMakeLists.txt $(CONSTRAINTS) $(wildcard csrc/*) $(if $(wildcard $(VENV)/.editable),,README.md \
	$(shell find src -name '*.py' -o -name '*.pyi' -o -name '*.cu' -o -name '*.jinja' -o -name 'py.typed'))

CXX_SOURCES := $(wildcard csrc/*.cpp csrc/*.h tests/sanitize/*.cpp tests/sanitize/*.h \
	src/offpath/kernels/gpu/cuda/*.cu tests/gpu_shim/*.h)

MAKEFLAGS += --no-print-directory

.PHONY: help demo crossover study minilm readme test oldest lint sanitize bars gpu bench format dev clean

help:
	@echo "make demo       train a dense network and its sparse twin side by side, on real images (4 minutes the first time, most of them compiling)"
	@echo "make readme     make demo, and put its numbers into the README and docs/demo"
	@echo "make crossover  measure from which sparsity on a layer pays here, for docs/crossover and the README (8 minutes)"
	@echo "make study      train every arm of docs/studies/topology.md with three seeds (hours; stop it, and it goes on):"
	@echo "                make study DATA='--data cifar10=cifar-10-python.tar.gz --data tinyshakespeare=input.txt'"
	@echo "make minilm     prune MiniLM, train it a little and measure it, for docs/studies/minilm.md (half an hour; it can be stopped)"
	@echo "make test       lint, types and all tests, a worker on each core (15 minutes the first time)"
	@echo "make oldest     all tests with the lowest versions that pyproject.toml allows (gigabytes, and twenty minutes)"
	@echo "make lint       formatting, lint and types alone"
	@echo "make sanitize   the C++ core under AddressSanitizer, UBSan and ThreadSanitizer (up to an hour)"
	@echo "make bars       every bar of speed beside what this machine reaches (under 12 minutes)"
	@echo "make gpu        on a machine with an NVIDIA GPU: check every GPU kernel and time it (under 9 minutes)"
	@echo "make bench      every product and layer beside dense, torch.sparse and, where installed, SparseLab"
	@echo "make format     rewrite the sources as the formatters want them"
	@echo "make dev        an editable install in $(VENV): Python edits take effect at once, C++ edits at the next make dev"
	@echo "make clean      remove everything that these commands made"

demo: $(VENV)/.installed
	rm -rf runs/demo
	$(BIN)/offpath race --out runs/demo

readme: demo
	$(BIN)/python docs/update_demo.py

crossover: $(VENV)/.installed
	rm -rf runs/crossover
	$(BIN)/offpath crossover --out runs/crossover
	$(BIN)/python docs/update_crossover.py

# Not removed before: a study that was stopped goes on.
study: $(VENV)/.installed
	$(BIN)/offpath study topology $(DATA) --out runs/study-topology
	$(BIN)/python docs/update_study.py

# The same; WordNet's nouns come with a package of the system.
minilm: $(VENV)/.installed
	$(BIN)/offpath study minilm --out runs/study-minilm
	$(BIN)/python docs/update_minilm.py

TESTS := -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal
test: lint
	$(BIN)/python $(TESTS)

# In an environment of its own; the types are those of the pinned versions, and not looked at.
oldest:
	$(MAKE) VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt .venv-oldest/.installed
	.venv-oldest/bin/python $(TESTS)

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

# Needs a C++ compiler with the sanitizers' runtimes, and neither Python nor torch.
sanitize:
	$(MAKE) -C tests/sanitize -j$(shell nproc) build
	$(MAKE) -C tests/sanitize

bars: $(VENV)/.installed
	$(BIN)/python benchmarks/bars.py

# GPU=--quick for a smoke test, GPU='--parts checks decode' for some of it. Needs a CUDA build of torch.
gpu: $(VENV)/.installed
	PYTHONPATH=benchmarks $(BIN)/python -m gpu $(GPU)

bench: $(VENV)/.installed
	$(BIN)/python -m pytest benchmarks

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_SOURCES)

dev:
	rm -f $(VENV)/.installed
	mkdir -p $(VENV) && touch $(VENV)/.editable
	$(MAKE) $(VENV)/.installed

# Into a new environment, packages come while the wheel is built: the pinned ones, which are the large ones. Then all of it
# is compiled to bytecode on all cores: pip takes one, for more than a minute. (Some packages carry templates that are no
# Python; that is no matter.)
$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || { $(PYTHON) -m venv $(VENV) && touch $(VENV)/.new; }
	@rm -rf build/wheel
	test ! -e $(VENV)/.new || test -e $(VENV)/.editable || { \
		$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel . & wheel=$$!; \
		$(BIN)/pip install --quiet --no-compile --requirement $(CONSTRAINTS) && wait $$wheel; }
	$(BIN)/pip install --quiet $$(test ! -e $(VENV)/.new || echo --no-compile) \
		$$(test ! -e $(VENV)/.editable || echo --editable) "$$(ls build/wheel/*.whl 2>/dev/null || echo .)[cli,dev]"
	test ! -e $(VENV)/.new || { $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true; rm $(VENV)/.new; }
	@touch $@

clean:
	rm -rf $(VENV) .venv-oldest build runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
