r"""
A custom loss
=============

After this page you can compute GGN diagonals for a loss that BackPACK does not know,
given that the loss is convex in the network's output.

We will:

1. write a loss for robust regression, and see which losses BackPACK knows;
2. derive its Hessian and a square root S of it, and evaluate both;
3. write and register the loss extension, which has to return S;
4. check the GGN diagonal of a network that holds the scale module;
5. give each sample a weight of its own;
6. let automatic differentiation find S, for losses without a formula;
7. take a loss that is not convex, and see what breaks.

You should know how V goes through a network:
`The GGN and its diagonal, derived <../1_scale_module/3_ggn_derivation.html>`_ and
`The GGN diagonal, backpropagated <../1_scale_module/4_ggn_diagonal.html>`_. The
letters: N samples, D features, C entries of the network's output for each sample; r is
the residual. S and V have their columns along the first axis, so S has shape
``[C, N, C]``: column, sample, entry.
"""

import math

import matplotlib.pyplot as plt
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad, DiagGGNExact
from backpack.extensions.firstorder.base import FirstOrderModuleExtension
from backpack.extensions.module_extension import ModuleExtension
from backpack.utils.subsampling import subsample
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.modules.loss import _Loss

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# %%
# The loss
# --------
# A network predicts a vector :math:`f`, say a position, and the target is :math:`y`.
# Half the squared distance is a common loss, but a single far-off target then pulls at
# the network with a force that grows with its distance. The **pseudo-Huber loss** is
# quadratic near the target and linear far from it:
#
# .. math::
#     \ell(f) = \delta^2 (s - 1) , \qquad
#     s = \sqrt{1 + \frac{\lVert r \rVert^2}{\delta^2}} , \qquad
#     r = f - y .
#
# The number :math:`\delta` says how far "near" reaches. We choose this loss for two
# reasons: its Hessian couples all entries of the output, and depends on the target. For
# the square loss neither is the case.
#
# For second order, a loss must inherit from ``_Loss``, the base class of PyTorch's
# losses. We will see why.


class PseudoHuberLoss(_Loss):
    """Pseudo-Huber loss of the distance between output and target."""

    def __init__(self, delta: float = 1.0, reduction: str = "mean"):
        """Store the settings of the loss.

        Args:
            delta: Distance at which the loss turns from quadratic to linear.
            reduction: ``"mean"`` or ``"sum"`` over samples. Default: ``"mean"``.
        """
        super().__init__(reduction=reduction)
        self.delta = delta

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            output: The network's output, shape ``[N, C]``.
            target: The targets, shape ``[N, C]``.

        Returns:
            The loss, a scalar.
        """
        return self.reduce(self.delta**2 * (self.compute_s(output - target) - 1))

    def compute_s(self, R: Tensor) -> Tensor:
        """Compute s for residuals ``R`` of shape ``[N, C]``; shape ``[N]``."""
        return (1 + R.square().sum(-1) / self.delta**2).sqrt()

    def reduce(self, losses: Tensor) -> Tensor:
        """Reduce the losses of the samples, shape ``[N]``, to a scalar."""
        return {"mean": losses.mean, "sum": losses.sum}[self.reduction]()


# %%
# Which losses does BackPACK know? We ask it about six. Each loss gets an output and a
# target of shape ``[N, 1]``, or class indices.

N, D, C = 6, 5, 3
delta = 0.7

for loss_class in [
    nn.MSELoss,
    nn.CrossEntropyLoss,
    nn.BCEWithLogitsLoss,
    nn.HuberLoss,
    nn.PoissonNLLLoss,
    PseudoHuberLoss,
]:
    prediction = extend(nn.Linear(D, 1).to(device))(torch.randn(N, D, device=device))
    label = torch.zeros(N, 1, device=device)
    label = label.flatten().long() if loss_class is nn.CrossEntropyLoss else label
    try:
        with backpack(DiagGGNExact()):
            extend(loss_class())(prediction, label).backward()
        print(f"{loss_class.__name__}: known")
    except NotImplementedError as error:
        print(f"{loss_class.__name__}: {error}")

# %%
# Of these six it knows three.
#
# First order needs nothing
# -------------------------
# Individual gradients need no help from the loss: PyTorch brings the gradient to the
# network's output, and from there on the layers work. The network will hold the scale
# module from Part 1.


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
        """Scale ``X`` of shape ``[N, *]``; the result has the same shape."""
        return self.weight * X


# %%
# These are its module extensions, also from Part 1. The second is for later.


class ScaleModuleBatchGrad(FirstOrderModuleExtension):
    """Compute individual gradients for ``ScaleModule``."""

    def __init__(self):
        """Name the parameters for which this class has a method."""
        super().__init__(params=["weight"])

    def weight(self, ext, module, g_inp, g_out, bp) -> Tensor:
        """Compute the individual gradients of ``module.weight``, shape ``[N, 1]``."""
        subset = ext.get_subsampling()
        X = subsample(module.input0, subsampling=subset)
        grad_Z = subsample(g_out[0], subsampling=subset)
        return einsum(grad_Z, X, "n ..., n ... -> n").unsqueeze(-1)


class ScaleModuleDiagGGNExact(ModuleExtension):
    """Compute the exact GGN diagonal of ``ScaleModule``, and send V through it."""

    def __init__(self):
        """Name the parameters for which this class has a method."""
        super().__init__(params=["weight"])

    def weight(self, ext, module, g_inp, g_out, V_out: Tensor) -> Tensor:
        """Compute the GGN diagonal of ``module.weight``, shape ``[1]``."""
        V_w = einsum(module.input0, V_out, "n ..., c n ... -> c n")
        return V_w.square().sum().reshape(1)

    def backpropagate(self, ext, module, g_inp, g_out, V_out: Tensor) -> Tensor:
        """Return V with respect to the layer's input, shape ``[C, N, *]``."""
        return module.weight * V_out


