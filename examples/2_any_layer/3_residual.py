r"""
A residual block: ReZero
========================

After this page you can put a layer of your own into a residual block so that the GGN
diagonal gets through, and you know why a plain ``+`` stops it.

We will:

1. derive what happens to V on its way back: at the sum it goes into both branches, and
   at the fork it is added up;
2. write the ReZero block with modules only, and check it in first and second order;
3. write the same with a plain ``+``, and see first order work and second order fail;
4. see what BackPACK's converter can do about it and what it cannot;
5. try which other second-order extensions get through a residual block;
6. look at the curvature of a ReZero block at the start of training.

You should know ``ScaleModule`` and its two module extensions: `Individual gradients
<../1_scale_module/2_individual_gradients.html>`_ and `The GGN diagonal, backpropagated
<../1_scale_module/4_ggn_diagonal.html>`_. The letters: N samples, D features, C
classes, and V for the backpropagated square root of the GGN, shape ``[C, N, D]``.
"""

import warnings

import matplotlib.pyplot as plt
import torch
from backpack import backpack, extend, extensions
from backpack.custom_module.branching import Parallel, SumModule
from backpack.extensions import BatchGrad, DiagGGNExact
from backpack.extensions.firstorder.base import FirstOrderModuleExtension
from backpack.extensions.module_extension import ModuleExtension
from backpack.utils.subsampling import subsample
from einops import einsum
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vjp, vmap

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# %%
# The layer and its extensions
# ----------------------------
# The layer is that of Part 1.


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
# So are its extensions, for first and for second order.


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
# As always, a function builds a new extension for each backward pass, and registers our
# module extension in it.


def make_batch_grad(subsampling: list[int] | None = None) -> BatchGrad:
    """Build a ``BatchGrad`` that supports ``ScaleModule``.

    Args:
        subsampling: Indices of the samples to compute. Default: all.
    """
    extension = BatchGrad(subsampling=subsampling)
    extension.set_module_extension(ScaleModule, ScaleModuleBatchGrad())
    return extension


def make_diag_ggn() -> DiagGGNExact:
    """Build a ``DiagGGNExact`` that supports ``ScaleModule``."""
    extension = DiagGGNExact()
    extension.set_module_extension(ScaleModule, ScaleModuleDiagGGNExact())
    return extension


# %%
# V at a fork and at a sum
# ------------------------
# A ReZero block adds a scaled function of its input to the input,
#
# .. math::
#     z = x + \alpha \, F(x) ,
#
# where :math:`F` is a small network, called ``inner`` in code, and the number
# :math:`\alpha` is trained. It starts at zero, so that the block starts as the
# identity. In our words, :math:`\alpha` is the weight of a scale module.
#
# The input reaches the output along two paths, and the Jacobian is the sum over both:
#
# .. math::
#     \mathrm{J}_x z = I + \alpha \, \mathrm{J}_x F
#     \qquad \Rightarrow \qquad
#     V_x = (\mathrm{J}_x z)^\top V_z = V_z + (\mathrm{J}_x F)^\top \, \alpha V_z .
#
# So, going backward: at the sum, :math:`V_z` goes into both branches unchanged. Each
# branch sends it through its own layers. At the fork, where both branches took the same
# :math:`x`, the results are **added**.
#
# The demonstration is for one sample, where V is a matrix with its columns last, as in
# the formula. For a batch BackPACK puts the columns first: ``[C, N, D]``.

N, D, C = 6, 5, 4
alpha = 0.7

inner = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, D))
inner = inner.to(device, torch.float64)
x = torch.randn(D, dtype=torch.float64, device=device)
V_z = torch.randn(D, C, dtype=torch.float64, device=device)

J = jacrev(lambda x: x + alpha * inner(x))(x)
two_paths = V_z + jacrev(inner)(x).T @ (alpha * V_z)
torch.testing.assert_close(two_paths, J.T @ V_z)

# %%
# The picture shows the block as a computation graph: tensors, layers and the sum,
# joined by gray lines. The scale module is purple. (This code and the next only draw.
# You can skip them.)

