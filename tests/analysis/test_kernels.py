"""Kernels and dynamics against closed forms: linear models, two-layer ReLU networks, exact minimisers, finite differences."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.analysis import (
    KernelRegression,
    KernelTrack,
    balance,
    kernel_report,
    kernel_stats,
    kernels,
    loss_and_energy,
    ridge_fit,
)
from rarefy.errors import ModelError, OptionError

DOUBLE = torch.float64


def two_layer(units: int = 12, inputs: int = 5, outputs: int = 1, bias: bool = False, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, units, bias), nn.ReLU(), nn.Linear(units, outputs, bias)).double()


def points(n: int = 20, inputs: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(n, inputs, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("masked", [False, True])
def test_a_two_layer_relu_net_has_the_papers_kernels(masked: bool) -> None:
    """H = sum_j relu(u_j.x) relu(u_j.x'), K = H + (x.x') sum_j w_j^2 1[u_j.x > 0] 1[u_j.x' > 0], over kept weights."""
    net, x = two_layer(), points()
    masks = None
    u, w = net[0].weight.detach(), net[2].weight.detach()[0]
    m, v = torch.ones_like(u, dtype=torch.bool), torch.ones_like(w, dtype=torch.bool)
    if masked:
        m, v = torch.rand(u.shape) < 0.4, torch.rand(w.shape) < 0.6
        masks = {"0.weight": m, "2.weight": v[None]}
        with torch.no_grad():
            net[0].weight.mul_(m)
            net[2].weight.mul_(v[None])
    found = kernels(net, x, masks)
    u, w = net[0].weight.detach(), net[2].weight.detach()[0]
    hidden, active = (x @ u.T).relu(), (x @ u.T > 0).double()
    h = (hidden * v) @ hidden.T
    inner = torch.einsum("ai,bi,ji->abj", x, x, m.double())  # x . x' over the inputs that unit j keeps
    k = h + torch.einsum("abj,j,aj,bj->ab", inner, w.square(), active, active)
    torch.testing.assert_close(found.h, h)
    torch.testing.assert_close(found.k, k)
    torch.testing.assert_close(found.layers["2.weight"], h)
    assert torch.linalg.eigvalsh(found.k - found.h).min() > -1e-10


def test_the_gradient_kernel_is_that_of_finite_differences() -> None:
    net, x = two_layer(units=4, inputs=3, outputs=2, bias=True), points(6, 3)
    flat = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    columns = []
    for i in range(len(flat)):
        sides = []
        for step in (1e-6, -1e-6):
            moved = copy.deepcopy(net)
            torch.nn.utils.vector_to_parameters(flat + step * F.one_hot(torch.tensor(i), len(flat)), moved.parameters())
            sides.append(moved(x).detach())
        columns.append((sides[0] - sides[1]) / 2e-6)
    jacobian = torch.stack(columns, -1)  # [n, C, parameters]
    torch.testing.assert_close(
        kernels(net, x).k, torch.einsum("acp,bcp->ab", jacobian, jacobian) / 2, atol=1e-8, rtol=1e-6
    )
    torch.testing.assert_close(kernels(net, x, chunk=4).k, kernels(net, x).k)


def test_a_linear_model_never_moves_its_kernel() -> None:
    net, x = nn.Linear(5, 1, bias=False).double(), points()
    y = x @ torch.arange(5.0, dtype=DOUBLE) + points(seed=4)[:, 0]
    track = KernelTrack(x, y, every=5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for step in range(31):
        track(net, step)
        optimizer.zero_grad()
        (0.5 * (net(x)[:, 0] - y).square().mean()).backward()
        optimizer.step()
    assert [moment.step for moment in track.moments] == [0, 5, 10, 15, 20, 25, 30]
    assert max(moment.drift_h for moment in track.moments) < 1e-15 > max(moment.drift_k for moment in track.moments)
    torch.testing.assert_close(kernels(net, x).h, x @ x.T)
    torch.testing.assert_close(kernels(net, x).k, x @ x.T)
    assert track.moments[-1].loss < track.moments[0].loss
    assert track.moments[-1].h == track.moments[0].h


@pytest.mark.parametrize("outputs", [1, 3])
def test_energy_is_the_kernel_form_and_the_slope_of_the_loss(outputs: int) -> None:
    net, x = two_layer(outputs=outputs, bias=True), points()
    y = points(seed=3)[:, :outputs].sin()
    value, energy = loss_and_energy(net, x, y)
    residual = y - net(x).detach()
    jacobian = torch.stack([  # [n, C, parameters]
        torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(net(s[None])[0, c], [*net.parameters()])])
                     for c in range(outputs)]) for s in x
    ])  # fmt: skip
    full = torch.einsum("acp,bdp->acbd", jacobian, jacobian)
    form = torch.einsum("ac,acbd,bd->", residual, full, residual) / len(x) ** 2
    assert sum(energy.values()) == pytest.approx(float(form), rel=1e-12)
    moved = copy.deepcopy(net)  # one small step of gradient flow
    (0.5 * (y - moved(x)).square().sum() / len(x)).backward()
    with torch.no_grad():
        for p in moved.parameters():
            p -= 1e-6 * p.grad
    slope = (loss_and_energy(moved, x, y)[0] - value) / 1e-6
    assert slope == pytest.approx(-sum(energy.values()), rel=1e-4)
    if outputs == 1:
        k = kernels(net, x).k
        assert sum(energy.values()) == pytest.approx(
            float(residual[:, 0] @ k @ residual[:, 0]) / len(x) ** 2, rel=1e-12
        )


