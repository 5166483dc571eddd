# Everything runs in an environment of its own, .venv; nothing outside the repository is touched.
#   make demo   compress the model that ships with the project in four ways, export and judge each
#   make test   format, lint, types, tests
#   make web    the page of `compot-deploy serve` (needs Node.js and npm); make web-test tries it in Chromium
#   make dev    what `make test` needs, plus the git hooks
#   make site   the documentation into out/site, warnings are errors
#   make docs   the same, and runs every code block in it: half an hour
#   make examples   runs the scripts of examples/

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO = out/demo

.PHONY: demo test lint types dev compatibility web web-test site docs examples clean

demo: $(VENV)/demo.stamp
	$(BIN)/compot-deploy demo --out $(DEMO)

# One thread of torch per worker: workers are as many as cores.
test: $(VENV)/dev.stamp lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/dev.stamp
	$(BIN)/mypy

dev: $(VENV)/dev.stamp
	$(BIN)/pre-commit install

# transformers 4.57, the newest that optimum accepts, in an environment of its own: our code runs there too, and
# optimum loads the folders that it wrote. onnxruntime-genai runs them in an environment without torch.
OLD = .venv-transformers4
GENAI = .venv-genai
compatibility: $(VENV)/dev.stamp
	$(MAKE) VENV=$(OLD) $(OLD)/bin/python
	$(OLD)/bin/python -m pip install --quiet -e ".[onnx]" "transformers==4.57.6" "optimum-onnx==0.1.0" \
		"onnxscript>=0.5" "pytest>=8" "hypothesis>=6" "beartype>=0.20"
	COMPOT_DEPLOY_OPTIMUM_PYTHON=$(OLD)/bin/python $(OLD)/bin/python -m pytest -q \
		tests/models/test_calibrate.py tests/models/test_checkpoint.py tests/cli/test_cli.py tests/exporters/onnx/test_onnx_folder.py \
		tests/exporters/onnx/test_onnx_consumers.py tests/exporters/onnx/test_onnx_graph.py tests/exporters/onnx/test_onnx_traced.py tests/accuracy/test_runners.py tests/models/test_tokens.py
	COMPOT_DEPLOY_OPTIMUM_PYTHON=$(OLD)/bin/python $(BIN)/python -m pytest -q \
		tests/exporters/onnx/test_onnx_consumers.py tests/exporters/onnx/test_onnx_traced.py tests/pipeline/test_traced.py -k optimum
	$(PYTHON) -m venv $(GENAI)
	$(GENAI)/bin/python -m pip install --quiet "onnxruntime-genai==0.18.0" numpy
	COMPOT_DEPLOY_GENAI_PYTHON=$(GENAI)/bin/python $(BIN)/python -m pytest -q tests/exporters/onnx/test_onnx_consumers.py -k genai_generates

site: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

docs: site
	ls README.md docs/*.md | OMP_NUM_THREADS=1 xargs -P 2 -n 1 $(BIN)/python docs/run_blocks.py

examples: $(VENV)/dev.stamp
	set -e; for script in examples/[0-9]*.py; do echo "$$script"; $(BIN)/python $$script; done

# The page is bundled from npm packages, at the versions of web/package-lock.json, and not kept in git.
PAGE = compot_deploy/web-bundle/bundle.json
web: $(PAGE)
$(PAGE): web/node_modules/.package-lock.json web/build.mjs $(wildcard web/src/*)
	cd web && npm run --silent build
web/node_modules/.package-lock.json: web/package.json web/package-lock.json web/.npmrc
	@command -v npm >/dev/null || { echo "make web needs Node.js and npm: install them, or a wheel that has the page"; exit 1; }
	cd web && npm ci --silent
	@touch $@

web-test: $(VENV)/dev.stamp $(PAGE)
	$(BIN)/python -m pytest -q tests/cli/test_serve.py tests/cli/test_browser.py

# A CPU build of torch is preferred where there is none; a torch that is already there (CUDA, say) stays.
# An interpreter that has torch is shared with the environment, so that nothing is downloaded twice.
$(VENV)/bin/python:
	@if $(PYTHON) -c "import torch" 2>/dev/null; then \
		echo "using the torch of $(PYTHON)"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV); fi
	$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -c "import torch" 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet "torch==2.13.0+cpu" 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet "torch==2.13.0"

$(VENV)/demo.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e ".[onnx,report]"
	@touch $@

$(VENV)/dev.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@# The type checker finds the folders that are mapped into the package through links.
	@ln -sfn ../exporters compot_deploy/exporters
	@ln -sfn ../quant compot_deploy/quant
	@touch $@ $(VENV)/demo.stamp

$(VENV)/docs.stamp: $(VENV)/dev.stamp
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) .venv-* out build dist *.egg-info web/node_modules compot_deploy/web-bundle compot_deploy/exporters compot_deploy/quant
