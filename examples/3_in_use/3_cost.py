r"""
What it costs
=============

After this page you know what individual gradients and the GGN diagonal cost in time and
in memory, beside a plain backward pass and beside the other ways to get them.

We will:

1. make sure that all ways compute the same numbers;
2. build a stopwatch and a memory meter that can be trusted, and test the meter;
3. measure time and memory over the batch size;
4. measure them over the number of classes C, explain the growth of V, and check an
   estimate of its memory;
5. see how near ``weight`` and ``backpropagate`` of the GGN diagonal come to the least
   that they can cost.

You should know the two module extensions for ``ScaleModule``: `Individual gradients
<../1_scale_module/2_individual_gradients.html>`_ and `The GGN diagonal, backpropagated
<../1_scale_module/4_ggn_diagonal.html>`_. The letters: N samples, T steps of a
sequence, D features, C classes, V for the square root of the GGN that travels backward.

All times on this page are **ratios**, measured in turns in one run. They depend on the
machine and on what else it does. The figures show how far they scatter.
"""

import copy
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad, DiagGGNExact
from backpack.extensions.firstorder.base import FirstOrderModuleExtension
from backpack.extensions.module_extension import ModuleExtension
from backpack.hessianfree.ggnvp import ggn_vector_product_from_plist
from backpack.utils.convert_parameters import vector_to_parameter_list
from backpack.utils.subsampling import subsample
from einops import einsum
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vjp, vmap
from torch.nn.utils import parameters_to_vector
from torch.profiler import ProfilerActivity, profile

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# %%
# The layer and its extensions
# ----------------------------
# As on the pages before. Mind one detail: in ``ScaleModuleDiagGGNExact``, the einsum
# takes the layer's input first and V second. The last part of this page says why.


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
# The extension for individual gradients:


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
# The extension for the GGN diagonal has two methods, and both handle all C columns of V
# at once.


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
# A first attempt at ``backpropagate`` often takes the columns of V one at a time. It is
# easier to think of one VJP than of C. We will see what it costs.


class ScaleModuleDiagGGNExactLoop(ScaleModuleDiagGGNExact):
    """``ScaleModuleDiagGGNExact`` that backpropagates V column by column."""

    def backpropagate(
        self,
        ext: DiagGGNExact,
        module: ScaleModule,
        g_inp: tuple[Tensor | None, ...],
        g_out: tuple[Tensor],
        V_out: Tensor,
    ) -> Tensor:
        """Multiply each column of V with the transposed Jacobian.

        Args:
            ext: The running extension (not needed).
            module: The layer; ``module.weight`` has shape ``[1]``.
            g_inp: Gradients with respect to the layer's inputs (not needed).
            g_out: Gradient with respect to the layer's output (not needed).
            V_out: Square root with respect to the layer's output, ``[C, N, *]``.

        Returns:
            Square root with respect to the layer's input, shape ``[C, N, *]``.
        """
        V_in = torch.zeros_like(V_out)
        for c in range(len(V_out)):
            V_in[c] = module.weight * V_out[c]
        return V_in


# %%
# Each backward pass gets a new extension object, with our module extension registered
# in it. (One that is used again can pick up a V that an earlier pass left behind: V is
# kept by the memory address of the tensor that it belongs to, and a later tensor may
# get the same address.)


def make_batch_grad(subsampling: list[int] | None = None) -> BatchGrad:
    """Build a ``BatchGrad`` that supports ``ScaleModule``.

    Args:
        subsampling: Indices of the samples to compute. Default: all.
    """
    extension = BatchGrad(subsampling=subsampling)
    extension.set_module_extension(ScaleModule, ScaleModuleBatchGrad())
    return extension


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
# What is compared
# ----------------
# The costs depend on which parameters are trained, so there are two settings: **only
# the scale weights**, with the linear layers frozen, and **all parameters**. Both scale
# modules stand behind a linear layer, so that their width is H, that of the hidden
# layers.

D = 32


def make_network(C: int, only_scales: bool, H: int) -> nn.Sequential:
    """Build a classifier with two scale modules.

    Args:
        C: Number of classes.
        only_scales: Whether the linear layers are frozen.
        H: Width of the hidden layers.

    Returns:
        Network that maps ``[N, D]`` to ``[N, C]``.
    """
    body = [nn.Linear(D, H), ScaleModule(), nn.Tanh()]
    head = [nn.Linear(H, H), ScaleModule(-0.7), nn.Linear(H, C)]
    network = nn.Sequential(*body, *head)
    for layer in network:
        layer.requires_grad_(isinstance(layer, ScaleModule) or not only_scales)
    return network


# %%
# Hooks take time too. So the plain backward pass, which all others are compared with,
# runs on a network without them, and BackPACK on an extended twin. We sum over the
# samples, so that there is no factor 1/N between the ways.


