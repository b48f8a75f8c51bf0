r"""
One derivatives class, every extension
======================================

After this page you can give a layer of your own to all 19 extensions of BackPACK, by
writing its Jacobian products once, plus a short method for nine of the extensions.

Our layer is linear in its input and in its parameter. For another layer, the extensions
that use a Hessian may be wrong or refuse, which the page shows, or need the layer's
second derivatives, which it leaves out.

We will:

1. write one derivatives class for the scale module: six methods, one line of math each;
2. compare each method with ``torch.func``;
3. connect the class to every extension through BackPACK's own base classes;
4. compare every result with automatic differentiation: individual gradients, the
   generalized Gauss-Newton matrix (GGN), its Monte-Carlo estimates, the Hessian,
   Kronecker factors and matrix products;
5. see what cannot be had, and which error or wrong number says so.

You should know what a module extension does, for first order
(`Individual gradients <../1_scale_module/2_individual_gradients.html>`_) and for second
order (`The GGN diagonal, backpropagated <../1_scale_module/4_ggn_diagonal.html>`_).

The letters: N samples, T steps, D features, C classes, p entries of a parameter. K
counts vectors that are stacked along a leading axis.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest.mock import Mock

import matplotlib.pyplot as plt
import torch
from backpack import backpack, extend, extensions
from backpack.core.derivatives.basederivatives import BaseParameterDerivatives
from backpack.extensions import (
    GGNMP,
    HBP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    PCHMP,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.curvature import Curvature
from backpack.extensions.curvmatprod.ggnmp.ggnmpbase import GGNMPBase
from backpack.extensions.curvmatprod.hmp.hmpbase import HMPBase
from backpack.extensions.curvmatprod.pchmp.pchmpbase import PCHMPBase
from backpack.extensions.firstorder.batch_grad.batch_grad_base import BatchGradBase
from backpack.extensions.firstorder.batch_l2_grad.batch_l2_base import BatchL2Base
from backpack.extensions.firstorder.gradient.base import GradBaseModule
from backpack.extensions.firstorder.sum_grad_squared.sgs_base import SGSBase
from backpack.extensions.firstorder.variance.variance_base import VarianceBaseModule
from backpack.extensions.secondorder.diag_ggn.diag_ggn_base import DiagGGNBaseModule
from backpack.extensions.secondorder.diag_hessian.diag_h_base import DiagHBaseModule
from backpack.extensions.secondorder.hbp.hbp_options import (
    BackpropStrategy,
    ExpectationApproximation,
    LossHessianStrategy,
)
from backpack.extensions.secondorder.hbp.hbpbase import HBPBaseModule
from backpack.extensions.secondorder.sqrt_ggn.base import SqrtGGNBaseModule
from backpack.utils.subsampling import subsample
from einops import einsum
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vjp, vmap

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
options = {"dtype": torch.float64, "device": device}

# %%
# The layer, once more.


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
# What the extensions ask for
# ---------------------------
# The 19 extensions form five families:
#
# - first order: ``BatchGrad`` stores the individual gradients, ``BatchL2Grad`` the
#   squared norm of each, ``SumGradSquared`` the sum over samples of their squares, and
#   ``Variance`` their variance over samples;
# - GGN: its diagonal (``DiagGGNExact``), the diagonal for each sample
#   (``BatchDiagGGNExact``) and the square root V (``SqrtGGNExact``), and the same three
#   from Monte-Carlo samples (``MC`` in place of ``Exact``);
# - Hessian: its diagonal (``DiagHessian``), also for each sample
#   (``BatchDiagHessian``);
# - Kronecker factors: ``KFAC`` (Kronecker-factored approximate curvature), ``KFLR``
#   (Kronecker-factored low rank), ``KFRA`` (Kronecker-factored recursive
#   approximation), and ``HBP`` (Hessian backpropagation), the class they inherit from;
# - matrix products (``MP``): ``GGNMP`` with the GGN, ``HMP`` with the Hessian, and
#   ``PCHMP`` with the positive-curvature Hessian (PCH).
#
# The module extensions of Part 1, for ``BatchGrad`` and ``DiagGGNExact``, each hold
# math of the layer (which Jacobian) and math of the extension (square, sum, keep the
# batch axis). With 19 extensions, the second kind is written 19 times, for every new
# layer. BackPACK separates them: the math of the extension is in a base class, and the
# base class asks a **derivatives class** for products with the layer's Jacobians. There
# are two Jacobians, :math:`\mathrm{J}_x z_n` and :math:`\mathrm{J}_w z_n`. For the
# scale module, :math:`z_n = w x_n`, with :math:`D` entries,
#
# .. math::
#     \mathrm{J}_x z_n = w I_D, \qquad \mathrm{J}_w z_n = x_n .
#
# For a layer that is linear in its input, all extensions together ask for five products
# and one fact. Here :math:`v` is a vector with the shape of the layer's output, and
# :math:`u` one with the shape of the input or the parameter.
#
# - ``_jac_t_mat_prod``: :math:`\mathrm{J}_x^\top v`, back through the layer;
# - ``_weight_jac_t_mat_prod``: :math:`\mathrm{J}_w^\top v`, to the parameter;
# - ``_jac_mat_prod``: :math:`\mathrm{J}_x u`, forward through the layer;
# - ``_weight_jac_mat_prod``: :math:`\mathrm{J}_w u`, from the parameter to the output;
# - ``ea_jac_t_mat_jac_prod``: :math:`\frac{1}{N} \sum_n (\mathrm{J}_x z_n)^\top \bar{H}
#   \, \mathrm{J}_x z_n` with a square matrix :math:`\bar{H}`, for KFRA and HBP (``ea``
#   stands for expectation approximation);
# - ``hessian_is_zero``: is the output linear in the input?
#
# The derivatives class
# ---------------------
# The four products with one Jacobian receive K vectors at once, stacked along the first
# axis of ``mat``. The batch axis comes second, except in ``_weight_jac_mat_prod``,
# whose vectors have the shape of the parameter. A method for a parameter is named after
# the parameter.
#
# The transposed products can be asked for a subset. Then ``mat`` has only the wanted
# samples, and ``module.input0`` still has all of them. ``_jac_t_mat_prod`` ignores the
# subset, because it needs no stored input. ``_weight_jac_t_mat_prod`` can also be asked
# to sum over the batch or not. The gradients ``g_inp`` and ``g_out`` are not needed
# here.


class ScaleModuleDerivatives(BaseParameterDerivatives):
    """Products with the Jacobians of ``ScaleModule``."""

    def hessian_is_zero(self, module: ScaleModule) -> bool:
        """Say that the output is linear in the input."""
        return True

    def _jac_t_mat_prod(self, module, g_inp, g_out, mat, subsampling=None) -> Tensor:
        """Multiply by J_x^T: ``[K, N, *]`` to ``[K, N, *]``."""
        return module.weight * mat

    def _jac_mat_prod(self, module, g_inp, g_out, mat) -> Tensor:
        """Multiply by J_x: ``[K, N, *]`` to ``[K, N, *]``."""
        return module.weight * mat

    def _weight_jac_t_mat_prod(
        self, module, g_inp, g_out, mat, sum_batch=True, subsampling=None
    ) -> Tensor:
        """Multiply by J_w^T: ``[K, N, *]`` to ``[K, N, 1]`` or ``[K, 1]``."""
        X = subsample(module.input0, subsampling=subsampling)
        product = einsum(X, mat, "n ..., k n ... -> k n").unsqueeze(-1)
        return product.sum(1) if sum_batch else product

    def _weight_jac_mat_prod(self, module, g_inp, g_out, mat) -> Tensor:
        """Multiply by J_w: ``[K, 1]`` to ``[K, N, *]``."""
        return einsum(mat, module.input0, "k one, n ... -> k n ...")

    def ea_jac_t_mat_jac_prod(self, module, g_inp, g_out, mat) -> Tensor:
        """Average J_x^T mat J_x; ``mat`` is square, over all entries of a sample."""
        return module.weight**2 * mat


# %%
# (BackPACK has a ``ScaleModuleDerivatives`` for its own ``ScaleModule``, which has no
# parameter. It is not used here.)
#
# Each method against autodiff
# ----------------------------
# We call the methods under the names that the base classes use: without the underscore.
# Only the transposed product for a parameter has a name of its own, ``param_mjp``
# (matrix-Jacobian product): ``param_mjp("weight", ...)`` calls
# ``_weight_jac_t_mat_prod``. Under these names BackPACK also checks shapes. The four
# products with one Jacobian need an extended layer that has seen a forward pass, and K
# vectors.

K, N, T, D, C = 3, 6, 2, 4, 5
derivatives = ScaleModuleDerivatives()


def scale(w: Tensor, X: Tensor) -> Tensor:
    """Run a ``ScaleModule`` with weight ``w``, shape ``[1]``, on any ``X``."""
    return functional_call(ScaleModule(), {"weight": w}, X)


def layer_and_vectors(shape: tuple[int, ...]) -> tuple[ScaleModule, Tensor, Tensor]:
    """Return a layer after a forward pass, its input, and K vectors of this shape."""
    layer = extend(ScaleModule(-1.3)).to(**options)
    X = torch.randn(*shape, **options)
    layer(X)
    return layer, X, torch.randn(K, *shape, **options)


# %%
# The two products with :math:`\mathrm{J}_x`. The witnesses are ``torch.func.vjp``, and
# for the way forward the Jacobian itself, of shape ``[N, *, N, *]``.
# (``torch.func.jvp`` would do without it, but forward mode raises a deprecation warning
# inside PyTorch 2.13.) ``vmap`` runs them for K vectors.


def jvps(jacobian: Tensor, mat: Tensor) -> Tensor:
    """Multiply a Jacobian with each of the K vectors in ``mat``."""
    return vmap(lambda u: torch.tensordot(jacobian, u, dims=u.ndim))(mat)


shapes = [(N, D), (N, T, D)]
for shape in shapes:
    layer, X, mat = layer_and_vectors(shape)
    forward = functools.partial(scale, layer.weight.detach())

    actual = derivatives.jac_t_mat_prod(layer, None, None, mat)
    torch.testing.assert_close(actual, vmap(vjp(forward, X)[1])(mat)[0])

    actual = derivatives.jac_mat_prod(layer, None, None, mat)
    torch.testing.assert_close(actual, jvps(jacrev(forward)(X), mat))
    print(f"J_x and its transpose agree for {list(mat.shape)}")

# %%
# The two products with :math:`\mathrm{J}_w`, the transposed one for all samples and for
# a subset in an order of its own. Its witness takes one VJP for each vector and each
# sample.


def weight_vjp(w: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """Return the VJP of one sample ``x`` with ``v``, both ``[*, D]``: shape ``[1]``."""
    return vjp(lambda w: scale(w, x), w)[1](v)[0]


for shape in shapes:
    layer, X, mat = layer_and_vectors(shape)
    w = layer.weight.detach()
    for subset in [list(range(N)), [4, 0, 2]]:
        part = (layer, None, None, mat[:, subset])
        vjps = vmap(vmap(weight_vjp, (None, 0, 0)), (None, None, 0))
        expected = vjps(w, X[subset], mat[:, subset])
        for sum_batch, result in [(False, expected), (True, expected.sum(1))]:
            settings = {"sum_batch": sum_batch, "subsampling": subset}
            actual = derivatives.param_mjp("weight", *part, **settings)
            torch.testing.assert_close(actual, result)

    mat = torch.randn(K, 1, **options)
    actual = derivatives.weight_jac_mat_prod(layer, None, None, mat)
    torch.testing.assert_close(actual, jvps(jacrev(scale)(w, X), mat))
    print(f"J_w and its transpose agree for inputs {list(X.shape)}")

# %%
# The average over samples, with a matrix that is not symmetric, so that a transpose
# would be noticed:

for shape in shapes:
    layer, X, _ = layer_and_vectors(shape)
    X = X.flatten(1)
    forward = functools.partial(scale, layer.weight.detach())
    jacobians = vmap(jacrev(forward))(X)
    mat = torch.randn(X.shape[1], X.shape[1], **options)

    actual = derivatives.ea_jac_t_mat_jac_prod(layer, None, None, mat)
    products = einsum(jacobians, mat, jacobians, "n k i, k l, n l j -> n i j")
    torch.testing.assert_close(actual, products.mean(0))
    print(f"The average agrees for {list(mat.shape)}")

# %%
# Last, the fact. An output has three kinds of second derivatives:
#
# - input-input: ``hessian_is_zero`` is about these;
# - input-parameter: not zero here (the output is a product), but they never enter the
#   Hessian block of one parameter, and these blocks are all that BackPACK's extensions
#   compute;
# - parameter-parameter: no method covers these; BackPACK assumes that they are zero.
#
# ``torch.func.hessian`` uses forward mode, so we write our own with reverse mode only.


def hessian(function: Callable, argnums=0) -> Callable:
    """Return a function for the Hessian of ``function``."""
    return jacrev(jacrev(function, argnums), argnums)


layer, x = ScaleModule(-1.3).to(**options), torch.linspace(-1, 1, D, **options)
second = hessian(scale, argnums=(0, 1))(layer.weight.detach(), x)
(H_ww, H_wx), (_, H_xx) = second
for name, H in [("x, x", H_xx), ("w, x", H_wx), ("w, w", H_ww)]:
    print(f"second derivative with respect to {name}: zero is {not H.any()}")

linear_in_input = not H_xx.any()
if derivatives.hessian_is_zero(layer) is not linear_in_input:
    raise AssertionError("hessian_is_zero does not fit the layer.")
torch.testing.assert_close(H_ww, torch.zeros_like(H_ww))

# %%
# One table for all extensions
# ----------------------------
# For ten extensions nothing remains to be written. Their base classes make the method
# ``weight`` themselves, from the name of the parameter. We collect them in a table:
# extension, and how its module extension is built from a derivatives object ``d``.
# The Monte-Carlo (MC) extensions share a base class with the exact ones, because they
# differ in the square root that arrives, not in what a layer does with it.

# BackPACK's base classes do not agree on the order of their arguments.
build_module_extension: dict[type[BackpropExtension], Callable] = {
    BatchGrad: lambda d: BatchGradBase(d, ["weight"]),
    BatchL2Grad: lambda d: BatchL2Base(["weight"], d),
    SumGradSquared: lambda d: SGSBase(d, ["weight"]),
    # from the summed gradient and the sum of the squares
    Variance: lambda d: VarianceBaseModule(
        ["weight"], GradBaseModule(d, ["weight"]), SGSBase(d, ["weight"])
    ),
    DiagGGNExact: lambda d: DiagGGNBaseModule(d, ["weight"], sum_batch=True),
    DiagGGNMC: lambda d: DiagGGNBaseModule(d, ["weight"], sum_batch=True),
    BatchDiagGGNExact: lambda d: DiagGGNBaseModule(d, ["weight"], sum_batch=False),
    BatchDiagGGNMC: lambda d: DiagGGNBaseModule(d, ["weight"], sum_batch=False),
    SqrtGGNExact: lambda d: SqrtGGNBaseModule(d, ["weight"]),
    SqrtGGNMC: lambda d: SqrtGGNBaseModule(d, ["weight"]),
}

# %%
# For the other nine the base class only backpropagates, and we write ``weight``. What
# arrives in its last argument differs: a list of signed square roots (Hessian
# diagonal), a square root or an averaged matrix (Kronecker factors), or a function
# (products).
#
# **Hessian diagonal.** The Hessian is the GGN plus one term for each nonlinear layer
# behind the parameter. A term can have negative eigenvalues, and then it has no square
# root. So BackPACK splits it into a positive and a negative part and sends a square
# root and a sign for each. The base class adds them to the list if ``hessian_is_zero``
# says no. For each square root we do what ``DiagGGNExact`` does.


class ScaleModuleDiagHessian(DiagHBaseModule):
    """Compute the Hessian diagonal for ``ScaleModule``."""

    def __init__(self, derivatives: BaseParameterDerivatives, sum_batch: bool):
        """Name the parameter; say whether the batch is summed."""
        super().__init__(derivatives, params=["weight"])
        self.sum_batch = sum_batch

    def weight(self, ext, module, g_inp, g_out, backproped) -> Tensor:
        """Compute the diagonal.

        Args:
            ext: The running extension (not needed).
            module: The layer; ``module.input0`` has shape ``[N, *]``.
            g_inp: Gradients with respect to the layer's inputs (not needed).
            g_out: Gradient with respect to the layer's output (not needed).
            backproped: ``{"matrices": [...], "signs": [...]}``, one sign for each
                matrix of shape ``[K, N, *]``; K may differ between them.

        Returns:
            Hessian diagonal, shape ``[N, 1]``, or ``[1]`` if the batch is summed.
        """
        diagonal = torch.zeros(len(module.input0), 1).to(module.input0)
        for V, sign in zip(backproped["matrices"], backproped["signs"], strict=True):
            V_w = self.derivatives.param_mjp(
                "weight", module, g_inp, g_out, V, sum_batch=False
            )
            diagonal += sign * V_w.square().sum(0)
        return diagonal.sum(0) if self.sum_batch else diagonal


# %%
# **Kronecker factors.** For a linear layer the block of the GGN is large, and KFAC,
# KFLR and KFRA approximate it by the Kronecker product of two factors. The block of the
# scale weight is 1 by 1. So the list of factors has one element, which stands for the
# whole block (sampled for KFAC, with averages over the batch for KFRA and HBP). The
# list for the bias of a linear layer has one element, too.
#
# What arrives depends on the settings of the extension. For KFAC and KFLR it is a
# square root of the GGN with respect to the output, ``[K, N, *]``. For KFRA, and for
# HBP with the settings that we use below, it is a matrix :math:`\bar{H}` of shape ``[D,
# D]`` that was averaged over the batch at each layer. (It starts as the sum of the loss
# Hessians of the samples, and the averages keep this scale. So :math:`\bar{H} / N`
# stands for one sample.) Then the weight gets :math:`\frac{1}{N} \sum_n x_n^\top
# \bar{H} x_n`. HBP can also ask to average the Jacobian of the parameter before the
# product (``should_average_param_jac``); our class refuses this.


class ScaleModuleHBP(HBPBaseModule):
    """Compute the only Kronecker factor for ``ScaleModule``."""

    def __init__(self, derivatives: BaseParameterDerivatives):
        """Name the parameter."""
        super().__init__(derivatives, params=["weight"])

    def weight(self, ext, module, g_inp, g_out, backproped) -> list[Tensor]:
        """Compute the factor.

        Args:
            ext: The running extension; it knows its settings.
            module: The layer; ``module.input0`` has shape ``[N, *]``.
            g_inp: Gradients with respect to the layer's inputs (not needed).
            g_out: Gradient with respect to the layer's output (not needed).
            backproped: Square root V ``[K, N, *]``, or averaged matrix ``[D, D]``,
                where D counts all features of a sample.

        Returns:
            List of one factor, shape ``[1, 1]``.

        Raises:
            NotImplementedError: If the Jacobian is to be averaged (``CHEN``, below).
        """
        if ExpectationApproximation.should_average_param_jac(ext.get_ea_strategy()):
            raise NotImplementedError("ScaleModule: parameter Jacobian not averaged.")
        d, io = self.derivatives, (module, g_inp, g_out)
        if BackpropStrategy.is_batch_average(ext.get_backprop_strategy()):
            # J_w times 1, that is x_n, [1, N, *]; then H x_n; then x_n^T H x_n
            J_w = d.weight_jac_mat_prod(*io, torch.ones(1, 1).to(module.weight))
            H_J_w = einsum(backproped, J_w.flatten(2), "i j, k n j -> k n i")
            H_J_w = H_J_w.view_as(J_w)
            return [d.param_mjp("weight", *io, H_J_w) / len(module.input0)]
        V_w = d.param_mjp("weight", *io, backproped, sum_batch=False)
        return [einsum(V_w, V_w, "k n i, k n j -> i j")]


# %%
# **Matrix products.** GGNMP, HMP and PCHMP store a function that multiplies the
# parameter's block with K vectors. What arrives is such a function as well, for the
# layer's output. Ours goes forward with :math:`\mathrm{J}_w`, calls it,
# and returns with :math:`\mathrm{J}_w^\top`. The three differ in ``backpropagate``
# alone, so one method serves all.


class WeightProduct:
    """Multiply with the block of ``module.weight``; needs ``self.derivatives``."""

    def weight(self, ext, module, g_inp, g_out, product_out) -> Callable:
        """Build the product with the block of the weight.

        Args:
            ext: The running extension (not needed).
            module: The layer; ``module.input0`` has shape ``[N, *]``.
            g_inp: Gradients with respect to the layer's inputs (not needed).
            g_out: Gradient with respect to the layer's output (not needed).
            product_out: Function for the block of the output, ``[K, N, *]`` to
                ``[K, N, *]``.

        Returns:
            Function for the block of the weight, ``[K, 1]`` to ``[K, 1]``.
        """

        def product(mat: Tensor) -> Tensor:
            """Multiply K vectors with the block, ``[K, 1]`` to ``[K, 1]``."""

            d, io = self.derivatives, (module, g_inp, g_out)
            mat_out = product_out(d.weight_jac_mat_prod(*io, mat))
            return d.param_mjp("weight", *io, mat_out)

        return product


class ScaleModuleGGNMP(WeightProduct, GGNMPBase):
    """Multiply with the block of the GGN."""


class ScaleModuleHMP(WeightProduct, HMPBase):
    """Multiply with the block of the Hessian."""


class ScaleModulePCHMP(WeightProduct, PCHMPBase):
    """Multiply with the block of the positive-curvature Hessian."""


# %%
# Nine more entries, and the table is complete.

build_module_extension |= {
    DiagHessian: lambda d: ScaleModuleDiagHessian(d, sum_batch=True),
    BatchDiagHessian: lambda d: ScaleModuleDiagHessian(d, sum_batch=False),
    KFAC: ScaleModuleHBP,
    KFLR: ScaleModuleHBP,
    KFRA: ScaleModuleHBP,
    HBP: ScaleModuleHBP,
    GGNMP: lambda d: ScaleModuleGGNMP(d, ["weight"]),
    HMP: lambda d: ScaleModuleHMP(d, ["weight"]),
    PCHMP: lambda d: ScaleModulePCHMP(d, ["weight"]),
}

missing = set(extensions.__all__) - {cls.__name__ for cls in build_module_extension}
print(f"{len(build_module_extension)} extensions, missing: {missing or 'none'}")

# %%
# One factory builds a new extension for each use, of any kind, and registers our module
# extension in it. HBP takes four settings. With these it is like KFRA, with the Hessian
# in place of the GGN. (``BOTEV_MARTENS`` and ``CHEN``, which comes up at the end, are
# named after authors: for the parameter, the first averages the products
# :math:`\mathrm{J}_w^\top \bar{H} \, \mathrm{J}_w`, the second averages
# :math:`\mathrm{J}_w`, and then takes the product.)

hbp_options = {
    "curv_type": Curvature.HESSIAN,
    "loss_hessian_strategy": LossHessianStrategy.SUM,
    "backprop_strategy": BackpropStrategy.BATCH_AVERAGE,
    "ea_strategy": ExpectationApproximation.BOTEV_MARTENS,
}


def make_extension(
    extension_class: type[BackpropExtension],
    derivatives: BaseParameterDerivatives | None = None,
    **settings,
) -> BackpropExtension:
    """Build an extension that supports ``ScaleModule``.

    Args:
        extension_class: A key of ``build_module_extension``.
        derivatives: Default: a new ``ScaleModuleDerivatives``.
        **settings: Arguments of the extension, like ``mc_samples``.
    """
    if extension_class is HBP:
        settings = hbp_options | settings
    extension = extension_class(**settings)
    module_extension = build_module_extension[extension_class](
        derivatives or ScaleModuleDerivatives()
    )
    extension.set_module_extension(ScaleModule, module_extension)
    return extension


# %%
# Networks to test with
# ---------------------
# Two networks, each with two scale modules: in the first a linear layer comes before
# both, so that what goes through them is seen there; the second takes ``[N, T, D]``.
# Both have a nonlinear layer, so that the Hessian is not the GGN. We take the scale
# weights, and in the first network the bias before them: vectors, whose blocks are
# small.


def make_network(kind: str, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Build a classifier with two scale modules.

    Args:
        kind: ``"[N, D]"`` or ``"[N, T, D]"``, the shape of its input.
        activation: Class of the nonlinear layer.

    Returns:
        Network whose output has shape ``[N, C]``.
    """
    first, second = ScaleModule(1.4), ScaleModule(-0.8)
    if kind == "[N, D]":
        layers = [nn.Linear(D, 3), first, activation(), second, nn.Linear(3, C)]
    else:
        head = [nn.Flatten(), activation(), nn.Linear(T * D, C)]
        layers = [first, second, *head]
    return nn.Sequential(*layers).to(**options)


