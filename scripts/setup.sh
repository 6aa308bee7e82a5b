#!/bin/sh
# Make .venv with everything that `make demo` and `make test` need. Safe to run again; needs Python 3.11+ and gcc.
set -eu
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: Python 3.11 or newer is needed, $("$python" --version) found. Set PYTHON=/path/to/python3.11." >&2
    exit 1
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }
torch=$(sed -n 's/^torch==//p' constraints.txt)

# torch comes first and by itself: without a GPU its CPU build is a tenth of the download.
if ! .venv/bin/python -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '$torch')" 2>/dev/null; then
    if command -v nvidia-smi >/dev/null 2>&1 || [ "$(uname -s)" != Linux ]; then
        pip install "torch==$torch"
    else
        pip install "torch==$torch+cpu" 2>/dev/null ||
            pip install "torch==$torch" --index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
            pip install "torch==$torch"
    fi
fi

# uv installs the rest in a third of pip's time; where it can't reach a registry, pip does it.
pip install "$(grep '^uv==' constraints.txt)" 2>/dev/null || true
.venv/bin/uv pip install --quiet --python .venv/bin/python --constraint constraints.txt \
    --override scripts/overrides.txt --editable '.[torch,openvino,int8,onnx,baselines,demo,dicom,serve,ray,slurm,metrics,mlflow,tensorboard,dev]' 2>/dev/null ||
    pip install --constraint constraints.txt --editable '.[torch,openvino,int8,onnx,baselines,demo,dicom,serve,ray,slurm,metrics,mlflow,tensorboard,dev]'

installed=$(.venv/bin/python -c "import importlib.metadata as m; print(m.version('torch').split('+')[0])")
[ "$installed" = "$torch" ] || { echo "setup: torch $installed is installed where constraints.txt pins $torch." >&2; exit 1; }
touch .venv/.ready
