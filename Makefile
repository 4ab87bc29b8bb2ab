# The two commands of the README are `make quickstart` and `make test`; each sets up what it needs.
PYTHON ?= python3
EXTRA ?= cpu
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := .venv/installed-$(EXTRA)
MOSHI := .venv/installed-moshi
HARNESS := .venv/harness
TRANSFORMERS4 := .venv/transformers4
# These use Ray in their own process, and share it and the run that some of them need.
RAY_TESTS := $(addprefix tests/,distill/test_trainer.py scaling/test_plan.py scaling/test_sweep.py stages test_flow.py \
	test_jobs.py test_reliability.py)
RAY_LOG := .venv/ray-tests.log

WHEELS ?= wheels
WHEELS_PYTHON ?= 3.12
# What benchmarks.gpu takes beyond torch, sentence-transformers, numpy, pyarrow, fsspec, rich and pyyaml.
WHEELS_OF := annotated-types cffi hjson kokoro liger-kernel loguru msgpack py-cpuinfo pycparser pydantic pydantic-core \
	soundfile soxr transformers typing-inspection

# uv takes a quarter of pip's time. It reads none of pip's settings, so it is given those that say where packages come
# from. Where it cannot be had or fails, pip does the work.
define INSTALL
@places=$$($(PIP) config list | sed -nE "s/\\\\n/ /g; s/^.*\.(index-url|extra-index-url|find-links)='(.*)'/\1 \2/p" | \
	while read -r option values; do printf -- "--$$option=%s\n" $$values; done); \
{ test -x $(BIN)/uv || $(PIP) install --quiet uv; } && \
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --index-strategy unsafe-best-match $$places $(1) || \
	$(PIP) install --quiet $(1)
endef

.PHONY: install moshi harness transformers4 quickstart test test-all check bench gpu-wheels lock clean

install: $(INSTALLED)

$(INSTALLED): locks/$(EXTRA).txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || \
		{ echo 'salad_ray needs Python 3.11 or 3.12; choose one with make PYTHON=python3.11'; exit 1; }
	@echo 'Installing the pinned packages into .venv (a few minutes the first time) …'
	@$(PYTHON) -m venv .venv
	$(call INSTALL,-r locks/$(EXTRA).txt)
	$(call INSTALL,--no-deps -e .)
ifeq ($(EXTRA),gpu)  # this lock is the clusters', without what tests need; that comes at the other one's versions
	$(call INSTALL,--constraint locks/cpu.txt -e '.[dev]')
endif
	@touch $@

# Without its dependencies: moshi's bounds on torch and others contradict ours.
moshi: $(MOSHI)

$(MOSHI): $(INSTALLED) locks/moshi.txt
	$(call INSTALL,--no-deps -r locks/moshi.txt)
	@touch $@

# Text accuracy beside lm-evaluation-harness, item by item. Apart and without its dependencies, of which some would
# change pinned packages, and others how the rest of the tests behave.
harness: $(INSTALLED)
	@test -d $(HARNESS) || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target $(HARNESS) -r locks/harness.txt
	PYTHONPATH=$(HARNESS) $(BIN)/pytest tests/evaluation/test_harness_parity.py

# Transformers 4, apart, which must read what is exported: tests/model/test_older.py.
transformers4: $(TRANSFORMERS4)

$(TRANSFORMERS4): locks/transformers4.txt | $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ -r $<
	@touch $@

quickstart: $(INSTALLED)
	$(BIN)/salad run configs/quickstart.yaml

# Two processes for two cores, of a thread each. Ray's workers, which by default give way to all others (niceness 15),
# would stand still until the first process is done.
test: export OMP_NUM_THREADS := 1
test: export RAY_worker_niceness := 0
test: $(INSTALLED) $(MOSHI)
	@$(BIN)/pytest -p no:cacheprovider -m 'not slow' $(RAY_TESTS) > $(RAY_LOG) 2>&1 & ray=$$!; \
	trap 'kill $$ray' INT TERM; \
	$(BIN)/pytest -m 'not slow' $(RAY_TESTS:%=--ignore=%); others=$$?; \
	echo 'waiting for the tests that use Ray ($(RAY_LOG)) …'; wait $$ray; ray=$$?; \
	cat $(RAY_LOG); exit $$((others | ray))

test-all: $(INSTALLED) $(MOSHI)
	$(BIN)/pytest

check: $(INSTALLED) $(MOSHI)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

# Packages for `python -m benchmarks.gpu` on a machine without a network: docs/gpu.md. DeepSpeed has no wheel; it is built.
gpu-wheels: $(INSTALLED)
	rm -f $(WHEELS)/*.whl
	@for name in $(WHEELS_OF); do grep "^$$name==" locks/cpu.txt || exit 1; done > .venv/gpu-wheels.txt
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest $(WHEELS) \
		--python-version $(WHEELS_PYTHON) --implementation cp --platform manylinux2014_x86_64 \
		$(foreach glibc,2_28 2_27 2_17,--platform manylinux_$(glibc)_x86_64) --requirement .venv/gpu-wheels.txt
	DS_BUILD_OPS=0 $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(WHEELS) \
		"$$(grep '^deepspeed==' locks/cpu.txt)"
	@bytes=$$(cat $(WHEELS)/*.whl | wc -c); echo "$$(ls $(WHEELS) | wc -l) wheels, $$((bytes >> 10)) KiB, in $(WHEELS)/"; \
		test $$bytes -lt $$((64 << 20)) || { echo 'more than 64 MiB, which may not be carried everywhere'; exit 1; }

# The CPU lock leaves torch's CUDA packages out: torch itself names those that its build needs, exactly.
lock: $(INSTALLED)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --upgrade --no-header --no-annotate --python-version 3.11 pyproject.toml \
		--extra gpu --output-file locks/gpu.txt
	$(BIN)/uv pip compile --quiet --upgrade --no-header --no-annotate --python-version 3.11 pyproject.toml \
		--extra cpu --extra dev | grep -Ev '^(nvidia-|triton|cuda-)' > locks/cpu.txt

clean:
	rm -rf .venv runs wheels
