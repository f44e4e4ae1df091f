# make demo   train a small network with every method and write runs/demo/report.html
# make test   everything that checks the project
# make native rebuild the C++ core after an edit in csrc/
# make sanitize   the C++ tests (tests/native) with AddressSanitizer and UBSan
# Both of the first two work from a fresh clone: Python 3.11+, pip and a C++ compiler are all they need.

PYTHON ?= python3
# Real data sets, where a folder of them lies beside this one; without it, what is embedded or can be fetched.
RAREFY_DATA ?= $(abspath $(wildcard ../shared/data))
export RAREFY_DATA
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --no-input
TORCH  := $(shell sed -n 's/^torch==//p' constraints.txt)
# The package builds with these as they are in the environment, so that an edit in csrc/ can be rebuilt in place.
BUILD_TOOLS := scikit-build-core nanobind cmake ninja
INSTALL := $(PIP) install --quiet --constraint constraints.txt
INPUTS  := pyproject.toml constraints.txt CMakeLists.txt

.NOTPARALLEL:
.PHONY: help demo test sanitize lint native bench bench-peers chromium clean

help:
	@sed -n 's/^# //p' Makefile | head -5

demo: $(VENV)/.installed native
	$(BIN)/rarefy demo

test: $(VENV)/.installed-dev native sanitize chromium lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

# The C++ tests with AddressSanitizer and UBSan, for every instruction set that this machine has.
sanitize: $(VENV)/.tools
	@$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DRAREFY_SANITIZE=ON >/dev/null
	$(BIN)/cmake --build build/sanitize
	build/sanitize/rarefy_checks

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed native
	$(BIN)/python benchmarks/bitpack_and_select.py
	$(BIN)/python benchmarks/engine_overhead.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "rarefy needs Python 3.11 or newer; '$(PYTHON)' is not. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch goes first and by its own line, so that what follows keeps the build that this machine's pip chose for it.
$(VENV)/.tools: $(VENV)/bin/python constraints.txt
	@for compiler in "$${CXX:-}" c++ g++ clang++; do \
	  if [ -n "$$compiler" ] && command -v $$compiler >/dev/null; then exit 0; fi; done; \
	  echo "rarefy's native core needs a C++ compiler (g++ or clang++); none was found. On Debian: apt-get install g++" >&2; exit 1
	$(PIP) install --quiet torch==$(TORCH)
	$(INSTALL) $(BUILD_TOOLS)
	@touch $@

$(VENV)/.installed: $(VENV)/.tools $(INPUTS)
	$(INSTALL) --no-build-isolation --editable '.[demo]'
	@touch $@

# The same with the tools that check the project, and with C++ warnings as errors; then: did anything replace torch, or want to?
$(VENV)/.installed-dev: $(VENV)/.tools $(INPUTS)
	SKBUILD_CMAKE_DEFINE=RAREFY_WERROR=ON $(INSTALL) --no-build-isolation --editable '.[dev]'
	@$(BIN)/python -c 'import torch; have = torch.__version__.split("+")[0]; assert have == "$(TORCH)", f"torch is {have}, not $(TORCH)"'
	@$(PIP) install --dry-run --constraint constraints.txt --no-build-isolation '.[dev]' | grep '^Would install' | \
	  grep -i ' torch-' && { echo "installing rarefy again would replace torch" >&2; exit 1; } || true
	@touch $@ $(VENV)/.installed

# Also serves an environment that was made by hand: it only needs the package's build folder, and makes it where missing.
native:
	@if [ -f build/editable/build.ninja ]; then $(BIN)/cmake --build build/editable; \
	else $(PIP) install --no-build-isolation --no-deps --editable .; fi

# Other people's engines, each in an environment of its own, for the benchmarks that name them.
PEERS := $(basename $(notdir $(wildcard benchmarks/peers/*.txt)))
bench-peers: $(PEERS:%=.peers/%/.installed)

.peers/%/.installed: benchmarks/peers/%.txt
	$(PYTHON) -m venv .peers/$*
	.peers/$*/bin/python -m pip --disable-pip-version-check --no-input install --quiet --requirement $<
	@touch $@

chromium:
	@bash .ci/chromium

clean:
	rm -rf build $(VENV) src/rarefy/kernels/*.so
