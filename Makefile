# make demo   set everything up, build a small real corpus, train on it, and show what came out
# make test   set everything up, and run lint, types and all tests
# make setup  the installation alone

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$python && break; done)
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)
BIN := .venv/bin
# pip would compile on one core, which is a third of the installation's time
define install
	$(BIN)/pip install -q --disable-pip-version-check --no-compile -c constraints.txt -e $(1)
	@PYTHONWARNINGS=ignore $(BIN)/python -m compileall -qq -j 0 .venv/lib || true
endef
export OMP_NUM_THREADS ?= 1

.PHONY: demo test setup lint clean

demo: .venv/installed
	@env -u OMP_NUM_THREADS $(BIN)/microdit demo

setup: .venv/installed

test: .venv/installed-dev .venv/chromium .venv/slurm lint
	@# three beside each other on two cores: a good half of the time is waiting, for Ray, servers and signals
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "microdit needs Python 3.11, 3.12 or 3.13: install one, or say make PYTHON=/path/to/python3.12"; exit 2; }
	@$(PYTHON) -m venv .venv || { echo "installing the venv module"; rm -rf .venv; \
		$(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq python3-venv && $(PYTHON) -m venv .venv; }

.venv/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing microdit into .venv (a few minutes the first time)"
	$(call install,.)
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing microdit with its development parts into .venv (a few minutes the first time)"
	$(call install,".[dev]")
	@touch $@ .venv/installed

# a browser for the tests of the report page: Debian's, or where there is none (Ubuntu has only a snap) playwright's own
.venv/chromium: .venv/installed-dev
	@command -v chromium >/dev/null || { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq chromium; } \
		|| $(BIN)/playwright install --with-deps chromium
	@touch $@

# for tests/infra: virtual networks and a small real Slurm, which root alone can start
.venv/slurm: | $(BIN)/python
	@for command in ip sbatch slurmctld slurmd; do \
		if test "$$(id -u)" = 0 && ! command -v $$command >/dev/null; then \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
				apt-get install -y -qq --no-install-recommends iproute2 slurm-client slurmctld slurmd || exit 1; \
		fi; \
	done
	@touch $@

clean:
	rm -rf .venv
