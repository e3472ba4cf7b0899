"""What a network's output means, what its time input is, and one conversion between all of them.

With x_t = α D + σ ε̂, D = E[x_0 | x_t] and ε̂ = E[z | x_t], every output is a vector in the
basis (D, ε̂):

    x = (α, σ)      data = (1, 0)       noise = (0, 1)      score = (0, −1/σ)
    v = (−σ, α)     velocity = (α', σ') drift = (0, −g/σ)   preconditioned F = (D − c_skip x̃)/c_out

so a quantity wanted is a combination of x and the network's own output, found from two
equations; it never passes through a third quantity that is ill-defined at that time.

A conditional mean that shifts the origin, x_t = m_t + α D + σ ε̂, changes two of these: x − m_t
takes the place of x, and the velocity gains m_t'. A change of process after training keeps D and ε̂:
two processes of equal λ differ in the scale of x alone.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

import arguments
import sde_lib
from sde_lib import expand

SIGMA_DATA = 0.5


class Point:
    """The coefficients of a process at times t, each computed on first use, in float64.

    `sigma_data` is the data's standard deviation that a preconditioned network expects.
    """

    def __init__(self, sde, t: torch.Tensor, x: torch.Tensor, sigma_data: float = SIGMA_DATA):
        self.sde, self.t, self.x, self.sigma_data = sde, t, x, sigma_data
        self.alpha, self.sigma = self._coefficients()

    def _coefficients(self):
        return sde_lib.alpha_sigma(self.sde, self.t, self.x)

    @property
    def shift(self):
        """m_t, the mean of x_t for x_0 = 0; None where it is zero."""
        if (y := sde_lib.origin(self.sde, self.x)) is not None:
            return expand(1 - self.alpha, self.x) * y
        if sde_lib.is_declared_affine(self.sde):
            return None
        return self.sde.marginal_prob(torch.zeros_like(self.x), self._vec_t)[0]

    @property
    def drift_at_zero(self):
        """f(0, t), the pull towards a shifted origin."""
        return self.sde.sde(torch.zeros_like(self.x), self._vec_t)[0]

    @property
    def _vec_t(self):
        # By a product: a 0-dim time on the CPU meets a batch on a GPU without a copy.
        ones = torch.ones(len(self.x), dtype=self.x.dtype, device=self.x.device)
        return (ones * self.t).to(self.x.dtype)

    @property
    def g(self):
        """The diffusion g(t)."""
        return sde_lib.drift_diffusion(self.sde, self.t, self.x)[1]

    @property
    def velocity(self):
        """α' and σ', from f = α'/α and g² = 2σσ' − 2fσ²."""
        f, g = sde_lib.drift_diffusion(self.sde, self.t, self.x)
        return f * self.alpha, f * self.sigma + g**2 / (2 * self.sigma)

    @property
    def sigma_tilde(self):
        """σ/α, the noise level of x/α."""
        return self.sigma / self.alpha


def _preconditioned(p: Point):
    # Karras et al. 2022, Table 1, on x/α = D + σ̃ ε̂.
    var, s2 = p.sigma_tilde**2, p.sigma_data**2
    c_out = p.sigma_tilde * p.sigma_data / torch.sqrt(var + s2)
    c_skip = s2 / (var + s2)
    return (1 - c_skip) / c_out, -c_skip * p.sigma_tilde / c_out


#: Coordinates of each output in the basis (D, ε̂); a plain 0 marks a family.
OUTPUTS: dict[str, Callable] = {
    "data": lambda p: (torch.ones_like(p.alpha), 0),
    "noise": lambda p: (0, torch.ones_like(p.sigma)),
    "score": lambda p: (0, -1 / p.sigma),
    "drift": lambda p: (0, -p.g / p.sigma),
    "v": lambda p: (-p.sigma, p.alpha),
    "velocity": lambda p: p.velocity,
    "preconditioned": _preconditioned,
}

#: Time inputs of networks, as functions of a Point; (B,) in the process's own order of times.
TIME_INPUTS: dict[str, Callable] = {
    "t*999": lambda p: p.t * (999 / p.sde.T),
    "t": lambda p: p.t,
    "sigma": lambda p: p.sigma,
    "lambda": lambda p: torch.log(p.alpha / p.sigma),
    "log_sigma/4": lambda p: 0.25 * torch.log(p.sigma_tilde),
}


@dataclass(frozen=True)
class Parametrization:
    """What a network predicts (`output`, a key of OUTPUTS) and what it is told of the time
    (`time`, a key of TIME_INPUTS or a function of a Point).

    `coefficients` makes a Point; discretely trained networks read theirs off a table. `sigma_data`
    is the data's standard deviation that a preconditioned network expects.
    """

    output: str
    time: str | Callable = "t*999"
    coefficients: Callable = Point
    sigma_data: float = SIGMA_DATA

    def __post_init__(self):
        if self.output not in OUTPUTS:
            raise ValueError(
                f"parametrization {self.output!r} is unknown; known: {sorted(OUTPUTS)}"
            )
        if isinstance(self.time, str) and self.time not in TIME_INPUTS:
            raise ValueError(f"time_input {self.time!r} is unknown; known: {sorted(TIME_INPUTS)}")
        arguments.real(sigma_data=self.sigma_data)
        if not self.sigma_data > 0:
            raise ValueError(f"a parametrization needs sigma_data > 0, got {self.sigma_data}")

    def point(self, sde, t: torch.Tensor, x: torch.Tensor) -> Point:
        """The coefficients of `sde` at times t, as this network knows them."""
        return self.coefficients(sde, t, x, self.sigma_data)

    def labels(self, point: Point) -> torch.Tensor:
        """The network's time input, (B,), on the data's device."""
        labels = (TIME_INPUTS[self.time] if isinstance(self.time, str) else self.time)(point)
        if labels.is_floating_point():
            labels = labels.to(point.x.dtype)
        return labels.to(point.x.device).expand(point.x.shape[0])

    def network_input(self, point: Point) -> torch.Tensor:
        """x_t; for a preconditioned network x_t − m_t scaled by c_in/α (Karras et al. 2022)."""
        if self.output != "preconditioned":
            return point.x
        c_in = 1 / torch.sqrt(point.sigma_tilde**2 + self.sigma_data**2)
        return expand(c_in / point.alpha, point.x) * _centred(point.x, point.shift)


def as_parametrization(value, time: str = "", sigma_data: float = SIGMA_DATA) -> Parametrization:
    """A Parametrization from an object or from the name of an output.

    `time`, a key of TIME_INPUTS, is by default ln(σ/α)/4 for a preconditioned network and t·999/T
    for any other.
    """
    if isinstance(value, Parametrization):
        return value
    time = time or ("log_sigma/4" if value == "preconditioned" else "t*999")
    return Parametrization(value, time, sigma_data=sigma_data)


def declared_parametrization(config) -> Parametrization | None:
    """What `config.model` says of the network's output and time input; None where it says nothing.

    Raises: ValueError for an unknown name, for a time_input without a parametrization, and for one
      that NCSN++ cannot read.
    """
    m = config.model
    output, time = m.get("parametrization", ""), m.get("time_input", "")
    if output:
        parametrization = as_parametrization(output, time, m.get("sigma_data", SIGMA_DATA))
        _check_time_of_ncsnpp(m, parametrization.time)
        return parametrization
    if time:
        raise ValueError(
            f"model.time_input={time!r} needs model.parametrization; set it too, such as 'noise'"
        )
    return None


def _check_time_of_ncsnpp(m, time) -> None:
    """Refuse a logarithm of what may be negative, and a division by what is no σ."""
    if m.get("name") != "ncsnpp":
        return
    if m.get("embedding_type") == "fourier" and time in ("log_sigma/4", "lambda"):
        raise ValueError(
            f"model.embedding_type='fourier' takes the logarithm of the time input, and {time!r} "
            "may be negative; set model.time_input='sigma', or embedding_type='positional'"
        )
    if m.get("scale_by_sigma") and time != "sigma":
        raise ValueError(
            f"model.scale_by_sigma=True divides the output by the time input, and {time!r} is no "
            "sigma; set model.scale_by_sigma=False, or model.time_input='sigma'"
        )


def convert(
    output: torch.Tensor, source: str, target: str, point: Point, onto: Point | None = None
) -> torch.Tensor:
    """The quantity `target` from the quantity `source`, at the same x_t.

    With `onto`, a point of another process with the same λ, `target` is that process's; D and ε̂
    are those of both.
    """
    if source == target and onto is None:
        return output
    onto = onto or point
    (p, r), (P, R) = OUTPUTS[source](point), OUTPUTS[target](onto)
    if _is_zero(p) and _is_zero(P):  # both multiples of ε̂
        return expand(R / r, point.x) * output
    shift = point.shift
    if source == "velocity" and shift is not None:
        output = output - _shift_velocity(point, shift)
    det = point.alpha * r - point.sigma * p
    a, b = (P * r - R * p) / det, (point.alpha * R - point.sigma * P) / det
    result = expand(a, point.x) * _centred(point.x, shift) + expand(b, point.x) * output
    if target == "velocity" and (shift := onto.shift) is not None:
        result = result + _shift_velocity(onto, shift)
    return result


def _centred(x, shift):
    return x if shift is None else x - shift


def _shift_velocity(point: Point, shift):
    """m', from dx/dt = f x + f(0, t) at x_0 = 0."""
    f = sde_lib.drift_diffusion(point.sde, point.t, point.x)[0]
    return expand(f, point.x) * shift + point.drift_at_zero


