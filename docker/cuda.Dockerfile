# docker build -f docker/cuda.Dockerfile -t model-zoo:cuda .      docker run --gpus all --shm-size 16g ...
# The wheels bring their own CUDA libraries: the image needs none, the host needs a driver.
FROM python:3.11-slim
# apt's versions are the image's own: pinned ones vanish from the mirrors
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends bash git make g++ procps openssh-client && rm -rf /var/lib/apt/lists/*
WORKDIR /workspace
COPY . .
ENV PIP_NO_CACHE_DIR=1
RUN make install PYTHON=python
ENV PATH=/workspace/.venv/bin:$PATH
CMD ["make", "doctor", "DEVICE=cuda"]
