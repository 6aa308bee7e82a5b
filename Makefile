# make demo: from nothing to a trained network and a report.   make test: every check and test.
.PHONY: setup demo test check sbom system clean
.DEFAULT_GOAL := setup

BIN := .venv/bin
SOURCES := $(wildcard src/sagittal/kernels/*.[ch]) setup.py pyproject.toml constraints.txt $(wildcard scripts/*)

setup: .venv/.ready

.venv/.ready: $(SOURCES)
	./scripts/setup.sh

demo: setup
	$(BIN)/sagittal demo

check: setup
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: check
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 --durations=10

# What the service brings along, as CycloneDX.
sbom: setup
	$(BIN)/python scripts/sbom.py --extras serve,openvino --out sbom.json

# Debian packages that the project builds and tests with; needs root.
system:
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium dicom3tools gcc libc6-dev make munge \
		orthanc orthanc-dicomweb python3-venv slurm-wlm

clean:
	rm -rf .venv build src/*.egg-info src/sagittal/kernels/*.so
