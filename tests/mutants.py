"""Break the methods of a page's extensions, one at a time, and run the page.

How it works
    Every class that descends from one of BackPACK's base classes is caught when its
    ``class`` statement runs, through a hook on the base class (``__init_subclass__``).
    So inherited, nested and generated classes are found, and pages run unchanged.
Survey
    The page runs once. Where a method is called, all mutants are tried on the side: at
    calls 1, 2, 4, 8, ... and at each with new shapes or a new subset. A mutant that
    never changes the returned value has *no effect* and is not made.
Hunt
    The page runs again. When a class is defined, the process forks once for each of
    its mutants; the copy breaks its method and runs the rest of the page. So what
    stands before a class runs only once, and what stands after the last one only in
    the copies.
"""

import contextlib
import copy
import inspect
import json
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from backpack.core.derivatives.basederivatives import BaseDerivatives
from backpack.extensions import BatchGrad
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.module_extension import ModuleExtension
from pages import Outcome, execute, run_forked
from torch import Tensor
from torch.func import functional_call, jacrev, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

ROOTS = (ModuleExtension, BaseDerivatives, BackpropExtension)
WORKERS = 2  # mutants that run at the same time


class NotHereError(Exception):
    """This mutant can't be made of this call."""


class AllStarted(BaseException):  # noqa: N818
    """A process has been forked for the last mutant: no need to run on."""


class Call:
    """One call of a method: what comes in and, on demand, what comes out."""

    def __init__(self, function: Callable, args: tuple, kwargs: dict, owner: type):
        """Store the call; nothing is computed yet."""
        self.function, self.owner = function, owner
        self.bound = inspect.signature(function).bind(*args, **kwargs)

    def run(self) -> Any:
        """Call the method as it is on the page."""
        return self.function(*self.bound.args, **self.bound.kwargs)

    def run_with(self, position: int, value: Any) -> Any:
        """Call the method with another value at one position."""
        args = list(self.bound.args)
        args[position] = value
        return self.function(*args, **self.bound.kwargs)

    def find(self, kind: type) -> Any:
        """Return the first argument of a kind, or None."""
        return next((a for a in self.bound.args if isinstance(a, kind)), None)

    @property
    def module(self) -> torch.nn.Module:
        """Return the layer that the method was called for."""
        module = self.find(torch.nn.Module)
        if module is None or not hasattr(module, "input0"):
            raise NotHereError
        return module

    @property
    def incoming(self) -> tuple[int, Tensor]:
        """Return V, or the gradient where there is no V, and its position."""
        at = next(i for i, a in enumerate(self.bound.args) if a is self.module)
        args = self.bound.args
        if len(args) > at + 3 and isinstance(args[at + 3], Tensor):
            return at + 3, args[at + 3]
        if len(args) > at + 2 and isinstance(args[at + 2], tuple):
            return at + 2, args[at + 2][0]
        raise NotHereError

    def run_with_incoming(self, change: Callable[[Tensor], Tensor]) -> Any:
        """Call the method with V, or the gradient, changed."""
        position, tensor = self.incoming
        changed = change(tensor)
        if isinstance(self.bound.args[position], tuple):
            changed = (changed, *self.bound.args[position][1:])
        return self.run_with(position, changed)

    def inputs_for(self, function: Callable) -> list[Tensor]:
        """Return tensors that a function returned by the method accepts."""
        module, accepted = self.module, []
        for like in (*module.parameters(), module.input0, module.output):
            x = torch.linspace(-1, 2, 2 * like.numel()).to(like).reshape(2, *like.shape)
            with contextlib.suppress(Exception):
                function(x)
                accepted.append(x)
        return accepted

    @property
    def kind(self) -> str:
        """Return what makes this call unlike others: the shapes and the subset."""
        tensors = tree_flatten((self.bound.args, vars(self.find(torch.nn.Module))))[0]
        shapes = [list(t.shape) for t in tensors if isinstance(t, Tensor)]
        return f"{shapes} {self.subset} {type(self.find(BackpropExtension))}"

    @property
    def subset(self) -> list[int] | None:
        """Return the samples that BackPACK was asked to consider."""
        if "subsampling" in self.bound.arguments:
            return self.bound.arguments["subsampling"]
        extension = self.find(BackpropExtension)
        return None if extension is None else extension._subsampling

    def run_with_subset(self, subset: list[int] | None) -> Any:
        """Call the method with another subset."""
        if "subsampling" in self.bound.arguments:
            bound = copy.copy(self.bound)
            bound.arguments = {**self.bound.arguments, "subsampling": subset}
            return self.function(*bound.args, **bound.kwargs)
        extension = self.find(BackpropExtension)
        if extension is None:
            raise NotHereError
        extension.get_subsampling = lambda: subset
        try:
            return self.run()
        finally:
            del extension.get_subsampling

    def sample_axis(self, tensor: Tensor) -> int:
        """Return which axis of a tensor runs over samples."""
        module = self.module
        sizes = {len(module.input0), len(self.subset or [])}
        tails = {tuple(p.shape) for p in module.parameters()}
        tails |= {tuple(module.input0.shape[1:]), tuple(module.output.shape[1:])}
        for axis in range(tensor.ndim):
            size, tail = tensor.shape[axis], tuple(tensor.shape[axis + 1 :])
            if size in sizes and tail in tails:
                return axis
        raise NotHereError


