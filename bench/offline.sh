#!/usr/bin/env bash
# Run Python on an offline GPU machine from a bundle that bench/bundle.sh packed:  bash bench/offline.sh -m bench.step
set -euo pipefail
room=${SKEIN_BENCH_DIR:-/tmp/skein-bench}
if [ ! -e "$room/ready" ]; then
  mkdir -p "$room"
  tar xJf .bundle/bundle.tar.xz -C "$room"
  touch "$room/ready"
fi
export PYTHONPATH=$room/site:$room/ComfyUI COMFYUI_PATH=$room/ComfyUI
exec python3 "$@"