# %%
# The loss is not even extended here. A loop over samples confirms the result.


def make_batch_grad(subsampling: list[int] | None = None) -> BatchGrad:
    """Build a ``BatchGrad`` that supports ``ScaleModule``.

    Args:
        subsampling: Indices of the samples to compute. Default: all.
    """
    extension = BatchGrad(subsampling=subsampling)
    extension.set_module_extension(ScaleModule, ScaleModuleBatchGrad())
    return extension


X = torch.randn(N, D, dtype=torch.float64, device=device)
Y = 2 * torch.randn(N, C, dtype=torch.float64, device=device)
model = nn.Sequential(ScaleModule(), nn.Linear(D, C)).to(device, torch.float64)
model, loss_function = extend(model), PseudoHuberLoss(delta, "sum")

for subset in [list(range(N)), [4, 0, 2]]:
    with backpack(make_batch_grad(subset)):
        loss_function(model(X), Y).backward()
    losses = [loss_function(model(X[[n]]), Y[[n]]) for n in subset]
    by_loop = [torch.autograd.grad(loss, model[0].weight)[0] for loss in losses]
    torch.testing.assert_close(model[0].weight.grad_batch, torch.stack(by_loop))
print("BatchGrad: all agree")

# %%
# The Hessian
# -----------
# For the GGN, V must begin somewhere: at the loss, with a square root S of its Hessian.
# With :math:`\partial s / \partial f = r / (\delta^2 s)`, the loss has the gradient and
# the Hessian
#
# .. math::
#     \nabla_f \ell = \frac{r}{s} , \qquad
#     \nabla_f^2 \ell = \frac{1}{s} \left( I - \frac{r r^\top}{\delta^2 s^2} \right) .
#
# The first sample gets a residual of zero here, a place where a formula that divides by
# :math:`\lVert r \rVert` would fail. ``vmap`` hands the loss one sample at a time, of
# shape ``[C]``.

output = torch.randn(N, C, dtype=torch.float64, device=device)
target = 2 * torch.randn(N, C, dtype=torch.float64, device=device)
target[0] = output[0]

R = output - target
s = loss_function.compute_s(R)
outer = einsum(R, R, "n i, n j -> n i j")
identity = torch.eye(C, dtype=torch.float64, device=device)
H = (identity - outer / (delta * s).square().reshape(N, 1, 1)) / s.reshape(N, 1, 1)

H_by_autodiff = vmap(jacrev(jacrev(loss_function)))(output, target)
torch.testing.assert_close(H, H_by_autodiff)

# %%
# What are its eigenvalues? Orthogonal to :math:`r` the second term vanishes, which
# leaves :math:`1/s`. Along :math:`r`, with :math:`\lVert r \rVert^2 = \delta^2 (s^2 -
# 1)`, the eigenvalue is :math:`1/s^3`. All are positive, so the loss is convex in
# :math:`f` and a real square root exists. As :math:`s \geq 1`, the eigenvalue along
# :math:`r` is the smallest. ``eigvalsh`` sorts in ascending order, so it comes first.

eigenvalues = torch.linalg.eigvalsh(H)
torch.testing.assert_close(eigenvalues[:, 0], s**-3)
torch.testing.assert_close(eigenvalues[:, 1:], (1 / s).unsqueeze(1).expand(N, C - 1))

