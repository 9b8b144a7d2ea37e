# The service as an image, without torch: `docker build .` for CPUs, `docker build --target gpu .` for GPUs.
# The versions of base images are to be bumped; Python packages come in the versions of requirements.lock.

FROM python:3.11-slim-bookworm AS wheel
WORKDIR /src
COPY requirements.lock ./
RUN pip install --no-cache-dir -c requirements.lock setuptools
COPY pyproject.toml README.md LICENSE fewstep.py ./
COPY engines engines
COPY service service
COPY training training
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .


# Dependencies come from the metadata alone, so this large layer is made anew when they change and not when code does.
FROM python:3.11-slim-bookworm AS cpu-dependencies
RUN python -m venv /opt/fewstep
ENV PATH=/opt/fewstep/bin:$PATH
WORKDIR /src
COPY pyproject.toml requirements.lock README.md LICENSE fewstep.py ./
RUN pip install --no-cache-dir -c requirements.lock '.[tracing]'


# The official builds of ONNX Runtime report to Microsoft unless ORT_DISABLE_TELEMETRY is set before they are loaded.

# The target gpu was never built and never run: its packages resolve for Python 3.12, and that is all that is known.
FROM nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04 AS gpu-base
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM gpu-base AS gpu-dependencies
RUN python3 -m venv /opt/fewstep
ENV PATH=/opt/fewstep/bin:$PATH
WORKDIR /src
COPY pyproject.toml requirements.lock README.md LICENSE fewstep.py ./
# onnxruntime and onnxruntime-gpu are one folder of two wheels; the one for CPUs must not have the last word.
RUN pip install --no-cache-dir -c requirements.lock '.[gpu,tensorrt-rtx,tracing]' \
        onnxruntime-gpu==1.31.1 cuda-bindings==13.5.0 nvidia-ml-py==13.615.71 \
    && pip uninstall -y onnxruntime onnxruntime-gpu \
    && pip install --no-cache-dir --no-deps onnxruntime-gpu==1.31.1

FROM gpu-base AS gpu
COPY --from=gpu-dependencies /opt/fewstep /opt/fewstep
ENV PATH=/opt/fewstep/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ORT_DISABLE_TELEMETRY=1 \
    FEWSTEP_HOST=0.0.0.0 \
    FEWSTEP_PORT=8000 \
    FEWSTEP_PLANS=/var/lib/fewstep/plans \
    FEWSTEP_LOG_FORMAT=json \
    FEWSTEP_BACKEND=auto
RUN groupadd --gid 10001 fewstep \
    && useradd --uid 10001 --gid fewstep --no-create-home --home-dir /var/lib/fewstep fewstep \
    && install -d -o fewstep -g fewstep /var/lib/fewstep /var/lib/fewstep/plans
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps --force-reinstall /wheels/*.whl
USER 10001:10001
WORKDIR /var/lib/fewstep
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "from urllib.request import *; build_opener(ProxyHandler({})).open('http://127.0.0.1:8000/livez', timeout=3)"]
ENTRYPOINT ["fewstep"]
CMD ["serve"]


FROM python:3.11-slim-bookworm AS cpu
COPY --from=cpu-dependencies /opt/fewstep /opt/fewstep
ENV PATH=/opt/fewstep/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ORT_DISABLE_TELEMETRY=1 \
    FEWSTEP_HOST=0.0.0.0 \
    FEWSTEP_PORT=8000 \
    FEWSTEP_PLANS=/var/lib/fewstep/plans \
    FEWSTEP_LOG_FORMAT=json
RUN groupadd --gid 10001 fewstep \
    && useradd --uid 10001 --gid fewstep --no-create-home --home-dir /var/lib/fewstep fewstep \
    && install -d -o fewstep -g fewstep /var/lib/fewstep /var/lib/fewstep/plans
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps --force-reinstall /wheels/*.whl
USER 10001:10001
WORKDIR /var/lib/fewstep
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "from urllib.request import *; build_opener(ProxyHandler({})).open('http://127.0.0.1:8000/livez', timeout=3)"]
ENTRYPOINT ["fewstep"]
CMD ["serve"]
