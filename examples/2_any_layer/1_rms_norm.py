r"""
RMSNorm: a vector parameter and a coupled Jacobian
==================================================

After this page you can make BackPACK support a layer whose parameter is a vector, whose
input may have further axes, and whose every output feature depends on every input
feature.

We will:

1. derive the two vector-Jacobian products (VJPs) of RMSNorm, one for its parameter and
   one for its input, and evaluate both against ``torch.func``;
2. turn them into extensions for ``BatchGrad`` and ``DiagGGNExact``;
3. check them with the layer first, in the middle and last in a network, for inputs
   ``[N, D]`` and ``[N, T, D]``, and look at the ways from ``[N, T, D]`` to a
   cross-entropy loss;
4. add a bias, because layers have several parameters;
5. get the same VJPs by automatic differentiation, for nearly any layer, and see the
   price.

You should know how an extension is written and registered:
`Individual gradients <../1_scale_module/2_individual_gradients.html>`_ and
`The GGN diagonal, backpropagated <../1_scale_module/4_ggn_diagonal.html>`_.

The letters: N samples in a batch, T steps of a sequence, D features, C classes. The
backpropagated square root V has one column for each logit of a sample: C columns in a
plain classifier, and more where a sample has more logits. In the shapes of V, C stands
for the number of columns.
"""

import math
from collections.abc import Callable
from functools import partial
from statistics import quantiles
from time import perf_counter

import matplotlib.pyplot as plt
import torch
from backpack import backpack, extend
from backpack.custom_module.permute import Permute
from backpack.extensions import BatchGrad, DiagGGNExact
from backpack.extensions.firstorder.base import FirstOrderModuleExtension
from backpack.extensions.module_extension import ModuleExtension
from backpack.utils.subsampling import subsample
from einops import einsum, reduce
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vjp, vmap

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# %%
# The layer
# ---------
# RMSNorm divides a vector :math:`x` of :math:`D` features by its root mean square
# :math:`\rho`, then scales every feature by a weight of its own:
#
# .. math::
#     z_d = w_d \, u_d , \qquad
#     u_d = \frac{x_d}{\rho} , \qquad
#     \rho = \sqrt{\frac{1}{D} \sum_{e=1}^{D} x_e^2 + \varepsilon} .
#
# The number :math:`\varepsilon` keeps the denominator away from zero. If the input has
# further axes, each vector along the last axis is normalized alone. The extensions will
# need :math:`u` and :math:`\rho` too, so they get a function.


def normalize(X: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Divide by the root mean square over the features.

    Args:
        X: Input, shape ``[N, D]`` or ``[N, T, D]``.
        eps: Added to the mean square.

    Returns:
        Normalized input, same shape as ``X``, and the root mean square, shape
        ``[N, 1]`` or ``[N, T, 1]``.
    """
    rms = (X.square().mean(-1, keepdim=True) + eps).sqrt()
    return X / rms, rms


class RMSNorm(nn.Module):
    """Normalize by the root mean square, then scale (Zhang & Sennrich, 2019).

    This is Eq. 4 of the paper, with epsilon added.
    """

    def __init__(self, D: int, eps: float = 1e-6):
        """Store the weight, shape ``[D]``, initially one.

        Args:
            D: Number of features.
            eps: Added to the mean square. Default: ``1e-6``.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.eps = eps

    def forward(self, X: Tensor) -> Tensor:
        """Normalize and scale ``X`` of shape ``[N, D]`` or ``[N, T, D]``."""
        U, _ = normalize(X, self.eps)
        return self.weight * U


# %%
# PyTorch has this layer too, as ``nn.RMSNorm``. Do both compute the same? The weights
# are made random first, here and in all checks below. At the initial value of one, a
# formula that forgot the weight would look right.


def randomize(module: nn.Module) -> nn.Module:
    """Move to the device, to float64, and draw all parameters from [0.2, 1.2]."""
    module = module.to(device, torch.float64)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.2, 1.2)
    return module


N, T, D, C = 6, 3, 5, 4
EPS = 1e-6

X = torch.randn(N, T, D, dtype=torch.float64, device=device)
ours, theirs = randomize(RMSNorm(D, EPS)), randomize(nn.RMSNorm(D, EPS))
theirs.load_state_dict(ours.state_dict())
torch.testing.assert_close(ours(X), theirs(X))

# %%
# Two Jacobians
# -------------
# A layer with a parameter has two Jacobians. We derive them for one vector :math:`x`,
# and write :math:`\delta_{de}` for one if :math:`d = e` and zero otherwise.
#
# The output is linear in the weight, and feature :math:`d` sees only its own weight:
#
# .. math::
#     \frac{\partial z_d}{\partial w_e} = \delta_{de} \, u_d .

w = ours.weight.detach()
x = X[0, 0]
u, rms = normalize(x, EPS)

jacobian_w = jacrev(lambda w: w * normalize(x, EPS)[0])(w)
torch.testing.assert_close(torch.diag(u), jacobian_w)