# %%
# The square root
# ---------------
# We look for S with :math:`S S^\top = \nabla_f^2 \ell`. A matrix with the same
# eigenvectors and the square roots of the eigenvalues works: :math:`s^{-1/2}`
# orthogonal to :math:`r`, and :math:`s^{-3/2}` along it. With :math:`\lVert r \rVert^2
# = \delta^2 (s - 1)(s + 1)` the norm drops out:
#
# .. math::
#     S = \frac{1}{\sqrt{s}} \left(
#     I - \Bigl(1 - \frac{1}{s}\Bigr) \frac{r r^\top}{\lVert r \rVert^2} \right)
#     = \frac{1}{\sqrt{s}} \left( I - \frac{r r^\top}{\delta^2 s (s + 1)} \right) .

denominator = (delta**2 * s * (s + 1)).reshape(N, 1, 1)
S = (identity - outer / denominator) / s.sqrt().reshape(N, 1, 1)  # as H: [N, C, C]
torch.testing.assert_close(S @ S.mT, H)

# %%
# The figure shows what S does for C = 2. At each residual it draws the image of a
# circle under S. Near the target all directions have the same curvature. Far from it
# there is little left, and least along the residual: there the loss is nearly linear.

angles = torch.linspace(0, 2 * math.pi, 60)
circle = torch.stack([angles.cos(), angles.sin()])
ticks = torch.linspace(-2.4, 2.4, 7)
grid = torch.cartesian_prod(ticks, ticks)
fine = torch.linspace(-3, 3, 80)
plane = torch.cartesian_prod(fine, fine)
unit_loss = PseudoHuberLoss(1.0)

fig, ax = plt.subplots(figsize=(5.4, 4.6), layout="constrained")
heights = (unit_loss.compute_s(plane) - 1).reshape(80, 80)
contours = ax.contourf(fine.tolist(), fine.tolist(), heights.T.tolist(), cmap="cividis")
fig.colorbar(contours, label=r"loss for $\delta = 1$")
for residual in grid:
    size = unit_loss.compute_s(residual)
    projection = torch.outer(residual, residual) / (size * (size + 1))
    image = (torch.eye(2) - projection) / size.sqrt() @ circle
    ellipse = residual.unsqueeze(1) + 0.35 * image
    ax.plot(*ellipse.tolist(), color="white")
ax.set(xlabel="residual, entry 1", ylabel="residual, entry 2", aspect="equal")
ax.set_title("The image of a circle under S, at each residual")
plt.show()

# %%
# The extension
# -------------
# The loss is the first module that the backward pass reaches. Nothing has been
# backpropagated yet, so ``V_out`` is ``None``, and ``backpropagate`` returns S. The
# loss has no ``nn.Parameter``, so the class needs no other method, and no ``__init__``.
# Output and target are the two inputs of the loss module: ``module.input0`` and
# ``module.input1``.
#
# With ``"mean"`` the loss is divided by N, and so is its Hessian. S gets the square
# root of the factor, :math:`1/\sqrt{N}`.


class PseudoHuberLossDiagGGNExact(ModuleExtension):
    """Start the backpropagation of V at a ``PseudoHuberLoss``."""

    def backpropagate(
        self,
        ext: DiagGGNExact,
        module: PseudoHuberLoss,
        g_inp: tuple[Tensor | None, ...],
        g_out: tuple[Tensor],
        V_out: None,
    ) -> Tensor:
        """Compute the square root S of the Hessian.

        Args:
            ext: The running extension (not needed).
            module: The loss; ``module.input0`` and ``module.input1`` have shape
                ``[N, C]``.
            g_inp: Gradients with respect to the inputs (not needed).
            g_out: Gradient with respect to the loss (not needed).
            V_out: ``None``: V begins here.

        Returns:
            S, shape ``[C, N, C]``: column, sample, entry of the output.
        """
        R = module.input0 - module.input1
        N, C = R.shape
        s = module.compute_s(R).reshape(N, 1)
        outer = einsum(R, R, "n k, n c -> k n c")
        identity = torch.eye(C, dtype=R.dtype, device=R.device).unsqueeze(1)
        S = (identity - outer / (module.delta**2 * s * (s + 1))) / s.sqrt()
        return S / math.sqrt(N) if module.reduction == "mean" else S


# %%
# It is registered like any module extension, beside the one for the layer.


