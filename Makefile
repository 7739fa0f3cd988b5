# The commands of this project. Each installs what it needs into .venv the first time.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
LIBTPU := $(VENV)/libtpu
CUDA := $(VENV)/cuda_plugin
SEED ?= 0
WORK ?= runs/demo
VIDEOS ?= 160
# Overrides of the demo's config, e.g. DEMO_FLAGS="--config.phases[0].epochs=2".
DEMO_FLAGS ?=
RUN_FLAGS = --config=configs/demo.py --workdir=$(WORK)/train --config.seed=$(SEED) \
	--config.data.dir=$(WORK)/clips --config.data.tokenizer=$(WORK)/vocabulary $(DEMO_FLAGS)

# On a CPU, XLA takes a step's scratch memory from malloc and gives it back: 84,000 page faults in one step of the demo.
# These settings make glibc keep it, on huge pages, which saves a quarter of the time.
KEEP_MEMORY = GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592:$\
	glibc.malloc.top_pad=67108864

# Installation runs pip without bytecode: compiling 2 GB of libraries, one file after the other, takes over a minute. Python
# compiles what it imports once and keeps it, unless this variable is set.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-ci test test-slow test-large soak tables slurm lint clean install

install: $(VENV)/.installed

$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --no-compile -e '.[prep,test]'
	touch $@

# Narrated mp4 files -> ArrayRecord clips -> align -> refine -> evaluation -> a page to look at.
demo: install
	@date +%s > .demo_start
	$(PY) -m data_prep.soundworld --out $(WORK)/soundworld --videos $(VIDEOS) --seed $(SEED)
	$(PY) -m data_prep.ego4d --root $(WORK)/soundworld --out $(WORK)/clips --name soundworld --short_side 72
	$(PY) -m data_prep.vocabulary --clips $(WORK)/clips --out $(WORK)/vocabulary
	$(KEEP_MEMORY) $(PY) -m mc3_jax.train $(RUN_FLAGS)
	$(KEEP_MEMORY) $(PY) -m mc3_jax.evaluate $(RUN_FLAGS)
	@echo "done in $$(( $$(date +%s) - $$(cat .demo_start) )) s: open $(WORK)/train/report/index.html"; rm -f .demo_start

# The same steps at a size that shows that they work together, but nothing about the method.
demo-ci:
	$(MAKE) demo WORK=runs/demo-ci VIDEOS=24 DEMO_FLAGS="--config.phases[0].epochs=2 --config.phases[1].epochs=1"

# Two processes. The tests of a file stay together, since they share worlds and runs; tests/conftest.py sets the order.
SHARED = -n 2 --dist loadfile --no-loadscope-reorder
test: install
	$(PY) -m pytest $(SHARED)

# Tests that take minutes: runs that are killed, jobs of several processes.
test-slow: install
	$(PY) -m pytest -m 'slow and not large' $(SHARED)

# Tests for which CI has no time: checkpoints, precision and compilation at the paper's sizes, gigabytes of clips, and more.
test-large: install $(LIBTPU) $(CUDA)
	TPU_LIBRARY_PATH=$(CURDIR)/$(LIBTPU)/libtpu/libtpu.so CUDA_PLUGIN_PATH=$(CURDIR)/$(CUDA) $(PY) -m pytest -m large $(SHARED)

# The compilers for TPUs and GPUs. They are not installed in the environment: there JAX would look for their devices at every
# start.
$(LIBTPU): | install
	rm -rf $@.part
	WANTED=$$($(PY) -c 'from importlib.metadata import requires; print(*(r.split(";")[0] for r in requires("jax") if "libtpu" in r))') \
		&& $(PY) -m pip install --quiet --no-deps --target $@.part "$$WANTED"
	mv $@.part $@

$(CUDA): | install
	rm -rf $@.part
	VERSION=$$($(PY) -c 'import jaxlib; print(jaxlib.__version__)') && $(PY) -m pip install --quiet --no-deps --target $@.part \
		jax-cuda12-plugin==$$VERSION jax-cuda12-pjrt==$$VERSION
	mv $@.part $@

# The tests of random damage, with fixed seeds, at full length: 200 damaged media files, 200 mutated annotation rows, 1,000
# damaged checkpoints, 20 kills of a run and 10 kills of a job of two processes.
soak: install
	$(PY) -m pytest -m '' --soak --timeout 3600 tests/data_prep/test_mutations.py tests/test_checkpoint.py tests/test_survival.py

# Tables 2 and 3 of the paper on SoundWorld: two and a half hours on two cores. If interrupted, run it again to continue.
tables: install
	$(KEEP_MEMORY) $(PY) -m benchmarks.tables --suite=soundworld --seeds=0,1,2

# Runs the Slurm jobs of launch/ on a real Slurm, which is started for it; needs slurm-wlm and munge.
slurm: install
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" tests/slurm/prove_data_prep.sh
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" tests/slurm/prove_training.sh

lint: install
	$(PY) -m ruff check .

clean:
	rm -rf runs/demo runs/demo-ci build *.egg-info .pytest_cache .ruff_cache
