# make run      find things on photographs; train, convert, and run the four stages; pictures and tables end up in out/
# make studies  the remaining notebooks: YOLACT's training, formats side by side, scale, tuning
# make test     all tests, the notebooks among them, on two processes side by side
# make pack     one archive with Python, all packages of a run and this project, for any cluster
# make fuzz     mutants of images, videos and manifests, for MINUTES=10; fails if one does more than become an error
# Each does its own set-up; a second call finds it done. `make -B run` runs the notebooks again.

PYTHON ?= python3
BIN := .venv/bin
NOTEBOOKS := $(sort $(wildcard notebooks/[0-9]*.ipynb))
EXECUTED := $(NOTEBOOKS:notebooks/%=out/notebooks/%)
STUDIES := $(filter out/notebooks/02% out/notebooks/08% out/notebooks/09% out/notebooks/10%,$(EXECUTED))
SOURCES := $(wildcard helpers/*.py helpers/*/*.py helpers/tracking/page.* conf/* conf/cards/*) $(wildcard notebooks/programs/*.py notebooks/programs/*/*.py notebooks/studies/*.py)
CLASSES := .venv/spark-classes.jsa
PACKAGES := --requirement requirements-test.txt --editable .[train]
# PyPI has only the source of pyspark, whose 0.4 GB of jars would be compressed for ten seconds, to be unpacked at once.
UNCOMPRESSED := --config-settings-package pyspark:--build-option=--compression=stored
AZURITE := .venv/node/node_modules/azurite
DATA := out/data/FashionMNIST/.ready
FIRST_LOOK := out/data/first_look/.ready
# apt-get as root or through sudo without a password; empty if neither works
APT := $(shell command -v apt-get >/dev/null && { [ "$$(id -u)" = 0 ] && echo apt-get || { sudo -n true 2>/dev/null && echo sudo apt-get; }; })

# Images of containers often set it, and then every process compiles all that it imports, for two seconds and more.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup ready run studies test fuzz lint notebooks clean java azurite chromium pack badges
.DELETE_ON_ERROR:

# Spark's classes take one core, and downloads hardly any. `make -B` has made the packages by then.
BESIDE = $(MAKE) --no-print-directory --jobs 2 --assume-old .venv/.ready
setup: .venv/.ready
	+@$(BESIDE) ready

ready: java $(CLASSES) $(DATA) $(FIRST_LOOK)

.venv/.ready: requirements.txt requirements-test.txt pyproject.toml setup.py
	@echo "== packages: 2 GB where PyTorch comes with CUDA, two minutes the first time =="
	$(PYTHON) -m venv .venv
	@# uv takes a quarter of pip's time; pip installs where uv cannot, as behind an index that only pip is told of
	$(BIN)/pip install --quiet --disable-pip-version-check uv==0.13.9
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python $$($(PYTHON) conf/torch_index.py) $(UNCOMPRESSED) $(PACKAGES) || $(BIN)/pip install $(PACKAGES)
	@# programs and studies are importable from where they lie, as helpers are
	@printf '%s\n' "$(CURDIR)/notebooks" "$(CURDIR)/notebooks/programs" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/notebooks.pth"
	@touch $@

java: .venv/.ready
	@$(BIN)/python -m helpers.java >/dev/null 2>&1 \
	  || { echo "== Java =="; $(BIN)/pip install --quiet $$($(BIN)/python -m helpers.java --package); } \
	  && $(BIN)/python -m helpers.java >/dev/null

# Spark starts without the archive too, but more slowly. So a JVM that cannot make it stops nothing.
$(CLASSES): .venv/.ready conf/classes.py | java
	@echo "== Spark's classes, archived =="
	-@$(BIN)/python conf/classes.py

# 3.35.0 is the newest version for node 20. Any node that runs it will do. What may need apt-get comes one after the other.
azurite: .venv/.ready | $(FIRST_LOOK)
	@[ -f $(AZURITE)/package.json ] \
	  || { echo "== Azurite =="; command -v npm >/dev/null || { [ -n "$(APT)" ] && $(APT) update -qq && $(APT) install -y -qq npm; } \
	       && npm install --prefix .venv/node --no-audit --no-fund --loglevel=error azurite@3.35.0; } \
	  || echo "Azurite cannot be installed here (it needs npm): the tests of ADLS are skipped, in CI they fail"

# It looks at the page of results, as a reader does.
chromium:
	@{ command -v chromium && command -v chromedriver; } >/dev/null \
	  || { [ -n "$(APT)" ] && echo "== Chromium ==" && $(APT) update -qq && $(APT) install -y -qq chromium chromium-driver; } \
	  || echo "Chromium cannot be installed here: the tests of the page are skipped, in CI they fail"

$(DATA): | .venv/.ready
	@echo "== Fashion-MNIST =="
	$(BIN)/python notebooks/programs/fashion_data.py \
	  || { [ -n "$(APT)" ] && $(APT) update -qq && $(APT) install -y -qq dataset-fashion-mnist && $(BIN)/python notebooks/programs/fashion_data.py; }
	@touch $@

# Without them everything but notebook 00 runs; the message says how to get them.
$(FIRST_LOOK): | .venv/.ready $(DATA)
	@echo "== models and photographs of notebook 00 =="
	@$(BIN)/python notebooks/programs/first_look_data.py && touch $@ || echo "notebook 00 is left out"

run: setup $(filter-out $(STUDIES),$(EXECUTED))
	@echo
	@echo "executed notebooks  out/notebooks/"
	@echo "model bundles       out/models/"
	@echo "results             out/results/fashion_mnist/results/"
	@echo "TensorBoard logs    out/runs/     look at them with: $(BIN)/tensorboard --logdir out/runs"
	@echo "pictures            out/results/fashion_mnist/pictures/"
	@echo "                    out/results/first_look/pictures/     people, cars, a cat and a cup on photographs and a street"

studies: run $(STUDIES)

# Notebooks run one after the other, because each needs what the one before has made.
ifeq ($(filter ready,$(MAKECMDGOALS)),)
.NOTPARALLEL:
endif
out/notebooks/%.ipynb: notebooks/%.ipynb $(SOURCES) | setup
	@mkdir -p out/notebooks
	@echo "== $* =="
	@case $* in 00*) [ -f $(FIRST_LOOK) ] || { echo "left out"; exit 0; };; esac; \
	  $(BIN)/papermill $< $@ --cwd notebooks --log-output --no-progress-bar

# Threads of PyTorch that wait take no time from those of the other process.
test: .venv/.ready
	+@$(BESIDE) ready azurite
	@$(MAKE) --no-print-directory --assume-old .venv/.ready chromium
	OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder --durations 20 \
	  --nbval --nbval-sanitize-with conf/nbval.cfg notebooks tests

MINUTES ?= 10

fuzz: .venv/.ready
	$(BIN)/python tests/fuzz.py --minutes $(MINUTES)

pack: out/pack/vision.tar.gz

out/pack/vision.tar.gz: .venv/.ready $(wildcard helpers/*.py helpers/*/*.py conf/*.py conf/*.yaml conf/cards/* conf/*.properties)
	$(BIN)/python conf/pack.py

lint: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Execute the committed notebooks in place, for a commit that changes what they show.
notebooks: setup
	$(BIN)/jupyter-execute --inplace $(NOTEBOOKS)
	$(BIN)/python conf/outputs.py

# Write the repository's address into the notebooks, so that Colab can open them.
badges: .venv/.ready
	$(BIN)/python conf/badges.py $(REPOSITORY)

clean:
	rm -rf out .venv *.egg-info
