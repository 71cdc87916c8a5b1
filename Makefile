# Everything needs only Python (3.11 or later) and make. `make demo` shows what this is for.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow check format wheelhouse wheelhouse-openvino clean

demo: .venv/installed
	$(BIN)/embedder demo

# On the tests' small arrays BLAS threads wait for each other longer than they work.
test: .venv/installed
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

slow: .venv/installed
	$(BIN)/python -m pytest -m slow

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Also the types of the package's functions, which are made of the option classes.
format: .venv/installed
	$(BIN)/python -m tests.stub
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Wheels for a machine without network: Python 3.12 on Linux, x86-64; see benchmarks/README.md.
PLATFORMS := manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux_2_5 manylinux1
DOWNLOAD = $(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps \
	--only-binary=:all: --implementation cp --python-version 3.12 \
	$(PLATFORMS:%=--platform %_x86_64) --constraint constraints.txt

wheelhouse:
	rm -rf $@
	$(DOWNLOAD) --requirement benchmarks/wheelhouse.txt --dest $@
	du -sh $@

# OpenVINO is as large as all of these, so it is a folder of its own, and cut down to the CPU.
wheelhouse-openvino:
	rm -rf $@
	$(DOWNLOAD) openvino --dest $@/whole
	$(PYTHON) benchmarks/slim_openvino.py $@/whole/*.whl $@
	rm -rf $@/whole

clean:
	rm -rf .venv demo-features wheelhouse wheelhouse-openvino

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[lite1,lite2,demo,hub,dev]'
	touch $@