names = {
    "[N, D]": ["0.bias", "1.weight", "3.weight"],
    "[N, T, D]": ["0.weight", "1.weight"],
}

# %%
# A ``Case`` holds a network with its data. ``witness`` and ``S`` are filled in below.


@dataclass
class Case:
    """A network, its data, and the right results for it."""

    kind: str
    reduction: str
    model: nn.Sequential
    X: Tensor
    y: Tensor
    witness: dict = field(default_factory=dict)
    S: dict = field(default_factory=dict)

    @property
    def r(self) -> float:
        """Return the factor of the reduction."""
        return {"mean": 1 / len(self.X), "sum": 1.0}[self.reduction]

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Return one sample's share of the total loss; ``output`` has shape ``[C]``."""
        return self.r * nn.functional.cross_entropy(output, y)


# %%
# ``run`` computes one extension with BackPACK, on a copy, and returns what it finds in
# the extension's savefield, the attribute of a parameter in which an extension stores
# its result. ``run`` sets the seed, so that Monte-Carlo extensions draw the same
# numbers when it is called twice.


def run(case: Case, extension: BackpropExtension) -> dict:
    """Run one extension.

    Args:
        case: Network and data.
        extension: An extension that supports all layers of the network.

    Returns:
        Results by name of the parameter.
    """
    torch.manual_seed(1)
    model = extend(copy.deepcopy(case.model))
    loss_function = extend(nn.CrossEntropyLoss(reduction=case.reduction))
    with backpack(extension):
        loss_function(model(case.X), case.y).backward()
    field = extension.savefield
    return {n: getattr(p, field) for n, p in model.named_parameters()}


