# The service with the packages of requirements.lock: no torch, no compiler, no pip. It uses no BuildKit extension.
ARG MODEL_DIGEST=a404842e4f4602bf5ecbee2c8ca77d92f3c81eadc40aa18e9c615b3aefbba69d

FROM python:3.11-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# The locks are copied first, so that a change of code does not install the packages again.
COPY requirements.lock requirements-build.lock ./
RUN python -m venv /build \
    && /build/bin/pip install --require-hashes --only-binary :all: -r requirements-build.lock \
    && python -m venv --without-pip /opt/engine-health \
    && /build/bin/pip --python /opt/engine-health/bin/python install --require-hashes --only-binary :all: --no-compile -r requirements.lock
COPY pyproject.toml README.md ./
COPY model model
COPY export export
COPY service service
# The build fails if the label below differs from the artefact. Files that only tests, tools and notebooks need are removed;
# of plotly only the script for browsers remains. The file system is read-only later, so bytecode is compiled here.
ARG MODEL_DIGEST
RUN test "$(sha256sum < model/artefact/engine-health.onnx)" = "$MODEL_DIGEST  -" \
    && /build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheel . \
    && /build/bin/pip --python /opt/engine-health/bin/python install --no-deps --no-index --no-compile /wheel/*.whl
WORKDIR /opt/engine-health/lib/python3.11/site-packages
RUN find . -type d \( -name tests -o -path './onnxruntime/t*' -o -path ./onnxruntime/quantization -o -path ./narwhals \) -prune -exec rm -rf {} + \
    && find plotly -type f ! -path plotly/__init__.py ! -name plotly.min.js -delete \
    && /opt/engine-health/bin/python -m compileall -q --invalidation-mode unchecked-hash .

FROM python:3.11-slim
ARG MODEL_DIGEST
LABEL org.opencontainers.image.title="engine-health" \
      org.opencontainers.image.description="Calibrated health and remaining useful life of turbofan engines, from one ONNX file." \
      org.opencontainers.image.version="0.1.0" \
      engine-health.model.digest="$MODEL_DIGEST"
COPY --from=build /opt/engine-health /opt/engine-health
# pip is not needed here. The service writes to /data only; engine-health.db is created there.
RUN rm -rf /usr/local/lib/python3.11/site-packages/* /usr/local/lib/python3.11/ensurepip /usr/local/bin/pip* /usr/local/bin/wheel \
    && mkdir /data && chown 10001:10001 /data
ENV PATH=/opt/engine-health/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ENGINE_HEALTH_HOST=0.0.0.0 \
    ENGINE_HEALTH_PORT=8000
WORKDIR /data
VOLUME /data
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['ENGINE_HEALTH_PORT']), timeout=4); c.request('GET', '/readyz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["engine-health"]
CMD ["serve"]
