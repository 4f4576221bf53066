#!/usr/bin/env bash
# Builds MinkowskiEngine 0.5.4 from its PyPI source against this project's torch and installs it.
#
#   tools/build_minkowski.sh PYTHON [WHEEL_FOLDER]
#
# PYTHON is the interpreter to install into, e.g. .venv/bin/python. The wheel is kept in WHEEL_FOLDER (default
# ${XDG_CACHE_HOME:-$HOME/.cache}/slidr/wheels), in a folder named by torch's version, and built only where it is missing.
# Building takes about 15 minutes of one core and needs g++ and an OpenBLAS with headers (Debian: g++ libopenblas-dev).
set -euo pipefail

if [ $# -lt 1 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
python=$1
torch_version=$("$python" -c 'import torch; print(torch.__version__.split("+")[0])')
# A wheel runs with the torch that it was compiled against only.
wheels=${2:-${XDG_CACHE_HOME:-$HOME/.cache}/slidr/wheels}/torch-$torch_version
mkdir -p "$wheels"

tag=$("$python" -c 'import sys; print(f"cp{sys.version_info[0]}{sys.version_info[1]}")')
find_wheel() { find "$wheels" -maxdepth 1 -iname "minkowskiengine-0.5.4-$tag-*.whl" | head -n 1; }

wheel=$(find_wheel)
if [ -z "$wheel" ]; then
    command -v g++ >/dev/null || { echo "build_minkowski: no g++ here; install it (Debian: apt-get install g++)" >&2; exit 1; }
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    "$python" -m venv "$scratch/venv"
    pip="$scratch/venv/bin/python -m pip --disable-pip-version-check"
    $pip install -q "torch==$torch_version" "numpy<2" wheel ninja
    # Its setup.py needs numpy.distutils and pkg_resources, which torch's own pin (setuptools >= 77) has dropped.
    $pip install -q "setuptools<70"
    # pip's own cache knows wheels by their source only, whatever torch they were compiled against.
    # Ninja, where on the path, runs as many compilers as there are cores; each takes up to 2 GB.
    PATH="$scratch/venv/bin:$PATH" MAX_JOBS="${MAX_JOBS:-2}" CXX="${CXX:-g++}" \
        $pip wheel -q --no-cache-dir --no-build-isolation --no-deps --wheel-dir "$wheels" minkowskiengine==0.5.4
    wheel=$(find_wheel)
    [ -n "$wheel" ] || { echo "build_minkowski: the build left no wheel in $wheels" >&2; exit 1; }
fi
"$python" -m pip --disable-pip-version-check install -q --no-deps --force-reinstall "$wheel"
"$python" -c 'from slidr.sparse import minkowski; print("MinkowskiEngine", minkowski.ME.__version__)'