# %%
# The witness
# -----------
# ``torch.func`` gives four things for a parameter with p entries: each sample's
# gradient ``[p]``, Jacobian of the network's output ``[C, p]``, and blocks of the GGN
# and the Hessian, ``[p, p]``. Most results follow from these. ``SqrtGGNExact``, the
# Monte-Carlo extensions, KFRA and HBP need more, see below. The factor :math:`r` of the
# reduction, 1 for ``"sum"`` and 1/N for ``"mean"``, is in the loss.


@dataclass
class Witness:
    """What autodiff says about one parameter; ``r`` is in all but ``J``."""

    g: Tensor
    J: Tensor
    ggn: Tensor
    hessian: Tensor


def loss_hessians(case: Case) -> Tensor:
    """Return each sample's Hessian of the loss, shape ``[N, C, C]``."""
    return vmap(hessian(case.loss))(case.model(case.X).detach(), case.y)


def ask_autodiff(case: Case, name: str) -> Witness:
    """Compute gradients, Jacobians and blocks of each sample.

    Args:
        case: Network and data.
        name: Name of a parameter with shape ``[p]``.

    Returns:
        ``g`` ``[N, p]``, ``J`` ``[N, C, p]``, ``ggn`` and ``hessian`` ``[N, p, p]``.
    """
    parameters = {n: p.detach() for n, p in case.model.named_parameters()}

    def output(theta, x):
        """Return the network's output for one sample, shape ``[C]``."""
        changed = parameters | {name: theta}
        return functional_call(case.model, changed, x.unsqueeze(0)).squeeze(0)

    def loss(theta, x, y):
        """Return one sample's share of the total loss, a scalar."""
        return case.loss(output(theta, x), y)

    data = (parameters[name], case.X, case.y)
    g = vmap(grad(loss), (None, 0, 0))(*data)
    H = vmap(hessian(loss), (None, 0, 0))(*data)
    J = vmap(jacrev(output), (None, 0))(*data[:2])
    ggn = einsum(J, loss_hessians(case), J, "n c i, n c k, n k j -> n i j")
    return Witness(g, J, ggn, H)


