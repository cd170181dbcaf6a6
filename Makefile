# Each target creates .venv if needed, and installs what the target needs, once.
#   PYTHON=python3.12   the interpreter to make .venv with (3.11 or newer)
#   BENCH="INPUT... --model BUNDLE"   what `make bench` measures; simulated packets and the default bundle without it
#   KAFKA_HOME=DIR      an Apache Kafka for the benchmark and the tests
# `make demo` installs no PyTorch. For the targets that do, on a machine without a GPU,
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu avoids a download of gigabytes of CUDA libraries.

# With it, each of the hundreds of processes that the tests start would compile the sources again.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help demo test suite coverage lint docs bench bench-check study chaos redrive-chaos dashboards deep explorer-shots watch-shots fuzz slow-link sanitize sae-parity spark spark-cost plugins operator-rules wheel sbom image clean

help:
	@echo 'make demo      simulates nights of ZTF and LSST, runs the service on them through an embedded broker, shows the results'
	@echo 'make test      make lint, and the whole test suite'
	@echo 'make suite     the test suite alone'
	@echo 'make coverage  the test suite with a report of the covered lines and branches (also in htmlcov/); fails below fail_under'
	@echo 'make lint      ruff, mypy --strict and import-linter'
	@echo 'make docs      builds the documentation site into docs/_build/html, and runs the tutorials in it'
	@echo 'make bench     measures the service, compared with a naive loop and with lower bounds; writes bench.json'
	@echo 'make bench-check   runs the benchmark on simulated packets; fails if a ratio is worse than the committed one'
	@echo 'make study     runs the study of training/vision/STUDY.md; takes hours, can be stopped and resumed'
	@echo 'make chaos     kills and reloads the service at random moments, and checks that every alert is published exactly once'
	@echo 'make dashboards  runs the service beside Prometheus, and checks that every panel of the dashboards shows data'
	@echo 'make redrive-chaos  kills redrive at random moments, and checks that every dead letter has one outcome'
	@echo 'make fuzz      measures time and memory for hostile packets; takes minutes (FUZZ="packets seed" for others)'
	@echo 'make slow-link slows the link to the output down during a backlog (SLOW="--rate 1000 --elsewhere" for options)'
	@echo 'make deep      imports full-size MaxViT-tiny networks with random weights and damaged ones; takes minutes'
	@echo 'make explorer-shots  opens pages of the lens in Chromium, and checks them (PAGES="page.html ..." for others)'
	@echo 'make watch-shots  uses the page of `watch` in Chromium, and takes screenshots; takes minutes'
	@echo 'make sanitize  decodes damaged packets with the compiled code under AddressSanitizer (needs gcc)'
	@echo 'make sae-parity  checks that sae-lens loads sparse dictionaries and encodes equally; installs it into .venv-sae'
	@echo 'make spark     runs the tests of Apache Spark and of the science modules for Fink (needs Java 17); installs it into .venv-spark'
	@echo 'make spark-cost  measures the CPU time of an alert in Spark and in score (COST="alerts.tar --executors 1" for others)'
	@echo 'make plugins   runs the units for AMPEL in AMPEL; installs it into .venv-ampel'
	@echo 'make operator-rules  writes the alarm rules as a resource of the Prometheus operator, after a change of the rules'
	@echo 'make wheel     builds the wheel and the source archive into dist/'
	@echo 'make sbom      writes a bill of materials (CycloneDX) of the installed wheel and its dependencies into dist/'
	@echo 'make image     builds the container image with buildah, and runs the service in it; deploy/image.sh has the options'
	@echo 'make clean     removes .venv and everything that was built'

demo: $(VENV)/installed-demo
	$(BIN)/broker-filter demo --out demo-out

test: lint suite

# Three processes run the tests on two cores, because many tests wait for brokers. The tests of a file run in one
# process, because each process starts its own brokers.
SUITE := -n 3 --dist loadfile --no-loadscope-reorder

# Tests that fail are run once more, by themselves, so that a broker that hangs on a busy machine fails no run. A test
# that fails twice is an error; the first failure is shown in any case.
suite: $(VENV)/installed-test
	$(BIN)/pytest $(SUITE) || $(BIN)/pytest --last-failed --last-failed-no-failures none

