r"""
Individual gradients
====================

After this page you can make BackPACK compute one gradient per sample, in a single
backward pass, for a layer of your own.

We will:

1. write the individual gradient of a layer as a vector-Jacobian product (VJP);
2. turn this one line of math into a module extension, and register it;
3. look at what BackPACK hands to the module extension, and in which shapes;
4. honor subsampling, so that only chosen samples are computed;
5. compare with a loop over samples and with ``torch.func``, with the layer at several
   places in a network, for inputs of two shapes and both reductions of the loss.

You should know PyTorch's ``nn.Module`` and ``backward``, and what ``extend`` does: see
`A layer BackPACK does not know <1_module.html>`_.

The letters are the same on all pages: N samples in a batch, T steps of a sequence (on
one page, T is a temperature), D features, C classes. Their sizes differ from page to
page.
"""

import math
from functools import partial

import matplotlib.pyplot as plt
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad
from backpack.extensions.firstorder.base import FirstOrderModuleExtension
from backpack.utils.subsampling import subsample
from einops import einsum
from torch import Tensor, nn

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# %%
# The layer
# ---------
# This is the layer that BackPACK does not know: it multiplies its input by one
# trainable number.


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
# The individual gradient is a VJP
# --------------------------------
# A loss over a batch adds up the losses of its samples, with a factor :math:`r` in
# front: :math:`r = 1` for ``reduction="sum"`` and :math:`r = 1/N` for ``"mean"``,
#
# .. math::
#     L(w) = r \sum_{n=1}^{N} \ell_n(w) .
#
# ``loss.backward()`` computes the gradient of :math:`L`: it adds over the samples and
# forgets the summands. We want the summands, the **individual gradients**
# :math:`g_n = r \, \partial \ell_n / \partial w`.
#
# We assume that no layer mixes samples. (Batch normalization would.) For one sample our
# layer computes :math:`z_n = w x_n`, where its input :math:`x_n` and its output
# :math:`z_n` have :math:`D` entries. Write :math:`\mathrm{J}_w z_n` for the Jacobian,
# the derivatives of all entries of :math:`z_n` with respect to :math:`w`. Only
# :math:`\ell_n` depends on :math:`z_n`, so :math:`\partial L / \partial z_n = r \,
# \partial \ell_n / \partial z_n`. By the chain rule,
#
# .. math::
#     g_n
#     = (\mathrm{J}_w z_n)^\top \, \frac{\partial L}{\partial z_n}
#     = x_n^\top \, \frac{\partial L}{\partial z_n}
#     = \sum_{d=1}^{D} x_{nd} \, \frac{\partial L}{\partial z_{nd}} .
#
# This is a VJP: the transposed Jacobian (of the output with respect to the parameter)
# times a vector (the gradient with respect to the output). Here the Jacobian is a
# single column, :math:`\mathrm{J}_w z_n = x_n`. We let PyTorch confirm it.

N, T, D, C = 7, 3, 4, 5

X = torch.randn(N, D, dtype=torch.float64, device=device)
w = torch.tensor([2.0], dtype=torch.float64, device=device)

jacobian = torch.func.jacrev(lambda w: w * X)(w)
torch.testing.assert_close(jacobian, X.unsqueeze(-1))
print(f"Jacobian of all N outputs: {list(jacobian.shape)}")

# %%
# Now the right-hand side of the equation, for a loss with ``reduction="sum"``, so
# :math:`r = 1`. The linear layer ``head`` stands for the rest of the network. PyTorch
# gives us :math:`\partial L / \partial z`; the sum over :math:`d` is one ``einsum``.
# (We use the one of einops: tensors first, then a pattern with named axes.)

y = torch.randint(C, (N,), device=device)
head = nn.Linear(D, C, dtype=torch.float64, device=device)
loss_function = nn.CrossEntropyLoss(reduction="sum")

Z = (w * X).requires_grad_()
(grad_Z,) = torch.autograd.grad(loss_function(head(Z), y), Z)
g_w = einsum(grad_Z, X, "n d, n d -> n")
print(f"One gradient for each of the {N} samples: {list(g_w.shape)}")

