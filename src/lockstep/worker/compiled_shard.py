"""Compiled shards: forward and backward of a shard as machine code, where a job asks for it.

Inductor, PyTorch's compiler, fuses the operations of a captured loss into kernels of its own. They
round differently from PyTorch's: other bits than without, the same for any number of workers. So
every shard of the job is computed by them, and what they are made of is in the numerics profile.
They are made in the forkserver, before the first fork: whoever replaces a dead worker has them.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from blake3 import blake3
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from lockstep.errors import TaskError
from lockstep.job.task import Task
from lockstep.planning.plan import Plan
from lockstep.state.gradient_slots import GradientSlot
from lockstep.state.shared_state import SharedState
from lockstep.system.messages import Codec, Message
from lockstep.worker.fork_setup import ask_fork
from lockstep.worker.kernel_cache import kernels_in
from lockstep.worker.loss_capture import (
    CapturedLoss,
    UntraceableError,
    capture,
    checked_tensors,
    first_line,
    has_hooks,
    obstacle,
    tensors_of,
)
from lockstep.worker.traced_shard import Joint, draws, flags_of, simplify

if TYPE_CHECKING:
    from lockstep.data.fetching import Fetch

FETCH_SECONDS = 300
"""The longest that fetching one batch of each size may take."""


class BatchForm(Message):
    """What batches have in common that are computed by one compiled pass."""

    container: Literal["tensor", "list", "tuple", "dict"] = "list"
    keys: tuple[str, ...] = ()
    """Of a mapping."""
    dtypes: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()

    def zeros(self) -> Any:
        """A batch of this form, of zeros."""
        tensors = [
            torch.zeros(shape, dtype=getattr(torch, dtype))
            for dtype, shape in zip(self.dtypes, self.shapes, strict=True)
        ]
        if self.container == "dict":
            return dict(zip(self.keys, tensors, strict=True))
        if self.container == "tensor":
            return tensors[0]
        return tensors if self.container == "list" else tuple(tensors)


class FetchedForms(Message):
    """The forms of a job's batches, or why they cannot be had."""

    forms: tuple[BatchForm, ...] = ()
    problem: str = ""


FORMS: Codec[FetchedForms] = Codec(FetchedForms)


class CompiledShard:
    """Forward and backward of the captured loss, compiled for batches of one form."""

    def __init__(
        self,
        captured: CapturedLoss,
        shared: SharedState,
        leaves: Sequence[torch.Tensor],
        *,
        portable: bool,
    ) -> None:
        """`leaves` are the tensors of the batch that was captured. `portable`: for AVX2, also where
        the processor has more.

        Raises:
            UntraceableError: the loss cannot be compiled.
        """
        from torch._guards import TracingContext, tracing
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.decomposition import select_decomp_table
        from torch._inductor.virtualized import V
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.captured = captured
        joint = Joint(captured, shared, leaves)
        fake = FakeTensorMode(allow_non_fake_inputs=False)
        given = [*joint.inputs, *leaves, torch.ones_like(captured.loss)]
        fakes = [fake.from_tensor(each) for each in given]
        with fake:
            traced = make_fx(joint)(*fakes)
        graph, self._with_gradient = simplify(traced, joint.used)
        traced.recompile()
        self.draws = draws(graph)
        """Whether it draws random numbers."""
        inputs = [each.detach() for each in fakes]
        with fake, torch.no_grad():
            pure = make_fx(
                torch.func.functionalize(traced, remove="mutations"),
                decomposition_table=select_decomp_table(),
            )(*inputs)
        sizes = [(str(each.dtype), tuple(each.shape), each.stride()) for each in inputs]
        key = blake3(repr((pure.code, sizes, _options(portable), versions())).encode())
        with (
            V.set_fake_mode(fake), tracing(TracingContext(fake)), torch.no_grad(),
            config.patch(_options(portable)), kernels_in(key.hexdigest()[:32]),
        ):  # fmt: skip
            self._run: Callable[[list[torch.Tensor]], Any] = compile_fx_inner(pure, inputs)
        self._fixed = [each.detach() for each in joint.inputs]
        self._targets: dict[int, list[torch.Tensor]] = {}
        self.flags = flags_of(shared, self._with_gradient)
        """By parameter: whether there is a gradient of it."""

    def run(self, leaves: Sequence[torch.Tensor], root: torch.Tensor, slot: GradientSlot) -> float:
        """As `TracedShard.run`."""
        if id(slot) not in self._targets:
            self._targets[id(slot)] = [slot.grads[index] for index in self._with_gradient]
        with torch.no_grad():
            found: list[torch.Tensor] = list(self._run([*self._fixed, *leaves, root]))
            torch._foreach_copy_(self._targets[id(slot)], found[1:])
        return found[0].item()


def _options(portable: bool) -> dict[str, Any]:
    """The compiler's: no processes or threads of its own, nothing that is chosen by timing, and no
    pickled files."""
    options = {
        "compile_threads": 1, "cpp.threads": 1, "max_autotune": False, "fx_graph_cache": False,
    }  # fmt: skip
    return options | ({"cpp.simdlen": 256} if portable else {})


