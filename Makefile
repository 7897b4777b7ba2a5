# Two commands matter: `make demo` and `make test`. Each does everything from a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SIDE_BY_SIDE := --numprocesses=auto --maxprocesses=4 --dist=loadfile

.PHONY: demo test test-all check bench proto viewer install clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      four emulated hospitals, one plan, a trained model and its report"
	@echo "make test      the tests"
	@echo "make check     ruff, strict mypy, import directions"
	@echo "make test-all  the tests, long forms included"
	@echo "make bench     the benchmarks of docs/benchmarks.md"
	@echo "make proto     the code of common/proto, from locum.proto"
	@echo "make viewer    the viewer of the desk, from npm, as niivue.json pins it"
	@echo "make install   the environment alone, in $(VENV)"

$(STAMP): pyproject.toml configs/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c configs/constraints.txt -e '.[dev]'
	touch $(STAMP)

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/locum simulate --baselines --out runs/demo --force

test: $(STAMP)
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE)

test-all: $(STAMP)
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) --slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/types/locum
	for part in common server site_client simulations configs; do ln -sfn ../../../$$part build/types/locum/$$part; done
	$(BIN)/mypy -p locum
	$(BIN)/python -m pytest -q tests/common/test_imports.py

bench: $(STAMP)
	$(BIN)/python -m locum.simulations.benchmarks

# Another version of the compiler writes other files, and protobuf takes no code that is newer than itself.
PROTO := build/proto
build/proto/.installed: Makefile
	$(PYTHON) -m venv $(PROTO)
	$(PROTO)/bin/python -m pip install --quiet --disable-pip-version-check grpcio-tools==1.81.1
	touch $@

proto: build/proto/.installed
	mkdir -p $(PROTO)/source/locum $(PROTO)/code
	ln -sfn ../../../../common $(PROTO)/source/locum/common
	cd $(PROTO) && bin/python -m grpc_tools.protoc -I source --python_out=code --pyi_out=code --grpc_python_out=code \
		source/locum/common/proto/locum.proto
	cp $(PROTO)/code/locum/common/proto/locum_pb2* common/proto/

# The pins and the digests are kept in niivue.json; what npm gives must be that, to the byte.
VIEWER := site_client/desk/static
viewer:
	rm -rf build/viewer
	mkdir -p build/viewer
	$(PYTHON) -c 'import json; print(json.dumps({"dependencies": json.load(open("$(VIEWER)/niivue.json"))["packages"]}))' \
		> build/viewer/package.json
	cd build/viewer && npm install --ignore-scripts --no-audit --no-fund --silent
	cp build/viewer/node_modules/@niivue/niivue/dist/niivue.umd.js $(VIEWER)/niivue.umd.js
	cd build/viewer/node_modules && for package in $$(node -p 'Object.keys(require("../package.json").dependencies).sort().join(" ")'); do \
		for text in $$package/[Ll][Ii][Cc][Ee][Nn]*; do test ! -f $$text || \
		{ printf '== %s\n\n' $$package; cat $$text; printf '\n'; }; done; done > $(CURDIR)/$(VIEWER)/niivue.licences.txt
	$(PYTHON) -c 'import json; print(*(f"{v}  {k}" for k, v in json.load(open("$(VIEWER)/niivue.json"))["sha256"].items()), sep="\n")' \
		| (cd $(VIEWER) && sha256sum --check)

clean:
	rm -rf $(VENV) build *.egg-info
