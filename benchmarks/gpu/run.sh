#!/usr/bin/env bash
# The check on a GPU beside a plain PyTorch, without a network: bash benchmarks/gpu/run.sh [options of benchmarks.gpu]
# What `make gpu-bundle` has laid ready, here or around this checkout, is put on Python's path from a temporary folder.
set -u
source=$(cd "$(dirname "$0")/../.." && pwd)
bundle=$source/build/gpu
[ -d "$source/../wheels" ] && bundle=$source/..
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
install() { python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" --upgrade "$@"; }
if [ -d "$bundle/wheels" ]; then
	# one by one where they do not fit this Python all together: what is missing then fails in the parts that need it
	install "$bundle"/wheels/*.whl || for wheel in "$bundle"/wheels/*.whl; do install "$wheel"; done
fi
[ -d "$bundle/golden" ] && export OPENCOLA_SHARED=${OPENCOLA_SHARED:-$bundle}
export PYTHONPATH=$source:$site${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$site/inductor}
python3 -m benchmarks.gpu "$@"
