r"""
The contract, and what breaks it
================================

After this page you can look up what BackPACK asks of an extension, and find the cause
and the fix of an error message or of a number that is wrong.

We will:

1. record who is called when, with which shapes, and print it as one table;
2. check the rules that the table cannot show;
3. raise the errors that a writer of extensions is likely to meet, and fix each;
4. compute numbers that come out wrong **without an error**, put the right numbers
   beside them, and fix each.

Every message below was raised, and every number computed, when this page was built.

We assume that you have seen an extension for individual gradients and one for the GGN
diagonal: `Individual gradients <../1_scale_module/2_individual_gradients.html>`_ and
`The GGN diagonal, backpropagated <../1_scale_module/4_ggn_diagonal.html>`_. V is what
the latter backpropagates: a square root of the GGN with respect to a layer's output. If
you came with an error message, look for it here.

**An error or a warning**

- `does not have an extension for Module
  <#notimplementederror-does-not-have-an-extension-for-module>`_
- `expects a backpropagation quantity but it is None
  <#assertionerror-expects-a-backpropagation-quantity-but-it-is-none>`_
- `'Parameter' object has no attribute 'grad_batch'
  <#attributeerror-parameter-object-has-no-attribute-grad-batch>`_, or
  ``'diag_ggn_exact'``
- `object has no attribute 'output' <#attributeerror-object-has-no-attribute-output>`_
- `object has no attribute 'input0' <#attributeerror-object-has-no-attribute-input0>`_
- `'bool' object has no attribute 'requires_grad'
  <#attributeerror-bool-object-has-no-attribute-requires-grad>`_
- `is a view and is being modified inplace
  <#runtimeerror-is-a-view-and-is-being-modified-inplace>`_
- `Use overwrite = True to force replacement
  <#valueerror-use-overwrite-true-to-force-replacement>`_
- `got an unexpected keyword argument 'subsampling'
  <#typeerror-got-an-unexpected-keyword-argument-subsampling>`_
- `is missing an implementation of how to calculate the quantity
  <#notimplementederror-is-missing-an-implementation-of-how-to-calculate>`_
- `object has no attribute 'bias'
  <#notimplementederror-is-missing-an-implementation-of-how-to-calculate>`_, when the
  layer has no such parameter
- `received a class instead <#valueerror-received-a-class-instead>`_
- `In order to use an autograd.Function with functorch transforms
  <#runtimeerror-in-order-to-use-an-autograd-function-with-functorch-transforms>`_
- `Full backward hook is firing <#userwarning-full-backward-hook-is-firing>`_
- `The size of tensor a must match the size of tensor b
  <#one-second-order-extension-object-used-again>`_, somewhere in ``backward``
- `The output of CrossEntropyLoss() seems to have been modified
  <#a-factor-in-front-of-the-loss>`_
- `Only default ignore_index (-100) is implemented <#ignored-targets>`_, or
  ``Only default weight (None) is implemented``
- `Backpropagate has not been overwritten
  <#assertionerror-expects-a-backpropagation-quantity-but-it-is-none>`_

**No error, but a wrong number, or none**

- In a loop, from the second ``backward`` on: `a second-order extension object is used
  again <#one-second-order-extension-object-used-again>`_
- In layers before a ``transpose``: `a view stands between two modules
  <#a-view-between-two-modules>`_
- After a loss on other data: `a second forward pass came before backward
  <#a-second-forward-pass-before-backward>`_
- In one of two branches: `the layer has several inputs
  <#a-layer-with-several-inputs>`_
- With shared weights: `the parameters are tied <#tied-parameters>`_
- No result for a weight that is computed: `the weight is not a leaf
  <#a-weight-that-is-not-a-leaf>`_
- A constant factor: `a factor stands in front of the loss
  <#a-factor-in-front-of-the-loss>`_, or `the loss takes the mean <#mean-and-sum>`_
- With targets of −100: `targets are ignored <#ignored-targets>`_
- In your layer only: `squares and sums are in the wrong order
  <#squares-and-sums-in-the-wrong-order>`_, or `the shape is wrong
  <#nothing-checks-what-you-return>`_
"""

import inspect
import re
import textwrap
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import matplotlib.pyplot as plt
import torch
from backpack import backpack, disable, extend, extensions
from backpack.custom_module import scale_module
from backpack.custom_module.branching import SumModule
from backpack.custom_module.permute import Permute
from backpack.extensions import (
    BatchGrad,
    DiagGGNExact,
    DiagGGNMC,
    SqrtGGNExact,
    Variance,
)
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.firstorder.base import FirstOrderModuleExtension
from backpack.extensions.module_extension import ModuleExtension
from backpack.extensions.secondorder.diag_ggn.losses import DiagGGNCrossEntropyLoss
from backpack.extensions.secondorder.sqrt_ggn.linear import SqrtGGNLinear
from backpack.utils.subsampling import subsample
from einops import einsum
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vjp, vmap
from torch.nn.utils import parametrize

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# %%
# The layer and its two extensions
# --------------------------------
# The example is the scale module of Part 1. It multiplies its input by one number.


class ScaleModule(nn.Module):
    """Multiply the input by one trainable number."""

    def __init__(self, weight: float = 2.0):
        """Store the number as a parameter of shape ``[1]``.

        Args:
            weight: Initial value. Default: ``2.0``.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight]))

    def forward(self, X: Tensor) -> Tensor:
        """Scale the input.

        Args:
            X: Input, shape ``[N, *]`` with any further axes.

        Returns:
            ``weight * X``, same shape as ``X``.
        """
        return self.weight * X


# %%
# What we write for a layer is a *module extension*. It is registered in an *extension*
# of BackPACK, like ``BatchGrad``. The first one is of first order: it works with the
# gradient that arrives at the layer, and sends nothing on.


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
        """Compute the individual gradients of ``module.weight``.

        Args:
            ext: The running ``BatchGrad``; it knows which samples are wanted.
            module: The layer; ``module.input0`` has shape ``[N, *]``.
            g_inp: Gradients with respect to the layer's inputs (not needed).
            g_out: Gradient with respect to the layer's output, shape ``[N, *]``.
            bp: ``None``: first-order extensions backpropagate nothing.

        Returns:
            Individual gradients, shape ``[N, 1]``, or ``[len(subsampling), 1]``.
        """
        subset = ext.get_subsampling()
        X = subsample(module.input0, subsampling=subset)
        grad_Z = subsample(g_out[0], subsampling=subset)
        return einsum(grad_Z, X, "n ..., n ... -> n").unsqueeze(-1)


# %%
# The other one is of second order: V arrives at the layer's output, and
# ``backpropagate`` sends V on to the layer's input.


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
        """Compute the GGN diagonal of ``module.weight``.

        Args:
            ext: The running extension (not needed).
            module: The layer; ``module.input0`` has shape ``[N, *]``.
            g_inp: Gradients with respect to the layer's inputs (not needed).
            g_out: Gradient with respect to the layer's output (not needed).
            V_out: Square root with respect to the layer's output, ``[C, N, *]``.

        Returns:
            GGN diagonal, shape ``[1]``.
        """
        V_w = einsum(module.input0, V_out, "n ..., c n ... -> c n")
        return V_w.square().sum().unsqueeze(0)

    def backpropagate(
        self,
        ext: DiagGGNExact,
        module: ScaleModule,
        g_inp: tuple[Tensor | None, ...],
        g_out: tuple[Tensor],
        V_out: Tensor,
    ) -> Tensor:
        """Backpropagate V through the layer.

        Args:
            ext: The running extension (not needed).
            module: The layer.
            g_inp: Gradients with respect to the layer's inputs (not needed).
            g_out: Gradient with respect to the layer's output (not needed).
            V_out: Square root with respect to the layer's output, ``[C, N, *]``.

        Returns:
            Square root with respect to the layer's input, shape ``[C, N, *]``.
        """
        return module.weight * V_out


# %%
# Two factories build a new extension object for each use, with the module extension
# registered. Why a new one: see `the trap of an extension that is used again
# <#one-second-order-extension-object-used-again>`_.


def make_batch_grad(
    subsampling: list[int] | None = None,
    module_extension: type[ModuleExtension] = ScaleModuleBatchGrad,
) -> BatchGrad:
    """Build a ``BatchGrad`` that supports ``ScaleModule``.

    Args:
        subsampling: Indices of the samples to compute. Default: all.
        module_extension: What to register for ``ScaleModule``.
    """
    extension = BatchGrad(subsampling=subsampling)
    extension.set_module_extension(ScaleModule, module_extension())
    return extension


def make_diag_ggn(
    module_extension: type[ModuleExtension] = ScaleModuleDiagGGNExact,
) -> DiagGGNExact:
    """Build a ``DiagGGNExact`` that supports ``ScaleModule``.

    Args:
        module_extension: What to register for ``ScaleModule``.
    """
    extension = DiagGGNExact()
    extension.set_module_extension(ScaleModule, module_extension())
    return extension


# %%
# A small classifier holds the layer. The letters: N samples, T steps of a sequence, D
# features of the data, H features inside the network, C classes.

N, T, D, H, C = 6, 4, 3, 4, 5


def make_network(input_shape: tuple[int, ...] = (D,)) -> nn.Sequential:
    """Build a classifier with the scale module at place 1.

    Args:
        input_shape: Shape of one sample, ``(D,)`` or ``(T, D)``.

    Returns:
        Network that maps ``[N, *input_shape]`` to ``[N, C]``.
    """
    features = H if input_shape == (D,) else T * H
    layers = [nn.Linear(D, H), ScaleModule(-1.5), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(features, C)).to(device, torch.float64)


def make_data(*input_shape: int) -> tuple[Tensor, Tensor]:
    """Draw inputs of shape ``[N, *input_shape]`` and class indices of shape ``[N]``."""
    X = torch.randn(N, *input_shape, dtype=torch.float64, device=device)
    return X, torch.randint(C, (N,), device=device)


network = make_network()
loss_function = nn.CrossEntropyLoss(reduction="sum")
X, y = make_data(D)

# %%
# One helper uses BackPACK. It works on a copy, so that ``network`` itself is never
# extended and every section starts anew.


def run(
    model: nn.Module,
    extension: BackpropExtension,
    X: Tensor,
    y: Tensor,
    loss_function: nn.Module = loss_function,
) -> nn.Module:
    """Extend a copy of the model and run a forward and a backward pass.

    Args:
        model: The network, not extended.
        extension: A BackPACK extension, new for this run.
        X: Inputs, shape ``[N, *]``.
        y: Class indices.
        loss_function: The loss, not extended.

    Returns:
        The extended copy. Its parameters hold the results.
    """
    model, loss_function = extend(deepcopy(model)), extend(deepcopy(loss_function))
    with backpack(extension):
        loss_function(model(X), y).backward()
    return model


# %%
# Where a section needs the steps of ``run`` one by one, it uses this extended loss:

extended_loss = extend(deepcopy(loss_function))

# %%
# Two helpers use ``torch.func`` alone. They give the right numbers on this page: the
# individual gradients, and the diagonal of the GGN :math:`\mathrm{J}^\top (\nabla^2
# \ell) \, \mathrm{J}`. Here J is the Jacobian of the network's output with respect to a
# parameter, and :math:`\nabla^2 \ell` the Hessian of the loss with respect to that
# output. J and the Hessian are computed in full, over all samples.


def individual_gradients(model: nn.Module, X: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Compute the gradients of the samples' losses.

    Args:
        model: The network, not extended.
        X: Inputs, shape ``[N, *]``.
        y: Class indices, shape ``[N]``.

    Returns:
        For the name of each parameter, a tensor of shape ``[N, *parameter.shape]``.
    """

    def losses(parameters: dict[str, Tensor]) -> Tensor:
        """Return the loss of each sample, shape ``[N]``."""
        output = functional_call(model, parameters, (X,))
        return nn.functional.cross_entropy(output, y, reduction="none")

    return jacrev(losses)({n: p.detach() for n, p in model.named_parameters()})


