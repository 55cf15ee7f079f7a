# make demo | make demo-gkd | make gsm8k DATA=FOLDER | make test | make test-all | make check
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo demo-gkd gsm8k setup test test-all test-gpu lint check
demo: setup
	$(BIN)/python configs/demo/run.py

demo-gkd: setup
	$(BIN)/python configs/demo/distil.py

gsm8k: setup
	@test -n "$(DATA)" || { echo "make gsm8k DATA=FOLDER: grade_school_math/data of github.com/openai/grade-school-math" >&2; exit 2; }
	$(BIN)/python configs/gsm8k/run.py $(DATA)

test: setup lint
	$(BIN)/python -m pytest -m "not slow" --durations=15

test-all: setup lint
	$(BIN)/python -m pytest --durations=40

test-gpu:
	$(PYTHON) -m pytest tests/gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

check: setup
	$(BIN)/megaray check

setup: $(STAMP)

# The CPU build of torch comes first, alone: other packages would pull in the CUDA build. Where pip's configured sources
# lack it, PyTorch's own CPU index has it. Then the locked closure, without resolving.
$(STAMP): requirements-cpu.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q uv
	$(BIN)/python -m pip install -q --no-deps "torch==2.13.0+cpu" || \
		$(BIN)/python -m pip install -q --no-deps "torch==2.13.0+cpu" --index-url https://download.pytorch.org/whl/cpu
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --compile-bytecode -r requirements-cpu.lock
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	touch $@