class CompiledPasses:
    """The compiled passes of a job, one for each form of batch; see `ForwardBackward`."""

    def __init__(self, task: Task, model: nn.Module, passes: Sequence[CompiledShard]) -> None:
        self._task, self._model, self._passes = task, model, passes

    def find(self, batch: Any) -> CompiledShard:
        """The compiled pass for this batch.

        Raises:
            TaskError: there is none.
        """
        for each in self._passes:
            if each.captured.holds(self._task, self._model, batch):
                return each
        raise TaskError(
            "the compiled loss does not hold for a batch",
            expected="batches of the forms that the first ones had, and a loss that depends on "
            "nothing that changes from step to step",
            found=", ".join(f"{each.dtype} {tuple(each.shape)}" for each in tensors_of(batch)),
            fix=FIX,
        )


FIX = "leave compile out: the loss is computed operation by operation then"


def compile_passes(task: Task, shared: SharedState, plan: Plan, fetch: Fetch) -> CompiledPasses:
    """Compile the loss for every size that a shard may have. Called in the forkserver.

    One batch of each size is fetched in a fork, so that the data set stays as it is here.

    Raises:
        TaskError: it cannot be compiled.
    """
    reason = obstacle(task, shared, plan)
    if plan.threads > 1:
        reason = "there is more than one thread per worker"
    if reason or has_hooks(shared.model):
        raise _refused(reason or "parameters or modules have hooks")
    forms = _fetch_forms(plan, fetch)
    return CompiledPasses(task, shared.model, [_compile(task, shared, plan, f) for f in forms])


def _compile(task: Task, shared: SharedState, plan: Plan, form: BatchForm) -> CompiledShard:
    """The pass for batches of one form; the buffers are then as they were."""
    kept = [own.clone() for _, own in shared.buffers]
    batch = form.zeros()
    try:
        captured = capture(task, shared.model, batch)
        return CompiledShard(
            captured, shared, tensors_of(batch), portable=plan.numerics == "portable"
        )
    except UntraceableError as error:
        raise _refused(str(error)) from error
    except Exception as error:  # the compiler has many
        raise _refused(first_line(error)) from error
    finally:
        for (_, own), value in zip(shared.buffers, kept, strict=True):
            own.copy_(value)


@lru_cache
def versions() -> dict[str, str]:
    """What compiled kernels are made by: other bits elsewhere. For the numerics profile."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    command = get_cpp_compiler()
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    return {
        "torch": torch.__version__,
        "compiler": version.stdout.splitlines()[0].encode("ascii", "replace").decode()[:120],
        "vectors": str(pick_vec_isa()),
    }


def compiler() -> str:
    """What kernels are compiled by here, in words: to be the same on all hosts of a job."""
    try:
        made_by = versions()
    except Exception as error:  # the reason for refusing the job, where it is set up here
        return f"none: {first_line(error)}".encode("ascii", "replace").decode()[:200]
    return f"{made_by['compiler']}, {made_by['vectors']}"


def _refused(reason: str) -> TaskError:
    return TaskError(
        "the loss cannot be compiled",
        expected="a loss that is a graph of tensor operations, one thread per worker, and g++",
        found=reason,
        fix=FIX,
    )


def _sizes(plan: Plan) -> list[int]:
    """How many samples a shard may have: the last batch of a data epoch may be short."""
    sampling = plan.sampling
    spans = (
        sampling.shard_span(step, shard)
        for step in (0, sampling.steps_per_epoch - 1)
        for shard in range(plan.shards)
    )
    return sorted({stop - start for start, stop in spans} - {0}, reverse=True)


def _fetch_forms(plan: Plan, fetch: Fetch) -> Iterator[BatchForm]:
    """The forms of this job's batches.

    Raises:
        TaskError: a batch cannot be fetched, or holds more than tensors.
    """
    answer = ask_fork(lambda: FORMS.encode(_forms(_sizes(plan), fetch)), FETCH_SECONDS)
    found = FORMS.decode(answer) if answer else FetchedForms(problem="fetching a batch failed")
    if found.problem:
        raise _refused(found.problem)
    yield from found.forms


def _forms(sizes: Sequence[int], fetch: Fetch) -> FetchedForms:
    """Called in a fork."""
    forms = []
    for size in sizes:
        try:
            batch = fetch(0, list(range(size)))
        except BaseException as error:  # the user's code may call sys.exit()
            return FetchedForms(problem=f"a batch of {size} samples: {error!r}")
        tensors = checked_tensors(batch)
        if tensors is None or not all(each.is_contiguous() for each in tensors):
            return FetchedForms(
                problem=f"a batch, a {type(batch).__name__}, holds more than contiguous tensors"
            )
        container = type(batch).__name__
        forms.append(
            BatchForm(
                container="tensor" if isinstance(batch, torch.Tensor) else container,  # type: ignore[arg-type]
                keys=tuple(batch) if isinstance(batch, dict) else (),
                dtypes=tuple(str(each.dtype).removeprefix("torch.") for each in tensors),
                shapes=tuple(tuple(each.shape) for each in tensors),
            )
        )
    return FetchedForms(forms=tuple(forms))