# %%
# The input acts twice: as the numerator :math:`x_d`, and through :math:`\rho`, which
# every feature enters. With :math:`\partial \rho / \partial x_e = x_e / (D \rho) = u_e
# / D`, the quotient rule gives
#
# .. math::
#     \frac{\partial z_d}{\partial x_e}
#     = \frac{w_d}{\rho} \left( \delta_{de} - \frac{1}{D} \, u_d \, u_e \right) .

identity = torch.eye(D, dtype=torch.float64, device=device)
by_hand = w.unsqueeze(1) / rms * (identity - torch.outer(u, u) / D)

jacobian_x = jacrev(lambda x: w * normalize(x, EPS)[0])(x)
torch.testing.assert_close(by_hand, jacobian_x)

# %%
# The second term couples all features. For a layer that only scales, :math:`z_d = w_d
# x_d`, the Jacobian is diagonal and the VJP is a product feature by feature. Here it is
# not.

scale_jacobian = jacrev(lambda x: w * x)(x)
titles = ["Scaling: each feature alone", "RMSNorm: all features coupled"]

fig, axes = plt.subplots(1, 2, figsize=(7.5, 3.2), layout="constrained")
limit = max(scale_jacobian.abs().max(), jacobian_x.abs().max()).item()
for ax, J, title in zip(axes, [scale_jacobian, jacobian_x], titles, strict=True):
    image = ax.imshow(J.cpu().numpy(), cmap="PuOr", vmin=-limit, vmax=limit)
    ax.set(title=title, xlabel="input feature e", ylabel="output feature d")
fig.colorbar(image, ax=axes, label=r"$\partial z_d \,/\, \partial x_e$")
plt.show()

# %%
# Two VJPs, with all axes
# -----------------------
# BackPACK never needs the Jacobians, only products of a vector with them. Let :math:`g`
# be the gradient with respect to the output, shape ``[N, T, D]``, in code ``grad_Z``.
# One sample has :math:`T` vectors, and all of them use the same weight. So the VJP for
# the weight **sums over t**, and it keeps the axis of the samples:
#
# .. math::
#     (g_w)_{nd} = \sum_{t=1}^{T} g_{ntd} \, u_{ntd} .
#
# ``reduce`` from einops sums over the axes that are missing on the right of the arrow.
# The ellipsis stands for the axes between N and D: T, several axes, or none.

grad_Z = torch.randn(N, T, D, dtype=torch.float64, device=device)
U, RMS = normalize(X, EPS)
grad_w = reduce(grad_Z * U, "n ... d -> n d", "sum")

for n in range(N):
    _, pull_back = vjp(lambda w, x: w * normalize(x, EPS)[0], w, X[n])
    torch.testing.assert_close(grad_w[n], pull_back(grad_Z[n])[0])

# %%
# For the input we multiply the second Jacobian with :math:`g` from the left and sum
# over :math:`d`:
#
# .. math::
#     (g_x)_{nte} = \sum_{d=1}^{D} g_{ntd} \, \frac{\partial z_{ntd}}{\partial x_{nte}}
#     = \frac{1}{\rho_{nt}} \left(
#     w_e \, g_{nte} - u_{nte} \, \frac{1}{D} \sum_{d=1}^{D} w_d \, g_{ntd} \, u_{ntd}
#     \right) .
#
# The coupling costs one mean over the features. No ``[D, D]`` matrix appears.

weighted = w * grad_Z
grad_X = (weighted - U * (weighted * U).mean(-1, keepdim=True)) / RMS

_, pull_back = vjp(lambda X: w * normalize(X, EPS)[0], X)
torch.testing.assert_close(grad_X, pull_back(grad_Z)[0])
print("Both VJPs agree with torch.func.")

# %%
# That was the mathematics. ``BatchGrad`` needs the first product only,
# ``DiagGGNExact`` needs both.
#
# Individual gradients
# --------------------
# ``BatchGrad`` needs the VJP for the weight, for the samples that the user asked for.
# ``params`` is an argument because a subclass will add a bias.


class RMSNormBatchGrad(FirstOrderModuleExtension):
    """Compute individual gradients for ``RMSNorm``."""

    def __init__(self, params: tuple[str, ...] = ("weight",)):
        """Name the parameters for which this class, or a subclass, has a method."""
        super().__init__(params=list(params))

    def weight(
        self,
        ext: BatchGrad,
        module: RMSNorm,
        g_inp: tuple[Tensor | None, ...],
        g_out: tuple[Tensor],
        bp: None,
    ) -> Tensor:
        """Compute the individual gradients of ``module.weight``.

        Args:
            ext: The running ``BatchGrad``; it knows which samples are wanted.
            module: The layer; ``module.input0`` has shape ``[N, D]`` or ``[N, T, D]``.
            g_inp: Gradients with respect to the layer's inputs (not needed).
            g_out: Gradient with respect to the output, ``[N, D]`` or ``[N, T, D]``.
            bp: ``None``: first-order extensions backpropagate nothing.

        Returns:
            Individual gradients, shape ``[N, D]``, or ``[len(subsampling), D]``.
        """
        subset = ext.get_subsampling()
        U, _ = normalize(subsample(module.input0, subsampling=subset), module.eps)
        grad_Z = subsample(g_out[0], subsampling=subset)
        return reduce(grad_Z * U, "n ... d -> n d", "sum")