# %%
# The left-hand side, sample by sample: take one sample, compute its loss, differentiate
# with respect to the weight.


def loss_of_sample(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of one sample ``x`` of shape ``[D]`` as a function of ``w``."""
    return loss_function(head(w * x).unsqueeze(0), y.unsqueeze(0))


for n in range(N):
    g_n = torch.func.grad(loss_of_sample)(w, X[n], y[n])
    torch.testing.assert_close(g_w[n], g_n[0])

# %%
# The module extension
# --------------------
# Two kinds of objects work together. An **extension** of BackPACK, here ``BatchGrad``,
# stands for a quantity, and serves the whole network. A **module extension** is what we
# write: it says how to compute this quantity at the layers of one class. For
# first-order extensions like ``BatchGrad`` it needs:
#
# - the list of parameters that it can treat, given to the base class;
# - for each of these, **a method with the parameter's name**. What it returns is stored
#   in an attribute of the parameter; for ``BatchGrad``, this is ``grad_batch``.
#
# BackPACK calls the method, for each parameter that requires a gradient, with the
# running extension ``ext``, the layer ``module``, and two tuples: the gradients with
# respect to the layer's inputs, ``g_inp``, and with respect to its output, ``g_out``.
# The last argument ``bp`` is what second-order extensions send from layer to layer;
# first-order extensions send nothing, so it is ``None``. The arguments are passed by
# position. The input of the forward pass waits in ``module.input0``.
#
# Two things make the method general. The ellipsis in the ``einsum`` pattern sums over
# all axes behind the first, so that ``[N, D]``, ``[N, T, D]`` and images are all served
# by one line. And ``subsample`` keeps the samples that the user asked for, by default
# all: ``BatchGrad`` hands over the full batch, and leaves it to us to cut.


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
# The result must have the shape of the parameter, ``[1]``, behind a batch axis. That is
# why ``unsqueeze`` turns ``[N]`` into ``[N, 1]``. For a parameter of shape ``[D]``, a
# factor for each feature, the sum would keep the axis ``d``. `BackPACK does not check
# this shape
# <../2_any_layer/5_contract_and_traps.html#nothing-checks-what-you-return>`_.
#
# Registration
# ------------
# ``set_module_extension`` connects the layer's class with our module extension. The
# entry lives in one ``BatchGrad`` object. So it is convenient to have a function that
# builds a ``BatchGrad`` and registers our module extension in it. We call it anew for
# each backward pass. (For second-order extensions that will be a must.)


def make_batch_grad(subsampling: list[int] | None = None) -> BatchGrad:
    """Build a ``BatchGrad`` that supports ``ScaleModule``.

    Args:
        subsampling: Indices of the samples to compute. Default: all.
    """
    extension = BatchGrad(subsampling=subsampling)
    extension.set_module_extension(ScaleModule, ScaleModuleBatchGrad())
    return extension


# %%
# That is all. A first run, on the scale module and the linear layer from above:
# ``extend`` the model and the loss (in place), and call ``backward`` inside
# ``with backpack(...)``. (``BatchGrad`` alone does not need the loss extended;
# second-order extensions will.) The result is the one that we computed by hand.

scale = ScaleModule().to(device, torch.float64)
model = extend(nn.Sequential(scale, head))
extended_loss_function = extend(loss_function)

with backpack(make_batch_grad()):
    extended_loss_function(model(X), y).backward()

torch.testing.assert_close(scale.weight.grad_batch, g_w.unsqueeze(-1))
print(f"weight:     {list(scale.weight.shape)}")
print(f"grad:       {list(scale.weight.grad.shape)}")
print(f"grad_batch: {list(scale.weight.grad_batch.shape)}")

# %%
# The individual gradients add up to the gradient that PyTorch accumulated. The figure
# shows it as a walk: every sample moves the sum up or down, and the walk ends
# at ``.grad``.

torch.testing.assert_close(scale.weight.grad_batch.sum(0), scale.weight.grad)

steps = scale.weight.grad_batch.flatten().tolist()
sums = scale.weight.grad_batch.flatten().cumsum(0).tolist()

fig, ax = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
for n, (step, end) in enumerate(zip(steps, sums, strict=True)):
    color, direction = ("C0", "up") if step > 0 else ("C2", "down")
    ax.bar(n, step, bottom=end - step, color=color, label=f"moves the sum {direction}")
    ax.hlines(end, n - 0.4, n + 1.4, color="0.3", linewidth=0.8)  # to the next one
ax.bar(N, scale.weight.grad.item(), color="C1", label="gradient (.grad)")
ax.axhline(0, color="black", linewidth=0.8)
ax.use_sticky_edges = False  # leaves a margin below the lowest bar
ax.autoscale_view()
ax.set_xticks(range(N + 1), [f"$g_{{{n}}}$" for n in range(1, N + 1)] + ["sum"])
ax.set_xlabel("sample")
ax.set_ylabel("sum so far")
ax.set_title("Individual gradients of the scale weight add up to .grad")
handles, labels = ax.get_legend_handles_labels()
legend = dict(zip(labels, handles, strict=True))  # each label once
fig.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3)
plt.show()

# %%
# What the method is given
# ------------------------
# To see the arguments at the call, we subclass ``ScaleModuleBatchGrad`` and print their
# shapes. This is a useful way to explore a new layer. We register an object of this
# class over the first entry, which `BackPACK only allows with overwrite=True
# <../2_any_layer/5_contract_and_traps.html>`_.


class PrintingBatchGrad(ScaleModuleBatchGrad):
    """``ScaleModuleBatchGrad`` that prints the shapes of what it is given."""

    def weight(self, ext, module, g_inp, g_out, bp) -> Tensor:
        """Print the shapes, then compute individual gradients, shape ``[N, 1]``."""
        print(f"module.input0: {list(module.input0.shape)}")
        print(f"module.output: {list(module.output.shape)}")
        print(f"module.weight: {list(module.weight.shape)}")
        print(f"g_out[0]:      {list(g_out[0].shape)}")
        print(f"g_inp:         {g_inp}")
        print(f"bp:            {bp}")
        return super().weight(ext, module, g_inp, g_out, bp)


printing_extension = make_batch_grad()
printing_extension.set_module_extension(
    ScaleModule, PrintingBatchGrad(), overwrite=True
)

with backpack(printing_extension):
    extended_loss_function(model(X), y).backward()

torch.testing.assert_close(scale.weight.grad_batch, g_w.unsqueeze(-1))

# %%
# ``g_inp`` holds ``None`` because no one needs the gradient with respect to the data:
# the layer stands first in the network.
#
# Reduction: what ``mean`` does to individual gradients
# -----------------------------------------------------
# ``backward`` starts at the loss, so all that arrives at a layer carries the factor
# :math:`r`. With ``reduction="mean"``, ``grad_batch`` holds :math:`g_n = \frac{1}{N}
# \partial \ell_n / \partial w`. If you want gradients of the samples' own losses, use
# ``"sum"``, or multiply by N. (Unlike ``.grad``, which adds up, ``grad_batch`` is
# replaced by each backward pass.)

gradients = {}
for reduction in ["sum", "mean"]:
    loss_function_r = extend(nn.CrossEntropyLoss(reduction=reduction))
    with backpack(make_batch_grad()):
        loss_function_r(model(X), y).backward()
    gradients[reduction] = scale.weight.grad_batch
    print(f"{reduction:>4}: first gradient {gradients[reduction][0].item():+.4f}")

torch.testing.assert_close(gradients["sum"], N * gradients["mean"])

# %%
# The factor belongs to the loss, and it need not be :math:`1/N`. ``nn.MSELoss`` with
# ``"mean"`` divides by the number of all entries of the output, here :math:`N C`.

targets = torch.randn(N, C, dtype=torch.float64, device=device)
for reduction in ["sum", "mean"]:
    squared_error = extend(nn.MSELoss(reduction=reduction))
    with backpack(make_batch_grad()):
        squared_error(model(X), targets).backward()
    gradients[reduction] = scale.weight.grad_batch

torch.testing.assert_close(gradients["sum"], N * C * gradients["mean"])

# %%
# Two independent witnesses
# -------------------------
# We need right answers from elsewhere to compare with. The first witness is a loop: a
# forward and a backward pass for each sample, as a batch of size one. For cross-entropy
# and a batch of one sample, ``"mean"`` and ``"sum"`` are the same, so the loop gives
# the gradients of the samples' own losses, without :math:`r`.


def loop_over_samples(
    model: nn.Module, loss_function: nn.Module, weight: Tensor, X: Tensor, y: Tensor
) -> Tensor:
    """Compute individual gradients one at a time.

    Args:
        model: The network.
        loss_function: Cross-entropy with reduction ``"mean"`` or ``"sum"``.
        weight: The parameter, shape ``[1]``.
        X: Inputs, shape ``[N, *]``.
        y: Class indices, shape ``[N]``.

    Returns:
        Gradients of the samples' own losses, shape ``[N, 1]``.
    """
    losses = [loss_function(model(X[[n]]), y[[n]]) for n in range(len(X))]
    return torch.stack([torch.autograd.grad(loss, weight)[0] for loss in losses])


# %%
# The second witness is ``torch.func``: ``grad`` makes a function for one sample's
# gradient, ``vmap`` runs it over the batch. It needs no extension, and it
# treats the whole network as one function of its parameters.


def vmap_over_samples(
    model: nn.Module, loss_function: nn.Module, name: str, X: Tensor, y: Tensor
) -> Tensor:
    """Compute individual gradients with ``torch.func``.

    Args:
        model: The network, not extended.
        loss_function: Cross-entropy with either reduction, not extended.
        name: Name of the parameter in ``model``; it has shape ``[1]``.
        X: Inputs, shape ``[N, *]``.
        y: Class indices, shape ``[N]``.

    Returns:
        Gradients of the samples' own losses, shape ``[N, 1]``.
    """

    def loss_of_sample(parameters, x, y):
        """Return the loss of one sample, as a function of all parameters."""
        output = torch.func.functional_call(model, parameters, x.unsqueeze(0))
        return loss_function(output, y.unsqueeze(0))

    parameters = {n: p.detach() for n, p in model.named_parameters()}
    gradients = torch.func.vmap(torch.func.grad(loss_of_sample), in_dims=(None, 0, 0))
    return gradients(parameters, X, y)[name]


# %%
# The check
# ---------
# We build networks with the scale module first, in the middle and last. (For
# second-order extensions the place will matter a lot.) With ``Flatten``, the same
# layers serve ``[N, D]`` and ``[N, T, D]``; only the second linear layer has another
# size. (These are the shapes of the network's input. In the last place the scale module
# gets ``[N, C]``.)

places = {"first": 0, "middle": 2, "last": 4}


def make_network(place: str, input_shape: tuple[int, ...]) -> nn.Sequential:
    """Build a classifier that holds a ``ScaleModule``.

    Args:
        place: Where the layer stands, a key of ``places``.
        input_shape: Shape of one sample, ``(D,)`` or ``(T, D)``.

    Returns:
        Network that maps ``[N, *input_shape]`` to ``[N, C]``.
    """
    hidden = 6
    features = hidden * math.prod(input_shape[:-1])
    layers = [nn.Linear(D, hidden), nn.Sigmoid(), nn.Flatten(), nn.Linear(features, C)]
    layers.insert(places[place], ScaleModule())
    return nn.Sequential(*layers).to(device, torch.float64)


# %%
# The witnesses run before ``extend`` touches the network, because ``torch.func`` cannot
# run through BackPACK's hooks. Then BackPACK computes all samples, and after that only
# samples 4, 0 and 2 (counted from 0), in this order. With ``"mean"``, the factor
# :math:`r` stays :math:`1/N` for a subset, where N counts the whole batch.


def check(make_extension, place: str, input_shape: tuple[int, ...], reduction: str):
    """Compare BackPACK's individual gradients with both witnesses.

    Args:
        make_extension: Builds a ``BatchGrad`` that supports ``ScaleModule``, for a
            ``subsampling``.
        place: Where the layer stands, a key of ``places``.
        input_shape: Shape of one sample, ``(D,)`` or ``(T, D)``.
        reduction: ``"mean"`` or ``"sum"``.

    Raises:
        AssertionError: If the loop disagrees with ``vmap`` or with BackPACK.
    """
    X = torch.randn(N, *input_shape, dtype=torch.float64, device=device)
    y = torch.randint(C, (N,), device=device)
    model = make_network(place, input_shape)
    loss_function = nn.CrossEntropyLoss(reduction=reduction)
    weight = model[places[place]].weight
    name = f"{places[place]}.weight"

    by_loop = loop_over_samples(model, loss_function, weight, X, y)
    by_vmap = vmap_over_samples(model, loss_function, name, X, y)
    torch.testing.assert_close(by_vmap, by_loop)

    model, loss_function = extend(model), extend(loss_function)
    r = {"mean": 1 / N, "sum": 1.0}[reduction]
    for subset in [None, [4, 0, 2]]:
        with backpack(make_extension(subsampling=subset)):
            loss_function(model(X), y).backward()
        expected = r * (by_loop if subset is None else by_loop[subset])
        torch.testing.assert_close(weight.grad_batch, expected)


for place in places:
    for input_shape in [(D,), (T, D)]:
        for reduction in ["mean", "sum"]:
            check(make_batch_grad, place, input_shape, reduction)
            print(f"{place:>6}  {reduction:>4}  {[N, *input_shape]}: all agree")

# %%
# Would a mistake be noticed? We try two that are easy to make. One forgets the subset.
# The other takes the mean over all axes behind the first, where the VJP has a sum.


class WrongSubsetBatchGrad(ScaleModuleBatchGrad):
    """Wrong on purpose: ignores which samples are wanted."""

    def weight(self, ext, module, g_inp, g_out, bp) -> Tensor:
        """Compute the gradients of all samples, shape ``[N, 1]``."""
        wants_all = BatchGrad()
        return super().weight(wants_all, module, g_inp, g_out, bp)


class WrongMeanBatchGrad(ScaleModuleBatchGrad):
    """Wrong on purpose: takes the mean where the VJP has a sum."""

    def weight(self, ext, module, g_inp, g_out, bp) -> Tensor:
        """Compute gradients that are too small, shape ``[N, 1]``."""
        g_n = super().weight(ext, module, g_inp, g_out, bp)
        return g_n / module.input0[0].numel()


# %%
# Both are caught.


def make_wrong(wrong_class: type, subsampling: list[int] | None = None) -> BatchGrad:
    """Build a ``BatchGrad`` with a wrong module extension."""
    extension = BatchGrad(subsampling=subsampling)
    extension.set_module_extension(ScaleModule, wrong_class())
    return extension


for wrong_class in [WrongSubsetBatchGrad, WrongMeanBatchGrad]:
    try:
        check(partial(make_wrong, wrong_class), "middle", (D,), "sum")
    except AssertionError as error:
        print(f"{wrong_class.__name__} is caught: {str(error).splitlines()[0]}")
    else:
        raise RuntimeError(f"The check did not notice {wrong_class.__name__}.")

# %%
# What was verified
# -----------------
# The equation was evaluated and agrees with ``torch.func.grad`` sample by sample. The
# extension agrees with a loop over samples, and the loop with ``vmap``, in float64, at
# the default tolerance of ``torch.testing.assert_close``: with the layer first, in the
# middle and last, for inputs of the network of shape ``[N, D]`` and ``[N, T, D]``,
# ``mean`` and ``sum``, all samples and a subset. Two wrong module extensions are
# caught.
#
# **Next:** `The GGN and its diagonal, derived <3_ggn_derivation.html>`_ prepares the
# second-order extension.
#
# BackPACK: F. Dangel, F. Kunstner, P. Hennig, "BackPACK: Packing more into Backprop",
# ICLR 2020, `arXiv:1912.10985 <https://arxiv.org/abs/1912.10985>`_.
