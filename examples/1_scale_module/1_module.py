r"""
A layer BackPACK does not know
==============================

After this page you know how BackPACK gets into PyTorch's backward pass, what it leaves
on your layers, and what it says about a layer that it was not taught.

We will:

1. write ``ScaleModule``, the layer that the first four pages teach to BackPACK;
2. see why it must be a ``torch.nn.Module``, and what ``extend`` does to it;
3. follow a forward and a backward pass, and see what a layer remembers;
4. ask for individual gradients, and get a warning;
5. ask for the GGN diagonal, and get an error.

You should know how to write a ``torch.nn.Module`` and how to call ``backward``. You
need not know anything about BackPACK. It computes quantities that PyTorch's
``backward`` does not. Each quantity is requested with an object called an
**extension**. First-order extensions use gradients only; ``BatchGrad``, for one,
computes individual gradients, one for each sample of a batch. Second-order extensions
use curvature; ``DiagGGNExact``, for one, computes the diagonal of the generalized
Gauss-Newton matrix (GGN).
"""

import warnings

import matplotlib.pyplot as plt
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad, DiagGGNExact
from torch import Tensor, nn

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# %%
# The layer
# ---------
# Our layer multiplies its input by one trainable number, :math:`z = w x`. No one needs
# such a class, because the multiplication can be written down anywhere. But its
# derivatives fit on one line, so we can concentrate on BackPACK.


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
# We check it: a batch of N = 6 samples with D = 4 features is doubled. (The C = 3
# classes of the labels ``y`` are for later.)

N, D, C = 6, 4, 3

X = torch.randn(N, D, device=device)
y = torch.randint(C, (N,), device=device)
scale = ScaleModule().to(device)

torch.testing.assert_close(scale(X), 2 * X)

# %%
# (BackPACK has a class of the same name in ``backpack.custom_module.scale_module``. It
# multiplies by a fixed number and has no parameter. It is not ours.)
#
# Why a module
# ------------
# BackPACK does not read your code. It learns about a computation through **hooks**:
# functions that PyTorch calls whenever data pass forward through a ``torch.nn.Module``,
# and whenever gradients pass back. A plain function has no hooks. So whatever you want
# BackPACK to treat must be a module of its own.
#
# ``extend`` adds one hook for each direction, in place, and returns the module. (The
# two attributes below are private to PyTorch. We only look.)

print(f"before extend: {len(scale._forward_hooks)} forward hook(s)")
print(f"               {len(scale._backward_hooks)} backward hook(s)")

scale = extend(scale)

print(f"after extend:  {len(scale._forward_hooks)} forward hook(s)")
print(f"               {len(scale._backward_hooks)} backward hook(s)")

# %%
# What the layer remembers
# ------------------------
# The forward hook stores the layer's input and output on the module. An extension
# needs them to compute derivatives.

output = scale(X)

torch.testing.assert_close(scale.input0, X)
torch.testing.assert_close(scale.output, output)
print(f"scale.input0: {list(scale.input0.shape)}")
print(f"scale.output: {list(scale.output.shape)}")

# %%
# The name ``input0`` ends in a number because a module may take several inputs. In the
# backward pass, the backward hook runs the extensions that were asked for (so far
# none), and after that it removes what was stored, to free the memory. (If BackPACK
# should ever keep it, the ``raise`` in the next cell stops the build, and this page is
# not published. Such checks stand behind all that a page lists at its end as verified.)

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    output.sum().backward()

for name in ["input0", "output"]:
    if hasattr(scale, name):
        raise RuntimeError(f"{name} was not removed. This page is out of date.")
print("input0 and output are gone")

# %%
# PyTorch raised a warning in this backward pass. We recorded it:

for warning in caught:
    print(f"{warning.category.__name__}: {warning.message}")