style = {"ha": "center", "va": "center"}
places = {
    "$x$": (0, 0),
    "$F$": (2, 0.9),
    "scale\n" r"$\alpha$": (4, 0.9),
    "identity": (3, -0.9),
    "+": (6, 0),
    "$z$": (7.3, 0),
}
paths = [
    [(0, 0), (0.5, 0.9), (5.3, 0.9), (6, 0)],
    [(0, 0), (0.5, -0.9), (5.3, -0.9), (6, 0)],
    [(6, 0), (7.3, 0)],
]


def draw_block(ax: plt.Axes):
    """Draw boxes and lines into ``ax``."""
    for text, place in places.items():
        shape = "circle" if text in ["$x$", "$z$", "+"] else "round"
        color = "C4" if text.startswith("scale") else "0.3"
        box = {"boxstyle": f"{shape},pad=0.4", "fc": "white", "ec": color}
        ax.text(*place, text, bbox=box, zorder=3, **style)
    for path in paths:
        ax.plot(*zip(*path, strict=True), color="0.8", linewidth=6, zorder=1)


# %%
# Arrows along the lines point to the right for the data, and to the left for V. At the
# sum, V goes into both branches: the two terms of the formula. At :math:`x` they are
# added.

fig, ax = plt.subplots(figsize=(8, 3.2), layout="constrained")
draw_block(ax)
arrow = {"arrowstyle": "->", "linewidth": 1.6}
for text, (tip, tail), color in [
    ("", [(6.9, 0.13), (6.35, 0.13)], "C0"),
    ("", [(5.3, 1.03), (4.5, 1.03)], "C0"),
    ("", [(3.5, 1.03), (2.3, 1.03)], "C0"),
    ("", [(1.7, 1.03), (0.6, 1.03)], "C0"),
    ("", [(5.3, -0.77), (3.6, -0.77)], "C0"),
    ("", [(2.4, -0.77), (0.6, -0.77)], "C0"),
    ("$V_z$", [(6.35, -0.13), (6.9, -0.13)], "C2"),
    ("$V_z$", [(4.5, 0.77), (5.3, 0.77)], "C2"),
    (r"$\alpha V_z$", [(2.3, 0.77), (3.5, 0.77)], "C2"),
    (r"$(\mathrm{J}_x F)^\top \alpha V_z$", [(0.6, 0.77), (1.7, 0.77)], "C2"),
    ("$V_z$", [(3.6, -1.03), (5.3, -1.03)], "C2"),
    ("$V_z$", [(0.6, -1.03), (2.4, -1.03)], "C2"),
]:
    ax.annotate("", tip, tail, arrowprops=arrow | {"color": color}, zorder=2)
    middle = ((tip[0] + tail[0]) / 2, tip[1] - 0.22)
    ax.text(*middle, text, color="black", **style)
ax.text(-0.45, 0, r"$V_x =$ sum" "\nof both", ha="right", va="center")
for color, label in [("C0", "data (forward)"), ("C2", "V (backward)")]:
    ax.plot([], [], color=color, label=label)
ax.set(xlim=(-1.8, 7.8), ylim=(-1.6, 1.4))
ax.axis("off")
ax.legend(loc="lower right", frameon=False)
ax.set_title("V goes into both branches at the sum, and is added up at the fork")
plt.show()

# %%
# The block, made of modules
# --------------------------
# PyTorch takes gradients through a sum and a fork by itself. For V this is BackPACK's
# work, and BackPACK only sees modules. So the **sum** must be a module, ``SumModule``,
# which copies V to its summands. The fork needs none, as we will see. ``Parallel``
# saves us a ``forward``: it gives its input to each of its branches and sends what they
# return to a ``SumModule``. The identity is a branch as well, ``nn.Identity``.


