"""The batches of a pipeline: split into micro-batches, loaded alike on all ranks, and told apart by a fingerprint."""

from __future__ import annotations

import functools
import importlib
import os
import zlib
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_eff.errors import ConfigurationError
from lightning_eff.runtime.patches import Undo, replace_attribute

__all__ = ["fingerprint", "seed_workers_alike", "split_batches"]

_SAMPLED = 64
"""Elements of a tensor that its fingerprint is made of."""


def split_batches(loader: Any, batch_size: int) -> Any:
    """Return the same loader with smaller batches.

    Raises:
        ConfigurationError: it is no DataLoader that makes batches, or its batches are smaller or not a multiple.
    """
    given = getattr(loader, "batch_size", None)
    if not isinstance(loader, torch.utils.data.DataLoader) or given is None:
        raise ConfigurationError(
            "micro_batch_size needs a torch DataLoader with batch_size=...; this one makes its batches in another way. "
            "Give it the micro-batches you want and leave micro_batch_size out."
        )
    if given % batch_size:
        raise ConfigurationError(f"micro_batch_size={batch_size} does not divide the loader's batch_size={given}.")
    if given == batch_size:
        return loader
    kept = (
        "dataset", "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
        "generator", "prefetch_factor", "persistent_workers", "drop_last",
    )  # fmt: skip
    arguments = {name: getattr(loader, name) for name in kept}
    if not isinstance(loader.dataset, torch.utils.data.IterableDataset):  # that has an order of its own
        arguments["sampler"] = loader.sampler
    return torch.utils.data.DataLoader(batch_size=batch_size, **arguments)


def seed_workers_alike(loader: Any, root: str) -> Undo:
    """Seed a loader's workers alike on all ranks; ``seed_everything(workers=True)`` would do it differently on each.

    Args:
        loader: of any kind.
        root: name of a module of the Lightning that is used.
    """
    if not int(os.environ.get("PL_SEED_WORKERS", "0")) or getattr(loader, "worker_init_fn", loader) is not None:
        return lambda: None
    fabric = "lightning_fabric" if root.startswith("pytorch_lightning") else "lightning.fabric"
    seeds = importlib.import_module(f"{fabric}.utilities.seed").pl_worker_init_function
    return replace_attribute(loader, "worker_init_fn", functools.partial(seeds, rank=0))


def fingerprint(batch: Any) -> int:
    """Return 32 bits that tell batches apart: of shapes, dtypes and some elements of the tensors."""
    code = 0
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            some = leaf.detach().reshape(-1)[:: max(1, leaf.numel() // _SAMPLED)][:_SAMPLED].cpu().contiguous()
            code = zlib.crc32(f"{tuple(leaf.shape)} {leaf.dtype}".encode(), code)
            code = zlib.crc32(some.view(torch.uint8).numpy().tobytes(), code)
    return code