# %%
# This warning is harmless. It comes up when a module with a hook gets input for which
# no gradient is needed. That is so for the first layer, because data rarely need a
# gradient. You will meet it when you run these pages. Apart from here, the rendered
# pages leave it out.
#
# Where the layer sits
# --------------------
# The scale module stands in a small classifier with three layers. The figure shows it
# as a computation graph. Circles are tensors: :math:`x^{(0)}` is the input,
# :math:`x^{(k)}` the output of layer k, :math:`\theta^{(k)}` its parameters,
# :math:`\ell` the loss. Boxes are layers with their parameters, and the loss with its
# labels :math:`y`; the thick frame is the layer that BackPACK does not know. (The code
# only draws. You can skip it.)

layers = ["Linear", "ScaleModule", "Linear", "CrossEntropyLoss"]
tensors = ["$x^{(0)}$", "$x^{(1)}$", "$x^{(2)}$", "$x^{(3)}$", r"$\ell$"]
parameters = [r"$\theta^{(1)}$", r"$w$", r"$\theta^{(3)}$", "$y$"]

fig, ax = plt.subplots(figsize=(8, 3.1), layout="constrained")
node = {"ha": "center", "va": "center"}
for i, name in enumerate(tensors):
    circle = {"boxstyle": "circle,pad=0.25", "fc": "white", "ec": "0.3"}
    ax.text(2 * i, 0, name, bbox=circle, **node)
for i, (layer, parameter) in enumerate(zip(layers, parameters, strict=True)):
    is_scale = layer == "ScaleModule"
    box = {
        "boxstyle": "round,pad=0.3",
        "fc": "white",
        "ec": "C4" if is_scale else "0.3",
    }
    box["linewidth"] = 2 if is_scale else 1
    ax.text(
        2 * i + 1, 0.85, f"{layer}\n{parameter}", bbox=box, fontsize="small", **node
    )
    ax.plot([2 * i + 1, 2 * i + 1], [0.1, 0.85], ":", color="0.3", zorder=0)
    for y_arrow, start, end, color in [
        (0.08, 2 * i + 0.4, 2 * i + 1.6, "C0"),
        (-0.16, 2 * i + 1.6, 2 * i + 0.4, "C1"),
        (-0.40, 2 * i + 1.6, 2 * i + 0.4, "C2"),
    ]:
        into_data = i == 0 and color != "C0"
        arrow = {"arrowstyle": "->", "color": color, "linewidth": 1.6}
        arrow["linestyle"] = ":" if into_data else "-"
        ax.annotate("", (end, y_arrow), (start, y_arrow), arrowprops=arrow)
for color, label in [
    ("C0", "data (forward)"),
    ("C1", "gradients (backward)"),
    ("C2", "V (backward, second order only)"),
]:
    ax.plot([], [], color=color, label=label)
ax.set(xlim=(-0.5, 8.5), ylim=(-1.0, 1.2))
ax.axis("off")
ax.legend(loc="lower center", ncols=3, frameon=False)
ax.set_title("Data flow right, gradients and V flow left")
plt.show()

# %%
# Data flow to the right. In the backward pass PyTorch sends gradients to the left, but
# none into the data unless these require a gradient (dotted). BackPACK's **first-order
# extensions** look at these gradients when they pass a layer, and send nothing of their
# own. Its **second-order extensions** send a further quantity to the left, into the
# data under the same condition. For the GGN it is called V, and `The GGN and its
# diagonal, derived <3_ggn_derivation.html>`_ says what it is. So for second order two
# things can go wrong in a layer: the result for its own parameters, and the V that it
# passes on.
#
# First order: a warning
# ----------------------
# Here is the network. ``extend`` reaches the three layers inside. It does not put hooks
# on the ``Sequential`` around them, which computes nothing itself.

model = nn.Sequential(nn.Linear(D, 5), ScaleModule(), nn.Linear(5, C)).to(device)
model = extend(model)
loss_function = extend(nn.CrossEntropyLoss())

hooks = [*model._forward_hooks, *model._backward_hooks]
print(f"hooks on the Sequential: {len(hooks)}")

# %%
# The loss is extended, too: V starts there, so second-order extensions need it.
# An extension is active inside ``with backpack(...)``. Only ``backward`` has to be
# inside.
#
# ``BatchGrad`` computes individual gradients, and stores them in the attribute
# ``grad_batch`` of each parameter. BackPACK knows ``Linear`` and does not know
# ``ScaleModule``. It warns, and goes on. (In its message, the first "extension" is
# ``BatchGrad``. The second is what ``BatchGrad`` needs for each class of layers; we
# will call it a *module extension*.)

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with backpack(BatchGrad()):
        loss_function(model(X), y).backward()

