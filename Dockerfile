# Training: docker build -t ochat-train . && docker run --gpus all -v "$PWD:/run" ochat-train train recipe.yaml
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04

# DeepSpeed and Triton compile kernels at the first run: a compiler, and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential git python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
WORKDIR /opt/ochat_train
RUN python3 -m venv /opt/venv
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY ochat_train ochat_train
COPY recipes recipes
COPY data data
RUN pip install -c constraints.txt ".[gpu,lora,gguf,tensorboard]"

WORKDIR /run
ENTRYPOINT ["ochat"]
CMD ["--help"]
