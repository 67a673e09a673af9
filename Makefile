# `make help` lists the targets. Needed: Python 3.11+ with venv, and make. Everything else is installed into .venv
# from the hash-locked lists and nothing outside this folder is touched.

.DEFAULT_GOAL := help

# The first Python that is new enough; name another with PYTHON=...
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done || true)
# One more than there are processors, because tests wait a lot.
TEST_WORKERS ?= $(shell python3 -c 'import os; print(min((os.cpu_count() or 1) + 1, 4))' 2>/dev/null || echo logical)
# What `make check` runs: no kills, no browser, hardly a server of its own.
CHECKED := $(addprefix tests/test_,house.py http.py retry.py runs.py scopes.py pools.py requested_pools.py machines.py \
	workflows.py unsupported_fields.py openapi.py)
SOAK ?= 20
FUZZ_SECONDS ?= 1800
UV ?= uv

BIN := .venv/bin
# Whatever the shell says: else each test worker compiles all tests anew.
unexport PYTHONDONTWRITEBYTECODE
# mypy uses one processor for half a minute: other things run meanwhile. Its output does not mix with theirs.
LINT_BESIDE = $(MAKE) --no-print-directory lint >.venv/lint.log 2>&1 & lint=$$!;
LINT_ENDS = wait $$lint; linted=$$?; [ $$linted = 0 ] && echo "make lint: nothing found" || cat .venv/lint.log;
INSTALL := $(BIN)/python dev/install.py
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--no-annotate --no-header

.PHONY: help run psql bao keys stop reset test check soak fuzz test-sdk example restore-drill observe containers screenshots lint fmt mutants bench release lock

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(firstword $(MAKEFILE_LIST))

run: .venv/$(if $(TEMPORAL),dev,run).stamp ## PostgreSQL, OpenBao and the app with demo data on 127.0.0.1:$PORT (8000), state in $DATA_DIR (.data); TEMPORAL=1: Temporal too
	@MAKE_PID=$$PPID exec $(BIN)/python -m dev.run

psql: .venv/run.stamp ## psql in the database of the stack that runs, as the owner (ARGS="-c 'SELECT ...'")
bao: .venv/run.stamp ## the bao command on the OpenBao of the stack that runs (ARGS="kv get ...")
keys: .venv/run.stamp ## make, list and end API keys of the stack that runs (ARGS="create --organization acme")
stop: .venv/run.stamp ## stop the stack that runs
reset: .venv/run.stamp ## stop the stack and delete its data
psql bao keys stop reset:
	@$(BIN)/python -m dev.running $@ $(ARGS)

test: .venv/dev.stamp ## lint, types and all tests, on a real PostgreSQL and a real OpenBao
	@# Two passes always run: beside each other (and beside lint), then alone what needs a quiet machine. What failed runs once more,
	@# alone: five whole runs in a row without a failure have not been seen yet. 5 says that a pass had no test
	@# (PYTEST_ADDOPTS="-k ...").
	@pass() { echo "pytest $$*"; $(BIN)/python -m pytest "$$@"; status=$$?; [ $$status = 5 ] && return; chosen=1; \
		[ $$status = 1 ] && { echo "Once more, alone:"; $(BIN)/python -m pytest --last-failed --last-failed-no-failures none "$$@" -n 0; status=$$?; }; \
		worst=$$((worst ? worst : status)); }; \
	worst=0; chosen=0; $(LINT_BESIDE) \
	pass -m "not alone" -n $(TEST_WORKERS) --dist worksteal; \
	$(LINT_ENDS) \
	pass -m alone; \
	[ $$linted = 0 ] || { echo "make lint failed: see above, between the two passes." >&2; exit $$linted; }; \
	[ $$chosen = 1 ] || exit 5; \
	[ $$worst = 0 ] || { echo "make test failed: see the summary of each of the two passes." >&2; exit $$worst; }

check: .venv/dev.stamp ## for the inner loop: lint, types, and the tests of rules and routes that share one server
	@$(LINT_BESIDE) \
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not alone" $(CHECKED); status=$$?; \
	$(LINT_ENDS) \
	exit $$((linted ? linted : status))

