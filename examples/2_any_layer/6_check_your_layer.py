r"""
Check your own layer
====================

After this page you can test the extensions of a layer of your own: put them in at one
place, run the script, and read which method is right, which is wrong, and which mistake
it most likely holds.

We will:

1. mark the place for your layer, filled with the scale module;
2. build the right answers by autodiff, and call each method on its own;
3. write down what the classic mistakes would return, so that they can be named;
4. build networks, and compare what BackPACK stores in them;
5. run everything: a table, a figure, a diagnosis;
6. let it find the mistakes in a gallery of wrong extensions.

You should know how an extension is written: see `Individual gradients
<../1_scale_module/2_individual_gradients.html>`_ and `The GGN diagonal, backpropagated
<../1_scale_module/4_ggn_diagonal.html>`_. The letters: N samples, T steps of a
sequence, D features, C columns of the backpropagated square root V. By *extension* this
page means your module extension; those of BackPACK are called by their names.

To use it, download this page as a script, edit the place that is marked, near the top,
and run it. It needs PyTorch, BackPACK, einops and matplotlib, and no other file. It
prints the report of your layer, shows it as a figure, and waits until you close the
window. If a check of your layer fails, the script ends there, with an error and a
non-zero exit code. If all pass, it goes on to the gallery. You can delete that part:
all below the mark ``YOU CAN DELETE ALL BELOW``.

PyTorch warns that a full backward hook is firing. This is harmless: see `A layer
BackPACK does not know <../1_scale_module/1_module.html>`_.
"""

import textwrap
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from math import prod
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from backpack import backpack, extend
from backpack.custom_module.branching import Parallel
from backpack.extensions import BatchGrad, DiagGGNExact
from backpack.extensions.firstorder.base import FirstOrderModuleExtension
from backpack.extensions.module_extension import ModuleExtension
from backpack.utils.subsampling import subsample
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.autograd.graph import saved_tensors_hooks

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# %%
# What the tool needs to know about a layer.


@dataclass
class Layer:
    """What is to be checked.

    Args:
        make_module: Builds your module, called without arguments: its class or a
            ``lambda``.
        sample_shapes: Shapes of one sample, without the batch axis. Your module is
            checked on all that its ``forward`` accepts.
        batch_grad: Your extension class for ``BatchGrad``, or ``None``.
        diag_ggn: Your extension class for ``DiagGGNExact``, or ``None``.
    """

    make_module: Callable[[], nn.Module]
    sample_shapes: list[tuple[int, ...]]
    batch_grad: Callable[[], ModuleExtension] | None = None
    diag_ggn: Callable[[], ModuleExtension] | None = None

    def __post_init__(self):
        """Refuse objects in place of classes, and shapes that are not in a list."""
        for name in ["make_module", "batch_grad", "diag_ggn"]:
            if isinstance(getattr(self, name), nn.Module | ModuleExtension):
                raise TypeError(f"{name}: give the class or a lambda, not an object.")
        if not all(isinstance(shape, tuple) for shape in self.sample_shapes):
            raise TypeError("sample_shapes: give a list of tuples, such as [(4,)].")


# %%
# Put your module and your extensions here
# ----------------------------------------
# **This is the place to edit**, down to the end of ``MY_LAYER``. The scale module
# stands here as an example. Replace it by your module, and its two extensions by yours.

# ----- EDIT FROM HERE -----


class ScaleModule(nn.Module):
    """Multiply the input by one trainable number."""

    def __init__(self, weight: float = 2.0):
        """Store the number as a parameter of shape ``[1]``."""
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight]))

    def forward(self, X: Tensor) -> Tensor:
        """Scale the input ``X`` of shape ``[N, *]``."""
        return self.weight * X


# %%
# The extension for ``BatchGrad``.


class ScaleModuleBatchGrad(FirstOrderModuleExtension):
    """Compute individual gradients for ``ScaleModule``."""

    def __init__(self):
        """Name the parameters for which this class has a method."""
        super().__init__(params=["weight"])

    def weight(
        self,
        ext: BatchGrad,
        module: ScaleModule,
        g_inp: tuple[Tensor | None, ...],
        g_out: tuple[Tensor],
        bp: None,
    ) -> Tensor:
        """Compute individual gradients, shape ``[N, 1]``; ``g_out[0]``: ``[N, *]``."""
        subset = ext.get_subsampling()
        X = subsample(module.input0, subsampling=subset)
        grad_Z = subsample(g_out[0], subsampling=subset)
        return einsum(grad_Z, X, "n ..., n ... -> n").unsqueeze(-1)


# %%
# The extension for ``DiagGGNExact``.


class ScaleModuleDiagGGNExact(ModuleExtension):
    """Compute the exact GGN diagonal of ``ScaleModule``, and send V through it."""

    def __init__(self):
        """Name the parameters for which this class has a method."""
        super().__init__(params=["weight"])

    def weight(
        self,
        ext: DiagGGNExact,
        module: ScaleModule,
        g_inp: tuple[Tensor | None, ...],
        g_out: tuple[Tensor],
        V_out: Tensor,
    ) -> Tensor:
        """Compute the GGN diagonal, shape ``[1]``; ``V_out``: ``[C, N, *]``."""
        V_w = einsum(module.input0, V_out, "n ..., c n ... -> c n")
        return V_w.square().sum().reshape(1)

    def backpropagate(
        self,
        ext: DiagGGNExact,
        module: ScaleModule,
        g_inp: tuple[Tensor | None, ...],
        g_out: tuple[Tensor],
        V_out: Tensor,
    ) -> Tensor:
        """Multiply ``V_out``, ``[C, N, *]``, with the transposed input Jacobian."""
        return module.weight * V_out


# %%
# What to check: samples of shape ``[D]`` and ``[T, D]``, with D = 4 and T = 2.

MY_LAYER = Layer(
    make_module=ScaleModule,
    sample_shapes=[(4,), (2, 4)],
    batch_grad=ScaleModuleBatchGrad,
    diag_ggn=ScaleModuleDiagGGNExact,
)

# ----- TO HERE -----

# %%
# Some advice:
#
# - Parameters may have any shape: ``[]``, ``[1]``, vectors, matrices. Every parameter
#   of the module needs a method in each extension. If you have one extension only,
#   leave out the line of the other.
# - Let features in and out differ if your layer can do that: ``make_module=lambda:
#   MyLayer(4, 3)``. Then run the script again with equal numbers: there, a missing
#   transpose gives wrong numbers instead of an error, and those can be named.
# - The forward pass must not be random. Switch dropout off: ``make_module=lambda:
#   MyLayer().eval()``.
# - Images work too: ``sample_shapes=[(2, 3, 4)]`` is a batch of ``[N, 2, 3, 4]``.
# - If your extensions do not serve ``[N, T, D]``, remove ``(2, 4)`` from the shapes.
#
# The right answers
# -----------------
# For each sample, autodiff gives the Jacobian of the flattened output with respect
# to each parameter and to the input. All right answers, and most wrong ones, follow
# from these Jacobians.
#
# Initial values hide mistakes: a factor that was forgotten does not show if it is one.
# So the module's parameters are moved away from where they start. Their signs stay,
# since a layer may need positive ones. Everything is in float64.


def build_module(layer: Layer) -> nn.Module:
    """Build the module in float64, with parameters away from their initial values."""
    module = layer.make_module().to(device, torch.float64)
    with torch.no_grad():
        for p in module.parameters():
            away = torch.where(p < 0, -1, 1) * torch.rand_like(p)
            p.mul_(1 + 0.3 * torch.rand_like(p)).add_(0.2 * away)
            p.requires_grad_(True)
    return module


# %%
# The Jacobians. The last two arguments serve to compute wrong ones later.


def jacobians(
    module: nn.Module,
    X: Tensor,
    replaced: dict[str, Tensor] | None = None,
    swap: "Swap | None" = None,
) -> dict[str, Tensor]:
    """Compute per-sample Jacobians of the module by autodiff.

    Args:
        module: The module, not extended.
        X: Input, shape ``[N, *]``.
        replaced: Values to use in place of parameters, by name.
        swap: What the backward pass gets to see in place of the truth; see ``Swap``.

    Returns:
        For each parameter, and for the input as ``"input0"``, a tensor ``[N, O, I]``:
        O entries of a sample's output, I entries of the parameter or the sample.
    """
    values = {n: p.detach() for n, p in module.named_parameters(recurse=False)}
    values |= replaced or {}

    def forward(x: Tensor, *parameters: Tensor) -> Tensor:
        """Return the flattened output of one sample ``x``, shape ``[O]``."""
        named = dict(zip(values, parameters, strict=True))
        return torch.func.functional_call(module, named, (x.unsqueeze(0),)).flatten()

    samples = []
    for n, x in enumerate(X):
        inputs = {"input0": x, **values}
        with swap.active(inputs, n) if swap else nullcontext():
            samples.append(jacobian(forward, tuple(inputs.values())))
    stacked = [torch.stack(J) for J in zip(*samples, strict=True)]
    stacked = [J.reshape(*J.shape[:2], -1) for J in stacked]
    return dict(zip(["input0", *values], stacked, strict=True))


# %%
# This treats samples one by one. It is right only if the module does so too, and if its
# forward pass is not random. We test that first, for each shape of a sample, and leave
# out the shapes that ``forward`` refuses, or for which it returns one number for a
# sample, without a further axis.


