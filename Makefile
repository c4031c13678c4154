# Each target sets up what it needs; a second call costs nothing. `make help` explains them.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
# Each test process starts servers of its own and waits for them much of the time: four are quickest on two cores, too.
# The files are in order already: tests/conftest.py puts the longest first.
TESTS  ?= -n 4 --dist loadfile --no-loadscope-reorder

PY := $(VENV)/bin/python
# Orthanc is installed to /usr/sbin, which is not on everyone's path.
export PATH := $(PATH):/usr/sbin:/usr/local/sbin
export PYTHON VENV SUPPORTED

.DEFAULT_GOAL := help
.PHONY: help demo ui notebooks test test-engine test-browser test-live test-cohort test-distributed test-packages test-kills test-cuts test-simulation fuzz lint format bench docs lock setup setup-demo setup-engine peers clean

help: ## Explain the targets
	@echo "make TARGET [PYTHON=python3.12] [VENV=.venv] [ARGS='...']"
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 16

demo: setup-demo ## Retrieve studies through an Airflow DAG, and half a study from a PACS that says Success; 3 minutes the first time
	@$(VENV)-demo/bin/python scripts/demo.py $(ARGS)

ui: setup-demo ## Start Airflow's web interface and the embedded PACS with the demo's data; Ctrl-C stops both
	@$(VENV)-demo/bin/python scripts/ui.py $(ARGS)

notebooks: setup ## Execute the notebooks and save their output; ARGS='01_first_look' for one
	@$(PY) scripts/notebooks.py $(ARGS)

test: setup peers ## Run the whole test suite; ARGS are passed to pytest, for example ARGS='-k manifest'; 12 minutes on two cores
	@$(PY) -m pytest $(TESTS) $(ARGS)

test-engine: setup-engine peers ## Run the tests that need no Airflow, in a lighter environment of their own; 6 minutes on two cores
	@$(VENV)-engine/bin/python -m pytest $(TESTS) --ignore=tests/airflow -m "not airflow" $(ARGS)

test-kills: setup peers ## Kill retrievals by SIGKILL at twenty random moments for each kind of PACS and destination, cut the power, fail system calls; 20 minutes
	@KILLS=20 FAULTS=100 $(PY) -m pytest $(addprefix tests/functional/test_,kill.py s3.py forward.py power_cut.py system_faults.py mendings.py) -k "random_moments or TestKilled or (TestResume and test_kill) or power_cut or system_faults or mendings or every_third_request or asks_to_slow_down" -s --timeout 900 $(ARGS)

test-cuts: setup peers ## Cut the connection at 200 places, kill 20 times, keep a rate for 30 s, wait as long as real sources do; 15 minutes
	@CUTS=200 KILLS=20 LIMIT_SECONDS=30 LONG=1 $(PY) -m pytest $(addprefix tests/functional/test_,resume.py limits.py slow_destination.py) $(ARGS)

test-simulation: setup ## Play whole retrievals in one thread, from seeds: SEEDS=0:100000; all of two faults: ARGS='--faults 2'
	@$(if $(findstring --faults,$(ARGS)),$(PY) -m tests.simulation.exhaustive --processes 2 $(ARGS),$(PY) -m tests.simulation.simulate --seeds $(or $(SEEDS),0:100000) --processes 2 --marks $(ARGS))

fuzz: setup ## Fuzz everything that reads bytes of a peer, far longer than the suite does; takes an hour
	@HYPOTHESIS_PROFILE=fuzz $(PY) -m pytest -o timeout=0 tests/unit $(ARGS)
	@FUZZ_ASSOCIATIONS=1000 $(PY) -m pytest -o timeout=0 tests/functional/test_fuzz.py $(ARGS)

test-browser: setup ## Drive a real Airflow in Chromium; SCREENSHOTS=docs/images takes the screenshots of the docs again
	@bash scripts/peers.sh chromium=chromium
	@$(PY) -m pytest tests/browser -m browser $(ARGS)

test-live: setup ## Test in a real Airflow: 200 studies over a pool, kills, XCom of all sizes; LIVE_DATABASE=postgresql; 15 minutes
	@$(PY) -m pytest tests/live -m live -s $(ARGS)

test-cohort: setup ## A list of 5,000 accession numbers over 5,000 studies in a real Airflow, a task killed meanwhile; 20 minutes
	@COHORT_STUDIES=$${COHORT_STUDIES:-5000} $(PY) -m pytest tests/live/test_cohort.py -m live -n0 -s $(ARGS)

test-distributed: setup-distributed ## Lose a worker and the API server: Celery on PostgreSQL, Redis and S3, and edge workers at two sites; 35 minutes
	@$(VENV)-distributed/bin/python -m pytest tests/distributed -m distributed -s $(ARGS)

test-packages: setup ## Install wheel and sdist into empty environments: oldest and newest Python and Airflow, and its pre-release; 15 minutes
	@$(PY) scripts/packages.py $(ARGS)

lint: setup ## Check style, types and spelling
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(VENV)/bin/codespell

format: setup ## Format the code
	@$(PY) -m ruff check --fix-only .
	@$(PY) -m ruff format .

bench: setup peers ## Measure against other clients on this machine; takes minutes
	@$(PY) benchmarks/run.py $(ARGS)

docs: setup ## Build the documentation as a website in site/, without network
	@$(PY) scripts/doc_tables.py
	@NO_MKDOCS_2_WARNING=true $(PY) -m mkdocs build --quiet --strict
	@echo "site/index.html; for its search too: $(PY) -m http.server --bind 127.0.0.1 --directory site 8000"

lock: ## Resolve constraints.txt again, with PYTHON (the oldest supported) and PYTHON_NEW
	@$(PYTHON) scripts/lock.py $(PYTHON) $(or $(PYTHON_NEW),$(error name a newer interpreter: make lock PYTHON_NEW=/usr/bin/python3))

clean: ## Remove what the targets made: environments, demo, caches
	rm -rf $(VENV) $(VENV)-demo $(VENV)-engine $(VENV)-distributed .venv-ci .demo .cache site .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Not in the help: what the targets above call by themselves.
setup:
	@bash scripts/setup.sh "$(VENV)" "$(PYTHON)" airflow,dev "250 packages, 440 MB to download, 1.8 GB on disk, about 5 minutes"

setup-demo:
	@bash scripts/setup.sh "$(VENV)-demo" "$(PYTHON)" demo "140 packages, 160 MB to download, 0.7 GB on disk, about 2 minutes"

setup-engine:
	@bash scripts/setup.sh "$(VENV)-engine" "$(PYTHON)" dev

setup-distributed:
	@bash scripts/peers.sh postgres=postgresql redis-server=redis-server ip=iproute2
	@bash scripts/setup.sh "$(VENV)-distributed" "$(PYTHON)" airflow,dev,distributed,edge

peers:
	@bash scripts/peers.sh
