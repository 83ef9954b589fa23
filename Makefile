# make demo    trains a small model on this machine's Python sources, in minutes, on a CPU
# make test    the test suite
# make lint    style
# make types   types of what a program imports
# make docs    the pages as a site, in build/site
# make owner OWNER=name    the notebooks' links to Colab and GitHub, for a copy of the repository that belongs to name
.PHONY: demo test lint types docs owner clean

demo: .venv/installed
	launch/demo.sh .venv/bin/python

test: .venv/evaluation
	.venv/bin/python -m pytest -n 2 --dist worksteal -q

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check --quiet .

types: .venv/evaluation
	.venv/bin/python -m mypy

# Without --quiet, which would hide warnings from --strict too. The variable leaves out a notice of
# mkdocs-material about its own future, which is no warning about the pages.
docs: .venv/evaluation
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

owner:
	@echo "$(OWNER)" | grep -Eqx '[A-Za-z0-9][A-Za-z0-9-]*' || { echo "make owner needs OWNER=name, an account of GitHub" >&2; exit 2; }
	sed -i.before -E 's#(github(\.com)?/)[A-Za-z0-9-]+/transxssm_jax#\1$(OWNER)/transxssm_jax#g' notebooks/*.ipynb
	@rm -f notebooks/*.before

# The environment is made anew when the pinned set changes; a half-made one is finished by the next call.
.venv/installed: requirements.txt pyproject.toml
	@python=$$(launch/find_python.sh) && echo "using $$python" && "$$python" -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	.venv/bin/python -m pip install -qqq --disable-pip-version-check --no-deps -e .
	@touch $@

# What only evaluation needs, so that the demo does without.
.venv/evaluation: .venv/installed requirements-eval.txt requirements-tools.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-eval.txt \
		-r requirements-tools.txt
	@touch $@

clean:
	rm -rf .venv runs build *.egg-info