# ---------------------------------------------------------------------------
# The mutants. Each takes a call and returns the wrong value.
# ---------------------------------------------------------------------------
def of_result(change: Callable[[Tensor, Call], Any]) -> Callable[[Call], Any]:
    """Make a mutant that changes each tensor, number or function returned."""

    def mutate(call: Call) -> Any:
        return change_leaves(call.run(), lambda leaf: change(leaf, call))

    return mutate


def change_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """Change what a value consists of, leaf by leaf."""
    leaves, structure = tree_flatten(value)
    changed, hits = [], 0
    for leaf in leaves:
        try:
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                new = change(leaf)
            elif isinstance(leaf, float):
                new = change(torch.tensor(leaf)).item()
            elif callable(leaf):
                new = _change_later(leaf, change)
            else:
                raise NotHereError
            hits += 1
        except NotHereError:
            new = leaf
        changed.append(new)
    if not hits:
        raise NotHereError
    return tree_unflatten(changed, structure)


def _change_later(function: Callable, change: Callable) -> Callable:
    """Change what a returned function returns."""
    return lambda *args, **kwargs: change_leaves(function(*args, **kwargs), change)


def negate(call: Call) -> Any:
    """Turn the sign, or the answer of a yes-or-no method."""
    result = call.run()
    if isinstance(result, bool):
        return not result
    return change_leaves(result, torch.neg)


def offset(tensor: Tensor, call: Call) -> Tensor:
    """Add a constant of a tenth of the largest entry."""
    largest = tensor.abs().max().item() if tensor.numel() else 0.0
    return tensor + 0.1 * (largest or 1.0)


def roll_samples(tensor: Tensor, call: Call) -> Tensor:
    """Give each sample the result of the one before."""
    return tensor.roll(1, call.sample_axis(tensor))


def roll_features(tensor: Tensor, call: Call) -> Tensor:
    """Give each feature the result of the one before."""
    if tensor.ndim == 0:
        raise NotHereError
    try:
        if call.sample_axis(tensor) == tensor.ndim - 1:
            raise NotHereError("the last axis runs over samples")
    except NotHereError as error:
        if error.args:
            raise
    return tensor.roll(1, -1)


def roll_further(tensor: Tensor, call: Call) -> Tensor:
    """Roll the first axis between samples and features."""
    axis = call.sample_axis(tensor) + 1
    if axis >= tensor.ndim - 1:
        raise NotHereError
    return tensor.roll(1, axis)