class ReZero(Parallel):
    """Residual block ``x + alpha * inner(x)`` (Bachlechner et al., 2021)."""

    def __init__(
        self, inner: nn.Module, alpha: float = 0.0, identity_first: bool = True
    ):
        """Build the two branches.

        Args:
            inner: Maps ``[N, D]`` to ``[N, D]``.
            alpha: Initial weight of the scale module. Default: ``0.0``.
            identity_first: Order of the branches, to test both. Default: ``True``.
        """
        branches = [nn.Identity(), nn.Sequential(inner, ScaleModule(alpha))]
        super().__init__(*(branches if identity_first else reversed(branches)))


# %%
# Why does the fork need no module? Both branches get the same :math:`x`, and BackPACK
# stores each V under the memory address of its tensor. When the second branch delivers,
# the place is taken, and the extension is asked how to combine the two.
# ``DiagGGNExact`` adds:

A, B = torch.randn(2, C, N, D, device=device)
combined = DiagGGNExact().accumulate_backpropagated_quantities(A, B)
torch.testing.assert_close(combined, A + B)

# %%
# ``nn.Identity`` returns :math:`x` itself, so its output has the address of the fork.
# Its V is still not counted twice: BackPACK takes V away from the address of a layer's
# output before it stores the result at the address of the input. (If V of the other
# branch comes first, it is added to the :math:`V_z` that waits at this address for the
# identity, which then passes on the total.)

print(f"same address: {nn.Identity()(A).data_ptr() == A.data_ptr()}")

# %%
# We can look at V at the fork. The block is the whole network here, and its input
# requires a gradient, so that BackPACK computes a V for it, which stays in the
# extension after the pass. It must be :math:`(\mathrm{J}_x z)^\top S`. For S we take
# the square root with which BackPACK starts for cross-entropy, :math:`S =
# \mathrm{diag}(\sqrt{\pi}) - \pi \sqrt{\pi}^\top`, with the softmax :math:`\pi` of the
# outputs. The block has D outputs, so V has D columns here. The labels are all zero:
# the Hessian of cross-entropy does not depend on the label. This compares V itself,
# with its sign.


def make_inner() -> nn.Sequential:
    """Build a small network that maps ``[N, D]`` to ``[N, D]``."""
    return nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, D))


X = torch.randn(N, D, dtype=torch.float64, device=device)
labels = torch.zeros(N, dtype=int, device=device)

for identity_first in [True, False]:
    block = ReZero(make_inner(), alpha, identity_first).to(device, torch.float64)
    Z, pull_back = vjp(block, X)
    pi = Z.softmax(-1)
    S = torch.diag_embed(pi.sqrt()) - einsum(pi, pi.sqrt(), "n d, n c -> n d c")
    expected = vmap(pull_back)(einsum(S, "n d c -> c n d"))[0]

    block, loss_function = extend(block), extend(nn.CrossEntropyLoss(reduction="sum"))
    fork = X.clone().requires_grad_()
    diag_ggn = make_diag_ggn()
    with backpack(diag_ggn):
        loss_function(block(fork), labels).backward()
    # Each V is kept under the memory address of the tensor that it belongs to. We are
    # the last to need this one.
    V_x = diag_ggn.saved_quantities.retrieve_quantity(fork.data_ptr(), delete_old=True)
    torch.testing.assert_close(V_x, expected)
    print(f"identity first: {identity_first!s:5}  V at the fork: {list(V_x.shape)}")

# %%
# The check
# ---------
# The witnesses are a loop over samples for the individual gradients, and
# :math:`\mathrm{J}^\top \mathrm{H} \, \mathrm{J}` of each sample for the GGN, with the
# Jacobian J of the network and the Hessian H of the loss from ``torch.func``.


