#!/usr/bin/env bash
# Pack what the benchmarks need on an offline x86-64 GPU machine (Python 3.12 with torch, transformers, einops, safetensors)
# into .bundle/bundle.tar.xz, about 40 MB:   bash bench/bundle.sh COMFYUI_DIR [PYTHON_VERSION]
# There, with the checkout and .bundle beside it:   bash bench/offline.sh -m bench.step
set -euo pipefail
comfy=${1:?ComfyUI folder}; python=${2:-3.12}
room=$(mktemp -d); trap 'rm -rf "$room"' EXIT
mkdir -p "$room/ComfyUI" "$room/site" "$room/wheels" .bundle
for part in comfy comfy_execution comfy_api comfy_extras utils app node_helpers.py folder_paths.py comfyui_version.py \
            latent_preview.py protocol.py nodes.py; do
  [ -e "$comfy/$part" ] && cp -r "$comfy/$part" "$room/ComfyUI/"
done
find "$room/ComfyUI" -name __pycache__ -prune -exec rm -rf {} +
wanted=(torchsde trampoline torchao fa3-fwd sageattention==1.0.6
        pytest==8.3.5 pytest-timeout iniconfig pluggy websocket-client)  # the last line for tests; newer pytest needs pygments
mapfile -t pinned < <(grep -E '^comfy-(aimdo|kitchen)' "$comfy/requirements.txt")
for requirement in "${wanted[@]}" "${pinned[@]}"; do
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$python" --implementation cp -d "$room/wheels" \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 "$requirement"
done
for wheel in "$room"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$room/site"; done
rm -rf "$room/site/comfy_kitchen/backends/hip"/_C*  # AMD's half
tar c -C "$room" site ComfyUI | xz -T0 -6 > .bundle/bundle.tar.xz
du -h .bundle/bundle.tar.xz