# %%
# Both networks, with both reductions, make four cases, with 3 + 3 + 2 + 2 = 10
# parameters to compare.


def make_case(kind: str, reduction: str, activation=nn.Tanh, samples: int = N) -> Case:
    """Build a network and data, and ask autodiff about its parameters."""
    X = torch.randn(samples, *{"[N, D]": (D,), "[N, T, D]": (T, D)}[kind], **options)
    y = torch.randint(C, (samples,), device=device)
    case = Case(kind, reduction, make_network(kind, activation), X, y)
    case.witness = {name: ask_autodiff(case, name) for name in names[kind]}
    return case


cases = [make_case(kind, r) for kind in names for r in ["mean", "sum"]]

# %%
# A first look, before any extension: GGN and Hessian differ for all parameters before
# the activation, so a mix-up would show there. Only ``3.weight`` stands behind it.
# There they agree, because from there on the network is linear (plus a constant).

for name, witness in cases[0].witness.items():
    ggn, full = witness.ggn.sum(0)[0, 0], witness.hessian.sum(0)[0, 0]
    print(f"{name}: first entry of the GGN {ggn:+.4f}, of the Hessian {full:+.4f}")

for case in cases:
    for name, witness in case.witness.items():
        if name == "3.weight":
            torch.testing.assert_close(witness.ggn, witness.hessian)
        elif torch.allclose(witness.ggn, witness.hessian):
            raise RuntimeError(f"{name}: the GGN and the Hessian do not differ.")

# %%
# ``check`` compares one extension with a formula, for all parameters of all cases, and
# notes the largest relative distance for the table at the end.

table = {}


def check(extension_class, formula: Callable, cases=cases, **settings) -> None:
    """Compare an extension with autodiff and note the distance.

    Args:
        extension_class: A key of ``build_module_extension``.
        formula: Maps a case and the name of a parameter to the right result.
        cases: Networks and data.
        **settings: Arguments of the extension.

    Raises:
        AssertionError: If results differ.
    """
    distances = []
    for case in cases:
        extension = make_extension(extension_class, **settings)
        results = run(case, extension)
        for name in names[case.kind]:
            actual, expected = results[name], formula(case, name)
            if isinstance(actual, list):  # Kronecker factors
                (actual,) = actual
            if callable(actual):  # multiply with unit vectors and their negatives
                unit = torch.eye(len(expected), **options)
                actual = actual(torch.cat([unit, -unit]))
                expected = torch.cat([expected, -expected])
            label = f"{extension_class.__name__}, {case.kind}, {case.reduction}, {name}"
            torch.testing.assert_close(
                actual, expected, msg=lambda text, label=label: f"{label}: {text}"
            )
            distances.append((actual - expected).abs().max() / expected.abs().max())
    # The last case has inputs [N, T, D], and a scale module in first place.
    distance, result = max(distances).item(), results["0.weight"]
    table.setdefault(extension_class, []).append((distance, result))
    label = f"{len(distances)} parameters in {len(cases)} runs agree"
    print(f"{extension_class.__name__}: {label}")


