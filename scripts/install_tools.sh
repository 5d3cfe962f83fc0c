#!/usr/bin/env bash
# Programs that tests and benchmarks need and that are not Python's: install_tools.sh COMMAND=PACKAGE...
# Nothing to do for those that are there.
set -euo pipefail

packages=()
for tool in "$@"; do
    command -v "${tool%%=*}" >/dev/null || packages+=("${tool#*=}")
done
if [ "${#packages[@]}" = 0 ]; then
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "These are needed, and this user cannot install them. On Debian or Ubuntu: apt-get install ${packages[*]}" >&2
    exit 1
fi
apt-get update --quiet
DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends "${packages[@]}"
