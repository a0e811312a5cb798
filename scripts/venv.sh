# Sourced by ./demo and ./check: after `use_venv EXTRA` (lab or dev), `python` is .venv's own,
# with this repository and that extra installed. Installs again only when pyproject.toml changed.

fail() {
    echo "$0: $*" >&2
    exit 1
}

use_venv() {
    local extra=$1 hash stamp
    command -v python3 >/dev/null || fail "python3 is not installed; install Python 3.10 or newer"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "Python 3.10 or newer is needed, python3 is $(python3 --version)"

    # A .venv whose Python is gone (moved, or the system's was upgraded) cannot be mended, only remade.
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        echo "Making .venv ..."
        python3 -m venv --clear .venv || fail "python3 -m venv failed; on Debian: apt-get install python3-venv"
    fi

    hash=$(.venv/bin/python -c 'import hashlib; print(hashlib.sha256(open("pyproject.toml", "rb").read()).hexdigest())')
    for stamp in "$extra" dev; do # dev holds everything that lab holds
        if [ "$(cat ".venv/torchgrow-$stamp" 2>/dev/null)" = "$hash" ]; then
            export PATH="$PWD/.venv/bin:$PATH"
            return
        fi
    done
    echo "Installing torchgrow[$extra] into .venv (PyTorch is large; a few minutes the first time) ..."
    # Modules are compiled when they are first used: to compile all 10,000 beforehand takes half a minute.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -e ".[$extra]" || fail "pip could not install torchgrow[$extra]"
    echo "$hash" >".venv/torchgrow-$extra"
    export PATH="$PWD/.venv/bin:$PATH"
}
