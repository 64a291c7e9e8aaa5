# make demo   train the embedded model with GRPO: minutes on two CPU cores
# make test   the whole test suite
# Both make .venv first, where it is missing or older than the requirements.

PYTHON ?= python3
VENV := .venv

demo: $(VENV)/.installed
	$(VENV)/bin/python grpo.py

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest

$(VENV)/.installed: requirements.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.PHONY: demo test