def transpose(tensor: Tensor, call: Call) -> Tensor:
    """Swap two axes of the same size."""
    if tensor.ndim > 1:
        for pair in ((-1, -2), (0, -1)):
            if tensor.shape[pair[0]] == tensor.shape[pair[1]]:
                return tensor.transpose(*pair)
    raise NotHereError


def lose_sample(tensor: Tensor, call: Call) -> Tensor:
    """Zero the last sample."""
    axis = call.sample_axis(tensor)
    return tensor.index_fill(
        axis, torch.tensor([tensor.shape[axis] - 1]).to(tensor.device), 0
    )


def lose_feature(tensor: Tensor, call: Call) -> Tensor:
    """Zero the last feature."""
    if tensor.ndim == 0 or tensor.shape[-1] == 1:
        raise NotHereError
    return torch.cat([tensor[..., :-1], torch.zeros_like(tensor[..., -1:])], -1)


def lose_column(tensor: Tensor, call: Call) -> Tensor:
    """Zero the last column of V, which is its first axis."""
    if call.sample_axis(tensor) != 1:
        raise NotHereError
    return torch.cat([tensor[:-1], torch.zeros_like(tensor[-1:])])


def coming_in(change: Callable[[Tensor, Call], Tensor]) -> Callable[[Call], Any]:
    """Make a mutant that changes V, or the gradient, before the method sees it."""
    return lambda call: call.run_with_incoming(lambda tensor: change(tensor, call))


def pass_through(call: Call) -> Tensor:
    """Return V, or the gradient, as it came: the Jacobian forgotten."""
    result, incoming = call.run(), call.incoming[1]
    if not isinstance(result, Tensor) or result.shape != incoming.shape:
        raise NotHereError
    return incoming


def square_wrong(sum_first: str) -> Callable[[Call], Any]:
    """Make a mutant of a sum of squares that squares at the wrong place.

    The terms come from autodiff, whatever the layer, and the mutant is made only
    where the right order of squares and sums gives what the method returns.
    """

    def mutate(call: Call) -> Tensor:
        result = call.run()
        terms = gradient_terms(call)  # [C, N, outputs, parameters]
        samples, shape = terms.shape[1], call.parameter.shape
        for axes, sizes in (
            ((0, 1), shape),
            (0, (samples, *shape)),
            ((0, 2), (samples,)),
        ):
            right = terms.sum(2).square().sum(axes).reshape(sizes)
            if isinstance(result, Tensor) and _close(right, result):
                break
        else:
            raise NotHereError
        if sum_first == "nothing":
            wrong = terms.square().sum(2)
        elif sum_first == "columns":
            wrong = terms.sum(2).sum(0, keepdim=True).square()
        elif axes == (0, 1):
            wrong = terms.sum(2).sum(1, keepdim=True).square()
        else:
            raise NotHereError
        return wrong.sum(axes).reshape(result.shape)

    return mutate


def gradient_terms(call: Call) -> Tensor:
    """Return V[c, n, o] * J[n, o, p]: their sum over o is the backpropagated V."""
    module, parameters = call.module, dict(call.module.named_parameters())
    names = [
        call.function.__name__,
        *(a for a in call.bound.args if isinstance(a, str)),
    ]
    name = next((name for name in names if name in parameters), None)
    if name is None:
        raise NotHereError
    call.parameter = parameter = parameters[name]
    x, V = module.input0.detach(), call.incoming[1].detach()
    V = V.reshape(
        -1,
        len(V) if V.shape == module.output.shape else V.shape[1],
        *module.output.shape[1:],
    )
    if call.subset is not None:
        V = V if V.shape[1] == len(call.subset) else V[:, call.subset]
        x = x[call.subset]
    # The first is what we return, the second what jacrev holds on its way.
    if V.numel() * max(parameter.numel(), module.output[0].numel()) > 2e7:
        raise NotHereError

    def output(value: Tensor, x_n: Tensor) -> Tensor:
        return functional_call(_Bare(module), {f"module.{name}": value}, x_n[None])[0]

    J = vmap(jacrev(output), (None, 0))(parameter.detach(), x)
    C, N = V.shape[:2]
    return V.reshape(C, N, -1, 1) * J.reshape(1, N, -1, parameter.numel())