def make_diag_ggn(
    loss_class: type[nn.Module] = PseudoHuberLoss,
    loss_extension_class: type[ModuleExtension] = PseudoHuberLossDiagGGNExact,
) -> DiagGGNExact:
    """Build a ``DiagGGNExact`` that supports ``ScaleModule`` and a loss.

    Args:
        loss_class: Class of the loss.
        loss_extension_class: What to register for it.
    """
    extension = DiagGGNExact()
    extension.set_module_extension(ScaleModule, ScaleModuleDiagGGNExact())
    extension.set_module_extension(loss_class, loss_extension_class())
    return extension


# %%
# Check S alone
# -------------
# The module extension can be called by hand, after a forward pass of the extended loss.
# In :math:`S S^\top` the sum runs over the columns, the first axis. To compare S
# itself, and not only its square, we use that ours is the *principal* root: symmetric,
# without negative eigenvalues. There is one such root, and an eigendecomposition finds
# it. (For the GGN, another root, such as :math:`-S`, would do as well, see below. Our
# formula was derived as this one, so we check that it is.)


def principal_root(H: Tensor) -> Tensor:
    """Return the symmetric root without negative eigenvalues, ``[N, C, C]``."""
    eigenvalues, U = torch.linalg.eigh(H)
    return einsum(U, eigenvalues.sqrt(), U, "n i k, n k, n j k -> n i j")


for reduction, factor in {"mean": 1 / N, "sum": 1.0}.items():
    loss_function = extend(PseudoHuberLoss(delta, reduction))
    loss_function(output, target)
    module_extension = PseudoHuberLossDiagGGNExact()
    S_returned = module_extension.backpropagate(None, loss_function, None, None, None)

    square = einsum(S_returned, S_returned, "k n i, k n j -> n i j")
    torch.testing.assert_close(square, factor * H_by_autodiff)
    expected = rearrange(principal_root(factor * H_by_autodiff), "n c k -> k n c")
    torch.testing.assert_close(S_returned, expected)
    print(f"{reduction:>4}: S has shape {list(S_returned.shape)}")

# %%
# Check the GGN diagonal
# ----------------------
# Now a whole network. The witness writes down :math:`\mathrm{J}^\top \mathrm{H} \,
# \mathrm{J}` of one sample, with the Jacobian J of the network and the Hessian H of the
# loss from ``torch.func``. It knows no square root.


def ggn_diagonal_of_sample(
    model: nn.Module, loss_function: nn.Module, x: Tensor, *loss_inputs: Tensor
) -> dict[str, Tensor]:
    """Compute the diagonal of the GGN of one sample's own loss.

    Args:
        model: The network, not extended.
        loss_function: The loss, not extended.
        x: One sample as a batch, shape ``[1, D]``.
        loss_inputs: Its target, and its weight where the loss takes one.

    Returns:
        For each parameter its diagonal, same shape as the parameter.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    output = functional_call(model, parameters, x)
    C = output.numel()
    H = jacrev(jacrev(lambda f: loss_function(f, *loss_inputs)))(output)
    J = jacrev(lambda p: functional_call(model, p, x).reshape(C))(parameters)
    H = H.reshape(C, C)
    return {k: einsum(j, H, j, "c ..., c k, k ... -> ...") for k, j in J.items()}


# %%
# The function that compares returns both results, for a look at them further down.


def compare(
    model: nn.Module,
    loss_function: nn.Module,
    loss_extension_class: type[ModuleExtension],
    *loss_inputs: Tensor,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute the GGN diagonal on the inputs ``X``, with BackPACK and by the witness.

    Args:
        model: The network, not extended.
        loss_function: The loss, not extended.
        loss_extension_class: What to register for the loss.
        loss_inputs: Targets, and weights where the loss takes them; first axis N.

    Returns:
        For each parameter its diagonal, by BackPACK and by the witness.
    """
    factor = {"mean": 1 / N, "sum": 1.0}[loss_function.reduction]
    by_witness = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(N):
        sample = [tensor[[n]] for tensor in (X, *loss_inputs)]
        diagonal = ggn_diagonal_of_sample(model, loss_function, *sample)
        by_witness = {k: v + factor * diagonal[k] for k, v in by_witness.items()}

    model, loss_function = extend(model), extend(loss_function)
    with backpack(make_diag_ggn(type(loss_function), loss_extension_class)):
        loss_function(model(X), *loss_inputs).backward()
    by_backpack = {name: p.diag_ggn_exact for name, p in model.named_parameters()}
    return by_backpack, by_witness


# %%
# The scale module stands first, in the middle, and last, where it gets S without
# anything in between.