def accepted_shapes(layer: Layer, N: int) -> list[tuple[int, ...]]:
    """Return the sample shapes that the module accepts, and say which it refuses."""
    module, accepted, refused = build_module(layer), [], []
    for shape in layer.sample_shapes:
        X = torch.randn(N, *shape, dtype=torch.float64, device=device)
        try:
            Z = module(X)
            one_by_one = torch.cat([module(x.unsqueeze(0)) for x in X])
            if Z.ndim < 2 or len(Z) != N:
                raise ValueError(
                    f"The output {list(Z.shape)} must be [N, ...], with a second axis."
                )
        except Exception as error:
            refused.append(f"{list(shape)}: {type(error).__name__}: {error}")
            continue
        if not Z.isfinite().all():
            raise ValueError("forward returns numbers that are not finite.")
        text = "Samples depend on each other, or forward is random."
        torch.testing.assert_close(Z, one_by_one, msg=lambda m, t=text: f"{t} {m}")
        accepted.append(shape)
    if not accepted:
        raise ValueError(f"forward refuses all shapes of a sample: {refused}")
    for text in refused:
        print(f"Not checked: {text}")
    return accepted


# %%
# A ``Case`` is one setting in which methods are called by hand: a module, an input, and
# random numbers for what BackPACK would bring to the layer's output: the gradient G,
# and V.


@dataclass(eq=False)
class Case:
    """One setting for calling a method by hand.

    Args:
        column: Name of the setting, as a column of the table.
        module: The module, not extended.
        X: Input, shape ``[N, *]``.
        C: Number of columns of V.
        subset: Samples asked for by subsampling. Default: all.
        first: Whether the layer stands first, so that no one needs its ``g_inp``.
        earlier: A case that the same extension object has treated before.
    """

    column: str
    module: nn.Module
    X: Tensor
    C: int
    subset: list[int] | None = None
    first: bool = False
    earlier: "Case | None" = None

    def __post_init__(self):
        """Draw the gradient G, ``[N, *]``, and V, ``[C, N, *]``, at the output Z."""
        self.Z = self.module(self.X).detach()
        self.G = torch.randn_like(self.Z)
        self.V = self.Z.new_empty(self.C, *self.Z.shape).normal_()
        self.rows = list(range(len(self.X))) if self.subset is None else self.subset

    @cached_property
    def J(self) -> dict[str, Tensor]:
        """Return the per-sample Jacobians, ``[N, O, I]`` each."""
        return jacobians(self.module, self.X)


# %%
# A ``Method`` is a row of the table: its kind, ``BatchGrad`` or ``DiagGGNExact``, and
# its name. Write :math:`J_n` for the Jacobian of sample n's output, with respect to the
# input for ``backpropagate``, and to the parameter otherwise; :math:`G_n` for the
# gradient with respect to this output; and :math:`v_{cn}` for sample n's part of column
# c of V. The right answers are
#
# - individual gradients: :math:`J_n^\top G_n`, for the samples asked for;
# - ``backpropagate``: :math:`J_n^\top v_{cn}` for each column :math:`c`;
# - GGN diagonal: :math:`\sum_n \sum_c (J_n^\top v_{cn})^2`.


class Method(NamedTuple):
    """A method of a module extension; its name is a parameter or ``backpropagate``."""

    kind: str
    name: str

    def __str__(self) -> str:
        """Return ``kind.name``."""
        return f"{self.kind}.{self.name}"

    @property
    def variable(self) -> str:
        """Return what the method differentiates by."""
        return "input0" if self.name == "backpropagate" else self.name


def vjp(J: Tensor, v: Tensor) -> Tensor:
    """Multiply ``v``, ``[..., N, O]``, with ``J``, ``[N, O, I]``; ``[..., N, I]``."""
    return einsum(J, v, "n o i, ... n o -> ... n i")


# %%
# One function for the three formulas, and one that brings the result into the shape it
# should have.


def right_formula(method: Method, case: Case, J: Tensor) -> Tensor:
    """Compute what a method should return from a Jacobian, flattened.

    Args:
        method: The method.
        case: The setting.
        J: Jacobian, ``[N, O, I]``. The right one, or a wrong one to see its effect.

    Returns:
        Individual gradients ``[S, I]`` of the S samples asked for, V ``[C, N, I]``, or
        GGN diagonal ``[I]``.
    """
    N, O, _ = J.shape
    if method.kind == "BatchGrad":
        return vjp(J, case.G.reshape(N, O))[case.rows]
    V = vjp(J, case.V.reshape(-1, N, O))
    return V if method.name == "backpropagate" else V.square().sum((0, 1))


def right_answer(method: Method, case: Case) -> Tensor:
    """Compute what a method should return, in the shape it should have."""
    flat = right_formula(method, case, case.J[method.variable])
    if method.name == "backpropagate":
        return flat.reshape(-1, *case.X.shape)
    shape = getattr(case.module, method.name).shape
    return flat.reshape((*flat.shape[:-1], *shape))


# %%
# To call a method as BackPACK would, we make its five arguments: the running
# ``BatchGrad`` or ``DiagGGNExact``, the layer after a forward pass, both tuples of
# gradients, and V. They are fresh for each call. Methods run without gradient tracking,
# as in a backward pass.


def make_arguments(method: Method, case: Case) -> tuple[Any, ...]:
    """Build the arguments ``ext, module, g_inp, g_out, V_out`` of a method."""
    module = extend(deepcopy(case.module))
    module(case.X.clone().requires_grad_(not case.first))
    g_inp = vjp(case.J["input0"], case.G.reshape(len(case.X), -1))
    g_inp = None if case.first else g_inp.reshape(case.X.shape)
    if method.kind == "BatchGrad":
        ext, V = BatchGrad(subsampling=case.subset), None
    else:
        ext, V = DiagGGNExact(), case.V.clone()
    return ext, module, (g_inp,), (case.G.clone(),), V


def altered_arguments(arguments: tuple[Any, ...], case: Case) -> list[str]:
    """Name what a method changed in place, though it belongs to others."""
    _, module, _, (G,), V = arguments
    before_after = {
        "g_out[0]": (case.G, G),
        "V_out": (case.V, case.V if V is None else V),
        "module.input0": (case.X, module.input0),
        "module.output": (case.Z, module.output),
    }
    for name, parameter in case.module.named_parameters():
        before_after[f"module.{name}"] = (parameter, module.get_parameter(name))
    return [n for n, (old, new) in before_after.items() if not torch.equal(old, new)]


# %%
# Each call gives a ``Result``, which goes into a cell of the table.


@dataclass(eq=False)
class Result:
    """Outcome of one check, which goes into a cell of the table.

    Args:
        row: Name of the row: the method, and the reduction if in a network.
        column: Name of the setting.
        cell: ``"ok"``, or what is wrong in one word, or the relative distance.
        note: One line on what is wrong.
        value: What the method returned.
        case: The setting, for calls by hand.
    """

    row: str
    column: str
    cell: str = "ok"
    note: str = ""
    value: Any = None
    case: Case | None = None

    @property
    def ok(self) -> bool:
        """Return whether the check passed."""
        return self.cell == "ok"


# %%
# The comparison is ``torch.testing.assert_close``, within ``1e-8`` of the largest
# number of the right answer. (This largest number is taken as 1e-4 at least, for right
# answers that are zero.)

TOLERANCE = 1e-8


def relative_distance(actual: Tensor, expected: Tensor) -> float:
    """Return the largest deviation, relative to the largest expected number."""
    scale = expected.abs().max().clamp(min=1e-4)
    return ((actual - expected).abs().max() / scale).item()


def compare(actual: Any, expected: Tensor) -> tuple[str, str]:
    """Compare what was returned with the right answer; return a cell and a note."""
    if not isinstance(actual, Tensor):
        return type(actual).__name__.removesuffix("Type"), f"returns {actual}"
    if actual.shape != expected.shape:
        shapes = f"{list(actual.shape)}, needs {list(expected.shape)}"
        return "shape", f"returns shape {shapes}"
    if actual.device != expected.device:
        return "device", f"returns a tensor on {actual.device}, not {expected.device}"
    if actual.dtype != expected.dtype:
        return "dtype", f"returns {actual.dtype} for {expected.dtype}"
    try:
        atol = TOLERANCE * expected.abs().max().clamp(min=1e-4).item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
    except AssertionError:
        distance = relative_distance(actual, expected)
        return f"{distance:.0e}", f"relative distance {distance:.2g}"
    return "ok", ""


# %%
# One call, with all that can happen: an error, a wrong result, arguments that have
# changed. An error is a failure like any other: its message is kept, and the rest goes
# on.


def call_by_hand(
    make_extension: Callable[[], ModuleExtension], method: Method, case: Case
) -> Result:
    """Call one method of a fresh extension in one setting, and judge its result."""
    result = Result(str(method), case.column, case=case)
    arguments = make_arguments(method, case)
    earlier = make_arguments(method, case.earlier) if case.earlier else None
    try:
        call = getattr(make_extension(), method.name)
        with torch.no_grad():
            if earlier:
                call(*earlier)
            result.value = call(*arguments)
    except Exception as error:
        result.cell, result.note = "raises", f"{type(error).__name__}: {error}"
        return result
    result.cell, result.note = compare(result.value, right_answer(method, case))
    if result.ok and (altered := altered_arguments(arguments, case)):
        result.cell, result.note = "alters", f"changes {', '.join(altered)} in place"
    return result


# %%
# The settings: a batch of N samples and of one, for each shape; a subset of the
# samples, not in order; the layer in first place, so that ``g_inp[0]`` is ``None``; and
# one extension object that treats two layers in turn. N and C differ from each other
# and from all sizes of input and output, so that neither axis can be confused with
# another by luck.


def unused(start: int, taken: set[int]) -> int:
    """Return the smallest number from ``start`` on that is not taken."""
    return start if start not in taken else unused(start + 1, taken)


# %%
# The list of settings. A second function says which of them a method can meet:
# ``DiagGGNExact`` has no subsampling, and ``backpropagate`` does not run if the layer
# is first, unless the input requires a gradient.


