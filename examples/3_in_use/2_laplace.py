r"""
Laplace approximation with the GGN diagonal
===========================================

After this page you can turn a trained network that holds a layer of your own into a
Bayesian one, by one extra backward pass, and you know what the diagonal costs.

We will:

1. train a small classifier, and see that it is sure of itself far from all data;
2. compute the GGN diagonal at the trained parameters, and compare it with autodiff;
3. meet three traps that change the posterior: reduction, a scaled loss, weight decay;
4. choose the prior precision by the marginal likelihood;
5. get the Jacobians of the outputs from ``BatchGrad``, and turn the uncertainty of the
   parameters into an uncertainty of the predictions;
6. draw the confidence over the plane, with and without;
7. compare with the full GGN, to see what the diagonal loses.

You should know the two module extensions for ``ScaleModule``: `Individual gradients
<../1_scale_module/2_individual_gradients.html>`_ and `The GGN diagonal, backpropagated
<../1_scale_module/4_ggn_diagonal.html>`_. The letters: N samples, D features, C
classes, p parameters, V for the square root of the GGN that travels backward.
"""

import math
import textwrap
import warnings

import matplotlib.pyplot as plt
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad, DiagGGNExact
from backpack.extensions.firstorder.base import FirstOrderModuleExtension
from backpack.extensions.module_extension import ModuleExtension
from backpack.utils.subsampling import subsample
from einops import einsum
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vjp, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# %%
# Data and network
# ----------------
# The data are three bent arms in the plane, 300 samples to train and 1000 to test.
# All of them lie within a distance of 2 from the origin. The network will have H = 16
# hidden units.

D, H, C = 2, 16, 3


def draw_data(N: int) -> tuple[Tensor, Tensor]:
    """Draw ``N`` samples: inputs of shape ``[N, 2]`` and labels of shape ``[N]``."""
    y = torch.arange(N, device=device) % C
    radius = 0.5 + 1.5 * torch.rand(N, dtype=torch.float64, device=device)
    noise = 0.4 * torch.randn(N, dtype=torch.float64, device=device)
    angle = 2 * math.pi * y / C + 0.9 * radius + noise
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), y


X_train, y_train = draw_data(300)
X_test, y_test = draw_data(1000)

# %%
# The network holds the scale module in its middle. So both methods of its module
# extension for the GGN will be needed.


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


def make_network() -> nn.Sequential:
    """Build a network that maps ``[N, 2]`` to logits of shape ``[N, C]``."""
    layers = [nn.Linear(D, H), nn.ELU(), ScaleModule(), nn.Linear(H, C)]
    return nn.Sequential(*layers).to(device, torch.float64)


# %%
# Training is the search for the most probable parameters :math:`\theta`. The likelihood
# of the labels is the softmax of the network's output :math:`f_\theta(x)`, the prior is
# a Gaussian with mean zero and precision :math:`\delta` (its variance is :math:`1 /
# \delta`). Up to a constant, the negative logarithm of the posterior is, with the
# cross-entropy :math:`\ell` of one sample,
#
# .. math::
#     \sum_{n=1}^{N} \ell(f_\theta(x_n), y_n) + \frac{\delta}{2} \| \theta \|^2 .
#
# So the prior is weight decay, and the loss is a **sum** over samples. With the mean in
# its place, the same weight decay would stand for a prior that is N times as strong.
# L-BFGS takes us near to a minimum. (How near, we check below.)

network = extend(make_network())
loss_function = extend(nn.CrossEntropyLoss(reduction="sum"))


