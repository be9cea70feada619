PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-ray test-clients gpu-check lint protos clean

# The stamp is newer than what it was made from, so a second run installs nothing.
$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard kernels/native/*pp)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Outrider needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/installed
	$(BIN)/outrider demo

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest --ignore=tests/on_ray --ignore=tests/clients --numprocesses auto --maxprocesses 4 --dist loadfile

# Clusters as a whole: real Ray, real processes, three hosts in network namespaces where that is permitted.
test-ray: $(VENV)/installed
	$(BIN)/pytest tests/on_ray

# Other projects' clients against a live server, each installed in an environment of its own (some minutes
# and gigabytes the first time; one that cannot be installed is skipped, and said so).
test-clients: $(VENV)/installed
	$(BIN)/pytest --verbose tests/clients

# The GPU kernels on a CUDA device, where there is one: the last line is JSON.
gpu-check: $(VENV)/installed
	cd tests && ../$(BIN)/python -m gpu.gpu_check

# The generated files are committed: nobody needs a compiler to install.
protos: $(VENV)/installed
	$(BIN)/python -m grpc_tools.protoc -Ioutrider/protos=protos \
		--python_out=src --pyi_out=src protos/speculation.proto

clean:
	rm -rf $(VENV) .venv-clients build kernels/native/*.so src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .schemathesis
