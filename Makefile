# make demo   set up everything and make the demo video; ends with one JSON line
# make test   set up everything and run the tests (COMFYUI=0.16.3 for another ComfyUI)
# make lint   ruff and mypy
PYTHON ?= python3
COMFYUI ?= 0.30.0
DEV = @$(PYTHON) scripts/dev.py --comfyui $(COMFYUI)

.PHONY: setup demo test lint curve
setup:
	$(DEV)
demo:
	$(DEV) -m demo.run
test:
	$(DEV) -m pytest
lint:
	$(DEV) -m ruff check .
	$(DEV) -m ruff format --check .
	$(DEV) -m mypy
curve:
	$(DEV) -m bench.cache_curve
