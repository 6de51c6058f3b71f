# One image for every role: the command `engines` with all its extras, torch, and the transfer engine. EXTRA says for which machines:
# cpu (the default), cuda12 or cuda13. The CUDA libraries come with torch, and the driver from the host, so all begin with one base image.
#
#   docker build -t engine-registry .
#   docker build -t engine-registry:cuda13 --build-arg EXTRA=cuda13 .
#   docker run --rm engine-registry list --etcd HOST:PORT
#
# pip's own settings apply, as build arguments. For `cpu` on x86-64 give PIP_EXTRA_INDEX_URL the address of PyTorch's CPU builds (it is
# on pytorch.org under "Get started"); without it pip takes the default build, with gigabytes of CUDA libraries. torch must be built for
# the CUDA of EXTRA: where the default build is for another, give the address of that build:
#
#   docker build -t engine-registry --build-arg PIP_EXTRA_INDEX_URL=… .
#
# It runs as a user without rights, and with a root that is read-only (docker run --read-only): only /weights and the folders that a
# command names are written to. Needs no BuildKit. The big layer holds the dependencies alone and is rebuilt when pyproject.toml or constraints.txt change.

FROM python:3.11-slim AS dependencies
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ARG EXTRA=cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_PROGRESS_BAR=off
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN python -c "import os, tomllib; \
project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = project['optional-dependencies']; \
chosen = [each for name in (os.environ['EXTRA'], 'gateway', 'metrics') for each in extras[name]]; \
print(*project['dependencies'], *chosen, sep='\n')" > requirements.txt \
    && pip install "$(grep -m1 '^pip==' constraints.txt)" \
    && python -m venv --without-pip /opt/engines \
    && pip --python /opt/engines/bin/python install --constraint constraints.txt --build-constraint constraints.txt --requirement requirements.txt

FROM dependencies AS wheel
COPY README.md LICENSE ./
COPY registry registry
COPY loader loader
COPY cli cli
RUN pip wheel --no-deps --build-constraint constraints.txt --wheel-dir /dist .

FROM python:3.11-slim
# What the transfer engine's wheel takes from the system. ibverbs-providers has the drivers of RDMA devices, and libmlx5, which the wheels
# for CUDA are linked against.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ibverbs-providers libcurl4 libibverbs1 libnuma1 \
    && rm -rf /var/lib/apt/lists/*
# A volume that is mounted on /weights for the first time belongs to this user too.
RUN useradd --uid 10001 --user-group --create-home engines \
    && install -d -o engines -g engines /weights
COPY --from=dependencies /opt/engines /opt/engines
COPY --from=wheel /dist /dist
RUN pip --python /opt/engines/bin/python install --no-cache-dir --no-deps --no-index --root-user-action ignore /dist/*.whl
COPY scripts/testbed.py /opt/engines/share/testbed.py
# Tells the runtime of NVIDIA which parts of the driver to bring, for the containers that get a GPU.
ENV PATH=/opt/engines/bin:$PATH NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER engines
WORKDIR /home/engines
ENTRYPOINT ["engines"]
CMD ["--help"]