# %%
# Who asks for what
# -----------------
# Before we look at what an extension returns, we watch. Every method of a derivatives
# object is wrapped so that it remembers whether it was called, and each extension runs
# once.

methods = [n for n, m in vars(ScaleModuleDerivatives).items() if callable(m)]


def methods_asked_by(extension_class: type[BackpropExtension]) -> list[bool]:
    """Tell for each of ``methods`` whether an extension calls it."""
    d = ScaleModuleDerivatives()
    for method in methods:
        setattr(d, method, Mock(wraps=getattr(d, method)))
    results = run(cases[0], make_extension(extension_class, d))
    for name in names["[N, D]"]:
        if callable(results[name]):
            results[name](torch.eye(len(cases[0].witness[name].g[0]), **options))
    return [getattr(d, method).called for method in methods]


asked = torch.tensor([methods_asked_by(e) for e in build_module_extension])
if not asked.any(0).all():
    raise RuntimeError("A method of the derivatives class is never used.")

# %%
# First order needs only :math:`\mathrm{J}_w^\top`; the GGN, KFAC and KFLR also
# :math:`\mathrm{J}_x^\top`; the Hessian diagonal adds ``hessian_is_zero``. ``KFRA`` and
# ``HBP`` replace :math:`\mathrm{J}_x^\top` by the average and add :math:`\mathrm{J}_w`;
# the matrix products need all four products with one Jacobian. HBP, HMP and PCHMP also
# ask ``hessian_is_zero``, as they add second derivatives; so does KFRA, as all averaged
# matrices go backward by the same code. (KFAC and KFLR send square roots.)

transposed = {"_jac_t_mat_prod", "_weight_jac_t_mat_prod"}
others = [i for i, method in enumerate(methods) if method not in transposed]
served = len(asked) - asked[:, others].any(1).sum()
print(f"{served} of {len(asked)} extensions need the transposed products only.")

families = {"first order": 4, "GGN": 6, "Hessian": 2, "Kronecker": 4, "products": 3}
labels = [extension_class.__name__ for extension_class in build_module_extension]

fig, ax = plt.subplots(figsize=(7.5, 6), layout="constrained")
start = 0
for color, (family, size) in enumerate(families.items()):
    rows, columns = asked[start : start + size].nonzero(as_tuple=True)
    ax.scatter(columns, rows + start, s=90, color=f"C{color}", label=family)
    start += size
ax.set_xticks(range(len(methods)), methods, rotation=25, ha="right")
ax.set_yticks(range(len(labels)), labels)
ax.invert_yaxis()
ax.grid(alpha=0.3)
ax.set_xlabel("method of the derivatives class")
ax.set_ylabel("extension")
ax.set_title("What each extension asks of the derivatives class")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %%
# First order
# -----------
# All four follow from the individual gradients :math:`g_n`, which carry the factor
# :math:`r` of the reduction.


def gradients(case: Case, name: str) -> Tensor:
    """Return individual gradients, shape ``[N, p]``."""
    return case.witness[name].g


check(BatchGrad, gradients)
check(BatchL2Grad, lambda *a: gradients(*a).square().sum(1))
check(SumGradSquared, lambda *a: gradients(*a).square().sum(0))
check(Variance, lambda *a: gradients(*a).var(0, correction=0))

# %%
# ``BatchGrad`` takes a subset:

subset = [4, 0, 2]
check(BatchGrad, lambda *a: gradients(*a)[subset], subsampling=subset)

# %%
# .. note::
#     With ``"mean"``, squares carry :math:`1/N^2`. So ``Variance`` is **not** the
#     variance of the samples' own gradients :math:`N g_n`; it is smaller by
#     the factor :math:`N^2`. Use ``"sum"``, or multiply by it.

case = cases[0]
variance = run(case, make_extension(Variance))["1.weight"]
own_variance = (N * gradients(case, "1.weight")).var(0, correction=0)
torch.testing.assert_close(N**2 * variance, own_variance)
print(f"Variance: {variance.item():.2e}")
print(f"variance of the samples' own gradients: {own_variance.item():.2e}")

# %%
# The GGN, exact and sampled
# --------------------------
# With :math:`S S^\top` for the loss Hessian, the GGN block of a sample is :math:`V
# V^\top` with :math:`V = \mathrm{J}^\top S`. The six GGN extensions and KFLR and KFAC
# show V in several forms. The exact ones use the S from `The GGN and its diagonal,
# derived <../1_scale_module/3_ggn_derivation.html>`_. The MC ones draw M labels
# :math:`y` from the softmax :math:`\pi` of the output. With the one-hot vector
# :math:`e_y` (1 at entry :math:`y`, else 0), the columns of S are :math:`\sqrt{r / M}
# \, (\pi - e_y)`.
#
# So we need the S that was used. BackPACK shows it: the network's output is the last
# bias plus something, its Jacobian with respect to this bias is the identity, and so
# the square root of the GGN for this bias is S. No code of ours is involved. With
# ``"mean"``, S carries :math:`1/\sqrt{N}`, and so the GGN carries :math:`1/N`.

mc = {"mc_samples": 3}


def read_S(case: Case, extension_class: type[BackpropExtension], **settings) -> Tensor:
    """Return the square root of the loss Hessian that BackPACK starts with.

    Args:
        case: Network and data.
        extension_class: ``SqrtGGNExact`` or ``SqrtGGNMC``.
        **settings: Its arguments.

    Returns:
        S, shape ``[K, N, C]``, with K = C or K = ``mc_samples``.
    """
    results = run(case, make_extension(extension_class, **settings))
    last_bias = list(results)[-1]
    return results[last_bias]


# %%
# The exact S is a square root of the loss Hessian by autodiff. The sampled one is not.

for case in cases:
    case.S["exact"] = read_S(case, SqrtGGNExact)
    case.S["mc"] = read_S(case, SqrtGGNMC, **mc)
    square = einsum(case.S["exact"], case.S["exact"], "k n i, k n j -> n i j")
    torch.testing.assert_close(square, loss_hessians(case))

last = cases[-1]
S_mc, H_loss = last.S["mc"], loss_hessians(last)
square = einsum(S_mc, S_mc, "k n i, k n j -> n i j")
error = (square - H_loss).norm() / H_loss.norm()
print(f"S: {list(last.S['exact'].shape)}, sampled: {list(S_mc.shape)}")
print(f"With 3 labels per sample, S S^T is off by {error:.0%}.")

# %%
# Both are what we said. We compare the exact one with its formula, :math:`S = \sqrt{r}
# \, (\mathrm{diag}(\sqrt{\pi}) - \pi \sqrt{\pi}^\top)`. From :math:`\pi` we subtract
# :math:`\sqrt{M / r}` times the sampled one, which must leave one-hot labels.

for case in cases:
    pi = case.model(case.X).softmax(1).detach()
    formula = pi.sqrt().diag_embed() - einsum(pi, pi.sqrt(), "n c, n k -> n c k")
    torch.testing.assert_close(case.S["exact"], case.r**0.5 * formula.permute(2, 0, 1))

    labels = pi - (mc["mc_samples"] / case.r) ** 0.5 * case.S["mc"]
    one_hot = nn.functional.one_hot(labels.argmax(2), C).to(labels)
    torch.testing.assert_close(labels, one_hot)