def make_cases(layer: Layer) -> list[Case]:
    """Build the settings in which methods are called by hand."""
    taken = {size for shape in layer.sample_shapes for size in shape}
    shapes = accepted_shapes(layer, unused(5, taken))
    for shape in shapes:
        X = torch.randn(1, *shape, dtype=torch.float64, device=device)
        taken |= set(build_module(layer)(X).shape[1:])
    N = unused(5, taken)
    C = unused(3, taken | {N})

    def case(column: str, N: int, shape: tuple[int, ...], **options: Any) -> Case:
        """Build a case with a new module and ``N`` random samples."""
        X = torch.randn(N, *shape, dtype=torch.float64, device=device)
        return Case(column, build_module(layer), X, C, **options)

    cases = []
    for shape in shapes:
        cases += [case(str([size, *shape]), size, shape) for size in (N, 1)]
    for shape in shapes:
        cases.append(case("subset", N, shape, subset=[N - 1, 1]))
    cases.append(case("1st layer", N, shapes[0], first=True))
    cases.append(case("reused", N, shapes[0], earlier=cases[0]))
    return cases


def settings_of(method: Method, cases: list[Case]) -> list[Case]:
    """Return the settings that a method can meet."""
    if method.kind == "BatchGrad":
        return cases
    whole = [case for case in cases if case.subset is None]
    if method.name == "backpropagate":  # runs only if the input needs V
        return [case for case in whole if not case.first]
    return whole


# %%
# What the classic mistakes would return
# --------------------------------------
# A diagnosis is a hypothesis that was tested: we compute what a mistake would return,
# and compare with what the method did return. There are three families. In the first,
# the formula is right, but the Jacobian is wrong, for instance because a factor was
# forgotten, or a matrix not transposed.
#
# People make such mistakes in the backward direction only: the forward pass is right.
# Autodiff can make them too. It saves tensors in the forward pass for use in the
# backward pass, and ``saved_tensors_hooks`` lets us change them on the way: its first
# argument is called when a tensor is saved, its second when it is needed again. We save
# all of them as they are (``detach`` cuts them from the graph, as PyTorch requires),
# and recognize the tensor to be swapped by the address of its memory.


@dataclass
class Swap:
    """A mistake of the backward pass: it sees a wrong tensor.

    Args:
        name: The parameter, or ``"input0"``.
        change: Takes the saved tensor and the sample's number, returns what to use.
    """

    name: str
    change: Callable[[Tensor, int], Tensor]

    def active(self, inputs: dict[str, Tensor], n: int) -> saved_tensors_hooks:
        """Return a context in which sample n's saved tensors are swapped."""
        memory = inputs[self.name].untyped_storage().data_ptr()

        def unpack(saved: Tensor) -> Tensor:
            """Return what the backward pass gets for a saved tensor."""
            same = saved.untyped_storage().data_ptr() == memory
            return self.change(saved, n) if same else saved

        return saved_tensors_hooks(Tensor.detach, unpack)


def neutral(tensor: Tensor) -> tuple[Tensor, str]:
    """Return what changes nothing, as a matrix or entry by entry, and its name."""
    if tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]:
        return torch.eye(len(tensor)).to(tensor), "the identity"
    return torch.ones_like(tensor), "1"


# %%
# We imitate three mistakes by a swap: the output in place of the input, an input or a
# parameter left out, a matrix not transposed. We imitate the first two in a second way:
# we replace the input or the parameter before the forward pass, so both passes see the
# wrong value. The diagnosis marks this way with ``everywhere``. This second way serves
# layers for which autodiff saves neither the input nor the parameters, but for example
# their product: there, a swap finds nothing to change. If both ways fit, one of them is
# reported.


@cache
def varied_jacobians(case: Case) -> dict[str, dict[str, Tensor]]:
    """Compute the module's Jacobians with mistakes, by description."""
    X, Z, one = case.X, case.Z, torch.ones_like(case.X)
    wrong_input = "uses module.output in place of module.input0"
    attempts: dict[str, dict[str, Any]] = {
        f"{wrong_input} (everywhere)": {"X": Z},
        wrong_input: {"swap": Swap("input0", lambda t, n: Z[n].reshape(t.shape))},
        "leaves module.input0 out (as if it were 1, everywhere)": {"X": one},
        "leaves module.input0 out (as if it were 1)": {
            "swap": Swap("input0", lambda t, n: torch.ones_like(t))
        },
    }
    for name, p in case.module.named_parameters(recurse=False):
        value, called = neutral(p)
        text = f"leaves {name} out (as if it were {called}"
        attempts[f"{text})"] = {"swap": Swap(name, lambda t, n: neutral(t)[0])}
        attempts[f"{text}, everywhere)"] = {"replaced": {name: value}}
        if p.ndim == 2:
            transposed = Swap(name, lambda t, n: t.mT)
            attempts[f"missing transpose (of {name})"] = {"swap": transposed}
    varied = {}
    for text, options in attempts.items():
        with suppress(Exception):  # the module cannot be evaluated there
            varied[text] = jacobians(case.module, **({"X": X} | options))
    return varied


# %%
# More wrong Jacobians follow from the right one: samples that do not belong together, a
# missing transpose, a missing coupling of features (only the diagonal of J is used), a
# division in place of a product.


def wrong_jacobians(method: Method, case: Case) -> dict[str, Tensor]:
    """Compute Jacobians ``[N, O, I]`` as mistakes would have them, by description."""
    wanted, J = method.variable, case.J[method.variable]
    wrong = {
        "pairs each sample with the input of the one before": J.roll(1, 0),
        "pairs each sample with the input of the one behind": J.roll(-1, 0),
        "uses the first sample's input for all": J[:1].expand_as(J),
        "keeps what it saw in an earlier layer": (case.earlier or case).J[wanted],
    }

    for description, varied in varied_jacobians(case).items():
        if varied[wanted].shape == J.shape:
            wrong[description] = varied[wanted]
    if J.shape[1] == J.shape[2]:
        wrong["missing transpose (of the Jacobian)"] = J.mT
        wrong["drops the coupling of features"] = J * torch.eye(J.shape[1]).to(J)
        wrong["multiplies with the Jacobian twice"] = J @ J
        # vjp will transpose once more: the inverse of J in place of J transposed
        inverse, failed = torch.linalg.inv_ex(J)
        if not failed.any():
            wrong["divides where it should multiply"] = inverse.mT
    return wrong


# %%
# In the second family, the Jacobian is right, but the formula is wrong. One function
# for each of the three right answers. Where a description says *input*, the code has
# the Jacobian ``J``: with respect to a parameter, it is made of the layer's input.


def wrong_batch_grad(method: Method, case: Case) -> dict[str, Tensor]:
    """Compute what mistakes in the formula for individual gradients would return."""
    J, rows = case.J[method.name], case.rows
    G = case.G.reshape(len(J), -1)
    g, first = vjp(J, G), slice(len(rows))
    mask = torch.zeros_like(g[:, :1])
    mask[rows] = 1
    products = split_features(J * G.unsqueeze(-1), case)
    return {
        "the subset is ignored": g,
        "takes the first samples, not those of the subset": g[first],
        "takes g_out at the subset, the input at the first samples": vjp(
            J[first], G[rows]
        ),
        "takes the input at the subset, g_out at the first samples": vjp(
            J[rows], G[first]
        ),
        "sets samples outside of the subset to zero, does not drop them": mask * g,
        "summed over the samples, as .grad is": g[rows].sum(0),
        "summed over the samples, then repeated": g[rows].sum(0).expand_as(g[rows]),
        "not summed over T": products.sum(2)[rows],
        "not summed over D": products.sum(1)[rows],
        "not summed over T and D": products[rows],
        "leaves g_out out": J.sum(1)[rows],
        "sums input and g_out before the product": (J.sum(1) * G.sum(1, keepdim=True))[
            rows
        ],
    }


# %%
# Some of them treat T and D differently.


def split_features(products: Tensor, case: Case) -> Tensor:
    """Split the axis O of ``[..., O, I]`` into T and D: ``[..., T, D, I]``."""
    return rearrange(products, "... (t d) i -> ... t d i", d=case.Z.shape[-1])


# %%
# For the GGN diagonal, most mistakes are sums and squares that are missing or in a
# wrong order.


def wrong_diag_ggn(method: Method, case: Case) -> dict[str, Tensor]:
    """Compute what mistakes in the formula for the GGN diagonal would return."""
    J = case.J[method.name]
    N, C = len(J), case.C
    V, G = case.V.reshape(C, N, -1), case.G.reshape(N, -1)
    V_p, g = vjp(J, V), vjp(J, G)
    products = split_features(J * V.unsqueeze(-1), case)
    return {
        "squared after the sum over samples": V_p.sum(1).square().sum(0),
        "squared after the sum over the columns of V": V_p.sum(0).square().sum(0),
        "squared after all sums": V_p.sum((0, 1)).square(),
        "squared before the sum over T and D": products.square().sum((0, 1, 2, 3)),
        "squared before the sum over T": products.sum(3).square().sum((0, 1, 2)),
        "squared before the sum over D": products.sum(2).square().sum((0, 1, 2)),
        "input and V summed, then squared, each on its own": (
            J.sum(1).square() * V.sum(2).square().unsqueeze(-1)
        ).sum((0, 1)),
        "not squared": V_p.sum((0, 1)),
        "takes absolute values, not squares": V_p.abs().sum((0, 1)),
        "not summed over samples": V_p.square().sum(0),
        "not summed over the columns of V": V_p.square().sum(1),
        "not summed over samples and columns of V": V_p.square(),
        "uses the first column of V only": V_p[0].square().sum(0),
        "uses the first sample only": V_p[:, 0].square().sum(0),
        "returns V of the parameter, not its squares": V_p,
        "returns the full GGN block": einsum(V_p, V_p, "c n i, c n j -> i j"),
        "squares gradients: g_out in place of V_out": g.square().sum(0),
        "leaves V_out out": J.sum(1).square().sum(0),
    }