def ggn_diagonals(
    model: nn.Module, X: Tensor, y: Tensor, loss_function: nn.Module = loss_function
) -> dict[str, Tensor]:
    """Compute the diagonal of the GGN.

    Args:
        model: The network, not extended.
        X: Inputs, shape ``[N, *]``.
        y: Class indices, shape ``[N]``.
        loss_function: The loss, not extended.

    Returns:
        For the name of each parameter, a tensor of shape ``parameter.shape``.
    """

    def output(parameters: dict[str, Tensor]) -> Tensor:
        """Return the network's output, shape ``[N, C]``."""
        return functional_call(model, parameters, (X,))

    parameters = {n: p.detach() for n, p in model.named_parameters()}
    # hessian: [N, C, N, C], for sample n, class c, sample m, class k
    hessian = jacrev(jacrev(lambda f: loss_function(f, y)))(output(parameters))
    return {  # J: [N, C, *parameter.shape]
        name: torch.einsum("nc...,ncmk,mk...->...", J, hessian, J)
        for name, J in jacrev(output)(parameters).items()
    }


# %%
# Are the two extensions right? Every parameter of the network is compared, for
# ``[N, D]`` and ``[N, T, D]``, ``BatchGrad`` also for a subset of the samples in
# another order.

subset = [4, 0, 2]

for input_shape in [(D,), (T, D)]:
    model = make_network(input_shape)
    data = make_data(*input_shape)
    gradients = individual_gradients(model, *data)
    diagonals = ggn_diagonals(model, *data)
    all_samples = run(model, make_batch_grad(), *data)
    some_samples = run(model, make_batch_grad(subset), *data)
    ggn = run(model, make_diag_ggn(), *data)
    for name in gradients:
        actual = all_samples.get_parameter(name).grad_batch
        torch.testing.assert_close(actual, gradients[name])
        actual = some_samples.get_parameter(name).grad_batch
        torch.testing.assert_close(actual, gradients[name][subset])
        actual = ggn.get_parameter(name).diag_ggn_exact
        torch.testing.assert_close(actual, diagonals[name])

# %%
# The squares in the GGN diagonal hide the sign of V. So ``backpropagate`` is also
# compared with PyTorch's VJP of the layer, one VJP for each column of V.

scale = extend(ScaleModule(-1.5).to(device, torch.float64))
scale(X)  # stores input0 and output, which backpropagate may read
V_out = torch.randn(C, N, D, dtype=torch.float64, device=device)
V_in = ScaleModuleDiagGGNExact().backpropagate(None, scale, None, None, V_out)

_, input_vjp = vjp(lambda X: scale.weight.detach() * X, X)
torch.testing.assert_close(V_in, vmap(input_vjp)(V_out)[0])

# %%
# Who is called when
# ------------------
# A recorder tells us. It replaces methods of a module extension by functions that do
# the same and write down the shapes that they saw.

calls: list[tuple[str, ...]] = []


def show(tensor: Tensor | None) -> str:
    """Return the shape of a tensor as a string, ``-`` for ``None``."""
    return "-" if tensor is None else str(list(tensor.shape))


def record(
    extension: BackpropExtension,
    layer: type[nn.Module],
    module_extension: ModuleExtension,
    methods: list[str],
) -> BackpropExtension:
    """Register a module extension whose methods write into ``calls``.

    Args:
        extension: Where to register.
        layer: The class of layer to register for.
        module_extension: What to register.
        methods: Names of the methods to record.

    Returns:
        The extension.
    """

    def recording(name: str, method: Callable) -> Callable:
        """Return a function that does what ``method`` does, and records it."""

        def recorded(ext, module, g_inp, g_out, V_out):
            """Call the method, and write down the shapes that it saw."""
            result = method(ext, module, g_inp, g_out, V_out)
            tensors = g_out[0], module.input0, V_out, result
            who = f"{layer.__name__}.{name}"
            calls.append((type(ext).__name__, who, *map(show, tensors)))
            return result

        return recorded

    for name in methods:
        method = getattr(module_extension, name)
        setattr(module_extension, name, recording(name, method))
    extension.set_module_extension(layer, module_extension, overwrite=True)
    return extension


# %%
# Three functions for recorded extensions. Two build one; ``record_ggn`` is given a new
# one, as it serves two kinds. (``SqrtGGNExact`` and the second kind, ``DiagGGNMC``, are
# explained where they are used, at the table.)


def record_batch_grad(subsampling: list[int] | None = None) -> BackpropExtension:
    """Build a ``BatchGrad`` that records the scale module."""
    extension = BatchGrad(subsampling=subsampling)
    return record(extension, ScaleModule, ScaleModuleBatchGrad(), ["weight"])


def record_ggn(extension: BackpropExtension) -> BackpropExtension:
    """Record the scale module, and BackPACK's own extension for the loss."""
    methods = ["weight", "backpropagate"]
    record(extension, ScaleModule, ScaleModuleDiagGGNExact(), methods)
    loss_extension = DiagGGNCrossEntropyLoss()
    return record(extension, nn.CrossEntropyLoss, loss_extension, ["backpropagate"])


def record_sqrt_ggn(subsampling: list[int]) -> BackpropExtension:
    """Record BackPACK's own extension for linear layers in a ``SqrtGGNExact``."""
    extension = SqrtGGNExact(subsampling=subsampling)
    methods = ["weight", "backpropagate"]
    return record(extension, nn.Linear, SqrtGGNLinear(), methods)


# %%
# First the order. Both extensions run in one context. Forward hooks of PyTorch write
# down the forward pass. ``extension_hook``, an argument of ``backpack``, is called on
# each layer when all extensions are done with it; ours writes ``done``. Of the methods,
# only those of the scale module and of the loss are recorded.


def after_forward(module: nn.Module, inputs: tuple[Tensor], output: Tensor):
    """Write down that a layer has computed its output."""
    calls.append((type(module).__name__, "forward"))


def after_extensions(module: nn.Module):
    """Write down that all extensions are done with a layer."""
    calls.append((type(module).__name__, "done"))


both = [record_batch_grad(), record_ggn(DiagGGNExact())]
model = extend(deepcopy(network))
hooks = [m.register_forward_hook(after_forward) for m in [*model, extended_loss]]

calls.clear()
loss = extended_loss(model(X), y)
with backpack(*both, extension_hook=after_extensions):
    loss.backward()

for hook in hooks:
    hook.remove()

for step, (first, second, *_) in enumerate(calls):
    print(f"{step:>2}  {first:<16} {second}")

# %%
# The forward pass calls no method of ours. ``backward`` starts at the loss, whose
# ``backpropagate`` makes the first V. At each layer, BackPACK runs one extension after
# the other: for each, first the methods for the parameters, then ``backpropagate``. If
# a release of BackPACK changes this order, this page fails here.


def expect(actual: object, expected: object):
    """Raise if BackPACK does not do what this page says."""
    if actual != expected:
        raise AssertionError(f"The page says {expected}, BackPACK does {actual}.")


# calls[5:]: without the forward passes of the five layers
backward_calls = [(first, second) for first, second, *_ in calls[5:]]
expected = [
    ("CrossEntropyLoss", "forward"),
    ("DiagGGNExact", "CrossEntropyLoss.backpropagate"),
    ("CrossEntropyLoss", "done"),
    ("Linear", "done"),
    ("Flatten", "done"),
    ("Tanh", "done"),
    ("BatchGrad", "ScaleModule.weight"),
    ("DiagGGNExact", "ScaleModule.weight"),
    ("DiagGGNExact", "ScaleModule.backpropagate"),
    ("ScaleModule", "done"),
    ("Linear", "done"),
]
expect(backward_calls, expected)

# %%
# After ``done``, BackPACK deletes what the forward pass stored on the layer, ``input0``
# and ``output``. In the end, no layer has them:

for layer in model:
    expect([name for name in ["input0", "output"] if hasattr(layer, name)], [])

# %%
# Two extensions in one context don't disturb each other: both have the right numbers.
# From here on, ``gradients`` and ``diagonals`` are the right numbers for ``network``.

gradients, diagonals = individual_gradients(network, X, y), ggn_diagonals(network, X, y)
for name, parameter in model.named_parameters():
    torch.testing.assert_close(parameter.grad_batch, gradients[name])
    torch.testing.assert_close(parameter.diag_ggn_exact, diagonals[name])

# %%
# What can go wrong has its place in this order. Each letter will mark one place in a
# figure.

marks = {
    "A": "the layer runs twice, or gets X by keyword: input0 or output is lost",
    "B": "a function, an in-place operation or a view stands between two modules",
    "C": "not registered, a subclass, sums in the wrong order, a wrong shape",
    "D": "backpropagate is missing, or the layer has several inputs",
    "E": "the parameter is frozen, tied, or not a leaf",
    "F": "the loss is not extended, is scaled, or ignores targets",
    "G": "a V of the network's input is left behind in the extension object",
}

