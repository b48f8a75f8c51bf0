r"""
The GGN and its diagonal, derived
=================================

After this page you know what V is, why its squared entries, summed over the columns,
are the diagonal of the generalized Gauss-Newton matrix (GGN), and which two products a
layer has to contribute.

We will:

1. define the GGN and evaluate it on a network with three layers;
2. take a square root of the loss's Hessian, and with it a square root V of the GGN;
3. read the diagonal off V;
4. split V into one block for each layer, and compute the blocks by two recursions;
5. write the recursions down for the scale module, for one sample and for a batch;
6. see where GGN and Hessian agree, and where they do not.

You should know Jacobians and the chain rule. BackPACK runs only once, when we look at
its square root. The code below each equation evaluates it, in float64, with the
Jacobians and Hessians of ``torch.func``.
"""

import matplotlib.pyplot as plt
import torch
from backpack import extend
from backpack.core.derivatives.crossentropyloss import CrossEntropyLossDerivatives
from einops import einsum
from torch import Tensor, nn
from torch.func import hessian, jacrev, vmap

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# %%
# The network
# -----------
# A network is a chain of layers. Layer :math:`k` has parameters :math:`\theta^{(k)}`
# and maps :math:`x^{(k-1)}` to :math:`x^{(k)}`:
#
# .. math::
#     x^{(0)} &= x \, , \\
#     x^{(k)} &= f^{(k)}(x^{(k-1)}; \theta^{(k)})
#     \qquad k = 1, \dots, K \, , \\
#     f_\theta(x) &= x^{(K)} \, .
#
# Ours has :math:`K = 3` layers: a linear layer with a sigmoid, the scale module, and a
# linear layer. Each is a function of its flat parameter vector and its input. First we
# look at one sample; the batch comes later. D features go in, H hidden features are
# in the middle, and C outputs come out, one for each class.

D, H, C = 3, 2, 4


def layer_1(theta: Tensor, x: Tensor) -> Tensor:
    """Apply a linear layer and a sigmoid to ``x`` of shape ``[D]``."""
    weight, bias = theta[: H * D].reshape(H, D), theta[H * D :]
    return torch.sigmoid(weight @ x + bias)


def layer_2(theta: Tensor, x: Tensor) -> Tensor:
    """Scale ``x`` of shape ``[H]``: the scale module."""
    return theta * x


def layer_3(theta: Tensor, x: Tensor) -> Tensor:
    """Apply a linear layer to ``x`` of shape ``[H]``."""
    weight, bias = theta[: C * H].reshape(C, H), theta[C * H :]
    return weight @ x + bias


# %%
# The parameter vector :math:`\theta` of the network holds the parameters of all
# layers, one after the other. It has :math:`p` entries.
#
# .. math::
#     \theta =
#     \begin{pmatrix}
#         \theta^{(1)} \\ \vdots \\ \theta^{(K)}
#     \end{pmatrix}
#     \in \mathbb{R}^p

layers = [layer_1, layer_2, layer_3]
sizes = [H * D + H, 1, C * H + C]
p = sum(sizes)

theta = torch.randn(p, dtype=torch.float64, device=device)
theta[sizes[0]] = 2.0  # the scale weight
x = torch.randn(D, dtype=torch.float64, device=device)
y = torch.tensor(2, device=device)


def network(theta: Tensor, x: Tensor) -> Tensor:
    """Return the network's output, shape ``[C]``, for one sample of shape ``[D]``."""
    for layer, theta_k in zip(layers, theta.split(sizes), strict=True):
        x = layer(theta_k, x)
    return x


print(f"p = {p} parameters, by layer: {sizes}")

# %%
# The loss :math:`\ell(f, y)` compares the output :math:`f = f_\theta(x)` with a label.
# We use softmax cross-entropy.


