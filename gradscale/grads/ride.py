"""Readings from a forward and backward pass that somebody else makes: a training step's.

The parameters require grad there, and what autograd adds up for them is the sum of the examples' gradients: it is
taken as it comes, and only the rest is read from the factors. The gradients that are read are those of whatever the
pass went backward from, scaled as it was. Readings are homogeneous in the gradient, so that the scale may become known
when the pass is over: see `scaled`.

Shapes: B rows of a batch, n examples in them: B, or more of a packed batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from gradscale.errors import GradscaleError
from gradscale.grads.coverage import Site
from gradscale.grads.experts import ExpertGrads
from gradscale.grads.layer import (
    DenseGrads,
    EmbeddingGrads,
    GroupedGrads,
    LayerGrads,
    OuterGrads,
    SharedGrads,
    wide_dtype,
)
from gradscale.grads.packing import Packing
from gradscale.grads.readings import GradientSums, Reading, Readings, Totals, reader_of
from gradscale.grads.tape import Tape
from gradscale.grads.waiting import Doubts

_WHOLE = GradientSums()  # what autograd computes anyway


class Ride:
    """One call of the model and its backward pass, from construction to `stop`. Nothing it does raises into the pass.

    An error goes to `failed`, and the ride is over. Of `parameters` only shapes, types and the device are asked for.
    The examples fall into `parts` of consecutive ones, each with readings of its own. With one part, its sum of
    gradients is the pass's; `check` reads it from the factors too: see `sums_by_rules`.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        parameters: Mapping[str, Tensor],
        batch_size: int,
        readings: frozenset[Reading],
        failed: Callable[[Exception], None],
        labels: Tensor | None = None,
        doubts: Doubts | None = None,
        packing: Packing | None = None,
        parts: int = 1,
        check: bool = False,
    ) -> None:
        self.examples = batch_size if packing is None else packing.examples
        self.finished = self._going_back = False
        self._asked, self._parameters, self._failed = readings, parameters, failed
        self._parts = parts_of(self.examples, parts)
        self._whole = len(self._parts) == 1 and _WHOLE in readings
        needs = (readings - {_WHOLE} if self._whole else readings) | ({_WHOLE} if check else set())
        self._sums: dict[str, Tensor] = {}  # of the pass
        self._by_rules: list[Mapping[str, Tensor]] = []
        self._totals: list[Totals] = [{} for _ in self._parts]
        self._readers = [
            reader_of(parameters, part.stop - part.start, needs, labels if labels is None else labels[part], totals)
            for part, totals in zip(self._parts, self._totals, strict=True)
        ]
        self._tape = Tape(batch_size, self._read, None, doubts, failed, packing)
        self._hooks = ExitStack()
        self._hooks.enter_context(self._tape.recording(model, sites))
        for name, parameter in model.named_parameters() if self._whole else ():
            if name in parameters:
                self._hooks.callback(parameter.register_hook(partial(self._add, name)).remove)

    def forward_is_over(self) -> None:
        self._tape.forward_is_over()

    @contextmanager
    def going_back(self) -> Iterator[None]:
        """While the backward pass of this call runs. Gradients that come at another time are refused."""
        self._tape.forward_is_over()
        self._going_back = True
        try:
            yield
        finally:
            self._going_back = False

    def finish(self) -> list[Readings]:
        """What has been read of every part, of the gradients as the pass scaled them; the losses are NaN."""
        self._going_back = True
        self._tape.finish()
        self._tape.stop()
        self.finished = True
        if self._whole:
            by_rules = self._totals[0].pop(_WHOLE, None)
            self._totals[0][_WHOLE] = {None: {name: self._sum_of(name) for name in self._parameters}}
            self._by_rules = [by_rules[None]] if by_rules is not None else []
        else:
            self._by_rules = [totals[_WHOLE][None] for totals in self._totals if _WHOLE in totals]
        return [
            Readings(
                torch.full_like(reader.sq_norms[:, 0], torch.nan),
                reader.sq_norms.sum(dim=1).isfinite(),
                reader.sq_norms,
                {reading: of for reading, of in totals.items() if reading in self._asked},
                reader.projections,
            )
            for reader, totals in zip(self._readers, self._totals, strict=True)
        ]

    def sums_by_rules(self) -> dict[str, Tensor]:
        """The sums of all examples' gradients from the factors, with `check`; to be asked for once after `finish`."""
        return {name: torch.stack([sums[name] for sums in self._by_rules]).sum(dim=0) for name in self._parameters}

    def stop(self) -> None:
        """Take the hooks off. A checkpoint between its first and second run would miss them."""
        self._tape.stop()
        self._hooks.close()

    def _read(self, name: str, grads: LayerGrads) -> None:
        if not self._going_back:
            raise GradscaleError(
                "the loss must go backward by engine.backward(loss), once for every call of the model, got gradients "
                "at another time; direct loss.backward() does not tell how it is scaled"
            )
        for part, reader in zip(self._parts, self._readers, strict=True):
            reader.read(name, grads if len(self._parts) == 1 else examples_of(grads, part))

    def _add(self, name: str, grad: Tensor) -> None:
        """Of a parameter, before anything is done with it; more than once under a checkpoint with use_reentrant."""
        if not self._going_back:
            return
        try:
            with torch.no_grad():
                dense = (grad if grad.layout == torch.strided else grad.to_dense()).flatten()
                if name in self._sums:
                    self._sums[name] += dense
                else:
                    self._sums[name] = dense.to(wide_dtype(dense.dtype), copy=True)
        except Exception as problem:
            self._failed(problem)

    def _sum_of(self, name: str) -> Tensor:
        like = self._parameters[name]
        if name in self._sums:
            return self._sums[name]
        return torch.zeros(like.numel(), dtype=wide_dtype(like.dtype), device=like.device)


