"""Measurement operators against dense linear algebra in float64."""

import math

import pytest
import torch

import operators
from operators import couple, decouple, get_operator

GREY = (1, 8, 12)
COLOUR = (3, 12, 8)
CASES = {
    "mask": ("mask", COLOUR, {"share": 0.4}),
    "mask random": ("inpaint", COLOUR, {"mask": "random", "share": 0.7, "seed": 3}),
    "mask of points": ("mask", (5,), {"mask": torch.tensor([1, 0, 0, 1, 1])}),
    "mask of channels": ("mask", COLOUR, {"mask": torch.arange(288).reshape(COLOUR) % 3}),
    "grey": ("grey", COLOUR, {}),
    "grey luma": ("grey", COLOUR, {"weights": (0.299, 0.587, 0.114)}),
    "pool": ("superres", COLOUR, {"factor": 2}),
    "pool grey": ("superres", GREY, {}),
    "bicubic": ("superres_bicubic", COLOUR, {"factor": 2}),
    "bicubic grey": ("superres_bicubic", GREY, {"factor": 4}),
    "gaussian": ("deblur_gaussian", COLOUR, {"std": 0.7}),
    "gaussian odd": ("deblur_gaussian", (1, 7, 9), {"std": 2.0}),
    "gaussian cut": ("deblur_gaussian", COLOUR, {"std": 1.0, "cut": 0.1}),
    "motion": ("deblur_motion", COLOUR, {"length": 5, "angle": 30}),
    "motion even": ("deblur_motion", GREY, {"length": 4, "angle": 0}),
    "sensing": ("compressed_sensing", COLOUR, {"ratio": 0.3}),
    "sensing odd": ("compressed_sensing", (7,), {"ratio": 0.5, "seed": 1}),
    "mri": ("mri", COLOUR, {"acceleration": 2}),
    "mri random": ("mri", (1, 7, 9), {"mask": "random", "acceleration": 3, "seed": 2}),
    "ct": ("ct", (1, 7, 9), {"angles": 6}),
    "ct colour": ("ct", COLOUR, {"angles": 5, "span": 120}),
}


def made(case):
    name, shape, options = CASES[case]
    return get_operator(name, shape, **options)


