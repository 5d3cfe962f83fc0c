#!/usr/bin/env bash
# Generates, from protos/: the Python modules with their types, and the descriptors with comments that REST and its document come from.
#
#   scripts/generate_protos.sh           write them
#   scripts/generate_protos.sh --check   fail where the committed ones differ from what protos/ says
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
package=clients/python/userprofile
descriptors=profile_service/frontends/rest/descriptors.binpb

fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
mkdir -p "$fresh/python"

mapfile -t ours < <(find protos -name '*.proto' | LC_ALL=C sort)
mapfile -t public < <(find protos/userprofile/v1 -name '*.proto' | LC_ALL=C sort)

.venv/bin/uv run --quiet --isolated --no-project --python .venv/bin/python --with-requirements scripts/protos-requirements.txt \
    python -W ignore -m grpc_tools.protoc -I protos -I third_party/googleapis \
    --python_out="$fresh/python" --grpc_python_out="$fresh/python" \
    --mypy_out=quiet:"$fresh/python" --mypy_grpc_out=quiet:"$fresh/python" \
    "${ours[@]}"
.venv/bin/uv run --quiet --isolated --no-project --python .venv/bin/python --with-requirements scripts/protos-requirements.txt \
    python -W ignore -m grpc_tools.protoc -I protos -I third_party/googleapis \
    --include_imports --include_source_info --descriptor_set_out="$fresh/descriptors.binpb" \
    "${public[@]}"

generated() { (cd "$1" && find . -name '*_pb2*.py*' -not -path '*/__pycache__/*' | LC_ALL=C sort); }

if [ "${1:-}" = --check ]; then
    stale=0
    diff --unified=0 <(generated "$fresh/python/userprofile") <(generated "$package") || stale=1
    while read -r file; do
        cmp --quiet "$fresh/python/userprofile/$file" "$package/$file" || { echo "$package/$file is not what protos/ says"; stale=1; }
    done < <(generated "$fresh/python/userprofile")
    cmp --quiet "$fresh/descriptors.binpb" "$descriptors" || { echo "$descriptors is not what protos/ says"; stale=1; }
    if [ "$stale" = 1 ]; then
        echo "Generated code is stale: run 'make protos' and commit what it writes." >&2
        exit 1
    fi
    exit 0
fi

(cd "$package" && generated . | xargs --no-run-if-empty rm)
cp -R "$fresh/python/userprofile/." "$package/"
cp "$fresh/descriptors.binpb" "$descriptors"