def train(delta: float | Tensor) -> None:
    """Move the network's parameters to a maximum of the posterior."""
    optimizer = torch.optim.LBFGS(
        network.parameters(), max_iter=300, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        """Compute the objective and its gradient, as L-BFGS asks for."""
        optimizer.zero_grad()
        theta = parameters_to_vector(network.parameters())
        loss = loss_function(network(X_train), y_train)
        objective = loss + delta / 2 * theta.square().sum()
        objective.backward()
        return objective

    optimizer.step(closure)


train(delta=1.0)

# %%
# How sure is the trained network where there are no data? We ask on a circle with
# radius 10. Whatever the network says there, it can't know. (The class probabilities
# for an input are called its **predictive**, hence the name ``plain_predictive``.)


def ring(radius: float) -> Tensor:
    """Return 60 points on a circle around the origin, shape ``[60, 2]``."""
    angle = 2 * math.pi * torch.arange(60, dtype=torch.float64, device=device) / 60
    return radius * torch.stack([angle.cos(), angle.sin()], dim=1)


@torch.no_grad()
def plain_predictive(X: Tensor) -> Tensor:
    """Return the network's own probabilities, shape ``[N, C]``."""
    return network(X).softmax(1)


@torch.no_grad()
def logits_of(X: Tensor) -> Tensor:
    """Return the network's logits, shape ``[N, C]``."""
    return network(X)


for name, X in [("test data", X_test), ("radius 10", ring(10.0))]:
    confidence = plain_predictive(X).amax(1).mean()
    largest = logits_of(X).amax(1).mean()
    print(f"{name}: mean confidence {confidence:.3f}, mean largest logit {largest:.1f}")

# %%
# It is more sure far away than near the data. The logits, and the gaps between them,
# grow with the distance, and a large gap means a probability near one.
#
# The Laplace approximation
# -------------------------
# There are other parameters that fit the data about as well, and they disagree far
# away. The posterior knows them all, but we can't compute it. Laplace's method replaces
# it by a Gaussian around the trained parameters :math:`\theta_*`, which has the same
# curvature there (MacKay, 1992; Daxberger et al., 2021). The curvature of the loss is
# replaced by its GGN, which has no negative eigenvalue, so that the result is a
# Gaussian for sure. With the training data :math:`\mathcal{D}`, and the Jacobians
# :math:`\mathrm{J}_\theta f_n` of the outputs :math:`f_n = f_{\theta_*}(x_n)`, each of
# shape ``[C, p]`` for p parameters,
#
# .. math::
#     p(\theta \mid \mathcal{D}) \approx
#     \mathcal{N} \big( \theta_*, (G + \delta I)^{-1} \big) \, ,
#     \qquad
#     G = \sum_{n=1}^{N} (\mathrm{J}_\theta f_n)^\top \,
#     \nabla^2_f \ell_n \, (\mathrm{J}_\theta f_n) \, .
#
# :math:`G` has p² entries. The **diagonal** Laplace approximation keeps p of them,
# :math:`h = \operatorname{diag}(G)`. Then the parameters are independent, and the
# variance of the i-th is :math:`1 / (h_i + \delta)`. ``DiagGGNExact`` computes
# :math:`h`, once it knows our layer.


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
            ext: The running extension (not needed).
            module: The layer; ``module.weight`` has shape ``[1]``.
            g_inp: Gradients with respect to the layer's inputs (not needed).
            g_out: Gradient with respect to the layer's output (not needed).
            V_out: Square root with respect to the layer's output, ``[C, N, *]``.

        Returns:
            Square root with respect to the layer's input, shape ``[C, N, *]``.
        """
        return module.weight * V_out


# %%
# Each backward pass gets a new extension object, with our module extension registered
# in it. One that is used again can pick up a V that an earlier pass left behind: V is
# kept by the memory address of the tensor that it belongs to, and a later tensor may
# get the same address.


def make_diag_ggn() -> DiagGGNExact:
    """Build a ``DiagGGNExact`` that supports ``ScaleModule``."""
    extension = DiagGGNExact()
    extension.set_module_extension(ScaleModule, ScaleModuleDiagGGNExact())
    return extension


# %%
# One backward pass of the loss gives the diagonal for all parameters.


def diag_ggn(loss_function: nn.Module, X: Tensor, y: Tensor) -> Tensor:
    """Return the GGN diagonal of the network, shape ``[p]``.

    Args:
        loss_function: Extended loss.
        X: Inputs, shape ``[N, D]``.
        y: Class indices, shape ``[N]``.
    """
    with backpack(make_diag_ggn()):
        loss_function(network(X), y).backward()
    return parameters_to_vector(p.diag_ggn_exact for p in network.parameters())


h = diag_ggn(loss_function, X_train, y_train)
print(f"p = {len(h)} curvatures, from {h.min():.1e} to {h.max():.1e}")

# %%
# ``parameters_to_vector`` flattens, and so hides a wrong shape. `BackPACK does not
# check shapes
# <../2_any_layer/5_contract_and_traps.html#nothing-checks-what-you-return>`_ either:
# the right shape differs between extensions, so it stores whatever our method returns.
# We check that each diagonal has the shape of its parameter.

for parameter in network.parameters():
    torch.testing.assert_close(parameter.diag_ggn_exact.shape, parameter.shape)

# %%
# Against autodiff
# ----------------
# This network is so small that we can afford the whole GGN. The witness is the
# definition above, with Jacobians from ``jacrev``. But ``torch.func`` fails on modules
# that carry BackPACK's hooks, because PyTorch runs such hooks with an
# ``autograd.Function``:

try:
    jacrev(network)(X_train[:1])
except RuntimeError as error:
    print(textwrap.shorten(f"RuntimeError: {error}", width=88))
else:
    raise RuntimeError("torch.func accepts the hooks. This page is out of date.")

# %%
# So ``torch.func`` gets a twin of the network that is not extended. The Hessian of
# cross-entropy is :math:`\nabla^2_f \ell_n = \operatorname{diag}(\pi_n) - \pi_n
# \pi_n^\top`, with the class probabilities :math:`\pi_n`.


def jacobians_by_autodiff(X: Tensor) -> Tensor:
    """Return the Jacobian of the logits for each sample, shape ``[N, C, p]``."""
    twin = make_network()
    twin.load_state_dict(network.state_dict())
    parameters = {name: p.detach() for name, p in twin.named_parameters()}

    def logits(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        """Return the logits of one sample, shape ``[C]``."""
        return functional_call(twin, parameters, x.unsqueeze(0)).squeeze(0)

    blocks = vmap(jacrev(logits), in_dims=(None, 0))(parameters, X)
    return torch.cat([block.flatten(start_dim=2) for block in blocks.values()], dim=2)


def full_ggn(X: Tensor) -> Tensor:
    """Return the GGN, summed over samples, shape ``[p, p]``."""
    J, pi = jacobians_by_autodiff(X), plain_predictive(X)
    loss_hessian = pi.diag_embed() - einsum(pi, pi, "n c, n k -> n c k")
    return einsum(J, loss_hessian, J, "n c i, n c k, n k j -> i j")


torch.testing.assert_close(h, full_ggn(X_train).diag())

# %%
# The diagonal is a sum of squares over the columns of V. It hides their signs and their
# order. So the V that ``backpropagate`` returns is also compared with VJPs directly.

scale = network[2]
X = torch.randn(5, H, dtype=torch.float64, device=device)
scale(X)  # as in a network, where a forward pass comes first
V_out = torch.randn(C, 5, H, dtype=torch.float64, device=device)
V_in = ScaleModuleDiagGGNExact().backpropagate(None, scale, None, None, V_out)

_, input_vjp = vjp(lambda X: scale.weight.detach() * X, X)
torch.testing.assert_close(V_in, vmap(input_vjp)(V_out)[0])

# %%
# Three traps
# -----------
# **Reduction.** With ``"mean"``, BackPACK computes the GGN of the mean loss, N times
# too small. If it is used as it is, the posterior is far too wide. Multiply by N, or
# use ``"sum"``.

mean_loss_function = extend(nn.CrossEntropyLoss(reduction="mean"))
h_mean = diag_ggn(mean_loss_function, X_train, y_train)
torch.testing.assert_close(len(X_train) * h_mean, h)

# %%
# **A factor on the loss.** A "tempered" likelihood multiplies the loss by a number.
# BackPACK starts from the loss module and does not see what comes after. It warns, and
# computes the GGN without the factor. Multiply ``h`` instead.

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with backpack(make_diag_ggn()):
        (0.5 * loss_function(network(X_train), y_train)).backward()

[message] = [str(w.message) for w in caught if "wrong second-order" in str(w.message)]
print(textwrap.fill(f"UserWarning: {message}", width=80))
ignored = parameters_to_vector(p.diag_ggn_exact for p in network.parameters())
torch.testing.assert_close(ignored, h)

# %%
# **Weight decay.** If you add the prior to the loss before you call ``backward``, as
# our training does, its curvature :math:`\delta` is left out, and this time there is no
# warning. (BackPACK warns if the gradient that arrives at the loss is not 1. Adding
# something does not change it.) That is as we want it here: we add :math:`\delta`
# ourselves, once. If you believe that h contains :math:`\delta` and do not add it, the
# posterior has no prior.

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with backpack(make_diag_ggn()):
        theta = parameters_to_vector(network.parameters())
        loss = loss_function(network(X_train), y_train)
        (loss + 0.5 * theta.square().sum()).backward()

if any("wrong second-order" in str(w.message) for w in caught):
    raise RuntimeError("BackPACK warned about weight decay. This page is out of date.")
ignored = parameters_to_vector(p.diag_ggn_exact for p in network.parameters())
torch.testing.assert_close(ignored, h)

# %%
# The prior precision
# -------------------
# So far :math:`\delta = 1` is arbitrary. The **marginal likelihood** (or evidence)
# :math:`p(\mathcal{D} \mid \delta) = \int p(\mathcal{D} \mid \theta) \, p(\theta \mid
# \delta) \, d\theta` says how well a prior explains the training labels, without any
# held-out data. Under the Laplace approximation the integrand is a Gaussian bump. The
# integral is its height, the joint density at :math:`\theta_*`, times the volume of a
# bump of height 1, :math:`(2 \pi)^{p/2} \det(\operatorname{diag}(h + \delta))^{-1/2}`.
# For a diagonal, the determinant is a product. The powers of :math:`2 \pi` from prior
# and volume cancel, and
#
# .. math::
#     \log p(\mathcal{D} \mid \delta) \approx
#     - \sum_n \ell_n - \frac{\delta}{2} \|\theta_*\|^2 + \frac{p}{2} \log \delta
#     - \frac{1}{2} \sum_{i=1}^{p} \log(h_i + \delta) \, .


def log_evidence(
    delta: Tensor, loss: Tensor, theta: Tensor, curvatures: Tensor
) -> Tensor:
    """Return the Laplace approximation of the log marginal likelihood.

    Args:
        delta: Prior precision, a scalar.
        loss: Loss at the trained parameters, summed over samples.
        theta: Trained parameters, shape ``[p]``.
        curvatures: Diagonal of the GGN, or its eigenvalues, shape ``[p]``.
    """
    log_joint = -loss - delta / 2 * theta.square().sum()
    log_determinants = len(theta) * delta.log() - (curvatures + delta).log().sum()
    return log_joint + log_determinants / 2


# %%
# The witness uses ``torch.distributions`` for the prior, with all its constants, and
# ``logdet`` for the volume of the bump.

delta = torch.tensor(0.7, dtype=torch.float64, device=device)  # any will do
with torch.no_grad():
    theta = parameters_to_vector(network.parameters())
    loss = loss_function(network(X_train), y_train)

prior = torch.distributions.Normal(0, delta.rsqrt())
precision = (h + delta).diag()
log_volume = len(h) / 2 * math.log(2 * math.pi) - torch.logdet(precision) / 2
expected = -loss + prior.log_prob(theta).sum() + log_volume
torch.testing.assert_close(log_evidence(delta, loss, theta, h), expected)

# %%
# Hold :math:`\theta_*` and :math:`h` fixed, and set the derivative with respect to
# :math:`\delta` to zero: :math:`- \|\theta_*\|^2 + p / \delta - \sum_i 1 / (h_i +
# \delta) = 0`. Multiplied by :math:`\delta`, and with :math:`1 - \delta / (h_i +
# \delta) = h_i / (h_i + \delta)`, this is a fixed-point equation (MacKay, 1992):
#
# .. math::
#     \delta = \frac{\gamma}{\|\theta_*\|^2} \, , \qquad
#     \gamma = \sum_{i=1}^{p} \frac{h_i}{h_i + \delta} \, .
#
# Each summand of :math:`\gamma` lies between 0 (the prior decides on parameter i) and 1
# (the data do): :math:`\gamma` is the **effective number of parameters**.


def best_prior_precision(
    delta: float | Tensor, theta: Tensor, curvatures: Tensor
) -> Tensor:
    """Iterate MacKay's fixed point, starting from ``delta``; return a scalar."""
    delta = torch.as_tensor(delta, dtype=theta.dtype, device=theta.device)
    for _ in range(200):
        gamma = (curvatures / (curvatures + delta)).sum()
        delta = gamma / theta.square().sum()
    return delta


# %%
# Where it ends, the derivative of the evidence is zero. That checks the formula.

delta = best_prior_precision(1.0, theta, h)
slope = jacrev(log_evidence)(delta, loss, theta, h)
torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-5)