soak: .venv/dev.stamp ## attack for long: crashes, races, outages, canaries, random lives and placement (SOAK=20: times as much)
	SOAK=$(SOAK) SOAK_SECONDS=$$((16 * (1 + $(SOAK)))) $(BIN)/python -m pytest -s tests/attack tests/handoff/test_kills.py tests/test_claims.py tests/test_placement_simulation.py tests/test_dry_run.py tests/test_docs.py tests/test_demo.py

fuzz: .venv/dev.stamp ## send what the OpenAPI document allows, and what it does not, for long (FUZZ_SECONDS=1800)
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest -s tests/test_fuzz.py

test-sdk: .venv/dev.stamp ## more versions of the official SDK, generated clients (node, npm); renews docs/coming-from-the-vendor.md
	SDK_VERSIONS=all $(BIN)/python -m pytest -n $(TEST_WORKERS) tests/test_sdk.py tests/webhooks/test_receivers.py tests/test_clients.py
	$(BIN)/python -m tests.sdk.table

example: .venv/run.stamp ## a small executor, and a run that fails, is retried and succeeds, against `make run`
	@$(BIN)/python -m examples.lifecycle

restore-drill: .venv/run.stamp ## dump the database of the stack that runs, restore it beside it, and compare it with the stores
	@$(BIN)/python -m dev.restore_drill

observe: .venv/run.stamp ## Prometheus beside `make run`, on 127.0.0.1:$PROMETHEUS_PORT (9090), with the shipped alerts
	@exec $(BIN)/python -m dev.prometheus

containers: .venv/run.stamp ## build the images, start docker-compose.yml and try it (needs Docker; says so where there is none)
	@$(BIN)/python -m dev.containers

screenshots: .venv/dev.stamp ## every screen of the console as docs/console/*.png (needs Chromium)
	$(BIN)/python -m tests.console.screenshots

lint: .venv/dev.stamp ## ruff, mypy, who may import whom, and Kubernetes' manifests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/kubernetes-validate --strict --quiet deploy/kubernetes/*.yaml

fmt: .venv/dev.stamp ## format, and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

mutants: .venv/dev.stamp ## take bounds out one by one, and see that a test fails each time (ARGS="parameters lanes": some)
	@$(BIN)/python -m dev.mutants $(ARGS)

bench: .venv/run.stamp ## measure: ratios to the bare framework and the bare database (ARGS="retry --seconds 3")
	@$(BIN)/python -m benchmarks $(ARGS)

release: .venv/run.stamp ## wheel, sdist, SBOM (CycloneDX) and checksums of the last commit in dist/
	@$(BIN)/python -m dev.release

lock: ## renew the locked lists from pyproject.toml (needs uv and npm)
	$(COMPILE) --upgrade pyproject.toml -o requirements.lock
	$(COMPILE) --upgrade --all-extras pyproject.toml -c requirements.lock -o requirements-extras.lock
	$(COMPILE) --upgrade --group stack -c requirements-extras.lock -o requirements-stack.lock
	$(COMPILE) --upgrade --group demo -c requirements-stack.lock -o requirements-demo.lock
	$(COMPILE) --upgrade --group release -o requirements-release.lock
	$(COMPILE) --upgrade --group dev --all-extras pyproject.toml -c requirements-extras.lock -c requirements-stack.lock -o requirements-dev.lock
	for list in tests/sdk/locks/*.txt tests/clients/python.txt; do \
		grep -oE '^((cyberdesk|openapi-python-client)==[0-9.]+|fastapi|pydantic|python-dateutil)' $$list | $(COMPILE) --upgrade - -o $$list || exit; done
	cd tests/clients && npm install --package-lock-only --ignore-scripts --no-audit --no-fund --omit-lockfile-registry-resolved

# The stamps are written last, so that an interrupted installation is done again.
.venv/created.stamp:
	@$(or $(PYTHON),python3) dev/create_venv.py .venv
	@touch $@

.venv/run.stamp: .venv/created.stamp requirements.lock requirements-stack.lock
	@$(INSTALL) requirements.lock requirements-stack.lock
	@touch $@

.venv/dev.stamp: .venv/created.stamp requirements-dev.lock
	@$(INSTALL) requirements-dev.lock
	@touch .venv/run.stamp $@ # the list holds all that `make run` needs
