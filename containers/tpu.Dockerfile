# docker build -f containers/tpu.Dockerfile -t pldr_jax:tpu .
# mkdir -p runs && docker run --rm --user "$(id -u)" --privileged --net=host -v "$PWD/runs:/runs" pldr_jax:tpu pldr-train --run_dir=/runs/nano
FROM python:3.13-slim
COPY . /src
RUN pip install --no-cache-dir "/src[tpu,serve,data,hub]" && rm -r /src \
    && useradd --create-home --uid 1000 pldr && mkdir /runs && chown pldr /runs
USER pldr
ENV PLDR_CACHE=/runs/.cache HF_HOME=/runs/.cache/huggingface MPLCONFIGDIR=/tmp
VOLUME /runs
WORKDIR /runs
CMD ["pldr-train", "--help"]