def make_network(place: str) -> nn.Sequential:
    """Build a network that maps ``[N, D]`` to ``[N, C]``.

    Args:
        place: Where the scale module stands: ``"first"``, ``"middle"``, ``"last"``.
    """
    layers = [nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C)]
    layers.insert({"first": 0, "middle": 1, "last": 3}[place], ScaleModule())
    return nn.Sequential(*layers).to(device, torch.float64)


for place in ["first", "middle", "last"]:
    for reduction in ["mean", "sum"]:
        loss_function = PseudoHuberLoss(delta, reduction)
        by_backpack, by_witness = compare(
            make_network(place), loss_function, PseudoHuberLossDiagGGNExact, Y
        )
        torch.testing.assert_close(by_backpack, by_witness)
        print(f"{place:>6}  {reduction:>4}: all parameters agree")

# %%
# Squares hide a sign. What the scale module makes of V is therefore compared by itself,
# sign included, as S was above:

layer = extend(ScaleModule(2.0).to(device, torch.float64))
layer(X)
V_out = torch.randn(C, N, D, dtype=torch.float64, device=device)
V_in = ScaleModuleDiagGGNExact().backpropagate(None, layer, None, None, V_out)
torch.testing.assert_close(V_in, 2.0 * V_out)
print("sign: agrees")

# %%
# Which root, and which axis?
# ---------------------------
# Must S be the principal root? No: the GGN only sees :math:`S S^\top`, and for any
# orthogonal Q, :math:`S Q (S Q)^\top = S S^\top`. The Cholesky factor is such a root,
# lower triangular. Unlike S so far it is not symmetric, so it also shows which axis
# BackPACK takes for the columns: the first.


class CholeskyDiagGGNExact(PseudoHuberLossDiagGGNExact):
    """Start V at a ``PseudoHuberLoss`` with the Cholesky factor of the Hessian."""

    axes = "n c k -> k n c"

    def backpropagate(self, ext, module, g_inp, g_out, V_out: None) -> Tensor:
        """Compute the Cholesky factor, shape ``[C, N, C]``, the columns first."""
        S = super().backpropagate(ext, module, g_inp, g_out, V_out)
        H = einsum(S, S, "k n i, k n j -> n i j")
        return rearrange(torch.linalg.cholesky(H), self.axes)


class WrongSwappedAxesDiagGGNExact(CholeskyDiagGGNExact):
    """Wrong on purpose: has the columns last, and the entries first."""

    axes = "n c k -> c n k"


# %%
# The right one agrees, alone and in a network.

loss_function = extend(PseudoHuberLoss(delta, "sum"))
loss_function(output, target)
S_cholesky = CholeskyDiagGGNExact().backpropagate(None, loss_function, None, None, None)
expected = torch.linalg.cholesky(H)
torch.testing.assert_close(rearrange(S_cholesky, "k n c -> n c k"), expected)

model, loss_function = make_network("middle"), PseudoHuberLoss(delta)
results = compare(model, loss_function, CholeskyDiagGGNExact, Y)
torch.testing.assert_close(*results)
print("Columns first: all parameters agree")

# %%
# With swapped axes it does not.

model, loss_function = make_network("middle"), PseudoHuberLoss(delta)
results = compare(model, loss_function, WrongSwappedAxesDiagGGNExact, Y)
try:
    torch.testing.assert_close(*results)
except AssertionError as error:
    print(f"Axes swapped: {error}")
else:
    raise RuntimeError("The wrong order of axes was not noticed.")

# %%
# Why the base class matters
# --------------------------
# BackPACK lets only subclasses of ``_Loss`` start without a V. Another module raises an
# error. This loss takes all that it has from ours, but it is not a ``_Loss``.


class WrongBaseLoss(nn.Module):
    """Wrong on purpose: a pseudo-Huber loss that does not inherit from ``_Loss``."""

    reduction = "mean"
    delta = delta  # the one chosen above
    compute_s = PseudoHuberLoss.compute_s
    reduce = PseudoHuberLoss.reduce
    forward = PseudoHuberLoss.forward


try:
    compare(make_network("middle"), WrongBaseLoss(), PseudoHuberLossDiagGGNExact, Y)
except AssertionError as error:
    message = str(error).split(", Extension:")[0]  # the rest is an address in memory
    print(f"AssertionError: {message}")
else:
    raise RuntimeError("BackPACK accepts any loss class. This page is out of date.")