class _Bare(torch.nn.Module):
    """A layer without its hooks."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module.forward(x)


def ignore_subset(call: Call) -> Any:
    """Return the result for all samples."""
    return call.run_with_subset(None)


def shift_subset(call: Call) -> Any:
    """Return the result for the samples next to those asked for."""
    if call.subset is None:
        raise NotHereError
    N = len(call.module.input0)
    return call.run_with_subset([(n + 1) % N for n in call.subset])


def without_method(call: Call) -> Any:
    """Return what the method of the parent class returns, if there is one."""
    instance, *args = call.bound.args
    parent = getattr(super(call.owner, instance), call.function.__name__)
    return parent(*args, **call.bound.kwargs)


REMOVED = "method removed"  # its function is for the survey; the hunt does remove it
SUBSET_IGNORED = "subset ignored"
MUTANTS: dict[str, Callable[[Call], Any]] = {
    "scaled by 1.5": of_result(lambda tensor, _: 1.5 * tensor),
    "scaled by 1.01": of_result(lambda tensor, _: 1.01 * tensor),
    "zeroed": of_result(lambda tensor, _: torch.zeros_like(tensor)),
    "negated": negate,
    "absolute value": of_result(lambda tensor, _: tensor.abs()),
    "offset": of_result(offset),
    "samples rolled": of_result(roll_samples),
    "features rolled": of_result(roll_features),
    "further axis rolled": of_result(roll_further),
    "transposed": of_result(transpose),
    "a sample lost": of_result(lose_sample),
    "a feature lost": of_result(lose_feature),
    "a column of V lost": of_result(lose_column),
    "samples rolled on the way in": coming_in(roll_samples),
    "features rolled on the way in": coming_in(roll_features),
    "a sample lost on the way in": coming_in(lose_sample),
    "a column of V lost on the way in": coming_in(lose_column),
    "Jacobian forgotten": pass_through,
    "samples summed before the square": square_wrong("samples"),
    "columns summed before the square": square_wrong("columns"),
    "squared before the sum over features": square_wrong("nothing"),
    SUBSET_IGNORED: ignore_subset,
    "subset shifted": shift_subset,
    "None returned": lambda call: (call.run(), None)[1],
    REMOVED: without_method,
}


# ---------------------------------------------------------------------------
# Find the classes
# ---------------------------------------------------------------------------
class Watcher:
    """Calls ``found(key, cls, name, owner)`` for each method of each class of a page.

    ``owner`` is the class that holds the method: ``cls`` itself or a mixin.
    """

    def __init__(self, page: Path, found: Callable[[str, type, str, type], None]):
        """Hook into BackPACK's base classes, in this process, for good."""
        self.page, self.found = page, found
        for root in ROOTS:
            root.__init_subclass__ = classmethod(self._class_defined)

    def _class_defined(self, cls: type, **kwargs: Any) -> None:
        if cls.__module__.startswith("backpack."):
            return
        if any(part.startswith("Wrong") for part in cls.__qualname__.split(".")):
            return
        for name, owner in own_methods(cls).items():
            line = plain(owner.__dict__[name]).__code__.co_firstlineno
            label = cls.__qualname__.replace("<locals>.", "")
            self.found(f"{label}.{name}:{line}", cls, name, owner)


