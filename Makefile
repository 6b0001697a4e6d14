# make quickstart   train, save, load and classify on data that ships with a dependency (scikit-learn's digits)
# make test         lint, types and the tests; make test-full adds the slow ones: every model through timm's suite
# make fix          let ruff format and mend what it can
# make figures      draw the figures of README and docs again

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

quickstart: $(VENV)/demo.done
	$(RUN) examples/quickstart.py

test: $(VENV)/test.done lint
	$(RUN) -m tests.timm_source
	$(RUN) -m pytest -n auto -m "not slow"

test-full: $(VENV)/test.done lint
	$(RUN) -m tests.timm_source
	$(RUN) -m pytest -n auto

lint: $(VENV)/test.done
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

fix: $(VENV)/test.done
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

figures: $(VENV)/demo.done
	$(RUN) docs/figures/architecture.py

# One environment, with as many extras as were asked for; made anew when the requirements change.
$(VENV)/%.done: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit('timm-gsop needs Python 3.10 or newer' if sys.version_info < (3, 10) else 0)"
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) .cache output

.PHONY: quickstart test test-full lint fix figures clean