# %%
# In the figure, data flow to the right, and gradients (g) and V to the left. Below each
# box stands what the layer stores, or which methods of its module extension run (for
# linear layers ``bias``, too). No V is needed for the data, so ``backpropagate`` does
# not run in the first layer.

spots = {"A": (2, 2.55), "B": (3, 2.3), "C": (2, 0.65), "D": (1, -0.4)}
spots |= {"E": (2.65, -0.36), "F": (6, 0.65), "G": (-1, 0)}
forward, backward, layers = 2, 0, ["Linear", "ScaleModule", "Linear", "loss"]

fig, ax = plt.subplots(figsize=(8, 5.5), layout="constrained")
center = {"ha": "center", "va": "center"}
box = {"boxstyle": "round", "facecolor": "0.92", "edgecolor": "0.3"}
for place, layer in enumerate(layers):
    methods = "weight\nbackpropagate" if place else "weight"
    methods = "backpropagate" if layer == "loss" else methods
    for height in [forward, backward]:
        ax.text(2 * place, height, layer, bbox=box, color="black", **center)
    ax.text(2 * place, forward - 0.55, "input0\noutput", **center)
    ax.text(2 * place, backward - 0.6, methods, **center)
    if place < 3:
        to_right = {"arrowstyle": "->", "color": "C0", "linewidth": 2}
        to_left = {"arrowstyle": "<-", "color": "C1", "linewidth": 2}
        ends = 2 * place + 0.68, 2 * place + 1.28
        for height, arrow in [(forward, to_right), (backward, to_left)]:
            start, end = (ends[0], height), (ends[1], height)
            ax.annotate("", xy=end, xytext=start, arrowprops=arrow)
        ax.text(2 * place + 1, backward + 0.25, "g, V", **center)
badge = {"boxstyle": "circle", "facecolor": "C2", "edgecolor": "none"}
for row, (letter, note) in enumerate(marks.items()):
    ax.text(*spots[letter], letter, bbox=badge, color="white", **center)
    ax.text(-1.3, -1.5 - 0.42 * row, letter, bbox=badge, color="white", **center)
    ax.text(-0.9, -1.5 - 0.42 * row, note, ha="left", va="center")
ax.set(xlim=(-1.7, 7), ylim=(-4.4, 2.9))
ax.set(xlabel="place in the network", ylabel="pass")
ax.set_yticks([forward, backward], ["forward", "backward"])
ax.set_xticks([])
ax.set_title("Who is called when, and where it breaks")
plt.show()

# %%
# The contract in one table
# -------------------------
# Now the shapes: the same recorder, in six situations. Two of BackPACK's extensions are
# new here. ``DiagGGNMC`` is ``DiagGGNExact`` with random columns in V, as many as
# ``mc_samples`` says. (Both take the same module extensions. That of the loss asks
# ``ext`` which columns to make.) ``SqrtGGNExact`` stores V of each parameter itself,
# without squares and sums. The weight of the scale module has shape ``[1]``. The last
# rows show BackPACK's own extension for a linear layer with a weight of shape
# ``[5, 4]``, because a larger parameter tells more. The network ``pixelwise`` stands
# for one that classifies two pixels per sample: its output ``[N, C, 2]`` has the
# classes on axis 1, and only this shape matters here.

pixels, classes = make_data(C, 2)[0], torch.randint(C, (N, 2), device=device)
pixelwise = nn.Sequential(nn.Linear(2, 2), ScaleModule()).to(device, torch.float64)
linears = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, C))
linears = linears.to(device, torch.float64)

exact, mc, exact_2 = DiagGGNExact(), DiagGGNMC(mc_samples=7), DiagGGNExact()
situations = {
    "BatchGrad": (network, record_batch_grad(), X, y),
    "BatchGrad, subsampling=[4, 0]": (network, record_batch_grad([4, 0]), X, y),
    "DiagGGNExact": (network, record_ggn(exact), X, y),
    "DiagGGNMC, mc_samples=7": (network, record_ggn(mc), X, y),
    "DiagGGNExact, output [N, C, 2]": (pixelwise, record_ggn(exact_2), pixels, classes),
    "SqrtGGNExact, subsampling=[4, 0]": (linears, record_sqrt_ggn([4, 0]), X, y),
}

# %%
# One line for each recorded method, in the order of the calls. (Of the two linear
# layers in the last network, this shows the one that is called first: the last layer.)
# The arguments of every method are ``(ext, module, g_inp, g_out, V_out)``, given by
# position. ``g_inp`` is seldom needed and left out here. The last column is the shape
# that the method must return; ``-`` stands for ``None``, ``[]`` for a scalar. The
# shapes are kept in ``table``, to be checked below.

table = {}
print(f"{N = }, {D = }, {H = }, {C = }")
print(f"{'':<34}{'g_out[0]':<12}{'input0':<12}{'V_out':<15}returns")
for situation, arguments in situations.items():
    print(f"\n{situation}")
    calls.clear()
    run(*arguments)
    for _, who, g_out, input0, V_out, result in calls:
        if (situation, who) not in table:
            table[situation, who] = [g_out, input0, V_out, result]
            print(f"  {who:<32}{g_out:<12}{input0:<12}{V_out:<15}{result}")

# %%
# How to read it:
#
# - **BatchGrad** gets no V. Its method returns ``[N, *parameter.shape]``. With a
#   subset, ``g_out[0]`` and ``input0`` still come **whole**: you slice both.
# - **DiagGGNExact**: the loss makes V, ``[C, N, C]``. Each V has the shape of the
#   layer's output behind one more leading axis. ``weight`` returns the shape of the
#   parameter, ``backpropagate`` the leading axis and the shape of ``input0``.
# - **The leading axis** counts the columns of V: C for an output ``[N, C]``; C times 2
#   for an output ``[N, C, 2]``; ``mc_samples`` for the sampled extensions. Never write
#   C into your code; take the axis as it comes.
# - **SqrtGGNExact** with a subset: V comes **sliced**, ``input0`` comes whole: you
#   slice ``input0`` only.
#
# The same statements as a check:

expect(table["BatchGrad", "ScaleModule.weight"], [f"{[N, H]}"] * 2 + ["-", f"{[N, 1]}"])
pair = [4, 0]
row = table["BatchGrad, subsampling=[4, 0]", "ScaleModule.weight"]
expect(row, [f"{[N, H]}", f"{[N, H]}", "-", f"{[len(pair), 1]}"])
row = table["DiagGGNExact", "CrossEntropyLoss.backpropagate"]
expect(row[3], f"{[C, N, C]}")
expect(table["DiagGGNExact", "ScaleModule.weight"][3], f"{[1]}")
row = table["DiagGGNExact", "ScaleModule.backpropagate"]
expect(row[1:], [f"{[N, H]}", f"{[C, N, H]}", f"{[C, N, H]}"])
row = table["DiagGGNExact, output [N, C, 2]", "ScaleModule.weight"]
expect(row[2], f"{[2 * C, N, C, 2]}")
expect(table["DiagGGNMC, mc_samples=7", "ScaleModule.weight"][2], f"{[7, N, H]}")
row = table["SqrtGGNExact, subsampling=[4, 0]", "Linear.weight"]
expect(row[1:], [f"{[N, H]}", f"{[C, 2, C]}", f"{[C, 2, C, H]}"])

# %%
# A frozen parameter
# ~~~~~~~~~~~~~~~~~~
# Its method is not called, but ``backpropagate`` is: the layers before still need V.
# (The first of the ``calls`` is that of the loss.)

frozen = deepcopy(network)
frozen[1].weight.requires_grad_(False)

calls.clear()
model = run(frozen, record_ggn(DiagGGNExact()), X, y)
expect([who for _, who, *_ in calls[1:]], ["ScaleModule.backpropagate"])
torch.testing.assert_close(model[0].weight.diag_ggn_exact, diagonals["0.weight"])

# %%
# The first layer
# ~~~~~~~~~~~~~~~
# ``backpropagate`` runs only if an input of the layer requires a gradient. Data do not,
# so the first layer's ``backpropagate`` is not called, and a mistake in it goes unseen.

first = nn.Sequential(ScaleModule(), nn.Linear(D, C)).to(device, torch.float64)
for requires_grad in [False, True]:
    calls.clear()
    data = X.clone().requires_grad_(requires_grad)
    run(first, record_ggn(DiagGGNExact()), data, y)
    print(f"{requires_grad = !s:<6} {[who for _, who, *_ in calls[1:]]}")
    expect(len(calls[1:]), 2 if requires_grad else 1)

# %%
# Extended twice, run twice
# ~~~~~~~~~~~~~~~~~~~~~~~~~
# ``extend`` on a model that is extended already does nothing: each method is still
# called once. A second ``backward`` adds to ``.grad``, as always in PyTorch. What an
# extension stores on a parameter is replaced, not added to.

model = extend(extend(deepcopy(network)))
calls.clear()
for _ in range(2):
    with backpack(record_batch_grad()):
        extended_loss(model(X), y).backward()

expect(len(calls), 2)
torch.testing.assert_close(model[1].weight.grad, 2 * gradients["1.weight"].sum(0))
torch.testing.assert_close(model[1].weight.grad_batch, gradients["1.weight"])

# %%
# Mean and sum
# ~~~~~~~~~~~~
# The gradient that arrives at a layer carries the factor of the loss's reduction, and V
# its square root. So with ``"mean"``, which is PyTorch's default, individual gradients
# and the GGN diagonal are divided by N (with several targets for each sample, by the
# number of all targets). With ``nn.MSELoss``, the divisor is the number of **all**
# entries of the output.

targets = torch.randn(N, C, dtype=torch.float64, device=device)
for model, *data, loss_class, divisor in [
    (network, X, y, nn.CrossEntropyLoss, N),
    (pixelwise, pixels, classes, nn.CrossEntropyLoss, 2 * N),
    (network, X, targets, nn.MSELoss, N * C),
]:
    for make_extension in [make_batch_grad, make_diag_ggn]:
        # savefield: the attribute for results, grad_batch or diag_ggn_exact
        savefield = make_extension().savefield
        mean, summed = (
            getattr(run(model, make_extension(), *data, loss)[1].weight, savefield)
            for loss in [loss_class(reduction="mean"), loss_class(reduction="sum")]
        )
        torch.testing.assert_close(divisor * mean, summed)