def own_methods(cls: type) -> dict[str, type]:
    """Return the methods that a page's class has not from BackPACK, and whence.

    Its own and those of mixins; those of a parent that descends from BackPACK were
    found when the parent was defined.
    """
    methods = {}
    for owner in cls.__mro__:
        if owner.__module__.split(".")[0] in ("backpack", "builtins", "abc", "typing"):
            continue
        if owner is not cls and issubclass(owner, ROOTS):
            continue
        for name, value in owner.__dict__.items():
            is_method = inspect.isfunction(plain(value))
            if is_method and not name.startswith("__") and name not in methods:
                methods[name] = owner
    return methods


def plain(method: Any) -> Any:
    """Return the function inside a static, class or plain method."""
    return getattr(method, "__func__", method)


def replace(cls: type, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace a method by ``make(method)``."""
    old = inspect.getattr_static(cls, name)
    new = wraps(plain(old))(make(plain(old)))
    new.__signature__ = inspect.signature(plain(old))
    setattr(cls, name, type(old)(new) if plain(old) is not old else new)


def remove(cls: type, name: str) -> None:
    """Remove a method, so that a parent's shows through, if it has one."""
    if name in cls.__dict__:
        delattr(cls, name)
    else:  # from a mixin
        setattr(cls, name, property())


# ---------------------------------------------------------------------------
# Survey: which methods are there, and which mutants change what they return
# ---------------------------------------------------------------------------
def survey(page: Path) -> Outcome:
    """Run the page once; the value maps each method to what was learned about it."""
    methods: dict[str, dict] = {}
    inside: list[str] = []

    def found(key: str, cls: type, name: str, owner: type) -> None:
        entry = {"calls": 0, "subset": "not read", "no effect": [*MUTANTS]}
        methods.setdefault(key, entry)
        replace(cls, name, lambda function: watched(key, function, owner))

    def watched(key: str, function: Callable, owner: type) -> Callable:
        entry, kinds = methods[key], set()

        def method(*args: Any, **kwargs: Any) -> Any:
            entry["calls"] += 1
            call = Call(function, args, kwargs, owner)
            inside.append(key)
            try:
                result = call.run()
            finally:
                inside.pop()
            if "subsampling" in inspect.signature(function).parameters or isinstance(
                call.find(BackpropExtension), BatchGrad
            ):
                note_read(key, call.bound.arguments.get("subsampling"))
            is_new = call.kind not in kinds or entry["calls"].bit_count() == 1
            if entry["no effect"] and is_new:
                kinds.add(call.kind)
                seen = run_forked(
                    lambda: [
                        m for m in entry["no effect"] if has_effect(m, call, result)
                    ]
                )
                if seen.code:
                    raise RuntimeError(f"{key}: {seen}")
                entry["no effect"] = [
                    m for m in entry["no effect"] if m not in seen.value
                ]
            return result

        return method

    def note_read(key: str, subset: list[int] | None) -> None:
        if subset is not None:
            methods[key]["subset"] = "used"
        elif methods[key]["subset"] == "not read":
            methods[key]["subset"] = "read"

    def get_subsampling(self: BackpropExtension) -> list[int] | None:
        if inside:
            note_read(inside[-1], self._subsampling)
        return self._subsampling

    def run() -> dict:
        start = time.perf_counter()
        BackpropExtension.get_subsampling = get_subsampling
        Watcher(page, found)
        execute(page.read_text(), page)
        for entry in methods.values():
            no_effect = entry["no effect"]
            if entry["subset"] == "read" and REMOVED not in no_effect:
                # It reads the subset, but was never asked for one: still to be shown.
                no_effect[:] = [m for m in no_effect if m != SUBSET_IGNORED]
        return {"methods": methods, "seconds": time.perf_counter() - start}

    return run_forked(run, limit=600)


def has_effect(mutant: str, call: Call, result: Any) -> bool:
    """Tell whether a mutant changes what this call returns (or makes it fail)."""
    try:
        return differ(MUTANTS[mutant](call), result, call)
    except NotHereError:
        return False
    except Exception:
        return True


def differ(first: Any, second: Any, call: Call) -> bool:
    """Tell whether two values differ by more than rounding.

    Two functions differ if they return different values for the same tensors.
    """
    if isinstance(first, bool) or isinstance(second, bool):
        return bool(first) != bool(second)
    leaves, structure = tree_flatten(first)
    others, other_structure = tree_flatten(second)
    if structure != other_structure:
        return True
    for one, other in zip(leaves, others, strict=True):
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            if not _close(one, other):
                return True
        elif callable(one) and callable(other):
            if any(differ(one(x), other(x), call) for x in call.inputs_for(other)):
                return True
        elif one != other:
            return True
    return False


def _close(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return False
    tolerance = 1e-4 if second.dtype == torch.float32 else 1e-8
    finite = second[second.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    return torch.allclose(
        first.to(second), second, tolerance, tolerance * scale, equal_nan=True
    )


# ---------------------------------------------------------------------------
# Hunt: run the page once for each mutant
# ---------------------------------------------------------------------------
def hunt(page: Path, mutants: dict[str, list[str]], seconds: float) -> Outcome:
    """Run the page with each mutant; the value lists how each of them ended.

    ``mutants`` maps the key of a method to the mutants to make of it; ``seconds`` is
    how long the page takes.
    """
    results = Path(tempfile.mkstemp(suffix=".jsonl")[1])
    todo = copy.deepcopy(mutants)
    running: dict[int, tuple[str, str]] = {}
    me: list[tuple[str, str]] = []  # in a forked copy: the mutant that it is

    def found(key: str, cls: type, name: str, owner: type) -> None:
        if not me:
            for mutant in todo.pop(key, []):
                while len(running) >= WORKERS:
                    wait()
                if pid := os.fork():
                    running[pid] = (key, mutant)
                else:
                    me.append((key, mutant))
                    signal.setitimer(signal.ITIMER_REAL, max(60, 6 * seconds))
                    break
        if me and me[0][0] == key:
            break_method(cls, name, me[0][1])
        if not me and not todo:
            raise AllStarted

    def wait() -> None:
        pid, status = os.wait()
        key, mutant = running.pop(pid)
        if os.WIFSIGNALED(status):
            how = signal.Signals(os.WTERMSIG(status)).name
            report(key, mutant, "took too long or crashed", how)

    def report(key: str, mutant: str, outcome: str, how: str) -> None:
        line = {"method": key, "mutant": mutant, "outcome": outcome, "how": how}
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def run() -> list[dict]:
        Watcher(page, found)
        failure = None
        try:
            if todo:
                execute(page.read_text(), page)
        except AllStarted:
            pass
        except BaseException as error:
            if not isinstance(error, SystemExit) or error.code not in (None, 0):
                failure = error
        if me:
            outcome = "survived" if failure is None else "killed"
            report(*me[0], outcome, "" if failure is None else reason(failure, page))
            os._exit(0)
        while running:
            wait()
        if failure is not None:
            raise failure
        if missed := [key for key in mutants if key in todo]:
            raise RuntimeError(f"not defined when the page ran again: {missed}")
        return [json.loads(line) for line in results.read_text().splitlines()]

    try:
        return run_forked(run, limit=1800)
    finally:
        results.unlink()


def break_method(cls: type, name: str, mutant: str) -> None:
    """Put a mutant in the place of a method."""
    if mutant == REMOVED:
        return remove(cls, name)

    def make(function: Callable) -> Callable:
        def method(*args: Any, **kwargs: Any) -> Any:
            call = Call(function, args, kwargs, cls)
            try:
                return MUTANTS[mutant](call)
            except NotHereError:
                return call.run()

        return method

    replace(cls, name, make)


def reason(error: BaseException, page: Path) -> str:
    """Say in one line how a page failed: error, line of the page, message."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(page)
    ]
    where = f"line {frames[0].lineno}" if frames else "unknown line"
    message = str(error).strip().split("\n")[0][:100]
    return f"{type(error).__name__} at {where}: {message}"