# %%
# A weight for each sample
# ------------------------
# Samples are often weighted, or masked by a weight of zero. Such a factor belongs
# inside the loss module: BackPACK starts there and does not see what comes after it
# (see `The contract, and what breaks it <5_contract_and_traps.html>`__). A factor
# :math:`a_n \geq 0` of the loss is a factor :math:`\sqrt{a_n}` of S. The weights are
# the third input of the loss, ``module.input2``. With ``"mean"`` this loss divides by
# N. (``nn.CrossEntropyLoss`` with class weights divides by the sum of the weights.)
# Loss and extension are subclasses, and as lookup is by exact class, they are
# registered as a pair of their own.


class WeightedPseudoHuberLoss(PseudoHuberLoss):
    """``PseudoHuberLoss`` with a weight for each sample."""

    def forward(self, output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """Compute the loss; ``weight`` has shape ``[N]``, the others ``[N, C]``."""
        s = self.compute_s(output - target)
        return self.reduce(weight * self.delta**2 * (s - 1))


class WeightedPseudoHuberLossDiagGGNExact(PseudoHuberLossDiagGGNExact):
    """Start the backpropagation of V at a ``WeightedPseudoHuberLoss``."""

    def backpropagate(self, ext, module, g_inp, g_out, V_out: None) -> Tensor:
        """Compute the square root S of the weighted Hessian, shape ``[C, N, C]``."""
        S = super().backpropagate(ext, module, g_inp, g_out, V_out)
        return S * module.input2.sqrt().unsqueeze(-1)


# %%
# One weight is zero, which masks the sample.

weights = torch.rand(N, dtype=torch.float64, device=device)
weights[1] = 0.0

for reduction in ["mean", "sum"]:
    loss_function = WeightedPseudoHuberLoss(delta, reduction)
    by_backpack, by_witness = compare(
        make_network("middle"),
        loss_function,
        WeightedPseudoHuberLossDiagGGNExact,
        Y,
        weights,
    )
    torch.testing.assert_close(by_backpack, by_witness)
    print(f"{reduction:>4}: all parameters agree")

# %%
# And S itself, with its sign, against the principal root:

loss_function = extend(WeightedPseudoHuberLoss(delta, "sum"))
loss_function(output, target, weights)
module_extension = WeightedPseudoHuberLossDiagGGNExact()
S_weighted = module_extension.backpropagate(None, loss_function, None, None, None)

expected = weights.sqrt().reshape(N, 1, 1) * principal_root(H)
torch.testing.assert_close(S_weighted, rearrange(expected, "n c k -> k n c"))

# %%
# A loss without a formula
# ------------------------
# If you have no closed form for S, let ``torch.func`` compute the Hessian of each
# sample's loss, a small ``[C, C]`` matrix, and take its principal root. This costs
# more. The class below is made for convex losses of an output ``[N, C]`` and a target,
# that treat samples separately and that ``torch.func`` can differentiate. With
# ``"mean"``, the loss of a batch must be the mean of the losses of its samples, each
# taken as a batch of one. ``module.forward`` goes around BackPACK's hooks, because
# ``torch.func`` cannot run through them.
#
# Rounding can turn an eigenvalue of zero into a small negative number. So the class
# accepts, in each sample, negative eigenvalues up to ``1e-6`` of the largest, and sets
# them to zero.


class ConvexLossDiagGGNExact(ModuleExtension):
    """Start the backpropagation of V at any convex loss, by autodiff."""

    def backpropagate(self, ext, module, g_inp, g_out, V_out: None) -> Tensor:
        """Compute the principal root S of the Hessian, shape ``[C, N, C]``.

        Raises:
            ValueError: If an eigenvalue of a Hessian is negative beyond rounding.
        """

        def loss_of_sample(output: Tensor, target: Tensor) -> Tensor:
            """Return the loss of one sample, ``[C]`` each, as a batch of one."""
            return module.forward(output.unsqueeze(0), target.unsqueeze(0))

        hessians = vmap(jacrev(jacrev(loss_of_sample)))
        H = hessians(module.input0, module.input1)
        H = H / len(H) if module.reduction == "mean" else H
        eigenvalues, U = torch.linalg.eigh(H)
        if (eigenvalues[:, 0] < -1e-6 * eigenvalues.abs().amax(-1)).any():
            raise ValueError(f"Not convex: eigenvalue {eigenvalues.min().item():.4f}")
        return einsum(U, eigenvalues.clamp(0).sqrt(), U, "n i k, n k, n j k -> j n i")


# %%
# It agrees with the closed form. And it makes BackPACK support ``nn.PoissonNLLLoss``, a
# loss for counts, which was unknown in the list above.

loss_function = extend(PseudoHuberLoss(delta, "mean"))
loss_function(output, target)
S_by_formula, S_by_autodiff = (
    extension.backpropagate(None, loss_function, None, None, None)
    for extension in [PseudoHuberLossDiagGGNExact(), ConvexLossDiagGGNExact()]
)
torch.testing.assert_close(S_by_autodiff, S_by_formula)

counts = torch.randint(0, 5, (N, C), device=device).to(torch.float64)
for loss_class, targets in {PseudoHuberLoss: Y, nn.PoissonNLLLoss: counts}.items():
    for reduction in ["mean", "sum"]:
        loss_function = loss_class(reduction=reduction)
        by_backpack, by_witness = compare(
            make_network("middle"), loss_function, ConvexLossDiagGGNExact, targets
        )
        torch.testing.assert_close(by_backpack, by_witness)
        print(f"{loss_class.__name__:>15}  {reduction:>4}: all parameters agree")

# %%
# Without convexity
# -----------------
# The **Cauchy loss** goes one step further in robustness: far from the target the force
# fades to nothing. The loss and its Hessian, derived as above, are
#
# .. math::
#     \ell(f) = \delta^2 \log s , \qquad
#     \nabla_f^2 \ell
#     = \frac{1}{s^2} \left( I - \frac{2 \, r r^\top}{\delta^2 s^2} \right) .
#
# Along :math:`r` the eigenvalue is :math:`(2 - s^2) / s^4`. It is negative if
# :math:`s^2 > 2`, which is to say :math:`\lVert r \rVert > \delta`.


class CauchyLoss(PseudoHuberLoss):
    """Cauchy loss of the distance between output and target; not convex."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Compute the loss, a scalar, for two tensors of shape ``[N, C]``."""
        return self.reduce(self.delta**2 * self.compute_s(output - target).log())


# %%
# We evaluate it at the residuals from above. The first of them is zero and has no
# direction, so it is left out of the second comparison.

H_cauchy = vmap(jacrev(jacrev(CauchyLoss(delta, "sum"))))(output, target)
second_term = 2 * outer / (delta * s).square().reshape(N, 1, 1)
by_formula = (identity - second_term) / s.square().reshape(N, 1, 1)
torch.testing.assert_close(by_formula, H_cauchy)

along = einsum(R, H_cauchy, R, "n c, n c k, n k -> n") / R.square().sum(-1)
torch.testing.assert_close(along[1:], ((2 - s**2) / s**4)[1:])

# %%
# The picture shows both losses along a line through the target, and their curvature.

t = torch.linspace(-4, 4, 201)
size = PseudoHuberLoss(1.0).compute_s(t.unsqueeze(1))
lines = [
    ("pseudo-Huber, convex", size - 1, size**-3),
    ("Cauchy, not convex", size.log(), (2 - size**2) / size**4),
]

fig, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
for i, (label, *curves) in enumerate(lines):
    for ax, curve in zip(axes, curves, strict=True):
        ax.plot(t.tolist(), curve.tolist(), color=f"C{i}", label=label)
axes[1].axhline(0, color="0.4", linewidth=0.8)
axes[0].set(title=r"Two robust losses, $\delta = 1$", ylabel="loss")
axes[1].set(title="Their curvature along the residual", ylabel="second derivative")
for ax in axes:
    ax.set_xlabel("residual")
axes[0].legend()
plt.show()

# %%
# With a negative eigenvalue there is no real S: :math:`v^\top S S^\top v = \lVert
# S^\top v \rVert^2` cannot be negative. The generic extension says so.

far = torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64, device=device)
model = make_network("last")
Y_far = model(X).detach() - far

