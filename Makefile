# minocc: every recipe is the real command; run it yourself to change a flag.
.DEFAULT_GOAL := help
.PHONY: show foundation help setup setup-libero libero demo occvla test test-gpu world smoke bench bench-gpu fuzz faults table docs

# An active virtual environment (or PYTHON=...) is used as it is; otherwise .venv is made from requirements.lock.
ifdef VIRTUAL_ENV
PYTHON ?= python
endif
ifdef PYTHON
READY :=
else
PYTHON := .venv/bin/python
STAMP := .venv/.installed-$(shell { sha256sum requirements.lock 2>/dev/null || shasum -a 256 requirements.lock; } | cut -c1-16)
READY := $(STAMP)
endif
BASE_PYTHON ?= python3

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## make .venv from requirements.lock (does nothing when it is up to date)
	@$(PYTHON) -c "import torch; print('python', '$(PYTHON)', 'torch', torch.__version__)"

$(STAMP): requirements.lock
	$(BASE_PYTHON) -m venv .venv
	.venv/bin/python -m pip install -r requirements.lock
	rm -f .venv/.installed-* && touch $@

setup-libero: .venv-libero/.installed  ## make .venv-libero: LIBERO's simulator with its assets (numpy 2; about 2.5 GB)

.venv-libero/.installed: requirements-libero.lock
	$(BASE_PYTHON) -m venv .venv-libero
	.venv-libero/bin/python -m pip install -r requirements-libero.lock
	.venv-libero/bin/python -c "import mujoco, numpy, torch; print('mujoco', mujoco.__version__, 'numpy', numpy.__version__)"
	touch $@

libero: $(READY) .venv-libero/.installed  ## one LIBERO episode of a briefly trained policy and of a random one, as GIFs (EGL)
	test -d runs/libero || $(PYTHON) threedvla.py train --preset tiny --steps 20 --demos 1 --out runs/libero
	MUJOCO_GL=egl .venv-libero/bin/python threedvla.py eval --ckpt runs/libero --env libero_spatial --episodes 1

demo: $(READY)  ## write a synthetic world, train and evaluate EasyOcc on it, draw pictures (minutes, two CPU cores)
	$(PYTHON) easyocc.py train --preset tiny --out runs/demo
	$(PYTHON) easyocc.py eval --ckpt runs/demo
	@echo "next: open runs/demo/viewer.html in a browser; read easyocc.py and docs/easyocc.md; your own six images:"
	@echo "      $(PYTHON) easyocc.py predict --ckpt runs/demo --images ... --calibration c.json --out P (common/loose.py)"

show: $(READY)  ## what the checkpoints in ready/ see on new streets: five viewers or pictures (a minute, one CPU core)
	$(PYTHON) -m experiments.ready show

occvla: $(READY)  ## OccVLA on the world whose plans and answers can be read off its images; prints the gates (hours)
	$(PYTHON) occvla.py train --preset tiny --world-size questions --out runs/occvla
	$(PYTHON) occvla.py eval --ckpt runs/occvla --eval-frames 120

test: $(READY)  ## the whole test suite on a CPU, in two processes
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist loadfile

test-gpu: $(READY)  ## the tests that need a CUDA device
	$(PYTHON) -m pytest -q -m gpu

world: $(READY)  ## write the ten-scene world with the devkit's mini split into data/worlds/mini
	$(PYTHON) -m data.driving --out data/worlds/mini --seed 0 --size mini

smoke: $(READY)  ## 20 steps of each method on a world of three scenes
	$(PYTHON) -m data.driving --out data/worlds/smoke --scenes 3 --keyframes 12
	$(PYTHON) easyocc.py train --data-root data/worlds/smoke --steps 20 --out runs/smoke/easyocc
	$(PYTHON) occle.py train --data-root data/worlds/smoke --steps 20 --out runs/smoke/occle
	$(PYTHON) loc.py train --data-root data/worlds/smoke --steps 20 --out runs/smoke/loc
	$(PYTHON) occvla.py train --vlm tiny-random --data-root data/worlds/smoke --stage-steps 5 5 5 5 --out runs/smoke/occvla
	$(PYTHON) threedvla.py train --steps 20 --demos 1 --out runs/smoke/threedvla

foundation: $(READY)  ## draw photographs of other streets and remake the encoders of common/weights, bit for bit (25 minutes on one thread)
	$(PYTHON) -m data.foundation --out data/worlds/foundation --ship common/weights

bench: $(READY)  ## kernels and CPU paths against references and peers: ratios, a table in RESULTS.md
	$(PYTHON) -m tests.bench --out runs/bench.json
	$(PYTHON) -m experiments.runner publish runs/bench.json bench
	$(PYTHON) -m experiments.runner table

bench-gpu: $(READY)  ## on a CUDA device: kernels against floors and peers, a training step of each paper preset
	$(PYTHON) -m tests.bench.gpu --out runs/bench-gpu.json

fuzz: $(READY)  ## 100,000 broken files through every reader of common/ (minutes; tests/test_fuzz.py is the short form)
	$(PYTHON) -m tests.bench.fuzz --inputs 100000 --seed 0

faults: $(READY)  ## 500 kills, full disks, second runs, NaNs and damaged files over every verb (minutes; Linux)
	$(PYTHON) -m tests.bench.faults --count 500 --seed 0

table: $(READY)  ## RESULTS.md, its forest plot and a page a method, from experiments/results/*.json
	$(PYTHON) -m experiments.runner table
	$(PYTHON) -m experiments.docs --quick

docs: $(READY)  ## the generated parts of docs/: line anchors, figures, claims, cost
	$(PYTHON) -m experiments.docs