def loss(f: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of the output ``f`` of shape ``[C]``, a scalar."""
    return nn.functional.cross_entropy(f.unsqueeze(0), y.unsqueeze(0))


# %%
# The GGN
# -------
# The Jacobian :math:`\mathrm{J}_\theta f` holds the derivative of each output with
# respect to each parameter. The Hessian :math:`\nabla_f^2 \ell` holds the second
# derivatives of the loss with respect to the output. The GGN multiplies the Hessian
# with the Jacobian from both sides:
#
# .. math::
#     G(\theta) =
#     (\mathrm{J}_\theta f)^\top \;
#     \nabla_f^2 \ell(f, y) \;
#     (\mathrm{J}_\theta f)
#     \qquad \in \mathbb{R}^{p \times p}

f = network(theta, x)
J = jacrev(network)(theta, x)
loss_hessian = hessian(loss)(f, y)

G = J.T @ loss_hessian @ J
print(f"J {list(J.shape)}, loss Hessian {list(loss_hessian.shape)}, G {list(G.shape)}")

# %%
# The GGN of a network with a million parameters has :math:`10^{12}` entries, 4 TB in
# float32. Its diagonal has a million, 4 MB. The way to it leads through a square root.
#
# A square root of the loss's Hessian
# -----------------------------------
# Cross-entropy is convex in :math:`f`: no eigenvalue of its Hessian is negative (up to
# rounding). So the Hessian has a real square root. By this we mean any matrix :math:`S`
# with
#
# .. math::
#     \nabla_f^2 \ell = S S^\top \, .

eigenvalues = torch.linalg.eigvalsh(loss_hessian)
torch.testing.assert_close(eigenvalues, eigenvalues.clamp(min=0))
print(f"largest eigenvalue: {eigenvalues.max():.4f}, none is negative")

# %%
# For softmax cross-entropy :math:`S` is known in closed form. With the probabilities
# :math:`\pi = \operatorname{softmax}(f)`, the Hessian is
#
# .. math::
#     \nabla_f^2 \ell = \operatorname{diag}(\pi) - \pi \pi^\top \, ,

pi = f.softmax(0)
torch.testing.assert_close(loss_hessian, pi.diag() - pi.outer(pi))

# %%
# and a square root is
#
# .. math::
#     S = \operatorname{diag}(\sqrt{\pi}) - \pi \sqrt{\pi}^\top
#     \qquad \in \mathbb{R}^{C \times C} \, .
#
# Multiply it out to see why: each of the three further terms of :math:`S S^\top` is
# :math:`\pm \pi \pi^\top`, because :math:`\operatorname{diag}(\sqrt{\pi}) \sqrt{\pi} =
# \pi` and :math:`\sqrt{\pi}^\top \sqrt{\pi} = \sum_c \pi_c = 1`.

S = pi.sqrt().diag() - pi.outer(pi.sqrt())
torch.testing.assert_close(pi.sqrt().diag() @ pi.sqrt(), pi)
torch.testing.assert_close(pi.sqrt() @ pi.sqrt(), torch.ones_like(pi.sum()))
torch.testing.assert_close(S @ S.T, loss_hessian)

# %%
# BackPACK uses the same :math:`S`. It stores its C columns along the first axis, then
# the N samples, then the C outputs: ``[C, N, C]``. (It computes S from what an extended
# loss remembers of its forward pass. The two ``None`` stand for gradients that
# cross-entropy does not need.)

loss_function = extend(nn.CrossEntropyLoss())
loss_function(f.unsqueeze(0), y.unsqueeze(0))
S_backpack = CrossEntropyLossDerivatives().sqrt_hessian(loss_function, None, None)

print(f"S in BackPACK: {list(S_backpack.shape)}")
torch.testing.assert_close(S_backpack[:, 0, :].T, S)

# %%
# A square root of the GGN
# ------------------------
# Put :math:`S S^\top` into the definition of the GGN, and it factors into a matrix
# times its transpose:
#
# .. math::
#     V = (\mathrm{J}_\theta f)^\top S
#     \quad \in \mathbb{R}^{p \times C} \, ,
#     \qquad
#     G = V V^\top \, .

V = J.T @ S
torch.testing.assert_close(V @ V.T, G)
print(f"V {list(V.shape)}: one row per parameter, one column per class")

# %%
# What do the columns mean? **If the label were** :math:`c`, the gradient of the loss
# with respect to the output would be :math:`\pi - e_c`, with the unit vector
# :math:`e_c`. Column :math:`c` of :math:`S` is this gradient times a factor:
#
# .. math::
#     S_{:, c} = \sqrt{\pi_c} \, (e_c - \pi)
#     = -\sqrt{\pi_c} \; \nabla_f \, \ell(f, c) \, .

labels = torch.arange(C, device=device)


def losses(f: Tensor) -> Tensor:
    """Return the loss of the output ``f`` for each possible label, shape ``[C]``."""
    return vmap(loss, (None, 0))(f, labels)


unit_vectors = torch.eye(C, dtype=torch.float64, device=device)  # e_c is column c
torch.testing.assert_close(S, pi.sqrt() * (unit_vectors - pi.unsqueeze(1)))
torch.testing.assert_close(S, -(pi.sqrt() * jacrev(losses)(f).T))

# %%
# Multiply with the transposed Jacobian: column :math:`c` of V is the gradient with
# respect to the parameters, times the same factor.
#
# .. math::
#     V_{:, c} = -\sqrt{\pi_c} \; g_c \, ,
#     \qquad
#     g_c = \nabla_\theta \, \ell(f_\theta(x), c) \, .

gradients = jacrev(lambda theta: losses(network(theta, x)))(theta)  # a row per label
torch.testing.assert_close(V, -(pi.sqrt() * gradients.T))

# %%
# This is why, for softmax cross-entropy, the GGN is also the Fisher information matrix:
# the mean of the gradient's outer product, over labels drawn with probabilities
# :math:`\pi`.
#
# .. math::
#     G = \sum_{c=1}^{C} \pi_c \; g_c \, g_c^\top

torch.testing.assert_close(G, einsum(pi, gradients, gradients, "c, c i, c j -> i j"))

# %%
# The diagonal
# ------------
# Entry :math:`(i, i)` of :math:`V V^\top` is row :math:`i` of V times itself:
#
# .. math::
#     \operatorname{diag}(G)_i = \sum_{c=1}^{C} V_{ic}^2 \, .
#
# Square first, then sum over the columns. Neither :math:`G` nor any other
# :math:`p \times p` matrix is needed.

diagonal = V.square().sum(1)
torch.testing.assert_close(diagonal, G.diagonal())

# %%
# The picture shows J, S, V, G and its diagonal. Lines separate the layers; the narrow
# block between two lines belongs to the scale module. V is tall and thin; G, which we
# avoid, is large. (Purple is positive, orange negative. Each panel has its own scale,
# and small entries are exaggerated so that they can be seen.)

edges = torch.tensor([0, *sizes]).cumsum(0)[1:-1] - 0.5
matrices = {"J": J, "S": S, "V": V, "G": G, "diag(G)": diagonal.unsqueeze(1)}

fig, axes = plt.subplot_mosaic(
    [["J", "J", "S", "."], ["V", "G", "G", "diag(G)"]],
    figsize=(7.5, 6.6),
    width_ratios=[C, p / 2, p / 2, 2],
    height_ratios=[C, p],
    layout="constrained",
)
for name, ax in axes.items():
    matrix = matrices[name].cpu()
    matrix = matrix.sign() * matrix.abs().sqrt()
    limit = matrix.abs().max()
    ax.imshow(matrix, cmap="PuOr", vmin=-limit, vmax=limit)
    ax.set_title(f"${name}$" if len(name) == 1 else "diag $G$")
    ax.set(xticks=[], yticks=[])
    if name in ["V", "G", "diag(G)"]:
        ax.hlines(edges, *ax.get_xlim(), color="black", linewidth=0.8)
        ax.set_ylabel("parameters")
    if name in ["J", "G"]:
        ax.vlines(edges, *ax.get_ylim(), color="black", linewidth=0.8)
        ax.set_xlabel("parameters")
    if name in ["S", "V"]:
        ax.set_xlabel("columns")
    if name in ["J", "S"]:
        ax.set_ylabel("outputs")
plt.show()

# %%
# One block for each layer
# ------------------------
# The Jacobian inherits the order of the parameters: the blocks of the layers stand side
# by side. V, which holds the transposed Jacobian, has them one below the other:
#
# .. math::
#     \mathrm{J}_\theta f =
#     \begin{pmatrix}
#         \mathrm{J}_{\theta^{(1)}} f & \dots & \mathrm{J}_{\theta^{(K)}} f
#     \end{pmatrix} \, ,
#     \qquad
#     V =
#     \begin{pmatrix}
#         V_{\theta^{(1)}} \\ \vdots \\ V_{\theta^{(K)}}
#     \end{pmatrix} \, ,
#     \qquad
#     V_{\theta^{(k)}} = (\mathrm{J}_{\theta^{(k)}} f)^\top S \, .


def output(theta_1: Tensor, theta_2: Tensor, theta_3: Tensor) -> Tensor:
    """Return the network's output, shape ``[C]``, with parameters by layer."""
    return network(torch.cat([theta_1, theta_2, theta_3]), x)


J_blocks = jacrev(output, argnums=(0, 1, 2))(*theta.split(sizes))
torch.testing.assert_close(torch.cat(J_blocks, dim=1), J)
torch.testing.assert_close(torch.cat([J_k.T @ S for J_k in J_blocks]), V)

# %%
# Two recursions
# --------------
# The parameters of layer :math:`k` reach the output only through that layer's output
# :math:`x^{(k)}`. So does the layer's input :math:`x^{(k-1)}`. The chain rule says:
#
# .. math::
#     \mathrm{J}_{\theta^{(k)}} f &=
#     (\mathrm{J}_{x^{(k)}} f) \,
#     (\mathrm{J}_{\theta^{(k)}} x^{(k)}) \, ,
#     \\
#     \mathrm{J}_{x^{(k-1)}} f &=
#     (\mathrm{J}_{x^{(k)}} f) \,
#     (\mathrm{J}_{x^{(k-1)}} x^{(k)}) \, .
#
# To evaluate both, we go from the last layer to the first, and start with
# :math:`\mathrm{J}_{x^{(K)}} f = I`. (The first line only reads what the second one
# carries on. We call both recursions, for short.)

xs = [x]
for layer, theta_k in zip(layers, theta.split(sizes), strict=True):
    xs.append(layer(theta_k, xs[-1]))

J_f = torch.eye(C, dtype=torch.float64, device=device)
for k in [3, 2, 1]:
    layer, theta_k = layers[k - 1], theta.split(sizes)[k - 1]
    J_theta, J_x = jacrev(layer, argnums=(0, 1))(theta_k, xs[k - 1])
    torch.testing.assert_close(J_f @ J_theta, J_blocks[k - 1])
    J_f = J_f @ J_x

torch.testing.assert_close(J_f, jacrev(network, argnums=1)(theta, x))

# %%
# Now transpose both equations, multiply with :math:`S` from the right, and write
# :math:`V_{x^{(k)}} = (\mathrm{J}_{x^{(k)}} f)^\top S`. What remains is a backward pass
# that starts with :math:`S` and uses, at each layer, the Jacobians of that layer alone:
#
# .. math::
#     V_{x^{(K)}} &= S \, , \\
#     V_{\theta^{(k)}} &=
#     (\mathrm{J}_{\theta^{(k)}} x^{(k)})^\top \, V_{x^{(k)}} \, , \\
#     V_{x^{(k-1)}} &=
#     (\mathrm{J}_{x^{(k-1)}} x^{(k)})^\top \, V_{x^{(k)}}
#     \qquad k = K, \dots, 1 \, .
#
# Note the two roles of V: :math:`V_{x^{(k)}}` is what travels backward, a square root
# of the GGN with respect to a layer's output (:math:`G` with :math:`x^{(k)}` in the
# place of :math:`\theta`). :math:`V_{\theta^{(k)}}` is what a layer computes from it,
# its block of V.

V_x = {3: S}
V_theta = {}
for k in [3, 2, 1]:
    layer, theta_k = layers[k - 1], theta.split(sizes)[k - 1]
    J_theta, J_x = jacrev(layer, argnums=(0, 1))(theta_k, xs[k - 1])
    V_theta[k] = J_theta.T @ V_x[k]
    V_x[k - 1] = J_x.T @ V_x[k]
    shapes = [list(V_theta[k].shape), list(V_x[k - 1].shape)]
    print(f"layer {k}: V_theta[{k}] {shapes[0]}, V_x[{k - 1}] {shapes[1]}")

# %%
# The stacked blocks are V. The recursion's last :math:`V_x` belongs to the network's
# input; no parameter needs it. (BackPACK leaves it out unless the input requires a
# gradient.)

torch.testing.assert_close(torch.cat([V_theta[1], V_theta[2], V_theta[3]]), V)
torch.testing.assert_close(V_x[0], jacrev(network, argnums=1)(theta, x).T @ S)

# %%
# This is how BackPACK computes the GGN diagonal. Layer :math:`k` receives
# :math:`V_{x^{(k)}}`. It (i) computes :math:`V_{\theta^{(k)}}`, squares it, and sums
# over columns: that is the diagonal for its parameters. It (ii) computes
# :math:`V_{x^{(k-1)}}` and hands it to the layer before. To teach BackPACK a layer
# means to write these two products.
#
# The scale module
# ----------------
# For :math:`x^{(2)} = w x^{(1)}` the two Jacobians are :math:`\mathrm{J}_w x^{(2)} =
# x^{(1)}` (one column) and :math:`\mathrm{J}_{x^{(1)}} x^{(2)} = w I`. We write
# :math:`V_\text{out} = V_{x^{(2)}}` for what the layer receives, :math:`V_\text{in} =
# V_{x^{(1)}}` for what it sends on, and :math:`V_w = V_{\theta^{(2)}}`. The recursions
# become
#
# .. math::
#     V_w = {x^{(1)}}^\top V_\text{out} \, ,
#     \qquad
#     V_\text{in} = w \, V_\text{out} \, .

w = theta.split(sizes)[1]
J_w, J_x = jacrev(layer_2, argnums=(0, 1))(w, xs[1])
torch.testing.assert_close(J_w, xs[1].unsqueeze(1))
torch.testing.assert_close(J_x, w * torch.eye(H).to(w))

torch.testing.assert_close(xs[1].unsqueeze(0) @ V_x[2], V_theta[2])
torch.testing.assert_close(w * V_x[2], V_x[1])

# %%
# A batch
# -------
# With :math:`N` samples and ``reduction="sum"``, the loss is a sum over samples. No
# output of one sample depends on another, so the GGN is a sum, too:
# :math:`G = \sum_n G_n`. We compare with the definition, applied to the whole batch and
# all its :math:`N C` outputs.

N = 5
X = torch.randn(N, D, dtype=torch.float64, device=device)
Y = torch.randint(C, (N,), device=device)


def ggn(x: Tensor, y: Tensor) -> Tensor:
    """Return the GGN of one sample, shape ``[p, p]``."""
    J = jacrev(network)(theta, x)
    return J.T @ hessian(loss)(network(theta, x), y) @ J


def ggn_of_batch(reduction: str) -> Tensor:
    """Return the GGN of a batch by its definition, shape ``[p, p]``."""
    outputs = vmap(network, (None, 0))(theta, X)
    J = jacrev(lambda theta: vmap(network, (None, 0))(theta, X))(theta)
    batch_loss = nn.CrossEntropyLoss(reduction=reduction)
    batch_hessian = hessian(lambda outputs: batch_loss(outputs, Y))(outputs)
    return einsum(J, batch_hessian, J, "n c i, n c m k, m k j -> i j")


G_batch = ggn_of_batch("sum")
torch.testing.assert_close(vmap(ggn)(X, Y).sum(0), G_batch)

# %%
# Each sample has C columns, so V of the batch has :math:`N C`. For the batch,
# :math:`V_{x^{(k)}}` has a row for each output of layer :math:`k` and each sample. A
# column belongs to one sample: it is zero in the rows of all others. The zeros are not
# stored: BackPACK keeps ``[C, N, *]``, columns first, then samples, then the axes of
# one sample, here H features. The diagonal for the scale weight is
#
# .. math::
#     \operatorname{diag}(G)_w =
#     \sum_{n=1}^{N} \sum_{c=1}^{C}
#     \Big( \sum_{d} x_{nd} \, V_\text{out}[c, n, d] \Big)^2 \, .
#
# Here :math:`x_n` is the input of the scale module for sample :math:`n`, and :math:`d`
# runs over its H features. We build :math:`V_\text{out}` from S and the Jacobian of
# layer 3 with respect to its input, the weight matrix.

expected = G_batch[sizes[0], sizes[0]]
theta_1, theta_2, theta_3 = theta.split(sizes)
X_scale = vmap(layer_1, (None, 0))(theta_1, X)
Pi = vmap(network, (None, 0))(theta, X).softmax(1)
# S_batch, [N, C, C]: samples n, outputs i, columns c
S_batch = Pi.sqrt().diag_embed() - einsum(Pi, Pi.sqrt(), "n i, n c -> n i c")

weight_3 = theta_3[: C * H].reshape(C, H)
V_out = einsum(weight_3, S_batch, "i d, n i c -> c n d")
V_w = einsum(X_scale, V_out, "n d, c n d -> c n")

torch.testing.assert_close(V_w.square().sum(), expected)
print(f"V_out {list(V_out.shape)}, V_w {list(V_w.shape)}: diagonal {expected:.4f}")

# %%
# The order of sums and squares matters. Two tempting variants give other numbers: to
# sum over the samples before the square, and to square before the sum over features.

samples_first = V_w.sum(1).square().sum()
features_last = einsum(X_scale.square(), V_out.square(), "n d, c n d ->")
print(f"right: {expected:.4f}")
print(f"samples summed before the square: {samples_first:.4f}")
print(f"squared before the sum over features: {features_last:.4f}")

for wrong in [samples_first, features_last]:
    if torch.isclose(wrong, expected):
        raise RuntimeError("The order makes no difference here.")

# %%
# With ``reduction="mean"``, the loss is divided by :math:`N`, and so are its Hessian
# and the GGN. :math:`S` and V are divided by :math:`\sqrt{N}`. (With ``nn.MSELoss`` it
# is :math:`N C` and :math:`\sqrt{N C}`.) All of this ends up in :math:`S`; the two
# products of a layer stay the same.

torch.testing.assert_close(ggn_of_batch("mean"), G_batch / N)
V_w_of_mean = einsum(X_scale, V_out / N**0.5, "n d, c n d -> c n")
torch.testing.assert_close(V_w_of_mean.square().sum(), expected / N)

# Any [N, C] tensor serves to find the divisor.
mean, total = (nn.MSELoss(reduction=r)(Pi, 0 * Pi) for r in ["mean", "sum"])
torch.testing.assert_close(mean, total / (N * C))

# %%
# GGN and Hessian
# ---------------
# One sample again. The Hessian of its loss with respect to the parameters has a second
# term. It contains the second derivatives of the network, weighted by the gradient of
# the loss:
#
# .. math::
#     \nabla_\theta^2 \, \ell(f_\theta(x), y) =
#     G + \sum_{c=1}^{C} [\nabla_f \ell]_c \; \nabla_\theta^2 [f_\theta(x)]_c

full_hessian = hessian(lambda theta: loss(network(theta, x), y))(theta)
loss_gradient = jacrev(loss)(f, y)
second_term = einsum(loss_gradient, hessian(network)(theta, x), "c, c i j -> i j")
torch.testing.assert_close(full_hessian, G + second_term)

# %%
# Hessian and GGN agree if the network is an affine function of its parameters (linear
# plus a constant). Our network as a whole is not, but it is affine in the scale weight
# alone, and in the last layer's parameters alone. So the blocks of these two agree. The
# block of the first layer, which the sigmoid makes nonlinear, does not.

blocks = dict(zip([1, 2, 3], torch.arange(p).split(sizes), strict=True))
for k, block in blocks.items():
    difference = (full_hessian - G)[block][:, block].abs().max()
    print(f"layer {k}: largest difference between Hessian and GGN {difference:.4f}")

for k in [2, 3]:
    block = blocks[k]
    torch.testing.assert_close(full_hessian[block][:, block], G[block][:, block])

if torch.allclose(full_hessian[blocks[1]][:, blocks[1]], G[blocks[1]][:, blocks[1]]):
    raise RuntimeError("The blocks of the first layer should differ.")

# %%
# The Hessian may have negative eigenvalues; the GGN, as :math:`V V^\top`, has none. So
# the quadratic model that an optimizer builds with it has no downward curvature. The
# picture shows where the two differ: in the first layer's block, and in the blocks off
# the diagonal, where the row belongs to one layer and the column to another.

lowest_hessian = torch.linalg.eigvalsh(full_hessian).min()
lowest_ggn = torch.linalg.eigvalsh(G).min()
torch.testing.assert_close(lowest_ggn, lowest_ggn.clamp(min=0))
print(f"lowest eigenvalue of the Hessian: {lowest_hessian:.4f}")

fig, axes = plt.subplots(1, 3, figsize=(8, 3.2), layout="constrained")
limit = max(full_hessian.abs().max(), G.abs().max()).item()
titles = ["Hessian", "GGN", "Hessian minus GGN"]
for ax, title, matrix in zip(
    axes, titles, [full_hessian, G, full_hessian - G], strict=True
):
    image = ax.imshow(matrix.cpu(), cmap="PuOr", vmin=-limit, vmax=limit)
    ax.hlines(edges, *ax.get_xlim(), color="black", linewidth=0.8)
    ax.vlines(edges, *ax.get_ylim(), color="black", linewidth=0.8)
    middles = [block.double().mean().item() for block in blocks.values()]
    ax.set(title=title, xlabel="parameters of layer")
    ax.set_xticks(middles, blocks)
    ax.set_yticks(middles, blocks)
axes[0].set_ylabel("parameters of layer")
fig.colorbar(image, ax=axes, shrink=0.8, label="second derivative")
plt.show()

# %%
# What was verified
# -----------------
# Every equation of this page, except for definitions, was evaluated in float64 and
# compared at the default tolerance of ``torch.testing.assert_close``: the square root
# of the loss's Hessian, also against the one that BackPACK uses; two more forms of the
# GGN, :math:`V V^\top` and the Fisher; its diagonal; the stacks; both recursions; the
# two products of the scale module; the batch, for ``sum`` and ``mean``; the difference
# between GGN and Hessian, with the blocks where it vanishes.
#
# **Next:** `The GGN diagonal, backpropagated <4_ggn_diagonal.html>`_ turns the two
# products into code.
#
# The GGN: N. N. Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order
# Gradient Descent", Neural Computation 14(7), 2002; J. Martens, "New Insights and
# Perspectives on the Natural Gradient Method", JMLR 21, 2020, `arXiv:1412.1193
# <https://arxiv.org/abs/1412.1193>`_. Its backpropagation: F. Dangel, F. Kunstner, P.
# Hennig, "BackPACK: Packing more into Backprop", ICLR 2020, `arXiv:1912.10985
# <https://arxiv.org/abs/1912.10985>`_.
