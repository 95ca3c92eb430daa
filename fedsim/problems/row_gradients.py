"""Losses and gradients of many rows, each row a model of its own: all at once, or one after another.

`torch.func.vmap` plays all rows of a call in one. That keeps the bits of a row independent of its co-rows only for
operations that torch computes the same for any number of rows; a module that uses another one (convolutions, gelu and
sigmoid as torch computes them, recurrent cells), that multiplies all rows by one matrix (a layer that is not trained),
or that cannot be vmapped, is played row by row. Which way is a property of the module, found once by looking at the
operations of a tiny gradient, never of machine or block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim.errors import InputError
from fedsim.problems.recorded import Recorded

CHUNK_BYTES = 1 << 28  # of what one call may hold at a time, by estimate, on the CPU
SHARE = 8  # the part of an accelerator's free memory that it may hold there

PerRecord = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_STEADY = """
abs add addmm alias all amax amin any arange argmax as_strided baddbmm bitwise_and bitwise_not bitwise_or bmm
broadcast_to cat clamp clamp_max clamp_min clone constant_pad_nd contiguous copy cos cumsum detach diagonal div dot
embedding embedding_dense_backward empty empty_like eq erf exp expand expm1 fill flatten full full_like gather ge gt
index index_put index_select le lift_fresh linspace log log1p logical_and logical_not logical_or logsumexp lt
masked_fill max maximum mean min minimum mm movedim mul mv ne neg new_empty new_empty_strided new_full new_ones
new_zeros ones ones_like permute reciprocal relu repeat reshape rsqrt rsub scalar_tensor scatter scatter_add select
select_backward sgn sign sin slice slice_backward split split_with_sizes sqrt square squeeze stack sub sum t tanh
tanh_backward threshold threshold_backward transpose tril triu unbind unsqueeze view where zero zeros zeros_like
_local_scalar_dense _log_softmax _log_softmax_backward_data _reshape_alias _softmax _softmax_backward_data _to_copy
_unsafe_view native_layer_norm native_layer_norm_backward
"""
KEEPS_BITS = frozenset(_STEADY.split())
"""Operations (of aten) whose result for one row was found not to depend on the rows beside it."""
SHARED_MATRIX = frozenset({"mm", "addmm", "mv", "addmv", "dot"})
"""What products become under vmap where all rows share a factor; where each row has its own they become `bmm`."""
APART = 0.1  # standard deviation of the noise on the first parameters at which records are asked for one another


@dataclass(frozen=True)
class Nature:
    """What a module's gradient consists of.

    Attributes:
        alone: why its rows are played one after another; None: they are played together.
        record_bytes: estimate of what one record holds in memory while a gradient is taken.
    """

    alone: str | None
    record_bytes: int


class RowGradients:
    """`sum_j weights_j loss(model_x(a_j), b_j)` of every row, and its gradient by x.

    Args:
        model: in the type and on the device of the rows; its trainable parameters, flat in order, are x `[dim]`.
        per_record: `(output [m, ...], labels [m, ...]) -> losses [m]`.
        a, b: all records `[N, ...]` and their labels `[N, ...]`, on the same device.

    Raises:
        InputError: the model draws random numbers or changes its buffers, has a loss that is not one number per
            record, or records whose losses depend on each other.
    """

    def __init__(self, model: torch.nn.Module, per_record: PerRecord, a: torch.Tensor, b: torch.Tensor) -> None:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._model, self._per_record, self._a, self._b = model, per_record, a, b
        self.names, self._trained = [name for name, _ in trained], [p for _, p in trained]
        self._places = _places(model, self._trained)
        self._shapes = [p.shape for p in self._trained]
        self.sizes = [p.numel() for _, p in trained]
        by_module = groupby(trained, key=lambda item: item[0].rpartition(".")[0])
        self.layer_sizes = [sum(p.numel() for _, p in own) for _, own in by_module]  # a layer's weights and bias
        self.initial = torch.cat([p.detach().reshape(-1) for _, p in trained]).clone()
        self._together = vmap(grad(self.weighted), randomness="error")
        self._recorded = Recorded(self._gradient)
        self._room = _room(a.device)
        self._losses = vmap(self.weighted, randomness="error")
        self.nature = self._look()

    def gradient(self, x: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return `[rows, dim]` at `x [rows, dim]`; `places [rows, width]` are record numbers, `weights` theirs."""
        if self.nature.alone:
            found, padded = torch.empty_like(x), not bool(weights.all())
            for row in range(len(x)):
                own = places[row], weights[row]
                self._one(x[row], *(_used(*own) if padded else own), found[row])
            return found
        chunks = list(self._chunks(*weights.shape))
        if len(chunks) == 1:
            return self._recorded(x, places, weights)
        total = torch.zeros_like(x)
        for rows, own in chunks:
            total[rows] += self._recorded(x[rows], places[rows, own], weights[rows, own])
        return total

    def _gradient(self, x: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the gradient of all rows at once."""
        return self._together(x, self._a[places], self._b[places], weights)

    def losses(self, x: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return `[rows]`; arguments as of `gradient`."""
        with torch.no_grad():
            if self.nature.alone:
                return torch.stack([self._one_loss(x[row], *_used(places[row], weights[row])) for row in range(len(x))])
            total = x.new_zeros(len(x))
            for rows, own in self._chunks(*weights.shape):
                chosen = places[rows, own]
                total[rows] += self._losses(x[rows], self._a[chosen], self._b[chosen], weights[rows, own])
            return total

    def outputs(self, x: torch.Tensor, a: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield parts of the records `a` and what the model `x [dim]` makes of them."""
        with torch.no_grad():
            for records in self._parts(len(a)):
                yield records, self.output(x, a[records])

    def output(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """Return what the model with parameters `x [dim]` makes of the records `a`."""
        parts = [p.reshape(shape) for p, shape in zip(x.split(self.sizes), self._shapes, strict=True)]
        named = {place: parts[number] for place, number in self._places.items()}
        return functional_call(self._model, named, (a,), tie_weights=False)

    def record_loss(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the loss of one record `a` with its label `b`."""
        return self._per_record(self.output(x, a[None]), b[None])[0]

    def weighted(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return one row's weighted loss."""
        return (weights * self._per_record(self.output(x, a), b)).sum()

    def _one(self, x: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
        """Write one row's gradient to `out [dim]`."""
        own = x.clone()  # its own memory: a row's bits may depend on where it begins
        for parameter, part, shape in zip(self._trained, own.split(self.sizes), self._shapes, strict=True):
            parameter.data = part.view(shape)  # the module itself: less to do than a call with other parameters
        if not len(places):
            out.zero_()
        for part in self._parts(len(places)):
            with torch.enable_grad():
                losses = self._per_record(self._model(self._a[places[part]]), self._b[places[part]])
                value = (weights[part] * losses).sum()
            slopes = torch.autograd.grad(value, self._trained, allow_unused=True, materialize_grads=True)
            flat = [slope.reshape(-1) for slope in slopes]
            if part.start == 0:
                torch.cat(flat, out=out)
            else:
                out += torch.cat(flat)

    def _one_loss(self, x: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        x, total = x.clone(), x.new_zeros(())
        for part in self._parts(len(places)):
            total += self.weighted(x, self._a[places[part]], self._b[places[part]], weights[part])
        return total

    def _parts(self, records: int) -> Iterator[slice]:
        size = max(1, self._room // self.nature.record_bytes)
        return (slice(begin, min(begin + size, records)) for begin in range(0, records, size))

    def _chunks(self, rows: int, records: int) -> Iterator[tuple[slice, slice]]:
        """Yield parts of rows (never a single one, unless there is only one) and of records, within the memory."""
        widest = min(records, max(1, self._room // self.nature.record_bytes))
        per_row = widest * self.nature.record_bytes + 4 * sum(self.sizes) * self.initial.element_size()
        count = min(-(-rows * per_row // self._room), max(1, rows // 2))
        for part in range(count):
            chosen = slice(rows * part // count, rows * (part + 1) // count)
            for chunk in self._parts(records):
                yield chosen, chunk

    def _look(self) -> Nature:
        self.nature = Nature("not looked at yet", 1 << 20)
        four = torch.arange(4, device=self._a.device) % len(self._a)
        before, buffers = torch.get_rng_state(), {name: b.clone() for name, b in self._model.named_buffers()}
        small, large = self._operations(four[:2]), self._operations(four)
        if not torch.equal(before, torch.get_rng_state()):
            torch.set_rng_state(before)
            raise InputError(
                "problem module: the model draws random numbers (dropout?), which would follow neither the scenario's"
                " seed nor the nodes; call its eval(), or leave that layer out"
            )
        changed = [name for name, b in self._model.named_buffers() if not torch.equal(b, buffers[name])]
        if changed:
            raise InputError(
                f"problem module: the model changes its buffers ({', '.join(changed)}) as it reads records (batch"
                " norm?), and nodes own parameters only; use group or layer norm, or call eval()"
            )
        self._refuse_company()
        # outputs of operations are partly views, and not all alive at the same time: a half is a generous estimate
        held = max(1, (large.elements - small.elements) // 4 * self.initial.element_size())
        return Nature(self._why_alone(large.names, four), held)

    def _operations(self, places: torch.Tensor) -> _Operations:
        self._refuse_shape(self._a[places], self._b[places])
        with _Operations() as seen:
            weights = self.initial.new_full((len(places),), 1.0 / len(places))
            self._one(self.initial, places, weights, torch.empty_like(self.initial))
        return seen

    def _refuse_shape(self, a: torch.Tensor, b: torch.Tensor) -> None:
        try:
            with torch.no_grad():
                shape = tuple(self._per_record(self.output(self.initial, a), b).shape)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise InputError(
                f"problem module: {type(self._model).__name__} cannot be played on {len(a)} records of shape"
                f" {tuple(a.shape[1:])}, labels of shape {tuple(b.shape[1:])}: {error}"
            ) from None
        if shape != (len(a),):
            raise InputError(f"problem module: the loss of {len(a)} records has shape {shape}, [{len(a)}] is needed")

    def _refuse_company(self) -> None:
        """Refuse a model that reads a record otherwise where others share the call: f_i is a mean over records."""
        eight = torch.linspace(0, len(self._a) - 1, 8).long().to(self._a.device)
        noise = torch.randn(len(self.initial), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = self.initial + APART * noise.to(self.initial)
        with torch.no_grad():
            whole, *pairs = (
                self._per_record(self.output(x, self._a[own]), self._b[own]) for own in (eight, *eight.split(2))
            )
        in_pairs, tolerance = torch.cat(pairs), torch.finfo(x.dtype).eps ** 0.4  # of rounding, with room
        if not torch.allclose(whole, in_pairs, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise InputError(
                f"problem module: eight records taken together have the losses {_few(whole)}, two by two"
                f" {_few(in_pairs)} (batch norm?); a node's objective is a mean over records: use group or layer norm"
            )

    def _why_alone(self, names: set[str], places: torch.Tensor) -> str | None:
        unknown = sorted(names - KEEPS_BITS)
        if unknown and self._a.device.type == "cpu":  # elsewhere no bits are promised, and rows together are faster
            return f"bits of {', '.join(unknown)} may depend on the rows beside"
        weights, twice = self.initial.new_full((2, len(places)), 1.0), places.expand(2, -1)
        try:
            with _Operations() as seen:
                self._gradient(self.initial.expand(2, -1), twice, weights)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            return f"it cannot be vmapped: {str(error).splitlines()[0]}"
        if seen.names & SHARED_MATRIX:
            return (
                "all rows share a matrix (a layer that is not trained), whose products' bits may depend on their number"
            )
        return None


def _room(device: torch.device) -> int:
    """Return how many bytes a call may hold: no more than a cache likes, but as many as keep an accelerator busy."""
    if device.type != "cuda":
        return CHUNK_BYTES
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, free for us
    return max(CHUNK_BYTES, (torch.cuda.mem_get_info(device)[0] + kept) // SHARE)


def _few(losses: torch.Tensor) -> str:
    return ", ".join(f"{loss:.3g}" for loss in losses.tolist())


def _places(model: torch.nn.Module, trained: list[torch.nn.Parameter]) -> dict[str, int]:
    """Return the place in `trained` of what hangs where, one path for each place: a shared one hangs at several.

    A module that is used under two names is one place: torch, left to tie weights itself, does not put it back.
    """
    number = {id(p): place for place, p in enumerate(trained)}
    return {
        f"{path}.{name}" if path else name: number[id(p)]
        for path, module in model.named_modules()
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(p) in number
    }


class _Operations(TorchDispatchMode):
    """Notes which operations are played while it is entered, and how many numbers they return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Play the operation and note it."""
        found = func(*args, **(kwargs or {}))
        self.names.add(_name(func, args))
        for value in found if isinstance(found, tuple | list) else [found]:
            if isinstance(value, torch.Tensor):
                self.elements += value.numel()
        return found


def _name(func: Any, args: Any) -> str:
    """Return an operation's name without its variants; whole powers are products."""
    name = func.overloadpacket.__name__
    if name == "pow" and len(args) > 1 and args[1] in (1, 2, 3):
        return "mul"
    return name.removesuffix("_") if not name.startswith("__") else name


def _used(places: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the records of one row that count: the others are padding."""
    used = weights != 0
    return places[used], weights[used]
