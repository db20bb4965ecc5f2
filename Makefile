# Every target makes .venv itself. CONFIG is one experiment; what a run produces goes to out/<its name>/.
CONFIG ?= configs/toybirds.yaml
PYTHON ?= python3
ARGS   ?=
BIN    := .venv/bin
FIND_BROWSER := (command -v chromium-headless-shell || command -v chromium || command -v google-chrome) >/dev/null

.PHONY: help setup precompute distill report test mutants check bench demo browser clean

help:            ## this list
	@grep -hE '^[a-z]+: .*##|^[a-z]+: +##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/'

setup: .venv/ready  ## the virtual environment with everything in it

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lite,dev]'
	touch $@

precompute: setup  ## stage 1: pack, teach where asked, and store the teacher's answers
	$(BIN)/e2kd precompute $(CONFIG) $(ARGS)

distill: setup     ## stage 2: every student and seed, evaluated and reported (stage 1 first where missing)
	$(BIN)/e2kd distill $(CONFIG) $(ARGS)

report: setup      ## the scorecard again
	$(BIN)/e2kd report $(CONFIG) $(ARGS)

test: setup browser ## the test-suite, one process per core (ARGS="-n 0 --pdb": in one)
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS) $(shell $(FIND_BROWSER) || echo "-m 'not slow and not gpu and not browser'")

browser:         ## a headless browser for the tests of the report's page, where there is none (Debian, as root)
	@$(FIND_BROWSER) || (echo "installing chromium-headless-shell"; \
	apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium-headless-shell >/dev/null) || \
	echo "no browser could be installed: the tests of the report's page are left out"

mutants: setup     ## small mistakes in the method, each of which a fast test must notice (ARGS="losses": some)
	$(BIN)/python -m tests.mutants.main $(ARGS)

check: setup       ## lint, format, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup       ## time what the README states
	$(BIN)/python -m benchmarks.main $(ARGS)

demo: setup        ## the experiment in about 2 minutes: one seed, short schedules, nothing to conclude from
	$(BIN)/e2kd distill $(CONFIG) --out out/demo --set seeds=[0] --set teacher.train.epochs=6 --set train.epochs=6 $(ARGS)

clean:             ## remove what runs made and the virtual environment
	rm -rf out .venv
