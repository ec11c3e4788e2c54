# docker build -f docker/npu.Dockerfile -t model-zoo:npu .
# docker run --device /dev/davinci0 --device /dev/davinci_manager --device /dev/devmm_svm --device /dev/hisi_hdc \
#   -v /usr/local/Ascend/driver:/usr/local/Ascend/driver:ro -v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi:ro --shm-size 16g ...
# CANN's public image; the host's driver has to be new enough for it (make doctor says). Not run on Ascend hardware.
ARG CANN_IMAGE=quay.io/ascend/cann:9.1.0-910b-ubuntu22.04-py3.11
FROM ${CANN_IMAGE}
# apt's versions are the image's own: pinned ones vanish from the mirrors
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends bash git make g++ procps openssh-client && rm -rf /var/lib/apt/lists/*
WORKDIR /workspace
COPY . .
ENV PIP_NO_CACHE_DIR=1
RUN make install PYTHON=python3 && .venv/bin/pip install "torch_npu==$(sed -n s/^torch==//p constraints.txt)"
ENV PATH=/workspace/.venv/bin:$PATH
CMD ["make", "doctor", "DEVICE=npu"]
