# syntax=docker/dockerfile:1

FROM python:3.14-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python -m venv --without-pip /venv
# requirements-opentelemetry.lock adds traces.
ARG REQUIREMENTS=requirements.lock
COPY requirements*.lock ./
RUN pip --python /venv install --require-hashes --requirement "$REQUIREMENTS" \
    && pip install --require-hashes --requirement requirements-build.lock
COPY pyproject.toml README.md LICENSE ./
COPY app app
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && pip --python /venv install --no-deps --no-index /wheels/*.whl

FROM python:3.14-slim
# A new volume at /data inherits the owner of the folder.
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin arbiter \
    && install --directory --owner=10001 --group=10001 --mode=0700 /data
COPY --from=build /venv /venv
USER 10001:10001
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ARBITER_HOST=0.0.0.0 \
    ARBITER_PORT=8000 \
    ARBITER_SHUTDOWN_DELAY_SECS=5
EXPOSE 8000
# The image has no curl, so Python asks.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"ARBITER_PORT\"]}/readyz', timeout=2)"]
# Arguments of docker run and docker compose run are arguments of arbiter:
#   docker run --rm arbiter keys new --name gate --scope proxy
ENTRYPOINT ["arbiter"]
CMD ["serve"]