def test_energy_of_cross_entropy_and_of_masks() -> None:
    net, x = two_layer(outputs=3), points()
    labels = torch.arange(20) % 3
    masks = {"0.weight": torch.rand(12, 5) < 0.3}
    value, energy = loss_and_energy(net, x, labels, masks, loss="cross-entropy")
    loss = F.cross_entropy(net(x), labels)
    loss.backward()
    assert value == pytest.approx(float(loss.detach()))
    assert energy["0.weight"] == pytest.approx(float(net[0].weight.grad[masks["0.weight"]].square().sum()))
    assert energy["2.weight"] == pytest.approx(float(net[2].weight.grad.square().sum()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("decay", [1e-3, 0.0])
def test_a_stationary_last_layer_is_ridge_regression_at_every_point(bias: bool, masked: bool, decay: float) -> None:
    """Put the last layer where its loss is smallest: f(x) = H(x, X) (H + n lambda)^-1 y then holds everywhere."""
    net, x, new = two_layer(units=8, outputs=2, bias=bias), points(30), points(50, seed=9)
    y = torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2]], 1) + 0.5
    masks = {"2.weight": torch.rand(2, 8) < 0.6} if masked else None
    phi = net[1](net[0](x)).detach()
    with torch.no_grad():
        for c in range(2):
            kept = masks["2.weight"][c] if masks else torch.ones(8, dtype=torch.bool)
            features, target = phi[:, kept], y[:, c]
            mean, offset = (features.mean(0), target.mean()) if bias else (0.0, 0.0)
            left = features - mean
            w = torch.linalg.solve(
                left.T @ left + 30 * decay * torch.eye(int(kept.sum()), dtype=DOUBLE), left.T @ (target - offset)
            )
            net[2].weight[c] = 0.0
            net[2].weight[c, kept] = w
            if bias:
                net[2].bias[c] = offset - mean @ w
    fit = ridge_fit(kernels(net, x, masks), y, decay, kernels(net, new, masks))
    torch.testing.assert_close(fit, net(new).detach(), atol=1e-8, rtol=1e-7)
    report = kernel_report(net, x, y, masks, decay=decay)
    if decay == 0:
        assert report.ridge_gap is None
        assert report.projection_gap < 1e-9  # f(X) is the projection of y, and the features do not see the residual
        assert report.energy["2.weight"] < 1e-18
        assert report.best_residual == pytest.approx(float((y - net(x).detach()).norm() / y.norm()), rel=1e-9)
    else:
        assert report.ridge_gap is not None and report.ridge_gap < 1e-8
        assert report.projection_gap > 1e-6
    with torch.no_grad():  # and not elsewhere
        net[2].weight.add_(0.1 * (masks["2.weight"] if masks else 1))
    assert kernel_report(net, x, y, masks, decay=1e-3).ridge_gap > 1e-3  # type: ignore[operator]


def test_the_residual_lies_in_the_smaller_null_space_at_stationarity() -> None:
    """y = f + D with K D = 0 makes a network exactly stationary; null(K) lies within null(H), and is smaller."""
    net, x = two_layer(units=3, inputs=4, seed=2), points(40, 4)
    found = kernels(net, x)
    values, vectors = torch.linalg.eigh(found.k)
    null = vectors[:, values < 1e-10 * values[-1]]
    residual = null @ points(null.shape[1], 1, seed=5)
    y = found.outputs + residual
    report = kernel_report(net, x, y)
    assert report.gradient_norm < 1e-13
    assert report.projection_gap < 1e-10
    assert report.best_residual == pytest.approx(float(residual.norm() / y.norm()))
    assert report.rank_h <= 3 < report.rank_k == 40 - null.shape[1] <= 15
    assert report.residual_in_null_h == pytest.approx(1.0) and report.residual_in_null_k == pytest.approx(1.0)
    assert report.loss == pytest.approx(float(residual.square().sum()) / 80)
    # stationary in the last layer only: the features do not see the residual, the gradients do
    h_values, h_vectors = torch.linalg.eigh(found.h)
    only = kernel_report(net, x, found.outputs + h_vectors[:, :30] @ points(30, 1, seed=6))
    assert h_values[29] < 1e-12
    assert only.residual_in_null_h == pytest.approx(1.0) and only.residual_in_null_k < 0.99
    assert only.projection_gap < 1e-10 and only.energy["2.weight"] < 1e-25 < only.energy["0.weight"]


