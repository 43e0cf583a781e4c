# The checkout with its environment, for a machine with Docker and nothing else:
#
#   docker build --tag jigsaw-pretrain:0.1 .
#   docker run --rm --shm-size 1g jigsaw-pretrain:0.1 make pretrain
#   docker run --rm --shm-size 1g jigsaw-pretrain:0.1 make test
#
# --shm-size: the loader's workers hand their jigsaws over in /dev/shm, of which a container has 64 MB otherwise. Take 1 GB
# for each GPU. On GPUs add --gpus all, and keep results outside: -v "$PWD/runs:/jigsaw/runs". The image has about 7 GB, most
# of it torch and CUDA.
FROM python:3.12-slim

# make runs the commands, the tests ask git for the project's files, and libturbojpeg0 is for --encode lossless.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git libturbojpeg0 make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /jigsaw
COPY . .
RUN make venv && rm -rf ~/.cache

ENV PATH="/jigsaw/.venv/bin:$PATH"
CMD ["make"]
