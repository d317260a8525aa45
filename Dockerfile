# docker build -t qoq .
# docker run --rm --gpus all -v "$PWD:/work" -v ~/.cache/huggingface:/root/.cache/huggingface qoq quantize llama-3.2-1b
#
# UBI 9 carries Python 3.11 itself. NVRTC and the CUDA headers come as wheels with torch, so the runtime image is enough.
FROM nvidia/cuda:13.0.2-runtime-ubi9

RUN dnf install -y --nodocs python3.11 python3.11-pip && dnf clean all

ENV PATH=/opt/qoq/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

WORKDIR /src
RUN python3.11 -m venv /opt/qoq

# The gigabytes first: this layer survives every change of the sources.
COPY constraints.txt ./
RUN pip install -c constraints.txt torch transformers datasets cupy-cuda13x

COPY . ./
RUN pip install -c constraints.txt ".[cu13]" && rm -rf build ./*.egg-info

WORKDIR /work
ENTRYPOINT ["qoq"]
CMD ["--help"]
