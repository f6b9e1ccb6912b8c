"""Pipeline parallelism: the layers are split into stages, and micro-batches pass through them one after another."""