# %%
# BackPACK's ``Variance`` is quadratic in the individual gradients, so there the factor
# is :math:`1/N^2`.

variances = {}
for reduction in ["mean", "sum"]:
    loss_function_r = nn.CrossEntropyLoss(reduction=reduction)
    model = run(linears, Variance(), X, y, loss_function_r)
    variances[reduction] = model[0].weight.variance

torch.testing.assert_close(N**2 * variances["mean"], variances["sum"])

# %%
# Two tools for what follows
# --------------------------
# ``provoke`` runs something that must end in an error or a warning, and prints all
# messages. If the last message is another one, or if there is none, it raises: then
# BackPACK or PyTorch has changed, and the section must be rewritten. Addresses in
# memory, which differ from run to run, are cut out of the messages. One warning that
# comes with nearly every run is not shown: it is harmless, and `has its own section
# <#userwarning-full-backward-hook-is-firing>`_.

harmless = "Full backward hook is firing"


def provoke(expected: type[Exception], fragment: str, function: Callable) -> object:
    """Run a function and print the error, or the warning, that it must end in.

    Args:
        expected: Class of the error or of the warning.
        fragment: Must be in the message.
        function: What to run, without arguments.

    Returns:
        What the function returns, ``None`` if it raises.
    """
    result, errors = None, []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = function()
        except Exception as error:
            errors.append(error)
    messages = [(type(m), str(m)) for m in [w.message for w in caught] + errors]
    messages = [m for m in messages if harmless not in m[1] or fragment == harmless]
    for kind, message in messages:
        text = re.sub(r" at 0x[0-9a-f]+", "", f"{kind.__name__}: {message}")
        print(textwrap.fill(text, width=88, break_on_hyphens=False))
    last_kind, last_message = messages[-1] if messages else (None, "")
    if last_kind is not expected or fragment not in last_message:
        other = errors[0] if errors else None
        text = f"This did not end in {expected.__name__}: {fragment}"
        raise AssertionError(text) from other
    return result


# %%
# ``silently_wrong`` prints a wrong result above the right one, and raises if they
# agree: then BackPACK has mended the trap. It keeps the relative error, the norm of the
# difference divided by the norm of the right result, for a figure.

relative_errors = {}


def silently_wrong(trap: str, wrong: Tensor, right: Tensor):
    """Print two results that must differ.

    Args:
        trap: Name of the trap.
        wrong: What BackPACK computes.
        right: What ``torch.func`` computes, same shape.
    """
    difference = torch.linalg.vector_norm(wrong - right)
    relative_errors[trap] = (difference / torch.linalg.vector_norm(right)).item()
    print(f"{trap}:")
    for label, result in [("wrong", wrong), ("right", right)]:
        entries = " ".join(f"{r:9.4f}" for r in result.flatten().tolist()[:6])
        print(f"{label} {entries}")
    if relative_errors[trap] < 1e-6:
        raise AssertionError(f"BackPACK is right about this now: {trap}")


# %%
# Nothing checks what you return
# ------------------------------
# **What you see:** no error, until something much later meets an unexpected shape. The
# next class returns what you get if you forget ``unsqueeze(-1)``.


class WrongShapeBatchGrad(ScaleModuleBatchGrad):
    """Wrong on purpose: returns shape ``[N]`` instead of ``[N, 1]``."""

    def weight(self, ext, module, g_inp, g_out, bp) -> Tensor:
        """Return individual gradients without the axis of the parameter, ``[N]``."""
        return super().weight(ext, module, g_inp, g_out, bp).squeeze(-1)


extension = make_batch_grad(module_extension=WrongShapeBatchGrad)
wrong = run(network, extension, X, y)[1].weight.grad_batch
print(f"stored as it came: {list(wrong.shape)}")

# %%
# **Cause:** BackPACK stores what the method returns, whatever it is. **Fix:** compare
# once with ``torch.testing.assert_close``. It also compares the shapes, the data types
# and the devices.

provoke(
    AssertionError,
    "'shape' do not match",
    lambda: torch.testing.assert_close(wrong, gradients["1.weight"]),
)
right = run(network, make_batch_grad(), X, y)[1].weight.grad_batch
torch.testing.assert_close(right, gradients["1.weight"])

# %%
# Errors and warnings
# -------------------
# The title of a section is a fragment of the message. If you came here directly, these
# are the names that all sections use:
#
# - ``network`` holds, in this order, a linear layer from D to H features, a
#   ``ScaleModule``, ``Tanh``, ``Flatten``, and a linear layer to C classes. Its data
#   are ``X`` and ``y``, its loss is ``loss_function``. Neither is ever extended.
# - N, T, D, H and C are the numbers of samples, steps, features, hidden features and
#   classes. ``make_data(D)`` draws a batch, inputs ``[N, D]`` and classes ``[N]``.
# - ``run(network, extension, X, y)`` extends copies, runs forward and backward, and
#   returns the copy of the network. ``extended_loss`` is an extended copy of the loss.
# - ``make_batch_grad()`` and ``make_diag_ggn()`` build extensions that support
#   ``ScaleModule``.
# - ``gradients`` and ``diagonals`` hold the right numbers for ``network``;
#   ``individual_gradients`` and ``ggn_diagonals`` compute them for other networks.
#   ``provoke`` runs what must fail and prints its message; ``silently_wrong`` prints a
#   wrong result above the right one; ``expect`` raises if its two arguments differ.
# - ``linears`` is a network without a scale module, ``first`` one that begins with it,
#   ``frozen`` a copy of ``network`` in which the scale weight is frozen. ``subset`` is
#   ``[4, 0, 2]``. ``X_other`` and ``y_other`` are a second batch. ``harmless`` is a
#   part of the warning that ``provoke`` does not show.
# - V is what second-order extensions send from layer to layer.
#
# NotImplementedError: ``does not have an extension for Module``
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# **What you see** with a second-order extension is an error. With one of the first
# order, like ``BatchGrad``, it is only a warning.

message = "does not have an extension for Module"
provoke(NotImplementedError, message, lambda: run(network, DiagGGNExact(), X, y))
unsupported = provoke(UserWarning, message, lambda: run(network, BatchGrad(), X, y))
# (``unsupported`` is for a section further down.)

# %%
# **Cause 1:** no module extension is registered for the layer's class. **Fix:**
# register one, as ``make_diag_ggn`` does.

model = run(network, make_diag_ggn(), X, y)
torch.testing.assert_close(model[1].weight.diag_ggn_exact, diagonals["1.weight"])

# %%
# **Cause 2:** the layer is of a subclass. BackPACK looks up the exact class; what is
# registered for a class does not hold for its subclasses.


class NamedScaleModule(ScaleModule):
    """A scale module of another class."""


named = deepcopy(network)
named[1] = NamedScaleModule(-1.5).to(device, torch.float64)
provoke(NotImplementedError, message, lambda: run(named, make_diag_ggn(), X, y))

# %%
# **Fix:** register the subclass too.

extension = make_diag_ggn()
extension.set_module_extension(NamedScaleModule, ScaleModuleDiagGGNExact())
model = run(named, extension, X, y)
torch.testing.assert_close(model[1].weight.diag_ggn_exact, diagonals["1.weight"])

# %%
# **Cause 3:** the message names a container, not a layer. ``extend`` treats every
# module as a layer, even a container. It leaves out only ``nn.Sequential``, its
# subclasses, and a few containers of BackPACK and ``torch.fx``.


class Classifier(nn.Module):
    """A container with a ``forward`` of its own."""

    def __init__(self, layers: nn.Sequential):
        """Store the layers."""
        super().__init__()
        self.layers = layers

    def forward(self, X: Tensor) -> Tensor:
        """Return the output of the layers, shape ``[N, C]``."""
        return self.layers(X)


classifier = Classifier(deepcopy(network))
provoke(NotImplementedError, message, lambda: run(classifier, make_diag_ggn(), X, y))

# %%
# **Fix:** extend the parts, not the container. (With ``BatchGrad``, you can also live
# with the warning: the individual gradients are right.)

for part in classifier.children():
    extend(part)

with backpack(make_diag_ggn()):
    extended_loss(classifier(X), y).backward()

actual = classifier.layers[1].weight.diag_ggn_exact
torch.testing.assert_close(actual, diagonals["1.weight"])

classifier = Classifier(deepcopy(network))
model = provoke(UserWarning, message, lambda: run(classifier, make_batch_grad(), X, y))
torch.testing.assert_close(model.layers[1].weight.grad_batch, gradients["1.weight"])

# %%
# **Another fix:** inherit from ``nn.Sequential``. The container may then still have a
# ``forward`` of its own. The containers below do that.
#
# AssertionError: ``expects a backpropagation quantity but it is None``
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# **What you see** is the name of the layer that waited in vain for V, the
# "backpropagation quantity". The reason mostly lies **behind** it, nearer to the loss.
#
# **Cause 1:** a function stands between two modules. Only modules send V on, so it is
# lost there.


class FunctionalTanh(nn.Sequential):
    """A network with a function where a module should be."""

    def forward(self, X: Tensor) -> Tensor:
        """Return the output of the network, shape ``[N, C]``."""
        Z = self[1](self[0](X))
        return self[2](torch.tanh(Z))


functional = FunctionalTanh(network[0], network[1], network[4])
message = "expects a backpropagation quantity but it is None"
provoke(AssertionError, message, lambda: run(functional, make_diag_ggn(), X, y))

# %%
# **Fix:** use the module, ``nn.Tanh()``, instead of the function. If there is none,
# write one, and an extension for it.

modular = nn.Sequential(network[0], network[1], nn.Tanh(), network[4])
model = run(modular, make_diag_ggn(), X, y)
right = ggn_diagonals(functional, X, y)["0.weight"]
torch.testing.assert_close(model[0].weight.diag_ggn_exact, right)

# %%
# First-order extensions need no V. For them the function does no harm:

model = run(functional, make_batch_grad(), X, y)
right = individual_gradients(functional, X, y)["0.weight"]
torch.testing.assert_close(model[0].weight.grad_batch, right)

