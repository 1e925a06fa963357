# Every target makes .venv first (see .ci/make-venv: uv or pip, Python 3.11-3.13); PYTHON=… chooses the interpreter.

.DEFAULT_GOAL := help
.PHONY: demo docs test coverage test-e2e test-matrix lint bench soak clean help

# Tests start hundreds of interpreters, so bytecode is worth keeping, whatever the environment says.
export PYTHONDONTWRITEBYTECODE =

PY := .venv/bin/python
STAMP := .venv/.installed
PYTEST_ARGS ?=
# Processes that run the tests side by side; 0: none but pytest's own, as a debugger needs it.
# One more than there are cores, up to four: many tests wait for a server, a lease or a process.
PYTEST_WORKERS ?= $(shell n=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); echo $$((n < 4 ? n + 1 : 4)))
BENCH_ARGS ?=
DEMO_ARGS ?=

$(STAMP): pyproject.toml .ci/make-venv
	@./.ci/make-venv
	@touch $@

help: ## show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'

# The demo needs little, so a first `make demo` does not wait for the servers of the tests.
.venv/.installed-cli: pyproject.toml .ci/make-venv
	@test -e $(STAMP) || ONLY=cli ./.ci/make-venv
	@touch $@

demo: .venv/.installed-cli ## import some thousand files, verify them, kill an import half way, clean up, count what is left
	$(PY) -m aproxy_storage demo $(DEMO_ARGS)

docs: $(STAMP) ## build the documentation into build/docs, warnings being errors
	$(PY) -m sphinx -W --keep-going -q -b html -c docs . build/docs
	@echo build/docs/index.html

test: $(STAMP) ## run the tests; the slowest are listed (PYTEST_ARGS="tests/test_x.py -k name")
	$(PY) -m pytest -n $(PYTEST_WORKERS) --maxprocesses=4 --dist=loadgroup --durations=15 $(PYTEST_ARGS)

coverage: $(STAMP) ## run them with coverage, which takes a third longer
	@$(MAKE) --no-print-directory test PYTEST_ARGS="--cov --cov-report=term $(PYTEST_ARGS)"

test-e2e: $(STAMP) ## try the example site in Chromium (apt-get install chromium, or APROXY_CHROMIUM=…)
	@$(PY) -c 'import playwright' 2>/dev/null || ./.ci/make-venv e2e
	$(PY) -m pytest -m e2e -o faulthandler_timeout=0 $(PYTEST_ARGS)

test-matrix: ## the backends and the Django side on Python 3.13 with Django 6.1, in a venv of their own
	./.ci/test-matrix $(PYTEST_ARGS)

soak: $(STAMP) ## run the tests that take minutes
	APROXY_SOAK=1 $(PY) -m pytest -m soak -o faulthandler_timeout=0 --durations=15 $(PYTEST_ARGS)

lint: $(STAMP) ## ruff check, ruff format --check, mypy --strict
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict aproxy_storage sync_bridge $(wildcard tests/typing)

bench: $(STAMP) ## compare with hand-made floors and django-proxy-storage (BENCH_ARGS="--only small --rounds 5")
	$(PY) benchmarks/run.py $(BENCH_ARGS)

# Not what users keep here: ./aproxy-data, and the uploads of the example site.
clean: ## remove .venv, build, dist, what coverage measured, and caches
	rm -rf .venv .venv-3.13 dist build .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find .ci aproxy_storage sync_bridge tests benchmarks docs examples -path examples/django_project/var -prune \
		-o -name __pycache__ -type d -prune -exec rm -rf {} +