# %%
# For ``backpropagate``, mistakes are about what is returned, what is summed, and what V
# is multiplied with. (Some of these have a wrong Jacobian. They stand here because one
# line computes them.)


def wrong_backpropagate(method: Method, case: Case) -> dict[str, Tensor]:
    """Compute what mistakes in ``backpropagate`` would return."""
    J = case.J["input0"]
    N, C = len(J), case.C
    V, G = case.V.reshape(C, N, -1), case.G.reshape(N, -1)
    V_in, g = vjp(J, V), vjp(J, G)
    wrong = {
        "returns V_out unchanged": V,
        "returns the gradient": g,
        "returns the gradient for every column": g.expand_as(V_in),
        "summed over the columns of V": V_in.sum(0),
        "summed over the samples": V_in.sum(1),
    }
    if case.X.shape == case.Z.shape:
        X, Z = case.X.reshape(N, -1), case.Z.reshape(N, -1)
        wrong["multiplies with module.input0, not the Jacobian"] = V * X
        # For a layer f(X) * X, the factor f(X) is Z / X.
        text = "treats a factor that depends on the input as a constant"
        wrong[text] = V * (Z / X)
    for name in [name for name in case.J if name != "input0"]:
        text = f"uses the Jacobian of {name}, not of the input"
        wrong[text] = vjp(case.J[name], V)
    return wrong


# %%
# The third family: right up to the last step, then something happens to the result.


def factors_of(method: Method, case: Case) -> dict[str, int]:
    """Return sizes that may have slipped in or out as a factor."""
    factors = {"2": 2, "N": len(case.X), "T": prod(case.X.shape[1:-1])}
    same = case.X.shape[-1] == case.Z.shape[-1]
    factors["D" if same else "D of the input"] = case.X.shape[-1]
    factors["D" if same else "D of the output"] = case.Z.shape[-1]
    if method.kind == "BatchGrad":
        factors["the size of the subset"] = len(case.rows)
    else:
        factors["C"] = case.C
    return factors


def wrong_last_steps(method: Method, case: Case) -> dict[str, Tensor]:
    """Compute what mistakes at the end of a method would return."""
    right = right_answer(method, case)
    factors = factors_of(method, case)
    wrong = {f"too large by a factor {name}": k * right for name, k in factors.items()}
    wrong |= {f"too small by a factor {name}": right / k for name, k in factors.items()}
    wrong |= {
        "wrong sign": -right,
        "all zeros": torch.zeros_like(right),
        "squared at the end": right.square(),
        "square root at the end": right.abs().sqrt(),
        "absolute value at the end": right.abs(),
    }
    axes = {"samples": 0} if method.kind == "BatchGrad" else {}
    features = right.shape[len(axes) :]
    if method.name == "backpropagate":
        axes, features = {"columns of V": 0, "samples": 1}, right.shape[2:]
    elif len(features) > 1:
        wrong["result transposed"] = right.mT
    if features:
        axes["features"] = -1
    for name, axis in axes.items():
        wrong[f"{name} rolled by one"] = right.roll(1, axis)
        wrong[f"{name} rolled by minus one"] = right.roll(-1, axis)
        wrong[f"{name} in reverse order"] = right.flip(axis)
    return wrong


# %%
# All three families together.


def mistakes(method: Method, case: Case) -> dict[str, Tensor]:
    """Compute what each known mistake would return in one setting."""
    by_jacobian = {
        description: right_formula(method, case, J)
        for description, J in wrong_jacobians(method, case).items()
    }
    if method.kind == "BatchGrad":
        by_formula = wrong_batch_grad(method, case)
    elif method.name == "backpropagate":
        by_formula = wrong_backpropagate(method, case)
    else:
        by_formula = wrong_diag_ggn(method, case)
    return by_jacobian | by_formula | wrong_last_steps(method, case)


# %%
# The diagnosis
# -------------
# A mistake is named only if it predicts what the method returned **in every setting**,
# those that pass included: a factor N does no harm to a batch of one sample, so the
# setting with N = 1 must be right. (Where a mistake cannot be computed, the method must
# be right.) If two mistakes cannot be told apart for this layer, both are named, but
# variants of one mistake, which differ in the text in parentheses only, once. If none
# fits, nor any of the patterns below, the diagnosis is "unknown", with the numbers, or
# with the shapes if these are wrong.


def same_numbers(actual: Tensor, predicted: Tensor) -> bool:
    """Return whether the numbers agree in their order, whatever the shapes."""
    if actual.numel() != predicted.numel():
        return False
    actual, predicted = actual.flatten(), predicted.flatten()
    return relative_distance(actual, predicted) < TOLERANCE


def fitting_mistakes(method: Method, results: list[Result]) -> list[str]:
    """Return the descriptions that predict the values of all results."""
    predictions = [mistakes(method, result.case) for result in results]

    def fits(description: str) -> bool:
        """Return whether a mistake predicts the values of all results."""
        return all(
            same_numbers(result.value, predicted[description])
            if description in predicted
            else result.ok
            for result, predicted in zip(results, predictions, strict=True)
        )

    fitting = [text for text in predictions[0] if fits(text)]
    distinct = {}
    for text in fitting:
        distinct.setdefault(text.split(" (")[0], text)
    return list(distinct.values())


# %%
# If no known mistake fits, some patterns are still worth a name: a constant factor, a
# constant offset, the right numbers in another order, or a parameter that is missing as
# a factor, or is a factor too many.


def parameter_factor(method: Method, results: list[Result]) -> str | None:
    """Name a parameter that is missing as a factor, or is a factor too many."""
    for name, _ in results[0].case.module.named_parameters(recurse=False):
        missing, too_much = [], []
        for result in results:
            p = result.case.module.get_parameter(name).detach()
            right = right_answer(method, result.case)
            if p.numel() > 1 and p.shape != right.shape[-1:]:
                break
            missing.append(same_numbers(result.value * p, right))
            too_much.append(same_numbers(result.value, right * p))
        else:
            if all(missing) or all(too_much):
                return f"a factor {name} {'is missing' if all(missing) else 'too many'}"
    return None


# %%
# Some layers couple features, as normalization does: each entry of the output depends
# on all entries of the input. If V was scaled entry by entry, the coupling is missing.


def misses_coupling(results: list[Result]) -> bool:
    """Return whether V was scaled entry by entry, while the Jacobian couples them."""
    for result in results:
        case, J = result.case, result.case.J["input0"]
        if case.X.shape != case.Z.shape or torch.equal(
            J, J * torch.eye(len(J[0])).to(J)
        ):
            return False
        scale = result.value / case.V
        if not relative_distance(scale, scale[:1].expand_as(scale)) < TOLERANCE:
            return False
    return True


# %%
# All patterns, from the more to the less special.


def fitting_patterns(method: Method, results: list[Result]) -> list[str]:
    """Describe how the values of all results differ from the right answers."""
    expected = [right_answer(method, result.case) for result in results]
    pairs = [(r.value, e) for r, e in zip(results, expected, strict=True)]
    if any(a.shape != e.shape for a, e in pairs):
        return []
    factors = torch.stack([(a * e).sum() / e.square().sum() for a, e in pairs])
    offsets = torch.stack([(a - e).mean() for a, e in pairs])
    factor, offset = factors.mean(), offsets.mean()
    if all(same_numbers(a, factor * e) for a, e in pairs):
        return [f"wrong by a constant factor {factor:.6g}"]
    if all(same_numbers(a, offset + e) for a, e in pairs):
        return [f"wrong by a constant offset {offset:.6g}"]
    if all(same_numbers(a.flatten().msort(), e.flatten().msort()) for a, e in pairs):
        return ["the right numbers in a wrong order"]
    if text := parameter_factor(method, results):
        return [text]
    if method.name == "backpropagate" and misses_coupling(results):
        return ["treats each feature on its own: the coupling is missing"]
    return []


# %%
# Where a method fails says something as well. And an extension may rely on what its
# parameter methods have stored: BackPACK skips these for frozen parameters.


def where(results: list[Result], failing: list[bool]) -> str:
    """Say what the failing settings have in common, and the others do not."""
    common = {
        "with a subset (slice g_out[0] and module.input0, both)": lambda c: c.subset,
        "in first place, where g_inp[0] is None": lambda c: c.first,
        "when the extension has treated another layer before": lambda c: c.earlier,
        "for [N, T, D]": lambda c: c.X.ndim > 2,
        "for [N, D]": lambda c: c.X.ndim == 2,
        "for a batch of one sample": lambda c: len(c.X) == 1,
        "for more than one sample": lambda c: len(c.X) > 1,
    }
    for text, holds in common.items():
        if failing == [bool(holds(r.case)) for r in results] and not all(failing):
            return f" only {text}"
    count = "all" if all(failing) else f"{failing.count(True)} of {len(failing)}"
    return f" in {count} settings"


# %%
# This one tries again after the parameter methods have been called.


def needs_parameter_methods(layer: Layer, method: Method, case: Case) -> bool:
    """Return whether ``backpropagate`` needs what the parameter methods store."""
    if method.name != "backpropagate":
        return False
    arguments = make_arguments(method, case)
    try:
        extension = layer.diag_ggn()
        with torch.no_grad():
            for name, _ in case.module.named_parameters(recurse=False):
                getattr(extension, name)(*arguments)
            value = extension.backpropagate(*arguments)
    except Exception:
        return False
    return compare(value, right_answer(method, case))[0] == "ok"


# %%
# All together: what a reader of the report sees for a method that fails. What relies on
# the parameter methods comes first, then errors, then results of a wrong type or with
# changed arguments, then right numbers in a wrong shape. Only after that are the
# mistakes tried.


