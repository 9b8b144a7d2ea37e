#!/usr/bin/env bash
# Everything that only a GPU can show, in one call: contract tests, parity, speed, and what limits a large step.
#
#   benchmarks/on_gpu.sh fetch WHEELS   where there is a network: the wheels that a bare machine lacks, in pieces
#   benchmarks/on_gpu.sh run WHEELS OUT where the GPU is: installs them beside the torch that is there, writes to OUT
#
# STEP_OPTIONS and BENCH_OPTIONS go to benchmarks.step and to `fewstep bench`.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
TARGET=${TARGET:-3.12}
PIECE=${PIECE:-30m}
# onnxruntime-gpu is the package of onnxruntime under another name: the two must not be installed together.
PACKAGES=(diffusers onnx onnxscript tokenizers prometheus-client pydantic-settings python-multipart redis pytest anyio
  hypothesis httpx cuda-bindings tensorrt-rtx-cu12-bindings tensorrt-rtx-cu12-libs onnxruntime-gpu setuptools)

fetch() {
  local wheels=$1
  mkdir -p "$wheels"
  for package in "${PACKAGES[@]}"; do
    "$PYTHON" -m pip download -q --no-deps --only-binary :all: --python-version "$TARGET" \
      --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform any -c requirements.lock \
      -d "$wheels" "$package" || "$PYTHON" -m pip download -q --no-deps --only-binary :all: \
      --python-version "$TARGET" --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d "$wheels" "$package"
  done
  for wheel in "$wheels"/*.whl; do
    if [ "$(stat -c %s "$wheel")" -gt "$(numfmt --from=iec "${PIECE^^}")" ]; then
      split -b "$PIECE" -d "$wheel" "$wheel.piece-"
      rm "$wheel"
    fi
  done
}

run() {
  local wheels=$1 out=$2
  mkdir -p "$out"
  for first in "$wheels"/*.piece-00; do
    [ -e "$first" ] && cat "${first%00}"* > "${first%.piece-00}"
  done
  "$PYTHON" -m venv --system-site-packages "$out/../venv-gpu"
  local python="$out/../venv-gpu/bin/python"
  "$python" -m pip install -q --no-index --find-links "$wheels" --no-deps "$wheels"/*.whl
  "$python" -m pip install -q --no-index --no-deps --no-build-isolation .
  {
    "$python" -c "import platform, torch; print(platform.platform(), torch.__version__, torch.cuda.get_device_name())"
    "$python" -m pip freeze
  } > "$out/versions.txt" 2>&1 || true
  # One part that fails must not cost the others.
  "$python" -m pytest -q -rs tests/engines/test_engine_contract.py tests/engines/test_trt.py > "$out/contract.txt" 2>&1 ||
    echo "contract tests failed: $out/contract.txt"
  "$python" -m pytest -q -rs -m "slow or not slow" tests/training/test_networks.py >> "$out/contract.txt" 2>&1 ||
    echo "compiled networks lose gradients, or could not be tested: $out/contract.txt"
  # It builds the plans that are missing and waits for them; a backend that cannot be built is left out.
  # shellcheck disable=SC2086
  "$python" -m fewstep bench shipped --skip --backend pytorch,ort,ort-cuda,ort-cuda:fp16,ort-tensorrt,trt,trt:fp16,trt:bf16 \
    --plans "$out/../plans" ${BENCH_OPTIONS:-} > "$out/bench.md" 2> "$out/bench.log" || echo "bench failed: $out/bench.log"
  # shellcheck disable=SC2086
  "$python" -m benchmarks.step ${STEP_OPTIONS:-} > "$out/step.md" 2> "$out/step.log" || echo "step failed: $out/step.log"
  tail -n 40 "$out"/contract.txt "$out"/bench.md "$out"/step.md
}

case ${1:-} in
  fetch) fetch "${2:?the folder for the wheels}" ;;
  run) run "${2:?the folder of the wheels}" "${3:?the folder for the results}" ;;
  *) sed -n '2,7p' "$0" >&2; exit 2 ;;
esac
