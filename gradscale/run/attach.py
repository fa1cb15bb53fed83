"""Measuring inside DeepSpeed training, in the step's own forward and backward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gradscale.measures.coherence import Coherence
from gradscale.measures.dispersion import Dispersion
from gradscale.measures.measure import Measure
from gradscale.run.attach_path import recorded
from gradscale.run.attach_plan import blocks_of
from gradscale.run.attach_setup import COLUMNS, Boundaries, Inputs, Labels, Losses, Setup, prepared
from gradscale.run.attach_step import StepReader
from gradscale.run.attach_store import Keeper
from gradscale.run.attach_together import rank, together
from gradscale.run.attach_verify import check_agreement
from gradscale.run.attach_wrap import replaced
from gradscale.sketches import Sketch, parse_sketch

_LOG = logging.getLogger("gradscale")


@contextmanager
def attach(
    engine: Any,
    out: str,
    measures: Sequence[Measure] = (Coherence(), Dispersion()),
    every: int = 1,
    *,
    sketch: Sketch | str | None = None,
    params: str | None = None,
    exclude: Sequence[str] = (),
    seed: int = 0,
    sketch_dtype: str = "float32",
    batch_size: Callable[[Inputs], int] | None = None,
    losses: Losses | None = None,
    labels: Labels | None = None,
    boundaries: Boundaries | None = None,
    columns: Sequence[str] = COLUMNS,
    keep_states: bool = False,
    strict: bool = False,
    path: bool = False,
) -> Iterator[Attachment]:
    """Measure every `every`-th optimizer step of a DeepSpeed training, inside the `with`, into the run directory `out`.

    The training loop stays as it is: `loss = ...engine(...)`, `engine.backward(loss)`, `engine.step()`. On a measured
    step, the readings are taken from its own forward and backward pass; on others no hook is there. `step` is the
    optimizer step that the gradient belongs to, engine.global_steps before it is made; a step's examples are those of
    all its microbatches on all ranks, and `example_id` is their position in the order of ranks, then of microbatches.
    A rank's part is a shard; ranks are merged in their order.

    g_i = B x (example i's share of the loss), where B = N / (W A) is the mean size of a microbatch, of N examples on W
    ranks in A microbatches each: the mean of g_i is the gradient that the optimizer is given, before clipping. It is
    read at whatever scale the loss goes backward, which a hook on the loss sees. On the first measured step, this mean
    is held to the gradient that DeepSpeed has; if they differ, nothing is measured, and the error says their ratio.

    What the functions are given is what the engine's module is called with, `Inputs(args, kwargs)`: `batch_size` says
    how many examples that is (by default the first dimension of the first tensor), `labels` gives their classes [B],
    for estimates by class, and `losses(output, inputs)` their losses [B], for the rows: what the loss averages over
    cannot be seen, and without it the column is NaN. `columns` says which numbers of the rows are filled, the others
    are NaN. States, of P numbers for each block and step, go to the first rank; they are stored with `keep_states`.

    `boundaries` is for packed sequences: [B, T], the number that a position's example has in its row, -1 for none.
    The model must mask attention between the examples of a row, or their gradients are not their own. Then only
    parameters of token-wise modules can be measured, and labels and losses are one for each example.

    Standard errors by blocks leave out one microbatch of one rank after another (of more than 20, runs of them). A step
    that is a single microbatch is divided into ten parts; that costs a sum of gradients more in time.

    Training goes on whatever fails here: a step is then not measured, on all ranks alike, `failures` of what is
    returned counts it and the first is logged. With `strict` all ranks raise, after the optimizer's step. Under
    ZeRO-3, parameters of Linear, Conv1D, Embedding and LayerNorm can be measured.

    With `path`, every optimizer step, measured or not, has a row in path.parquet: |w_(t+1) - w_t|, learning rates,
    loss, time; see `gs.training_path`. It costs a copy of the optimizer's masters here, within engine.step, and a sum
    of five numbers over ranks.

    A run that `out` holds is gone on with: its steps from engine.global_steps on are measured anew.
    Cost of a measured step: as the readings in `measure`, without the passes, and without the sum of gradients, which
    autograd makes anyway; P numbers for each block more in memory, and on the first rank for all blocks; the first
    measured step also checks. See docs/attach.md.
    Raises: GradscaleError, on all ranks, for settings or a model that cannot be measured, or a run of other settings.
    """
    settings = (measures, every, params, exclude, batch_size, losses, labels)
    mapped = parse_sketch(sketch, seed) if isinstance(sketch, str) else sketch
    setup = together(lambda: prepared(engine, *settings, boundaries, columns, sketch_dtype, seed, mapped))
    keeper = together(lambda: Keeper.opened(setup, out, int(engine.global_steps), keep_states))
    attachment = Attachment(setup, keeper, strict)
    with recorded(setup, keeper.store.files, path, attachment._note, strict), attachment.hooked():
        yield attachment


class Attachment:
    """What `attach` is doing: the `steps` measured, how many `failures`, and the last one's `problem`."""

    def __init__(self, setup: Setup, keeper: Keeper, strict: bool) -> None:
        self.steps: list[int] = []
        self.failures = 0
        self.problem = ""
        self._setup, self._keeper, self._strict = setup, keeper, strict
        self._verified = self._refused = False
        self._reader: StepReader | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """With engine.backward and engine.step wrapped."""
        engine = self._setup.engine
        if int(engine.micro_steps) % int(engine.gradient_accumulation_steps()) == 0:  # else from the next step on
            self._begin()
        with replaced(engine, "backward", self._backward), replaced(engine, "step", self._step):
            try:
                yield
            finally:
                self._end()

    def _begin(self) -> None:
        if not self._refused and int(self._setup.engine.global_steps) % self._setup.every == 0:
            blocks = blocks_of(self._setup, self._keeper.plan)
            self._reader = StepReader(self._setup, blocks, check=not self._verified)

    def _end(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def backward(loss: Any, retain_graph: bool = False, scale_wrt_gas: bool = True, **more: Any) -> Any:
            given = {"retain_graph": retain_graph, "scale_wrt_gas": scale_wrt_gas, **more}
            if self._reader is None:
                return original(loss, **given)
            with self._reader.backward(loss, scale_wrt_gas):
                return original(loss, **given)

        return backward

    def _step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            if not self._setup.engine.is_gradient_accumulation_boundary():
                return original(*args, **kwargs)
            failed = self._measured(self._reader) if self._reader is not None else None
            self._end()
            result = original(*args, **kwargs)
            self._begin()
            if failed is not None and self._strict:
                raise failed
            return result

        return step

    def _measured(self, reader: StepReader) -> Exception | None:
        """Keep what the step's passes have given. Every rank comes here, and goes on as the others do."""
        step = int(self._setup.engine.global_steps)
        try:
            part = together(reader.finished)
            if not self._verified:
                self._verify(part)
            self._keeper.keep(step, part)
        except Exception as problem:
            self._note(step, problem)
            return problem
        self.steps.append(step)
        return None

    def _verify(self, part: Any) -> None:
        try:
            check_agreement(self._setup, part)
        except Exception:
            self._refused = True
            raise
        self._verified = True

    def _note(self, step: int, problem: Exception) -> None:
        self.failures += 1
        self.problem = f"step {step}: {problem}"
        if self.failures == 1 and not rank():
            rest = "nothing more is measured" if self._refused else "further failures are counted only"
            _LOG.error("not measured, training goes on, %s: %s", rest, self.problem)
