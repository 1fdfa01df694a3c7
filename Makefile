PYTHON ?= python3
PROFILE ?= toy
# One finetuning fills a GPU, and one fills a core.
CORES ?= $(shell command -v nvidia-smi > /dev/null && echo 1 || $(PYTHON) -c 'import os; print(os.cpu_count() or 1)')
VENV := .venv/bin
INSTALLED := .venv/installed

# glibc gives large arrays back to the system at once and gets them again page by page: on a CPU a fifth
# of the time in which samples are drawn, and 4 % of a finetuning. With these it keeps them.
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 1073741824

.PHONY: help reproduce seeds methods text book test lab bench toy

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1|/p' Makefile | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

reproduce: $(INSTALLED) ## every figure and table; PROFILE=toy, CORES=all of them
	@$(VENV)/python -m ddpo_lib.book.reproduce $(PROFILE) --cores $(CORES)

seeds: $(INSTALLED) ## five seeds of every task, hours; their tables go to data/seeds
	@$(VENV)/python -m ddpo_lib.book.reproduce $(PROFILE) --cores $(CORES) --seeds

methods: $(INSTALLED) ## every method on one problem, hours; its table goes to data/seeds/methods
	@$(VENV)/python -m ddpo_lib.book.reproduce methods --cores $(CORES) --seeds

text: $(INSTALLED) ## text-to-image, an hour and a half; its tables go to data/seeds/text
	@$(VENV)/python -m ddpo_lib.book.reproduce text --cores $(CORES) --seeds

book: $(INSTALLED) ## the notebooks as a site, with a gallery: book/index.html
	@$(VENV)/python -m ddpo_lib.book.site

test: $(INSTALLED) ## the test suite
	@$(VENV)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lab: $(INSTALLED) ## the notebooks in JupyterLab
	@$(VENV)/jupyter lab notebooks

bench: $(INSTALLED) ## every benchmark
	@for script in benchmarks/*.py; do $(VENV)/python $$script || exit 1; done

toy: $(INSTALLED) ## train the toy world again from nothing
	@$(VENV)/python -m ddpo_lib.toy.make

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing into .venv: about two minutes and 6 GB, once"
	@$(PYTHON) -m venv .venv
	@$(VENV)/pip install -qq -r requirements.txt
	@$(VENV)/pip install -qq --no-deps -e .
	@touch $@