def batch(shape, n=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(dtype)


def far(a, b):
    return (a - b).abs().max().item()


def by_cg(operator):
    """The same operator as one whose singular values are not cheap."""
    operator.__dict__["svd"] = None
    operator.tolerance, operator.iterations = 1e-10, 2000
    return operator


@pytest.fixture(params=CASES)
def A(request):
    return made(request.param)


def test_the_adjoint_passes_the_dot_product_test(A):
    x, y = batch(A.shape_in), batch(A.shape_out, seed=1)
    left = (A(x) * y).reshape(3, -1).sum(1)
    right = (x * A.adjoint(y)).reshape(3, -1).sum(1)
    assert far(left, right) < 1e-10 * (1 + left.abs().max().item())


def test_the_pseudo_inverse_obeys_the_four_conditions(A):
    x, y = batch(A.shape_in), batch(A.shape_out, seed=1)
    assert far(A(A.pinv(A(x))), A(x)) < 1e-10
    size = A.pinv(y).abs().max().item()
    assert far(A.pinv(A(A.pinv(y))), A.pinv(y)) < 1e-10 * (1 + size)
    u, v = batch(A.shape_in, seed=2), batch(A.shape_out, seed=3)
    onto_rows, onto_range = A.pinv(A(x)), A(A.pinv(y))
    assert far((onto_rows * u).sum(), (x * A.pinv(A(u))).sum()) < 1e-8
    assert far((onto_range * v).sum(), (y * A(A.pinv(v))).sum()) < 1e-8


def test_the_pseudo_inverse_is_that_of_the_dense_matrix(A):
    y = batch(A.shape_out)
    expected = y.reshape(3, -1) @ torch.linalg.pinv(A.dense()).T
    assert far(A.pinv(y).reshape(3, -1), expected) < 1e-8 * (1 + expected.abs().max().item())


def test_the_singular_values_are_those_of_the_dense_matrix(A):
    s = torch.linalg.svdvals(A.dense())
    kept = A.svd.values.sort(descending=True).values
    size = min(len(s), len(kept))
    assert far(s[:size], kept[:size]) < 1e-10
    assert s[size:].abs().sum() < 1e-10
    assert kept[size:].abs().sum() < 1e-10


def test_the_decomposition_gives_the_operator_by_orthonormal_bases(A):
    svd, x = A.svd, batch(A.shape_in)
    c = batch((len(svd.values),), seed=4)
    assert far(svd.Vt(svd.V(c)), c) < 1e-10
    assert far(svd.Ut(svd.U(c)), c) < 1e-10
    assert far(svd.U(svd.values * svd.Vt(x)), A(x)) < 1e-10
    y = batch(A.shape_out, seed=5)
    assert far(svd.V(svd.values * svd.Ut(y)), A.adjoint(y)) < 1e-10
    dot = (svd.V(c).reshape(3, -1) * x.reshape(3, -1)).sum(1)
    assert far(dot, (c * svd.Vt(x)).sum(1)) < 1e-10  # V and Vt are each other's adjoint
    dot = (svd.U(c).reshape(3, -1) * y.reshape(3, -1)).sum(1)
    assert far(dot, (c * svd.Ut(y)).sum(1)) < 1e-10


def dense_gram_solution(A, y, r2, s2):
    M = A.dense()
    gram = r2.reshape(-1, 1, 1) * (M @ M.T) + s2.reshape(-1, 1, 1) * torch.eye(len(M))
    return torch.linalg.solve(gram, y.reshape(3, -1, 1)).reshape(y.shape)


def test_the_gram_system_is_solved_as_by_the_dense_matrix(A):
    y = batch(A.shape_out)
    r2, s2 = torch.tensor([0.5, 1.0, 4.0]).double(), torch.tensor([0.1, 1.0, 0.01]).double()
    expected = dense_gram_solution(A, y, r2, s2)
    assert far(A.solve_gram(y, r2, s2), expected) < 1e-9 * expected.abs().max().item()
    assert (
        far(A.solve_gram(y, 1.0, 0.1), dense_gram_solution(A, y, r2 * 0 + 1, s2 * 0 + 0.1)) < 1e-8
    )


@pytest.mark.parametrize("case", ["ct", "mri", "sensing odd", "gaussian", "bicubic grey"])
def test_conjugate_gradients_agree_with_the_decomposition(case):
    A, slow = made(case), by_cg(made(case))
    x, y = batch(A.shape_in), batch(A.shape_out, seed=1)
    assert far(slow.pinv(y), A.pinv(y)) < 1e-8 * (1 + A.pinv(y).abs().max().item())
    assert far(slow(slow.pinv(slow(x))), A(x)) < 1e-8
    s2 = torch.tensor([0.3, 0.01, 2.0]).double()
    assert far(slow.solve_gram(y, 2.0, s2), A.solve_gram(y, 2.0, s2)) < 1e-7


@pytest.mark.parametrize("case", ["mask", "grey", "bicubic", "sensing"])
def test_a_singular_gram_system_takes_the_pseudo_inverse(case):
    A, slow = made(case), by_cg(made(case))
    y = batch(A.shape_out)
    M = A.dense()
    expected = (torch.linalg.pinv(M @ M.T) @ y.reshape(3, -1, 1)).reshape(y.shape)
    assert far(A.solve_gram(y, 1.0, 0.0), expected) < 1e-8
    assert far(slow.solve_gram(y, 1.0, 0.0), expected) < 1e-7


def test_a_large_radon_transform_goes_by_conjugate_gradients():
    A = get_operator("ct", (1, 66, 66), angles=2)
    assert A.svd is None
    x, y = batch(A.shape_in, 1), batch(A.shape_out, 1, seed=1)
    assert far((A(x) * y).sum(), (x * A.adjoint(y)).sum()) < 1e-10
    assert far(A(A.pinv(A(x))), A(x)) < 1e-6
    # A⁺ y is of least norm: nothing of it is in the null space of A.
    null = x - A.pinv(A(x))
    assert abs((A.pinv(y) * null).sum()) < 1e-5 * (A.pinv(y).norm() * null.norm())


def test_conjugate_gradients_that_do_not_arrive_say_so():
    A = by_cg(made("ct"))
    A.iterations = 2
    with pytest.warns(RuntimeWarning, match="relative residual"):
        A.pinv(batch(A.shape_out))


def test_constants_follow_dtype_and_gradients_flow(A):
    x = batch(A.shape_in, dtype=torch.float32).requires_grad_()
    y = A(x)
    assert y.dtype == torch.float32
    assert far(y.detach().double(), A(x.detach().double())) < 1e-4
    w = batch(A.shape_out, dtype=torch.float32)
    (grad,) = torch.autograd.grad(y, x, w)
    assert far(grad, A.adjoint(w)) < 1e-4
    assert A.pinv(w).dtype == A.adjoint(w).dtype == torch.float32
    assert A.solve_gram(w, 1.0, 0.5).dtype == torch.float32


def test_any_number_of_leading_axes_goes(A):
    x = batch(A.shape_in, 6)
    nested = x.reshape(2, 3, *A.shape_in)
    y = A(x)
    assert torch.equal(A(nested), y.reshape(2, 3, *A.shape_out))
    assert torch.equal(A.adjoint(y.reshape(2, 3, *A.shape_out)).reshape(x.shape), A.adjoint(y))
    assert far(A(x[0]), y[0]) < 1e-12


def test_projection_satisfies_the_measurement_and_moves_least(A):
    x, y = batch(A.shape_in), A(batch(A.shape_in, seed=1))
    moved = A.project(x, y)
    assert far(A(moved), y) < 1e-8
    shift = moved - x
    assert far(A.pinv(A(shift)), shift) < 1e-8  # nothing of the move is in the null space


# --- what each measures -----------------------------------------------------------------------


def test_a_mask_keeps_what_it_is_true_on():
    A = get_operator("mask", (1, 4, 6), share=0.5)
    assert A.mask.sum() == 24 - 6
    assert not A.mask[0, 1:3, 1:4].any()
    kept = get_operator("mask", (1, 40, 50), mask="random", share=0.92).mask
    assert kept.sum() == round(0.08 * 2000)
    left = get_operator("mask", (1, 4, 6), mask="left").mask
    assert not left[..., :3].any()
    assert left[..., 3:].all()


def test_grey_and_colour_are_decoupled_by_score_sdes_matrix():
    published = torch.tensor(
        [
            [5.7735014e-01, -8.1649649e-01, 4.7008697e-08],
            [5.7735026e-01, 4.0824834e-01, 7.0710671e-01],
            [5.7735026e-01, 4.0824822e-01, -7.0710683e-01],
        ]
    )
    assert far(operators.DECOUPLING, published) < 1.3e-7
    M = operators.DECOUPLING
    assert far(M.T @ M, torch.eye(3)) < 1e-15
    x = batch(COLOUR)
    assert far(couple(decouple(x)), x) < 1e-14
    assert far(decouple(x)[:, :1], math.sqrt(3) * get_operator("grey", COLOUR)(x)) < 1e-14


def test_bicubic_is_pillows():
    x = batch((3, 16, 24))
    A = get_operator("superres_bicubic", (3, 16, 24), factor=4)
    small = torch.nn.functional.interpolate(x, (4, 6), mode="bicubic", antialias=True)
    assert far(A(x), small) < 1e-12


def test_a_constant_image_stays_constant():
    x = torch.full((1, *COLOUR), 0.75, dtype=torch.float64)
    for case in ("pool", "bicubic", "gaussian", "motion", "grey"):
        assert far(made(case)(x), 0.75 * x.new_ones(1)) < 1e-12


def test_blur_is_a_circular_convolution():
    A = made("gaussian")
    x, k = batch(A.shape_in), A.kernel
    p = k.shape[0] // 2
    padded = torch.nn.functional.pad(x, (p, p, p, p), mode="circular")
    expected = torch.nn.functional.conv2d(padded, k.flip((0, 1)).expand(3, 1, *k.shape), groups=3)
    assert far(A(x), expected) < 1e-12


def test_a_cut_leaves_out_what_is_hardly_measured():
    values = made("gaussian cut").svd.values
    assert values[values > 0].min() >= 0.1
    assert (values == 0).any()
    assert made("gaussian").svd.values.min() < 0.1


@pytest.mark.parametrize("angle", [0, 45, 90])
def test_motion_goes_where_the_angle_says(angle):
    k = operators.MotionBlur((1, 9, 9), length=3, angle=angle).kernel
    assert k.sum() == pytest.approx(1)
    assert far(k, k.flip((0, 1))) < 1e-12
    if angle == 0:
        assert far(k[0], k[2]) < 1e-12
        assert k[1].min() > 0.2
    elif angle == 90:
        assert k[:, 1].min() > 0.2
    else:
        assert k[0, 2] > k[0, 0]  # up to the right


def test_fourier_undersampling_takes_the_frequencies_of_its_mask():
    A = get_operator("mri", (1, 8, 12), acceleration=3, centre=0.2)
    assert A.mask[4, 6]
    assert (A.mask.all(0) | ~A.mask.any(0)).all()
    assert A.mask[0].sum() == 4
    x = batch((1, 8, 12))
    F = torch.fft.fftshift(torch.fft.fft2(x, norm="ortho"), dim=(-2, -1))[0, 0][A.mask]
    y = torch.complex(*A(x)[0, 0])
    assert sorted(F.abs().tolist()) == pytest.approx(sorted(y.abs().tolist()))


def test_all_frequencies_give_back_the_image():
    A = get_operator("mri", COLOUR, acceleration=1)
    x = batch(COLOUR)
    assert far(A.adjoint(A(x)), x) < 1e-12
    assert A.svd.values.unique().tolist() == [1.0]


def test_a_disc_has_the_line_integrals_of_a_disc():
    n, R = 32, 10.0
    u = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
    disc = ((u.unsqueeze(1) ** 2 + u**2).sqrt() < R).double().reshape(1, 1, n, n)
    y = get_operator("ct", (1, n, n), angles=12)(disc)[0, 0] * n
    s = torch.arange(y.shape[1], dtype=torch.float64) - (y.shape[1] - 1) / 2
    chord = 2 * (R**2 - s**2).clamp(min=0).sqrt()
    inside = s.abs() < 0.8 * R
    assert far(y[:, inside], chord[inside]) < 1.5
    assert (y[:, inside] - chord[inside]).abs().mean() < 0.5
    assert far(y.sum(1), disc.sum()) < 0.02 * disc.sum()


def test_upright_and_level_rays_are_sums_of_columns_and_rows():
    x = batch((1, 8, 8))
    y = get_operator("ct", (1, 8, 8), angles=2, detectors=8)(x) * 8
    assert far(y[:, 0, 0], x[:, 0].sum(1)) < 1e-12
    assert far(y[:, 0, 1], x[:, 0].sum(2).flip(1)) < 1e-12


def test_compressed_sensing_has_orthonormal_rows():
    A = made("sensing")
    y = batch(A.shape_out)
    assert far(A(A.adjoint(y)), y) < 1e-12
    other = get_operator("compressed_sensing", COLOUR, ratio=0.3, seed=1)
    assert far(other(batch(COLOUR)), A(batch(COLOUR))) > 0.1


def test_operators_compose():
    B = get_operator("deblur_gaussian", COLOUR, std=0.8)
    A = get_operator("superres", COLOUR, factor=2) @ B
    x, y = batch(COLOUR), batch(A.shape_out, seed=1)
    assert far(A(x), get_operator("superres", COLOUR, factor=2)(B(x))) == 0
    assert far((A(x) * y).sum(), (x * A.adjoint(y)).sum()) < 1e-10
    expected = y.reshape(3, -1) @ torch.linalg.pinv(A.dense()).T
    assert far(A.pinv(y).reshape(3, -1), expected) < 1e-9
    assert far(by_cg(A).pinv(y).reshape(3, -1), expected) < 1e-7


# --- names and errors -------------------------------------------------------------------------


def test_every_registered_operator_is_in_the_catalogue_and_tested():
    catalogue = operators.catalogue()
    assert set(catalogue) >= {name for name, _, _ in CASES.values()}
    assert catalogue["superres"] == {"factor": 4}
    assert catalogue["mri"]["acceleration"] == 4.0
    for name in catalogue:
        operators.get_operator(name, (3, 16, 16))  # the defaults are of use


def test_a_users_operator_is_registered_and_found():
    class Half(operators.Operator):
        def __init__(self, shape):
            super().__init__(shape, shape)

        def forward(self, x):
            return x / 2

        transpose = forward

    operators.register_operator(Half, name="half, of a test")
    A = get_operator("half, of a test", (2, 3))
    assert far(A.pinv(batch((2, 3))), 2 * batch((2, 3))) < 1e-12
    assert far(A.solve_gram(batch((2, 3)), 4.0, 1.0), batch((2, 3)) / 2) < 1e-12
    with pytest.raises(ValueError, match="already registered"):
        operators.register_operator(Half, name="half, of a test")


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("blur", COLOUR, {}, "unknown; known: .*compressed_sensing"),
        ("superres", COLOUR, {"scale": 2}, "no option 'scale'; its options are factor"),
        ("superres", COLOUR, {"factor": 5}, "divides height and width, got factor 5 for 12 x 8"),
        ("superres", (12, 8), {"factor": 2}, r"shape \(C, H, W\) of one image"),
        ("superres_bicubic", COLOUR, {"factor": 2.5}, "factor: expected an integer"),
        ("grey", GREY, {}, "several channels"),
        ("grey", COLOUR, {"weights": (1.0, 2.0)}, "a weight for each"),
        ("mask", COLOUR, {"mask": torch.ones(5, 5)}, "does not broadcast"),
        ("mask", COLOUR, {"mask": torch.zeros(12, 8)}, "nothing known"),
        ("mask", COLOUR, {"mask": "middle"}, "known: centre, left, top, random"),
        ("mask", COLOUR, {"share": 1.0}, "0 ≤ share < 1"),
        ("deblur_gaussian", COLOUR, {"std": 0}, "std > 0"),
        ("deblur_gaussian", COLOUR, {"size": 4}, "odd sides"),
        ("deblur_gaussian", COLOUR, {"size": 9}, "larger than the image"),
        ("deblur_gaussian", COLOUR, {"cut": 1.0}, "0 ≤ cut < 1"),
        ("deblur_motion", COLOUR, {"length": 20}, "larger than the image"),
        ("compressed_sensing", COLOUR, {"ratio": 1.5}, "0 < ratio ≤ 1"),
        ("mri", COLOUR, {"mask": "radial"}, "known: cartesian, random"),
        ("mri", COLOUR, {"mask": torch.ones(3, 3)}, "mask of frequencies"),
        ("mri", COLOUR, {"acceleration": 0.5}, "acceleration ≥ 1"),
        ("ct", COLOUR, {"angles": 0}, "1 to 10,000 angles"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(name, shape, options, message):
    with pytest.raises(ValueError, match=message):
        get_operator(name, shape, **options)


def test_data_of_another_shape_or_of_integers_are_refused(A):
    with pytest.raises(ValueError, match="expected x of shape"):
        A(torch.zeros(2, 3, 5, 11))
    with pytest.raises(ValueError, match="expected y of shape"):
        A.adjoint(torch.zeros(2, 17))
    with pytest.raises(ValueError, match="floating-point"):
        A(torch.zeros(2, *A.shape_in, dtype=torch.uint8))


def test_a_composition_of_shapes_that_do_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"A.shape_in = B.shape_out"):
        get_operator("grey", COLOUR) @ get_operator("superres", COLOUR, factor=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_constants_follow_the_device(A):
    x = batch(A.shape_in, dtype=torch.float32)
    assert far(A(x.cuda()).cpu(), A(x)) < 1e-4
    assert far(A.pinv(A(x).cuda()).cpu(), A.pinv(A(x))) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_half_precision_is_computed_in_float32(case, dtype):
    A = made(case)
    x = batch(A.shape_in, dtype=dtype)
    y = A(x)
    assert torch.equal(y, A(x.float()).to(dtype))
    assert torch.equal(A.adjoint(y), A.adjoint(y.float()).to(dtype))
    assert torch.equal(A.pinv(y), A.pinv(y.float()).to(dtype))
    assert torch.equal(A.solve_gram(y, 1.0, 0.1), A.solve_gram(y.float(), 1.0, 0.1).to(dtype))


@pytest.mark.parametrize("case", CASES)
def test_every_map_takes_an_empty_batch(case):
    A = made(case)
    x = torch.zeros(0, *A.shape_in)
    y = A(x)
    assert y.shape == (0, *A.shape_out)
    assert A.adjoint(y).shape == A.pinv(y).shape == A.project(x, y).shape == x.shape
    assert A.solve_gram(y, 1.0, 0.1).shape == y.shape
    assert A.solve_gram(y, torch.zeros(0), torch.zeros(0)).shape == y.shape


def test_conjugate_gradients_warn_of_what_is_no_number():
    A = get_operator("superres_bicubic", (1, 8, 8), factor=2)
    A.__dict__["svd"] = None
    with pytest.warns(RuntimeWarning, match="relative residual of nan"):
        A.pinv(torch.full((1, 1, 4, 4), math.nan))


@pytest.mark.parametrize("case", CASES)
def test_autocast_does_not_reach_a_measurement(case):
    """In bfloat16 a matrix product would be 1e-2 off, and A x = y with it."""
    A = made(case)
    x = batch(A.shape_in, dtype=torch.float32)
    y = A(x)
    svd = A.svd
    c = svd.Vt(x)

    def all_maps():
        maps = (A(x), A.adjoint(y), A.pinv(y), A.solve_gram(y, 1.0, 0.1))
        return (*maps, svd.V(c), svd.Vt(x), svd.U(c), svd.Ut(y))

    plain = all_maps()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = all_maps()
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)
