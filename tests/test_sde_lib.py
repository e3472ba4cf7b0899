"""Processes: coefficients, tables, reverse classes, shapes and dtypes."""

import copy
import math

import pytest
import torch
import toys

import sde_lib
import sde_lib_base
from sde_lib import VESDE, VPSDE, AffineSDE, alpha_sigma, drift_diffusion, subVPSDE

NAMES = ["ve", "vp", "subvp"]
SHAPES = [(3,), (3, 2), (3, 2, 5), (3, 2, 4, 4), (3, 2, 3, 4, 5)]
TIMES = torch.linspace(1e-5, 1, 101, dtype=torch.float64)


def make(name, N=1000):
    return toys.UserSDE(N=N) if name == "user" else toys.all_sdes(N)[name]


class CubicSDE(toys.UserSDE):
    """A process whose drift is not affine."""

    def sde(self, x, t):
        return -(x**3), torch.ones_like(t)


# --- algebra ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_closed_coefficients_are_those_derived_from_alpha_and_lambda(name):
    sde = make(name)
    torch.testing.assert_close(sde.f(TIMES), AffineSDE.f(sde, TIMES), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sde.g2(TIMES), AffineSDE.g2(sde, TIMES), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(
        sde.lambda_(TIMES), AffineSDE.lambda_(sde, TIMES), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("name", NAMES)
def test_variance_solves_its_differential_equation(name):
    """d(σ²)/dt = 2 f σ² + g², by central differences, for what sde() and marginal_prob() say."""
    sde, h = make(name), 1e-5
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    one = torch.ones(50, 1, dtype=torch.float64)
    high, low = (sde.marginal_prob(one, t + k)[1] ** 2 for k in (h, -h))
    sigma = sde.marginal_prob(one, t)[1]
    drift, g = sde.sde(one, t)
    torch.testing.assert_close(
        (high - low) / (2 * h), 2 * drift[:, 0] * sigma**2 + g**2, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", [*NAMES, "user", "long"])
def test_inverse_lambda_inverts_lambda(name):
    sde = toys.LongSDE() if name == "long" else make(name)
    times = TIMES * float(sde.T)
    lam = sde_lib.half_log_snr(sde, times)
    assert (lam.diff() < 0).all()
    torch.testing.assert_close(sde_lib.time_of_half_log_snr(sde, lam), times, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_bisection_agrees_with_the_closed_inverse(name):
    sde = make(name)
    lam = sde.lambda_(TIMES[5:-1])
    torch.testing.assert_close(
        AffineSDE.inverse_lambda(sde, lam), sde.inverse_lambda(lam), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("cls", [VPSDE, subVPSDE])
def test_constant_beta_has_an_inverse_lambda(cls):
    sde = cls(5.0, 5.0)
    t = TIMES
    torch.testing.assert_close(sde.inverse_lambda(sde.lambda_(t)), t, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_alpha_and_sigma_read_off_marginal_prob_are_the_declared_ones(name):
    sde = make(name)
    (one, zero), std = sde_lib_base._probe(sde.marginal_prob, TIMES, None)
    torch.testing.assert_close(one - zero, sde.alpha(TIMES), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(std, sde.sigma(TIMES), rtol=1e-12, atol=1e-12)


def test_coefficients_of_a_user_process_are_read_off_its_methods():
    sde = toys.UserSDE(theta=4.0)
    a, s = alpha_sigma(sde, TIMES)
    torch.testing.assert_close(a, torch.exp(-4 * TIMES), rtol=1e-12, atol=0)
    torch.testing.assert_close(s, torch.sqrt(-torch.expm1(-8 * TIMES)), rtol=1e-9, atol=1e-12)
    f, g = drift_diffusion(sde, TIMES)
    torch.testing.assert_close(f, torch.full_like(TIMES, -4.0))
    torch.testing.assert_close(g, torch.full_like(TIMES, math.sqrt(8)))


def test_alpha_of_a_process_with_a_shifted_mean_is_its_slope():
    class Shifted(toys.UserSDE):
        def marginal_prob(self, x, t):
            mean, std = super().marginal_prob(x, t)
            return mean + 7 * t[:, None, None, None], std

    t = torch.tensor([0.1, 0.5], dtype=torch.float64)
    torch.testing.assert_close(alpha_sigma(Shifted(), t)[0], torch.exp(-4 * t))


def test_cubic_drift_is_not_affine_and_built_ins_are():
    assert not sde_lib.is_affine(CubicSDE())
    assert all(sde_lib.is_affine(make(name)) for name in [*NAMES, "user"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("t", [1e-5, 1e-4, 1e-3, 0.3, 1.0])
def test_float32_std_is_accurate_to_1e_5_at_small_times(name, t):
    t32 = torch.full((2,), t)
    B = 0.1 * t32.double() + 9.95 * t32.double() ** 2
    truth = {
        "ve": 0.01 * 5000 ** t32.double(),
        "vp": torch.sqrt(-torch.expm1(-B)),
        "subvp": -torch.expm1(-B),
    }[name]
    std = make(name).marginal_prob(torch.zeros(2, 1), t32)[1]
    assert (std.double() / truth - 1).abs().max() < 1e-6


def test_derived_process_needs_alpha_and_sigma_only():
    class Cosine(AffineSDE):
        def alpha(self, t):
            return torch.cos(math.pi * t / 2)

        def sigma(self, t):
            return torch.sin(math.pi * t / 2)

    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    tan, sde = torch.tan(math.pi * t / 2), Cosine(100)
    torch.testing.assert_close(sde.f(t), -math.pi / 2 * tan)
    torch.testing.assert_close(sde.g2(t), math.pi * tan)
    torch.testing.assert_close(sde.inverse_lambda(sde.lambda_(t)), t)


# --- tables -------------------------------------------------------------------------------


def test_tables_follow_N():
    for cls in (VPSDE, subVPSDE):
        sde = cls(0.1, 20, 1000)
        sde.N = 50
        assert len(sde.discrete_betas) == len(sde.alphas) == 50
        betas = torch.linspace(0.1 / 50, 20 / 50, 50)
        torch.testing.assert_close(sde.discrete_betas, betas)
        torch.testing.assert_close(sde.alphas, 1 - betas)
    vp = VPSDE(0.1, 20, 1000)
    vp.N = 60
    product = torch.cumprod(1 - torch.linspace(0.1 / 60, 20 / 60, 60), 0)
    torch.testing.assert_close(vp.alphas_cumprod, product)
    torch.testing.assert_close(vp.sqrt_alphas_cumprod, product.sqrt())
    torch.testing.assert_close(vp.sqrt_1m_alphas_cumprod, (1 - product).sqrt())
    ve = VESDE(0.01, 50, 1000)
    ve.N = 7
    torch.testing.assert_close(ve.discrete_sigmas, 0.01 * 5000 ** (torch.arange(7) / 6))
    assert ve.discretize(torch.zeros(2, 1), torch.tensor([1.0, 0.5]))[1].shape == (2,)


@pytest.mark.parametrize("cls", [VPSDE, subVPSDE])
@pytest.mark.parametrize("N", [1, 10, 20])
def test_tables_with_beta_of_one_or_more_are_refused(cls, N):
    with pytest.raises(ValueError, match="beta_max=20 needs N ≥ 21"):
        cls(0.1, 20, N).discrete_betas  # noqa: B018
    assert (cls(0.1, 20, 21).alphas > 0).all()


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_table_rows_are_every_integer_once_on_the_sampling_grid(name):
    for N in (24, 100, 999, 1000):
        sde = make(name, N)
        rows = sde_lib.row(sde, torch.linspace(1, sde.sampling_eps, N))
        assert rows.tolist() == list(range(N - 1, -1, -1))


def test_table_set_by_a_subclass_is_honoured():
    class Cosine(VPSDE):
        def __init__(self, N=100):
            super().__init__(0.1, 20, N)
            self.discrete_betas = torch.full((N,), 0.01)

    sde = Cosine(10)  # its own table, so N ≤ beta_max is its own business
    f, G = sde.discretize(torch.ones(2, 3), torch.tensor([0.2, 1.0]))
    torch.testing.assert_close(G, torch.full((2,), 0.1))
    torch.testing.assert_close(f, torch.full((2, 3), math.sqrt(0.99) - 1))
    assert sde.reverse(lambda x, t: x).discrete_betas is sde.discrete_betas


def test_marginal_prob_of_a_subclass_is_honoured():
    class Half(VPSDE):
        def marginal_prob(self, x, t):
            mean, std = super().marginal_prob(x, t)
            return 0.5 * mean, 2 * std

    a, s = alpha_sigma(Half(), TIMES)
    torch.testing.assert_close(a, 0.5 * VPSDE().alpha(TIMES))
    torch.testing.assert_close(s, 2 * VPSDE().sigma(TIMES))
    lam = sde_lib.half_log_snr(Half(), TIMES)
    torch.testing.assert_close(sde_lib.time_of_half_log_snr(Half(), lam), TIMES)
    torch.testing.assert_close(sde_lib.half_log_snr(Half().reverse(None), TIMES), lam)


def test_sde_of_a_subclass_is_honoured():
    class Doubled(VPSDE):
        def sde(self, x, t):
            drift, diffusion = super().sde(x, t)
            return 2 * drift, 2 * diffusion

    f, g = drift_diffusion(Doubled(), TIMES)
    torch.testing.assert_close(f, 2 * VPSDE().f(TIMES))
    torch.testing.assert_close(g, 2 * VPSDE().g2(TIMES).sqrt())


# --- reverse ------------------------------------------------------------------------------


def minus(x, t):
    return -x


@pytest.mark.parametrize("name", [*NAMES, "user"])
def test_reverse_is_an_instance_of_the_forward_class_and_shares_its_attributes(name):
    sde = make(name)
    sde.note = "a user's attribute"
    rsde, again = sde.reverse(minus), make(name).reverse(minus, True)
    assert isinstance(rsde, type(sde)) and type(rsde) is type(again)
    assert rsde.note == sde.note and rsde.T == sde.T
    sde.N = 60
    assert rsde.N == 60
    rsde.N = 70
    assert sde.N == 70
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([0.3, 0.9])
    for a, b in zip(rsde.marginal_prob(x, t), sde.marginal_prob(x, t), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(rsde.prior_logp(x), sde.prior_logp(x))
    assert rsde.prior_sampling((2, 3, 4, 4)).shape == x.shape


@pytest.mark.parametrize("name", [*NAMES, "user"])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5])
def test_reverse_family_has_drift_f_minus_half_one_plus_tau_squared_g2_score(name, tau):
    sde, x, t = make(name), torch.randn(2, 3, 4, 4), torch.tensor([0.3, 0.9])
    (f, g), (drift, diffusion) = sde.sde(x, t), sde.reverse(minus, tau=tau).sde(x, t)
    torch.testing.assert_close(drift, f + 0.5 * (1 + tau**2) * (g**2)[:, None, None, None] * x)
    torch.testing.assert_close(diffusion, tau * g)
    (f, G), (F, H) = sde.discretize(x, t), sde.reverse(minus, tau=tau).discretize(x, t)
    torch.testing.assert_close(F, f + 0.5 * (1 + tau**2) * (G**2)[:, None, None, None] * x)
    torch.testing.assert_close(H, tau * G)


def test_probability_flow_is_tau_zero():
    sde = make("vp")
    assert sde.reverse(minus, True).probability_flow
    assert not sde.reverse(minus).probability_flow
    with pytest.raises(ValueError, match="tau"):
        sde.reverse(minus, tau=-1.0)


def test_reverse_of_two_scores_do_not_mix():
    sde = make("vp")
    one, two = sde.reverse(lambda x, t: x), sde.reverse(lambda x, t: 2 * x)
    x, t = torch.ones(1, 1), torch.tensor([0.5])
    assert one.sde(x, t)[0] != two.sde(x, t)[0]


def test_process_can_be_copied():
    sde = make("vp")
    for twin in (copy.copy(sde), copy.deepcopy(sde)):
        twin.N = 50
        assert sde.N == 1000 and len(twin.discrete_betas) == 50


# --- shapes, dtypes, other end times ------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_shape_and_dtype_passes_through(name, shape, dtype):
    sde, x = make(name), torch.randn(shape, dtype=dtype)
    t = torch.tensor([0.01, 0.5, 1.0], dtype=dtype)
    rsde = sde.reverse(minus)
    for method in (sde.sde, sde.marginal_prob, sde.discretize, rsde.sde, rsde.discretize):
        vector, number = method(x, t)
        assert vector.shape == x.shape and vector.dtype == dtype
        assert number.shape == (3,)
        assert number.dtype == dtype or "discretize" in method.__name__
        # A row depends on itself alone.
        torch.testing.assert_close(vector[1:2], method(x[1:2], t[1:2])[0])
    assert sde.prior_logp(x).shape == (3,) and sde.prior_logp(x).dtype == dtype
    assert sde.prior_sampling(shape).shape == x.shape


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_without_axes_means_the_same_time_for_all(name, dtype):
    sde, x = make(name), torch.randn(3, 2, 4, dtype=dtype)
    t = torch.tensor(0.7, dtype=dtype)
    for method in (sde.sde, sde.marginal_prob, sde.discretize, sde.reverse(minus).sde):
        vector, number = method(x, t)
        rows, numbers = method(x, t.expand(3))
        assert vector.dtype == dtype
        torch.testing.assert_close(vector, rows)
        torch.testing.assert_close(number.expand(3), numbers)


@pytest.mark.parametrize("name", [*NAMES, "user"])
def test_prior_logp_is_that_of_the_normal_distribution(name):
    sde, z = make(name), torch.randn(4, 3, 2, 2)
    std = 50.0 if name == "ve" else 1.0
    truth = torch.distributions.Normal(0.0, std).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(sde.prior_logp(z), truth)
    assert sde.prior_sampling((2000, 3, 2, 2)).std() == pytest.approx(std, rel=0.02)


def test_user_process_may_end_at_another_time():
    sde = toys.LongSDE(N=50)
    x, t = torch.ones(2, 1, 1, 1), torch.tensor([1.0, 5.0])
    f, G = sde.discretize(x, t)
    torch.testing.assert_close(f, torch.full_like(x, -0.8 * 0.1))
    torch.testing.assert_close(G, torch.full((2,), math.sqrt(1.6 * 0.1)))
    assert sde_lib.row(sde, torch.tensor([5.0, 2.5, 0.0])).tolist() == [49, 24, 0]


def test_times_on_the_sampling_grid_do_not_alter_inputs():
    x, t = torch.randn(3, 2), torch.rand(3)
    copies = x.clone(), t.clone()
    for name in NAMES:
        sde = make(name)
        for method in (sde.sde, sde.marginal_prob, sde.discretize, sde.reverse(minus).sde):
            method(x, t)
    assert torch.equal(x, copies[0]) and torch.equal(t, copies[1])


def test_method_that_broadcasts_wrongly_is_refused():
    with pytest.raises(ValueError, match="marginal_prob accepts no batch"):
        alpha_sigma(toys.UserSDE(), torch.tensor([0.5]), torch.zeros(1, 2))


# --- construction and registry ------------------------------------------------------------


@pytest.mark.parametrize("cls", [VPSDE, subVPSDE])
@pytest.mark.parametrize("betas", [(0, 20), (-1, 20), (20, 0.1)])
def test_impossible_betas_are_refused(cls, betas):
    with pytest.raises(ValueError, match="beta_min"):
        cls(*betas)


@pytest.mark.parametrize("sigmas", [(0, 50), (50, 0.01), (1, 1)])
def test_impossible_sigmas_are_refused(sigmas):
    with pytest.raises(ValueError, match="sigma_min"):
        VESDE(*sigmas)


def test_registry_refuses_doubles_and_names_what_it_knows():
    with pytest.raises(ValueError, match="already registered"):
        sde_lib.register_sde(VPSDE, name="VPSDE")

    class Config:
        class training:
            sde = "vqsde"

    with pytest.raises(ValueError, match=r"vqsde.*known.*vpsde"):
        sde_lib.get_sde(Config)


def test_a_reverse_process_hides_no_attribute_of_a_users_process():
    class Named(sde_lib.VPSDE):
        def __init__(self):
            super().__init__()
            self.tau, self.score_fn, self.forward_sde = 7.0, "mine", "mine too"

    rsde = Named().reverse(lambda x, t: -x, probability_flow=True)
    assert (rsde.tau, rsde.score_fn, rsde.forward_sde) == (7.0, "mine", "mine too")
    assert rsde.probability_flow


# --- what is not quite a time, a coefficient or an observation ------------------------------


@pytest.mark.parametrize("name", [*NAMES, "edm"])
def test_times_that_are_whole_numbers_are_times(name):
    sde = sde_lib.EDM() if name == "edm" else make(name)
    x, whole = torch.randn(3, 2), torch.ones(3, dtype=torch.long)
    for method in (sde.sde, sde.marginal_prob, sde.discretize):
        for got, want in zip(method(x, whole), method(x, whole.float()), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_priors_density_of_16_bit_numbers_is_that_of_the_same_numbers_in_32(dtype):
    sde = VESDE()
    z = sde.prior_sampling((2, 3, 32, 32)).to(dtype)
    assert torch.equal(sde.prior_logp(z), sde.prior_logp(z.float()))


def test_a_coefficient_that_is_a_number_is_refused_with_the_remedy():
    class Constant(AffineSDE):
        def alpha(self, t):
            return 1.0  # type: ignore[override]

        def sigma(self, t):
            return 0.1 + t

    with pytest.raises(TypeError, match=r"alpha\(t\) returned 1.0 .*1.0 \* torch.ones_like\(t\)"):
        Constant(N=10).reverse(lambda x, t: -x)


def test_a_coefficient_with_weights_of_its_own_and_no_time_in_it_has_no_slope():
    class Learned(AffineSDE):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)

        def alpha(self, t):
            return self.scale * torch.ones_like(t)

        def sigma(self, t):
            return 0.1 + t

    assert (drift_diffusion(Learned(N=10), TIMES)[0] == 0).all()


def test_what_a_users_method_stumbled_over_is_the_cause_of_its_refusal():
    class Broken(toys.UserSDE):
        def marginal_prob(self, x, t):
            raise RuntimeError("a table lies on another device")

    with pytest.raises(ValueError, match="no batch of 2 to 5 axes") as caught:
        alpha_sigma(Broken(N=10), TIMES)
    assert "another device" in str(caught.value.__cause__)


def test_an_observation_that_is_no_tensor_is_refused_when_it_is_bound():
    with pytest.raises(TypeError, match=r"an observation y as a tensor .* got NoneType"):
        sde_lib.OUVE().bind(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bound to y of shape \(\), which does not fit"):
        sde_lib.OUVE().bind(torch.ones(())).prior_logp(torch.ones(3))


def test_an_observation_is_sent_to_the_device_of_the_state_once():
    bound = sde_lib.OUVE().bind(torch.ones(1, 2))
    x = torch.empty(3, 2, device="meta")
    first = sde_lib.origin(bound, x)
    assert first is not None and first.device.type == "meta"
    assert sde_lib.origin(bound, x) is first


def test_a_family_member_that_is_no_number_is_refused():
    for tau in (math.nan, "1"):
        with pytest.raises(ValueError, match="tau: expected a number"):
            make("vp").reverse(lambda x, t: -x, tau=tau)  # type: ignore[arg-type]