# %%
# A new :math:`\delta` moves the maximum of the posterior, and with it :math:`h`. So we
# take turns: choose :math:`\delta`, train a little further, compute the curvature. (The
# evidence need not rise in each turn, as :math:`\delta` is chosen for the
# :math:`\theta_*` and :math:`h` of the turn before.)

delta = 1.0
for turn in range(5):
    delta = best_prior_precision(delta, theta, h)
    train(delta)
    h = diag_ggn(loss_function, X_train, y_train)
    with torch.no_grad():
        theta = parameters_to_vector(network.parameters())
        loss = loss_function(network(X_train), y_train)
    evidence = log_evidence(delta, loss, theta, h)
    print(f"turn {turn}: delta {delta:.3f}, log evidence {evidence:.1f}")

variances = 1 / (h + delta)
print(f"effective number of parameters: {(h * variances).sum():.0f} of {len(h)}")

# %%
# From here on the network stays as it is. Two checks before we go on. Laplace's method
# assumes a maximum of the posterior: there, the gradient of the loss and the pull of
# the prior cancel. L-BFGS stops near it, so the tolerance is 0.02. And as the
# parameters have changed, we repeat the comparison with autodiff.

gradient = torch.autograd.grad(
    loss_function(network(X_train), y_train), list(network.parameters())
)
gradient = parameters_to_vector(gradient)
torch.testing.assert_close(gradient, -delta * theta, rtol=0, atol=0.02)