texts = [str(warning.message) for warning in caught]
[message] = [t for t in texts if "does not have an extension" in t]  # exactly one
print(f"UserWarning: {message}")

# %%
# Every parameter has a gradient, since that is PyTorch's work. Individual gradients are
# there for the linear layers, and missing for the scale module.

for name, parameter in model.named_parameters():
    grad_batch = getattr(parameter, "grad_batch", None)
    shape = "missing" if grad_batch is None else list(grad_batch.shape)
    print(f"{name:>8}  grad: {list(parameter.grad.shape)!s:6}  grad_batch: {shape}")

# %%
# Asking for the missing ones raises an error that does not name the cause.

try:
    print(model[1].weight.grad_batch)
except AttributeError as error:
    print(f"AttributeError: {error}")
else:
    raise RuntimeError("No error was raised. This page is out of date.")

# %%
# Second order: an error
# ----------------------
# ``DiagGGNExact`` computes the diagonal of the GGN. It cannot go on: the layer before
# the scale module waits for a V that only the scale module can pass on. So it raises.

try:
    with backpack(DiagGGNExact()):
        loss_function(model(X), y).backward()
except NotImplementedError as error:
    print(f"NotImplementedError: {error}")
else:
    raise RuntimeError("No error was raised. This page is out of date.")

# %%
# How far did it get? The backward pass starts at the loss. The last layer was
# treated before the scale module was reached. The first layer was not reached.

reached = []
for name, parameter in model.named_parameters():
    diagonal = getattr(parameter, "diag_ggn_exact", None)
    shape = "missing" if diagonal is None else list(diagonal.shape)
    print(f"{name:>8}  diag_ggn_exact: {shape}")
    if diagonal is not None:
        reached.append(name)
if reached != ["2.weight", "2.bias"]:
    raise RuntimeError("BackPACK came to other layers. This page is out of date.")

# %%
# Layers without parameters
# -------------------------
# Does a layer without parameters need a module extension? ``BatchGrad`` has nothing to
# compute for it, and passes in silence. ``DiagGGNExact`` must send V through it, and
# raises.


class Double(nn.Module):
    """Multiply the input by two."""

    def forward(self, X: Tensor) -> Tensor:
        """Return ``2 * X`` for ``X`` of shape ``[N, *]``."""
        return 2 * X


model = extend(nn.Sequential(nn.Linear(D, 5), Double(), nn.Linear(5, C)).to(device))

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with backpack(BatchGrad()):
        loss_function(model(X), y).backward()
if any("does not have an extension" in str(warning.message) for warning in caught):
    raise RuntimeError("BatchGrad warned. This page is out of date.")
print(f"grad_batch of the first layer: {list(model[0].weight.grad_batch.shape)}")

try:
    with backpack(DiagGGNExact()):
        loss_function(model(X), y).backward()
except NotImplementedError as error:
    print(f"NotImplementedError: {error}")
else:
    raise RuntimeError("No error was raised. This page is out of date.")

# %%
# What was verified
# -----------------
# The layer doubles its input. A forward pass leaves ``input0`` and ``output`` on an
# extended module, and they hold the right tensors; a backward pass removes them. For a
# layer that BackPACK does not know, ``BatchGrad`` warns and leaves no ``grad_batch``,
# and ``DiagGGNExact`` raises ``NotImplementedError``. Without parameters, only
# ``DiagGGNExact`` complains. All of this happened when this page was built. Should a
# future BackPACK treat unknown layers differently, the build fails here.
#
# **Next:** `Individual gradients <2_individual_gradients.html>`_ makes the warning go
# away.
#
# BackPACK: F. Dangel, F. Kunstner, P. Hennig, "BackPACK: Packing more into Backprop",
# ICLR 2020, `arXiv:1912.10985 <https://arxiv.org/abs/1912.10985>`_.