# %%
# Given S, nothing is random. All results must agree to rounding, also for the MC
# extensions, which draw the same labels from the same seed.


def V(case: Case, name: str, kind: str) -> Tensor:
    """Return V = J^T S by autodiff, shape ``[K, N, p]``."""
    return einsum(case.S[kind], case.witness[name].J, "k n c, n c i -> k n i")


def block(V: Tensor) -> Tensor:
    """Return the GGN block, shape ``[p, p]``, for ``V`` of shape ``[K, N, p]``."""
    return einsum(V, V, "k n i, k n j -> i j")


check(DiagGGNExact, lambda *a: V(*a, "exact").square().sum((0, 1)))
check(DiagGGNMC, lambda *a: V(*a, "mc").square().sum((0, 1)), **mc)
check(BatchDiagGGNExact, lambda *a: V(*a, "exact").square().sum(0))
check(BatchDiagGGNMC, lambda *a: V(*a, "mc").square().sum(0), **mc)
check(SqrtGGNExact, lambda *a: V(*a, "exact"))
check(SqrtGGNMC, lambda *a: V(*a, "mc"), **mc)
check(KFLR, lambda *a: block(V(*a, "exact")))
check(KFAC, lambda *a: block(V(*a, "mc")), **mc)

# %%
# For two of the exact ones we close the circle: they are the GGN that autodiff computes
# from Jacobians and the loss Hessian, without any S.


def diagonal(blocks: Tensor) -> Tensor:
    """Return the diagonals, shape ``[N, p]``, of blocks ``[N, p, p]``."""
    return blocks.diagonal(dim1=1, dim2=2)


check(DiagGGNExact, lambda case, name: diagonal(case.witness[name].ggn).sum(0))
check(KFLR, lambda case, name: case.witness[name].ggn.sum(0))

# %%
# ``SqrtGGNExact`` and ``SqrtGGNMC`` take a subset. Then V has only these samples.

for case in cases:
    case.S["mc subset"] = read_S(case, SqrtGGNMC, subsampling=subset, **mc)


def V_of_subset(case: Case, name: str) -> Tensor:
    """Return V for the samples in ``subset``, with the labels drawn for these."""
    J = case.witness[name].J[subset]
    return einsum(case.S["mc subset"], J, "k n c, n c i -> k n i")


check(SqrtGGNExact, lambda *a: V(*a, "exact")[:, subset], subsampling=subset)
check(SqrtGGNMC, V_of_subset, subsampling=subset, **mc)

# %%
# The Monte-Carlo error
# ---------------------
# Do the MC extensions estimate the right thing? A tolerance that is wide enough for the
# noise also lets mistakes through. But the error of an unbiased mean of M independent
# samples falls as :math:`1/\sqrt{M}`, without end: with logarithmic axes, a line with
# slope :math:`-1/2`. The error of a wrong extension stops falling.
#
# ``to_ggn`` turns each result into an estimate of the same number: the GGN of a scale
# weight, summed over the batch.

sample_counts, repeats = [1, 8, 64, 512], 40

to_ggn = {
    DiagGGNMC: lambda result: result.sum(),
    BatchDiagGGNMC: lambda result: result.sum(),
    SqrtGGNMC: lambda result: result.square().sum(),
    KFAC: lambda result: result[0].sum(),
}


def mc_errors(case: Case, name: str, derivatives=None, classes=to_ggn) -> dict:
    """Return for each extension its errors, one for each number of samples.

    The error is relative: root mean square over repeats, over the GGN of the weight.
    """
    model = extend(copy.deepcopy(case.model))
    loss_function = extend(nn.CrossEntropyLoss(reduction=case.reduction))
    weight, truth = model.get_parameter(name), case.witness[name].ggn.sum()
    errors = torch.zeros(len(classes), len(sample_counts), repeats)
    for m, mc_samples in enumerate(sample_counts):
        for k in range(repeats):
            batch = [
                make_extension(c, derivatives, mc_samples=mc_samples) for c in classes
            ]
            with backpack(*batch):
                loss_function(model(case.X), case.y).backward()
            for c, extension in enumerate(batch):
                estimate = to_ggn[type(extension)](getattr(weight, extension.savefield))
                errors[c, m, k] = estimate / truth - 1
    return dict(zip(classes, errors.square().mean(-1).sqrt(), strict=True))


# %%
# A least-squares fit gives the slope. It is noisy itself. For normally distributed
# errors, the logarithm of a root mean square over R repeats has a standard deviation of
# about :math:`1 / \sqrt{2 R}`. Divided by the norm of the centered :math:`\log M`, this
# is the slope's. We allow six times as much.

log_M = torch.tensor(sample_counts).log()
log_M = log_M - log_M.mean()
tolerance = 6 * (2 * repeats) ** -0.5 / log_M.norm().item()
print(f"tolerance of the slope: {tolerance:.2f}")


def slope(errors: Tensor) -> Tensor:
    """Fit the slope of ``errors`` over ``sample_counts``, both logarithmic."""
    return (log_M * errors.log()).sum() / log_M.square().sum()


errors = mc_errors(cases[1], "1.weight")
for extension_class, rms in errors.items():
    expected = torch.tensor(-0.5)
    torch.testing.assert_close(slope(rms), expected, atol=tolerance, rtol=0)
    print(f"{extension_class.__name__}: slope {slope(rms):.2f}")

# %%
# And a wrong one, which is hard to tell from a right one with few samples:


class WrongDerivatives(ScaleModuleDerivatives):
    """Wrong on purpose: the Jacobian of the weight is 10 percent too large."""

    def _weight_jac_t_mat_prod(self, *args, **settings) -> Tensor:
        """Multiply by a wrong Jacobian, ``[K, N, *]`` to ``[K, N, 1]``."""
        return 1.1 * super()._weight_jac_t_mat_prod(*args, **settings)


wrong = mc_errors(cases[1], "1.weight", WrongDerivatives(), [DiagGGNMC])[DiagGGNMC]
if abs(slope(wrong) + 0.5) < tolerance:
    raise RuntimeError("The slope did not give the wrong class away.")
print(f"wrong Jacobian: slope {slope(wrong):.2f}")

# %%
# In the figure, the right extensions stay on the line to the end, and the error of the
# wrong one levels off at :math:`1.1^2 - 1 = 21\,\%`.

fig, ax = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
for marker, (extension_class, rms) in zip("osD^", errors.items(), strict=True):
    name = extension_class.__name__
    ax.plot(sample_counts, rms, marker, fillstyle="none", label=name)
line = errors[DiagGGNMC][0] / torch.tensor(sample_counts).sqrt()
ax.plot(sample_counts, line, color="0.4", linewidth=0.8, label=r"$\propto 1/\sqrt{M}$")
ax.plot(sample_counts, wrong, "X:", color="C5", label="DiagGGNMC, wrong")
ax.set_xscale("log", base=2)
ax.set_yscale("log")
ax.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5], ["2%", "5%", "10%", "20%", "50%"])
ax.minorticks_off()
ax.set_xlabel("number of Monte-Carlo samples M")
ax.set_ylabel("relative error")
ax.set_title("The error of a right Monte-Carlo extension keeps falling")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %%
# The Hessian
# -----------
# Next, the diagonal of the Hessian. Unlike the GGN it holds the second derivatives of
# the activation behind the first scale module.

check(DiagHessian, lambda case, name: diagonal(case.witness[name].hessian).sum(0))
check(BatchDiagHessian, lambda case, name: diagonal(case.witness[name].hessian))

# %%
# Now the assumption from above, that the output is linear in the parameter. Take a
# layer that breaks it, :math:`z_n = e^w x_n`, with :math:`\mathrm{J}_x z_n = e^w I_D`
# and :math:`\mathrm{J}_w z_n = e^w x_n`. This layer will stand first, so
# ``DiagGGNExact`` and ``DiagHessian`` need only the product with
# :math:`\mathrm{J}_w^\top`, and the new method computes it as it should.