# %%
# **Cause 2:** the loss is not extended, so nobody makes the first V. The message names
# the last layer.

model = extend(deepcopy(network))
with backpack(make_diag_ggn()):
    loss = loss_function(model(X), y)
    provoke(AssertionError, message, loss.backward)

# %%
# **Fix:** extend the loss as well.

extended_loss = extend(deepcopy(loss_function))
with backpack(make_diag_ggn()):
    extended_loss(model(X), y).backward()

torch.testing.assert_close(model[1].weight.diag_ggn_exact, diagonals["1.weight"])

# %%
# **Cause 3:** a layer's extension has no ``backpropagate``. BackPACK warns, sends
# ``None`` on, and the layer before it complains.


class WrongWithoutBackpropagate(ModuleExtension):
    """Wrong on purpose: sends no V to the layers before."""

    def __init__(self):
        """Name the parameters for which this class has a method."""
        super().__init__(params=["weight"])

    weight = ScaleModuleDiagGGNExact.weight


extension = make_diag_ggn(WrongWithoutBackpropagate)
provoke(AssertionError, message, lambda: run(network, extension, X, y))

# %%
# Where no layer waits for this V, as with the layer first and an input that requires a
# gradient, the warning comes alone:

extension = make_diag_ggn(WrongWithoutBackpropagate)
data = X.clone().requires_grad_()
warning = "Backpropagate has not been overwritten"
provoke(UserWarning, warning, lambda: run(first, extension, data, y))

# %%
# **Fix:** write ``backpropagate``, also for layers without parameters.

model = run(network, make_diag_ggn(), X, y)
torch.testing.assert_close(model[0].weight.diag_ggn_exact, diagonals["0.weight"])

# %%
# **Cause 4:** the message names a loss of your own. BackPACK takes a module for a loss
# only if it inherits from ``torch.nn.modules.loss._Loss``.


