# make demo   set up everything and make the demo video; ends with one JSON line
#             (DEVICES=cpu,cpu: also in worker processes)
# make test   set up everything and run the tests (COMFYUI=0.16.3 for another ComfyUI)
# make screenshots   renew the panel's pictures in docs/ and in the help pages
# make faults   ten rounds of killed, failing and interrupted workers and killed servers
# make quick  the tests that need no ComfyUI (tests/quick.txt), in half a minute
# make lint   ruff and mypy
PYTHON ?= python3
COMFYUI ?= 0.30.0
DEV = $(PYTHON) scripts/dev.py --comfyui $(COMFYUI)

.PHONY: setup demo test quick lint curve faults screenshots
setup:
	@$(DEV)
demo:
	@$(DEV) -m demo.run $(if $(DEVICES),--devices $(DEVICES))
test:
	@$(PYTHON) scripts/browser.py >&2
	@$(PYTHON) scripts/comfy_cli.py >&2
	@$(DEV) -m pytest
quick:
	@OMP_NUM_THREADS=1 SKEIN_WITHOUT_COMFYUI=1 $(DEV) -m pytest @tests/quick.txt
lint:
	@$(DEV) scripts/lint.py
faults:
	@SKEIN_ROUNDS=10 $(DEV) -m pytest -m rounds tests/workers
curve:
	@$(DEV) -m bench.cache_curve
screenshots:
	@$(PYTHON) scripts/browser.py >&2
	@$(DEV) tests/ui/screenshots.py