class ExpScaleModule(ScaleModule):
    """Multiply the input by the exponential of one trainable number."""

    def forward(self, X: Tensor) -> Tensor:
        """Scale ``X``, shape ``[N, *]``, by ``exp(weight)``."""
        return self.weight.exp() * X


class WrongHessianDerivatives(ScaleModuleDerivatives):
    """Wrong for Hessians: the output of ``ExpScaleModule`` is not linear in w."""

    def _weight_jac_t_mat_prod(self, module, *args, **settings) -> Tensor:
        """Multiply by the transposed Jacobian, ``[K, N, *]`` to ``[K, N, 1]``."""
        product = super()._weight_jac_t_mat_prod(module, *args, **settings)
        return module.weight.exp() * product


model = nn.Sequential(ExpScaleModule(0.3), nn.Linear(D, C)).to(**options)
exp_case = Case("[N, D]", "sum", model, cases[0].X, cases[0].y)
witness = ask_autodiff(exp_case, "0.weight")
results = {}
for extension_class in [DiagGGNExact, DiagHessian]:
    extension = make_extension(extension_class)
    d = WrongHessianDerivatives()
    module_extension = build_module_extension[extension_class](d)
    extension.set_module_extension(ExpScaleModule, module_extension)
    results[extension_class] = run(exp_case, extension)["0.weight"]

torch.testing.assert_close(results[DiagGGNExact], diagonal(witness.ggn).sum(0))
missing = diagonal(witness.hessian).sum(0) - results[DiagHessian]
torch.testing.assert_close(missing, witness.g.sum(0))
print(f"DiagHessian {results[DiagHessian].item():.4f}")
print(f"by autodiff {(results[DiagHessian] + missing).item():.4f}")

# %%
# The GGN is right, the Hessian is not, and no error says so. What is missing is
# :math:`\sum_n (\partial^2_w z_n)^\top \, \partial L / \partial z_n`, which here equals
# the gradient, because :math:`\partial^2_w z_n = \partial_w z_n`. For a layer that is
# not linear in its parameters, use the GGN, or add this term in the method for the
# parameter.
#
# Kronecker factors
# -----------------
# ``KFLR`` and ``KFAC`` were done with the GGN. ``KFRA`` and ``HBP`` average at each
# layer. They start with :math:`\bar{H} = \sum_n \nabla^2_{f_n} L`, the Hessians of the
# total loss with respect to each sample's output. On the way back to the input, each
# layer turns it into :math:`\bar{H} \leftarrow \frac{1}{N} \sum_n (\mathrm{J}_x
# z_n)^\top \bar{H} \, \mathrm{J}_x z_n`, with the Jacobian of its output with respect
# to its input.
#
# ``HBP`` adds, at each layer, the second derivatives of that layer weighted with the
# gradient with respect to its output, and summed over the batch (only the products with
# Jacobians are averaged). The witness takes the same steps with Jacobians and Hessians
# from ``torch.func``, layer by layer. For these it needs each layer as a function of
# one flat sample and of the layer's parameters.


def flat_function(layer: nn.Module, shape: torch.Size) -> Callable:
    """Return ``layer`` as a function of a flat sample and a dict of parameters.

    Args:
        layer: The layer.
        shape: Shape of one sample.
    """

    def call(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the layer's output for a flat sample, flat as well."""
        X = x.reshape(1, *shape)
        return functional_call(layer, parameters, X).flatten()

    return call


# %%
# The loop goes from the last layer to the first. ``deltas`` holds the gradients of the
# loss with respect to the layers' outputs.


def averaged_blocks(case: Case, with_residual: bool) -> dict:
    """Compute the blocks of KFRA, or of HBP with the residual, layer by layer.

    Args:
        case: Network and data.
        with_residual: Whether to add second derivatives of the layers.

    Returns:
        For each parameter of shape ``[p]`` its block, ``[p, p]``.
    """
    values = [case.X.clone().requires_grad_()]
    for layer in case.model:
        values.append(layer(values[-1]))
    deltas = torch.autograd.grad(vmap(case.loss)(values[-1], case.y).sum(), values[1:])
    H = loss_hessians(case).sum(0)

    def average(J: Tensor) -> Tensor:
        """Average J^T H J over samples, for J of shape ``[N, k, i]``: ``[i, i]``."""
        return einsum(J, H, J, "n k i, k l, n l j -> i j") / len(J)

    blocks = {}
    for i, layer in reversed(list(enumerate(case.model))):
        x, delta = values[i].detach().flatten(1), deltas[i].flatten(1)
        call = flat_function(layer, values[i].shape[1:])
        parameters = {n: p.detach() for n, p in layer.named_parameters() if p.ndim == 1}
        if parameters:
            J = vmap(jacrev(call, argnums=1), (0, None))(x, parameters)
            blocks |= {f"{i}.{name}": average(J[name]) for name in J}
        H = average(vmap(jacrev(call), (0, None))(x, {}))
        if with_residual:
            second = vmap(hessian(call), (0, None))(x, {})
            H = H + einsum(delta, second, "n k, n k i j -> i j")
    return blocks


check(KFRA, lambda case, name: averaged_blocks(case, with_residual=False)[name])
check(HBP, lambda case, name: averaged_blocks(case, with_residual=True)[name])

# %%
# These are approximations. The exact block of a parameter is the sum of
# :math:`(\mathrm{J}_w z_n)^\top H_n \, \mathrm{J}_w z_n` over the samples. Here
# :math:`\mathrm{J}_w z_n` is the Jacobian of the layer's output with respect to the
# parameter, and :math:`H_n` is the GGN (for HBP: the Hessian) with respect to this
# output, both at sample n. The two extensions put one matrix for all samples,
# :math:`\bar{H} / N`, in the place of each :math:`H_n`. We look at how far KFRA is from
# the GGN. With one sample there is nothing to average, and both are exact: KFRA is the
# GGN, and HBP the Hessian.

kfra = run(cases[0], make_extension(KFRA))["1.weight"][0]
ggn = cases[0].witness["1.weight"].ggn.sum(0)
print(f"{N} samples: KFRA {kfra.item():.4f}, GGN {ggn.item():.4f}")

single = [make_case(kind, "mean", samples=1) for kind in names]
check(KFRA, lambda case, name: case.witness[name].ggn.sum(0), single)
check(HBP, lambda case, name: case.witness[name].hessian.sum(0), single)

# %%
# Matrix products
# ---------------
# To check a function, ``check`` multiplies with all unit vectors: the result is the
# block. It also takes their negatives: a function that takes absolute values somewhere
# could pass with unit vectors alone. ``PCHMP`` multiplies the second derivatives of the
# layers with the gradient, and makes these products positive: ``modify="clip"``, the
# default, sets negative ones to zero, ``modify="abs"`` takes absolute values. With
# ``ReLU`` all of them are zero, and the result must be the GGN. (We test it with
# nothing else; *What cannot be had*, below, says why.)

relu_cases = [make_case(kind, r, nn.ReLU) for kind in names for r in ["mean", "sum"]]

check(GGNMP, lambda case, name: case.witness[name].ggn.sum(0))
check(HMP, lambda case, name: case.witness[name].hessian.sum(0))
check(PCHMP, lambda case, name: case.witness[name].ggn.sum(0), relu_cases)

# %%
# .. warning::
#     The functions read ``module.input0`` when they are called, not when they are made.
#     For these three extensions BackPACK keeps the stored inputs after ``backward``. A
#     second forward pass replaces them, and the function then multiplies with another
#     matrix. Call it before you run the model again.

case = cases[0]
model = extend(copy.deepcopy(case.model))
loss_function = extend(nn.CrossEntropyLoss())
with backpack(make_extension(GGNMP)):
    loss_function(model(case.X), case.y).backward()

unit = torch.ones(1, 1, **options)
product = model[1].weight.ggnmp
before = product(unit)
torch.testing.assert_close(before, case.witness["1.weight"].ggn.sum(0))

model(2 * case.X)
print(f"before the second forward pass {before.item():.4f}")
print(f"after the second forward pass  {product(unit).item():.4f}")
if torch.allclose(product(unit), before):
    raise RuntimeError("BackPACK no longer reads the inputs at the call.")

# %%
# What cannot be had
# ------------------
# All 19 extensions support our layer. Most limits lie elsewhere, and a derivatives
# class cannot move them.
#
# **Subsets** are an argument of three extensions. Passing one to another is an error.


def message_of(error_class: type[Exception], call: Callable) -> str:
    """Return the first line of the error that ``call`` must raise."""
    try:
        call()
    except error_class as error:
        message = str(error).partition("\n")[0] or "(no message)"
        return f"{error_class.__name__}: {message}"
    raise RuntimeError(f"No {error_class.__name__}; the page is out of date.")


takes_subset = [
    extension_class.__name__
    for extension_class in build_module_extension
    if "subsampling" in inspect.signature(extension_class).parameters
]
if takes_subset != ["BatchGrad", "SqrtGGNExact", "SqrtGGNMC"]:
    raise RuntimeError("Other extensions take a subset; the page is out of date.")
print(message_of(TypeError, lambda: make_extension(DiagGGNExact, subsampling=subset)))

# %%
# **Kronecker factors of a linear layer** exist only if its input has the shape ``[N,
# D]``. In our networks it has. With a sequence the scale module would work, but not the
# linear layer.

model = nn.Sequential(ScaleModule(), nn.Linear(D, C), nn.Flatten()).to(**options)
case = Case("[N, T, D]", "mean", model, cases[2].X, cases[2].y)
for extension_class in [KFAC, KFLR, KFRA, HBP]:
    extension = make_extension(extension_class)
    print(message_of(NotImplementedError, lambda e=extension: run(case, e)))

# %%
# **The diagonal of the Hessian and HBP** know second derivatives of elementwise layers
# only. A layer that is nonlinear in its input and not elementwise is refused. (If
# ``hessian_is_zero`` says no, BackPACK asks the class for ``hessian_is_diagonal``,
# which is true of elementwise layers. Here the scale module claims that both are
# false.)

curved = ScaleModuleDerivatives()
curved.hessian_is_zero = curved.hessian_is_diagonal = lambda module: False
for extension_class in [DiagHessian, HBP]:
    extension = make_extension(extension_class, curved)
    print(message_of(NotImplementedError, lambda e=extension: run(cases[0], e)))

# %%
# **HBP with the Hessian** also needs inputs of shape ``[N, D]`` for an activation with
# second derivatives, such as ``Tanh``. That is why ``Flatten`` comes before the
# activation in our network. Otherwise an assertion fails, without a message.

model = nn.Sequential(ScaleModule(), nn.Tanh(), nn.Flatten(), nn.Linear(T * D, C))
case = Case("[N, T, D]", "mean", model.to(**options), cases[2].X, cases[2].y)
print(message_of(AssertionError, lambda: run(case, make_extension(HBP))))

# %%
# **HBP with averaged Jacobians** (``CHEN``): BackPACK's linear layer fails, by a
# mistake of its own. With the only linear layer of this network frozen, ours is
# reached, and refuses.

chen = {"ea_strategy": ExpectationApproximation.CHEN}
print(message_of(TypeError, lambda: run(cases[2], make_extension(HBP, **chen))))

model = copy.deepcopy(cases[2].model)
model[-1].requires_grad_(False)
case = Case("[N, T, D]", "mean", model, cases[2].X, cases[2].y)
print(message_of(NotImplementedError, lambda: run(case, make_extension(HBP, **chen))))

# %%
# **PCHMP** is wrong for parameters before a ``Tanh`` in BackPACK 1.7.1, without our
# layer and without an error: it multiplies the second derivatives twice with
# :math:`\delta`, the gradient with respect to the layer's output. One sample shows it.

model = nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, C)).to(**options)
case = Case("[N, D]", "sum", model, cases[0].X[:1], cases[0].y[:1])
witness = ask_autodiff(case, "0.bias")

