r"""
The GGN diagonal, backpropagated
================================

After this page you can make BackPACK compute the diagonal of the generalized
Gauss-Newton matrix (GGN) in networks that hold a layer of your own, and you know how to
test it.

We will:

1. turn the two recursions for V into a module extension with two methods,
   ``weight`` and ``backpropagate``;
2. compare both methods with PyTorch's VJPs, by hand, outside of any network;
3. register it, and look at V when it arrives;
4. compute the GGN diagonal a second way, by GGN-vector products;
5. compare the two in networks in which ``backpropagate`` really runs;
6. break it on purpose, and see which check notices what.

`The GGN and its diagonal, derived <3_ggn_derivation.html>`_ derives the two recursions.
`Individual gradients <2_individual_gradients.html>`_ shows how to register an
extension. The letters: N samples, T steps of a sequence, D features, C classes. V is
what travels backward: a square root of the GGN with respect to a layer's output.
"""

import math

import matplotlib.pyplot as plt
import torch
from backpack import backpack, extend
from backpack.extensions import DiagGGNExact
from backpack.extensions.module_extension import ModuleExtension
from backpack.hessianfree.ggnvp import ggn_vector_product_from_plist
from backpack.utils.convert_parameters import vector_to_parameter_list
from einops import einsum
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# %%
# The layer, as before.


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
# Two steps for each layer
# ------------------------
# The Hessian of the loss with respect to the network's output :math:`f` has a square
# root, :math:`\nabla^2_f L = S S^\top`. BackPACK starts with :math:`V = S` at the
# output, with :math:`C` columns for each sample, and sends it backward through the
# layers. Each layer receives the V of its output, :math:`V_\text{out}`, and does two
# things:
#
# - **for its parameters:** multiply with the Jacobian of the output with respect to the
#   parameter, transposed. The squares of the result, summed over columns and samples,
#   are the GGN diagonal;
# - **for the layers before it:** multiply with the Jacobian of the output with respect
#   to the input, transposed. The result, :math:`V_\text{in}`, is what the layer before
#   receives.
#
# BackPACK stores the :math:`C` columns along the **first** axis: V has shape ``[C, N,
# *]``, and each of the C slices has the shape of the layer's output. For the scale
# module, :math:`z_n = w x_n`, the two Jacobians are :math:`x_n` and :math:`w` times the
# identity. So for column :math:`c` and sample :math:`n`,
#
# .. math::
#     V_w[c, n] &= \sum_d x_{nd} \, V_\text{out}[c, n, d] \, , \\
#     V_\text{in}[c, n, d] &= w \, V_\text{out}[c, n, d] \, ,
#
# and the diagonal, for the one parameter, is a single number,
#
# .. math::
#     \operatorname{diag}(G)_w = \sum_n \sum_c V_w[c, n]^2 \, .
#
# Mind the order: sum over all axes of a sample (features, and steps if there are any),
# **then** square, then sum over columns and samples.
#
# The module extension
# --------------------
# Module extensions of second order inherit from ``ModuleExtension``. The method for a
# parameter is named after it, as for ``BatchGrad``; the step for the layers before must
# be named ``backpropagate``. Both get V as their last argument. (It is passed by
# position, so the name is free; for ``BatchGrad`` we called it ``bp``.) There is no
# loop over the C columns: one operation treats them all. Mind that the input comes
# first in the ``einsum``. With V first the result is the same, but other matrix
# products are behind it, which `can take several times as long
# <../3_in_use/3_cost.html>`_.


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
            ext: The running extension (not needed: it knows no subsampling).
            module: The layer; ``module.input0`` has shape ``[N, *]``.
            g_inp: Gradients with respect to the layer's inputs (not needed).
            g_out: Gradient with respect to the layer's output (not needed).
            V_out: Square root with respect to the layer's output, ``[C, N, *]``.

        Returns:
            GGN diagonal, summed over the batch, shape ``[1]``.
        """
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
        """Multiply V with the transposed Jacobian with respect to the input.

        Args:
            ext: The running extension (not needed: it knows no subsampling).
            module: The layer; ``module.weight`` has shape ``[1]``.
            g_inp: Gradients with respect to the layer's inputs (not needed).
            g_out: Gradient with respect to the layer's output (not needed).
            V_out: Square root with respect to the layer's output, ``[C, N, *]``.

        Returns:
            Square root with respect to the layer's input, shape ``[C, N, *]``.
        """
        return module.weight * V_out


# %%
# The result of ``weight`` has the shape of the parameter: the GGN diagonal is summed
# over the batch. BackPACK stores it in the parameter's attribute ``diag_ggn_exact``.
# "Exact" means that V has all C columns; other extensions sample a few.
#
# A layer without parameters needs ``backpropagate`` alone. If ``backpropagate`` is
# missing, the layers before do not get their V, and `BackPACK raises an AssertionError
# <../2_any_layer/5_contract_and_traps.html>`_.
#
# Each method against a VJP
# -------------------------
# Both methods can be called by hand. They need a layer that has been through a forward
# pass, so that ``module.input0`` is there, and any V. With random numbers for V, we
# compare with what ``torch.func.vjp`` computes for each column. For ``backpropagate``,
# this check also sees a wrong sign, which the squares of the GGN diagonal hide. (A
# wrong sign does harm where one tensor feeds two branches: there, their V are added
# up.)
#
# The witness for ``weight`` is the VJP with respect to the parameter, for each column
# and each sample. It needs the output as a function of the weight, so ``weight * x`` is
# written out.

N, T, D, C = 5, 6, 3, 4


def weight_vjps(layer: ScaleModule, X: Tensor, V_out: Tensor) -> Tensor:
    """Multiply V with the transposed Jacobian with respect to the parameter.

    Args:
        layer: The layer, of which only the weight is used.
        X: Its input, shape ``[N, *]``.
        V_out: V at its output, shape ``[C, N, *]``.

    Returns:
        V for the parameter, shape ``[C, N, 1]``.
    """

    def vjps_of_sample(x, v):
        """Return ``[C, 1]`` for ``x``, shape ``[*]``, and ``v``, shape ``[C, *]``."""

        def output(weight):
            """Return the layer's output for the sample, shape ``[*]``."""

            return weight * x

        _, vjp = torch.func.vjp(output, layer.weight.detach())
        return torch.func.vmap(vjp)(v)[0]

    return torch.func.vmap(vjps_of_sample, in_dims=(0, 1), out_dims=1)(X, V_out)