# %%
# The factory takes the layer's class and the module extension as arguments, because we
# will register other pairs below. (``FirstOrderModuleExtension`` is a
# ``ModuleExtension``, too. The last argument may be anything that builds one when it is
# called; at the end of the page we need that.)


def make_batch_grad(
    subsampling: list[int] | None = None,
    layer_class: type[nn.Module] = RMSNorm,
    module_extension_class: Callable[[], ModuleExtension] = RMSNormBatchGrad,
) -> BatchGrad:
    """Build a ``BatchGrad`` that supports ``layer_class``.

    Args:
        subsampling: Indices of the samples to compute. Default: all.
        layer_class: Class of the layer.
        module_extension_class: What to register for it.
    """
    extension = BatchGrad(subsampling=subsampling)
    extension.set_module_extension(layer_class, module_extension_class())
    return extension


# %%
# The GGN diagonal
# ----------------
# ``DiagGGNExact`` sends V through the network: for each sample, one vector per column,
# with the shape of the layer's output. The columns are the leading axis: ``[C, N, T,
# D]``. Each column goes through the same VJPs as :math:`g`. With :math:`G` for the GGN,
# its diagonal for the weight is
#
# .. math::
#     (V_w)_{cnd} = \sum_{t=1}^{T} V_{cntd} \, u_{ntd} , \qquad \mathrm{diag}(G)_d =
#     \sum_n \sum_c (V_w)_{cnd}^2 .
#
# Mind the order of sums and square. The sum over **t** belongs to the VJP of one sample
# and comes before the square. The sums over **n** and **c** come after it.
#
# (For the scale module we took an ``einsum``, which turns the sum over all features
# into matrix products. Here the axis ``d`` is kept. An ``einsum`` would make tiny
# matrix products, one for each sample and feature, which is slow. So we multiply and
# sum.)


class RMSNormDiagGGNExact(ModuleExtension):
    """Compute the GGN diagonal for ``RMSNorm``, and send V through it."""

    def __init__(self, params: tuple[str, ...] = ("weight",)):
        """Name the parameters for which this class, or a subclass, has a method."""
        super().__init__(params=list(params))

    def weight(
        self,
        ext: DiagGGNExact,
        module: RMSNorm,
        g_inp: tuple[Tensor | None, ...],
        g_out: tuple[Tensor],
        V_out: Tensor,
    ) -> Tensor:
        """Compute the GGN diagonal for ``module.weight``, shape ``[D]``.

        Args:
            ext: The running ``DiagGGNExact`` (not needed).
            module: The layer; ``module.input0`` has shape ``[N, D]`` or ``[N, T, D]``.
            g_inp: Gradients with respect to the layer's inputs (not needed).
            g_out: Gradient with respect to the output (not needed).
            V_out: V at the output, shape ``[C, N, D]`` or ``[C, N, T, D]``.
        """
        U, _ = normalize(module.input0, module.eps)
        V_w = reduce(V_out * U, "c n ... d -> c n d", "sum")
        return reduce(V_w.square(), "c n d -> d", "sum")

    def backpropagate(self, ext, module, g_inp, g_out, V_out: Tensor) -> Tensor:
        """Send V from the output to the input; arguments as in ``weight``.

        Returns:
            V at the input, shape ``[C, N, D]`` or ``[C, N, T, D]``.
        """
        U, rms = normalize(module.input0, module.eps)
        wV = module.weight * V_out
        return (wV - U * (wV * U).mean(-1, keepdim=True)) / rms


# %%
# Its factory takes the same two arguments.


def make_diag_ggn(
    layer_class: type[nn.Module] = RMSNorm,
    module_extension_class: Callable[[], ModuleExtension] = RMSNormDiagGGNExact,
) -> DiagGGNExact:
    """Build a ``DiagGGNExact`` that supports ``layer_class``.

    Args:
        layer_class: Class of the layer.
        module_extension_class: What to register for it.
    """
    extension = DiagGGNExact()
    extension.set_module_extension(layer_class, module_extension_class())
    return extension


# %%
# In our networks V only ever gets squared, so a wrong sign in ``backpropagate`` would
# not change any diagonal. We therefore look at V itself once. After a forward pass, an
# extended layer holds its input, and we can call the method ourselves.

layer = extend(RMSNorm(D, EPS).to(device, torch.float64))
with torch.no_grad():
    layer.weight.copy_(w)
layer(X)

V_out = torch.randn(C, N, T, D, dtype=torch.float64, device=device)
V_in = RMSNormDiagGGNExact().backpropagate(None, layer, None, None, V_out)

_, pull_back = vjp(lambda X: w * normalize(X, EPS)[0], X)
torch.testing.assert_close(V_in, vmap(pull_back)(V_out)[0])
print(f"V at the input: {list(V_in.shape)}")

# %%
# Independent checks
# ------------------
# The first witness is a loop over samples, for all parameters of a network.


