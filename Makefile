# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv if it is missing.
PYTHON ?= python3
BIN := .venv/bin
# Without bytecode files the first import of diffusers alone takes some 15 seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check quality parity-students teacher bench-cold bench-pipelines bench-decoders bench-train bench-export clean

demo: .venv/done  ## The whole way in minutes: demo/report.html, demo/report.json and bundles.
	$(BIN)/edgedistill demo -o demo

test: .venv/done check  ## Linters, types, import contracts, tests, the wheel.
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

check: .venv/done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

quality: .venv/done  ## Every method over three seeds, side by side and resumable: quality/quality.md and quality.json.
	$(BIN)/python examples/quality.py -o quality --docs docs/quality.md

parity-students: .venv/done  ## Every trained student through export, compression and parity: parity/parity.md.
	$(BIN)/python examples/parity_of_students.py quality -o parity

teacher: .venv/done  ## Train the packaged teachers again and compare them byte for byte.
	$(BIN)/python examples/train_digits_teacher.py --check
	$(BIN)/python examples/train_captioned_digits_teacher.py --check

bench-cold: .venv/done  ## Process start to picture, against a bare script.
	$(BIN)/python examples/bench_cold_start.py

bench-pipelines: .venv/done  ## Ours beside optimum's and OpenVINO GenAI's pipelines; SIZE=sd15 at full size, WORK=DIR with 13 GB.
	$(BIN)/python examples/bench_pipelines.py --size $(or $(SIZE),tiny) --work $(or $(WORK),build/bench-pipelines)

bench-decoders: .venv/done  ## Ways to decode a latent of Stable Diffusion's: time, memory, dB; SIDE=1024, WORK=DIR with 1 GB.
	$(BIN)/python examples/bench_decoder.py --side $(or $(SIDE),512) --work $(or $(WORK),build/bench-decoder)

bench-train: .venv/done  ## A step through the trainer against the same step in plain PyTorch.
	$(BIN)/python examples/bench_train.py

bench-export: .venv/done  ## Stable Diffusion 1.5 at full size: memory and time of its export, beside the usual exporters.
	$(BIN)/python examples/bench_export.py

.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "edgedistill needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	touch $@

clean:
	rm -rf demo quality dist .venv