class Problem:
    """A network, an extended twin with the same parameters, and a batch."""

    def __init__(
        self,
        N: int,
        C: int,
        only_scales: bool = True,
        H: int = 48,
        dtype: torch.dtype = torch.float32,
    ):
        """Draw network, inputs ``X`` of shape ``[N, D]`` and classes ``y``, ``[N]``.

        Args:
            N: Number of samples.
            C: Number of classes.
            only_scales: Whether the linear layers are frozen.
            H: Width of the hidden layers.
            dtype: Data type of parameters and inputs.
        """
        self.network = make_network(C, only_scales, H).to(device, dtype)
        self.loss_function = nn.CrossEntropyLoss(reduction="sum")
        self.extended = extend(copy.deepcopy(self.network))
        self.extended_loss_function = extend(copy.deepcopy(self.loss_function))
        self.X = torch.randn(N, D, dtype=dtype, device=device)
        self.y = torch.randint(C, (N,), device=device)


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are not frozen, by name."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


# %%
# Now the ways. Each is one function of a problem, and includes the forward pass. First
# the yardstick, then BackPACK.


def plain_backward(problem: Problem) -> None:
    """Compute the gradient, and nothing else."""
    problem.loss_function(problem.network(problem.X), problem.y).backward()


def batch_grad(
    problem: Problem, subsampling: list[int] | None = None
) -> dict[str, Tensor]:
    """Compute individual gradients with BackPACK, ``[N, *]`` for each parameter."""
    with backpack(make_batch_grad(subsampling)):
        output = problem.extended(problem.X)
        problem.extended_loss_function(output, problem.y).backward()
    return {name: p.grad_batch for name, p in trained(problem.extended).items()}


def diag_ggn(
    problem: Problem,
    module_extension_class: type[ModuleExtension] = ScaleModuleDiagGGNExact,
) -> dict[str, Tensor]:
    """Compute the GGN diagonal with BackPACK, in the shape of each parameter."""
    with backpack(make_diag_ggn(module_extension_class)):
        output = problem.extended(problem.X)
        problem.extended_loss_function(output, problem.y).backward()
    return {name: p.diag_ggn_exact for name, p in trained(problem.extended).items()}


# %%
# Individual gradients without BackPACK: a loop over samples, and ``torch.func``. Both
# get no more to do than BackPACK. They differentiate with respect to the trained
# parameters only.


def loop_over_samples(problem: Problem) -> dict[str, Tensor]:
    """Compute individual gradients one at a time, ``[N, *]`` for each parameter."""
    parameters = trained(problem.network)
    gradients = []
    for n in range(len(problem.X)):
        output = problem.network(problem.X[[n]])
        loss = problem.loss_function(output, problem.y[[n]])
        gradients.append(torch.autograd.grad(loss, list(parameters.values())))
    stacks = [torch.stack(g) for g in zip(*gradients, strict=True)]
    return dict(zip(parameters, stacks, strict=True))


