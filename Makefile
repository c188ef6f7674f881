# Two commands for a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS ?=
DEMO := runs/demo
DATA ?= data
VGG19 ?=
UNTRUSTED := --untrusted photos --untrusted noise:gaussian --untrusted noise:uniform --untrusted attack:pgd

.PHONY: install demo suite test docs-check check format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev,baselines,timm]'
	touch $@

# The four stages on data that comes with scikit-learn: no network is needed after `install`.
demo: install
	rm -rf $(DEMO)
	$(BIN)/covcli train --trusted digits --untrusted photos --model vgg11 --epochs 8 --calibration-split 0.25 --name demo
	$(BIN)/covcli build-signature $(DEMO)/checkpoint.pt
	$(BIN)/covcli evaluate $(UNTRUSTED)
	@echo
	@echo "What you see: a network of handwritten digits met photographs, noise, and digits"
	@echo "changed to deceive it (attack:pgd). \"detected at α\": what covcli flagged of them."
	@echo "\"softmax AUROC\": how well the network's own confidence does; 50 is chance."
	@echo "The report: $$($(BIN)/covcli report --quiet)"

# Detection on several networks, some trained here: DATA holds cifar10/*.npz, MNIST and FashionMNIST, and
# VGG19 a VGG19's weights on CIFAR-10. About two hours on one core; what was done is not done again.
suite: install
	$(BIN)/python benchmarks/detection.py --suite runs/suite --data $(DATA) $(if $(VGG19),--vgg19 $(VGG19))

# One process a core, each computing alone: threads that wait for each other slow both.
test: install
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto --dist loadfile

# Every command of the documents. DATA and WEIGHTS are those of docs/results.md; without them what
# needs them is skipped.
docs-check: install
	$(BIN)/python tests/docs_check.py $(if $(WEIGHTS),--data $(DATA) --weights $(WEIGHTS))

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