# Child processes are measured too, unless they are killed.
coverage: $(VENV)/installed-test
	rm -rf .coverage .coverage.* htmlcov
	$(BIN)/pytest $(SUITE) --cov --cov-report=term --cov-report=html

lint: $(VENV)/installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# The build starts from an empty directory, so that no page of an earlier build hides an error. Every warning is an
# error. Then the examples of the library run.
docs: $(VENV)/installed-docs
	rm -rf docs/_build
	$(BIN)/sphinx-build --jobs 2 --fail-on-warning --keep-going --quiet docs docs/_build/html
	$(BIN)/sphinx-build --builder doctest --doctree-dir docs/_build/html/.doctrees --quiet docs docs/_build/doctest
	@echo 'The site: docs/_build/html/index.html'

bench: export KAFKA_HOME ?= $(wildcard ../shared/kafka)
bench: $(VENV)/installed-bench
	$(BIN)/broker-filter bench $(BENCH) --out bench.json

bench-check: export KAFKA_HOME ?= $(wildcard ../shared/kafka)
bench-check: $(VENV)/installed-bench
	$(BIN)/broker-filter bench --parts stages,archive,kafka --check broker_filter/bench/ratios.json

ZTF := ../shared/data/ztf
GALAXIES := ../shared/data/galaxies/decals_rings_470_jpg128.tar
ENCODERS := $(wildcard training/vision/studies/*galaxy_zoo_1_*.yaml training/vision/studies/simulated_alerts_*.yaml)
TRAINING := $(BIN)/python -m training
DATASET := $(TRAINING) build-dataset $(ZTF)/ztf_alerts.tar --labels $(ZTF)/labels.parquet --shares 0.09 0.25

study: $(VENV)/installed-test
	$(DATASET) --label drb --class bogus=-1..0.5 --class real=0.5..1 --out study/real_bogus
	$(DATASET) --label weak_class --class VS=VS --class asteroid=asteroid --class bogus=bogus,likely_bogus \
		--class SN=SN,SN_cand --class AGN=AGN --out study/classes
	mkdir -p study/galaxies
	tar xf $(GALAXIES) -C study/galaxies
	for encoder in $(ENCODERS); do $(TRAINING) pretrain $$encoder || exit 1; done
	$(TRAINING) study training/vision/studies/papers_claims.yaml

chaos: $(VENV)/installed-test
	$(BIN)/python tests/chaos.py
	$(BIN)/python tests/chaos.py --instances 1 --alerts 10000 --kills 10 --reloads 10

redrive-chaos: $(VENV)/installed-test
	$(BIN)/python tests/redrive_chaos.py

dashboards: $(VENV)/installed-test
	$(BIN)/pytest tests/integration/live_dashboards.py

FUZZ ?= 2000 20261127

fuzz: $(VENV)/installed-test
	$(BIN)/python tests/packets/hostile.py $(FUZZ)

slow-link: $(VENV)/installed-test
	PYTHONPATH=. $(BIN)/python tests/slow_link.py $(SLOW)

deep: $(VENV)/installed-test
	$(BIN)/pytest -s -p no:logging --timeout 0 tests/deep_networks.py

explorer-shots: $(VENV)/installed-test
	$(PIP) install playwright
	PYTHONPATH=. $(BIN)/python tests/training/interpretability/explorer/shots.py explorer-shots $(PAGES)

watch-shots: $(VENV)/installed-test
	$(PIP) install playwright
	PYTHONPATH=. $(BIN)/python tests/watch/shots.py watch-shots

sanitize: $(VENV)/installed-test
	$(BIN)/python tests/packets/sanitize.py

# sae-lens brings transformers and more (2 GB), so it has an environment of its own.
SAE_VENV := .venv-sae

sae-parity: $(VENV)/installed-test $(SAE_VENV)/installed
	PYTHONPATH=. $(BIN)/python tests/sae_parity.py write $(SAE_VENV)/dictionaries
	$(SAE_VENV)/bin/python tests/sae_parity.py check $(SAE_VENV)/dictionaries

$(SAE_VENV)/installed:
	$(PYTHON) -m venv $(SAE_VENV)
	$(SAE_VENV)/bin/python -m pip --disable-pip-version-check --quiet install 'sae-lens>=6.54,<7'
	touch $@

# PySpark is 400 MB, so it has an environment of its own.
SPARK_VENV := .venv-spark

spark: $(SPARK_VENV)/installed
	$(SPARK_VENV)/bin/pytest tests/engines tests/plugins/test_fink_science.py

spark-cost: $(SPARK_VENV)/installed
	$(SPARK_VENV)/bin/python tests/spark_cost.py $(COST)

$(SPARK_VENV)/installed: pyproject.toml setup.py $(wildcard broker_filter/*/*.[ch])
	$(PYTHON) -m venv $(SPARK_VENV)
	$(SPARK_VENV)/bin/python -m pip --disable-pip-version-check --quiet install --editable '.[demo,spark]' hypothesis pytest pytest-timeout
	$(SPARK_VENV)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps fink-science==7.4.0
	touch $@