def loop_over_samples(
    model: nn.Module, loss_function: nn.Module, X: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """Compute the gradients of the samples' own losses, shape ``[N, *parameter]``."""
    names = [name for name, _ in model.named_parameters()]
    losses = [loss_function(model(X[[n]]), y[[n]]) for n in range(len(X))]
    rows = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    columns = zip(*rows, strict=True)
    return {k: torch.stack(g) for k, g in zip(names, columns, strict=True)}


# %%
# The second writes down :math:`\mathrm{J}^\top \mathrm{H} \, \mathrm{J}` of one sample,
# with the Jacobian J of the network and the Hessian H of the loss from ``torch.func``,
# and keeps the diagonal. Neither witness knows V, or square roots.


def ggn_diagonal_of_sample(
    model: nn.Module, loss_function: nn.Module, x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """Compute the diagonal of the GGN of one sample's own loss.

    Args:
        model: The network, not extended.
        loss_function: The loss, not extended.
        x: One sample as a batch, shape ``[1, *]``.
        y: Its target, shape ``[1, *]``.

    Returns:
        For each parameter its diagonal, same shape as the parameter.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    output = functional_call(model, parameters, x)
    C = output.numel()
    H = jacrev(jacrev(lambda f: loss_function(f, y)))(output).reshape(C, C)
    J = jacrev(lambda p: functional_call(model, p, x).reshape(C))(parameters)
    return {k: einsum(j, H, j, "c ..., c k, k ... -> ...") for k, j in J.items()}


# %%
# The check compares every parameter of the network. That is what tests
# ``backpropagate``: the layers before ours get a right diagonal only if the V that we
# send them is right (up to its sign, see above).
#
# The witnesses take each sample's own loss. With ``"mean"`` BackPACK keeps the factor 1
# / N in its results, so both witnesses are multiplied by it, as ``r``. (With one class
# for each of T steps, the mean is over the steps, too. The sample's own loss then has
# the factor 1 / T already.) The second pass asks for the samples 4, 0 and 2 only: fewer
# than all, and not in order, so that a method that ignores the subset is noticed.


def check(
    model: nn.Module,
    reduction: str,
    X: Tensor,
    y: Tensor,
    layer_class: type[nn.Module] = RMSNorm,
    batch_grad_class: Callable[[], ModuleExtension] = RMSNormBatchGrad,
    diag_ggn_class: Callable[[], ModuleExtension] = RMSNormDiagGGNExact,
):
    """Compare both extensions with their witnesses, for all parameters of ``model``.

    Args:
        model: The network, not extended.
        reduction: ``"mean"`` or ``"sum"``.
        X: Inputs, shape ``[N, D]`` or ``[N, T, D]``.
        y: Class indices, shape ``[N]``, or ``[N, T]`` for one class per step.
        layer_class: Class of the layer that BackPACK does not know.
        batch_grad_class: What to register for it in ``BatchGrad``.
        diag_ggn_class: What to register for it in ``DiagGGNExact``.

    Raises:
        AssertionError: If any two disagree.
    """
    loss_function = nn.CrossEntropyLoss(reduction=reduction)
    r = {"mean": 1 / len(X), "sum": 1.0}[reduction]
    gradients = loop_over_samples(model, loss_function, X, y)
    samples = [(X[[n]], y[[n]]) for n in range(len(X))]
    diagonals = [ggn_diagonal_of_sample(model, loss_function, *s) for s in samples]

    model, loss_function = extend(model), extend(loss_function)
    for subset in [None, [4, 0, 2]]:
        batch_grad = make_batch_grad(subset, layer_class, batch_grad_class)
        diag_ggn = make_diag_ggn(layer_class, diag_ggn_class)
        with backpack(batch_grad, diag_ggn):
            loss_function(model(X), y).backward()
        for name, parameter in model.named_parameters():
            expected = r * gradients[name]
            expected = expected if subset is None else expected[subset]
            torch.testing.assert_close(parameter.grad_batch, expected)
            expected = r * sum(diagonal[name] for diagonal in diagonals)
            torch.testing.assert_close(parameter.diag_ggn_exact, expected)


# %%
# First, in the middle, last
# --------------------------
# ``Flatten`` turns ``[N, T, hidden]`` into ``[N, T * hidden]``, and the last linear
# layer maps that to logits ``[N, C]``. If the norm is last, no linear layer follows,
# and the flattened output itself holds ``T * C`` logits, which is as good for a check.
# The constructor of the layer is an argument, so that we can use the function again
# below.

hidden = 7


def make_network(
    place: str,
    input_shape: tuple[int, ...],
    make_layer: Callable[[int], nn.Module] = RMSNorm,
) -> nn.Sequential:
    """Build a network that holds our layer.

    Args:
        place: Where the layer stands: ``"first"``, ``"middle"`` or ``"last"``.
        input_shape: Shape of one sample, ``(D,)`` or ``(T, D)``.
        make_layer: Builds the layer from its number of features.

    Returns:
        Network that maps ``[N, *input_shape]`` to logits.
    """
    steps = math.prod(input_shape[:-1])
    head = [nn.Sigmoid(), nn.Flatten(), nn.Linear(steps * hidden, C)]
    layers = {
        "first": [make_layer(D), nn.Linear(D, hidden), *head],
        "middle": [nn.Linear(D, hidden), make_layer(hidden), *head],
        "last": [nn.Linear(D, C), make_layer(C), nn.Flatten()],
    }[place]
    return randomize(nn.Sequential(*layers))


targets = torch.randint(C, (N,), device=device)

for place in ["first", "middle", "last"]:
    for shape in [(D,), (T, D)]:
        for reduction in ["mean", "sum"]:
            data = torch.randn(N, *shape, dtype=torch.float64, device=device)
            check(make_network(place, shape), reduction, data, targets)
            print(f"{place:>6}  {reduction:>4}  {[N, *shape]}: all agree")

# %%
# Why both shapes? Here is a mistake that ``[N, D]`` cannot reveal: the square comes
# before the sum over t. Without further axes there is nothing to sum.


class WrongDiagGGNExact(RMSNormDiagGGNExact):
    """Wrong on purpose: squares before the sum over the steps."""

    def weight(self, ext, module, g_inp, g_out, V_out: Tensor) -> Tensor:
        """Return the wrong diagonal, shape ``[D]``."""
        U, _ = normalize(module.input0, module.eps)
        return reduce((V_out * U).square(), "c n ... d -> d", "sum")


wrong = {"diag_ggn_class": WrongDiagGGNExact}
check(make_network("middle", (D,)), "sum", X[:, 0], targets, **wrong)
print("[N, D]: nothing noticed")
try:
    check(make_network("middle", (T, D)), "sum", X, targets, **wrong)
except AssertionError as error:
    print(f"[N, T, D]: {error}")
else:
    raise RuntimeError("The check did not notice the wrong extension.")

# %%
# From a sequence to a loss
# -------------------------
# There are three common ways from ``[N, T, D]`` to a cross-entropy loss, and all work
# in BackPACK. They differ in the number of columns of V, which is the number of logits
# per sample: C after ``Flatten`` and a linear layer, and T times the features of a step
# otherwise. To see it, a subclass prints the shape of V and then does the same as
# before.


class TellingDiagGGNExact(RMSNormDiagGGNExact):
    """``RMSNormDiagGGNExact`` that prints the shape of V."""

    def weight(self, ext, module, g_inp, g_out, V_out: Tensor) -> Tensor:
        """Print the shape of V, then compute the diagonal, shape ``[D]``."""
        print(f"V at the output of RMSNorm: {list(V_out.shape)}")
        return super().weight(ext, module, g_inp, g_out, V_out)


# %%
# 1. ``Flatten``, then a linear layer: C columns.
# 2. ``Flatten`` alone: all entries of a sample are logits, ``T * hidden`` columns.
# 3. One prediction per step: PyTorch wants logits ``[N, C, T]`` and targets ``[N, T]``.
#    BackPACK's own ``Permute`` swaps the axes. There are ``T * C`` columns.
#
# In the first two the norm has ``hidden`` = 7 features, so that the axes can be told
# apart: C is 4, N is 6, T is 3. ``check`` makes two passes, so each shape is printed
# twice.

per_step_targets = torch.randint(C, (N, T), device=device)

for features, layers, y in [
    (hidden, [nn.Flatten(), nn.Linear(T * hidden, C)], targets),
    (hidden, [nn.Flatten()], targets),
    (C, [Permute(0, 2, 1)], per_step_targets),
]:
    model = nn.Sequential(nn.Linear(D, features), RMSNorm(features), *layers)
    check(randomize(model), "mean", X, y, diag_ggn_class=TellingDiagGGNExact)

# %%
# In the third way a plain ``transpose`` would be a problem. It is not a module, so
# BackPACK would not see it. It returns a view, with the same memory address as its
# input. BackPACK stores V under the address of the tensor that it belongs to, and there
# the layer before finds it. So RMSNorm would get a V, but with its axes in the wrong
# order. `The contract, and what breaks it <5_contract_and_traps.html>`_ shows it.

# %%
# Lookup is by exact class
# ------------------------
# BackPACK finds a module extension by the class of the layer itself. For ``nn.RMSNorm``
# nothing is registered yet, so it finds none:


def make_network_with_theirs() -> nn.Sequential:
    """Build a network with ``nn.RMSNorm`` that maps ``[N, T, D]`` to logits."""
    layers = [nn.Linear(D, C), nn.RMSNorm(C, EPS), nn.Flatten()]
    return randomize(nn.Sequential(*layers))


loss = extend(nn.CrossEntropyLoss())(extend(make_network_with_theirs())(X), targets)
try:
    with backpack(make_diag_ggn()):
        loss.backward()
except NotImplementedError as error:
    print(f"NotImplementedError: {error}")
else:
    raise RuntimeError("BackPACK knows nn.RMSNorm. This page is out of date.")

# %%
# Its attributes have the names that our extensions use, ``weight`` and ``eps``, so the
# same classes serve it, if they are registered for it. This holds for one normalized
# axis and a given ``eps``; with PyTorch's default, ``eps=None``, there is no number to
# use.

check(make_network_with_theirs(), "sum", X, targets, layer_class=nn.RMSNorm)
print("nn.RMSNorm: all agree")

# %%
# Several parameters
# ------------------
# A layer with more parameters needs one method for each, with the parameter's name, and
# all names in the list for the base class. We give RMSNorm a bias. For :math:`z_d = w_d
# u_d + b_d` the Jacobian with respect to the bias is the identity, so its VJP is the
# sum over t alone. The other two Jacobians do not change.


class RMSNormWithBias(RMSNorm):
    """``RMSNorm`` with a bias, shape ``[D]``."""

    def __init__(self, D: int, eps: float = 1e-6):
        """Store weight and bias; the bias is initially zero."""
        super().__init__(D, eps)
        self.bias = nn.Parameter(torch.zeros(D))

    def forward(self, X: Tensor) -> Tensor:
        """Normalize, scale and shift ``X`` of shape ``[N, D]`` or ``[N, T, D]``."""
        return super().forward(X) + self.bias


class RMSNormWithBiasBatchGrad(RMSNormBatchGrad):
    """Compute individual gradients for ``RMSNormWithBias``."""

    def __init__(self):
        """Name both parameters."""
        super().__init__(params=("weight", "bias"))

    def bias(self, ext, module, g_inp, g_out, bp) -> Tensor:
        """Compute the individual gradients of ``module.bias``, shape ``[N, D]``."""
        grad_Z = subsample(g_out[0], subsampling=ext.get_subsampling())
        return reduce(grad_Z, "n ... d -> n d", "sum")


class RMSNormWithBiasDiagGGNExact(RMSNormDiagGGNExact):
    """Compute the GGN diagonal for ``RMSNormWithBias``."""

    def __init__(self):
        """Name both parameters."""
        super().__init__(params=("weight", "bias"))

    def bias(self, ext, module, g_inp, g_out, V_out: Tensor) -> Tensor:
        """Compute the GGN diagonal for ``module.bias``, shape ``[D]``."""
        V_b = reduce(V_out, "c n ... d -> c n d", "sum")
        return reduce(V_b.square(), "c n d -> d", "sum")


# %%
# Base classes do not count in the lookup. With module extensions for ``RMSNorm`` alone,
# BackPACK does not support the subclass:

model = extend(make_network("middle", (D,), RMSNormWithBias))
loss = extend(nn.CrossEntropyLoss())(model(X[:, 0]), targets)
try:
    with backpack(make_diag_ggn(RMSNorm, RMSNormDiagGGNExact)):
        loss.backward()
except NotImplementedError as error:
    print(f"NotImplementedError: {error}")
else:
    raise RuntimeError("BackPACK looks at base classes. This page is out of date.")

# %%
# So we register the subclass. In its extensions ``weight`` and ``backpropagate`` are
# inherited. The last backward pass in ``check`` asks for three samples, so
# ``grad_batch`` has three rows in the end.

both_parameters = [
    RMSNormWithBias,
    RMSNormWithBiasBatchGrad,
    RMSNormWithBiasDiagGGNExact,
]

for data in [X[:, 0], X]:
    model = make_network("middle", data.shape[1:], RMSNormWithBias)
    check(model, "mean", data, targets, *both_parameters)

for name, parameter in model[1].named_parameters():
    shapes = list(parameter.grad_batch.shape), list(parameter.diag_ggn_exact.shape)
    print(f"{name:>6}: grad_batch {shapes[0]}, diag_ggn_exact {shapes[1]}")

# %%
# The shortcut: VJPs by automatic differentiation
# -----------------------------------------------
# We derived two VJPs by hand, and ``torch.func.vjp`` has confirmed them. It can also
# replace them. The extension then needs no formula. It has limits. The layer must
#
# - take one tensor and return one tensor;
# - treat the samples separately;
# - contain no other modules;
# - use no randomness (dropout does), and update no buffer in place;
# - use only operations that ``torch.func`` supports.
#
# One obstacle: the layer is extended, so calling it runs BackPACK's hooks, and
# ``torch.func`` cannot run through these. ``forward`` goes around the hooks, but
# ``functional_call``, which we need below, calls a module with its hooks. So we give it
# a wrapper that calls ``forward``.


class WithoutHooks(nn.Module):
    """Call a layer's ``forward`` directly, so that no hooks run."""

    def __init__(self, layer: nn.Module):
        """Store the layer."""
        super().__init__()
        self.layer = layer

    def forward(self, X: Tensor) -> Tensor:
        """Return the output of the layer for ``X`` of shape ``[N, *]``."""
        return self.layer.forward(X)


# %%
# We write the layer as a function of the one tensor we differentiate with respect to:
# for the parameter VJP, the output of one sample as a function of one parameter.
# ``functional_call`` puts that parameter in place. The layer expects a batch, so
# ``unsqueeze`` makes a batch of the one sample, and ``squeeze`` takes it apart again.
#
# The inner ``vmap`` runs over the columns c. The outer one runs over the samples n:
# ``in_dims`` says that they are axis 0 of the input and axis 1 of V, and ``out_dims``
# that they become axis 1 of the result, so that the columns lead again.


def parameter_vjp(module: nn.Module, name: str, X: Tensor, V: Tensor) -> Tensor:
    """Multiply V with each sample's transposed Jacobian, for a parameter.

    Args:
        module: The layer.
        name: Name of one of its parameters.
        X: Input, shape ``[N, *]``.
        V: C vectors for each sample's output, shape ``[C, N, *]``.

    Returns:
        The VJPs, shape ``[C, N, *parameter]``.
    """
    layer = WithoutHooks(module)

    def vjp_of_sample(x: Tensor, v: Tensor) -> Tensor:
        """Return ``[C, *parameter]`` for ``x``, ``[*]``, and ``v``, ``[C, *]``."""

        def output(parameter: Tensor) -> Tensor:
            """Return the layer's output for the sample, shape ``[*]``."""
            new = {f"layer.{name}": parameter}
            return functional_call(layer, new, x.unsqueeze(0)).squeeze(0)

        _, pull_back = vjp(output, getattr(module, name).detach())
        return vmap(pull_back)(v)[0]

    return vmap(vjp_of_sample, in_dims=(0, 1), out_dims=1)(X.detach(), V)


# %%
# The input VJP is the same with the roles exchanged: the parameters stay, the sample is
# the variable.


def input_vjp(module: nn.Module, X: Tensor, V: Tensor) -> Tensor:
    """Multiply V with each sample's transposed Jacobian, for the input.

    Args:
        module: The layer.
        X: Input, shape ``[N, *]``.
        V: C vectors for each sample's output, shape ``[C, N, *]``.

    Returns:
        The VJPs, shape ``[C, N, *]`` with the axes of the input.
    """
    layer = WithoutHooks(module)

    def vjp_of_sample(x: Tensor, v: Tensor) -> Tensor:
        """Return ``[C, *]`` for ``x``, ``[*]``, and ``v``, ``[C, *]``."""
        _, pull_back = vjp(lambda x: layer(x.unsqueeze(0)).squeeze(0), x)
        return vmap(pull_back)(v)[0]

    return vmap(vjp_of_sample, in_dims=(0, 1), out_dims=1)(X.detach(), V)


# %%
# The extensions take the names of the parameters. BackPACK looks for a method with each
# name, so the constructor attaches one: ``parameter``, with its first argument filled
# in. It does so before ``super().__init__``, which raises an error if a method is
# missing. For ``BatchGrad`` the gradient is a V with one column.


class AutodiffBatchGrad(FirstOrderModuleExtension):
    """Compute individual gradients by automatic differentiation, within its limits."""

    def __init__(self, params: list[str]):
        """Attach a method for each name in ``params``."""
        for name in params:
            setattr(self, name, partial(self.parameter, name))
        super().__init__(params=params)

    def parameter(self, name: str, ext, module, g_inp, g_out, bp) -> Tensor:
        """Compute individual gradients of a parameter, shape ``[N, *parameter]``."""
        X = subsample(module.input0, subsampling=ext.get_subsampling())
        grad_Z = subsample(g_out[0], subsampling=ext.get_subsampling())
        return parameter_vjp(module, name, X, grad_Z.unsqueeze(0)).squeeze(0)


class AutodiffDiagGGNExact(ModuleExtension):
    """Compute the GGN diagonal by automatic differentiation, within its limits."""

    def __init__(self, params: list[str]):
        """Attach a method for each name in ``params``."""
        for name in params:
            setattr(self, name, partial(self.parameter, name))
        super().__init__(params=params)

    def parameter(self, name: str, ext, module, g_inp, g_out, V_out: Tensor) -> Tensor:
        """Compute the GGN diagonal for a parameter, shape ``[*parameter]``."""
        V = parameter_vjp(module, name, module.input0, V_out)
        return V.square().sum((0, 1))

    def backpropagate(self, ext, module, g_inp, g_out, V_out: Tensor) -> Tensor:
        """Send V, shape ``[C, N, *]``, from the output to the input."""
        return input_vjp(module, module.input0, V_out)


# %%
# ``check`` and the factories expect something to call without arguments. ``partial``
# fills in the names.


def by_autodiff(params: list[str]) -> list[Callable[[], ModuleExtension]]:
    """Return what builds the two automatic extensions for ``params``."""
    classes = [AutodiffBatchGrad, AutodiffDiagGGNExact]
    return [partial(extension_class, params) for extension_class in classes]


# %%
# Against the closed form first, with ``layer``, ``V_out`` and ``V_in`` from the end of
# the section on the GGN diagonal: V at the input, including its sign, then the
# diagonal.

automatic = AutodiffDiagGGNExact(["weight"])
V_automatic = automatic.backpropagate(None, layer, None, None, V_out)
torch.testing.assert_close(V_automatic, V_in)

by_formula = RMSNormDiagGGNExact().weight(None, layer, None, None, V_out)
torch.testing.assert_close(automatic.weight(None, layer, None, None, V_out), by_formula)
print("Autodiff and closed form agree.")

# %%
# Then inside networks, against the witnesses, for the layer with two parameters.

params = ["weight", "bias"]

for place in ["first", "middle", "last"]:
    for data in [X[:, 0], X]:
        model = make_network(place, data.shape[1:], RMSNormWithBias)
        check(model, "mean", data, targets, RMSNormWithBias, *by_autodiff(params))
        print(f"{place:>6}  {list(data.shape)}: all agree")

# %%
# Within these limits, any layer? Here is one that has little in common with RMSNorm: it
# mixes the steps of a sequence by a matrix, and multiplies by a number that is stored
# as a 0-d tensor. The parameters need not be called weight. (In the first shape that is
# printed, the first 3 is the number of samples that ``check`` asked for last. The other
# two are T.)


class MixSteps(nn.Module):
    """Mix the steps of a sequence: ``gain * (matrix @ X)``."""

    def __init__(self, T: int):
        """Store ``matrix``, shape ``[T, T]``, and ``gain``, shape ``[]``."""
        super().__init__()
        self.matrix = nn.Parameter(torch.rand(T, T))
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, X: Tensor) -> Tensor:
        """Mix the steps of ``X`` of shape ``[N, T, D]``."""
        return self.gain * einsum(self.matrix, X, "s t, n t d -> n s d")


model = make_network("middle", (T, D), lambda _: MixSteps(T))
check(model, "sum", X, targets, MixSteps, *by_autodiff(["matrix", "gain"]))

for name, parameter in model[1].named_parameters():
    shapes = list(parameter.grad_batch.shape), list(parameter.diag_ggn_exact.shape)
    print(f"{name:>6}: grad_batch {shapes[0]}, diag_ggn_exact {shapes[1]}")

# %%
# What the shortcut costs
# -----------------------
# ``vjp`` runs the layer's forward pass in each call of a method, as the formula does
# with ``normalize``, but it also records a graph and then goes back through it. We time
# the methods alone, called by hand as above, in float32. Formula and autodiff take
# turns, and who is first alternates. Printed is how many times as long autodiff takes:
# the median, and the quartiles, which say how far to trust it.


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds that ``work`` takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start


def ratio(formula: Callable[[], object], autodiff: Callable[[], object]) -> str:
    """Return how many times as long ``autodiff`` takes: median and quartiles."""
    ratios = []
    for i in range(40):
        order = [formula, autodiff] if i % 2 else [autodiff, formula]
        times = {work: seconds(work) for work in order}
        ratios.append(times[autodiff] / times[formula])
    low, median, high = quantiles(ratios[10:], n=4)  # the first 10 are warm-up
    return f"{median:5.2f}  ({low:.2f} to {high:.2f})"


# %%
# One tuple of arguments serves all methods; each uses those that it needs. As in a
# backward pass, autograd records no graph (``vjp`` still records its own inside).

first_order = [RMSNormBatchGrad(), AutodiffBatchGrad(["weight"])]
second_order = [RMSNormDiagGGNExact(), AutodiffDiagGGNExact(["weight"])]

for samples in [16, 256]:
    V = torch.randn(10, samples, 8, 32, device=device)  # axes: columns, N, T, D
    layer = extend(RMSNorm(32).to(device))
    layer(torch.randn_like(V[0]))
    for extension, pair, name in [
        (BatchGrad(), first_order, "weight"),
        (DiagGGNExact(), second_order, "weight"),
        (DiagGGNExact(), second_order, "backpropagate"),
    ]:
        arguments = (extension, layer, None, (V[0],), V)
        with torch.no_grad():
            result = ratio(*[partial(getattr(e, name), *arguments) for e in pair])
        print(f"N = {samples:<4} {type(extension).__name__:12} {name:13}  {result}")

# %%
# Autodiff pays for setting up ``vjp`` and ``vmap`` in each call, whatever the number of
# samples. So it loses most where there is little work. (A median says little where its
# quartiles lie far apart: then something else kept the machine busy.)
#
# Autodiff makes a good first version of an extension: within its limits it is right if
# the forward pass is. And it is the witness for the formula that you write afterwards,
# if you need the speed.
#
# What was verified
# -----------------
# Both Jacobians and both VJPs of RMSNorm agree with ``torch.func``. The extensions
# agree with a loop over samples and with :math:`\mathrm{J}^\top \mathrm{H} \,
# \mathrm{J}` for all parameters of a network, in float64 at the default tolerance of
# ``torch.testing.assert_close``: with the layer first, in the middle and last, for
# ``[N, D]`` and ``[N, T, D]``, ``mean`` and ``sum``, and ``BatchGrad`` also for a
# subset. In one setting each, so do the three ways to the loss and ``nn.RMSNorm``; in
# two, a layer with a bias. The automatic extension for the GGN diagonal agrees with the
# closed form, and both automatic extensions agree with the witnesses for two more
# layers.
#
# **Next:** `One derivatives class, every extension <2_every_extension.html>`_ returns
# to the scale module, and serves all of BackPACK's extensions with one class and a few
# short methods.
#
# RMSNorm: B. Zhang, R. Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019,
# `arXiv:1910.07467 <https://arxiv.org/abs/1910.07467>`_. BackPACK: F. Dangel, F.
# Kunstner, P. Hennig, "BackPACK: Packing more into Backprop", ICLR 2020,
# `arXiv:1912.10985 <https://arxiv.org/abs/1912.10985>`_.
