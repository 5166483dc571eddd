# Everything runs in an environment of its own, .venv; nothing outside the repository is touched.
# `make demo` and `make test` install what they were tested with: releases and hashes of locks/, torch aside.
#   make demo   compress the model that ships with the project in four ways, export and evaluate each
#   make test   format, lint, types, tests
#   make thorough  every test, the long ones of every night included
#   make quick  the laws of the mathematics alone: a minute and a half on two cores
#   make newest the tests with the newest release of everything; every warning is an error
#   make cluster  the tests with Ray, which is large and so in no lock; eight minutes
#   make tasks  the tests of lm-eval's tasks, whose packages are in no lock either; two minutes
#   make lock   writes locks/ again, with the newest releases
#   make web    the page of `compot-deploy serve` (needs Node.js and npm); make web-test tries it in Chromium
#   make dev    what `make test` needs, plus the git hooks
#   make site   the documentation into out/site, warnings are errors
#   make docs   the same, and runs every code block in it: half an hour
#   make examples   runs the scripts of examples/

PYTHON ?= python3
export PIP_DISABLE_PIP_VERSION_CHECK = 1
VENV ?= .venv
BIN = $(VENV)/bin
DEMO = out/demo
# The release that is installed where there is none. Its builds differ by index, so no lock has its hashes.
TORCH = 2.13.0

.PHONY: demo test thorough quick newest cluster tasks lock lint types dev compatibility web web-test site docs examples clean

demo: $(VENV)/demo.stamp
	$(BIN)/compot-deploy demo --out $(DEMO)

# Workers are as many as cores, with one thread of torch each. A file goes to one of them, so that what its tests share is
# made once; long files first, as tests/conftest.py orders them.
SPREAD = -n auto --dist loadfile --no-loadscope-reorder
test: $(VENV)/dev.stamp lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD) -m "not nightly"

# Also the further cases of laws that take long, which `make newest` runs every night.
thorough: $(VENV)/dev.stamp
	COMPOT_DEPLOY_EVERY_SHAPE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD)

quick: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD) -q -m "not slow" tests/core tests/quant tests/numerics tests/planning

# The only run in which deprecations of others are errors: whoever can replace the call sees them first. `HOLD` keeps a
# package back, HOLD="torch==2.13.0" for example. The two exemptions are those of tests/conftest.py, which -W overrides.
NEWEST = .venv-newest
STRICT = -W error -W "ignore:builtin type :DeprecationWarning" \
	-W ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning
newest:
	$(MAKE) VENV=$(NEWEST) $(NEWEST)/bin/python
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e ".[dev]" $(HOLD)
	$(NEWEST)/bin/python -m pip list
	COMPOT_DEPLOY_EVERY_SHAPE=1 OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest $(SPREAD) $(STRICT)

cluster: $(VENV)/dev.stamp
	$(BIN)/python -m pip install --quiet -e ".[ray]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/cluster

tasks: $(VENV)/dev.stamp
	$(BIN)/python -m pip install --quiet -e ".[eval]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/accuracy/test_harness.py

# uv reads pyproject.toml for the rest: platforms, hashes, what is left out. The largest lock comes first, and the others
# take its releases. Packages that cannot live together have environments, and so locks, of their own.
LOCK = .venv-lock/bin/uv pip compile --quiet --upgrade pyproject.toml --group build
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --upgrade uv
	$(LOCK) --extra dev --extra docs -o locks/docs.txt
	$(LOCK) --extra dev -c locks/docs.txt -o locks/dev.txt
	$(LOCK) --extra onnx --extra report -c locks/docs.txt -o locks/demo.txt
	$(LOCK) --extra onnx --group compatibility -o locks/compatibility.txt
	.venv-lock/bin/uv pip compile --quiet --upgrade --group genai -o locks/genai.txt

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
	$(OLD)/bin/python -m pip install --quiet --no-deps --require-hashes -r locks/compatibility.txt
	$(OLD)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	COMPOT_DEPLOY_OPTIMUM_PYTHON=$(OLD)/bin/python $(OLD)/bin/python -m pytest -q \
		tests/models/test_streaming.py tests/models/test_source.py tests/cli/test_cli.py tests/exporters/onnx/test_onnx_folder.py \
		tests/exporters/onnx/test_onnx_consumers.py tests/exporters/onnx/test_onnx_graph.py tests/exporters/onnx/test_onnx_traced.py tests/accuracy/test_runners.py tests/models/test_tokens.py
	COMPOT_DEPLOY_OPTIMUM_PYTHON=$(OLD)/bin/python $(BIN)/python -m pytest -q \
		tests/exporters/onnx/test_onnx_consumers.py tests/exporters/onnx/test_onnx_traced.py tests/pipeline/test_any_model.py -k optimum
	$(PYTHON) -m venv $(GENAI)
	$(GENAI)/bin/python -m pip install --quiet --no-deps --require-hashes -r locks/genai.txt
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
# An interpreter that has one of a release that we run with is shared with the environment: nothing is downloaded twice.
SUITS = import torch; assert (2, 8) <= tuple(map(int, torch.__version__.split(".")[:2])) < (3,)
$(VENV)/bin/python:
	@if $(PYTHON) -c '$(SUITS)' 2>/dev/null; then \
		echo "using the torch of $(PYTHON)"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV); fi
	@$(BIN)/python -c "import torch" 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet "torch==$(TORCH)+cpu" 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet "torch==$(TORCH)"

# A lock names everything, setuptools too, so nothing is resolved and nothing else is asked for.
$(VENV)/%.stamp: locks/%.txt pyproject.toml setup.py | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r $<
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@
# Later locks hold all that earlier ones do.
$(VENV)/docs.stamp: $(VENV)/dev.stamp

clean:
	rm -rf $(VENV) .venv-* out build dist *.egg-info web/node_modules compot_deploy/web-bundle
