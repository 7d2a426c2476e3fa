# What every node of a cluster runs (cluster.yaml, jobs/rayjob.yaml): Ray's own image, CUDA 13 as torch 2.13 is built for, and the
# extra `gpu` in the versions of the lock. The code is not in it: a job brings it (`ray job submit --working-dir .`).
#
#   docker buildx build --platform linux/amd64 -t REGISTRY/undo-ray:2.60.0 --push .
FROM rayproject/ray:2.60.0-py311-cu130

WORKDIR /tmp/undo-ray
# __init__.py alone: hatchling reads the version there, and a change of code must not build the image anew.
COPY --chown=ray pyproject.toml README.md LICENSE ./
COPY --chown=ray requirements/gpu.lock requirements/gpu.lock
COPY --chown=ray undo_ray/__init__.py undo_ray/__init__.py
# boto3: the head's autoscaler asks EC2 for nodes with it, and a RayJob's code comes from S3.
RUN pip install --no-cache-dir -c requirements/gpu.lock '.[gpu]' boto3==1.44.5 \
    && pip uninstall -y undo-ray \
    && python -c 'import ray, torch, vllm; assert ray.__version__ == "2.60.0", ray.__version__'
WORKDIR $HOME