def _is_zero(value) -> bool:
    return not torch.is_tensor(value) and value == 0


def check_output(output, x: torch.Tensor | None = None) -> None:
    """Refuse what a network returned where it is no tensor of real numbers: WrongTypeError; with x,
    the network's input, also where its shape is another: ValueError."""
    if not torch.is_tensor(output) or output.is_complex():
        kind = output.dtype if torch.is_tensor(output) else type(output).__name__
        raise arguments.WrongTypeError(
            f"the network returned {kind}; expected one tensor of real numbers, of x's shape"
        )
    if x is not None and output.shape != x.shape:
        raise ValueError(
            f"the network returned shape {tuple(output.shape)} for an input of shape "
            f"{tuple(x.shape)}; expected the same"
        )


def check_times(t, x: torch.Tensor) -> None:
    """Refuse times that are no tensor with one number for each sample of x, or for all of them."""
    if not torch.is_tensor(t):
        raise arguments.WrongTypeError(
            f"a score needs its time as a tensor, got {type(t).__name__}; "
            "use torch.full((len(x),), t)"
        )
    if t.shape not in ((), (1,), x.shape[:1]):
        raise ValueError(
            f"a score needs one time for each of {len(x)} samples, or one for all, got times of "
            f"shape {tuple(t.shape)}; use t.reshape(-1)"
        )