UNRELATED_TO_NUMBERS = ("dtype", "device", "alters")


def diagnose(layer: Layer, method: Method, results: list[Result]) -> str:
    """Name what is wrong with a method, from all results of calls by hand."""
    failing = [result for result in results if not result.ok]
    first = failing[0]
    # The new try sees no earlier layer, so it says nothing about "reused".
    if not first.case.earlier and needs_parameter_methods(layer, method, first.case):
        return "relies on the parameter methods, which are skipped if frozen"
    raising = [result.cell == "raises" for result in results]
    if any(raising):
        return f"raises{where(results, raising)}: {results[raising.index(True)].note}"
    for result in failing:
        if not isinstance(result.value, Tensor) or result.cell in UNRELATED_TO_NUMBERS:
            return result.note
    right = [right_answer(method, result.case) for result in results]
    if all(same_numbers(r.value, e) for r, e in zip(results, right, strict=True)):
        return f"{first.note}; the numbers are right"
    named = fitting_mistakes(method, results) or fitting_patterns(method, results)
    if named:
        return " OR ".join(named)
    numbers = f"{first.column}: {first.note}"
    if first.cell != "shape":
        actual = first.value.flatten()[:3].tolist()
        expected = right_answer(method, first.case).flatten()[:3].tolist()
        shown = [", ".join(f"{v:.4g}" for v in vs) for vs in (actual, expected)]
        numbers += f", returns {shown[0]}, ... where {shown[1]}, ... is right"
    wrong = [not result.ok for result in results]
    return f"unknown; wrong{where(results, wrong)}. {numbers}"


# %%
# Before any call by hand, list the methods that should exist, and find out whether they
# do.


def methods_of(layer: Layer) -> list[Method]:
    """List the methods that the layer's extensions should have."""
    names = [n for n, _ in build_module(layer).named_parameters(recurse=False)]
    first = [Method("BatchGrad", name) for name in names]
    second = [Method("DiagGGNExact", name) for name in [*names, "backpropagate"]]
    return (first if layer.batch_grad else []) + (second if layer.diag_ggn else [])


def factory_of(layer: Layer, kind: str) -> Callable[[], ModuleExtension]:
    """Return what builds the layer's extension for ``BatchGrad`` or the GGN."""
    return layer.batch_grad if kind == "BatchGrad" else layer.diag_ggn


def problem_with(layer: Layer, method: Method) -> tuple[str, str] | None:
    """Return a cell and a note if a method cannot be called at all."""
    try:
        extension = factory_of(layer, method.kind)()
    except Exception as error:
        return "raises", f"cannot be built: {type(error).__name__}: {error}"
    found = getattr(extension, method.name, None)
    # BackPACK's base class has a backpropagate, which sends nothing on.
    inherited = getattr(ModuleExtension, method.name, None)
    if found is None or (inherited and getattr(found, "__func__", None) is inherited):
        return "missing", f"the method {method.name} is missing"
    return None


# %%
# Now all methods, in all settings that they can meet.


def check_by_hand(
    layer: Layer, cases: list[Case]
) -> tuple[list[Result], dict[str, str]]:
    """Call all methods in all settings; return results and diagnoses by method."""
    results, diagnoses = [], {}
    for method in methods_of(layer):
        settings = settings_of(method, cases)
        problem = problem_with(layer, method)
        if problem:
            results += [Result(str(method), c.column, *problem) for c in settings]
            diagnoses[str(method)] = problem[1]
            continue
        make_extension = factory_of(layer, method.kind)
        of_method = [call_by_hand(make_extension, method, c) for c in settings]
        results += of_method
        if not all(result.ok for result in of_method):
            diagnoses[str(method)] = diagnose(layer, method, of_method)
    return results, diagnoses


# %%
# In networks
# -----------
# Methods that are right by hand may still fail inside BackPACK: a name may be missing
# in ``super().__init__(params=[...])``, or a method may use the autograd graph of the
# layer's forward pass, which PyTorch has freed by then. So we also let BackPACK call
# them, in networks. What ``backpropagate`` returns shows in the GGN diagonal of the
# layers before, and in V of the network's input if that requires a gradient.


@dataclass(eq=False)
class Network:
    """A network that holds the layer, with data.

    Args:
        column: Name of the setting, as a column of the table.
        net: The network, not extended. Its output has shape ``[N, C]``; if the layer
            is last, C is the number of entries of the layer's output for one sample.
        layers: The layers in it that are checked.
        X: Input, shape ``[N, *]``.
        loss: Class of the loss.
        subset: Samples asked for by subsampling. Default: all.
        needs_grad: Whether the input requires a gradient.
        frozen: Names of the layer's parameters that are not trained.
    """

    column: str
    net: nn.Sequential
    layers: list[nn.Module]
    X: Tensor
    loss: type[nn.Module] = nn.CrossEntropyLoss
    subset: list[int] | None = None
    needs_grad: bool = False
    frozen: list[str] = field(default_factory=list)

    def __post_init__(self):
        """Compute the output, ``[N, C]``, and draw targets; freeze parameters."""
        self.net = self.net.to(device, torch.float64)
        self.F = self.net(self.X).detach()
        self.y = torch.randn_like(self.F)
        if self.loss is nn.CrossEntropyLoss:
            self.y = self.y.argmax(1)
        self.own = {}
        for path, module in self.net.named_modules():
            if any(module is layer for layer in self.layers):
                self.place = int(path.split(".")[0])
                for name, p in module.named_parameters(recurse=False):
                    self.own[f"{path}.{name}"] = name
                    p.requires_grad_(name not in self.frozen)

    def method_for(self, name: str) -> str | None:
        """Return which of our methods decides on a result, ``None`` if it is none."""
        if name in self.own:
            return self.own[name]
        is_before = name == "input0" or int(name.split(".")[0]) < self.place
        return "backpropagate" if is_before else None

    @cached_property
    def J(self) -> dict[str, Tensor]:
        """Return Jacobians ``[N, C, p]`` for parameters and input of p entries.

        For the input, p counts the entries of all samples.
        """
        values = {name: p.detach() for name, p in self.net.named_parameters()}

        def forward(X: Tensor, *parameters: Tensor) -> Tensor:
            """Return the network's output, shape ``[N, C]``."""
            named = dict(zip(values, parameters, strict=True))
            return torch.func.functional_call(self.net, named, (X,))

        J = jacobian(forward, (self.X, *values.values()))
        return {
            name: j.reshape(*self.F.shape, -1)
            for name, j in zip(["input0", *values], J, strict=True)
        }


# %%
# The networks: the layer first, with and without a gradient for the input; in the
# middle; last, with another loss; two such layers in ``Parallel``, which adds up their
# outputs; each parameter frozen in turn, then all; a subset; one sample. ``Linear``
# acts on the last axis, so these networks serve samples of any shape.


def networks_for(layer: Layer, shape: tuple[int, ...], N: int, C: int) -> list[Network]:
    """Build networks that hold the layer, for one shape of a sample."""
    module = build_module(layer)

    def data(size: int, *shape: int) -> Tensor:
        """Draw ``size`` samples of a shape."""
        return torch.randn(size, *shape, dtype=torch.float64, device=device)

    def encoder() -> list[nn.Module]:
        """Build layers that map ``[N, *, 3]`` to the input of the tested layer."""
        return [nn.Linear(3, shape[-1]), nn.Tanh()]

    def decoder() -> list[nn.Module]:
        """Build layers that map the output of the tested layer to ``[N, C]``."""
        return [nn.Flatten(), nn.Linear(module(data(1, *shape)).numel(), C)]

    def network(column: str, before: list, tested: list, after: list, **options: Any):
        """Build a network, with the tested layers side by side if there are several."""
        options = {"X": data(N, *shape[:-1], 3)} | options
        core = tested[0] if len(tested) == 1 else Parallel(*tested)
        return Network(column, nn.Sequential(*before, core, *after), tested, **options)

    def new(count: int = 1) -> list[nn.Module]:
        """Build new modules, each with parameters of its own."""
        return [build_module(layer) for _ in range(count)]

    def middle(column: str, **options: Any) -> Network:
        """Build a network with the tested layer between others."""
        return network(column, encoder(), new(), decoder(), **options)

    names = [name for name, _ in module.named_parameters(recurse=False)]
    frozen = [[name] for name in names] + ([names] if len(names) > 1 else [])
    return [
        network("first", [], new(), decoder(), X=data(N, *shape)),
        network("input", [], new(), decoder(), X=data(N, *shape), needs_grad=True),
        middle("middle"),
        network("last", encoder(), new(), [nn.Flatten()], loss=nn.MSELoss),
        network("copies", encoder(), new(2), decoder()),
        middle("subset", subset=[N - 1, 1]),
        middle("N = 1", X=data(1, *shape[:-1], 3)),
        *[middle("frozen", frozen=names) for names in frozen],
    ]


# %%
# The networks for all shapes of a sample.


def make_networks(layer: Layer, cases: list[Case]) -> list[Network]:
    """Build networks for all shapes that the cases have."""
    shapes = dict.fromkeys(tuple(case.X.shape[1:]) for case in cases)
    N, C = len(cases[-1].X), cases[-1].C
    return [n for shape in shapes for n in networks_for(layer, shape, N, C)]


# %%
# The right answers need the network's Jacobian :math:`J_n` for each sample, and two
# derivatives of the loss with respect to the network's output :math:`f_n`: the
# gradient :math:`\partial L / \partial f_n` and the Hessian :math:`H_n`.
#
# - The individual gradient is :math:`J_n^\top \, \partial L / \partial f_n`.
# - The GGN is :math:`\sum_n J_n^\top H_n J_n`.
#
# The loss adds up over samples, so the gradient at :math:`f_n` depends on :math:`f_n`
# only. We sum these gradients over samples, and one more derivative gives all
# :math:`H_n`.


