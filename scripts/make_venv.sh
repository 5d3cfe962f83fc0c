#!/usr/bin/env bash
# Makes the virtual environment with a pinned uv in it, from any Python that the project supports.
#
#   scripts/make_venv.sh DIRECTORY UV_VERSION
set -euo pipefail

venv=$1
uv_version=$2

supported='import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))'
python=
for candidate in python3.11 python3 python3.12; do
    if "$candidate" -c "$supported" >/dev/null 2>&1; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "No Python 3.11 or 3.12 that can make virtual environments. On Debian or Ubuntu: apt-get install python3.11-venv" >&2
    exit 1
fi

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c "$supported" >/dev/null 2>&1; then
    "$python" -m venv --clear "$venv"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$uv_version"
touch "$venv/bin/uv"
