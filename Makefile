# make demo   a first picture: sample data, LMDBs, training, inference, contact sheet (a few minutes on 2 CPU cores)
# make test   the whole test suite
# make lint   ruff and mypy
# All of them make a virtual environment in $(VENV) first, where there is none.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo_output
CONFIG := configs/projects/spade/sample/pretrained64.yaml
ROOTS := --set 'data.train.roots=[$(DEMO)/lmdb/train]' --set 'data.val.roots=[$(DEMO)/lmdb/val]'

# Large buffers stay with the process instead of going back to the kernel after each use.
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TRIM_THRESHOLD_ ?= 17179869184

.PHONY: demo test lint format clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# Servers without libGL cannot load opencv-python; its headless twin is the same library without windows.
	$(BIN)/python -c 'import cv2' 2>/dev/null || { $(BIN)/pip uninstall --quiet --yes opencv-python && \
	  $(BIN)/pip install --quiet --constraint constraints.txt opencv-python-headless; }
	touch $@

demo: $(VENV)/.installed
	rm -rf $(DEMO)
	$(BIN)/python scripts/make_sample_data.py --output_root $(DEMO)/raw --num_train 600 --num_val 24 --height 64 --width 64
	for split in train val; do \
	  $(BIN)/python scripts/build_lmdb.py --config $(CONFIG) --data_root $(DEMO)/raw/$$split --output_root $(DEMO)/lmdb/$$split || exit 1; \
	done
	$(BIN)/torchrun --nproc_per_node=1 train.py --config $(CONFIG) --logdir $(DEMO)/logs $(ROOTS)
	$(BIN)/python inference.py --logdir $(DEMO)/logs --input_dir $(DEMO)/raw/val --output_dir $(DEMO)/generated
	$(BIN)/python scripts/make_contact_sheet.py --config $(CONFIG) --data_root $(DEMO)/raw/val --generated $(DEMO)/generated --output $(DEMO)/contact_sheet.jpg
	$(BIN)/python evaluate.py --real $(DEMO)/raw/val --fake $(DEMO)/generated --reference_split val --metrics kid \
	  --features efficientnet_lite2 --output $(DEMO)/report.json --html $(DEMO)/report.html
	@echo
	@echo 'Contact sheet (label map, real, generated):  $(DEMO)/contact_sheet.jpg'
	@echo 'Gallery:                                     $(DEMO)/generated/index.html'
	@echo 'Scores (EfficientNet-Lite2, ImageNet):       $(DEMO)/report.html'
	@echo 'Loss curves:                                 $(DEMO)/logs/curves.png'
	@echo 'TensorBoard:                                 $(BIN)/tensorboard --logdir $(DEMO)/logs'

# Two processes with a file of tests each; in them one thread: the networks are tiny, threads would wait for each other.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO)