def loop_over_samples(
    model: nn.Module, loss_function: nn.Module, X: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """Compute the gradients of the samples' own losses, shape ``[N, *parameter]``."""
    names = [name for name, _ in model.named_parameters()]
    losses = [loss_function(model(X[[n]]), y[[n]]) for n in range(len(X))]
    rows = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    columns = zip(*rows, strict=True)
    return {k: torch.stack(g) for k, g in zip(names, columns, strict=True)}


def ggn_diagonal_of_sample(
    model: nn.Module, loss_function: nn.Module, x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """Compute the diagonal of the GGN of one sample's own loss.

    Args:
        model: The network, not extended.
        loss_function: The loss, not extended.
        x: One sample as a batch, shape ``[1, D]``.
        y: Its class, shape ``[1]``.

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
# One function runs the witnesses, then extends the model, and then lets BackPACK
# compute all that was asked for. It compares every parameter of the network.
#
# The witnesses take each sample's own loss. With ``"mean"`` BackPACK keeps the factor 1
# / N in its results, so both are multiplied by it, as ``r``. The second pass asks
# ``BatchGrad`` for the samples 4, 0 and 2 only: fewer than all, and not in order, so
# that a method that ignores the subset is noticed.


def check(
    model: nn.Module,
    reduction: str = "mean",
    first_order: bool = True,
    second_order: bool = True,
    use_converter: bool = False,
) -> nn.Module:
    """Compare BackPACK with the witnesses, for all parameters of ``model``.

    Args:
        model: The network, not extended; maps ``[N, D]`` to ``[N, C]``.
        reduction: ``"mean"`` or ``"sum"``.
        first_order: Whether to check ``BatchGrad``.
        second_order: Whether to check ``DiagGGNExact``.
        use_converter: Passed to ``extend``.

    Returns:
        The extended model.

    Raises:
        AssertionError: If BackPACK and a witness disagree.
    """
    y = torch.randint(C, (N,), device=device)
    loss_function = nn.CrossEntropyLoss(reduction=reduction)
    r = {"mean": 1 / N, "sum": 1.0}[reduction]
    gradients = loop_over_samples(model, loss_function, X, y)
    samples = [(X[[n]], y[[n]]) for n in range(N)]
    diagonals = [ggn_diagonal_of_sample(model, loss_function, *s) for s in samples]

    model = extend(model, use_converter=use_converter)
    loss_function = extend(loss_function)
    for subset in [None, [4, 0, 2]]:
        extensions = [make_batch_grad(subset)] if first_order else []
        extensions += [make_diag_ggn()] if second_order else []
        with backpack(*extensions):
            loss_function(model(X), y).backward()
        for name, parameter in model.named_parameters():
            if first_order:
                g = r * gradients[name]
                expected = g if subset is None else g[subset]
                torch.testing.assert_close(parameter.grad_batch, expected)
            if second_order:
                expected = r * sum(diagonal[name] for diagonal in diagonals)
                torch.testing.assert_close(parameter.diag_ggn_exact, expected)
    return model


# %%
# The networks hold the block first, in the middle, last, twice, and one inside another.
# Whatever stands before a block gets its V from the fork, and whatever stands in a
# branch from the sum.


def make_network(name: str, identity_first: bool) -> nn.Sequential:
    """Build a network with ReZero blocks that maps ``[N, D]`` to ``[N, C]``.

    Args:
        name: ``"first"``, ``"middle"``, ``"last"``, ``"twice"`` or ``"nested"``.
        identity_first: Order of the branches.
    """

    def block(inner: nn.Module) -> ReZero:
        """Build a block around ``inner``."""
        return ReZero(inner, alpha, identity_first)

    inner_logits = nn.Sequential(nn.Linear(C, 3), nn.Sigmoid(), nn.Linear(3, C))
    layers = {
        "first": [block(make_inner()), nn.Linear(D, C)],
        "middle": [nn.Linear(D, D), block(make_inner()), nn.Linear(D, C)],
        "last": [nn.Linear(D, C), block(inner_logits)],
        "twice": [
            nn.Linear(D, D),
            block(make_inner()),
            block(make_inner()),
            nn.Linear(D, C),
        ],
        "nested": [nn.Linear(D, D), block(block(make_inner())), nn.Linear(D, C)],
    }[name]
    return nn.Sequential(*layers).to(device, torch.float64)


for name in ["first", "middle", "last", "twice", "nested"]:
    for identity_first in [True, False]:
        for reduction in ["mean", "sum"]:
            check(make_network(name, identity_first), reduction)
    print(f"{name:>6}: all agree")

# %%
# The same block with a plain +
# -----------------------------
# Most people would write the block like this.


class PlainReZero(nn.Module):
    """Residual block ``x + alpha * inner(x)`` with a plain ``+``."""

    def __init__(self, inner: nn.Module, alpha: float = 0.0):
        """Store ``inner``, which maps ``[N, D]`` to ``[N, D]``, and build the scale."""
        super().__init__()
        self.inner = inner
        self.scale = ScaleModule(alpha)

    def forward(self, X: Tensor) -> Tensor:
        """Compute the block for ``X`` of shape ``[N, D]``."""
        return X + self.scale(self.inner(X))


def make_plain_network() -> nn.Sequential:
    """Build a network with a ``PlainReZero`` block in the middle."""
    layers = [nn.Linear(D, D), PlainReZero(make_inner(), alpha), nn.Linear(D, C)]
    return nn.Sequential(*layers).to(device, torch.float64)


# %%
# It computes the same:

inner = make_inner().to(device, torch.float64)
plain = PlainReZero(inner, alpha).to(device, torch.float64)
modular = ReZero(inner, alpha).to(device, torch.float64)
torch.testing.assert_close(plain(X), modular(X))

# %%
# First order works. An individual gradient needs only what PyTorch brings to each
# layer, and PyTorch knows about the sum. BackPACK warns: ``PlainReZero`` is neither a
# ``Sequential`` nor a ``Parallel``, so ``extend`` puts hooks on it, as on a layer, and
# there is no extension for it. The warning can be ignored here: the parameters belong
# to the layers inside, and these are known.

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    check(make_plain_network(), second_order=False)

texts = {str(warning.message) for warning in caught}
[message] = [text for text in texts if "does not have an extension" in text]
print(f"UserWarning: {message}")

# %%
# Second order fails.


def show(error: Exception):
    """Print the message of ``error``, up to the address of an object in memory."""
    print(f"{type(error).__name__}: {str(error).split(' object at ')[0]}")


try:
    check(make_plain_network(), first_order=False)
except AssertionError as error:
    if "expects a backpropagation quantity" not in str(error):
        raise
    show(error)
else:
    raise RuntimeError("BackPACK gets through a plain +. This page is out of date.")

# %%
# The last linear layer stored the V of its input under the address of :math:`z`. The
# next module on the way back is the scale module. (The block's own hook runs after
# those inside.) It asks for the V of its own output, the summand :math:`\alpha F(x)`,
# which is another tensor. A ``SumModule`` would have copied V from :math:`z` to its
# summands; the ``+`` has no hook and did nothing.
#
# Is it enough to replace the ``+`` by a ``SumModule``? No: BackPACK gets further, and
# then reaches the block itself, which has hooks and no module extension. In first order
# that was only a warning. In second order it is an error: because of its hooks,
# BackPACK treats the block as one more layer, and wants to send V through it as well,
# although V has gone through the modules inside.


class PlainReZeroWithSum(PlainReZero):
    """``PlainReZero`` with a ``SumModule`` in place of the ``+``."""

    def __init__(self, inner: nn.Module, alpha: float = 0.0):
        """Store ``inner``, and build the scale and the sum."""
        super().__init__(inner, alpha)
        self.sum = SumModule()

    def forward(self, X: Tensor) -> Tensor:
        """Compute the block for ``X`` of shape ``[N, D]``."""
        return self.sum(X, self.scale(self.inner(X)))


block = PlainReZeroWithSum(make_inner(), alpha)
model = nn.Sequential(nn.Linear(D, D), block, nn.Linear(D, C))
try:
    check(model.to(device, torch.float64), first_order=False)
except NotImplementedError as error:
    show(error)
else:
    raise RuntimeError("BackPACK gets through our container. This page is out of date.")

# %%
# ``extend`` puts no hook on ``Sequential``, on ``Parallel``, or on classes that inherit
# from them. That is why ``ReZero`` above inherits from ``Parallel``. A class that
# inherits from ``Sequential`` may even have a ``forward`` of its own, as long as this
# calls modules and nothing else. So this works too:


class SequentialReZero(nn.Sequential):
    """Residual block ``x + alpha * inner(x)`` with its own ``forward``."""

    def __init__(self, inner: nn.Module, alpha: float = 0.0):
        """Store ``inner``, which maps ``[N, D]`` to ``[N, D]``; build scale and sum."""
        super().__init__(inner, ScaleModule(alpha), SumModule())

    def forward(self, X: Tensor) -> Tensor:
        """Compute the block for ``X`` of shape ``[N, D]``."""
        inner, scale, add = self
        return add(X, scale(inner(X)))


model = nn.Sequential(nn.Linear(D, D), SequentialReZero(make_inner(), alpha))
_ = check(model.append(nn.Linear(D, C)).to(device, torch.float64))
print("all agree")

# %%
# What the converter can do
# -------------------------
# ``extend(..., use_converter=True)`` rewrites a network: it traces the forward pass
# with ``torch.fx`` and replaces operations by modules, a ``+`` by a ``SumModule``. That
# is made for residual networks. With a fixed number in place of our trained layer, it
# works:


class FixedReZero(nn.Module):
    """Residual block ``x + 0.7 * inner(x)``: the factor is not trained."""

    def __init__(self, inner: nn.Module):
        """Store ``inner``, which maps ``[N, D]`` to ``[N, D]``."""
        super().__init__()
        self.inner = inner

    def forward(self, X: Tensor) -> Tensor:
        """Compute the block for ``X`` of shape ``[N, D]``."""
        return X + 0.7 * self.inner(X)


model = nn.Sequential(nn.Linear(D, D), FixedReZero(make_inner()), nn.Linear(D, C))
converted = check(model.to(device, torch.float64), use_converter=True)

print(*sorted({type(layer).__name__ for layer in converted.modules()}))

# %%
# These are the layers, a ``SumModule``, BackPACK's own ``ScaleModule``, which
# multiplies by a fixed number, and two kinds of container. These do no harm: the outer
# one (``GraphModule``) is a further class on which ``extend`` puts no hook, and the
# inner ones (``Module``) only hold the layers under their old names and are never
# called. ``FixedReZero`` is gone: the converter has taken it apart.
#
# With our layer, the conversion fails.

try:
    check(make_plain_network(), use_converter=True)
except RuntimeError as error:
    show(error)
else:
    raise RuntimeError("The converter handles ScaleModule. This page is out of date.")

# %%
# The tracer does not enter PyTorch's own modules (except ``Sequential``), nor some of
# BackPACK's. It enters modules of our own. So it walked into ``ScaleModule.forward``
# and met ``weight * X``. The converter knows what to do with a number times a tensor,
# but here both factors are tensors.
#
# Other extensions
# ----------------
# ``SumModule``, ``nn.Identity`` and the fork must be known to a second-order extension
# of BackPACK. Some know them, others raise. We see which, with a block made of layers
# that need nothing from us. (HBP, which needs four settings, is left out.) The messages
# are long, so we print what they say in our words.

through = ["DiagGGNExact", "DiagGGNMC", "BatchDiagGGNExact", "BatchDiagGGNMC"]
through += ["SqrtGGNExact", "SqrtGGNMC", "KFAC"]
stopped = ["KFLR", "KFRA", "DiagHessian", "BatchDiagHessian", "GGNMP", "HMP", "PCHMP"]
causes = {
    "branching.SumModule": "SumModule is unknown",
    "No accumulation rule": "no rule for the sum of V at the fork",
    "no message": "an error without a message",
}
targets = torch.randint(C, (N,), device=device)

for name in through + stopped:
    block = Parallel(nn.Identity(), nn.Linear(D, D))
    model = nn.Sequential(nn.Linear(D, D), block, nn.Linear(D, C))
    model = extend(model.to(device, torch.float64))
    loss = extend(nn.CrossEntropyLoss())(model(X), targets)
    try:
        with backpack(getattr(extensions, name)()):
            loss.backward()
    except NotImplementedError as error:
        message = str(error) or "no message"
        [outcome] = [causes[part] for part in causes if part in message]
    else:
        outcome = "gets through"
    print(f"{name:<17} {outcome}")
    if (outcome == "gets through") != (name in through):
        raise RuntimeError(f"{name}: {outcome}. This page is out of date.")

# %%
# So in a residual network, the last seven need more than a module extension for your
# layer.
#
# Curvature at the start
# ----------------------
# ReZero starts with :math:`\alpha = 0`. What does the GGN see there? V on its way into
# :math:`F` is multiplied by :math:`\alpha`, so the diagonal of all parameters in
# :math:`F` is exactly zero. Inside the block, only :math:`\alpha` has curvature.

inner = make_inner()
block = ReZero(inner)
scale = next(layer for layer in block.modules() if isinstance(layer, ScaleModule))
model = nn.Sequential(nn.Linear(D, D), block, nn.Linear(D, C)).to(device, torch.float64)
model, loss_function = extend(model), extend(nn.CrossEntropyLoss())


def curvature(weight: float) -> tuple[Tensor, Tensor]:
    """Return the GGN diagonal of ``alpha`` and the sum over all of ``inner``.

    Args:
        weight: The value of ``alpha``.
    """
    with torch.no_grad():
        scale.weight.fill_(weight)
    with backpack(make_diag_ggn()):
        loss_function(model(X), targets).backward()
    diagonals = [p.diag_ggn_exact.sum() for p in inner.parameters()]
    return scale.weight.diag_ggn_exact, torch.stack(diagonals).sum()


# %%
# The check has no tolerance: zero is exact.

at_start, inside_at_start = curvature(0.0)
zero = torch.zeros_like(inside_at_start)
torch.testing.assert_close(inside_at_start, zero, rtol=0, atol=0)
print(f"GGN diagonal at the start: alpha {at_start.item():.4f}, all of F 0")

# %%
# An optimizer that divides by the curvature must add a damping term, or it divides by
# zero. As :math:`\alpha` leaves zero, the parameters of :math:`F` get their curvature.

alphas = torch.linspace(-1, 1, 41).tolist()
results = [curvature(a) for a in alphas]

fig, ax = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
for column, label in enumerate([r"$\alpha$", "all parameters of $F$ (sum)"]):
    line = [result[column].item() for result in results]
    ax.plot(alphas, line, color=f"C{column}", label=label)
ax.set_xlabel(r"$\alpha$")
ax.set_ylabel("GGN diagonal")
ax.set_title(r"Inside the block, only $\alpha$ has curvature at $\alpha = 0$")
ax.legend()
plt.show()

# %%
# What was verified
# -----------------
# V at the fork agrees with the VJP of the whole block, sign included. In networks with
# the block first, in the middle, last, twice and nested, in either order of the
# branches, for ``mean`` and ``sum``, the individual gradients of all samples and of a
# subset, and the GGN diagonal of all parameters, agree with a loop over samples and
# with :math:`\mathrm{J}^\top \mathrm{H} \, \mathrm{J}`, in float64 at the default
# tolerance of ``torch.testing.assert_close``. With a plain ``+`` the first order agrees
# and the second raises; the converter raises on ``ScaleModule`` and works with a fixed
# factor. With a block that needs no extension of ours, seven second-order extensions
# get through, and seven raise. At :math:`\alpha = 0` the diagonal of all parameters of
# :math:`F` is exactly zero.
#
# **Next:** `A custom loss <4_custom_loss.html>`_: where V begins.
#
# ReZero: T. Bachlechner, B. P. Majumder, H. H. Mao, G. W. Cottrell, J. McAuley, "ReZero
# is All You Need: Fast Convergence at Large Depth", UAI 2021, `arXiv:2003.04887
# <https://arxiv.org/abs/2003.04887>`_. BackPACK: F. Dangel, F. Kunstner, P. Hennig,
# "BackPACK: Packing more into Backprop", ICLR 2020, `arXiv:1912.10985
# <https://arxiv.org/abs/1912.10985>`_.