def test_balance_is_kept_by_gradient_flow_dense_and_sparse() -> None:
    drifts = []
    for masked in (False, True):
        for lr in (0.02, 0.01):
            net, x = two_layer(bias=True, seed=3), points(50)
            y = x[:, 0].abs()
            optimizer = torch.optim.SGD(net.parameters(), lr=lr)
            if masked:
                rarefy.sparsify(net, "static", sparsity=0.5, optimizer=optimizer, init="dense")
            start = balance(net[0].weight, net[2].weight, net[0].bias)
            for _ in range(round(6 / lr)):
                optimizer.zero_grad()
                (0.5 * (net(x)[:, 0] - y).square().mean()).backward()
                optimizer.step()
            drifts.append(float((balance(net[0].weight, net[2].weight, net[0].bias) - start).abs().max()))
    assert max(drifts) < 0.05
    for coarse, fine in (drifts[:2], drifts[2:]):  # an error of the step size, first order
        assert 1.6 < coarse / fine < 2.4


def test_statistics_are_their_definitions() -> None:
    a = points(15, 15)
    kernel, y = a[:, :6] @ a[:, :6].T, points(15, 2, seed=5)
    found = kernel_stats(kernel, y, top=3, ridge=0.01)
    _, vectors = torch.linalg.eigh(kernel)
    assert found.alignment == pytest.approx(float((y * (kernel @ y)).sum() / (y.square().sum() * kernel.norm())))
    assert found.effective_rank == pytest.approx(float(kernel.trace() ** 2 / kernel.square().sum()))
    assert found.rank == 6
    assert found.top_energy == pytest.approx(float((vectors[:, -3:].T @ y).square().sum() / y.square().sum()))
    added = 0.01 * kernel.trace() * torch.eye(15, dtype=DOUBLE)
    left = y - kernel @ torch.linalg.solve(kernel + added, y)
    assert found.unexplained == pytest.approx(float(left.square().sum() / y.square().sum()))
    out = []
    for i in range(15):  # leave one out, by leaving one out
        rest = [j for j in range(15) if j != i]
        weights = torch.linalg.solve((kernel + added)[rest][:, rest], y[rest])
        out.append(y[i] - kernel[i, rest] @ weights)
    assert found.leave_one_out == pytest.approx(float(torch.stack(out).square().sum() / y.square().sum()))
    scaled = kernel_stats(7.0 * kernel, 0.1 * y, top=3, ridge=0.01)
    assert (scaled.alignment, scaled.leave_one_out) == pytest.approx((found.alignment, found.leave_one_out))
    assert kernel_stats(y[:, :1] @ y[:, :1].T, y[:, 0]).alignment == pytest.approx(1.0)


def test_ridgeless_regression_interpolates_with_the_smallest_norm() -> None:
    phi, new = points(8, 20), points(4, 20, seed=2)
    y = points(8, seed=7)[:, 0]
    fitted = KernelRegression(phi @ phi.T, y)
    torch.testing.assert_close(fitted.predict(phi @ phi.T), y)
    torch.testing.assert_close(fitted.predict(new @ phi.T), new @ torch.linalg.pinv(phi) @ y)
    small = KernelRegression(phi @ phi.T, y, 1e-9).predict(new @ phi.T)
    torch.testing.assert_close(small, fitted.predict(new @ phi.T), atol=1e-6, rtol=1e-6)
    twice = KernelRegression(torch.cat([phi, phi]) @ torch.cat([phi, phi]).T, torch.cat([y, y]))  # singular kernel
    torch.testing.assert_close(twice.predict(new @ torch.cat([phi, phi]).T), fitted.predict(new @ phi.T))


def test_models_are_left_alone_and_others_refused() -> None:
    net, x = two_layer(outputs=2, bias=True).float().train(), points().float()
    before = copy.deepcopy(net.state_dict())
    kernel_report(net, x, torch.arange(20) % 2, decay=0.1)
    assert net.training and all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    convolution = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2))
    assert kernels(convolution, torch.randn(4, 1, 5, 5)).k.shape == (4, 4)
    with pytest.raises(ModelError, match="does not end in a Linear"):
        kernels(nn.Sequential(nn.Linear(5, 2), nn.Softmax(1)), x)
    with pytest.raises(OptionError, match="make them alike"):
        kernel_report(net, x, torch.zeros(20, 3))
    with pytest.raises(OptionError, match="all zero"):
        kernel_stats(torch.eye(3), torch.zeros(3))
    with pytest.raises(OptionError, match="positive"):
        kernel_stats(torch.eye(3), torch.ones(3), ridge=0.0)
    with pytest.raises(OptionError, match=r"must be \[3, 3\]"):
        KernelRegression(torch.eye(2), torch.ones(3))
    sparse = two_layer().float()
    rarefy.sparsify(sparse, "static", sparsity=0.5, storage="compressed")
    with pytest.raises(ModelError, match="finalize"):
        kernels(sparse, x)
