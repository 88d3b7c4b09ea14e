# The commands of the project; each one does its own set-up, in .venv, and redoes only what changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := setup.py pyproject.toml $(wildcard speechrnt/*.pyx speechrnt/*.pxd speechrnt/*.h)
# The GPU modules exist on Linux only.
NOT_BUILT := $(if $(filter Linux,$(shell uname)),,speechrnt._gpu% speechrnt.capi_gpu)
STUBBED := $(filter-out $(NOT_BUILT),$(patsubst speechrnt/%.pyi,speechrnt.%,$(wildcard speechrnt/*.pyi)))
REPAIR := $(if $(filter Darwin,$(shell uname)),delocate-wheel,auditwheel repair)
# The sanitizers must be loaded first, at addresses that are not random; the build in build/ hides ours.
SANITIZED = SPEECHRNT_BUILD=$@ PYTHONSAFEPATH=1 PYTHONPATH=build/$@/lib \
	LD_PRELOAD=$$($(CXX) -print-file-name=lib$@.so) ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	TSAN_OPTIONS=suppressions=tests/native/tsan.supp:die_after_fork=0:allocator_may_return_null=1 setarch -R
GPU_TESTS := $(addprefix tests/gpu/test_,model.py handle.py pool.py) -k 'not long_trace and not exiting'
SCHED_TESTS := $(addprefix tests/test_,sched.py sched_native.py sched_life.py future.py)
POOL_TESTS := $(addprefix tests/test_,pools.py pools_native.py pools_process.py audio_pool.py result_pool.py maintenance.py span_pool.py)
export SPEECHRNT_WERROR = 1

.PHONY: help build demo test lint tsan asan bench docs wheel clean
.NOTPARALLEL: # one pip at a time in one environment

help: ## show the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-6s %s\n", $$1, $$2 }' Makefile

build: $(VENV)/.built ## build and install the package, editable

demo: $(VENV)/.built ## transcribe the shipped recordings, then show each part at work
	$(BIN)/python examples/transcribe_samples.py
	$(BIN)/speechrnt demo

test: lint ## lint, then run the tests
	$(BIN)/python -m pytest

tsan: ## run the tests of scheduler and pools under the thread sanitizer
asan: ## run the tests of scheduler and pools under the address sanitizer
tsan asan: $(VENV)/.test
	SPEECHRNT_BUILD=$@ $(BIN)/python setup.py -q build --build-base build/$@ --build-lib build/$@/lib
	$(SANITIZED) $(BIN)/python -m pytest $(SCHED_TESTS) $(POOL_TESTS)
	SPEECHRNT_CUDA=double $(SANITIZED) $(BIN)/python -m pytest $(GPU_TESTS)

lint: $(VENV)/.test ## check style, types and stubs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PATH="$(BIN):$$PATH" cython-lint speechrnt tests
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/stubtest $(STUBBED)

bench: $(VENV)/.bench ## run the benchmarks
	$(BIN)/python perf/bench_mel.py
	$(BIN)/python perf/bench_inference_memory.py
	$(BIN)/python perf/bench_threads.py --rounds 1
	$(BIN)/python perf/bench_pools.py
	$(BIN)/python perf/bench_sched.py
	$(BIN)/python perf/bench_gpu.py
	$(BIN)/python perf/reference_claims.py --rounds 1
	$(BIN)/python perf/bench_dropin.py --quick --rounds 3
	$(BIN)/python perf/bench_dispatcher.py --quick
	$(BIN)/python perf/bench_serving.py --quick
	$(BIN)/python perf/bench_stream_readers.py --rounds 1
	$(BIN)/python perf/bench_statistics.py --rounds 3 --seconds 0.5
	$(BIN)/python perf/accuracy.py

docs: $(VENV)/.docs ## build the documentation in build/site, with its links checked
	$(BIN)/mkdocs build --strict --site-dir build/site

wheel: $(VENV)/.wheel ## make sdist and wheel in dist/, test the wheel in an empty environment
	rm -rf build/dist dist
	$(BIN)/python -m build --outdir build/dist
	PATH="$(BIN):$$PATH" $(REPAIR) -w dist build/dist/*.whl
	mv build/dist/*.tar.gz dist
	PYTHON=$(BIN)/python tests/wheel/in_empty_environment.sh dist/*.whl

clean: ## remove everything that the other commands made
	rm -rf $(VENV) build dist speechrnt.egg-info speechrnt/*.so

# Each stamp is touched last, so that a set-up that fails or is interrupted is done again.

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install 'pip>=25.1' # the first with --group
	touch $@

# A change of setup.py may change the flags and directives of every module.
$(VENV)/.built: $(SOURCES) $(VENV)/.created
	$(if $(filter setup.py,$?),rm -rf build speechrnt/*.so)
	$(PIP) install --group build
	$(PIP) install --no-build-isolation --editable .
	touch $@

$(VENV)/.%: pyproject.toml | $(VENV)/.built
	$(PIP) install --group $*
	touch $@
