# `make serve` and `make test` need Python 3.11, 3.12, 3.13 or 3.14, and make. `make help` lists all commands.
PYTHON ?= python3
SERVE := .venv
DEV := .venv-dev
BIN := $(DEV)/bin
PIP := -m pip --disable-pip-version-check --quiet
CMAPSS_URL ?= https://phm-datasets.s3.amazonaws.com/NASA/6.+Turbofan+Engine+Degradation+Simulation+Data+Set.zip

.DEFAULT_GOAL := help
.PHONY: help serve demo test test-unit test-commands check format train export evaluate fleet study fuzz kills bench bench-hooks bench-peers bench-score bench-monitor \
	bench-console kills-score endurance faults soak scaling data docs tables trace screenshots mutants lock clean

help:                            ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' Makefile

serve: $(SERVE)/ready            ## start the service on 127.0.0.1:8000 with the bundled model
	exec $(SERVE)/bin/engine-health serve

demo: $(SERVE)/ready             ## start the service with a simulated fleet; DEMO="--drift sensor_11:+2sd@600" injects drift
	@exec $(SERVE)/bin/python -m service.replay.demo $(DEMO)

$(SERVE)/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python $(PIP) install --require-hashes -r requirements.lock
	$(SERVE)/bin/python $(PIP) install --no-deps -e .
	touch $@

$(DEV)/ready: requirements-dev.lock pyproject.toml
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/python $(PIP) install torch==2.13.0 -r requirements-dev.lock
	$(DEV)/bin/python $(PIP) install --no-deps -e .
	touch $@

test: $(DEV)/ready               ## run all tests; those on real data need CMAPSS_DIR or `make data`
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-unit: $(DEV)/ready          ## run the tests that need no other process; less than a minute
	$(BIN)/python -m pytest -m unit -n auto --maxprocesses 4 --dist loadfile

test-commands: $(DEV)/ready      ## run every command of the documentation from a fresh clone, with its installation
	COMMANDS_INSTALL=1 $(BIN)/python -m pytest tests/docs/test_commands.py

check: $(DEV)/ready              ## check style, types, dependency directions and generated tables
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python docs/tables.py --check

format: $(DEV)/ready             ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

data:                            ## download C-MAPSS into data/cmapss and check its checksums
	$(PYTHON) -m model.data.download $(CMAPSS_URL)

train: $(DEV)/ready              ## train the shipped network and its folds into build/checkpoint.pt
	$(BIN)/python -m model.training.cross_fit

export: $(DEV)/ready             ## build/checkpoint.pt to the bundled artefact: calibrate, export, verify
	$(BIN)/python -m model.training.calibrate
	$(BIN)/python -m export.to_onnx
	$(BIN)/python -m export.verify

evaluate: $(DEV)/ready           ## evaluate the bundled artefact on the official test engines; renews the model card
	$(BIN)/python -m model.evaluation.evaluate
	$(BIN)/python docs/card.py

fleet: $(DEV)/ready              ## estimate the statistics of simulated engines: model/data/simulator/fleet.json
	$(BIN)/python -m model.data.simulator.fit

study: $(DEV)/ready              ## train three seeds and each anchor for the model card; hours
	for seed in 0 1 2; do $(BIN)/python -m model.training.cross_fit --seed $$seed --output build/seed-$$seed.pt || exit 1; done
	$(BIN)/python -m benchmarks.study seeds build/seed-0.pt build/seed-1.pt build/seed-2.pt
	for name in boosting textbook-full textbook-64; do $(BIN)/python -m benchmarks.study anchor $$name || exit 1; done

fuzz: $(DEV)/ready              ## send 5,000 requests generated from the OpenAPI document
	SCHEMA_EXAMPLES=1300 $(BIN)/python -m pytest -s tests/api/test_schema.py

bench: $(DEV)/ready              ## the performance table of docs/benchmarks.md: against a bare route and ONNX Runtime alone
	$(BIN)/python -m benchmarks.serving

