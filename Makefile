# make demo   simulate warps, restore them, and compare with the truth
# make test   run the whole test suite
# make doc    build the documentation in doc/_build/html
# make setup  only make .venv, which the others use; PYTHON=/path/to/python chooses the interpreter

PYTHON_IN_VENV = .venv/bin/python

.PHONY: setup demo test lint doc clean FORCE

setup: .venv/.stamp

# Also where the interpreter is gone, or the source tree was moved or copied after its .venv was made.
PACKAGE := $(shell $(PYTHON_IN_VENV) -c 'import lsst.coadd.deepprior as p; print(p.__file__)' 2>/dev/null)

.venv/.stamp: pyproject.toml tools/make_venv.sh $(if $(findstring $(CURDIR)/python,$(PACKAGE)),,FORCE)
	@sh tools/make_venv.sh

FORCE:

demo: setup
	@$(PYTHON_IN_VENV) -m lsst.coadd.deepprior.demo demo

# The tests run also where ruff or mypy complain, so that pytest's summary is always there, and last.
test: setup
	@status=0; \
	$(MAKE) --no-print-directory lint || status=1; \
	OMP_NUM_THREADS=1 $(PYTHON_IN_VENV) -m pytest -n logical --maxprocesses 4 --dist loadfile tests || status=1; \
	exit $$status

lint: setup
	@$(PYTHON_IN_VENV) -m ruff check .
	@$(PYTHON_IN_VENV) -m ruff format --check .
	@$(PYTHON_IN_VENV) -m mypy

doc: setup
	@$(PYTHON_IN_VENV) -m sphinx -W --keep-going -b html doc doc/_build/html

clean:
	rm -rf build dist demo doc/_build .mypy_cache .pytest_cache .ruff_cache