G = full_ggn(X_train)
torch.testing.assert_close(h, G.diag())

# %%
# From parameters to predictions
# ------------------------------
# Uncertain parameters make uncertain outputs. We linearize the network around the
# trained parameters, :math:`f_\theta(x) \approx f_{\theta_*}(x) + \mathrm{J}(x) \,
# (\theta - \theta_*)`. This is the model that the GGN belongs to: the GGN of the
# network is the Hessian of the loss of the linearized one. So the Gaussian often
# predicts better with the linearized network than with the network itself (Immer et
# al., 2021). We will test that. The logits are then Gaussian, with covariance
#
# .. math::
#     \Sigma(x) = \mathrm{J}(x) \, \operatorname{diag}(h + \delta)^{-1} \,
#     \mathrm{J}(x)^\top \in \mathbb{R}^{C \times C} \, .
#
# The Jacobians are individual gradients: of one logit instead of a loss. So
# ``BatchGrad`` computes them, with the module extension from *Individual gradients*.


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
# A function builds a new ``BatchGrad``, as above. With ``subsampling``, only some
# samples are computed.


def make_batch_grad(subsampling: list[int] | None = None) -> BatchGrad:
    """Build a ``BatchGrad`` that supports ``ScaleModule``.

    Args:
        subsampling: Indices of the samples to compute. Default: all.
    """
    extension = BatchGrad(subsampling=subsampling)
    extension.set_module_extension(ScaleModule, ScaleModuleBatchGrad())
    return extension


