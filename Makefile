# Every target makes the environment it needs; `make help` lists them.
PYTHON ?= python3.11
ENV ?= .venv
ONEDL_ENV ?= .venv-onedl
DATA ?=
ARGS ?=
BIN := $(abspath $(ENV))/bin
FAST := -m "not slow and not gpu"
export PATH := $(BIN):$(PATH)
# Known and answered by the pin of setuptools; mmengine and mim would say it in every process.
export PYTHONWARNINGS ?= ignore:pkg_resources is deprecated:UserWarning

.DEFAULT_GOAL := help
.PHONY: help env demo freesolo test test-slow test-onedl lint format bench doctor

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env:  ## make the environment (.venv): PyTorch, mmcv with its compiled operators, mmdet, mmseg
	@$(PYTHON) tools/setup_env.py $(ENV)

demo: env  ## train, run and score both stages on a small made-up data set, or DATA=<folder> of yours
	@python projects/uvo/demo.py $(if $(DATA),--data "$(DATA)") $(ARGS)

freesolo: env  ## learn to segment without labels, from made-up scenes or from DATA=<folder of photographs>
	@python projects/freesolo/freesolo.py $(if $(DATA),--data "$(DATA)") $(ARGS)

test: env  ## the tests that need neither minutes nor a GPU; ARGS goes to pytest
	@python -m pytest $(FAST) $(ARGS)

test-slow: env  ## the tests left out of `test`: big backbones, long runs
	@python -m pytest -m "slow and not gpu" $(ARGS)

test-onedl:  ## the tests of `test` on the second stack, the OneDL forks (.venv-onedl)
	@$(PYTHON) tools/setup_env.py $(ONEDL_ENV) --stack onedl
	@PATH=$(abspath $(ONEDL_ENV))/bin:$$PATH python -m pytest $(FAST) $(ARGS)

lint: env  ## ruff, no change made
	@ruff check .
	@ruff format --check .

format: env  ## ruff, in place
	@ruff check --fix .
	@ruff format .

bench: env  ## ours beside the peer, path by path; ARGS goes to tools/benchmark.py
	@python tools/benchmark.py $(ARGS)

doctor:  ## versions, compiled operators, GPU, known bad pairs and their mends
	@$(firstword $(wildcard $(BIN)/python) $(PYTHON)) tools/doctor.py