def parts_of(examples: int, parts: int) -> list[slice]:
    """At most `parts` runs of consecutive examples, none of them empty, as equal as can be."""
    count = max(1, min(parts, examples))
    return [slice(examples * i // count, examples * (i + 1) // count) for i in range(count)]


def examples_of(grads: LayerGrads, part: slice) -> LayerGrads:
    """The gradients of consecutive examples alone. Views, but of experts' and those of no known kind: copies."""
    match grads:
        case DenseGrads():
            return DenseGrads(grads.grads[part])
        case OuterGrads():
            return OuterGrads(grads.left[part], grads.right[part])
        case GroupedGrads():
            return GroupedGrads(grads.left[part], grads.right[part])
        case EmbeddingGrads():
            return EmbeddingGrads(grads.ids[part], grads.grads[part], grads.num_rows)
        case SharedGrads():
            return SharedGrads(tuple(examples_of(use, part) for use in grads.uses))
        case ExpertGrads():
            return _assignments_of(grads, part)
    _, rows, columns = grads.shape
    dense = torch.empty(part.stop - part.start, rows, columns, dtype=grads.dtype, device=grads.device)
    grads.tile(part, slice(0, rows), dense)
    return DenseGrads(dense.flatten(1))


def _assignments_of(grads: ExpertGrads, part: slice) -> ExpertGrads:
    index, bounds, start = list[int](), list[tuple[int, ...]](), 0
    for of_expert in grads.bounds:
        ours = of_expert[part.start : part.stop + 1]
        index += range(ours[0], ours[-1])
        bounds.append(tuple(bound - ours[0] + start for bound in ours))
        start = bounds[-1][-1]
    rows = torch.tensor(index, dtype=torch.int64, device=grads.device)
    return ExpertGrads(grads.left[rows], grads.right[rows], tuple(bounds))


def scaled(readings: Readings, by: float) -> Readings:
    """The readings of the gradients times `by`. Sums are multiplied in place."""
    for groups in readings.sums.values():
        for sums in groups.values():
            for total in sums.values():
                total.mul_(by)
    return readings._replace(
        sq_norms=readings.sq_norms * by**2,
        projections={reading: found * by for reading, found in readings.projections.items()},
    )


def joined(parts: Sequence[Readings]) -> Readings:
    """The readings of consecutive microbatches as one. The sums are added up in the first one's."""
    totals = {reading: {group: dict(sums) for group, sums in of.items()} for reading, of in parts[0].sums.items()}
    for part in parts[1:]:
        for reading, groups in part.sums.items():
            for group, sums in groups.items():
                held = totals[reading].setdefault(group, {})
                for name, total in sums.items():
                    held[name] = held[name].add_(total) if name in held else total
    return Readings(
        torch.cat([part.losses for part in parts]),
        torch.cat([part.finite for part in parts]),
        torch.cat([part.sq_norms for part in parts]),
        totals,
        {name: torch.cat([part.projections[name] for part in parts]) for name in parts[0].projections},
    )