# AMPEL has an environment of its own, because its releases ask for pre-releases of its core.
AMPEL_VENV := .venv-ampel

plugins: $(VENV)/installed-test $(AMPEL_VENV)/installed
	$(BIN)/python tests/plugins/ampel_host.py write $(AMPEL_VENV)/night
	$(AMPEL_VENV)/bin/python tests/plugins/ampel_host.py check $(AMPEL_VENV)/night

$(AMPEL_VENV)/installed: pyproject.toml $(wildcard deploy/ampel/*.toml deploy/ampel/ampel/*/*.py)
	$(PYTHON) -m venv $(AMPEL_VENV)
	$(AMPEL_VENV)/bin/python -m pip --disable-pip-version-check --quiet install \
		'ampel-alerts>=0.10.3,<0.11' 'ampel-ztf>=0.10.2,<0.11' 'mongomock>=4.3,<5' --editable .
	$(AMPEL_VENV)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --force-reinstall ./deploy/ampel
	touch $@

wheel: $(VENV)/installed-test
	$(BIN)/python -m build --outdir dist

# The environment holds the wheel and its dependencies alone, without pip, so that the list is what a user installs.
# The tool that writes the list is in .venv.
SBOM_VENV := .venv-sbom

sbom: wheel
	rm -rf $(SBOM_VENV)
	$(PYTHON) -m venv --without-pip $(SBOM_VENV)
	$(PIP) --python $(SBOM_VENV) install dist/*.whl
	$(PIP) install 'cyclonedx-bom>=7,<8'
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --mc-type application --output-reproducible \
		--output-file dist/broker-filter.cdx.json $(SBOM_VENV)/bin/python

operator-rules: $(VENV)/installed-test
	$(BIN)/python deploy/prometheus/operator_rules.py

image:
	deploy/image.sh

clean:
	rm -rf $(VENV) $(SAE_VENV) $(SPARK_VENV) $(AMPEL_VENV) $(SBOM_VENV) deploy/ampel/build build dist docs/_build demo-out explorer-shots watch-shots htmlcov .coverage .coverage.* study bench.json *.egg-info .import_linter_cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find broker_filter -name '*.so' -delete

# One stamp file for each set of extras. The package is installed again if pyproject.toml, setup.py or a C source changes.
# Tests compare with btsbot's code; it is installed without its dependencies (database clients, plotting), which the tests
# do not need.
$(VENV)/installed-%: pyproject.toml setup.py $(wildcard broker_filter/*/*.[ch]) | $(BIN)/python
	@echo 'Installing broker-filter[$*] into $(VENV); the first time this takes some minutes ...'
	@$(PIP) install --editable '.[$*]' >$(VENV)/install.log 2>&1 || { cat $(VENV)/install.log; exit 1; }
	@$(if $(filter test,$*),$(PIP) install --no-deps btsbot==2.0.7)
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed (this is %d.%d): make PYTHON=python3.12" % sys.version_info[:2])'
	@echo 'Making $(VENV) ...'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip 2>/dev/null