# %%
# ``compare_by_hand`` squares these VJPs, then sums. The witness for ``backpropagate``
# is the VJP with respect to the input; ``vmap`` runs it for each of the C columns. The
# layer's ``forward`` is called directly, because ``torch.func`` cannot run through
# BackPACK's hooks.


def compare_by_hand(module_extension: ModuleExtension, *axes: int) -> None:
    """Compare both methods with VJPs, for a layer outside of any network.

    Args:
        module_extension: The module extension for ``ScaleModule``.
        axes: Size of the axes of one sample, ``D`` or ``T, D``.

    Raises:
        AssertionError: If one of the methods is wrong.
    """
    layer = extend(ScaleModule(weight=-1.5)).to(device, torch.float64)
    X = torch.randn(N, *axes, dtype=torch.float64, device=device)
    V_out = torch.randn(C, N, *axes, dtype=torch.float64, device=device)
    layer(X)

    diagonal = module_extension.weight(None, layer, None, None, V_out)
    V_w = weight_vjps(layer, X, V_out)
    torch.testing.assert_close(diagonal, V_w.square().sum((0, 1)))

    V_in = module_extension.backpropagate(None, layer, None, None, V_out)
    _, input_vjp = torch.func.vjp(layer.forward, X)
    torch.testing.assert_close(V_in, torch.func.vmap(input_vjp)(V_out)[0])


