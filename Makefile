# make demo: from nothing to a ternary model that adds.  make test ARGS="-k quant": some of the tests.
PYTHON ?= python3
BIN = .venv/bin
SUPPORTED = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

.PHONY: setup demo test lint

# a .venv whose Python is unsupported, or was removed since, is rebuilt
ifneq ($(shell $(BIN)/python -c '$(SUPPORTED)' 2>/dev/null && echo usable),usable)
.PHONY: .venv/ready
endif

setup: .venv/ready

.venv/ready: requirements.txt
	@$(BIN)/python -c '$(SUPPORTED)' 2>/dev/null || $(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing); Python 3.11 to 3.13 is" \
	    "needed: install it and name it, for example: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -c '$(SUPPORTED)' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	@echo "installing requirements.txt into .venv: 1.5 GB of disk, several GB more with the CUDA build of torch"
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/ready requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: setup
	@test -f data/arithmetic/meta.json || $(BIN)/python prepare/arithmetic.py
	$(BIN)/python train.py config/train_simple.py --run_id=demo --resume=auto
	$(BIN)/python evaluate.py --ckpt=runs/demo
	@echo
	@for sum in 12+34= 7+58= 99+99=; do \
	  $(BIN)/python sample.py --ckpt=runs/demo --prompt=$$sum --temperature=0 2>/dev/null; done
	@echo
	@echo "These are answers of a ternary model. Its loss stays near 1.08 even if all answers are right:"
	@echo "the operands of a problem cannot be predicted, only its answer can. Next:"
	@echo "  $(BIN)/python sample.py --ckpt=runs/demo --prompt=45+27= --temperature=0   another question"
	@echo "  $(BIN)/python train.py --help                                              all settings"
	@echo "  README.md                                                                how to change an experiment"

test: .venv/dev
	$(BIN)/python -m pytest -n 3 --dist loadfile $(ARGS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
