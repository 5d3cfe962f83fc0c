#!/usr/bin/env bash
# Node.js and npm, for the end-to-end test whose client is written in another language. Nothing to do where they are.
set -euo pipefail

if command -v node >/dev/null && command -v npm >/dev/null; then
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "The tests need Node.js and npm, and this user cannot install them. On Debian or Ubuntu: apt-get install nodejs npm" >&2
    exit 1
fi
apt-get update --quiet
DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends nodejs npm