class PlainCrossEntropy(nn.Module):
    """The cross-entropy, but not derived from PyTorch's base class for losses."""

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the loss, a scalar."""
        return nn.functional.cross_entropy(output, y, reduction="sum")


extension, own_loss = make_diag_ggn(), PlainCrossEntropy()
extension.set_module_extension(PlainCrossEntropy, DiagGGNCrossEntropyLoss())
provoke(AssertionError, message, lambda: run(network, extension, X, y, own_loss))

# %%
# **Fix:** inherit from ``_Loss``, or from one of its descendants.


class DerivedCrossEntropy(nn.CrossEntropyLoss):
    """The cross-entropy under another name; its base class descends from ``_Loss``."""


extension, own_loss = make_diag_ggn(), DerivedCrossEntropy(reduction="sum")
extension.set_module_extension(DerivedCrossEntropy, DiagGGNCrossEntropyLoss())
model = run(network, extension, X, y, own_loss)
torch.testing.assert_close(model[1].weight.diag_ggn_exact, diagonals["1.weight"])

# %%
# How to write the extension of a new loss is the subject of `A custom loss
# <4_custom_loss.html>`_.
#
# AttributeError: ``'Parameter' object has no attribute 'grad_batch'``
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# **What you see** comes after ``backward``, when you read a result that was never
# stored. Each extension has its own name for the attribute.
#
# **Cause 1:** nothing is registered for the layer, and ``BatchGrad`` has only warned.
# ``unsupported`` is the network that `the warning
# <#notimplementederror-does-not-have-an-extension-for-module>`_ came from:

message = "'Parameter' object has no attribute 'grad_batch'"
provoke(AttributeError, message, lambda: unsupported[1].weight.grad_batch)

# %%
# **Fix:** register a module extension, as ``make_batch_grad`` does.
#
# **Cause 2:** ``extend`` came after the forward pass. **Cause 3:** ``backward`` was
# called outside the context. The forward pass may be inside or outside.

model = deepcopy(network)
loss = extended_loss(model(X), y)
extend(model)
with backpack(make_batch_grad()):
    loss.backward()
provoke(AttributeError, message, lambda: model[1].weight.grad_batch)

with backpack(make_batch_grad()):
    loss = extended_loss(model(X), y)
loss.backward()
provoke(AttributeError, message, lambda: model[1].weight.grad_batch)

# %%
# **Fix:** in this order: ``extend``, forward, ``backward`` inside the context.

loss = extended_loss(model(X), y)
with backpack(make_batch_grad()):
    loss.backward()
torch.testing.assert_close(model[1].weight.grad_batch, gradients["1.weight"])

# %%
# **Cause 4:** the module extension has the method, but its constructor does not name
# the parameter.


class WrongParamsBatchGrad(ScaleModuleBatchGrad):
    """Wrong on purpose: does not name its parameter."""

    def __init__(self):
        """Name no parameter."""
        FirstOrderModuleExtension.__init__(self)


extension = make_batch_grad(module_extension=WrongParamsBatchGrad)
model = run(network, extension, X, y)
provoke(AttributeError, message, lambda: model[1].weight.grad_batch)

# %%
# **Fix:** ``super().__init__(params=["weight"])``.

model = run(network, make_batch_grad(), X, y)
torch.testing.assert_close(model[1].weight.grad_batch, gradients["1.weight"])

# %%
# **Cause 5:** the parameter is frozen. **Fix:** skip those without ``requires_grad``
# when you read the results.

model = run(frozen, make_batch_grad(), X, y)
provoke(AttributeError, message, lambda: model[1].weight.grad_batch)

for name, parameter in model.named_parameters():
    if parameter.requires_grad:
        torch.testing.assert_close(parameter.grad_batch, gradients[name])

# %%
# **Cause 6:** the extension that stores this attribute was not in the context.
# **Fix:** name all extensions that you need: ``backpack(BatchGrad(), DiagGGNExact())``.

model = run(network, make_batch_grad(), X, y)
message = "'Parameter' object has no attribute 'diag_ggn_exact'"
provoke(AttributeError, message, lambda: model[1].weight.diag_ggn_exact)

model = extend(deepcopy(network))
with backpack(make_batch_grad(), make_diag_ggn()):
    extended_loss(model(X), y).backward()
torch.testing.assert_close(model[1].weight.grad_batch, gradients["1.weight"])
torch.testing.assert_close(model[1].weight.diag_ggn_exact, diagonals["1.weight"])

# %%
# AttributeError: ``object has no attribute 'output'``
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# **What you see** names a layer that has been treated once already. After that,
# BackPACK deletes ``input0`` and ``output`` to save memory. It reads ``output`` before
# it calls your method, so this is the one that is missed.
#
# **Cause 1:** the same module object stands at two places of the network.

scale = ScaleModule(-1.5)
layers = [scale, nn.Linear(D, D), scale, nn.Linear(D, C)]
twice = nn.Sequential(*layers).to(device, torch.float64)
message = "'ScaleModule' object has no attribute 'output'"
provoke(AttributeError, message, lambda: run(twice, make_batch_grad(), X, y))

# %%
# **Fix:** two objects. If they must share their weight, assign the parameter of one to
# the other, and then combine what the two store, as the section `on tied parameters
# <#tied-parameters>`_ shows. Without sharing:

apart = nn.Sequential(scale, layers[1], ScaleModule(0.7), layers[3])
apart = apart.to(device, torch.float64)
model = run(apart, make_batch_grad(), X, y)
right = individual_gradients(apart, X, y)
for name, parameter in model.named_parameters():
    torch.testing.assert_close(parameter.grad_batch, right[name])

# %%
# **Cause 2:** a second ``backward`` through the same graph. ``retain_graph=True`` of
# PyTorch keeps the graph, but BackPACK has deleted its part. (With ``BatchGrad``, the
# last linear layer is the first to complain, as there is nothing to compute at the
# loss.)

model = extend(deepcopy(network))
loss = extended_loss(model(X), y)
with backpack(make_batch_grad()):
    loss.backward(retain_graph=True)
    provoke(AttributeError, "has no attribute 'output'", loss.backward)

# %%
# **Fix:** give ``retain_graph=True`` to ``backpack`` as well.

loss = extended_loss(model(X), y)
with backpack(make_batch_grad(), retain_graph=True):
    loss.backward(retain_graph=True)
    loss.backward()
torch.testing.assert_close(model[1].weight.grad_batch, gradients["1.weight"])

# %%
# AttributeError: ``object has no attribute 'input0'``
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# **What you see** comes from your own method, at ``module.input0``. The next network
# passes an input by keyword.


class KeywordInput(nn.Sequential):
    """A network that passes an input by keyword."""

    def forward(self, X: Tensor) -> Tensor:
        """Return the output of the network, shape ``[N, C]``."""
        Z = self[1](X=self[0](X))
        return self[2](Z)


keyword = KeywordInput(network[0], network[1], network[4])
message = "'ScaleModule' object has no attribute 'input0'"
provoke(AttributeError, message, lambda: run(keyword, make_batch_grad(), X, y))

# %%
# **Cause:** the forward hooks of PyTorch, by which BackPACK stores inputs, get only the
# arguments that are passed by position. **Fix:** pass inputs by position.

positional = nn.Sequential(network[0], network[1], network[4])
model = run(positional, make_batch_grad(), X, y)
right = individual_gradients(keyword, X, y)["1.weight"]
torch.testing.assert_close(model[1].weight.grad_batch, right)

# %%
# AttributeError: ``'bool' object has no attribute 'requires_grad'``
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# **What you see** comes with second-order extensions, if a layer gets, by position, an
# argument that is not a tensor.


class InvertibleScaleModule(ScaleModule):
    """A scale module that can also divide."""

    def forward(self, X: Tensor, inverse: bool = False) -> Tensor:
        """Multiply or divide ``X`` by the weight, same shape as ``X``."""
        return X / self.weight if inverse else super().forward(X)


class PositionalFlag(nn.Sequential):
    """A network that passes a flag by position."""

    def forward(self, X: Tensor) -> Tensor:
        """Return the output of the network, shape ``[N, C]``."""
        Z = self[1](self[0](X), False)
        return self[2](Z)


def make_invertible_diag_ggn() -> DiagGGNExact:
    """Build a ``DiagGGNExact`` for the forward direction of the layer."""
    extension = DiagGGNExact()
    extension.set_module_extension(InvertibleScaleModule, ScaleModuleDiagGGNExact())
    return extension


scale = InvertibleScaleModule(-1.5).to(device, torch.float64)
flag = PositionalFlag(network[0], scale, network[4])
message = "'bool' object has no attribute 'requires_grad'"
provoke(AttributeError, message, lambda: run(flag, make_invertible_diag_ggn(), X, y))

# %%
# **Cause:** BackPACK takes everything that is passed by position for a tensor.
# **Fix:** tensors by position, everything else by keyword.


class KeywordFlag(nn.Sequential):
    """A network that passes a flag by keyword."""

    def forward(self, X: Tensor) -> Tensor:
        """Return the output of the network, shape ``[N, C]``."""
        Z = self[1](self[0](X), inverse=False)
        return self[2](Z)


fixed = KeywordFlag(network[0], scale, network[4])
model = run(fixed, make_invertible_diag_ggn(), X, y)
for name, right in ggn_diagonals(flag, X, y).items():
    torch.testing.assert_close(model.get_parameter(name).diag_ggn_exact, right)

# %%
# RuntimeError: ``is a view and is being modified inplace``
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# **What you see** comes from the forward pass.

layers = [network[0], network[1], nn.ReLU(inplace=True), network[4]]
message = "is a view and is being modified inplace"
in_place = nn.Sequential(*layers)
provoke(RuntimeError, message, lambda: run(in_place, make_batch_grad(), X, y))

# %%
# **Cause:** to learn about the backward pass, PyTorch wraps the inputs and outputs of
# an extended layer, and these must not be changed in place. The same happens with
# ``Z += 1`` or ``Z.add_(1)`` on the output ``Z``:

scale = extend(ScaleModule().to(device, torch.float64))
provoke(RuntimeError, message, lambda: scale(X).add_(1))

# %%
# **Fix:** ``inplace=False``, and ``Z = Z + 1``. (For second order, the sum must be a
# module, because a function between modules loses V, see above.)

Z = scale(X)
Z = Z + 1
torch.testing.assert_close(Z, scale.weight * X + 1)
not_in_place = nn.Sequential(network[0], network[1], nn.ReLU(), network[4])
model = run(not_in_place, make_batch_grad(), X, y)
right = individual_gradients(not_in_place, X, y)["1.weight"]
torch.testing.assert_close(model[1].weight.grad_batch, right)

# %%
# ValueError: ``Use overwrite = True to force replacement``
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# **What you see:**

extension = make_batch_grad()
provoke(
    ValueError,
    "Use overwrite = True to force replacement",
    lambda: extension.set_module_extension(ScaleModule, ScaleModuleBatchGrad()),
)

# %%
# **Cause:** the class has an entry already. **Fix:** register once, or say that you
# mean it.

extension.set_module_extension(ScaleModule, ScaleModuleBatchGrad(), overwrite=True)
model = run(network, extension, X, y)
torch.testing.assert_close(model[1].weight.grad_batch, gradients["1.weight"])

# %%
# Should the message name ``backpack.custom_module.scale_module.ScaleModule``, then you
# have imported **BackPACK's own** scale module. It has the same name as ours, but its
# factor is a float, not a parameter, and ``DiagGGNExact`` knows it.

other_scale = scale_module.ScaleModule(2.0)
expect(list(other_scale.parameters()), [])
provoke(
    ValueError,
    "backpack.custom_module.scale_module.ScaleModule",
    lambda: DiagGGNExact().set_module_extension(
        scale_module.ScaleModule, ScaleModuleDiagGGNExact()
    ),
)

# %%
# TypeError: ``got an unexpected keyword argument 'subsampling'``
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# **What you see:**

message = "got an unexpected keyword argument 'subsampling'"
provoke(TypeError, message, lambda: DiagGGNExact(subsampling=[4, 0]))

# %%
# **Cause:** only a few extensions take a subset. These:

for name in extensions.__all__:
    if "subsampling" in inspect.signature(getattr(extensions, name)).parameters:
        print(name)

# %%
# **Fix:** give the network only the samples that you want. With ``"mean"``, mind that
# the divisor is then the size of the subset.

model = run(network, make_diag_ggn(), X[[4, 0]], y[[4, 0]])
right = ggn_diagonals(network, X[[4, 0]], y[[4, 0]])["1.weight"]
torch.testing.assert_close(model[1].weight.diag_ggn_exact, right)

# %%
# NotImplementedError: ``is missing an implementation of how to calculate``
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# **What you see** when the module extension is built:


class WrongNameBatchGrad(FirstOrderModuleExtension):
    """Wrong on purpose: names a parameter for which it has no method."""

    def __init__(self):
        """Name a parameter."""
        super().__init__(params=["weight"])


provoke(
    NotImplementedError,
    "is missing an implementation of how to calculate the quantity for weight",
    WrongNameBatchGrad,
)

# %%
# **Cause:** there must be a method for each name in ``params``. Another mistake, a name
# that the layer does not have, shows only in ``backward``:


class WrongBiasBatchGrad(ScaleModuleBatchGrad):
    """Wrong on purpose: names a parameter that the layer does not have."""

    def __init__(self):
        """Name a parameter too many."""
        FirstOrderModuleExtension.__init__(self, params=["weight", "bias"])

    bias = ScaleModuleBatchGrad.weight  # any method; it is never run


message = "'ScaleModule' object has no attribute 'bias'"
extension = make_batch_grad(module_extension=WrongBiasBatchGrad)
provoke(AttributeError, message, lambda: run(network, extension, X, y))

# %%
# **Fix:** the names in ``params``, the methods and the parameters of the layer must
# agree. A layer with an optional parameter sets it to ``None``, as ``nn.Linear`` does
# with ``bias=False``; BackPACK then skips the method.

without_bias = deepcopy(network)
without_bias[1].bias = None
extension = make_batch_grad(module_extension=WrongBiasBatchGrad)
model = run(without_bias, extension, X, y)
torch.testing.assert_close(model[1].weight.grad_batch, gradients["1.weight"])

# %%
# ValueError: ``received a class instead``
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# **What you see:**

provoke(ValueError, "received a class instead", lambda: backpack(BatchGrad))

# %%
# **Cause:** the parentheses are missing. **Fix:** ``backpack(BatchGrad())``.

model = run(linears, BatchGrad(), X, y)
right = individual_gradients(linears, X, y)["0.weight"]
torch.testing.assert_close(model[0].weight.grad_batch, right)

# %%
# RuntimeError: ``In order to use an autograd.Function with functorch transforms``
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# **What you see** when you want to check an extension with ``torch.func``:

message = "In order to use an autograd.Function with functorch transforms"
extended = extend(deepcopy(network))
provoke(RuntimeError, message, lambda: ggn_diagonals(extended, X, y))

# %%
# **Cause:** the model, or the loss, is extended, and the hooks do not go together with
# ``torch.func``. **Fix:** compute with ``torch.func`` first and extend afterwards, or
# extend a copy, as ``run`` does.

right = ggn_diagonals(network, X, y)
torch.testing.assert_close(right, diagonals)

# %%
# UserWarning: ``Full backward hook is firing``
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# **What you see** in nearly every run with BackPACK:

provoke(UserWarning, harmless, lambda: run(network, make_batch_grad(), X, y))

# %%
# **Cause:** PyTorch says that the first layer's input, the data, requires no gradient.
# That is as it should be, and the results are right, as the comparisons on this page
# show. **Fix:** none needed. This site hides the warning. In your own code you can do
# the same:

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=harmless)
    model = run(network, make_batch_grad(), X, y)
torch.testing.assert_close(model[1].weight.grad_batch, gradients["1.weight"])

# %%
# Silent traps
# ------------
# From here on, BackPACK computes something other than what you want, mostly without a
# word. Each section shows the wrong result, if there is one, and the right one, up to
# six numbers of each.
#
# One second-order extension object, used again
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# **What you see:** in a loop, some of the results are wrong, from the second
# ``backward`` on. Or an error about the sizes of two tensors, in the last, smaller
# batch.
#
# BackPACK keeps each V in the extension object, under the **memory address** of the
# tensor that it belongs to (``data_ptr()``), until the layer that computed this tensor
# takes it out. If the input of the first layer requires a gradient, a V is stored for
# it too. But no layer computed it, so no one takes this V out.
#
# A network in two halves makes this visible. We first treat the second half alone, with
# the features as its input. They require a gradient.

first_half, second_half = network[:2], network[2:]
first_half, second_half = extend(deepcopy(first_half)), extend(deepcopy(second_half))
extension = make_diag_ggn()

features = first_half(X)
fixed_features = features.detach().requires_grad_()
with backpack(extension):
    extended_loss(second_half(fixed_features), y).backward()

address = fixed_features.data_ptr()
left_behind = extension.saved_quantities.retrieve_quantity(address, delete_old=False)
print(f"left behind: V of shape {list(left_behind.shape)}")

# %%
# Later, another tensor gets this address. In a training loop this is up to PyTorch,
# which gives memory that has become free to new tensors. Here we need no luck:
# ``features`` and ``fixed_features`` share their memory, so they have the same address.
# The same extension, now on the whole network, **adds** the new V to the one left
# behind, as it does where one tensor feeds two layers. The two are equal, as the
# features are. So V is doubled, and its square is four times too large.

expect(features.data_ptr(), address)
with backpack(extension):
    extended_loss(second_half(features), y).backward()

wrong = first_half[0].weight.diag_ggn_exact
silently_wrong("extension used again", wrong, diagonals["0.weight"])
torch.testing.assert_close(wrong, 4 * diagonals["0.weight"])

# %%
# The loud form: the same memory again, but fewer samples. The two V cannot be added.

message = r"The size of tensor a (6) must match the size of tensor b (4)"
buffer = X.clone().requires_grad_()
extension = make_diag_ggn()
run(network, extension, buffer, y)
provoke(RuntimeError, message, lambda: run(network, extension, buffer[:4], y[:4]))

# %%
# **Fix:** a fresh extension object for each ``backward``, from a factory. Extensions of
# the first order expect no V. They store none and are safe.

for name in ["BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"]:
    extension = getattr(extensions, name)()
    expect(extension.expects_backpropagation_quantities(), False)

features = first_half(X)
fixed_features = features.detach().requires_grad_()
for half_input in [fixed_features, features]:
    with backpack(make_diag_ggn()):
        extended_loss(second_half(half_input), y).backward()

torch.testing.assert_close(first_half[0].weight.diag_ggn_exact, diagonals["0.weight"])
for batch in [slice(None), slice(4)]:
    model = run(network, make_diag_ggn(), buffer[batch], y[batch])
    right = ggn_diagonals(network, X[batch], y[batch])["1.weight"]
    torch.testing.assert_close(model[1].weight.diag_ggn_exact, right)

# %%
# A view between two modules
# ~~~~~~~~~~~~~~~~~~~~~~~~~~
# **What you see:** the GGN diagonal is wrong in layers before a ``transpose``. A
# function between two modules should end in an `error
# <#assertionerror-expects-a-backpropagation-quantity-but-it-is-none>`_, but not here.


class Transposing(nn.Sequential):
    """A network that mixes features, then steps, with a view in between."""

    def forward(self, X: Tensor) -> Tensor:
        """Return the output for ``X`` of shape ``[N, T, D]``, shape ``[N, C]``."""
        Z = self[1](self[0](X)).transpose(1, 2)
        return self[4](self[3](self[2](Z)))


before = [nn.Linear(D, H), ScaleModule(-1.5)]
after = [nn.Linear(T, T), nn.Flatten(), nn.Linear(H * T, C)]
transposing = Transposing(*before, *after).to(device, torch.float64)
X_steps, y_steps = make_data(T, D)

wrong = run(transposing, make_diag_ggn(), X_steps, y_steps)[1].weight.diag_ggn_exact
right = ggn_diagonals(transposing, X_steps, y_steps)
silently_wrong("view", wrong, right["1.weight"])

# %%
# **Cause:** a view shares memory, and so the address, with its original. So the scale
# module finds the V of the **transposed** tensor, takes it for its own, and the axes
# are mixed up. (Here T equals H, so that even the shapes fit.) **Fix:** a module.
# BackPACK has one for permutations and knows it in ``DiagGGNExact``.

permuting = nn.Sequential(*before, Permute(0, 2, 1), *after).to(device, torch.float64)
model = run(permuting, make_diag_ggn(), X_steps, y_steps)
torch.testing.assert_close(model[1].weight.diag_ggn_exact, right["1.weight"])
torch.testing.assert_close(model[0].weight.diag_ggn_exact, right["0.weight"])

# %%
# A second forward pass before backward
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# **What you see:** wrong results if, say, a loss on other data is computed between
# forward and ``backward``.

X_other, y_other = make_data(D)
for trap, extension, right in [
    ("second forward, BatchGrad", make_batch_grad(), gradients["1.weight"]),
    ("second forward, DiagGGN", make_diag_ggn(), diagonals["1.weight"]),
]:
    model = extend(deepcopy(network))
    loss = extended_loss(model(X), y)
    extended_loss(model(X_other), y_other)
    with backpack(extension):
        loss.backward()
    # savefield: where the extension stores its results, grad_batch or diag_ggn_exact
    wrong = getattr(model[1].weight, extension.savefield)
    silently_wrong(trap, wrong, right)

# %%
# **Cause:** each forward pass overwrites ``input0`` and ``output`` of the layers and of
# the loss. If only the model, not the loss, runs a second time, second-order extensions
# notice: the loss leaves V for the model's old output, the last layer waits for V of
# the new one.

model = extend(deepcopy(network))
loss = extended_loss(model(X), y)
model(X_other)
with backpack(make_diag_ggn()):
    message = "expects a backpropagation quantity but it is None"
    provoke(AssertionError, message, loss.backward)

# %%
# **Fix:** call ``backward`` before the next forward pass; or evaluate under
# ``torch.no_grad()``, where BackPACK stores nothing; or, if you need a graph, under
# BackPACK's own ``disable()``.

for without_storing in [torch.no_grad(), disable()]:
    loss = extended_loss(model(X), y)
    with without_storing:
        extended_loss(model(X_other), y_other)
    with backpack(make_batch_grad(), make_diag_ggn()):
        loss.backward()
    torch.testing.assert_close(model[1].weight.grad_batch, gradients["1.weight"])
    torch.testing.assert_close(model[1].weight.diag_ggn_exact, diagonals["1.weight"])

# %%
# A layer with several inputs
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~
# **What you see:** the GGN diagonal is right in one branch and wrong in the other.


class WeightedSum(nn.Module):
    """Compute ``2 * A + 3 * B``."""

    def forward(self, A: Tensor, B: Tensor) -> Tensor:
        """Return the weighted sum, same shape as ``A`` and ``B``."""
        return 2 * A + 3 * B


class WrongWeightedSumDiagGGN(ModuleExtension):
    """Wrong on purpose: one V for two inputs with different Jacobians."""

    def backpropagate(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Return V for the first input, shape ``[C, N, *]``."""
        return 2 * V_out


