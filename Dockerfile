# One image for the four services and the operator's command; the command chooses.
#
#   docker build --network host -t dataplane-agent .
#   docker run -e CONTROL_PLANE_BASE_URL=… -e CONTROL_PLANE_API_KEY=… dataplane-agent usage-forwarder
#
# PYTHON_IMAGE is any image with Python 3.11 to 3.14 and its venv module.
# LOCK chooses what is installed: runtime.lock, or demo.lock with what the sandbox needs beside it.
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
ARG LOCK=runtime.lock
RUN python3 -m venv /opt/dataplane
ENV PATH=/opt/dataplane/bin:$PATH
COPY requirements /src/requirements
RUN pip install --quiet --no-cache-dir --require-hashes -r /src/requirements/build.lock -r /src/requirements/${LOCK}
COPY . /src
RUN pip install --quiet --no-cache-dir --no-deps --no-build-isolation /src

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/dataplane dataplane \
 && install -d -o dataplane -g dataplane /var/lib/dataplane /var/lib/dataplane/sandbox
COPY --from=build /opt/dataplane /opt/dataplane
COPY config.example.yaml /etc/dataplane/config.yaml
ENV PATH=/opt/dataplane/bin:$PATH PYTHONUNBUFFERED=1 DATAPLANE_CONFIG=/etc/dataplane/config.yaml
USER 10001:10001
WORKDIR /var/lib/dataplane
STOPSIGNAL SIGTERM
EXPOSE 8081-8084 9090-9093
CMD ["dataplane", "run"]