# %%
# One backward pass for each of the C logits. We add the logit up over the batch, so
# that there is a scalar to call ``backward`` on; ``BatchGrad`` keeps the samples apart.
# There is no loss, and so no factor 1/N. (``BatchGrad`` needs no loss module; only V
# must begin at a loss module.)


def jacobians(X: Tensor, subsampling: list[int] | None = None) -> Tensor:
    """Return the Jacobian of the logits for the S samples asked for, ``[S, C, p]``.

    Args:
        X: Inputs, shape ``[N, D]``.
        subsampling: Indices of the samples to compute. Default: all.
    """
    rows = []
    for c in range(C):
        with backpack(make_batch_grad(subsampling)):
            network(X)[:, c].sum().backward()
        blocks = [p.grad_batch.flatten(start_dim=1) for p in network.parameters()]
        rows.append(torch.cat(blocks, dim=1))
    return torch.stack(rows, dim=1)


# %%
# ``jacrev`` gives the same, for all samples and for a subset. Flattening hides wrong
# shapes here, too, so we check them.

X = X_test[:7]
torch.testing.assert_close(jacobians(X), jacobians_by_autodiff(X))
torch.testing.assert_close(jacobians(X, [4, 0, 2]), jacobians_by_autodiff(X)[[4, 0, 2]])
print(f"Jacobians: {list(jacobians(X).shape)}")

for parameter in network.parameters():
    expected = (len(X), *parameter.shape)
    torch.testing.assert_close(tuple(parameter.grad_batch.shape), expected)

# %%
# The predictive of the approximation is the mean of the softmax over these Gaussian
# logits. There is a well-known shortcut, the probit approximation: divide each logit by
# :math:`\sqrt{1 + \pi \Sigma_{cc} / 8}` (here :math:`\pi` is the number), then take the
# softmax. For a softmax, with one logit for each class, it has a flaw. Suppose that the
# logits are uncertain only in a number that is added to all of them. Softmax does not
# depend on such a number. The shortcut still thinks that it matters.

f = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64, device=device)
shared_variance = 9.0 * torch.ones(C, C, dtype=torch.float64, device=device)
samples = f + 3.0 * torch.randn(500, 1, dtype=torch.float64, device=device)