class TwoBranches(nn.Sequential):
    """A network of two linear layers, side by side, and a merging layer."""

    def forward(self, X: Tensor) -> Tensor:
        """Return the output of the network, shape ``[N, C]``."""
        return self[2](self[0](X), self[1](X))


branches = [nn.Linear(D, C), nn.Linear(D, C)]
merged = TwoBranches(*branches, WeightedSum()).to(device, torch.float64)
extension = make_diag_ggn()
extension.set_module_extension(WeightedSum, WrongWeightedSumDiagGGN())
model = run(merged, extension, X, y)

right = ggn_diagonals(merged, X, y)
torch.testing.assert_close(model[0].weight.diag_ggn_exact, right["0.weight"])
silently_wrong("several inputs", model[1].weight.diag_ggn_exact, right["1.weight"])

# %%
# **Cause:** ``backpropagate`` returns one V, and BackPACK stores it for every input
# that requires a gradient. There is no way to return two. **Fix:** layers with one
# input each, and a plain sum at the end. For a sum one V is right. BackPACK has
# ``SumModule``, and for constant factors its own ``ScaleModule``, the one without a
# parameter.


class ScaledBranches(nn.Sequential):
    """Two branches, each with its own factor, and a plain sum."""

    def forward(self, X: Tensor) -> Tensor:
        """Return the output of the network, shape ``[N, C]``."""
        return self[4](self[2](self[0](X)), self[3](self[1](X)))


two, three = scale_module.ScaleModule(2.0), scale_module.ScaleModule(3.0)
fixed = ScaledBranches(*branches, two, three, SumModule())
model = run(fixed, make_diag_ggn(), X, y)
for name in right:
    torch.testing.assert_close(model.get_parameter(name).diag_ggn_exact, right[name])

# %%
# Tied parameters
# ~~~~~~~~~~~~~~~
# **What you see:** ``grad_batch`` does not add up to ``.grad``. The right individual
# gradients do.

layers = [ScaleModule(-1.5), nn.Linear(D, D), ScaleModule(), nn.Linear(D, C)]
layers[2].weight = layers[0].weight
tied = nn.Sequential(*layers).to(device, torch.float64)

right = individual_gradients(tied, X, y)["0.weight"]
weight = run(tied, make_batch_grad(), X, y)[0].weight
silently_wrong("tied, BatchGrad", weight.grad_batch, right)
print(f".grad {weight.grad.item():9.4f}, sum of wrong {weight.grad_batch.sum():9.4f}")
torch.testing.assert_close(right.sum(0), weight.grad)

# %%
# **Cause:** each use stores its result on the one parameter, and overwrites that of the
# use before. **Fix:** ``extension_hook`` runs after each layer. Ours adds up the
# results and deletes each from the parameter, so that no part of the sum is taken for
# the whole.


def make_adder(savefield: str) -> tuple[Callable, dict[nn.Parameter, Tensor]]:
    """Build an ``extension_hook`` that adds up results over the uses of a parameter.

    Args:
        savefield: Attribute in which the extension stores its results.

    Returns:
        The hook, and the dictionary in which it collects the sums.
    """
    sums: dict[nn.Parameter, Tensor] = {}

    def add(module: nn.Module):
        """Add up what was stored on the parameters of ``module``, and clear it."""
        for parameter in module.parameters(recurse=False):
            if hasattr(parameter, savefield):
                result = getattr(parameter, savefield)
                sums[parameter] = sums.get(parameter, 0) + result
                delattr(parameter, savefield)

    return add, sums


add, sums = make_adder("grad_batch")
model = extend(deepcopy(tied))
with backpack(make_batch_grad(), extension_hook=add):
    extended_loss(model(X), y).backward()
torch.testing.assert_close(sums[model[0].weight], right)

# %%
# Gradients of several uses add up, but GGN diagonals do not. Let :math:`V_1` and
# :math:`V_2` be the square roots with respect to the parameter from two uses. Then
# :math:`(V_1 + V_2)^2` is wanted, not :math:`V_1^2 + V_2^2`.

layers = [nn.Linear(D, D, bias=False), nn.Tanh(), nn.Linear(D, D, bias=False)]
layers[2].weight = layers[0].weight
tied = nn.Sequential(*layers, nn.Linear(D, C)).to(device, torch.float64)
right = ggn_diagonals(tied, X, y)["0.weight"]

add, sums = make_adder("diag_ggn_exact")
model = extend(deepcopy(tied))
with backpack(DiagGGNExact(), extension_hook=add):
    extended_loss(model(X), y).backward()
silently_wrong("tied, DiagGGN added up", sums[model[0].weight], right)

# %%
# **Fix:** add up the V, then square. ``SqrtGGNExact`` gives the V of each parameter,
# with shape ``[C, N, *parameter.shape]``.

add, sums = make_adder("sqrt_ggn_exact")
model = extend(deepcopy(tied))
with backpack(SqrtGGNExact(), extension_hook=add):
    extended_loss(model(X), y).backward()
torch.testing.assert_close(sums[model[0].weight].square().sum((0, 1)), right)

# %%
# A weight that is not a leaf
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~
# **What you see:** the method ran, but the result is nowhere.


class LogScaleModule(nn.Module):
    """Multiply the input by a positive number, the exponential of a parameter."""

    def __init__(self, weight: float = 2.0):
        """Store the logarithm of the number as a parameter of shape ``[1]``.

        Args:
            weight: Initial value of the number. Default: ``2.0``.
        """
        super().__init__()
        self.log_weight = nn.Parameter(torch.tensor([weight]).log())

    @property
    def weight(self) -> Tensor:
        """The number, computed anew at each access, shape ``[1]``."""
        return self.log_weight.exp()

    def forward(self, X: Tensor) -> Tensor:
        """Scale ``X``, same shape as ``X``."""
        return self.weight * X


