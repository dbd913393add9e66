#!/usr/bin/env bash
# Run Python on an offline GPU machine from a bundle that bench/bundle.sh packed:  bash bench/offline.sh -m bench.step
# SKEIN_BENCH_PATH: folders of other packages, before the bundle's.
set -euo pipefail
room=${SKEIN_BENCH_DIR:-/tmp/skein-bench}
if [ ! -e "$room/ready" ]; then
  mkdir -p "$room"
  tar xJf .bundle/bundle.tar.xz -C "$room"
  touch "$room/ready"
fi
export PYTHONPATH=${SKEIN_BENCH_PATH:+$SKEIN_BENCH_PATH:}$room/site:$room/ComfyUI COMFYUI_PATH=$room/ComfyUI
exec python3 "$@"