compare_by_hand(ScaleModuleDiagGGNExact(), D)
compare_by_hand(ScaleModuleDiagGGNExact(), T, D)
print("weight and backpropagate agree with VJPs")

# %%
# Registration
# ------------
# As for individual gradients, a function builds a new ``DiagGGNExact`` for each
# backward pass, and registers our module extension in it. For second-order extensions
# this is a must. An object that is used again can pick up a V that an earlier backward
# pass left behind, and then the numbers are wrong without an error. (`The contract, and
# what breaks it <../2_any_layer/5_contract_and_traps.html>`_ shows it.)


def make_diag_ggn(
    module_extension_class: type[ModuleExtension] = ScaleModuleDiagGGNExact,
) -> DiagGGNExact:
    """Build a ``DiagGGNExact`` that supports ``ScaleModule``.

    Args:
        module_extension_class: What to register for ``ScaleModule``.
    """
    extension = DiagGGNExact()
    extension.set_module_extension(ScaleModule, module_extension_class())
    return extension


# %%
# What the methods are given
# --------------------------
# Again we subclass the module extension and print the shapes. The scale module stands
# between two linear layers. The network's output has C = 4 entries, so V has 4 columns,
# at every layer.


class PrintingDiagGGNExact(ScaleModuleDiagGGNExact):
    """``ScaleModuleDiagGGNExact`` that prints the shapes of what it is given."""

    def weight(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Print the shapes, then compute the GGN diagonal, shape ``[1]``."""
        print("weight is called")
        print(f"  module.input0 {list(module.input0.shape)}")
        print(f"  module.output {list(module.output.shape)}")
        print(f"  V_out         {list(V_out.shape)}")
        return super().weight(ext, module, g_inp, g_out, V_out)

    def backpropagate(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Backpropagate V, shape ``[C, N, *]``, then print the shapes."""
        V_in = super().backpropagate(ext, module, g_inp, g_out, V_out)
        print("backpropagate is called")
        print(f"  V_out {list(V_out.shape)} -> V_in {list(V_in.shape)}")
        return V_in


# %%
# The method for the parameter comes first, then ``backpropagate``. We keep the results
# for a comparison below.

X = torch.randn(N, D, dtype=torch.float64, device=device)
y = torch.randint(C, (N,), device=device)
model = nn.Sequential(nn.Linear(D, 2), ScaleModule(), nn.Linear(2, C))
model = extend(model.to(device, torch.float64))
loss_function = extend(nn.CrossEntropyLoss())

with backpack(make_diag_ggn(PrintingDiagGGNExact)):
    loss_function(model(X), y).backward()

diag_backpack = [parameter.diag_ggn_exact for parameter in model.parameters()]

# %%
# The same class by hand, for sequences: V gets the axis of the T = 6 steps, too.

compare_by_hand(PrintingDiagGGNExact(), T, D)

# %%
# A second way: GGN-vector products
# ---------------------------------
# BackPACK can also multiply the GGN with a vector. For this it needs nothing but
# PyTorch's autodiff: a product with the Jacobian (by two backward passes), a
# Hessian-vector product of the loss, and a VJP. No module extension takes part, so this
# is an independent witness. The product with the unit vector :math:`e_i` is column
# :math:`i` of the GGN, and entry :math:`i` of this column is on the diagonal. It takes
# one product for each of the :math:`p` parameters: too slow for real networks, and good
# for a check.


def diag_ggn_by_vector_products(
    loss: Tensor, output: Tensor, parameters: list[nn.Parameter]
) -> Tensor:
    """Compute the GGN diagonal with one GGN-vector product for each parameter.

    Args:
        loss: The loss, a scalar.
        output: The network's output, shape ``[N, C]``.
        parameters: Parameters with p entries in total.

    Returns:
        The diagonal, flattened and concatenated over parameters, shape ``[p]``.
    """
    diagonal = []
    size = sum(parameter.numel() for parameter in parameters)
    for i, e_i in enumerate(torch.eye(size).to(output)):
        vectors = vector_to_parameter_list(e_i, parameters)
        column = ggn_vector_product_from_plist(loss, output, parameters, vectors)
        diagonal.append(parameters_to_vector(column)[i])
    return torch.stack(diagonal)


# %%
# For the network above, both ways give the same numbers.

output = model(X)
parameters = list(model.parameters())
expected = diag_ggn_by_vector_products(loss_function(output, y), output, parameters)

torch.testing.assert_close(parameters_to_vector(diag_backpack), expected)
print(f"{len(expected)} diagonal entries agree")

# %%
# The reduction of the loss enters through V. With ``"mean"``, the loss and its Hessian
# are divided by :math:`N`, so :math:`S` is divided by :math:`\sqrt{N}`, and the
# diagonal is the mean over the samples' diagonals. With ``"sum"`` it is their sum.
# (Like ``grad_batch``, ``diag_ggn_exact`` is replaced by each backward pass.)

summed_loss_function = extend(nn.CrossEntropyLoss(reduction="sum"))
with backpack(make_diag_ggn()):
    summed_loss_function(model(X), y).backward()

summed = parameters_to_vector(p.diag_ggn_exact for p in parameters)
torch.testing.assert_close(summed, N * expected)

# %%
# Networks in which backpropagate matters
# ---------------------------------------
# A layer's ``backpropagate`` runs only if its input requires a gradient. And its result
# shows only in the GGN diagonal of the layers **before** it. So a test in a network
# that is only this layer, or starts with it, cannot see a mistake in ``backpropagate``;
# if the network's input requires a gradient, the method runs, but still no diagonal
# depends on it. We test five networks. The number is the expected count of calls. Only
# the last three put ``backpropagate`` to the test.

networks = {
    "first": 0,
    "first, input requires grad": 1,
    "middle": 1,
    "two in one network": 2,
    "last": 1,
}


def make_network(name: str, input_shape: tuple[int, ...]) -> nn.Sequential:
    """Build a classifier that holds one or two scale modules.

    Args:
        name: A key of ``networks``.
        input_shape: Shape of one sample, ``(D,)`` or ``(T, D)``.

    Returns:
        Network that maps ``[N, *input_shape]`` to ``[N, C]``.
    """
    hidden = 2
    features = hidden * math.prod(input_shape[:-1])
    encoder = [nn.Linear(D, hidden), nn.Sigmoid()]
    decoder = [nn.Flatten(), nn.Linear(features, C)]
    scale, other_scale = ScaleModule(1.5), ScaleModule(-0.7)
    layers = {
        "first": [scale, *encoder, *decoder],
        "first, input requires grad": [scale, *encoder, *decoder],
        "middle": [*encoder, scale, *decoder],
        "two in one network": [encoder[0], scale, encoder[1], other_scale, *decoder],
        "last": [*encoder, *decoder, scale],
    }
    return nn.Sequential(*layers[name]).to(device, torch.float64)


# %%
# The weights of the scale modules are neither 1 nor -1. Otherwise a forgotten factor
# :math:`w` would go unnoticed.
#
# A frozen scale module must get no GGN diagonal, but V must still pass through it. To
# be sure that ``backpropagate`` runs, we count. The class that counts replaces ours in
# the comparison below, so it must agree with VJPs, too.


class CountingDiagGGNExact(ScaleModuleDiagGGNExact):
    """``ScaleModuleDiagGGNExact`` that counts the calls to ``backpropagate``."""

    calls = 0

    def backpropagate(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Count the call, then backpropagate V, shape ``[C, N, *]``."""
        CountingDiagGGNExact.calls += 1
        return super().backpropagate(ext, module, g_inp, g_out, V_out)


compare_by_hand(CountingDiagGGNExact(), T, D)

# %%
# One function holds the whole comparison. It takes the module extension as an argument,
# so that we can pass a wrong one later.


def compare(
    module_extension_class: type[ModuleExtension],
    name: str,
    input_shape: tuple[int, ...] = (D,),
    reduction: str = "mean",
    frozen: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute the GGN diagonal in a new network with BackPACK and by products.

    Args:
        module_extension_class: What to register for ``ScaleModule``.
        name: A key of ``networks``.
        input_shape: Shape of one sample, ``(D,)`` or ``(T, D)``.
        reduction: ``"mean"`` or ``"sum"``.
        frozen: Whether the scale modules are not trained.

    Returns:
        The diagonal by BackPACK and by products, a list over parameters each.
    """
    model = make_network(name, input_shape)
    scales = [layer for layer in model if isinstance(layer, ScaleModule)]
    for scale in scales:
        scale.weight.requires_grad_(not frozen)
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss_function = nn.CrossEntropyLoss(reduction=reduction)
    X = torch.randn(N, *input_shape, dtype=torch.float64, device=device)
    X.requires_grad_(name == "first, input requires grad")
    y = torch.randint(C, (N,), device=device)

    output = model(X)
    loss = loss_function(output, y)
    diag_products = diag_ggn_by_vector_products(loss, output, parameters)

    model, loss_function = extend(model), extend(loss_function)
    with backpack(make_diag_ggn(module_extension_class)):
        loss_function(model(X), y).backward()

    if frozen and any(hasattr(s.weight, "diag_ggn_exact") for s in scales):
        raise AssertionError("A frozen weight has a GGN diagonal.")
    diag_backpack = [p.diag_ggn_exact for p in parameters]
    return diag_backpack, vector_to_parameter_list(diag_products, parameters)


# %%
# All combinations. ``assert_close`` compares every parameter that is trained, and
# raises if a number, a shape or a data type differs.

settings = [
    (name, input_shape, reduction, frozen)
    for name in networks
    for input_shape in [(D,), (T, D)]
    for reduction in ["mean", "sum"]
    for frozen in [False, True]
]

for name, input_shape, reduction, frozen in settings:
    CountingDiagGGNExact.calls = 0
    diag_backpack, diag_products = compare(
        CountingDiagGGNExact, name, input_shape, reduction, frozen
    )
    torch.testing.assert_close(diag_backpack, diag_products)
    if CountingDiagGGNExact.calls != networks[name]:
        raise AssertionError(f"{name}: unexpected number of calls to backpropagate")

print(f"{len(settings)} settings: BackPACK and GGN-vector products agree.")

# %%
# Break it, and see who notices
# -----------------------------
# A good check fails when it should. Here are three wrong module extensions. The first
# forgets to multiply with :math:`w`, the second flips the sign, the third squares too
# early.


class WrongFactor(ScaleModuleDiagGGNExact):
    """Wrong on purpose: passes V on unchanged."""

    def backpropagate(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Return V without the factor, shape ``[C, N, *]``."""
        return V_out


class WrongSign(ScaleModuleDiagGGNExact):
    """Wrong on purpose: V has the wrong sign."""

    def backpropagate(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Return the negative of V, shape ``[C, N, *]``."""
        return -module.weight * V_out


class WrongOrder(ScaleModuleDiagGGNExact):
    """Wrong on purpose: squares before the sum over features."""

    def weight(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Return the sum of all squares, shape ``[1]``."""
        return (module.input0 * V_out).square().sum().reshape(1)


# %%
# We run three checks on each: the comparison with VJPs by hand, and the comparison with
# GGN-vector products, with the layer first and in the middle.


def in_network(name: str):
    """Return a check of a module extension class in the network ``name``."""
    return lambda wrong: torch.testing.assert_close(*compare(wrong, name))


checks = {
    "by hand": lambda wrong: compare_by_hand(wrong(), D),
    "first": in_network("first"),
    "middle": in_network("middle"),
}

caught = {}
for wrong in [WrongFactor, WrongSign, WrongOrder]:
    for name, check in checks.items():
        try:
            check(wrong)
        except AssertionError:
            caught[wrong.__name__, name] = True
        else:
            caught[wrong.__name__, name] = False
        outcome = "caught" if caught[wrong.__name__, name] else "not noticed"
        print(f"{wrong.__name__:<12} {name:<8} {outcome}")

# %%
# With the layer first, the wrong ``backpropagate`` passes, because it is never called.
# The wrong sign passes in both networks; only the comparison by hand sees it. The
# networks, in turn, test what no call by hand can: the registration, and V as BackPACK
# sends it. Should a check notice more or less than now, the build fails here.

not_noticed = {key for key, noticed in caught.items() if not noticed}
expected = {("WrongFactor", "first"), ("WrongSign", "first"), ("WrongSign", "middle")}
if not_noticed != expected:
    raise RuntimeError(f"Expected that {expected} go unnoticed, found {not_noticed}.")

# %%
# This is what a failing check looks like. Item 0 is the weight of the first linear
# layer. The relative difference is :math:`1 - 1/w^2`, with :math:`w = 1.5`.

diag_backpack, diag_products = compare(WrongFactor, "middle")
try:
    torch.testing.assert_close(diag_backpack, diag_products)
except AssertionError as error:
    print(error)

# %%
# The picture shows where this ``backpropagate`` does its damage: at all parameters
# before the layer. Their diagonal lacks the factor :math:`w^2 = 2.25`, the constant gap
# on the log scale. The layer's own weight and all that follows are right.

torch.testing.assert_close([1.5**2 * d for d in diag_backpack[:2]], diag_products[:2])
torch.testing.assert_close(diag_backpack[2:], diag_products[2:])

right = parameters_to_vector(diag_products).tolist()
wrong = parameters_to_vector(diag_backpack).tolist()

fig, ax = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
ax.bar(range(len(right)), right, color="0.8", label="right")
ax.plot(wrong, "o", color="C1", label="with the wrong backpropagate")
end, labels = 0, {}
network = make_network("middle", (D,))
for name, parameter in network.named_parameters():
    layer, name = name.split(".")
    kind = type(network[int(layer)]).__name__.removesuffix("Module")
    labels[end + parameter.numel() / 2 - 0.5] = f"{kind}\n{name}"
    end += parameter.numel()
    ax.axvline(end - 0.5, color="0.4", linewidth=0.8)
ax.set_xticks(list(labels), labels.values(), fontsize="small")
ax.set_yscale("log")
ax.set_xlabel("parameters of the network, from input to output")
ax.set_ylabel("GGN diagonal")
ax.set_title("A wrong backpropagate spoils the layers before the scale module")
fig.legend(loc="outside lower center", ncols=2)
plt.show()

# %%
# What was verified
# -----------------
# ``backpropagate`` agrees with VJPs of ``torch.func``, sign included, and ``weight``
# with the sum of the squares of VJPs with respect to the parameter. The GGN diagonal of
# all trained parameters agrees with GGN-vector products in float64, at the default
# tolerance of ``torch.testing.assert_close``: with the layer first (with and without a
# gradient for the input), in the middle, last and twice, for inputs of the network of
# shape ``[N, D]`` and ``[N, T, D]``, ``mean`` and ``sum``, with the scale weight
# trained and frozen. ``backpropagate`` ran as often as it should. Three wrong
# extensions are caught, each by all checks that can see its mistake.
#
# **Next:** `RMSNorm: a vector parameter and a coupled Jacobian
# <../2_any_layer/1_rms_norm.html>`_ takes the same steps for a layer used in practice.
#
# BackPACK: F. Dangel, F. Kunstner, P. Hennig, "BackPACK: Packing more into Backprop",
# ICLR 2020, `arXiv:1912.10985 <https://arxiv.org/abs/1912.10985>`_. GGN-vector
# products: N. N. Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order
# Gradient Descent", Neural Computation 14(7), 2002.