def vmap_of_grad(problem: Problem) -> dict[str, Tensor]:
    """Compute individual gradients with ``torch.func``, ``[N, *]`` for each."""
    parameters = {name: p.detach() for name, p in problem.network.named_parameters()}
    variable = {name: parameters[name] for name in trained(problem.network)}

    def loss_of_sample(variable: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of one sample, as a function of the trained parameters."""
        values = {**parameters, **variable}
        output = functional_call(problem.network, values, x.unsqueeze(0))
        return problem.loss_function(output, y.unsqueeze(0))

    return vmap(grad(loss_of_sample), in_dims=(None, 0, 0))(
        variable, problem.X, problem.y
    )


# %%
# The GGN diagonal without module extensions: one GGN-vector product for each of the p
# trained numbers. It is our witness, and for p = 2 also a competitor.


def ggn_products(problem: Problem) -> dict[str, Tensor]:
    """Compute the GGN diagonal with p products, in the shape of each parameter."""
    parameters = trained(problem.network)
    values = list(parameters.values())
    output = problem.network(problem.X)
    loss = problem.loss_function(output, problem.y)
    diagonal = []
    for i, unit in enumerate(torch.eye(sum(p.numel() for p in values))):
        unit = vector_to_parameter_list(unit.to(output), values)
        column = ggn_vector_product_from_plist(loss, output, values, unit)
        diagonal.append(parameters_to_vector(column)[i])
    diagonal = vector_to_parameter_list(torch.stack(diagonal), values)
    return dict(zip(parameters, diagonal, strict=True))


# %%
# The same numbers
# ----------------
# A fast wrong answer is worth nothing. In float64, all ways to individual gradients
# must agree, for the scale weights alone and for all parameters, and BackPACK's also
# for a subset of the samples.

for only_scales in [True, False]:
    problem = Problem(N=6, C=5, only_scales=only_scales, dtype=torch.float64)
    expected = loop_over_samples(problem)
    torch.testing.assert_close(vmap_of_grad(problem), expected)
    torch.testing.assert_close(batch_grad(problem), expected)

    subset = [4, 1]
    expected = {name: g[subset] for name, g in expected.items()}
    torch.testing.assert_close(batch_grad(problem, subset), expected)

# %%
# The GGN diagonal of the scale weights, by products. V has to pass the second scale
# module to reach the first, so this is also a check of ``backpropagate``.

diag_ggn_classes = [ScaleModuleDiagGGNExact, ScaleModuleDiagGGNExactLoop]
problem = Problem(N=6, C=5, dtype=torch.float64)
expected = ggn_products(problem)

for module_extension_class in diag_ggn_classes:
    computed = diag_ggn(problem, module_extension_class)
    torch.testing.assert_close(computed, expected)

# %%
# The GGN diagonal of all parameters would take thousands of products. The network is
# small, so here is the definition, with Jacobians.

problem = Problem(N=6, C=5, only_scales=False, dtype=torch.float64)
parameters = {name: p.detach() for name, p in trained(problem.network).items()}


def logits(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return the output of the network for one sample, shape ``[C]``."""
    return functional_call(problem.network, parameters, x.unsqueeze(0)).squeeze(0)


pi = vmap(logits, in_dims=(None, 0))(parameters, problem.X).softmax(1)
loss_hessian = pi.diag_embed() - einsum(pi, pi, "n c, n k -> n c k")
jacobians = vmap(jacrev(logits), in_dims=(None, 0))(parameters, problem.X)
expected = {
    name: einsum(J, loss_hessian, J, "n c ..., n c k, n k ... -> ...")
    for name, J in jacobians.items()
}

for module_extension_class in diag_ggn_classes:
    computed = diag_ggn(problem, module_extension_class)
    torch.testing.assert_close(computed, expected)

# %%
# Squares hide the sign of V. So both methods are also called by hand, with random V for
# inputs ``[N, T, D]``, and compared with VJPs. For ``weight`` there is one VJP for each
# column and each sample, then come the squares and their sum.

layer = extend(ScaleModule(-1.5)).to(device, torch.float64)
X = torch.randn(6, 2, 3, dtype=torch.float64, device=device)
V = torch.randn(5, 6, 2, 3, dtype=torch.float64, device=device)
layer(X)

w = layer.weight.detach()
_, input_vjp = vjp(lambda X: w * X, X)
weight_vjp = vmap(lambda x, v: vjp(lambda w: w * x, w)[1](v)[0])
V_w = vmap(weight_vjp, in_dims=(None, 0))(X, V)  # [C, N, 1]

for module_extension in [extension_class() for extension_class in diag_ggn_classes]:
    V_in = module_extension.backpropagate(None, layer, None, None, V)
    torch.testing.assert_close(V_in, vmap(input_vjp)(V)[0])
    diagonal = module_extension.weight(None, layer, None, None, V)
    torch.testing.assert_close(diagonal, V_w.square().sum((0, 1)))

# %%
# The stopwatch
# -------------
# Other programs on the machine make a stopwatch lie. Four things keep it honest:
#
# - **in turns:** each round times every way once, and ratios are taken within a round,
#   so that a slow minute hits all ways alike. The order is drawn anew for each round,
#   because what ran before decides what is in the cache;
# - **long enough:** a fast call is repeated until a few milliseconds have passed;
# - **medians:** one disturbed round changes them little; quartiles show the scatter;
# - **one thread, CPU time:** on the CPU we let PyTorch use one thread, and read the
#   time that the processor spent on this process. With several threads, the others wait
#   busily for one that another program holds up, and this waiting counts.
#
# On a GPU, ``synchronize`` waits for the kernels, and the clock is the one on the wall.

if device.type == "cuda":
    clock, synchronize = time.perf_counter, torch.cuda.synchronize
else:
    clock, synchronize = time.process_time, lambda: None


def stopwatch(way: Callable[[], object], calls: int) -> float:
    """Return the seconds that ``calls`` calls of ``way`` take, for each call."""
    synchronize()
    start = clock()
    for _ in range(calls):
        way()
    synchronize()
    return (clock() - start) / calls


def calls_for(way: Callable[[], object], seconds: float = 0.002) -> int:
    """Return how many calls take at least ``seconds``.

    The first call is a warm-up: it counts only if it takes ten times as long.
    """
    calls = 1
    if stopwatch(way, calls) > 10 * seconds:
        return calls
    while calls * stopwatch(way, calls) < seconds:
        calls *= 2
    return calls


# %%
# The number of threads is put back at the end, whatever happens.


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread of the CPU in this context."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# %%
# Before the first round, we find out how many calls of a way fill 2 milliseconds. In
# each round, it is called that many times.

Times = dict[str, list[float]]


def time_in_turns(ways: dict[str, Callable[[], object]], rounds: int = 5) -> Times:
    """Time all ways, one after the other, again and again, in changing order.

    Args:
        ways: What to call.
        rounds: How often.

    Returns:
        Seconds for each way, one number for each round.
    """
    times = {name: [] for name in ways}
    with one_thread():
        calls = {name: calls_for(way) for name, way in ways.items()}
        for round_number in range(rounds):
            shuffled = random.Random(round_number).sample(list(ways), len(ways))
            for name in shuffled:
                times[name].append(stopwatch(ways[name], calls[name]))
    return times


def ratios(
    times: Times, name: str, reference: str = "plain backward"
) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile of the ratios of two ways."""
    pairs = zip(times[name], times[reference], strict=True)
    low, median, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    return low, median, high


# %%
# The memory meter
# ----------------
# CUDA's allocator records its peak. For the CPU, there is no such function, and what
# the operating system says about the process is coarse: it also sees Python, and memory
# that was freed but not given back. But PyTorch's **profiler** is told about every
# block that the CPU allocator hands out and takes back, those inside of operations
# included. It writes them into its trace, numbered in the order of time (``Ev Idx``),
# with negative sizes for those taken back. The highest running sum is the peak.

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no progress reports in the terminal


def peak_memory(way: Callable[[], object]) -> int:
    """Return the most bytes that ``way`` holds at a time, beyond what was there."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return torch.cuda.max_memory_allocated() - before

    activities = [ProfilerActivity.CPU]
    # One thread: with several, some operations take a small buffer for each.
    with one_thread(), profile(activities=activities, profile_memory=True) as profiler:
        way()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    blocks = [e["args"] for e in events if e["name"] == "[memory]"]
    blocks.sort(key=lambda block: block["Ev Idx"])
    held = peak = 0
    for block in blocks:
        held += block["Bytes"]
        peak = max(peak, held)
    return peak


# %%
# A meter must be tested on something known. Here are three blocks, of which at most two
# live at a time: 1024 and 2048 numbers, then 512 and 2048. A number has 4 bytes. (All
# three are multiples of 512 bytes, so CUDA's allocator need not round them up.) The
# peak is that of the first two, and neither the sum of all nor what is left at the end.


def known_need() -> None:
    """Hold at most 3072 numbers."""
    first = torch.empty(1024, device=device)
    second = torch.empty(2048, device=device)
    del first
    third = torch.empty(512, device=device)
    del second, third


torch.testing.assert_close(peak_memory(known_need), 4 * (1024 + 2048))

# %%
# Over the batch size
# -------------------
# Ten classes, one to 256 samples. For the memory, each way gets a new problem: what a
# backward pass stores for the first time counts, too, ``.grad`` included. Memory does
# not scatter, so one measurement is enough.

ways_over_N = {
    "BackPACK, BatchGrad": batch_grad,
    "BackPACK, DiagGGNExact": diag_ggn,
    "torch.func, vmap(grad)": vmap_of_grad,
    "loop over samples": loop_over_samples,
}
ways = {"plain backward": plain_backward, **ways_over_N}
settings = {"only the scale weights": True, "all parameters": False}
batch_sizes = [1, 4, 16, 64, 256]

times, peaks = {}, {}
for setting, only_scales in settings.items():
    for N in batch_sizes:
        problem = Problem(N, 10, only_scales)
        calls = {name: partial(way, problem) for name, way in ways.items()}
        times[setting, N] = time_in_turns(calls)
        for name, way in ways.items():
            call = partial(way, Problem(N, 10, only_scales))
            peaks[setting, N, name] = peak_memory(call)

# %%
# The bands reach from the lower to the upper quartile.

styles = dict(zip(ways_over_N, ["o-", "s--", "^-.", "D:"], strict=True))

fig, axes = plt.subplots(2, 2, figsize=(8, 7), layout="constrained", sharex=True)
for (above, below), setting in zip(axes.T, settings, strict=True):
    for i, (name, style) in enumerate(styles.items()):
        results = [ratios(times[setting, N], name) for N in batch_sizes]
        low, median, high = zip(*results, strict=True)
        above.plot(batch_sizes, median, style, color=f"C{i}", label=name)
        above.fill_between(batch_sizes, low, high, color=f"C{i}", alpha=0.25)
        memory = [
            peaks[setting, N, name] / peaks[setting, N, "plain backward"]
            for N in batch_sizes
        ]
        below.plot(batch_sizes, memory, style, color=f"C{i}")
    above.set_title(f"Time: {setting}")
    below.set_title(f"Peak memory: {setting}")
    below.set_xlabel("batch size N")
for ax in axes.flat:
    ax.set(xscale="log", yscale="log", ylabel="ratio to a plain backward")
    ax.set_xticks(batch_sizes, batch_sizes)
    ax.xaxis.minorticks_off()
    ax.axhline(1, color="0.4", linewidth=0.8)
handles, labels = axes[0, 0].get_legend_handles_labels()
fig.legend(handles, labels, loc="outside lower center", ncols=2)
plt.show()

# %%
# How to read it:
#
# - **BackPACK has a fixed cost.** Its hooks run Python code at each layer. For one
#   sample in a tiny network, the loop is the better choice. As the batch grows, there
#   is more work, and the cost matters less.
# - **The loop pays its fixed cost N times.** It repeats for each sample what the plain
#   pass does once for the batch.
# - **BatchGrad and vmap** do about the same work. Where all parameters are trained, the
#   memory shows what that is: N gradients in the place of one. (The ratio levels off
#   because what a plain backward pass stores grows with N, too.)
# - **The loop needs little memory** if the gradients are small: the graph of
#   one sample lives at a time. Where they are large, it needs them twice, as a list and
#   stacked.
# - **DiagGGNExact** carries V, which is 10 times as large as the gradient that
#   a plain backward carries, whether few parameters are trained or many.
#
# At 256 samples, the loop is slower than ``BatchGrad`` by far. This should hold on any
# machine. We check it on this one, with a wide margin.

for setting in settings:
    low, _, _ = ratios(times[setting, 256], "loop over samples", "BackPACK, BatchGrad")
    if low < 4:
        raise AssertionError(f"The loop is only {low:.1f} times as slow.")

# %%
# In a tiny network, most of what BackPACK adds is the fixed cost. With 512 hidden units
# and 1024 samples there is more to compute, and the ratio is nearer to 1.

wide = Problem(1024, 10, only_scales=True, H=512)
calls = {"plain backward": partial(plain_backward, wide)}
calls["BatchGrad"] = partial(batch_grad, wide)
low, median, high = ratios(time_in_turns(calls, rounds=15), "BatchGrad")
print(f"BatchGrad / plain backward: {median:.2f} (quartiles {low:.2f} to {high:.2f})")

# %%
# Over the number of classes
# --------------------------
# V has C columns for each sample. Let us see it where it passes: a subclass writes down
# the shapes. It must pass two of the checks from above, too: the products, and the VJP
# by hand.


class RecordingDiagGGNExact(ScaleModuleDiagGGNExact):
    """``ScaleModuleDiagGGNExact`` that records the shapes of V."""

    shapes: list[list[int]] = []

    def backpropagate(self, ext, module, g_inp, g_out, V_out) -> Tensor:
        """Record the shape, then backpropagate V, shape ``[C, N, *]``."""
        self.shapes.append(list(V_out.shape))
        return super().backpropagate(ext, module, g_inp, g_out, V_out)


problem = Problem(N=60, C=10, dtype=torch.float64)
computed = diag_ggn(problem, RecordingDiagGGNExact)
print(f"shapes of V: {RecordingDiagGGNExact.shapes}")

torch.testing.assert_close(RecordingDiagGGNExact.shapes, [[10, 60, 48]])
torch.testing.assert_close(computed, ggn_products(problem))
V_in = RecordingDiagGGNExact().backpropagate(None, layer, None, None, V)
torch.testing.assert_close(V_in, vmap(input_vjp)(V)[0])

# %%
# There is one shape only: the first scale module passes nothing on, as no layer before
# it is trained. So V has shape ``[C, N, H]`` at a layer with H outputs: at each layer
# it is C times as large as the layer's output. How much memory is this at the peak, if
# only the scale weights are trained? Two moments compete.
#
# - **At a layer,** ``backpropagate`` holds the V that it got and the V that it makes:
#   :math:`2 C N H` entries between hidden layers. Then the old one is freed.
# - **At the loss,** the output has C entries. There V starts as the square root of the
#   loss's Hessian, with :math:`C^2 N` entries. For cross-entropy, BackPACK makes two
#   tensors of this size, takes their difference, and makes V from that. At most three
#   of them are held at a time.
#
# The last layer, with :math:`C N (H + C)` entries, always needs less than one of these
# two. The larger of them, in bytes of float32, is
#
# .. math::
#     b(C) = 4 \, C N \, \max(2 H, \; 3 C) .
#
# It is linear in C up to :math:`C = 2 H / 3`, then **quadratic**.

N, H = 60, 48
class_counts = [2, 8, 32, 64, 128]


def estimate(C: int) -> int:
    """Return the bytes that V needs at the peak, in float32."""
    return 4 * C * N * max(2 * H, 3 * C)


# %%
# Now measure. The competitor without V needs one GGN-vector product for each trained
# number, here two, and each is a few passes that know nothing of columns. ``BatchGrad``
# shows what BackPACK costs without V.

ways_over_C = {
    "BackPACK, BatchGrad": batch_grad,
    "BackPACK, DiagGGNExact": diag_ggn,
    "GGN-vector products, p = 2": ggn_products,
    "DiagGGNExact, loop over C": partial(
        diag_ggn, module_extension_class=ScaleModuleDiagGGNExactLoop
    ),
}
ways = {"plain backward": plain_backward, **ways_over_C}

times, peaks = {}, {}
for C in class_counts:
    problem = Problem(N, C)
    calls = {name: partial(way, problem) for name, way in ways.items()}
    times[C] = time_in_turns(calls)
    for name, way in ways.items():
        peaks[C, name] = peak_memory(partial(way, Problem(N, C)))

# %%
# The dashed line in the right panel is the memory of a plain backward pass plus
# :math:`b(C)`, as if both peaks came at the same moment.

fig, (left, right) = plt.subplots(1, 2, figsize=(8, 4.6), layout="constrained")
for i, (name, marker) in enumerate(zip(ways_over_C, "os^D", strict=True)):
    low, median, high = zip(
        *[ratios(times[C], name) for C in class_counts], strict=True
    )
    left.plot(class_counts, median, f"{marker}-", color=f"C{i}", label=name)
    left.fill_between(class_counts, low, high, color=f"C{i}", alpha=0.25)
    memory = [peaks[C, name] / 1e6 for C in class_counts]
    right.plot(class_counts, memory, marker, markersize=8 - i, color=f"C{i}")
expected = {C: peaks[C, "plain backward"] + estimate(C) for C in class_counts}
in_MB = [expected[C] / 1e6 for C in class_counts]
right.plot(class_counts, in_MB, "--", color="black", label="plain backward + b(C)")
left.set(ylabel="time, ratio to a plain backward", title="Time over classes")
right.set(ylabel="peak memory in MB", title="Peak memory and its estimate")
for ax in (left, right):
    ax.set(xscale="log", yscale="log", xlabel="number of classes C")
    ax.set_xticks(class_counts, class_counts)
    ax.xaxis.minorticks_off()
left.set_ylim(bottom=1)
fig.legend(loc="outside lower center", ncols=2)
plt.show()

# %%
# The measured peaks of ``DiagGGNExact`` lie near the line, with the loop over C and
# without. On the CPU we check the peaks without it, with a tolerance of 20 percent, for
# the few small tensors that the formula leaves out. (CUDA's allocator rounds each block
# up, so there is no check on a GPU.)

if device.type == "cpu":
    for C in class_counts:
        measured = float(peaks[C, "BackPACK, DiagGGNExact"])
        torch.testing.assert_close(measured, float(expected[C]), rtol=0.2, atol=0)

# %%
# Three things follow.
#
# - **V sets the price, not the number p of trained numbers.** GGN-vector products have
#   a price for each of them, V has one for each class. With two trained numbers and
#   many classes, the products win. With all parameters trained, they would need
#   thousands of passes, while DiagGGNExact would need the same V.
# - **The memory grows with the square of C** once C exceeds two thirds of the width of
#   the hidden layers. If V doesn't fit, cut the batch: V is linear in N, and the GGN
#   diagonals of the parts add up. Or use ``DiagGGNMC``, whose V has one column for each
#   label drawn at random, see `One derivatives class, every extension
#   <../2_any_layer/2_every_extension.html>`__.
# - **The loop over C** runs in one ``backpropagate``, that of the second scale module,
#   which is only a part of the whole network's time. How much a method itself loses by
#   it is measured below.
#
# The parts do add up, because the loss is a sum over the samples:

problem = Problem(N=6, C=5, only_scales=False, dtype=torch.float64)
whole = diag_ggn(problem)
X, y, parts = problem.X, problem.y, []
for part in [slice(0, 4), slice(4, 6)]:
    problem.X, problem.y = X[part], y[part]
    parts.append(diag_ggn(problem))
added = {name: parts[0][name] + parts[1][name] for name in whole}
torch.testing.assert_close(added, whole)

# %%
# How near the limit
# ------------------
# Our two methods do little with each entry of V. The time goes into moving V. So there
# is a limit: ``weight`` must read V **once**, like ``V.sum()``, and ``backpropagate``
# must read it once and write it once, like a multiplication. How near are they?
#
# Start with ``weight``. These are the candidates for its main step, all of them clear
# code.


def multiply_and_sum(V: Tensor, X: Tensor) -> Tensor:
    """Multiply ``[C, N, D]`` and ``[N, D]``, then sum over D: ``[C, N]``."""
    return (V * X).sum(-1)


def loop_over_classes(V: Tensor, X: Tensor) -> Tensor:
    """Multiply and sum column by column: ``[C, N]``."""
    return torch.stack([(V_c * X).sum(-1) for V_c in V])


candidates = {
    "einsum, V first": lambda V, X: einsum(V, X, "c n d, n d -> c n"),
    "einsum, X first": lambda V, X: einsum(X, V, "n d, c n d -> c n"),
    "torch.einsum, X first": lambda V, X: torch.einsum("nd,cnd->cn", X, V),
    "linalg.vecdot": torch.linalg.vecdot,
    "(V * X).sum": multiply_and_sum,
    "X @ V": lambda V, X: (X.unsqueeze(1) @ V.permute(1, 2, 0)).squeeze(1).T,
    "loop over C": loop_over_classes,
}

# %%
# The shapes, C, N and D: few and many classes, few and many features. V takes 8 KB to
# 49 MB: the smallest fits into any cache, the largest into few. All candidates must
# agree.

shapes = [
    (2, 64, 16),
    (10, 128, 64),
    (10, 128, 1024),
    (100, 128, 16),
    (100, 128, 256),
    (1000, 32, 16),
    (1000, 32, 384),
]


def random_V_and_X(C: int, N: int, D: int) -> tuple[Tensor, Tensor]:
    """Return random ``V`` of shape ``[C, N, D]`` and ``X`` of shape ``[N, D]``."""
    X = torch.randn(N, D, device=device) / D**0.5  # so that sums over D are about 1
    return torch.randn(C, N, D, device=device), X


for shape in shapes:
    V, X = (tensor.double() for tensor in random_V_and_X(*shape))
    expected = multiply_and_sum(V, X)
    for candidate in candidates.values():
        torch.testing.assert_close(candidate(V, X), expected)

# %%
# Time, with one pass over V as the yardstick.

limit_times = {}
for shape in shapes:
    V, X = random_V_and_X(*shape)
    calls = {name: partial(way, V, X) for name, way in candidates.items()}
    limit_times[shape] = time_in_turns({"one pass": V.sum, **calls}, rounds=7)

# %%
# And ``backpropagate``, vectorized and as a loop. The yardstick is one multiplication,
# ``V * weight``. One more candidate writes the product into memory that is there
# already. It is no option for an extension, which has no spare tensor of this size, but
# we will learn from it.

layer = extend(ScaleModule()).to(device)
methods = {
    "backpropagate": ScaleModuleDiagGGNExact().backpropagate,
    "backpropagate, loop over C": ScaleModuleDiagGGNExactLoop().backpropagate,
}
write_times = {}

with torch.no_grad():
    for shape in shapes:
        V, _ = random_V_and_X(*shape)
        arguments = None, layer, None, None, V
        calls = {name: partial(method, *arguments) for name, method in methods.items()}
        multiply = partial(torch.mul, V, layer.weight)
        calls["into old memory"] = partial(multiply, out=torch.empty_like(V))
        write_times[shape] = time_in_turns({"one product": multiply, **calls})

# %%
# The nearer to the line at 1, the nearer to the limit. The vertical bars are quartiles.
# The shapes are sorted by the size of V.

by_size = sorted(shapes, key=math.prod)
fig, axes = plt.subplots(2, 1, figsize=(8, 8), layout="constrained", sharex=True)
for ax, results, reference in [
    (axes[0], limit_times, "one pass"),
    (axes[1], write_times, "one product"),
]:
    names = [name for name in results[shapes[0]] if name != reference]
    for i, name in enumerate(names):
        quartiles = [ratios(results[shape], name, reference) for shape in by_size]
        low, median, high = map(torch.tensor, zip(*quartiles, strict=True))
        at = [k + 0.1 * (i - len(names) / 2) for k in range(len(by_size))]
        ax.errorbar(
            at,
            median,
            yerr=torch.stack([median - low, high - median]),
            fmt="os^DvPX"[i] + ":",
            linewidth=0.8,
            label=name,
        )
    ax.axhline(1, color="0.4", linewidth=0.8)
    ax.set(yscale="log", ylabel=f"time, ratio to {reference}")
    ax.margins(y=0.25)
    ax.legend(ncols=2, fontsize="small")
axes[0].set_title("weight: candidates beside one pass over V")
axes[1].set_title("backpropagate beside one multiplication")
axes[1].set_xticks(range(len(by_size)), ["\n".join(map(str, s)) for s in by_size])
axes[1].set_xlabel("C, N and D, from the smallest V to the largest")
plt.show()

# %%
# The candidates in one table. First the memory they need at the peak, divided by that
# of V. Then their time, divided by that of the fastest candidate for the same shape:
# for the smallest V, and the worst ratio of all larger ones. (As the fastest may be
# another one in each round, these are ratios of medians over the rounds.)

V, X = random_V_and_X(10, 128, 64)
memory = {
    name: peak_memory(partial(candidate, V, X)) / (V.numel() * V.element_size())
    for name, candidate in candidates.items()
}
best = {
    s: min(statistics.median(limit_times[s][n]) for n in candidates) for s in shapes
}


def worst(name: str, shapes: list[tuple[int, int, int]]) -> float:
    """Return the largest ratio to the fastest candidate, over some shapes."""
    return max(statistics.median(limit_times[s][name]) / best[s] for s in shapes)


print(f"{'':22} {'memory':>9} {'time / fastest, at worst':>30}")
print(f"{'':22} {'/ V':>9} {'V of 8 KB':>16} {'larger V':>13}")
for name in candidates:
    behind = f"{worst(name, by_size[:1]):16.1f} {worst(name, by_size[1:]):13.1f}"
    print(f"{name:22} {memory[name]:9.2f} {behind}")

# %%
# Three effects explain the memory and the large numbers of the last column. (At 8 KB,
# the fixed cost of a call is most of what is measured.)
#
# **Matrix products.** ``einsum`` turns either order into ``bmm``, a batch of matrix
# products, one for each sample. The order of its operands decides which product that
# is. Mathematically the two are the transposes of each other.

for name in ["einsum, V first", "einsum, X first", "X @ V"]:
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        candidates[name](V, X)
    [product] = [e for e in profiler.events() if e.name == "aten::bmm"]
    print(f"{name}: {' @ '.join(map(str, product.input_shapes))}")

# %%
# V first, it is a matrix times a column for each sample; X first, a row times a matrix,
# as in ``X @ V``. Where the times of ``X @ V`` and of ``einsum`` with X first differ,
# this is the fixed cost of ``einsum``, or noise. But a library for linear algebra may
# be fast at a matrix times a column and slow at a row times a matrix, or the other way
# around. If the first two rows of the table differ, this is a property of the library,
# not of the problem, and it can be otherwise on your machine.
#
# **Temporary memory.** ``(V * X).sum`` writes a tensor as large as V, and reads it
# again: three passes instead of one. ``vecdot`` needs the same memory, ``einsum`` needs
# none of it: its 0.02 is the result alone, 1/D of V. (The loop adds one slice, 1/C of
# V.) The lower panel shows the other part of this price: for a new tensor, the
# operating system may have to provide fresh memory. Where the candidate that writes
# into old memory lies below 0.5, it takes less than half of the time of the product
# that makes a new tensor: there the fresh memory costs more than the multiplying
# itself.
#
# **Cache and fixed cost.** The temporary results of a loop over C are as large as one
# slice of V. When they are read again, they are more likely to be in the cache than
# results as large as V. So the loop is not always bad: for a large V it can beat the
# candidates that make a tensor as large as V. But it pays the fixed cost of its
# operations C times, which makes its large number in the last column.
#
# What was said about the memory of candidates can be checked:

if device.type == "cpu":
    slice_of_V, _, result = (1 / size for size in V.shape)  # 1/C, 1/N and 1/D
    needs = {
        "einsum, V first": result,
        "einsum, X first": result,
        "(V * X).sum": 1 + result,
        "linalg.vecdot": 1 + result,
        "loop over C": slice_of_V + result,
    }
    measured = {name: memory[name] for name in needs}
    torch.testing.assert_close(measured, needs, rtol=0.01, atol=0)

# %%
# For many classes and few features the loop should lose on any machine, in
# ``backpropagate`` and in the main step of ``weight``. We check it on this one, for C =
# 1000 and D = 16, with a wide margin.

many = (1000, 32, 16)
for results, loop, vectorized in [
    (limit_times, "loop over C", "einsum, X first"),
    (write_times, "backpropagate, loop over C", "backpropagate"),
]:
    low, _, _ = ratios(results[many], loop, vectorized)
    if low < 4:
        raise AssertionError(f"{loop} is only {low:.1f} times as slow.")

# %%
# And the answer? ``backpropagate`` is one multiplication, and costs one multiplication,
# plus the fixed cost of a method in Python, which shows where V is tiny. It is at its
# limit. For ``weight``, even the best candidate takes longer than one pass over V, by a
# factor that you can read off the upper panel. We want the clearest form that is not
# far behind where there is work to do. See the row of the einsum with X first: in the
# last column it is among the smallest (which of those is the smallest depends on the
# fixed cost of ``einsum`` and on noise). For the tiny V of 8 KB, where the fixed cost
# of the call is more than the work, others are clearly ahead. This einsum makes no
# second tensor as large as V, its code is as clear as that of the other order, and with
# an ellipsis it serves ``[N, T, D]``. So this is the form of ``weight`` above.
#
# What was verified
# -----------------
# BackPACK, the loop over samples and ``vmap(grad)`` compute the same individual
# gradients, for all samples and, with BackPACK, for a subset. BackPACK, with both
# versions of ``backpropagate``, computes the same GGN diagonal as GGN-vector products
# (for the scale weights) and as the definition (for all parameters), and its V has the
# sign of the VJP. The memory meter knows the peak of a known program. V has the shape
# ``[C, N, H]`` at the second scale module, and on the CPU the peak memory of
# ``DiagGGNExact``, for the scale weights, agrees to 20 percent with that of a plain
# backward pass plus :math:`b(C)`. At N = 256 the loop over samples takes at least 4
# times as long as ``BatchGrad``. At C = 1000 and D = 16 the loop over C takes at least
# 4 times as long as the vectorized ``backpropagate``, and as the einsum of ``weight``.
# (Compared are the lower quartiles of the ratios.) All other times are measured and
# shown, not checked.
#
# **Next:** You have read the site to its end. To bring your own layer, start from
# `Check your own layer <../2_any_layer/6_check_your_layer.html>`_.
#
# BackPACK: F. Dangel, F. Kunstner, P. Hennig, "BackPACK: Packing more into Backprop",
# ICLR 2020, `arXiv:1912.10985 <https://arxiv.org/abs/1912.10985>`_, which measures the
# same for large networks.
