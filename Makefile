# `make demo`, `make app` and `make test` each set up everything they need on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo app test format clean

# The stamp files depend on the requirements, so a changed list is installed again.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	cp requirements.txt $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	cp requirements-dev.txt $@

.venv/installed-app: requirements-app.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-app.txt
	cp requirements-app.txt $@

demo: .venv/installed
	@echo "== Digits from the shipped U-Net"
	$(BIN)/python generate.py --num_samples 100 --output outputs/demo/shipped.png
	rm -rf checkpoints/demo
	@dataset=$$($(BIN)/python -m utils.data_loader); \
		echo "== Two minutes of training on $$dataset"; \
		$(BIN)/python main.py --dataset $$dataset --max_minutes 2 --experiment_name demo --keep 1
	$(BIN)/python generate.py --checkpoint checkpoints/demo \
		--num_samples 100 --output outputs/demo/two_minutes.png
	@echo "== Look at outputs/demo/shipped.png and outputs/demo/two_minutes.png"

# Downloads the test digits before the page opens; if that fails, uses synthetic ones.
app: .venv/installed-app
	@dataset=$$($(BIN)/python -m utils.data_loader); $(BIN)/python -m app --dataset $$dataset

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=10

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv checkpoints/demo outputs/demo