by_samples = samples.softmax(1).mean(0)
by_short_cut = (f / (1 + math.pi / 8 * shared_variance.diag()).sqrt()).softmax(0)
torch.testing.assert_close(by_samples, f.softmax(0))
print(f"softmax {f.softmax(0)[0]:.3f}, samples {by_samples[0]:.3f}", end=", ")
print(f"shortcut {by_short_cut[0]:.3f}")

# %%
# So we draw logits at random, with the full :math:`C \times C` covariance. A draw needs
# no more than C random numbers for each input. All inputs share the same 500 standard
# normal vectors (their axis n has size 1), so that the picture below has no noise from
# point to point. Half of them are the negatives of the others, so that their mean is
# exactly zero.

normal = torch.randn(250, 1, C, dtype=torch.float64, device=device)
normal = torch.cat([normal, -normal])


def linearized_predictive(f: Tensor, covariance: Tensor) -> Tensor:
    """Return the mean softmax of Gaussian logits, shape ``[N, C]``.

    Args:
        f: Mean of the logits, shape ``[N, C]``.
        covariance: Covariance of the logits, shape ``[N, C, C]``.
    """
    root = torch.linalg.cholesky(covariance)  # one [C, C] matrix for each input
    logits = f + einsum(root, normal, "n c k, s n k -> s n c")
    return logits.softmax(-1).mean(0)


def diagonal_laplace(X: Tensor) -> Tensor:
    """Return the predictive of the diagonal Laplace approximation, ``[N, C]``."""
    J = jacobians(X)
    covariance = einsum(J, variances, J, "n c p, p, n k p -> n c k")
    return linearized_predictive(logits_of(X), covariance)


# %%
# A witness without a covariance: sample **parameters** from the Gaussian, and put them
# into the linearized network. Both are means over random samples, so they agree up to
# sampling noise: the tolerance is 0.05.

X = X_test[:50]
parameter_noise = variances.sqrt() * torch.randn(2000, len(h)).to(variances)
shifts = einsum(jacobians(X), parameter_noise, "n c p, s p -> s n c")
expected = (logits_of(X) + shifts).softmax(-1).mean(0)
torch.testing.assert_close(diagonal_laplace(X), expected, rtol=0, atol=0.05)

# %%
# With and without
# ----------------
# Confidence over the plane: the probability of the most probable class. The white lines
# are where it is 0.9.


def draw_confidence(ax: plt.Axes, name: str, predictive):
    """Draw the confidence of a predictive over the plane; return the filled areas."""
    side = torch.linspace(-6, 6, 60, dtype=torch.float64, device=device)
    confidence = predictive(torch.cartesian_prod(side, side)).amax(1)
    grid = side.cpu(), side.cpu(), confidence.reshape(60, 60).T.cpu()
    levels = torch.linspace(0.3, 1.0, 15).tolist()
    filled = ax.contourf(*grid, levels=levels, cmap="cividis")
    ax.contour(*grid, levels=[0.9], colors="white", linewidths=1.5)
    for c, marker in enumerate("os^"):
        points = X_train[y_train == c].cpu()
        style = {"s": 8, "color": f"C{c}", "edgecolors": "black", "linewidths": 0.3}
        ax.scatter(*points.T, marker=marker, **style)
    ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal", title=name)
    return filled


methods = {"Plain network": plain_predictive, "Diagonal Laplace": diagonal_laplace}
fig, axes = plt.subplots(1, 2, figsize=(8, 3.9), layout="constrained")
for ax, (name, predictive) in zip(axes, methods.items(), strict=True):
    filled = draw_confidence(ax, f"{name}: confidence", predictive)
fig.colorbar(filled, ax=axes, label="probability of the predicted class")
plt.show()

# %%
# The plain network is sure nearly everywhere. With Laplace, the borders between the
# classes widen as they leave the data. The reason: the logits grow with the distance,
# and so does their standard deviation. Going further does not make the network more
# sure.

for radius in [10.0, 100.0, 1000.0]:
    sure = [m(ring(radius)).amax(1).mean() for m in methods.values()]
    print(f"radius {radius:6.0f}: plain {sure[0]:.3f}, Laplace {sure[1]:.3f}")

# %%
# We check that the mean confidence at radius 10 is lower by at least 0.04, and that the
# accuracy on test data does not suffer by more than 0.01. (The limits leave room: the
# tests of this site run the page with other seeds, too.) We also print the NLL, the
# mean negative log-likelihood of the test labels, and the mean confidence on test data.