bench-hooks: $(DEV)/ready        ## measure the gain of each private hook of the server; ten minutes
	$(BIN)/python -m benchmarks.hooks

kills: $(DEV)/ready             ## kill -9 100 times while labels are sent, on SQLite and PostgreSQL; five minutes
	$(BIN)/python -m benchmarks.kills

bench-peers: $(DEV)/ready        ## measure the same model behind other servers; installs them below build, needs wrk; half an hour
	$(BIN)/python -m benchmarks.peers

bench-score: $(DEV)/ready        ## the table of batch scoring; 10 million rows take minutes, pandas is compared if build/venv has it
	$(BIN)/python -m benchmarks.score

kills-score: $(DEV)/ready        ## kill -9 twenty scoring jobs at random moments, start them again, compare bytes; two minutes
	$(BIN)/python -m benchmarks.score --kills 20

bench-monitor: $(DEV)/ready      ## false and true alarms of the calibration state, simulated; a quarter of an hour
	$(BIN)/python -m benchmarks.monitor

bench-console: $(DEV)/ready      ## measure what the Fleet page costs browser and service with 1,000 engines; needs chromium
	$(BIN)/python -m benchmarks.console

endurance: $(DEV)/ready          ## check every promise under load at full size; fails if one is broken; half an hour
	$(BIN)/python -m benchmarks.endurance

faults: $(DEV)/ready             ## inject one fault after another and print a table; needs root; five minutes
	$(BIN)/python -m benchmarks.faults

soak: $(DEV)/ready               ## MINUTES=30 of mixed load: memory, descriptors, p99 and counters at the end
	$(BIN)/python -m benchmarks.mixture --minutes $(or $(MINUTES),30)

scaling: $(DEV)/ready            ## requests/s of one and two workers, one and two replicas on one database; needs wrk
	$(BIN)/python -m benchmarks.scaling

tables: $(DEV)/ready             ## write the generated tables of the documents
	$(BIN)/python docs/tables.py

docs: $(DEV)/ready               ## build the documentation site into build/site; dead links fail
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict  # without the notice of end of life in May 2027

trace: $(DEV)/ready              ## frames, modules and module changes of one request of each kind, compared with the targets
	$(BIN)/python -m docs.trace

screenshots: $(DEV)/ready        ## the pictures of the console in docs/; needs chromium and C-MAPSS
	$(BIN)/python -m docs.screenshots

build/mutmut/ready: $(DEV)/ready
	$(BIN)/python -m venv build/mutmut
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > build/mutmut/dev.pth
	mv build/mutmut/dev.pth build/mutmut/lib/python*/site-packages/
	build/mutmut/bin/python $(PIP) install mutmut==3.8.1
	touch $@

mutants: build/mutmut/ready      ## mutation testing of nine modules, as a table; ONLY=timeouts,body for some; half an hour for all
	$(BIN)/python -m benchmarks.mutants $(if $(ONLY),--only $(ONLY))

build/uv/ready: ops/check_wheels.py
	$(PYTHON) -m venv build/uv
	build/uv/bin/python $(PIP) install uv packaging
	touch $@

lock: build/uv/ready             ## renew the locks and check their wheels for each Python version
	build/uv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--upgrade pyproject.toml -o requirements.lock
	build/uv/bin/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --upgrade \
		pyproject.toml --all-extras --group dev -c requirements.lock -o requirements-dev.lock --no-emit-package torch
	echo 'setuptools>=77' | build/uv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
		--no-annotate --upgrade - -o requirements-build.lock  # what builds the image's wheel, and is not in it
	sed -i '/^cuda-/d; /^nvidia-/d; /^triton==/d' requirements-dev.lock  # a GPU's packages: the CPU build needs none
	build/uv/bin/python ops/check_wheels.py requirements.lock requirements-dev.lock

clean:                           ## remove environments and build products
	rm -rf $(SERVE) $(DEV) build *.egg-info