class ScoreFunction:
    """s(x, t), with three more faces computed from the same network output.

    Call it for the score; `.denoise` is D = E[x_0 | x_t], `.noise` is ε̂ = E[z | x_t] and
    `.velocity` is α'D + σ'ε̂, the drift of the probability-flow ODE. x is (B, *) and t is (B,)
    or a 0-dim tensor. Keyword arguments go to the network. `nfe` counts network evaluations.
    """

    #: The process that the network was trained on, where it is not `sde`; see `on_process`.
    trained: sde_lib.SDE | None = None

    def __init__(self, model_fn: Callable, sde, parametrization: Parametrization):
        self.model_fn = model_fn
        self.sde = sde
        self.parametrization = parametrization
        self.device: torch.device | None = None  # the network's, where it is known
        self.nfe = 0

    def __call__(self, x, t, **conditions):
        return self._face("score", x, t, conditions)

    def denoise(self, x, t, **conditions):
        """D(x_t) = E[x_0 | x_t]."""
        return self._face("data", x, t, conditions)

    def noise(self, x, t, **conditions):
        """ε̂(x_t) = E[z | x_t]."""
        return self._face("noise", x, t, conditions)

    def velocity(self, x, t, **conditions):
        """Drift of the probability-flow ODE, α'D + σ'ε̂."""
        return self._face("velocity", x, t, conditions)

    def with_conditions(self, **conditions) -> ScoreFunction:
        """This score with keyword arguments of the network bound, such as class labels y (B,).

        It goes wherever a network goes (samplers, likelihood, losses), counting its own `nfe`.
        """
        bound = copy.copy(self)
        bound.model_fn = functools.partial(self.model_fn, **conditions)
        bound.nfe = 0
        return bound

    def _face(self, target: str, x, t, conditions):
        check_times(t, x)
        self.nfe += 1
        par, onto = self.parametrization, None
        if self.trained is None:
            point = par.point(self.sde, t, x)
        else:
            onto = Point(self.sde, t, x, par.sigma_data)
            point = _carried(onto, self.trained, par)
        output = self.output(point, **conditions)
        return convert(output.to(x.dtype), par.output, target, point, onto)

    def output(self, point: Point, **conditions) -> torch.Tensor:
        """The network's own output at a point of its own process, of x's shape."""
        par = self.parametrization
        output = self.model_fn(par.network_input(point), par.labels(point), **conditions)
        check_output(output, point.x)
        return output


def as_score_function(fn: Callable, sde) -> ScoreFunction:
    """Give a plain function s(x, t) the faces of a ScoreFunction, by Tweedie's formula."""
    if isinstance(fn, ScoreFunction):
        return fn
    return ScoreFunction(lambda x, t: fn(x, t), sde, Parametrization("score", "t"))


