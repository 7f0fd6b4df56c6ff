# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv if it is missing.
# `make help` lists them all.
PYTHON ?= python3
BIN := .venv/bin
# A shell that sets it makes every start compile diffusers anew, which takes some 15 seconds.
unexport PYTHONDONTWRITEBYTECODE

SINGLE := build/bench-single-graph

.PHONY: help demo test check quality parity-students teacher bench-cold bench-pipelines bench-decoders bench-single-graph bench-train bench-export clean distclean

help:  ## This list.
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' $(MAKEFILE_LIST)

demo: .venv/done  ## The whole way in minutes: demo/report.html, demo/report.json and bundles.
	$(BIN)/edgedistill demo -o demo

test: .venv/done check  ## Linters, types, import contracts, tests, the wheel.
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

check: .venv/done  ## Linters, types, import contracts.
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

bench-pipelines: .venv/done  ## Ours beside optimum's and OpenVINO GenAI's pipelines; SIZE=sd15 at full size, WORK=DIR with 21 GB.
	$(BIN)/python examples/bench_pipelines.py --size $(or $(SIZE),tiny) --work $(or $(WORK),build/bench-pipelines)

bench-decoders: .venv/done  ## Ways to decode a latent of Stable Diffusion's: time, memory, dB; SIDE=1024, WORK=DIR with 1 GB.
	$(BIN)/python examples/bench_decoder.py --side $(or $(SIDE),512) --work $(or $(WORK),build/bench-decoder)

bench-single-graph: .venv/done  ## A sampler as one graph beside its loop, on the digits student of 4 steps, which is trained first.
	$(BIN)/edgedistill distill examples/digits_guided.yaml -o $(SINGLE)/student
	$(BIN)/edgedistill export onnx -m $(SINGLE)/student/4-step $(SINGLE)/bundle
	$(BIN)/edgedistill export openvino -m $(SINGLE)/student/4-step $(SINGLE)/bundle --dtype fp32
	$(BIN)/edgedistill export onnx -m $(SINGLE)/student/4-step $(SINGLE)/bundle --single-graph
	$(BIN)/edgedistill export openvino -m $(SINGLE)/student/4-step $(SINGLE)/bundle --dtype fp32 --single-graph
	$(BIN)/python examples/bench_single_graph.py $(SINGLE)/bundle

bench-train: .venv/done  ## A step through the trainer against the same step in plain PyTorch.
	$(BIN)/python examples/bench_train.py

bench-export: .venv/done  ## Stable Diffusion 1.5 at full size: memory and time of its export, beside the usual exporters.
	$(BIN)/python examples/bench_export.py

.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "edgedistill needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	touch $@

clean:  ## Remove what demo, benches and parity wrote.
	rm -rf demo build dist parity

distclean: clean  ## And what takes hours or a download to make again: quality/ and .venv.
	rm -rf quality .venv
