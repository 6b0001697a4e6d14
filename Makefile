# make quickstart   train, save, load and classify on data that ships with a dependency (scikit-learn's digits)
# make test         lint, types and the tests; make test-full adds the slow ones: every model through timm's suite
# make test-lowest, test-latest   the same on the lowest versions that we support, and on the newest that there are
# make dist         wheel and source archive in dist/, twice to see that they are the same, and the wheel tried alone
# make demo         the demo page of hub/space on this machine alone; make test-browser tries it in Chromium
# make first-contact   download, convert and measure the released weights; needs a connection (docs/weights.md)
# make fix          let ruff format and mend what it can
# make docs         the documentation site in build/docs, warnings are errors; make docs-serve shows it on 127.0.0.1:8000
# make figures      draw the figures of README and docs again, and their tables of what was measured

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

quickstart: $(VENV)/demo.done
	$(RUN) examples/quickstart.py

test: $(VENV)/test.done lint
	$(RUN) -m tests.timm_source
	$(RUN) -m pytest -n auto -m "not slow"

test-full: $(VENV)/browser.done lint
	$(RUN) -m tests.timm_source
	$(RUN) -m pytest -n auto --dist worksteal

# The tests look for chromium or google-chrome, or take $$CHROMIUM.
test-browser: $(VENV)/browser.done
	$(RUN) -m pytest tests/test_space.py tests/test_space_browser.py

demo: $(VENV)/space.done
	$(RUN) hub/space/app.py

# IMAGENET=DIR measures them too, by validate.py in TIMM_SCRIPTS=DIR.
first-contact: $(VENV)/demo.done
	$(RUN) hub/first_contact.py .cache/first_contact $(if $(IMAGENET),--imagenet $(IMAGENET))

test-lowest: $(VENV)-lowest/test.done
	$(VENV)-lowest/bin/python -m tests.timm_source
	$(VENV)-lowest/bin/python -m pytest -n auto -m "not slow"

test-latest: $(VENV)-latest/test.done
	$(VENV)-latest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[test]"
	$(VENV)-latest/bin/python -m tests.timm_source
	$(VENV)-latest/bin/python -m pytest -n auto -m "not slow"

$(VENV)-lowest/test.done: WITH = "torch==2.5.*" "timm==1.0.31"
$(VENV)-%/test.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet $(WITH) --editable ".[test]"
	touch $@

# The time in the archives is the last commit's.
dist: $(VENV)/dev.done
	rm -rf dist .cache/dist .cache/wheel
	for folder in dist .cache/dist; do \
		SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(RUN) -m build --outdir $$folder || exit 1; \
	done
	for file in dist/*; do cmp $$file .cache/$$file || exit 1; done
	$(RUN) -m twine check --strict dist/*
	$(PYTHON) -m venv .cache/wheel
	.cache/wheel/bin/python -m pip install --quiet "$$(ls $(CURDIR)/dist/*.whl)[demo]"
	.cache/wheel/bin/python tests/installed_wheel.py

lint: $(VENV)/test.done
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(RUN) -m check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(RUN) .github/actionlint.py

fix: $(VENV)/test.done
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

docs: $(VENV)/docs.done
	$(RUN) -m sphinx --fresh-env --fail-on-warning --keep-going --quiet docs build/docs
	@echo "wrote build/docs/index.html"

docs-serve: docs
	$(RUN) -m http.server --bind 127.0.0.1 --directory build/docs 8000

figures: FIGURES = docs/figures
figures: $(VENV)/demo.done
	$(RUN) docs/figures/architecture.py
	$(RUN) docs/measured.py
	$(RUN) -m experiments.tables --csv experiments/results.csv --figure $(FIGURES)/cifar10.png \
		--curves $(FIGURES)/cifar10_curves.png > /dev/null
	$(RUN) -m experiments.tables --plan experiments/plan_fashion_mnist.yaml --group fashion_mnist \
		--curves $(FIGURES)/fashion_mnist.png > /dev/null

release-notes: $(VENV)/test.done
	$(RUN) .github/release_notes.py $(TAG)

github-release: release-notes
	gh release create $(TAG) --verify-tag --title $(TAG) --notes-file .cache/release_notes.md dist/*

# One environment, with as many extras as were asked for; made anew when the requirements change.
$(VENV)/%.done: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit('timm-gsop needs Python 3.10 or newer' if sys.version_info < (3, 10) else 0)"
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-latest .cache build dist output

.PHONY: quickstart test test-full test-browser test-lowest test-latest dist demo first-contact lint fix docs docs-serve figures clean \
	release-notes github-release