def flow_drift(sde, score_fn: ScoreFunction, watched: Callable = lambda fn: fn) -> Callable:
    """The drift of the probability-flow ODE, f x − ½ g² s, as a function of x and t.

    Of a process by α and σ it is the velocity, of the network's own output: near T a flow's f x and
    ½ g² s are large and all but equal, and through them float32 costs 3e-4 nats per dimension.
    `watched` goes around the network, or the score.
    """
    sde_lib.check_direction(sde)
    declared = sde_lib.is_declared_affine(sde) and all(
        getattr(type(sde_lib.unbound(sde)), name) is getattr(sde_lib.AffineSDE, name)
        for name in ("sde", "reverse")
    )
    if declared and type(score_fn) is ScoreFunction:
        own = copy.copy(score_fn)
        own.model_fn = watched(score_fn.model_fn)

        def velocity(x, t):
            value, score_fn.nfe = own.velocity(x, t), own.nfe
            return value

        return velocity
    rsde = sde.reverse(watched(score_fn), probability_flow=True)
    return lambda x, t: rsde.sde(x, t)[0]


# --- a change of process after training -----------------------------------------------------


def on_process(score_fn: ScoreFunction, sde, *, eps: float = 1e-5) -> ScoreFunction:
    """The score of a trained network on another process, with the same four faces.

        λ_A(t_A) = λ_B(t),   x_A − m_A = (α_A/α_B) (x − m_B):   D and ε̂ are those of both

    Samplers and likelihoods of `sde` take it as the model. It counts its own `nfe`.

    Args:
      score_fn: of the process A of the training, `score_fn.sde`; wrap it afterwards.
      sde: the process B.
      eps: the smallest time of the training.

    Raises: ValueError where B, from its T to its `sampling_eps`, leaves the λ of the training.
    """
    if type(score_fn)._face is not ScoreFunction._face:
        raise TypeError(
            f"on_process needs the network's own ScoreFunction, got {type(score_fn).__name__}; "
            "change the process first, then wrap"
        )
    trained = score_fn.trained or score_fn.sde
    inner = sde_lib.lambda_range(sde, sde.sampling_eps)
    outer = sde_lib.lambda_range(trained, eps)
    if sde is not trained and not sde_lib.within(inner, outer):
        raise ValueError(
            f"{type(sde).__name__} has λ = log(α/σ) from {inner[0]:.4g} to {inner[1]:.4g}, and the "
            f"network was trained from {outer[0]:.4g} to {outer[1]:.4g} on "
            f"{type(trained).__name__}; use sde_lib.common_stretch(sde, trained, eps), the part of "
            "it that lies within, or other σ or β"
        )
    moved = copy.copy(score_fn)
    moved.sde, moved.trained, moved.nfe = sde, None if sde is trained else trained, 0
    return moved


def _carried(onto: Point, trained, par: Parametrization) -> Point:
    """The point of `trained` with the same D and ε̂: equal λ, and x − m scaled by α."""
    lam = sde_lib.half_log_snr(onto.sde, onto.t)
    point = par.point(trained, sde_lib.time_of_half_log_snr(trained, lam), onto.x)
    x, shift = _centred(onto.x, onto.shift), point.shift
    x = expand(point.alpha / onto.alpha, x) * x
    point.x = x if shift is None else x + shift
    return point


# --- the rules of score_sde for networks that declare nothing -------------------------------


class _TablePoint(Point):
    """A discretely trained VP network's coefficients: α_t, σ_t are DDPM's tables at floor(t).

    `tables` is the process whose `N` is the network's number of scales.
    """

    def __init__(self, tables, sde, t, x, sigma_data):
        self.tables, self.index = tables, sde_lib.row(tables, t)
        super().__init__(sde, t, x, sigma_data)

    def _coefficients(self):
        return (
            sde_lib.lookup(self.tables.sqrt_alphas_cumprod, self.index),
            sde_lib.lookup(self.tables.sqrt_1m_alphas_cumprod, self.index),
        )


def legacy_parametrization(sde, continuous: bool) -> Parametrization:
    """score_sde's conventions: noise of 999·t for VP and sub-VP, score of σ for VE.

    Discretely trained networks get integer labels: floor(t(N−1)/T) for VP, and for VE
    round((T−t)(N−1)/T), since their σ descend. Any other process: noise of t·999/T.
    `sde` is a process whose `N` is the network's number of scales.
    """
    if isinstance(sde, sde_lib.VESDE):
        if continuous:
            return Parametrization("score", "sigma")
        return Parametrization("score", lambda p: _descending_label(sde, p.t))
    if isinstance(sde, sde_lib.VPSDE) and not continuous:
        return Parametrization("noise", lambda p: p.index, functools.partial(_TablePoint, sde))
    return Parametrization("noise", "t*999")


def _descending_label(sde, t):
    return torch.round((sde.T - t) * ((sde.N - 1) / sde.T)).long()
