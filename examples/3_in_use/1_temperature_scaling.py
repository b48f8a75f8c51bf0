r"""
Temperature scaling by Newton's method
======================================

After this page you can calibrate a classifier with one trainable number, and fit that
number in a few iterations, because BackPACK hands you its curvature.

We will:

1. train a classifier that is far too sure of itself;
2. put a ``ScaleModule`` on its logits, and derive what gradient and curvature of its
   weight mean;
3. see that the GGN diagonal of this one parameter is the Hessian, and check it;
4. watch Newton's method diverge, see why, and mend it by a line search;
5. count its iterations beside those of gradient descent;
6. measure calibration on test data, before and after;
7. ask the curvature how far the fitted number can be trusted;
8. look at what freezing the network saves.

You should know what softmax and cross-entropy are, and how the extension for the GGN
diagonal works: `The GGN diagonal, backpropagated
<../1_scale_module/4_ggn_diagonal.html>`_. The letters: N samples, D features, C
classes, V for the square root of the GGN that travels backward.
"""

from statistics import median
from time import perf_counter

import matplotlib.pyplot as plt
import torch
from backpack import backpack, extend
from backpack.extensions import DiagGGNExact
from backpack.extensions.module_extension import ModuleExtension
from einops import einsum
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vjp, vmap

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# %%
# A classifier that is too sure
# -----------------------------
# Our data come from C = 4 overlapping bell curves in D = 8 dimensions. We draw three
# sets: 300 samples to train the network, 500 to fit our one number, the temperature
# (the validation set), and 5000 to judge the result (the test set). The temperature
# must not be fitted on the training set: there, the network is right nearly always, and
# being sure looks justified.

D, C = 8, 4
centers = 0.9 * torch.randn(C, D, dtype=torch.float64, device=device)


def draw_data(N: int) -> tuple[Tensor, Tensor]:
    """Draw ``N`` samples: inputs of shape ``[N, D]`` and labels of shape ``[N]``."""
    y = torch.randint(C, (N,), device=device)
    noise = torch.randn(N, D, dtype=torch.float64, device=device)
    return centers[y] + noise, y


X_train, y_train = draw_data(300)
X_val, y_val = draw_data(500)
X_test, y_test = draw_data(5000)

# %%
# A network with one hidden layer, trained for longer than is good for it.

network = nn.Sequential(nn.Linear(D, 64), nn.ReLU(), nn.Linear(64, C))
network = network.to(device, torch.float64)
optimizer = torch.optim.Adam(network.parameters(), lr=0.01)

for _ in range(200):
    optimizer.zero_grad()
    nn.functional.cross_entropy(network(X_train), y_train).backward()
    optimizer.step()

# %%
# The network is done now: we freeze it. Its outputs, the **logits** Z, will not change
# any more. So we compute them once for each set, and need no network to fit the
# temperature. The **confidence** is the probability of the predicted class.

network.requires_grad_(False)
Z_train, Z_val, Z_test = network(X_train), network(X_val), network(X_test)


def accuracy(Z: Tensor, y: Tensor) -> float:
    """Return the fraction of right answers of logits ``Z`` of shape ``[N, C]``."""
    return (Z.argmax(1) == y).double().mean().item()


def confidence(Z: Tensor) -> Tensor:
    """Return the probability of the predicted class, shape ``[N]``."""
    return Z.softmax(1).amax(1)


for name, Z, y in [("train", Z_train, y_train), ("test", Z_test, y_test)]:
    print(f"{name:>5}: accuracy {accuracy(Z, y):.3f}", end=", ")
    print(f"mean confidence {confidence(Z).mean():.3f}")

# %%
# On test data, the network says that it is right more often than it is. It would be
# **calibrated** if, among samples of the same confidence, the accuracy were this
# confidence. How far is it from that? The **expected calibration error** (ECE) sorts
# the N samples by confidence into B bins of equal width. In each bin it compares the
# mean confidence with the accuracy. Then it averages the gaps, weighted by :math:`N_b`,
# the number of samples in bin b:
#
# .. math::
#     \text{ECE} = \sum_{b=1}^{B} \frac{N_b}{N} \,
#     \left| \text{accuracy}_b - \text{confidence}_b \right| .