z = model[0](case.X).detach()[0]
second = vmap(grad(grad(torch.tanh)))(z)
delta = grad(lambda a: case.loss(model[2](a), case.y[0]))(z.tanh())
residual = second * delta
torch.testing.assert_close(witness.hessian[0], witness.ggn[0] + residual.diag())

make_positive = {"clip": torch.relu, "abs": torch.abs}
for modify, function in make_positive.items():
    actual = run(case, PCHMP(modify=modify))["0.bias"](torch.eye(3, **options))
    right = witness.ggn[0] + function(residual).diag()
    wrong = witness.ggn[0] + function(residual * delta).diag()
    torch.testing.assert_close(actual, wrong)
    error = (actual - right).norm() / right.norm()
    print(f"PCHMP(modify='{modify}') is off by {error:.0%}")
if error < 1e-3:  # with the last one, "abs"
    raise RuntimeError("PCHMP is right here. This page is out of date.")

# %%
# The table
# ---------
# What was computed, under which name it is stored, its shape for the scale weight with
# N = 6, C = 5 and 3 MC samples, and the largest relative distance from autodiff over
# all parameters and networks: largest absolute difference over largest absolute value.


def describe(result) -> str:
    """Describe a result by its shape."""
    if isinstance(result, list):
        return f"list of one, {list(result[0].shape)}"
    if callable(result):
        return "function, [K, 1] to [K, 1]"
    return str(list(result.shape))


print(f"{'extension':<20}{'savefield':<22}{'result':<28}distance")
for extension_class in build_module_extension:
    distance = max(distance for distance, _ in table[extension_class])
    _, result = table[extension_class][0]
    savefield = make_extension(extension_class).savefield
    line = f"{extension_class.__name__:<20}{savefield:<22}{describe(result):<28}"
    print(f"{line}{distance:.0e}")

# %%
# What was verified
# -----------------
# Each product of the derivatives class agrees with ``torch.func``, for ``[N, D]`` and
# ``[N, T, D]``: the products with one Jacobian for K vectors at once, the one with
# :math:`\mathrm{J}_w^\top` also with and without the sum over the batch, and for a
# subset. ``hessian_is_zero`` agrees with the second derivatives for one sample of shape
# ``[D]``. All 19 extensions agree with autodiff in float64, at the default tolerance of
# ``torch.testing.assert_close``, for ``mean`` and ``sum`` and with the layer first and
# in the middle; ``PCHMP`` only with ``ReLU``; ``KFRA`` and ``HBP`` with a witness that
# averages as they do, and with the exact blocks for one sample. The MC extensions agree
# to rounding given the labels that they drew, and for one weight their errors fall with
# the slope :math:`-1/2`. The limits were provoked: errors for subsets, Kronecker
# factors, second derivatives and averaged Jacobians; wrong numbers for a nonlinear
# parameter, a second forward pass, and PCHMP before a ``Tanh``.
#
# **Next:** `A residual block: ReZero <3_residual.html>`_ puts the scale module on a
# branch.
#
# BackPACK: F. Dangel, F. Kunstner, P. Hennig, "BackPACK: Packing more into Backprop",
# ICLR 2020, `arXiv:1912.10985 <https://arxiv.org/abs/1912.10985>`_. KFAC: J. Martens
# and R. Grosse, ICML 2015, `arXiv:1503.05671 <https://arxiv.org/abs/1503.05671>`_. KFLR
# and KFRA: A. Botev, H. Ritter, D. Barber, ICML 2017, `arXiv:1706.03662
# <https://arxiv.org/abs/1706.03662>`_. PCH: S.-W. Chen, C.-N. Chou, E. Y. Chang,
# `arXiv:1802.06502 <https://arxiv.org/abs/1802.06502>`_.