@cache
def loss_derivatives(network: Network, reduction: str) -> tuple[Tensor, Tensor]:
    """Differentiate the loss by the network's output, with autodiff.

    Args:
        network: The network.
        reduction: ``"mean"`` or ``"sum"``.

    Returns:
        Gradient, shape ``[N, C]``, and Hessians, shape ``[C, N, C]``.
    """
    loss = network.loss(reduction=reduction)

    def summed_gradient(F: Tensor) -> Tensor:
        """Return the gradient, summed over samples, shape ``[C]``."""
        (G,) = torch.autograd.grad(loss(F, network.y), F, create_graph=True)
        return G.sum(0)

    return jacobian(lambda F: loss(F, network.y), network.F), jacobian(
        summed_gradient, network.F
    )


# %%
# Both formulas, for all parameters of the network and for its input.


@cache
def expected_in(network: Network, kind: str, reduction: str) -> dict[str, Tensor]:
    """Compute by autodiff what BackPACK should store.

    Args:
        network: The network.
        kind: ``"BatchGrad"`` or ``"DiagGGNExact"``.
        reduction: ``"mean"`` or ``"sum"``.

    Returns:
        By parameter name, and ``"input0"`` for the network's input: individual
        gradients, ``[S, *]``, or the GGN diagonal, in the parameter's shape.
    """
    G, H = loss_derivatives(network, reduction)
    tensors = {"input0": network.X, **dict(network.net.named_parameters())}
    expected = {}
    for name, tensor in tensors.items():
        J = network.J[name]
        if kind == "BatchGrad":
            g = einsum(J, G, "n c p, n c -> n p")[network.subset or slice(None)]
            expected[name] = g.reshape(-1, *tensor.shape)
        else:
            diagonal = einsum(J, H, J, "n c p, c n k, n k p -> p")
            expected[name] = diagonal.reshape(tensor.shape)
    return expected


# %%
# BackPACK's answer, with a new ``BatchGrad`` or ``DiagGGNExact``, and a new extension,
# for each use.


def make_registered(
    layer: Layer, kind: str, layer_type: type[nn.Module], subset: list[int] | None
) -> BatchGrad | DiagGGNExact:
    """Build a ``BatchGrad`` or ``DiagGGNExact`` that knows the layer's extension."""
    running = BatchGrad(subset) if kind == "BatchGrad" else DiagGGNExact()
    own = factory_of(layer, kind)()
    # overwrite: BackPACK may have a module extension of its own for this class
    running.set_module_extension(layer_type, own, overwrite=True)
    return running


def run_backpack(
    layer: Layer, network: Network, kind: str, reduction: str
) -> dict[str, Tensor | None]:
    """Run BackPACK on a copy of the network; return what it stored, by name."""
    running = make_registered(layer, kind, type(network.layers[0]), network.subset)
    net, loss = extend(deepcopy(network.net)), extend(network.loss(reduction=reduction))
    X = network.X.clone().requires_grad_(network.needs_grad)
    with backpack(running):
        loss(net(X), network.y).backward()
    stored = {  # the savefield is grad_batch or diag_ggn_exact
        name: getattr(p, running.savefield, None)
        for name, p in net.named_parameters()
        if p.requires_grad
    }
    if kind == "DiagGGNExact" and network.needs_grad:
        # BackPACK keeps V by the memory address of the tensor that it belongs to. We
        # take it out.
        V = running.saved_quantities.retrieve_quantity(X.data_ptr(), delete_old=True)
        # Each sample has entries of its own: there is no sum over samples.
        stored["input0"] = None if V is None else V.square().sum(0)
    return stored


# %%
# Compare, and assign each comparison to a method: the GGN diagonal of the input and of
# the layers before ours depends on ``backpropagate``. The layers behind ours depend on
# none of our methods, so they are left out. If an error is raised, the traceback tells
# in which method of the extension.


