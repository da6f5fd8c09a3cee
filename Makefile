# make test    builds, runs every test           make demo   builds, trains a small language model
# make build   builds in place                   make lint   style of Python and C++
# make wheel   into dist/                        make test-cpp   CMake: the C++ library and its test
# make check-sass   what the assembler made of products in flight (a build with 9.0a)
# Each sets up what it needs in .venv first. PY=python3 uses an environment of your own as it is.
PYTHON ?= python3
PY ?= .venv/bin/python
TORCH ?= 2.13.0
PACKAGES = setuptools==84.2.1 wheel==0.48.0 ninja==1.13.2 pybind11==3.1.0 numpy==2.4.6 \
  einops==0.8.2 safetensors==0.8.0 matplotlib==3.11.2 pytest==9.2.0 pytest-timeout==2.4.0 pytest-xdist==3.8.0 \
  hypothesis==6.170.15 transformers==5.23.0 tokenizers==0.23.3
CMAKE = 4.2.0
STYLE = ruff==0.17.6 clang-format==23.1.5
DISASSEMBLER = nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37
SOURCES = $(shell git ls-files '*.h' '*.cuh' '*.cu' '*.cpp')
READY = $(if $(filter .venv/%,$(PY)),.venv/ready)

.PHONY: all build test test-cpp disassembler check-sass demo wheel lint clean
all: build

.venv/ready: Makefile
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet torch==$(TORCH)
	.venv/bin/python -m pip install --quiet $(PACKAGES)
	touch $@

build: $(READY)
	$(PY) setup.py build_ext --inplace

test: build
	$(PY) -m pytest -p bench.stamp $(PYTEST)

test-cpp: $(READY)
	$(PY) -m pip install --quiet cmake==$(CMAKE)
	$(dir $(PY))cmake -S . -B build/cmake -G Ninja -DMAMBA2_CUDA=OFF \
	  -DPython_EXECUTABLE=$$(realpath -s $(PY)) -DCMAKE_MAKE_PROGRAM=$$(realpath -s $(dir $(PY))ninja)
	$(dir $(PY))cmake --build build/cmake
	$(dir $(PY))ctest --test-dir build/cmake --output-on-failure

disassembler: $(READY)
	$(PY) -m pip install --quiet $(DISASSEMBLER)

check-sass: build disassembler
	export PATH="$$($(PY) -c 'import nvidia.cu13; print(nvidia.cu13.__path__[0])')/bin:$$PATH"; \
	  for object in $$(find build -path '*cuda*_ops*' -name '*_sm90.o' -not -name 'plan*'); do \
	    cuobjdump -sass -arch sm_90a $$object; done | $(PY) tools/check_in_flight.py

demo: $(READY)
	$(PY) -m examples.byte_lm --build

wheel: $(READY)
	$(PY) -m pip wheel . --no-build-isolation --no-deps --wheel-dir dist

lint: $(READY)
	$(PY) -m pip install --quiet $(STYLE)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(dir $(PY))clang-format --dry-run --Werror $(SOURCES)

clean:
	rm -rf build dist out *.egg-info mamba2_cuda/*.so