def report(name: str, predictive) -> tuple[float, float, float]:
    """Print a row; return test accuracy, test NLL and confidence at radius 10."""
    near, far = predictive(X_test), predictive(ring(10.0))
    accuracy = (near.argmax(1) == y_test).double().mean().item()
    loss = nn.functional.nll_loss(near.log(), y_test).item()
    sure_near, sure_far = near.amax(1).mean().item(), far.amax(1).mean().item()
    print(f"{name:<17} {accuracy:8.3f} {loss:7.3f} {sure_near:11.3f} {sure_far:10.3f}")
    return accuracy, loss, sure_far


header = f"{'':<17} {'accuracy':>8} {'NLL':>7} {'confidence':>11} {'at r = 10':>10}"
print(header)
plain_accuracy, _, plain_far = report("plain network", plain_predictive)
laplace_accuracy, laplace_nll, laplace_far = report(
    "diagonal Laplace", diagonal_laplace
)

torch.testing.assert_close(max(laplace_far - (plain_far - 0.04), 0.0), 0.0)
torch.testing.assert_close(max(plain_accuracy - 0.01 - laplace_accuracy, 0.0), 0.0)

# %%
# The NLL has grown: the caution has a price. Near the data, the confidence is now lower
# than the accuracy. Laplace's method helps where there are no data. The tool for
# calibration near the data is `temperature scaling <1_temperature_scaling.html>`_.
#
# What the diagonal loses
# -----------------------
# The full GGN knows which **combinations** of parameters the data pin down. The
# diagonal acts as if each parameter could vary on its own. We have the full GGN from
# the check above, so we can look at the difference. Only the covariance changes, to
# :math:`\mathrm{J} \, (G + \delta I)^{-1} \, \mathrm{J}^\top`. With the Cholesky factor
# R, where :math:`R R^\top = G + \delta I`, this is :math:`(R^{-1} \mathrm{J}^\top)^\top
# (R^{-1} \mathrm{J}^\top)`.

root = torch.linalg.cholesky(G + delta * torch.eye(len(h)).to(G))


def full_laplace(X: Tensor) -> Tensor:
    """Return the predictive of the full Laplace approximation, shape ``[N, C]``."""
    J = jacobians(X)
    half = torch.linalg.solve_triangular(root, J.mT, upper=False)
    return linearized_predictive(logits_of(X), half.mT @ half)


# %%
# A third way needs no Jacobian: sample parameters from the Gaussian of the diagonal, as
# above, and put them into the network as it is, not linearized.

twin = make_network()


@torch.no_grad()
def sampled_networks(X: Tensor) -> Tensor:
    """Return the mean softmax of 100 networks from the Gaussian, ``[N, C]``."""
    total = 0
    for noise in parameter_noise[:100]:
        vector_to_parameters(theta + noise, twin.parameters())
        total = total + twin(X).softmax(1)
    return total / 100


print(header)
report("plain network", plain_predictive)
report("diagonal Laplace", diagonal_laplace)
_, _, full_far = report("full Laplace", full_laplace)
_, sampled_nll, _ = report("not linearized", sampled_networks)

if not full_far < laplace_far:
    raise AssertionError("At radius 10, the full GGN is not less sure.")
if not laplace_nll < sampled_nll:
    raise AssertionError("Networks that are not linearized do not predict worse.")

# %%
# With the full GGN the network is less sure far away than with the diagonal. And the
# last row says why we linearized: the Gaussian of the diagonal, put into the network as
# it is, predicts the test labels worse. It reaches to where the linearization does not
# hold.
#
# In the next figure, the left panel follows the mean confidence from the center
# outward. With the full GGN it falls from where the data end. With the diagonal it does
# not fall in this way, although it is lower than the plain network's at all distances.
# The right panel shows the full GGN, in the colors of the figure above. Away from the
# data, the network is less sure with it than with the diagonal, over much of the plane.

radii = torch.linspace(0.2, 12, 30).tolist()
rings = torch.cat([ring(radius) for radius in radii])
curves = {**methods, "Full Laplace": full_laplace}

fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.9), layout="constrained")
confidence = {}
for (name, predictive), style in zip(curves.items(), ["-", "--", "-."], strict=True):
    confidence[name] = predictive(rings).amax(1).reshape(len(radii), -1).mean(1)
    left.plot(radii, confidence[name].cpu(), style, label=name)
