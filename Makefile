# Builds and checks the site. `make help` lists what there is.
PYTHON ?= python3
REQUIREMENTS ?= requirements.txt
BUILD := docs/_build
IN_VENV := .venv/bin/python
SPHINX := $(IN_VENV) -m sphinx -n -W --keep-going
PAGES := $(sort $(wildcard examples/*/[0-9]*.py))
# Generated folders that hold a page which examples/ no longer has.
STALE = $(sort $(dir $(filter-out $(PAGES:examples/%=docs/gallery/%), \
	$(wildcard docs/gallery/*/*.py))))

.PHONY: html test page serve linkcheck lint clean help venv venv-tests

html: venv  ## Build the site, running every page that changed
	@# What a page shows depends on these two files: if one changes, all pages run.
	@cat conf.py .venv/requirements.txt | cmp -s - docs/gallery/.made-by \
	|| { rm -rf docs/gallery $(BUILD) && mkdir -p docs/gallery \
	&& cat conf.py .venv/requirements.txt > docs/gallery/.made-by; }
	@# A build that failed or was killed must not hide its warnings from the next one,
	@# which therefore reads all pages again (without running them).
	@if [ -n "$(STALE)" ] || [ ! -e $(BUILD)/succeeded ]; then \
	rm -rf $(STALE) $(BUILD)/doctrees $(BUILD)/html \
	&& find docs/gallery -name '*.new' -delete; fi
	@rm -f $(BUILD)/succeeded
	$(SPHINX) -c . -d $(BUILD)/doctrees docs $(BUILD)/html || { rm -rf $(BUILD)/html; \
	echo "No site was built. Mend what is named above, then run the same again."; exit 1; }
	@touch $(BUILD)/succeeded
	@echo "Built. Open $(BUILD)/html/index.html, or run: make serve"

# Two files at a time, in the order of the alphabet: the two that use one core come first.
IN_THIS_ORDER := --dist loadfile --no-loadscope-reorder
test: venv-tests  ## Run the tests; T=mutations runs tests/test_mutations.py alone
	@if [ -n "$(T)" ] && [ ! -e "tests/test_$(T).py" ]; then \
	echo "No tests/test_$(T).py. T is one of:" \
	$(patsubst tests/test_%.py,%,$(wildcard tests/test_*.py)); exit 2; fi
	$(IN_VENV) -m pytest $(if $(T),tests/test_$(T).py,tests -n 2 $(IN_THIS_ORDER))

# Everything that one page needs, in a folder of its own: the site is left alone.
FOUND = $(wildcard examples/*/$(PAGE).py examples/$(PAGE).py)
ALONE := $(BUILD)/page
page: venv  ## Build one page quickly: make page PAGE=4_ggn_diagonal
	@if [ -z "$(PAGE)" ] || [ -z "$(FOUND)" ]; then \
	echo "There is no page '$(PAGE)'. PAGE is one of:"; \
	printf '  %s\n' $(basename $(notdir $(PAGES))); exit 2; fi
	@rm -rf $(ALONE) && mkdir -p $(ALONE)/docs
	@cp -r conf.py requirements.txt $(ALONE) && cd docs \
	&& cp -r _static _templates inventories _build/page/docs
	@tar cf - examples/GALLERY_HEADER.rst $(FOUND) \
	$(addsuffix GALLERY_HEADER.rst,$(sort $(dir $(FOUND)))) | tar xf - -C $(ALONE)
	@printf '%s\n' Preview '#######' '' '.. include:: gallery/index.rst' \
	'   :start-after: what follows.' > $(ALONE)/docs/index.rst
	cd $(ALONE) && ../../../$(SPHINX) -c . docs html
	@printf 'Open %s\n' $(patsubst examples/%.py,$(ALONE)/html/gallery/%.html,$(FOUND))

serve: html  ## Build the site and serve it at http://localhost:8000
	$(IN_VENV) -m http.server --bind localhost --directory $(BUILD)/html

linkcheck: html  ## Visit every link to another site
	@rm -rf $(BUILD)/linkcheck
	$(SPHINX) -c . -b linkcheck docs $(BUILD)/linkcheck

lint: venv-tests  ## Check format, style, spelling, inventories and the workflows
	$(IN_VENV) -m ruff format --check .
	$(IN_VENV) -m ruff check .
	.venv/bin/codespell -L nd README.md conf.py Makefile docs/*.rst examples tests
	.venv/bin/check-jsonschema --builtin-schema vendor.github-workflows \
	.github/workflows/*.yml
	.venv/bin/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(IN_VENV) -m pytest -q tests/test_lint.py -k inventories

clean:  ## Remove what was built, but not .venv
	rm -rf docs/gallery $(BUILD)

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

# The copy of the requirements in .venv is written when all of them are installed.
venv:
	@cmp -s $(REQUIREMENTS) .venv/requirements.txt || { \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "Python 3.11 or newer is needed. Name one: make PYTHON=python3.11"; exit 1; }; \
	echo "Installing $(REQUIREMENTS) into .venv"; \
	$(PYTHON) -m venv --clear .venv && $(IN_VENV) -m pip install -q -r $(REQUIREMENTS) \
	&& cp $(REQUIREMENTS) .venv/requirements.txt || { \
	echo "The installation failed; the reason is above. Is there a network, and space" \
	"on the disk? Then run the same command again."; exit 1; }; }

venv-tests: venv
	@cmp -s tests/requirements.txt .venv/tests.txt || { \
	echo "Installing tests/requirements.txt into .venv"; \
	$(IN_VENV) -m pip install -q -r $(REQUIREMENTS) -r tests/requirements.txt \
	&& cp tests/requirements.txt .venv/tests.txt || { \
	echo "The installation failed; the reason is above. Is there a network, and space" \
	"on the disk? Then run the same command again."; exit 1; }; }