positive = nn.Sequential(nn.Linear(D, H), LogScaleModule(1.5), nn.Linear(H, C))
positive = positive.to(device, torch.float64)
extension = BatchGrad()
extension.set_module_extension(LogScaleModule, ScaleModuleBatchGrad())
model = run(positive, extension, X, y)

message = "object has no attribute 'grad_batch'"
provoke(AttributeError, message, lambda: model[1].weight.grad_batch)
provoke(AttributeError, message, lambda: model[1].log_weight.grad_batch)

# %%
# **Cause:** BackPACK stores the result on ``module.weight``. Here this is a temporary
# tensor, gone at once. **Fix:** name the leaf, and write the method for it. With
# :math:`a` for ``log_weight`` and :math:`z = e^a x`, the Jacobian with respect to
# :math:`a` is :math:`z` itself, the output of the layer.


class LogScaleModuleBatchGrad(FirstOrderModuleExtension):
    """Compute individual gradients for ``LogScaleModule``."""

    def __init__(self):
        """Name the parameters for which this class has a method."""
        super().__init__(params=["log_weight"])

    def log_weight(
        self,
        ext: BatchGrad,
        module: LogScaleModule,
        g_inp: tuple[Tensor | None, ...],
        g_out: tuple[Tensor],
        bp: None,
    ) -> Tensor:
        """Compute the individual gradients of ``module.log_weight``.

        Args:
            ext: The running ``BatchGrad``; it knows which samples are wanted.
            module: The layer; ``module.output`` has shape ``[N, *]``.
            g_inp: Gradients with respect to the layer's inputs (not needed).
            g_out: Gradient with respect to the layer's output, shape ``[N, *]``.
            bp: ``None``: first-order extensions backpropagate nothing.

        Returns:
            Individual gradients, shape ``[N, 1]``, or ``[len(subsampling), 1]``.
        """
        subset = ext.get_subsampling()
        Z = subsample(module.output, subsampling=subset)
        grad_Z = subsample(g_out[0], subsampling=subset)
        return einsum(grad_Z, Z, "n ..., n ... -> n").unsqueeze(-1)


right = individual_gradients(positive, X, y)["1.log_weight"]
for indices in [list(range(N)), subset]:
    extension = BatchGrad(subsampling=indices)
    extension.set_module_extension(LogScaleModule, LogScaleModuleBatchGrad())
    model = run(positive, extension, X, y)
    torch.testing.assert_close(model[1].log_weight.grad_batch, right[indices])

# %%
# The same holds for weights that ``torch.nn.utils.parametrize`` computes. It even
# replaces the class of the layer, so that the lookup fails as well, and adds modules of
# its own; the message names one of these. The fix is the same: a layer that owns the
# leaf.


class Exponential(nn.Module):
    """Compute the exponential."""

    def forward(self, X: Tensor) -> Tensor:
        """Return ``exp(X)``, same shape as ``X``."""
        return X.exp()


parametrized = deepcopy(network)
parametrize.register_parametrization(parametrized[1], "weight", Exponential())
message = "does not have an extension for Module"
print(f"class of the layer: {type(parametrized[1]).__name__}")
provoke(NotImplementedError, message, lambda: run(parametrized, make_diag_ggn(), X, y))

# %%
# A factor in front of the loss
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# **What you see:** a warning, and a GGN diagonal without the factor. Here the factor
# 0.5 is missing, so the diagonal is twice the right one.

model = extend(deepcopy(network))
with backpack(make_batch_grad(), make_diag_ggn()):
    loss = 0.5 * extended_loss(model(X), y)
    provoke(UserWarning, "seems to have been modified", loss.backward)

right = 0.5 * diagonals["1.weight"]
silently_wrong("factor in front of the loss", model[1].weight.diag_ggn_exact, right)

# %%
# **Cause:** V starts at the loss module, as if the gradient that arrives there were 1.
# If it is not, BackPACK only warns. Gradients come from PyTorch and do carry the
# factor. **Fix:** for second order, call ``backward`` on the loss itself and multiply
# the result.

torch.testing.assert_close(model[1].weight.grad_batch, 0.5 * gradients["1.weight"])

model = run(network, make_diag_ggn(), X, y)
torch.testing.assert_close(0.5 * model[1].weight.diag_ggn_exact, right)

# %%
# Ignored targets
# ~~~~~~~~~~~~~~~
# **What you see:** samples with the target −100, which ``nn.CrossEntropyLoss`` leaves
# out, are not left out of the GGN.

masked_y = y.clone()
masked_y[:2] = -100
right = ggn_diagonals(network, X, masked_y)["1.weight"]
wrong = run(network, make_diag_ggn(), X, masked_y)[1].weight.diag_ggn_exact
silently_wrong("ignored targets", wrong, right)

# %%
# **Cause:** the Hessian of the cross-entropy is the same for all classes that the
# target can name, so BackPACK never looks at the target, and does not see the −100.
# Another ``ignore_index``, or class weights, raise an error:

for option, message in [
    ({"ignore_index": 0}, "Only default ignore_index (-100) is implemented"),
    ({"weight": torch.ones(C).to(X)}, "Only default weight (None)"),
]:
    weighted = nn.CrossEntropyLoss(reduction="sum", **option)
    function = partial(run, network, make_diag_ggn(), X, y, weighted)
    provoke(NotImplementedError, message, function)

# %%
# **Fix** for ignored targets: leave the samples out yourself. With ``"mean"``, PyTorch
# divides by the number of samples that remain, and so does this.

kept = masked_y != -100
for reduction in ["sum", "mean"]:
    loss_function_r = nn.CrossEntropyLoss(reduction=reduction)
    model = run(network, make_diag_ggn(), X[kept], y[kept], loss_function_r)
    right = ggn_diagonals(network, X, masked_y, loss_function_r)["1.weight"]
    torch.testing.assert_close(model[1].weight.diag_ggn_exact, right)

# %%
# **Fix** for class weights, with ``"sum"``: all samples of a class have the same
# weight. So run each class on its own, multiply by its weight, and add up. (Or write an
# extension for the loss: `A custom loss <4_custom_loss.html>`__ has one with weights.)

class_weights = torch.rand(C, dtype=torch.float64, device=device)
weighted = nn.CrossEntropyLoss(class_weights, reduction="sum")
added = torch.zeros(1, dtype=torch.float64, device=device)
for c in y.unique():
    model = run(network, make_diag_ggn(), X[y == c], y[y == c])
    added += class_weights[c] * model[1].weight.diag_ggn_exact
right = ggn_diagonals(network, X, y, weighted)["1.weight"]
torch.testing.assert_close(added, right)

# %%
# Squares and sums in the wrong order
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# **What you see:** the layer's own diagonal is wrong, by a factor that depends on the
# data, so that no constant mends it. All other layers are right.


class WrongSquareFirst(ScaleModuleDiagGGNExact):
    """Wrong on purpose: squares before the sum over features."""

    def weight(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Return the sum of all squares, shape ``[1]``."""
        return (V_out * module.input0).square().sum().unsqueeze(0)


class WrongSumFirst(ScaleModuleDiagGGNExact):
    """Wrong on purpose: sums over samples before the square."""

    def weight(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Return the sum over columns of squared sums over samples, shape ``[1]``."""
        V_w = einsum(V_out, module.input0, "c n ..., n ... -> c")
        return V_w.square().sum().unsqueeze(0)


for trap, wrong_extension in [
    ("square before the sum over features", WrongSquareFirst),
    ("sum over samples before the square", WrongSumFirst),
]:
    model = run(network, make_diag_ggn(wrong_extension), X, y)
    silently_wrong(trap, model[1].weight.diag_ggn_exact, diagonals["1.weight"])
    for name in diagonals.keys() - {"1.weight"}:
        actual = model.get_parameter(name).diag_ggn_exact
        torch.testing.assert_close(actual, diagonals[name])

# %%
# On other data the factor is another one:

for label, data in [("X", (X, y)), ("X_other", (X_other, y_other))]:
    right = ggn_diagonals(network, *data)["1.weight"]
    for wrong_extension in [WrongSquareFirst, WrongSumFirst]:
        model = run(network, make_diag_ggn(wrong_extension), *data)
        factor = (model[1].weight.diag_ggn_exact / right).item()
        print(f"{label:<8} {wrong_extension.__name__:<16} wrong / right = {factor:.4f}")

# %%
# **Cause:** the VJP of one sample sums over all entries of the output that the
# parameter acts on, here the features; samples and columns of V are not part of it.
# **Fix:** three steps in this order: sum over the features, square, sum over columns
# and samples,
#
# .. math::
#     \operatorname{diag}(G)_w = \sum_n \sum_c \Big( \sum_d x_{nd} \, V_{cnd} \Big)^2 .

model = run(network, make_diag_ggn(), X, y)
torch.testing.assert_close(model[1].weight.diag_ggn_exact, diagonals["1.weight"])

# %%
# How far off the numbers are
# ---------------------------
# The figure shows the relative errors of all silent traps on this page that store a
# wrong number. Their sizes belong to these examples. Rounding explains none of them;
# without the right numbers, most would go unnoticed.

names = sorted(relative_errors, key=relative_errors.get)
fig, ax = plt.subplots(figsize=(8, 4), layout="constrained")
ax.barh(names, [100 * relative_errors[name] for name in names], color="C1")
ax.set_xlabel("relative error in percent")
ax.set_ylabel("trap")
ax.set_title("Silent traps: how far the numbers are off")
plt.show()

# %%
# What was verified
# -----------------
# The order of the calls and the shapes in the table were recorded when the page ran.
# Every message was raised by the installed versions of PyTorch and BackPACK, and every
# silently wrong result differs from the right one, which ``torch.func`` computed
# without BackPACK. Every fix in a code cell was run and compared in float64, at the
# default tolerance of ``torch.testing.assert_close``. If a later BackPACK mends one of
# the traps, the script of this page ends with an error, and the page must be rewritten.
#
# **Next:** `Check your own layer <6_check_your_layer.html>`_ is a script that finds
# such mistakes in an extension of yours, and names them.
#
# BackPACK: F. Dangel, F. Kunstner, P. Hennig, "BackPACK: Packing more into Backprop",
# ICLR 2020, `arXiv:1912.10985 <https://arxiv.org/abs/1912.10985>`_.
