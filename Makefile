# Every target sets itself up: a virtual environment in .venv, the pinned packages, the extension.
#   make setup PYTHON=python3.12      another interpreter
#   make setup PIP_ARGS="..."         more arguments for pip, such as the index of PyTorch's CPU-only wheels
#   make setup FRACTAL_BUILD=cpu      stop if the extension cannot be built (auto, none, cpu, cuda)
#   make test  ARGS="-k join"         more arguments for the command that the target runs
PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=

PY := .venv/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
STAMP := .venv/.stamp
CSRC := $(shell find csrc -type f)

.PHONY: setup demo test ranks lint bench aot interpret torture twin simt cuda-check gpu docs wheel clean
.DELETE_ON_ERROR:

setup: $(STAMP)

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) is missing or older than 3.10; name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) cannot create virtual environments; on Debian/Ubuntu: apt install python3-venv python3-dev" >&2; exit 1; }
	$(PYTHON) -m venv .venv

$(STAMP): constraints.txt setup.py pyproject.toml $(CSRC) | $(PY)
	$(PIP) torch setuptools ninja pybind11
	$(PIP) --no-build-isolation -e '.[dev]'
	@$(PY) -m fractal_kernels.info
	@touch $@

demo: $(STAMP)
	$(PY) -m fractalnet train digits --out runs/digits --overwrite $(ARGS)

# Two processes, a file at a time; one that dies is not started again, or it would die of the same test again.
# PASSIVE: threads that spin while they wait take the other process's time.
test: $(STAMP)
	OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -q tests -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(ARGS)

# Training on two ranks in every way, and the death of each: three minutes; `make test` has a part of it.
ranks: $(STAMP)
	FRACTAL_RANKS=all $(PY) -m pytest -q tests/test_ranks.py $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/clang-format --dry-run -Werror $(filter %.cpp %.h %.inc %.cu %.cuh,$(CSRC)) tests/simt/*.h tests/simt/*.cpp
	$(PY) -m mypy fractal_kernels
	@git ls-files | grep -E '\.(py|cpp|h|inc|cu|cuh)$$' | xargs wc -l | awk '$$1 > 400 && $$2 != "total" {print "over 400 lines:", $$2; bad = 1} END {exit bad}'

bench: $(STAMP)
	$(PY) -m benchmarks.report --run $(ARGS)

# Properties of the joins over shapes, strides, slices and masks that nobody would choose, others in every run: twenty
# minutes. What fails says how to run it again.
torture: $(STAMP)
	FRACTAL_TORTURE=10000 $(PY) -m pytest -q tests/test_properties.py $(ARGS)

# Every Triton kernel with every flag as machine code of two GPUs: registers, spills, width of loads. Two hours, by
# estimate.
aot: $(STAMP)
	FRACTAL_AOT=all $(PY) -m pytest -q tests/test_triton.py tests/test_tiles.py -k machine_code $(ARGS)

# The whole operator suite on the Triton kernels, interpreted on the CPU: half an hour, a quarter with ARGS="-n 2";
# `make test` has the better part.
interpret: $(STAMP)
	TRITON_INTERPRET=1 FRACTAL_INTERPRET=all $(PY) -m pytest -q -m gpu tests/test_ops.py tests/test_edges.py tests/test_shortcut.py tests/test_running.py tests/test_gpu.py tests/test_triton.py tests/test_tiles.py tests/test_tuning.py $(ARGS)

# The operator suite as a GPU has it, on a device that is not the CPU: no test and no operator takes tensors of two devices.
# Two minutes, half with ARGS="-n 2". Without two tests of what the device's tensors are, classes of their own.
twin: $(STAMP)
	FRACTAL_TWIN=1 $(PY) -m pytest -q -m gpu tests/test_ops.py tests/test_edges.py tests/test_shortcut.py tests/test_recompute.py tests/test_frozen.py tests/test_running.py -k 'not who_is_to_see and not other_sign_in_memory' $(ARGS)

# The CUDA sources executed on the host, every instance of every kernel, also by sanitizers; where there is an nvcc, its
# machine code read. Seven minutes; `make test` has every flag.
simt: $(STAMP)
	FRACTAL_CUDA=all $(PY) -m pytest -q tests/test_simt.py tests/test_cuda.py $(ARGS)

# That, and the extension compiled by nvcc, loaded into a CUDA build of the oldest PyTorch that can load it, which also has
# to trace everything in one graph, and built there. A quarter of an hour, 5 GB.
TRACED := (compile or graph or two_ranks) and not opcheck
cuda-check: simt
	@echo "the CUDA extension for every architecture, on $$(nproc) cores:"
	time -p env FRACTAL_BUILD=cuda $(PY) -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	test -d .venv-cuda || $(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install -q --disable-pip-version-check torch==2.11.0 numpy 'setuptools>=77.0.3' ninja pybind11 pytest
	PYTHONPATH=. .venv-cuda/bin/python tests/cuda_load.py
	PYTHONPATH=.:python .venv-cuda/bin/python -m pytest -q tests/test_compile.py tests/test_sync.py tests/test_conv_step.py tests/test_networks.py -k '$(TRACED)'
	FRACTAL_BUILD=cuda .venv-cuda/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation --force-reinstall --no-deps .
	cd tests && PYTHONPATH= ../.venv-cuda/bin/python cuda_load.py

# The round on a machine with a GPU: no network, no virtual environment, the PyTorch that $(PYTHON) has.
#   make gpu RESULTS=folder STAGES=test,kernels      (build, test, sanitize, tune, kernels, steps)
#   make gpu ARGS=--dry-run                          needs no GPU
RESULTS ?= benchmarks/results
STAGES ?= build,test,kernels,steps
gpu:
	@$(PYTHON) -c 'import torch' || \
	  { echo "error: $(PYTHON) cannot import PyTorch; name another one: make gpu PYTHON=.venv/bin/python" >&2; exit 1; }
	$(PYTHON) -m benchmarks.gpu --results $(RESULTS) --stages $(STAGES) $(ARGS)

docs: $(STAMP)
	$(PY) -m benchmarks.report --write

wheel: $(STAMP)
	rm -rf build/lib* build/bdist*
	$(PY) -m pip wheel --no-build-isolation --no-deps -w dist .

clean:
	rm -rf .venv .venv-cuda build dist *.egg-info python/*.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache fractal_kernels/_C.* fractal_kernels/_cuda.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
