"""A second device that is not there: its tensors lie in this process's memory and say `far:0`.

Operations on tensors of both devices are refused, as CUDA refuses them, so that code for accelerators is tested
where there is none.
"""

import torch
from torch.utils._pytree import tree_leaves, tree_map

SETUP = getattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend", None)
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)  # indices may lie on the CPU


class Far(torch.Tensor):
    """A tensor on `far:0`; `inner` is where its numbers are."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("far:0"),
            dispatch_sizes_strides_policy="sizes",
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, operation, _types, args=(), kwargs=None):
        return _play(operation, args, kwargs or {})


def _play(operation, args, kwargs):
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    far = any(isinstance(t, Far) for t in tensors)
    alone = [t for t in tensors if not isinstance(t, Far) and t.dim() > 0]
    if far and alone and operation not in (*COPIES, *INDEXED):
        raise RuntimeError(f"{operation}: tensors on far:0 and cpu, {[tuple(t.shape) for t in tensors]}")
    to = kwargs.get("device")
    if to is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner = lambda t: t.inner if isinstance(t, Far) else t
    out = operation(*tree_map(inner, args), **tree_map(inner, kwargs))
    if operation._schema.name.endswith("_"):
        return args[0]
    there = far if to is None else torch.device(to).type == "far"
    return tree_map(lambda t: Far(t) if there and isinstance(t, torch.Tensor) else t, out)


def device():
    """Return the device, made known to torch by the first call."""
    global _library
    if _library is None:
        SETUP("far")
        _library = torch.library.Library("_", "IMPL")
        _library.fallback(lambda operation, *args, **kwargs: _play(operation, args, kwargs), "PrivateUse1")
    return torch.device("far:0")


_library = None
