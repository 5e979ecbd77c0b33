# The first Python here that is new enough; `make PYTHON=...` names another.
PYTHON ?= $(or $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,$(shell \
	$(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null))),python3)
VENV ?= .venv
RUN = $(VENV)/bin/python
PYTEST_ARGS ?=

.PHONY: demo test bench lint messages clean

# The example project with a bot, talking people and the admin, on this machine alone; `make demo REDIS=1` with Redis.
demo: $(VENV)/.installed
	$(RUN) -m project.demo $(if $(REDIS),--redis)

# Two workers, each with servers of its own: the tests wait more than they work.
test: $(VENV)/.installed
	$(RUN) -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

bench: $(VENV)/.installed-bench
	$(RUN) -m benchmarks

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) manage.py makemigrations --check --dry-run

# Collect the texts of the app into its catalogs, and compile what is translated. Needs gettext.
messages: $(VENV)/.installed
	cd fsm_storage && $(abspath $(RUN)) -m django makemessages --all --no-obsolete --no-wrap --no-location
	cd fsm_storage && $(abspath $(RUN)) -m django compilemessages

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo 'Python 3.11 or newer is needed; $(PYTHON) is none. Name one: make PYTHON=/path/to/python $(MAKECMDGOALS)' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { \
		echo 'The venv module of this Python is missing (on Debian: apt-get install python3-venv)' >&2; \
		rm -rf $(VENV); exit 1; }

$(VENV)/.installed: requirements.txt requirements-mysql.txt pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@if pkg-config --exists libmariadb 2>/dev/null || pkg-config --exists mysqlclient 2>/dev/null; then \
		$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-mysql.txt || \
		echo 'mysqlclient could not be built, so nothing runs on MariaDB' >&2; fi
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(VENV)/.installed-bench: benchmarks/requirements.txt $(VENV)/.installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	touch $@
