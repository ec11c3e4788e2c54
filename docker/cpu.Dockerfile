# docker build -f docker/cpu.Dockerfile -t model-zoo:cpu .
FROM python:3.11-slim
# apt's versions are the image's own: pinned ones vanish from the mirrors
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends bash git make g++ procps openssh-client && rm -rf /var/lib/apt/lists/*
WORKDIR /workspace
COPY . .
# without an NVIDIA driver `make install` takes the small build of torch
ENV PIP_NO_CACHE_DIR=1
RUN make install PYTHON=python
ENV PATH=/workspace/.venv/bin:$PATH
CMD ["make", "demo"]