def method_that_raised(error: Exception, names: list[str]) -> str | None:
    """Return the name of the extension's method in which an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f.name for f in frames if f.name in names]
    if "expects a backpropagation quantity" in str(error):  # the layer before got no V
        return "backpropagate"
    return inside[-1] if inside else None


# %%
# One network, both reductions.


def check_in_network(layer: Layer, network: Network, kind: str) -> list[Result]:
    """Compare what BackPACK stores in one network with autodiff."""
    names = [m.name for m in methods_of(layer) if m.kind == kind]
    results = []
    for reduction in ["mean", "sum"]:
        try:
            stored = run_backpack(layer, network, kind, reduction)
        except Exception as error:
            guilty = method_that_raised(error, names)
            note = f"{type(error).__name__}: {error}"
            for name in [guilty] if guilty else names:
                row = f"{Method(kind, name)} {reduction}"
                results.append(Result(row, network.column, "raises", note))
            continue
        expected = expected_in(network, kind, reduction)
        for name, value in stored.items():
            method = Method(kind, network.method_for(name))
            if method.name not in names:
                continue  # a layer behind ours, or any other layer for BatchGrad
            row, missing = f"{method} {reduction}", ("missing", "nothing is stored")
            verdict = missing if value is None else compare(value, expected[name])
            results.append(Result(row, network.column, *verdict))
    return results


# %%
# A method that is right by hand and wrong in a network gets a diagnosis of its own. But
# if a method of the same extension is wrong by hand, the failure may follow from that.
# Then it is not diagnosed, except for a result that is missing. (If a method has two
# diagnoses, the one by hand is kept.)


def diagnose_network(method: Method, failing: list[Result]) -> str:
    """Say what is wrong with a method that fails in networks only."""
    first = failing[0]
    columns = ", ".join(dict.fromkeys(result.column for result in failing))
    if first.cell == "missing" and method.name != "backpropagate":
        return f"not listed: super().__init__(params=[..., {method.name!r}])"
    return f"right by hand, but in networks ({columns}) {first.cell}: {first.note}"


def check_networks(
    layer: Layer, networks: list[Network], explained: dict[str, str]
) -> tuple[list[Result], dict[str, str]]:
    """Run all networks; return results, and diagnoses of what is not yet explained."""
    results, diagnoses = [], {}
    for kind in ("BatchGrad", "DiagGGNExact"):
        if factory_of(layer, kind):
            for network in networks:
                if kind == "BatchGrad" or network.subset is None:
                    results += check_in_network(layer, network, kind)
    for method in methods_of(layer):
        rows = [f"{method} {reduction}" for reduction in ("mean", "sum")]
        failing = [r for r in results if r.row in rows and not r.ok]
        wrong_by_hand = any(text.startswith(method.kind) for text in explained)
        if failing and (failing[0].cell == "missing" or not wrong_by_hand):
            diagnoses[str(method)] = diagnose_network(method, failing)
    return results, diagnoses


# %%
# The report
# ----------
# Results with the same row and column are one cell of the table: ``ok``, or the first
# that failed. A dot says that there is no result: the method cannot meet this setting,
# or another method raised an error in it.


@dataclass
class Report:
    """All results of a layer, and the diagnoses by method."""

    by_hand: list[Result]
    in_networks: list[Result]
    diagnoses: dict[str, str]

    def __str__(self) -> str:
        """Return the tables and the diagnosis."""
        parts = ["Each method by hand", format_table(self.by_hand), ""]
        parts += ["In networks", format_table(self.in_networks), ""]
        results = self.by_hand + self.in_networks
        passed = sum(result.ok for result in results)
        parts.append(f"{passed} of {len(results)} checks passed.")
        return "\n".join([*parts, *self.diagnosis()])

    def diagnosis(self) -> list[str]:
        """Return the diagnoses as texts, in lines of at most 86 characters."""
        texts = [f"{row}: {text}" for row, text in self.diagnoses.items()]
        return [textwrap.fill(t, 86, subsequent_indent="    ") for t in texts]

    def raise_if_failed(self) -> None:
        """Raise an error that says what is wrong, if any check failed."""
        if not all(result.ok for result in self.by_hand + self.in_networks):
            raise AssertionError("\n".join(["Checks failed.", *self.diagnosis()]))


def cells_of(results: list[Result]) -> tuple[list[str], list[str], dict]:
    """Return rows, columns, and for each pair the first failure, or ``"ok"``."""
    columns = list(dict.fromkeys(result.column for result in results))
    methods = list(dict.fromkeys(result.row.split()[0] for result in results))
    rows = list(dict.fromkeys(result.row for result in results))
    rows.sort(key=lambda row: methods.index(row.split()[0]))
    cells = {}
    for result in results:
        key = (result.row, result.column)
        if key not in cells or cells[key] == "ok":
            cells[key] = result.cell
    return rows, columns, cells


# %%
# The printed table.


def format_table(results: list[Result]) -> str:
    """Write the cells as a table, under a heading for each extension."""
    rows, columns, cells = cells_of(results)
    parts = [part for row in rows for part in row.split(".")]
    width = max(map(len, parts), default=0) + 2
    cell_width = max(len(text) for text in [*columns, *cells.values(), ""]) + 1
    lines, kind = [], ""
    for row in rows:
        if not row.startswith(f"{kind}.") or not kind:
            kind = row.split(".")[0]
            titles = "".join(f"{column:>{cell_width}}" for column in columns)
            lines.append(f"{kind:<{width}}{titles}")
        texts = [cells.get((row, column), ".") for column in columns]
        cells_text = "".join(f"{text:>{cell_width}}" for text in texts)
        lines.append(f"  {row.split('.')[1]:<{width - 2}}{cells_text}")
    return "\n".join(lines)


# %%
# All of the above in one call.


def check(
    layer: Layer,
    cases: list[Case] | None = None,
    networks: list[Network] | None = None,
) -> Report:
    """Run all checks of a layer.

    Args:
        layer: The layer.
        cases: Settings for calls by hand. Default: new ones.
        networks: Networks that hold the layer. Default: new ones.

    Returns:
        All results, and the diagnoses of methods that failed.
    """
    if not methods_of(layer):
        raise ValueError("Nothing to check: give batch_grad, diag_ggn or both.")
    cases = make_cases(layer) if cases is None else cases
    networks = make_networks(layer, cases) if networks is None else networks
    by_hand, diagnoses = check_by_hand(layer, cases)
    in_networks, more = check_networks(layer, networks, diagnoses)
    return Report(by_hand, in_networks, more | diagnoses)


# %%
# A table as a picture: blue is right, orange is wrong.


def draw(ax: plt.Axes, results: list[Result], title: str) -> None:
    """Draw the table of results as a matrix of colored cells."""
    rows, columns, cells = cells_of(results)
    for (row, column), text in cells.items():
        x, y = columns.index(column), rows.index(row)
        color, alpha = ("C0", 0.35) if text == "ok" else ("C1", 1)
        box = plt.Rectangle(
            (x - 0.5, y - 0.5), 1, 1, facecolor=color, alpha=alpha, edgecolor="white"
        )
        ax.add_patch(box)
        ax.text(x, y, text, ha="center", va="center", color="black", fontsize="small")
    ax.set_xlim(-0.5, len(columns) - 0.5)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
    labels = [row.replace("DiagGGNExact", "GGN") for row in rows]
    ax.set_yticks(range(len(rows)), labels)
    ax.set_xlabel("setting")
    ax.set_title(title)


# %%
# Your layer
# ----------
# This runs all checks of ``MY_LAYER`` and prints the report. A cell says ``ok``, or the
# relative distance from the right answer, or what is wrong in one word: ``shape``,
# ``raises``, ``missing``, ``None`` and so on. Dots are settings that a method cannot
# meet (or in which another method raised an error).
#
# The settings by hand: shapes of the input, a ``subset`` of the samples, the layer in
# first place, an extension that is ``reused`` for a second layer. In networks: the
# layer ``first``; first, with a gradient for the ``input``; in the ``middle``;
# ``last``; two ``copies`` with different parameters, whose outputs are added; a
# ``subset``; one sample; and ``frozen`` parameters. ``mean`` and ``sum`` are the loss's
# reductions. A row ``backpropagate mean`` or ``backpropagate sum`` compares the GGN
# diagonal of the layers before ours, and of the input if it requires a gradient. A cell
# may stand for several comparisons: one for each shape of a sample (by hand only in the
# column ``subset``, in networks in every column), for each of the copies, for each
# choice of frozen parameters, and for each parameter before the layer. So there are
# more checks than cells.

report = check(MY_LAYER)
print(report)

# %%
# The same as a picture. If your extensions are right, no cell is orange. White cells
# are the dots of the table.

# sphinx_gallery_thumbnail_number = 2

fig, axes = plt.subplots(2, 1, figsize=(8, 6.5), layout="constrained")
draw(axes[0], report.by_hand, "Each method by hand")
draw(axes[1], report.in_networks, "In networks")
plt.show()

# %%
# If a check failed, the script ends here, with the diagnosis.

report.raise_if_failed()

# ----- YOU CAN DELETE ALL BELOW -----

# %%
# All that follows shows the tool at work. You can delete it from your copy.
#
# A layer with more to go wrong
# -----------------------------
# A linear layer with a matrix, a bias, and a gain of shape ``[]``:
# :math:`z_n = \gamma W x_n + b`. Its individual gradients, for a gradient
# :math:`G_n` that arrives at the output, are :math:`\gamma G_n x_n^\top` for
# the matrix, :math:`G_n` for the bias, and :math:`G_n^\top W x_n` for the gain, summed
# over T if there is one.


class ScaledLinear(nn.Module):
    """Linear layer with a trainable gain: matrix, vector and scalar parameter."""

    def __init__(self, D_in: int, D_out: int):
        """Store a matrix ``[D_out, D_in]``, a bias ``[D_out]`` and a gain ``[]``."""
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D_out, D_in))
        self.bias = nn.Parameter(torch.zeros(D_out))
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, X: Tensor) -> Tensor:
        """Map ``[N, *, D_in]`` to ``[N, *, D_out]``."""
        return self.gain * X @ self.weight.mT + self.bias


# %%
# Its extension for ``BatchGrad``. The helper cuts to the samples asked for.


class ScaledLinearBatchGrad(FirstOrderModuleExtension):
    """Compute individual gradients for ``ScaledLinear``."""

    def __init__(self):
        """Name the parameters for which this class has a method."""
        super().__init__(params=["weight", "bias", "gain"])

    def inputs(self, ext, module, g_out) -> tuple[Tensor, Tensor]:
        """Return input and gradient, ``[S, *, D]``, of the S samples asked for."""
        subset = ext.get_subsampling()
        return subsample(module.input0, subsampling=subset), subsample(
            g_out[0], subsampling=subset
        )

    def weight(self, ext, module, g_inp, g_out, bp) -> Tensor:
        """Compute individual gradients, shape ``[S, D_out, D_in]``."""
        X, G = self.inputs(ext, module, g_out)
        return module.gain * einsum(G, X, "n ... o, n ... i -> n o i")

    def bias(self, ext, module, g_inp, g_out, bp) -> Tensor:
        """Compute individual gradients, shape ``[S, D_out]``."""
        _, G = self.inputs(ext, module, g_out)
        return einsum(G, "n ... o -> n o")

    def gain(self, ext, module, g_inp, g_out, bp) -> Tensor:
        """Compute individual gradients, shape ``[S]``."""
        X, G = self.inputs(ext, module, g_out)
        return einsum(G, X @ module.weight.mT, "n ... o, n ... o -> n")


# %%
# Its extension for ``DiagGGNExact`` has the same products, with the columns of V in
# place of :math:`G_n`, then squares and sums over samples and columns. The Jacobian
# with respect to the input is :math:`\gamma W`.


class ScaledLinearDiagGGNExact(ModuleExtension):
    """Compute the exact GGN diagonal of ``ScaledLinear``, and send V through it."""

    def __init__(self):
        """Name the parameters for which this class has a method."""
        super().__init__(params=["weight", "bias", "gain"])

    def weight(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Compute the GGN diagonal, shape ``[D_out, D_in]``."""
        V = einsum(module.input0, V_out, "n ... i, c n ... o -> c n o i")
        return (module.gain * V).square().sum((0, 1))

    def bias(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Compute the GGN diagonal, shape ``[D_out]``."""
        return einsum(V_out, "c n ... o -> c n o").square().sum((0, 1))

    def gain(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Compute the GGN diagonal, shape ``[]``."""
        Z = module.input0 @ module.weight.mT
        return einsum(Z, V_out, "n ... o, c n ... o -> c n").square().sum()

    def backpropagate(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Backpropagate V, ``[C, N, *, D_out]`` to ``[C, N, *, D_in]``."""
        return module.gain * V_out @ module.weight


# %%
# The right extensions pass, for a matrix that changes the number of features (also with
# images) and for a square one.

wide = Layer(
    make_module=lambda: ScaledLinear(4, 3),
    sample_shapes=[(4,), (2, 4)],
    batch_grad=ScaledLinearBatchGrad,
    diag_ggn=ScaledLinearDiagGGNExact,
)
check(wide).raise_if_failed()
check(replace(wide, sample_shapes=[(2, 3, 4)])).raise_if_failed()

square = replace(wide, make_module=lambda: ScaledLinear(4, 4))
cases = make_cases(square)
networks = make_networks(square, cases)
report = check(square, cases, networks)
report.raise_if_failed()
print(report)

# %%
# A gallery of wrong extensions
# -----------------------------
# Each class inherits from the right one and holds one mistake. First, the individual
# gradients.


class WrongSubset(ScaledLinearBatchGrad):
    """Wrong on purpose: treats all samples, whatever the user asked for."""

    def bias(self, ext, module, g_inp, g_out, bp) -> Tensor:
        """Return ``[N, D_out]`` for ``[S, D_out]``."""
        return einsum(g_out[0], "n ... o -> n o")


class WrongShape(ScaledLinearBatchGrad):
    """Wrong on purpose: takes the gain for a parameter of shape ``[1]``."""

    def gain(self, ext, module, g_inp, g_out, bp) -> Tensor:
        """Return ``[S, 1]`` for ``[S]``."""
        return super().gain(ext, module, g_inp, g_out, bp).unsqueeze(-1)


class WrongFactor(ScaledLinearBatchGrad):
    """Wrong on purpose: takes back the 1/N of a loss with reduction "mean"."""

    def weight(self, ext, module, g_inp, g_out, bp) -> Tensor:
        """Return numbers that are N times too large."""
        return len(g_out[0]) * super().weight(ext, module, g_inp, g_out, bp)


class WrongOrder(ScaledLinearBatchGrad):
    """Wrong on purpose: input features first, as in a formula with X W."""

    def weight(self, ext, module, g_inp, g_out, bp) -> Tensor:
        """Return ``[S, D_in, D_out]``."""
        return super().weight(ext, module, g_inp, g_out, bp).mT


class WrongInput(ScaledLinearBatchGrad):
    """Wrong on purpose: takes the output of the layer for its input."""

    def weight(self, ext, module, g_inp, g_out, bp) -> Tensor:
        """Return gradients as if the layer had seen its own output."""
        _, G = self.inputs(ext, module, g_out)
        Z = subsample(module.output, subsampling=ext.get_subsampling())
        return module.gain * einsum(G, Z, "n ... o, n ... i -> n o i")


# %%
# Second, the GGN diagonal.


class WrongSumFirst(ScaledLinearDiagGGNExact):
    """Wrong on purpose: sums over samples, then squares."""

    def weight(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Return wrong numbers, shape ``[D_out, D_in]``."""
        V = einsum(V_out, module.input0, "c n ... o, n ... i -> c o i")
        return (module.gain * V).square().sum(0)


class WrongSquareFirst(ScaledLinearDiagGGNExact):
    """Wrong on purpose: squares, then sums over features."""

    def gain(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Return a wrong number, shape ``[]``."""
        return (V_out * (module.input0 @ module.weight.mT)).square().sum()


class WrongReturn(ScaledLinearDiagGGNExact):
    """Wrong on purpose: computes, but returns nothing."""

    def bias(self, ext, module, g_inp, g_out, V_out) -> None:
        """Forget the return statement."""
        super().bias(ext, module, g_inp, g_out, V_out)


class WrongInPlace(ScaledLinearDiagGGNExact):
    """Wrong on purpose: V_out still belongs to ``backpropagate``."""

    def bias(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Return the right result, but square V_out in place."""
        result = super().bias(ext, module, g_inp, g_out, V_out)
        V_out.square_()
        return result


class WrongPattern(ScaledLinearDiagGGNExact):
    """Wrong on purpose: a pattern without an ellipsis serves ``[N, D]`` only."""

    def bias(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Raise an error for ``[N, T, D]``."""
        return einsum(V_out, V_out, "c n o, c n o -> o")


# %%
# Third, ``backpropagate``.


class WrongTranspose(ScaledLinearDiagGGNExact):
    """Wrong on purpose: W v in the place of W^T v.

    The vectors v lie along the last axis of ``V_out``: ``V_out @ W`` would be right.
    """

    def backpropagate(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Return ``[C, N, *, D_in]``, which fits as the matrix is square."""
        return module.gain * V_out @ module.weight.mT


class WrongIdentity(ScaledLinearDiagGGNExact):
    """Wrong on purpose: sends V to the layers before as it came."""

    def backpropagate(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Return V unchanged."""
        return V_out


class WrongGain(ScaledLinearDiagGGNExact):
    """Wrong on purpose: forgets the gain, which is one at the start."""

    def backpropagate(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Leave the gain out."""
        return V_out @ module.weight


class WrongSign(ScaledLinearDiagGGNExact):
    """Wrong on purpose: V has the wrong sign, which no GGN diagonal here shows."""

    def backpropagate(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Return minus V."""
        return -super().backpropagate(ext, module, g_inp, g_out, V_out)


class WrongMissing(ScaledLinearDiagGGNExact):
    """Wrong on purpose: has no ``backpropagate`` of its own."""

    backpropagate = ModuleExtension.backpropagate


# %%
# Fourth, mistakes in how the methods are put together, and one that is on no list.


class WrongParams(ScaledLinearDiagGGNExact):
    """Wrong on purpose: does not list the bias, so its method never runs."""

    def __init__(self):
        """Name two parameters of three."""
        ModuleExtension.__init__(self, params=["weight", "gain"])


class WrongFrozen(ScaledLinearDiagGGNExact):
    """Wrong on purpose: ``backpropagate`` needs what ``gain`` has stored."""

    def gain(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Store the effective matrix, then compute the GGN diagonal."""
        self.matrix = module.gain * module.weight
        return super().gain(ext, module, g_inp, g_out, V_out)

    def backpropagate(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Use the stored matrix."""
        return V_out @ self.matrix


class WrongMemory(ScaledLinearDiagGGNExact):
    """Wrong on purpose: stores a matrix once and for all layers."""

    def backpropagate(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Use the matrix of the layer that came first."""
        if not hasattr(self, "matrix"):
            self.matrix = module.gain * module.weight
        return V_out @ self.matrix


class WrongSomehow(ScaledLinearDiagGGNExact):
    """Wrong on purpose: a mistake that no one has thought of."""

    def bias(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Return something."""
        return (V_out.cos().sum((0, 1)) + 0.1).reshape(-1, 4).sum(0)


# %%
# What the tool must say about each: the method, and the mistake.

answers = {
    WrongSubset: "BatchGrad.bias: the subset is ignored",
    WrongShape: "BatchGrad.gain: returns shape [5, 1], needs [5]",
    WrongFactor: "BatchGrad.weight: too large by a factor N",
    WrongOrder: "BatchGrad.weight: result transposed",
    WrongInput: "BatchGrad.weight: uses module.output in place of module.input0",
    WrongSumFirst: "DiagGGNExact.weight: squared after the sum over samples",
    WrongSquareFirst: "DiagGGNExact.gain: squared before the sum over T and D",
    WrongReturn: "DiagGGNExact.bias: returns None",
    WrongInPlace: "DiagGGNExact.bias: changes V_out in place",
    WrongPattern: "DiagGGNExact.bias: raises only for [N, T, D]",
    WrongTranspose: "DiagGGNExact.backpropagate: missing transpose",
    WrongIdentity: "DiagGGNExact.backpropagate: returns V_out unchanged",
    WrongGain: "DiagGGNExact.backpropagate: leaves gain out (as if it were 1)",
    WrongSign: "DiagGGNExact.backpropagate: wrong sign",
    WrongMissing: "DiagGGNExact.backpropagate: the method backpropagate is missing",
    WrongParams: "DiagGGNExact.bias: not listed",
    WrongFrozen: "DiagGGNExact.backpropagate: relies on the parameter methods",
    WrongMemory: "DiagGGNExact.backpropagate: keeps what it saw in an earlier layer",
    WrongSomehow: "DiagGGNExact.bias: unknown",
}

# %%
# To save time, the gallery runs in the networks for ``[N, D]`` only. Each class must
# get its one diagnosis, and no other.

few_networks = [network for network in networks if network.X.ndim == 2]


def check_wrong(wrong_class: type[ModuleExtension]) -> Report:
    """Check ``ScaledLinear`` with a wrong extension, and without the other one."""
    extensions = {"batch_grad": None, "diag_ggn": None}
    first_order = issubclass(wrong_class, FirstOrderModuleExtension)
    extensions["batch_grad" if first_order else "diag_ggn"] = wrong_class
    return check(replace(square, **extensions), cases, few_networks)


reports = {wrong_class: check_wrong(wrong_class) for wrong_class in answers}
for wrong_class, answer in answers.items():
    diagnosis = reports[wrong_class].diagnosis()
    print(wrong_class.__name__, *diagnosis, sep="\n  ")
    one_line = " ".join(" ".join(diagnosis).split())
    if len(diagnosis) != 1 or not one_line.startswith(answer) or " OR " in one_line:
        raise AssertionError(f"{wrong_class.__name__} is not diagnosed as: {answer}")

# %%
# The last one is the answer to a mistake that is on no list: the first numbers beside
# the right ones, and no guess. If you get it, compare your formula with autodiff factor
# by factor.
#
# Which check finds which mistake? In the picture, each row is a wrong extension and
# each column a setting. Those that begin with "net" are networks. White cells
# are settings that the extension cannot meet.

found = []
for wrong_class, wrong_report in reports.items():
    row = wrong_class.__name__.removeprefix("Wrong")
    for results, place in [
        (wrong_report.by_hand, ""),
        (wrong_report.in_networks, "net: "),
    ]:
        for result in results:
            cell = "ok" if result.ok else "wrong"
            found.append(Result(row, place + result.column, cell))

fig, ax = plt.subplots(figsize=(8, 7), layout="constrained")
draw(ax, found, "Which check finds which wrong extension")
plt.show()

# %%
# A single setting is not enough. ``Factor`` and ``SumFirst`` pass with a batch of one
# sample. ``Subset`` shows only where a subset is asked for, ``Memory`` only where two
# layers share an extension. ``SquareFirst`` passes with the layer last and a squared
# error: there, each column of V has one nonzero entry per sample, so there is nothing
# to sum. No network finds the wrong sign, as squares hide it (in ``copies`` it is wrong
# in both branches): for this, ``backpropagate`` must be called by hand.

batch_of_one = {"[1, 4]", "[1, 2, 4]", "N = 1"}
backpropagate = Method("DiagGGNExact", "backpropagate")
passes_only = {
    WrongFactor: batch_of_one,
    WrongSumFirst: batch_of_one,
    WrongSquareFirst: {"last"},
}
fails_only = {
    WrongSubset: {"subset"},
    WrongMemory: {"reused", "copies"},
    WrongSign: {case.column for case in settings_of(backpropagate, cases)},
}
for wrong_class, columns in (passes_only | fails_only).items():
    results = reports[wrong_class].by_hand + reports[wrong_class].in_networks
    failed = {result.column for result in results if not result.ok}
    passed = {result.column for result in results} - failed
    if columns != (passed if wrong_class in passes_only else failed):
        raise AssertionError(f"{wrong_class.__name__} is found in {sorted(failed)}.")

# %%
# What was verified
# -----------------
# Right extensions pass all checks: the scale module's, and those of a layer with a
# matrix, a vector and a scalar parameter, square and not. Every method was compared
# with Jacobians from autodiff in float64, by hand and in networks, within ``1e-8`` of
# the largest number. Of 19 wrong extensions, 18 got the diagnosis that fits, and no
# other; the last got "unknown".
#
# The tool has limits. It finds mistakes that it cannot name, such as the last one of
# the gallery. It knows modules with one input and one output, whose samples do not
# depend on each other, and checks ``BatchGrad`` and ``DiagGGNExact`` for parameters of
# the module itself, not of its submodules.
#
# **Next:** `Temperature scaling <../3_in_use/1_temperature_scaling.html>`_ puts an
# extension of the scale module to use.
#
# BackPACK: F. Dangel, F. Kunstner, P. Hennig, "BackPACK: Packing more into Backprop",
# ICLR 2020, `arXiv:1912.10985 <https://arxiv.org/abs/1912.10985>`_.
