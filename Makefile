# One set-up, the same for users and CI: .venv with pinned dependencies, then the target.
PROJECT ?= ViT_for_PyTorch
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
STAMP := $(VENV)/.installed
PROJECTS := ViT_for_PyTorch Beit2_for_PyTorch CLIP_for_PyTorch Data2vec_for_PyTorch
# what takes minutes says so at once, through `| tee` too
export PYTHONUNBUFFERED := 1
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install doctor first-run npu-contract npu-stub demo test counters counters-accept perf perf-run peers outcomes faults lint format sample_data clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z_-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv with the pinned dependencies

# torch first and by exact version: left to itself pip takes a newer build with gigabytes of CUDA libraries. Without an
# NVIDIA driver the small build is taken (0.2 instead of 2.8 GB to download), where its index answers; TORCH_INDEX= with
# nothing behind it, or another index, overrules that.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null || $(PYTHON) -c 'import urllib.request as u; url = "https://download.pytorch.org/whl/cpu"; u.urlopen(url + "/torch/", timeout=5); print(url)' 2>/dev/null)
$(STAMP): constraints.txt requirements-dev.txt $(wildcard *_for_PyTorch/requirements.txt)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; assert (3, 10) <= v <= (3, 12), f"Python 3.10 to 3.12 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.11 ..."'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt $(addprefix --extra-index-url ,$(TORCH_INDEX)) torch torchvision
	@$(VENV)/bin/python -c 'import torch; print("torch", torch.__version__, "for CUDA " + torch.version.cuda if torch.version.cuda else "without CUDA")'
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt $(foreach f,$(wildcard *_for_PyTorch/requirements.txt),-r $(f))
	@touch $(STAMP)

sample_data: $(STAMP) ## build the small real data sets in .sample_data/
	python -m ci.sample_data.build

doctor: ## say what is wrong with this host's driver, CANN, torch and cards; DEVICE=npu|cuda|cpu
	@$(PYTHON) -m common.doctor $(if $(DEVICE),--device $(DEVICE))

first-run: $(STAMP) ## twenty steps of every project on a card, beside a CPU's, in one report; DEVICE=npu|cuda|cpu
	python -m ci.first_run $(if $(DEVICE),--device $(DEVICE))

npu-contract: $(STAMP) ## fetch the torch_npu wheels (170 MB, deleted again) and check what our code calls of them
	python -m ci.npu.contract.update

npu-stub: $(STAMP) ## run our npu patches on the shape functions of the real torch_npu 2.13 (44 MB, kept in .npu_stub/)
	python -m ci.npu.stub

demo: sample_data ## train a small model on real pictures and show the result; PROJECT=X_for_PyTorch for another project
	@test -f $(PROJECT)/test/demo.sh || { echo "error: PROJECT=$(PROJECT): choose one of $(PROJECTS)" >&2; exit 2; }
	bash $(PROJECT)/test/demo.sh $(CURDIR)/.sample_data

test: sample_data ## run every test of the repo, two files at a time (JOBS=0: one); PYTEST_ARGS="-k resume" for some
	OMP_NUM_THREADS=1 python -m pytest -q -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

faults: $(STAMP) ## end runs at random moments in every way, and go on: what is tried and what holds, an hour; FAULTS_ARGS="--trials 1 --kind TERM"
	python -m ci.faults $(FAULTS_ARGS)

peers: $(STAMP) ## benchmarks against other implementations, an hour or more on one core; PEERS_ARGS="--only vit --quick" for some
	python -m ci.peers $(PEERS_ARGS)

outcomes: sample_data ## does every project still learn? all demos from three seeds; OUTCOMES_ARGS="--only CLIP_for_PyTorch" for some; DATA=cifar10: the long proof
	python -m $(if $(DATA),ci.long_proof --data $(DATA),ci.gates.outcomes) $(OUTCOMES_ARGS)

counters: $(STAMP) ## does a training step of each project do what was accepted? exact, a minute; COUNTERS_ARGS="--project ViT"
	python -m ci.gates.counters $(COUNTERS_ARGS)

counters-accept: $(STAMP) ## write the counts of the code as it is, for the commit that means to change them
	python -m ci.gates.counters --accept $(COUNTERS_ARGS)

perf: $(STAMP) ## is a step slower than at the merge base? paired, for the projects that changed; PERF_ARGS="v1.0 HEAD" for others
	python -m ci.gates.paired $(PERF_ARGS)

perf-run: sample_data ## every project's train_performance_1p.sh against earlier nights on this device; PERF_RUN_ARGS="--update"
	python -m ci.gates.nightly $(PERF_RUN_ARGS)

lint: $(STAMP) ## check style, format, types of common/ and who may import whom (.importlinter)
	ruff check .
	ruff format --check .
	mypy
	@PYTHONPATH=$(subst $() ,:,$(CURDIR) $(addprefix $(CURDIR)/,$(PROJECTS))) lint-imports .importlinter --no-cache --no-logo

format: $(STAMP) ## format the code
	ruff format .
	ruff check --fix .

clean: ## remove .venv and the sample data; training output stays
	rm -rf $(VENV) .sample_data