try:
    compare(model, CauchyLoss(1.0), ConvexLossDiagGGNExact, Y_far)
except ValueError as error:
    print(f"ValueError: {error}")
else:
    raise RuntimeError("A negative eigenvalue was not noticed.")

# %%
# All residuals point along the first entry of the output, at three times
# :math:`\delta`, so :math:`s^2 = 10` and the eigenvalue is :math:`(2 - 10) / 10^2 =
# -0.08`. With ``"mean"`` it is divided by N, which gives the number in the message.
#
# What would happen without that test? Two tempting ways to go on do not give
# :math:`\mathrm{J}^\top \mathrm{H} \, \mathrm{J}`. One takes the square root of a
# negative number, which is NaN. The other sets negative eigenvalues to zero.


class WrongRootOfNegative(ModuleExtension):
    """Wrong on purpose: takes square roots without a look at the sign."""

    def backpropagate(self, ext, module, g_inp, g_out, V_out: None) -> Tensor:
        """Return a root of the Hessian with NaN in it, shape ``[C, N, C]``."""
        H = vmap(jacrev(jacrev(module.forward)))(module.input0, module.input1)
        eigenvalues, U = torch.linalg.eigh(H / len(H))
        return einsum(
            U, self.square_roots(eigenvalues), U, "n i k, n k, n j k -> j n i"
        )

    def square_roots(self, eigenvalues: Tensor) -> Tensor:
        """Return the square roots of ``eigenvalues``, same shape."""
        return eigenvalues.sqrt()


