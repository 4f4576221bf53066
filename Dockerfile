# One image for every node of a cluster: head and workers, CPU and GPU.
#
#   docker build -t slidr:0.1.0 .
#
# The environment is requirements.lock, as in `make install`. torch carries its own CUDA libraries; a GPU node needs
# NVIDIA's driver and container toolkit, nothing else.
FROM python:3.11-slim-bookworm

# rsync: `ray up` copies files into containers with it. wget: Kubernetes' probes of Ray nodes. git: the commit of a
# run's code goes into its record where the tree is a checkout. gcc: on a GPU Triton builds the launcher of its kernels.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc git libc6-dev rsync wget && rm -rf /var/lib/apt/lists/*

# Not root, and with the number that the first user of Ubuntu machines has, so that mounted files have one owner.
RUN useradd --create-home --uid 1000 ray

WORKDIR /opt/slidr
COPY requirements.lock ./
RUN pip install --no-cache-dir --requirement requirements.lock

COPY pyproject.toml README.md ./
COPY slidr slidr
COPY jobs jobs
COPY configs configs
RUN pip install --no-cache-dir --no-deps --editable .

# No telemetry; nobody talks to Ray without the token (docs/cluster.md says how it is made and handed out).
ENV RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token MLFLOW_DISABLE_TELEMETRY=true PYTHONUNBUFFERED=1

USER ray
CMD ["bash"]
