"""Runs of the sharded strategies on a CPU harness: the model they share, FSDP2's runs, and DeepSpeed's.

The harness shows that the numbers are right on gloo ranks; it shows nothing about GPUs, NCCL, streams or speed.
"""
