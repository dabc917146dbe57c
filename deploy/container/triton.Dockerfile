# Triton with latentrt for its Python backend; deploy/kubernetes/triton.yaml runs it. From the root of the repository:
#
#     docker build -f deploy/container/triton.Dockerfile -t latentrt:triton .
ARG TRITON=25.10-py3

FROM nvcr.io/nvidia/tritonserver:${TRITON}
ARG EXTRA=tensorrt
ENV PIP_NO_CACHE_DIR=1 PIP_BREAK_SYSTEM_PACKAGES=1
COPY . /source
RUN python3 -m pip install "/source[${EXTRA}]" \
    && rm -rf /source \
    && install --directory --owner 10001 --group 10001 --mode 700 /var/cache/latentrt
ENV LATENTRT_HOME=/var/cache/latentrt
USER 10001:10001
CMD ["tritonserver", "--model-repository", "/repository", "--exit-timeout-secs", "30"]