class WrongClampedRoot(WrongRootOfNegative):
    """Wrong on purpose: sets negative eigenvalues to zero."""

    def square_roots(self, eigenvalues: Tensor) -> Tensor:
        """Return the square roots of the positive part, same shape."""
        return eigenvalues.clamp(0).sqrt()


# %%
# BackPACK accepts both without complaint. We compare the diagonal for the bias of the
# last linear layer, one number for each entry of the output.

results = {}
for extension_class in [WrongRootOfNegative, WrongClampedRoot]:
    model = make_network("last")
    Y_far = model(X).detach() - far
    by_backpack, by_witness = compare(model, CauchyLoss(1.0), extension_class, Y_far)
    results[extension_class] = by_backpack["2.bias"]
    numbers = "  ".join(f"{d:+.3f}" for d in by_backpack["2.bias"].tolist())
    print(f"{extension_class.__name__:20} {numbers}")
numbers = "  ".join(f"{d:+.3f}" for d in by_witness["2.bias"].tolist())
print(f"{'Jacobian and Hessian':20} {numbers}")

# %%
# The true :math:`\mathrm{J}^\top \mathrm{H} \, \mathrm{J}` has a negative entry on its
# diagonal, which no sum of squares can be. With NaN nothing is left. With zero in place
# of the negative eigenvalue the other entries happen to be right, but the result is the
# diagonal of another matrix, in which the Hessian :math:`\mathrm{H}` is replaced by its
# positive semidefinite part. You may have use for that, but then say so; it is not this
# loss's :math:`\mathrm{J}^\top \mathrm{H} \, \mathrm{J}`.
#
# The numbers follow from the formula, with :math:`s^2 = 10` and the scale weight
# :math:`w = 2`: along the residual :math:`w^2 (2 - s^2) / s^4`, which the clamp makes
# zero, and :math:`w^2 / s^2` for the other two entries. (All N samples contribute the
# same, and so their sum cancels the factor 1/N.)

eigenvalues = [(2 - 10) / 10**2, 1 / 10, 1 / 10]
expected = 2**2 * torch.tensor(eigenvalues, dtype=torch.float64, device=device)
torch.testing.assert_close(by_witness["2.bias"], expected)
torch.testing.assert_close(results[WrongClampedRoot], expected.clamp(0))
if not results[WrongRootOfNegative].isnan().all():
    raise RuntimeError("The root of a negative number left something that is not NaN.")

# %%
# What was verified
# -----------------
# Hessian and eigenvalues of the pseudo-Huber loss agree with autodiff, also at residual
# zero, and so does S, for ``mean`` and ``sum``. The GGN diagonal of all parameters
# agrees with :math:`\mathrm{J}^\top \mathrm{H} \, \mathrm{J}` in float64, at the
# default tolerance of ``torch.testing.assert_close``, with the scale module first, in
# the middle and last; with it in the middle, also with weights for the samples, and
# with S by automatic differentiation, for ``nn.PoissonNLLLoss``, too. S and the scale
# module's V were compared with their signs. A Cholesky factor serves as well as S, and
# with swapped axes it fails. ``BatchGrad`` needs no extension for the loss. A loss that
# is not a ``_Loss`` raises. For a loss that is not convex, neither way to go on gives
# :math:`\mathrm{J}^\top \mathrm{H} \, \mathrm{J}`.
#
# **Next:** `The contract, and what breaks it <5_contract_and_traps.html>`__ collects
# what BackPACK expects of an extension, and what happens if it does not get it.
#
# BackPACK: F. Dangel, F. Kunstner, P. Hennig, "BackPACK: Packing more into Backprop",
# ICLR 2020, `arXiv:1912.10985 <https://arxiv.org/abs/1912.10985>`_. Robust losses: J.
# T. Barron, "A General and Adaptive Robust Loss Function", CVPR 2019, `arXiv:1701.03077
# <https://arxiv.org/abs/1701.03077>`_. Square roots of the GGN: J. Martens, "New
# Insights and Perspectives on the Natural Gradient Method", JMLR 21(146), 2020,
# `arXiv:1412.1193 <https://arxiv.org/abs/1412.1193>`_.