nearest, farthest = X_train.norm(dim=1).cpu().aminmax()
left.axvspan(nearest, farthest, color="0.9", label="training data")
left.set(xlabel="distance from the center", ylabel="mean confidence", ylim=(0.5, 1))
left.set_title("Confidence and distance")
left.legend(loc="lower right")
draw_confidence(right, "Full Laplace: confidence", full_laplace)
plt.show()

if not (confidence["Diagonal Laplace"] < confidence["Plain network"]).all():
    raise AssertionError("The diagonal is surer than the plain network somewhere.")

# %%
# The evidence, too, shows what the diagonal loses. Its log determinant can take the
# eigenvalues of :math:`G` in the place of :math:`h`. The determinant of a positive
# definite matrix is at most the product of its diagonal (Hadamard's inequality). So the
# diagonal **never** gives more evidence than the full GGN, whatever :math:`\delta`. We
# check it at 80 values.

eigenvalues = torch.linalg.eigvalsh(G).clamp(min=0)
deltas = torch.logspace(-2, 1, 80, dtype=torch.float64, device=device)
spectra = {"diagonal GGN": h, "full GGN": eigenvalues}
evidence = {
    name: torch.stack([log_evidence(d, loss, theta, spectrum) for d in deltas])
    for name, spectrum in spectra.items()
}

gap = evidence["full GGN"] - evidence["diagonal GGN"]
torch.testing.assert_close(gap, gap.clamp(min=0))

# %%
# The two do not agree on the prior, or on how many parameters the data decide. (For
# these curves the network stays where it is.)

fig, ax = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
for (name, spectrum), color in zip(spectra.items(), ["C1", "C2"], strict=True):
    best = best_prior_precision(delta, theta, spectrum)
    gamma = (spectrum / (spectrum + best)).sum()
    top = log_evidence(best, loss, theta, spectrum)
    print(f"{name:>12}: delta {best:5.2f}, effective parameters {gamma:4.1f}", end=", ")
    print(f"log evidence {top:6.1f}")
    ax.plot(deltas.cpu(), evidence[name].cpu(), color=color, label=name)
    ax.plot(best.item(), top.item(), "o", color=color)
ax.set_xscale("log")
ax.set_xlabel(r"prior precision $\delta$")
ax.set_ylabel("log evidence")
ax.set_title("Marginal likelihood, and the prior that maximizes it")
ax.legend()
plt.show()

# %%
# So take the diagonal for what it is. The posterior costs one backward pass and p
# numbers (predictions take C more passes for each batch), it lowers the confidence far
# away, and its evidence gives a prior without a validation set. It does not tell well
# where the data are, and its evidence is too low. If you can afford more, keep more of
# the matrix: a Kronecker product for each layer, or the full GGN of the last layer
# alone.
#
# What was verified
# -----------------
# The GGN diagonal agrees with the diagonal of the full GGN from ``jacrev``, before and
# after the choice of the prior, and ``backpropagate`` with a VJP. The Jacobians from
# ``BatchGrad`` agree with ``jacrev``, for all samples and a subset. ``mean`` is N times
# too small; a factor on the loss and weight decay do not enter the diagonal. What
# BackPACK saves has the shapes of the parameters, ``grad_batch`` behind a batch axis.
# The evidence agrees with ``torch.distributions`` and ``logdet``, and its slope is zero
# at the fixed point. The linearized predictive of the diagonal agrees with samples of
# parameters, up to the stated tolerance. At radius 10 its mean confidence is lower than
# the plain network's by at least 0.04, and that of the full GGN is lower still. The
# accuracy of the diagonal on test data falls by no more than 0.01. Networks sampled
# from the same Gaussian, not linearized, have a higher NLL.
#
# **Next:** `What it costs <3_cost.html>`_ measures time and memory.
#
# Laplace approximation: D. J. C. MacKay, "A Practical Bayesian Framework for
# Backpropagation Networks", Neural Computation 4(3), 1992; E. Daxberger et al.,
# "Laplace Redux – Effortless Bayesian Deep Learning", NeurIPS 2021, `arXiv:2106.14806
# <https://arxiv.org/abs/2106.14806>`_. Linearized predictive: A. Immer, M. Korzepa, M.
# Bauer, "Improving predictions of Bayesian neural nets via local linearization",
# AISTATS 2021, `arXiv:2008.08400 <https://arxiv.org/abs/2008.08400>`_. BackPACK: F.
# Dangel, F. Kunstner, P. Hennig, "BackPACK: Packing more into Backprop", ICLR 2020,
# `arXiv:1912.10985 <https://arxiv.org/abs/1912.10985>`_.
