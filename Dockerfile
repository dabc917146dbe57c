# latentrt on a processor, with the embedded model: docker build -t latentrt . && docker run --rm -v "$PWD:/out" latentrt
FROM python:3.12-slim AS wheel
COPY . /source
RUN pip wheel /source --no-deps --wheel-dir /wheel

FROM python:3.12-slim
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir "$(echo /wheel/*.whl)[cpu]" && rm -r /wheel
ENV LATENTRT_HOME=/var/cache/latentrt
WORKDIR /out
ENTRYPOINT ["latentrt"]
CMD ["generate", "a red circle on a blue background"]
