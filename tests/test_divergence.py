"""Traces of Jacobians: exact ones, the variance of probes, Hutch++, both modes of derivatives."""

import pytest
import torch

import divergence
import sde_lib
from divergence import get_trace, mean_and_error
from models.utils import create_model
from randomness import Draws

NAMES = ("rademacher", "gaussian", "hutch++", "exact")
D = 12


def matrix(seed=0, d=D, rank=None):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(d, d, generator=generator, dtype=torch.float64)
    if rank is None:
        return A
    U = torch.randn(d, rank, generator=generator, dtype=torch.float64)
    W = torch.randn(rank, d, generator=generator, dtype=torch.float64)
    return U @ W


def field(A):
    """x -> tanh(A x), of any shape, and its divergence."""

    def fn(x):
        return torch.tanh(x.flatten(1) @ A.T).reshape(x.shape)

    def truth(x):
        return ((1 - torch.tanh(x.flatten(1) @ A.T) ** 2) * A.diag()).sum(1)

    return fn, truth


def linear(A):
    return lambda x: (x.flatten(1) @ A.T).reshape(x.shape)


def estimate(name, fn, x, probes=1, **options):
    trace = get_trace(name, probes, **options)
    return trace(fn, x, trace.draw(x))


@pytest.mark.parametrize("mode", ["auto", "reverse", "forward"])
@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
@pytest.mark.parametrize("shape", [(5, 12), (5, 3, 4), (2, 3, 2, 2), (4, 1, 2, 3, 2)])
def test_the_exact_trace_is_exact_in_any_mode_chunk_and_shape(mode, chunk, shape):
    x = torch.randn(shape, dtype=torch.float64)
    fn, truth = field(matrix())
    trace = get_trace("exact", mode=mode, chunk=chunk)
    probe = trace.draw(x)
    value, columns = trace(fn, x, probe)
    assert probe.shape == (len(x), 0) and columns.shape == (len(x), 1) and not trace.stochastic
    torch.testing.assert_close(columns[:, 0], truth(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(value, fn(x), rtol=0, atol=0 if mode == "reverse" else 1e-14)
    mean, error = mean_and_error(columns, trace.stochastic)
    torch.testing.assert_close(mean, columns[:, 0])
    assert (error == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_estimates_are_unbiased_within_four_of_their_errors(name):
    torch.manual_seed(0)
    x = torch.randn(1, D, dtype=torch.float64).expand(3000, D).contiguous()
    fn, truth = field(matrix(1))
    _, columns = estimate(name, fn, x, {"exact": 1, "hutch++": 6}.get(name, 2))
    means = columns.mean(dim=1)
    error = means.std() / len(means) ** 0.5
    assert abs(means.mean() - truth(x)[0]) <= 4 * error + 1e-10


@pytest.mark.parametrize("name", ["rademacher", "gaussian"])
def test_the_variance_of_a_probe_is_the_formula(name):
    torch.manual_seed(1)
    A = matrix(2)
    symmetric = (A + A.T) / 2
    variance = 2 * (symmetric**2).sum()
    if name == "rademacher":
        variance = variance - 2 * (symmetric.diag() ** 2).sum()
    x = torch.zeros(1000, D, dtype=torch.float64)
    _, columns = estimate(name, linear(A), x, 40, chunk=40)
    # The relative error of a variance of n numbers is √((kurtosis − 1)/n), below 0.02 here.
    assert columns.var().item() == pytest.approx(variance.item(), rel=0.06)


@pytest.mark.parametrize(("name", "probes"), [("rademacher", 8), ("gaussian", 8), ("hutch++", 12)])
def test_the_reported_error_is_the_spread_of_the_estimates(name, probes):
    torch.manual_seed(2)
    x = torch.zeros(4000, D, dtype=torch.float64)
    mean, error = mean_and_error(estimate(name, linear(matrix(3)), x, probes)[1])
    assert (error**2).mean().sqrt().item() == pytest.approx(mean.std().item(), rel=0.05)
    assert mean_and_error(torch.ones(3, 1))[1].isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_signs_have_no_variance_on_a_multiple_of_the_identity_and_the_others_have(name):
    """Hutch++ takes a part of each probe away, whose length then is no longer the same."""
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    _, columns = estimate(name, lambda x: 0.7 * x, x, 3 if name != "exact" else 1)
    spread = (columns - 0.7 * D).abs().max()
    assert spread < 1e-12 if name in ("rademacher", "exact") else spread > 0.1


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_hutchpp_is_exact_up_to_a_third_of_its_probes_in_rank(rank, mode):
    x = torch.randn(5, D, dtype=torch.float64)
    A = matrix(4, rank=rank)
    _, columns = estimate("hutch++", linear(A), x, 3 * rank, mode=mode)
    assert columns.shape == (5, rank)
    torch.testing.assert_close(columns, A.trace().expand(5, rank), rtol=0, atol=1e-10)
    if rank > 1:
        _, columns = estimate("hutch++", linear(A), x, 3 * (rank - 1), mode=mode)
        assert (columns.mean(1) - A.trace()).abs().max() > 1e-3


def test_hutchpp_is_smooth_along_a_path_in_few_dimensions():
    """Columns of signs were equal in a quarter of samples, their Q rounding's choice."""
    torch.manual_seed(0)
    A, B = torch.randn(2, 3, 3, dtype=torch.float64)
    trace = get_trace("hutch++", 6)
    x = torch.randn(64, 3, dtype=torch.float64)
    probe = trace.draw(x, Draws(0, ("hutch",), 0, 64))

    def at(t):
        return trace(lambda y: y @ (A + t * B).T, x, probe)[1].mean(dim=1)

    assert (at(0.5 + 1e-9) - at(0.5)).abs().max() < 1e-6


def test_hutchpp_with_more_columns_than_dimensions_is_exact():
    x = torch.randn(5, 2, 2, dtype=torch.float64)
    fn, truth = field(matrix(5, 4))
    _, columns = estimate("hutch++", fn, x, 21)
    torch.testing.assert_close(columns, truth(x)[:, None].expand(5, 7), rtol=0, atol=1e-10)


def test_hutchpp_beats_as_many_plain_probes_where_few_eigenvalues_matter():
    torch.manual_seed(3)
    Q = torch.linalg.qr(matrix(6, 40))[0]
    A = Q @ torch.diag(2.0 ** -torch.arange(40, dtype=torch.float64)) @ Q.T
    x = torch.zeros(500, 40, dtype=torch.float64)
    spread = {n: estimate(n, linear(A), x, 12)[1].mean(1).std() for n in ("hutch++", "rademacher")}
    assert spread["hutch++"] < 0.3 * spread["rademacher"]


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_probe_belong_to_the_samples(name):
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    fn, _ = field(matrix(7, 6))
    trace = get_trace(name, 6 if name == "hutch++" else 2 if name != "exact" else 1)
    probe = trace.draw(x)
    rows = torch.tensor([4, 1])
    value, columns = trace(fn, x, probe)
    part, some = trace(fn, x[rows], probe[rows])
    torch.testing.assert_close(part, value[rows])
    torch.testing.assert_close(some, columns[rows])


@pytest.mark.parametrize("name", ["rademacher", "gaussian", "hutch++"])
def test_an_images_probe_depends_on_its_own_numbers_alone(name):
    x = torch.randn(5, 3, 2)
    trace = get_trace(name, 3)
    whole = trace.draw(x, Draws(1, 2, 0, 5))
    torch.testing.assert_close(trace.draw(x[3:], Draws(1, 2, 3, 2)), whole[3:])
    assert not torch.equal(trace.draw(x, Draws(2, 2, 0, 5)), whole)
    if name != "hutch++":  # one probe is the probe of the estimator with one
        one = get_trace(name).draw(x, Draws(1, 2, 0, 5))
        torch.testing.assert_close(one[:, 0], divergence.get_probe(name)(x, Draws(1, 2, 0, 5)))


@pytest.mark.parametrize("probes", [1, 4])
def test_one_forward_and_a_product_per_probe_in_reverse_mode(probes):
    forwards, backwards = [], []

    def fn(x):
        forwards.append(1)
        y = torch.sin(x)
        y.register_hook(lambda g: backwards.append(1))
        return y

    estimate("rademacher", fn, torch.randn(3, 4), probes, mode="reverse", chunk=1)
    assert (len(forwards), len(backwards)) == (1, probes)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.SiLU(), torch.nn.Linear(16, 6)
        )

    def forward(self, x):
        return self.layers(x.flatten(1)).reshape(x.shape)


@pytest.mark.parametrize("mode", ["auto", "reverse", "forward"])
@pytest.mark.parametrize("name", NAMES)
def test_weights_get_no_gradient_and_inference_mode_changes_nothing(name, mode):
    torch.manual_seed(0)
    net, x = Net().double(), torch.randn(4, 2, 3, dtype=torch.float64)
    trace = get_trace(name, 1 if name == "exact" else 9, mode=mode)
    probe = trace.draw(x)
    outside = trace(net, x, probe)
    with torch.inference_mode():
        inside = trace(net, x.clone(), probe.clone())
    for a, b in zip(outside, inside, strict=True):
        torch.testing.assert_close(a, b)
        assert not a.requires_grad
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert x.grad is None and not x.requires_grad


@pytest.mark.parametrize("mode", ["auto", "reverse", "forward"])
def test_a_network_in_ddp_has_its_trace_any_number_of_times(mode, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        net, x = Net().double(), torch.randn(4, 6, dtype=torch.float64)
        wrapped = torch.nn.parallel.DistributedDataParallel(net)
        trace = get_trace("exact", mode=mode)
        for _ in range(3):
            columns = trace(wrapped, x, trace.draw(x))[1]
            torch.testing.assert_close(columns, trace(net, x, trace.draw(x))[1])
        wrapped(x).sum().backward()  # training goes on as before
        assert all(p.grad is not None for p in net.parameters())
    finally:
        torch.distributed.destroy_process_group()


class OneWay(torch.autograd.Function):
    """A sine that has no forward-mode derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.cos(ctx.saved_tensors[0])


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_a_network_without_forward_mode_falls_back_to_reverse(chunk):
    x = torch.randn(3, 12, dtype=torch.float64)
    trace = get_trace("exact", chunk=chunk)
    _, columns = trace(OneWay.apply, x, trace.draw(x))
    torch.testing.assert_close(columns[:, 0], torch.cos(x).sum(1))
    assert divergence.faster_mode(OneWay.apply, x, 4) == "reverse"
    with pytest.raises((RuntimeError, NotImplementedError)):
        forward = get_trace("exact", chunk=chunk, mode="forward")
        forward(OneWay.apply, x, forward.draw(x))


def test_auto_takes_the_mode_that_was_measured_and_measures_once(monkeypatch):
    asked = []

    def faster(fn, x, count):
        asked.append((tuple(x.shape), count))
        return "forward"

    monkeypatch.setattr(divergence, "faster_mode", faster)
    trace, fn = get_trace("exact", chunk=5), field(matrix())[0]
    for rows in (4, 2):  # samples that leave the batch change nothing
        x = torch.randn(rows, D, dtype=torch.float64)
        trace(fn, x, trace.draw(x))
    assert asked == [((4, D), 5)]
    few = get_trace("rademacher", 2)
    few(fn, x, few.draw(x))
    assert len(asked) == 1


def test_a_backward_pass_that_vmap_refuses_is_taken_one_by_one():
    class Rude(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.sin(x)

        @staticmethod
        def backward(ctx, gradient):
            if gradient.abs().max() > 1e9:  # data-dependent: vmap has no rule for it
                raise AssertionError
            return gradient * torch.cos(ctx.saved_tensors[0])

    x = torch.randn(3, 9, dtype=torch.float64)
    _, columns = estimate("exact", Rude.apply, x, mode="reverse")
    torch.testing.assert_close(columns[:, 0], torch.cos(x).sum(1))


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_the_repositorys_network_has_both_modes(mode):
    import configs.vp.digits_ddpmpp_continuous as digits

    config = digits.get_config()
    config.model.nf, config.model.num_res_blocks, config.device = 8, 1, "cpu"
    torch.manual_seed(0)
    net = create_model(config).double().eval()
    for parameter in net.parameters():  # the last layer starts at zero
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    labels = torch.full((2,), 400.0, dtype=torch.float64)

    def fn(x):
        return net(x, labels)

    jacobian = torch.autograd.functional.jacobian(lambda x: fn(x).sum(0), x)
    truth = torch.einsum("ijkbijk->b", jacobian)
    _, columns = estimate("exact", fn, x, mode=mode)
    assert truth.abs().min() > 1e-6
    torch.testing.assert_close(columns[:, 0], truth, rtol=1e-10, atol=1e-10)


def test_a_field_that_does_not_depend_on_x_has_no_divergence():
    x = torch.randn(3, 9, dtype=torch.float64)
    for mode in ("reverse", "forward", "auto"):
        for name in NAMES:
            probes = 1 if name == "exact" else 3
            value, columns = estimate(name, torch.ones_like, x, probes, mode=mode)
            assert (columns == 0).all() and (value == 1).all()


def test_point_data_of_one_axis():
    x = torch.randn(4, dtype=torch.float64)
    for name in ("rademacher", "hutch++", "exact"):
        _, columns = estimate(name, torch.sin, x, 3 if name == "hutch++" else 1)
        torch.testing.assert_close(columns[:, 0], torch.cos(x))


def test_a_field_whose_derivative_is_hidden_is_refused_in_either_mode():
    x = torch.randn(3, 4)
    for mode in ("reverse", "forward"):
        with pytest.raises(ValueError, match="carries no gradient"):
            estimate("exact", divergence.watched(lambda x: x.detach() ** 2), x, mode=mode)
        estimate("exact", divergence.watched(torch.ones_like), x, mode=mode)
        estimate("exact", divergence.watched(torch.sin), x, mode=mode)


def test_weights_do_not_hide_that_a_field_hides_its_derivative():
    x, net = torch.randn(3, 4), torch.nn.Linear(4, 4)
    for mode in ("reverse", "forward"):
        with pytest.raises(ValueError, match="carries no gradient"):
            estimate("exact", divergence.watched(lambda x: net(x.detach())), x, mode=mode)
        _, columns = estimate("exact", divergence.watched(net), x, mode=mode)
        torch.testing.assert_close(columns, net.weight.trace().expand(3, 1))
        _, columns = estimate("exact", divergence.watched(lambda x: x), x, mode=mode)
        assert (columns == 4).all()
        _, columns = estimate("exact", divergence.watched(lambda x: 0 * x + net.bias), x, mode=mode)
        assert (columns == 0).all()


def test_a_derivative_within_the_field_is_no_obstacle_to_forward_mode():
    """As the drift of a process has that is given by α and σ alone."""

    class Quadratic(sde_lib.AffineSDE):
        def alpha(self, t):
            return 1 - 0.5 * t**2

        def sigma(self, t):
            return 0.1 + t

    sde, x, t = Quadratic(N=10), torch.randn(3, 4), torch.tensor([0.1, 0.5, 0.9])
    f = sde_lib.drift_diffusion(sde, t)[0].float()
    for mode in ("reverse", "forward"):
        _, columns = estimate("exact", lambda y: sde.sde(y, t)[0], x, mode=mode)
        torch.testing.assert_close(columns[:, 0], 4 * f)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_has_no_traces(name):
    _, columns = estimate(name, torch.sin, torch.randn(0, 4), 3 if name == "hutch++" else 1)
    assert len(columns) == 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hutchinson", {}, "trace 'hutchinson' is unknown; known"),
        ("exact", {"mode": "fast"}, "mode 'fast' of a trace is unknown"),
        ("rademacher", {"probes": 0}, "probes ≥ 1"),
        ("exact", {"chunk": 0}, "chunk ≥ 1"),
        ("hutch++", {"probes": 4}, "multiples of 3, got 4"),
        ("exact", {"probes": 2}, "leave it 1"),
    ],
)
def test_impossible_traces_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_trace(name, **options)


def test_names_are_of_any_case():
    assert get_trace("Hutch++", 3).probes == 3 and not get_trace("EXACT").stochastic