bins = 15


def reliability(Z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return sample count, accuracy and mean confidence of each bin, shape ``[bins]``.

    Args:
        Z: Logits, shape ``[N, C]``.
        y: Class indices, shape ``[N]``.
    """
    sure = confidence(Z)
    right = (Z.argmax(1) == y).to(sure)
    index = (sure * bins).ceil().long().clamp(1, bins) - 1
    counts, hits, sums = (
        torch.zeros(bins, dtype=sure.dtype, device=device).index_add(0, index, values)
        for values in (torch.ones_like(sure), right, sure)
    )
    return counts, hits / counts.clamp(min=1), sums / counts.clamp(min=1)


def calibration_error(Z: Tensor, y: Tensor) -> float:
    """Return the ECE of logits ``Z`` of shape ``[N, C]``."""
    counts, accuracies, confidences = reliability(Z, y)
    return ((counts / len(y)) * (accuracies - confidences).abs()).sum().item()


print(f"ECE on test data: {calibration_error(Z_test, y_test):.3f}")

# %%
# One number to mend it
# ---------------------
# Guo et al. (2017) divide all logits by one number, the temperature :math:`T`. (On
# other pages T counts the steps of a sequence. There are none here.) We multiply them
# by its inverse, :math:`w = 1/T`. That is the scale module, set on top of the network.
# Its weight is chosen to minimize the cross-entropy on the validation set. With the
# logits :math:`z_n` and the label :math:`y_n` of sample n, and the cross-entropy
# :math:`\ell` of one sample, this is
#
# .. math::
#     L(w) = \frac{1}{N} \sum_{n=1}^{N} \ell(w z_n, y_n)
#     = \frac{1}{N} \sum_{n=1}^{N} \Big( \log \sum_c e^{w z_{nc}} - w z_{n y_n} \Big) .
#
# Its derivatives can be read as statistics. With the probabilities :math:`\pi_n =
# \operatorname{softmax}(w z_n)`, the derivative of the logarithm is the mean of the
# logits, :math:`\operatorname{E}_{c \sim \pi_n}[z_{nc}] = \sum_c \pi_{nc} z_{nc}`. And
# as :math:`\partial \pi_{nc} / \partial w = \pi_{nc} (z_{nc} -
# \operatorname{E}[z_{nc}])`, the derivative of this mean is their variance:
#
# .. math::
#     L'(w) &= \frac{1}{N} \sum_n
#     \big( \operatorname{E}_{c \sim \pi_n}[z_{nc}] - z_{n y_n} \big) \, , \\
#     L''(w) &= \frac{1}{N} \sum_n \operatorname{Var}_{c \sim \pi_n}[z_{nc}] \, .
#
# The gradient is zero when the logits of the true classes are, on average, what the
# network expects them to be. The curvature is the mean variance of the logits under the
# network's own prediction. It is never negative, so :math:`L` is convex. We evaluate
# both lines, and compare with ``torch.func``, for an arbitrary :math:`w`.


def validation_loss(w: Tensor) -> Tensor:
    """Return the cross-entropy on the validation set, for a number ``w``."""
    return nn.functional.cross_entropy(w * Z_val, y_val)


w = torch.tensor([0.5], dtype=torch.float64, device=device)
pi = (w * Z_val).softmax(1)
mean = (pi * Z_val).sum(1)
variance = (pi * (Z_val - mean.unsqueeze(1)).square()).sum(1)
z_true = Z_val.gather(1, y_val.unsqueeze(1)).squeeze(1)

gradient = (mean - z_true).mean().reshape(1)
torch.testing.assert_close(gradient, jacrev(validation_loss)(w))
hessian = jacrev(jacrev(validation_loss))(w)
torch.testing.assert_close(variance.mean().reshape(1, 1), hessian)

# %%
# The curvature from BackPACK
# ---------------------------
# The GGN replaces a network by its linearization, and keeps the curvature of the loss.
# Here the outputs :math:`w z_n` **are** linear in the parameter :math:`w`, so nothing
# is lost: the GGN is the Hessian. And with a single parameter, it is its own diagonal.
# So ``DiagGGNExact`` gives us :math:`L''` in the same backward pass that gives
# :math:`L'`, without a formula like the one above. This is the layer from Part 1:


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
# And this is its module extension:


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
# One function returns all that an iteration needs: loss, gradient and curvature. With
# the default ``reduction="mean"``, gradient and curvature are those of the mean loss.

loss_function = extend(nn.CrossEntropyLoss())


def make_scale(weight: float) -> ScaleModule:
    """Build an extended ``ScaleModule`` in float64."""
    scale = extend(ScaleModule()).to(device, torch.float64)
    scale.weight.data.fill_(weight)  # only now: float32 would round the number
    return scale


def derivatives(scale: ScaleModule, Z: Tensor, y: Tensor) -> tuple[float, ...]:
    """Return loss, gradient and curvature with respect to ``scale.weight``.

    Args:
        scale: The extended layer.
        Z: Logits, shape ``[N, C]``.
        y: Class indices, shape ``[N]``.
    """
    scale.zero_grad()
    loss = loss_function(scale(Z), y)
    with backpack(make_diag_ggn()):
        loss.backward()
    weight = scale.weight
    return loss.item(), weight.grad.item(), weight.diag_ggn_exact.item()


# %%
# Is the GGN the Hessian? ``jacrev(jacrev(...))`` differentiates the loss twice and
# knows nothing of the GGN. We compare at several :math:`w`.

for value in [-1.0, 0.1, 0.5, 1.0]:
    loss, gradient, curvature = derivatives(make_scale(value), Z_val, y_val)
    w = torch.tensor([value], dtype=torch.float64, device=device)
    hessian = jacrev(jacrev(validation_loss))(w).item()
    torch.testing.assert_close(gradient, jacrev(validation_loss)(w).item())
    torch.testing.assert_close(curvature, hessian)
    print(f"w = {value:4.1f}: gradient {gradient:8.4f}, curvature {curvature:8.4f}")

# %%
# The extension's second method, ``backpropagate``, does not run here: no one before the
# scale module needs V. It would run if the network were trained together with the
# scale. So that it can be trusted then, we check it in two ways. First against a VJP,
# which also sees a wrong sign:

scale = make_scale(0.3)
scale(Z_val[:6])  # as in a network, where a forward pass comes first
V_out = torch.randn(C, 6, C, dtype=torch.float64, device=device)
V_in = ScaleModuleDiagGGNExact().backpropagate(None, scale, None, None, V_out)

_, input_vjp = vjp(lambda Z: scale.weight.detach() * Z, Z_val[:6])
torch.testing.assert_close(V_in, vmap(input_vjp)(V_out)[0])

# %%
# Then inside of the whole model, with the GGN of all parameters. The witness is the
# definition, :math:`\frac{1}{N} \sum_n J_n^\top H_n J_n`, with the Jacobians of the
# outputs from ``jacrev`` (``[N, C, *]`` for each parameter) and the Hessian of
# cross-entropy, :math:`H_n = \operatorname{diag}(\pi_n) - \pi_n \pi_n^\top`. A few
# samples are enough. (``torch.func`` fails on modules with BackPACK's hooks, so it
# comes first, and ``extend`` second.)

X, y = X_val[:6], y_val[:6]
model = nn.Sequential(*network, ScaleModule(0.3).to(device, torch.float64))
parameters = {name: p.detach() for name, p in model.named_parameters()}
J = jacrev(lambda parameters: functional_call(model, parameters, X))(parameters)
pi = model(X).softmax(1).detach()
loss_hessian = (pi.diag_embed() - einsum(pi, pi, "n c, n k -> n c k")) / len(y)

# %%
# The model shares its layers with the network, so ``extend`` adds hooks to these too.
# For this check they are unfrozen. The diagonal of a parameter must have its shape.
# `BackPACK does not check this
# <../2_any_layer/5_contract_and_traps.html#nothing-checks-what-you-return>`_: the right
# shape differs between extensions, so it stores whatever ``weight`` returns. We compare
# the shapes too.

model = extend(model).requires_grad_(True)
with backpack(make_diag_ggn()):
    loss_function(model(X), y).backward()
model.requires_grad_(False)

for name, parameter in model.named_parameters():
    J_p = J[name].flatten(start_dim=2)
    diagonal = einsum(J_p, loss_hessian, J_p, "n c p, n c k, n k p -> p")
    expected = diagonal.reshape(parameter.shape)
    torch.testing.assert_close(parameter.diag_ggn_exact, expected)
    print(f"{name:>8}: {diagonal.numel():3d} entries agree")

# %%
# Newton's method, undamped
# -------------------------
# Newton's method goes where the parabola with the loss's gradient and curvature has its
# minimum, :math:`w \leftarrow w - L'(w) / L''(w)`. Undamped means that it always goes
# the full way. We start from the unscaled network, :math:`w = 1`.

scale = make_scale(1.0)
losses = []
for _ in range(3):
    loss, gradient, curvature = derivatives(scale, Z_val, y_val)
    losses.append(loss)
    print(f"w = {scale.weight.item():10.3g}: loss {loss:9.3g}", end=", ")
    print(f"gradient {gradient:8.3f}, curvature {curvature:8.2g}")
    if curvature == 0:
        break
    scale.weight.data -= gradient / curvature

if not losses[-1] > losses[0]:
    raise RuntimeError("Undamped Newton did not diverge. This page is out of date.")

# %%
# It diverges: the loss grows, and after one step the scale is negative, so that the
# network prefers the classes that it thinks least likely. (Where the curvature is zero
# up to rounding, there is no next step.) The formula for :math:`L''` tells why. A
# network that is too sure puts nearly all probability on one class, and the variance of
# the logits is nearly zero. The gradient is not: it is kept up by the wrong answers. A
# long step in the right direction is the result. **The more overconfident a network is,
# the less the parabola at** :math:`w = 1` **can be trusted.**
#
# Damping by a line search
# ------------------------
# The step :math:`d = -L'(w) / L''(w)` has the right direction, since :math:`L''` is
# positive. Its length is wrong. So we shorten it until the loss has really decreased,
# by a part of what the gradient promises (Armijo's condition). We take the first
# :math:`\alpha` of :math:`1, \tfrac12, \tfrac14, \dots` with
#
# .. math::
#     L(w + \alpha d) \le L(w) + 10^{-4} \, \alpha \, d \, L'(w) \, .


@torch.no_grad()
def find_step(
    scale: ScaleModule, Z: Tensor, y: Tensor, loss: float, gradient: float, d: float
) -> float:
    """Return the first of 1, 1/2, 1/4, ... that satisfies Armijo's condition.

    Args:
        scale: The layer; its weight is where the step starts.
        Z: Logits, shape ``[N, C]``.
        y: Class indices, shape ``[N]``.
        loss: Loss at the start.
        gradient: Derivative of the loss at the start.
        d: Direction of the step.
    """
    alpha = 1.0
    while True:
        new_loss = nn.functional.cross_entropy((scale.weight + alpha * d) * Z, y)
        if new_loss <= loss + 1e-4 * alpha * d * gradient:
            return alpha
        alpha /= 2


# %%
# The rest is a loop. It serves gradient descent as well, with :math:`d = -L'(w)`.


def fit(Z: Tensor, y: Tensor, method: str = "Newton") -> tuple[float, list[float]]:
    """Minimize the cross-entropy of ``w * Z``, starting from ``w = 1``.

    Args:
        Z: Logits, shape ``[N, C]``.
        y: Class indices, shape ``[N]``.
        method: ``"Newton"`` or ``"gradient descent"``.

    Returns:
        The last w, and all values of w on the way.
    """
    scale = make_scale(1.0)
    visited = []
    for _ in range(500):
        visited.append(scale.weight.item())
        loss, gradient, curvature = derivatives(scale, Z, y)
        if abs(gradient) < 1e-6:
            break
        d = -gradient / curvature if method == "Newton" else -gradient
        scale.weight.data += find_step(scale, Z, y, loss, gradient, d) * d
    return visited[-1], visited


# %%
# Now it converges. The last iterations show what Newton's method is known for: the
# number of right digits about doubles from step to step. So does the exponent of the
# gradient.

w_fit, newton_path = fit(Z_val, y_val)
for step, value in enumerate(newton_path):
    _, gradient, _ = derivatives(make_scale(value), Z_val, y_val)
    print(f"step {step}: w = {value:.6f}, gradient {gradient:+.1e}")

torch.testing.assert_close(gradient, 0.0, rtol=0, atol=1e-6)
print(f"temperature T = 1 / w = {1 / w_fit:.2f}")

# %%
# Beside gradient descent
# -----------------------
# Gradient descent needs a step size. With the same line search, starting from
# :math:`\alpha = 1`, it finds its own. With a fixed step it needs a bound on the
# curvature: descent is guaranteed for steps up to :math:`1 / \max L''`. The variance of
# numbers in an interval is at most a quarter of the interval's squared length
# (Popoviciu's inequality), which bounds :math:`L''` for all :math:`w` at once.

_, search_path = fit(Z_val, y_val, "gradient descent")

widths = Z_val.amax(1) - Z_val.amin(1)
bound = (widths.square() / 4).mean().item()
scale, fixed_path = make_scale(1.0), []
for _ in range(3000):
    fixed_path.append(scale.weight.item())
    (gradient,) = torch.autograd.grad(validation_loss(scale.weight), scale.weight)
    if gradient.abs() < 1e-6:
        break
    scale.weight.data -= gradient / bound

# %%
# All three end at the same weight, to within 1e-4.

paths = {
    "Newton with line search": newton_path,
    "gradient descent with line search": search_path,
    "gradient descent, fixed step": fixed_path,
}
for name, path in paths.items():
    torch.testing.assert_close(path[-1], w_fit, rtol=0, atol=1e-4)
    print(f"{name:<34} {len(path) - 1:4d} iterations")

# %%
# The left panel shows the loss, the parabola that Newton's method sees at :math:`w =
# 1`, and the weights visited with the line search. The parabola is so flat that its
# minimum is far outside of the picture. The right panel compares the three methods:
# once near the minimum, Newton's method needs the fewest iterations by far. (The
# iteration axis is logarithmic from 10 on. The minimum is the loss at Newton's last
# weight, so this curve ends at zero, below the panel. All three methods stop once the
# gradient is below 1e-6.)


def excess_loss(path: list[float]) -> list[float]:
    """Return the validation loss above its minimum, for each weight on a path."""
    weights = torch.tensor(path, dtype=torch.float64, device=device)
    losses = vmap(validation_loss)(weights)
    return (losses - validation_loss(weights.new_tensor(w_fit))).tolist()


fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.9), layout="constrained")

grid = torch.linspace(-0.2, 1.1, 100, dtype=torch.float64, device=device)
loss, gradient, curvature = derivatives(make_scale(1.0), Z_val, y_val)
parabola = loss + gradient * (grid - 1) + curvature / 2 * (grid - 1).square()
left.plot(grid.cpu(), vmap(validation_loss)(grid).cpu(), color="C0", label="loss")
left.plot(grid.cpu(), parabola.cpu(), "--", color="C1", label="parabola at $w = 1$")
visited = torch.tensor(newton_path, dtype=torch.float64, device=device)
visited_losses = vmap(validation_loss)(visited).cpu()
left.plot(newton_path, visited_losses, "o", color="C2", label="visited by Newton")
left.set_ylim(0, 1.3 * loss)
left.set_xlabel("inverse temperature $w$")
left.set_ylabel("validation loss")
left.set_title("Why the first step must be damped")
left.legend()

for (name, path), color, marker in zip(
    paths.items(), ["C2", "C3", "C4"], ["o", "s", ""], strict=True
):
    right.plot(excess_loss(path), marker=marker, color=color, label=name)
right.set_xscale("symlog", linthresh=10)
right.set_yscale("log")
right.set_ylim(bottom=1e-13)
right.set_xlabel("iteration")
right.set_ylabel("loss above its minimum")
right.set_title("Newton's method and gradient descent")
fig.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()

# %%
# Is it worth it? For one parameter, any of these ends in a moment. With Newton's method
# there is no step size to tune, it ends after a few iterations, and the curvature is
# left over: we use it below.
#
# Before and after
# ----------------
# The **test** data had no part in the fit. Scaling by a positive number does not change
# which logit is the largest. So the predictions, and with them the accuracy, stay.

Z_scaled = w_fit * Z_test
torch.testing.assert_close(Z_scaled.argmax(1), Z_test.argmax(1))

# %%
# How near to zero can the ECE come? Even for a perfect network, the accuracy in a bin
# with few samples is not equal to its confidence. To see this floor, we draw labels
# from the scaled network's own probabilities. By these labels it is perfectly
# calibrated.

y_ideal = torch.multinomial(Z_scaled.softmax(1), 1).squeeze(1)
floor = calibration_error(Z_scaled, y_ideal)

# %%
# The ECE must be at most half of what it was, and the cross-entropy must have decreased
# by at least 15%. The check is that the part above these limits is zero. (The limits
# leave room: the tests of this site run the page with other seeds, too.)

cross_entropy = nn.functional.cross_entropy
before = calibration_error(Z_test, y_test), cross_entropy(Z_test, y_test).item()
after = calibration_error(Z_scaled, y_test), cross_entropy(Z_scaled, y_test).item()

for name, (error, loss) in [("before", before), ("after", after)]:
    print(f"{name:>6}: ECE {error:.4f}, cross-entropy {loss:.4f}")
print(f" floor: ECE {floor:.4f}")

torch.testing.assert_close(max(after[0] - 0.5 * before[0], 0.0), 0.0)
torch.testing.assert_close(max(after[1] - 0.85 * before[1], 0.0), 0.0)

# %%
# The ECE need not reach the floor. One number can only make the network more or less
# sure as a whole. It can't mend one that is too sure of some classes and not of others.
#
# The **reliability diagram** draws accuracy against confidence. The wide bars of a
# calibrated network end at the dashed line. Before scaling nearly all end below it: the
# network is too sure. The narrow bars are the gaps that the ECE averages, and the dots
# are their weights, :math:`N_b / N`. After scaling, the gaps are small where the
# weights are large.


def draw_reliability(ax: plt.Axes, Z: Tensor, y: Tensor, title: str) -> None:
    """Draw accuracy and share of samples for each bin of confidence.

    Args:
        ax: Where to draw.
        Z: Logits, shape ``[N, C]``.
        y: Class indices, shape ``[N]``.
        title: What the panel shows.
    """
    counts, accuracies, confidences = (t.cpu().numpy() for t in reliability(Z, y))
    filled = counts > 0
    middles = (torch.arange(bins) + 0.5).numpy() / bins
    gaps = {"color": "C1", "alpha": 0.5, "label": "gap to mean confidence"}
    ax.bar(middles, accuracies, 0.9 / bins, color="C0", label="accuracy")
    ax.bar(
        middles[filled],
        (confidences - accuracies)[filled],
        0.45 / bins,
        bottom=accuracies[filled],
        **gaps,
    )
    ax.plot([0, 1], [0, 1], "--", color="0.3", linewidth=1)
    ax.plot(middles, counts / counts.sum(), "o", color="C2", label="share of samples")
    # The largest of C probabilities is at least 1 / C.
    ax.set(xlim=(1 / C - 0.03, 1), ylim=(0, 1), xlabel="confidence")
    ax.set_title(title)


# sphinx_gallery_thumbnail_number = 2
fig, axes = plt.subplots(1, 2, figsize=(8, 4.2), sharey=True, layout="constrained")
draw_reliability(axes[0], Z_test, y_test, f"Reliability before: ECE {before[0]:.3f}")
draw_reliability(axes[1], Z_scaled, y_test, f"Reliability after: ECE {after[0]:.3f}")
axes[0].set_ylabel("accuracy, or share of samples")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
plt.show()

# %%
# How far to trust the temperature
# --------------------------------
# Another validation set would have given another :math:`w`. By how much would it
# differ? Where the loss is flat, a little noise moves the minimum far. The summed loss
# is a negative log-likelihood, and its curvature at the minimum, :math:`N L''(w)`, is
# known as the observed Fisher information. Its inverse estimates the variance of a
# maximum likelihood fit. So for N validation samples, the standard error is
#
# .. math::
#     \sigma_w \approx \frac{1}{\sqrt{N \, L''(w)}} \, .

_, _, curvature = derivatives(make_scale(w_fit), Z_val, y_val)
standard_error = (len(y_val) * curvature) ** -0.5
print(f"w = {w_fit:.3f} with a standard error of {standard_error:.3f}")

# %%
# Our data are generated, so we can test this: draw 60 fresh validation sets, fit a
# weight on each, and look at the spread. The formula assumes that the scaled network's
# probabilities are true, and 60 sets give a rough spread. So we only ask that the
# standard error is not off by more than 60 percent of the spread.

fresh = [draw_data(len(y_val)) for _ in range(60)]
weights = torch.tensor([fit(network(X), y)[0] for X, y in fresh])
spread = weights.std().item()

print(f"spread over 60 validation sets: {spread:.3f}")
torch.testing.assert_close(standard_error, spread, rtol=0.6, atol=0)

# %%
# The formula also tells how large a validation set must be: four times as many samples
# halve the standard error.
#
# What freezing saves
# -------------------
# The backward pass goes only as far as someone needs a gradient, and BackPACK's V goes
# with it. ``backpack`` calls its ``extension_hook`` after it has treated a layer. So we
# can see where it was, with a network that is to be trained and with a frozen one.
# (What is extended already, ``extend`` leaves as it is.)


def visited_layers(model: nn.Module) -> list[str]:
    """Return the layers that BackPACK treats in one backward pass, in order."""
    names = []
    loss = loss_function(model(X_val), y_val)
    with backpack(
        make_diag_ggn(), extension_hook=lambda layer: names.append(type(layer).__name__)
    ):
        loss.backward()
    return names


model = extend(nn.Sequential(*network, make_scale(w_fit)))
for name, parts in [("trained", model), ("frozen", model[-1])]:
    model.requires_grad_(False)
    parts.requires_grad_(True)
    visited = visited_layers(model)
    print(f"{name:>7}: {' > '.join(visited)}")

if visited != ["CrossEntropyLoss", "ScaleModule"]:
    raise RuntimeError("BackPACK went into the frozen network.")

# %%
# With the network frozen, BackPACK stops at the scale module, and V never has the shape
# of a hidden layer. The forward pass through the network remains. In the fit above it
# is gone, too, as we computed the logits once. We time one evaluation of loss, gradient
# and curvature in three ways, taking turns, and print medians as multiples of the last.
# (They depend on the machine.)


def evaluate(module: nn.Module, inputs: Tensor) -> None:
    """Run one forward and one backward pass with the GGN diagonal."""
    loss = loss_function(module(inputs), y_val)
    with backpack(make_diag_ggn()):
        loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()


seconds = {"trained": [], "frozen": [], "frozen, logits computed once": []}
for _ in range(15):
    for name, times in seconds.items():
        model.requires_grad_(name == "trained")
        model[-1].requires_grad_(True)
        module, inputs = (model[-1], Z_val) if "once" in name else (model, X_val)
        start = perf_counter()
        evaluate(module, inputs)
        times.append(perf_counter() - start)

fastest = median(seconds["frozen, logits computed once"])
for name, times in seconds.items():
    print(f"{name:<28} {median(times) / fastest:5.1f}")

# %%
# What was verified
# -----------------
# BackPACK's gradient and curvature agree with ``torch.func`` in float64, and so do the
# formulas; the GGN is the Hessian. ``backpropagate`` agrees with a VJP, and the GGN
# diagonal of the whole model with Jacobians from ``jacrev``. Undamped, Newton's method
# diverged from :math:`w = 1`; with a line search it converged to where gradient descent
# ends. On test data no prediction changed, the ECE fell by at least half and the
# cross-entropy by at least 15%. The standard error from the curvature fits the spread
# over fresh validation sets, up to the stated tolerance. With the network frozen,
# BackPACK did not enter it.
#
# **Next:** `Laplace approximation with the GGN diagonal <2_laplace.html>`_ uses the
# curvature of all parameters, to know what a network can't know.
#
# Temperature scaling, ECE and reliability diagrams: C. Guo, G. Pleiss, Y. Sun, K. Q.
# Weinberger, "On Calibration of Modern Neural Networks", ICML 2017,
# `arXiv:1706.04599 <https://arxiv.org/abs/1706.04599>`_. BackPACK: F. Dangel, F.
# Kunstner, P. Hennig, "BackPACK: Packing more into Backprop", ICLR 2020,
# `arXiv:1912.10985 <https://arxiv.org/abs/1912.10985>`_.
