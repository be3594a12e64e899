# The page in a container: docker build --build-arg TORCH=cpu (small) or TORCH=cuda (NVIDIA cards; the default).
# docs/weights.md says how weights get in; compose.yaml has both variants ready.
FROM python:3.12-slim

ARG TORCH=cuda

# Everything that is fetched goes to /data, so that one volume keeps it.
ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    HF_HOME=/data/huggingface \
    MODELSCOPE_CACHE=/data/modelscope \
    DIFFSYNTH_MODEL_BASE_PATH=/data/models \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

RUN useradd --create-home --uid 1000 studio && mkdir /data && chown studio:studio /data

WORKDIR /app
# The packages first: they change seldom, and are by far the largest layer.
COPY install.py requirements.lock requirements-torch.lock ./
RUN Z_IMAGE_TORCH=${TORCH} python install.py
COPY . .

USER 1000
VOLUME /data
EXPOSE 7860
HEALTHCHECK --start-period=60s CMD ["/app/.venv/bin/python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/', timeout=5)"]

# Inside a container every address is the container's own; who may reach it is decided where the port is published.
ENTRYPOINT ["/app/.venv/bin/python", "cli.py"]
CMD ["serve", "--host", "0.0.0.0", "--insecure"]
