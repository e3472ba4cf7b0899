"""Class-conditional networks: labels, their dropout, and the way from the loss to the samples."""

import pytest
import torch
from test_models import LAYOUTS, make_config
from test_models import batch as images
from test_models import tiny as tiny_ncsnpp

import likelihood
import losses
import sampling
import sde_lib
from models import layers, utils
from models.ema import ExponentialMovingAverage

CLASSES = 3


def tiny(name="ncsnpp", **options):
    options = {"embedding_type": "positional", "num_classes": CLASSES, **options}
    return tiny_ncsnpp(name=name, **options)


def build(name="ncsnpp", **options):
    return utils.get_model(name)(tiny(name, **options))


def trained(net):
    """Give every weight and class an effect, as training would."""
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.zeros_(net.label_embedding.table.weight[-1])
    return net


# The network


@pytest.mark.parametrize(
    ("path", "values", "shapes"),
    [next((*item, g["shapes"]) for item in g["configs"].items()) for g in LAYOUTS],
    ids=[next(iter(g["configs"])) for g in LAYOUTS],
)
def test_the_labels_table_is_the_last_parameter_of_a_published_network(path, values, shapes):
    if not values["model.conditional"]:
        pytest.skip("not told the time")
    with torch.device("meta"):
        config = make_config({**values, "model.num_classes": 10})
        net = utils.get_model(values["model.name"])(config)
    found = [list(v.shape) for v in net.state_dict().values()]
    assert found == [*shapes, [11, 4 * values["model.nf"]]]
    assert next(reversed(net.state_dict())) == "label_embedding.table.weight"


@pytest.mark.parametrize("name", ["ncsnpp", "ddpm"])
def test_an_untrained_class_conditional_network_equals_the_unconditional_one(name):
    nets = []
    for classes in (0, CLASSES):
        torch.manual_seed(1)
        nets.append(build(name, num_classes=classes).eval())
    x, t = images(tiny())
    y = torch.tensor([0, 2])
    want = nets[0](x, t)
    assert torch.equal(nets[1](x, t), want) and torch.equal(nets[1](x, t, y), want)
    shared = list(nets[0].parameters())
    assert all(torch.equal(p, q) for p, q in zip(shared, nets[1].parameters()))


@pytest.mark.parametrize("name", ["ncsnpp", "ddpm"])
def test_the_absent_label_is_the_last_index_and_none(name):
    net = trained(build(name)).eval()
    x, t = images(tiny())
    absent = net(x, t, torch.tensor([CLASSES, 1]))
    torch.testing.assert_close(absent[0], net(x, t)[0])
    assert (absent[1] - net(x, t)[1]).abs().max() > 1e-3 * absent.abs().max()


def test_the_absent_label_stays_without_effect_in_training():
    net = build()
    x, t = images(tiny())
    net(x, t, torch.tensor([CLASSES, 1])).sum().backward()
    table = net.label_embedding.table.weight
    assert table.grad[CLASSES].abs().max() == 0 and table.grad[1].abs().max() > 0


def test_labels_are_dropped_in_training_only():
    embed = layers.LabelEmbedding(CLASSES, 4, dropout=0.25)
    torch.nn.init.ones_(embed.table.weight[:-1])
    y = torch.randint(0, CLASSES, (4000,))
    share = (embed(y) == 0).all(dim=1).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.03)
    assert (embed.eval()(y) == 1).all()
    state = torch.get_rng_state()
    embed(y)
    embed.dropout = 0.0
    embed.train()(y)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn where nothing is dropped


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_are_integers_of_any_kind(dtype):
    embed = layers.LabelEmbedding(CLASSES, 4, dropout=0.0)
    torch.nn.init.normal_(embed.table.weight)
    y = torch.arange(CLASSES)
    assert torch.equal(embed(y.to(dtype)), embed(y))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0]), r"shape \(2,\), got \(1,\)"),
        (torch.tensor([0.0, 1.0]), "integers, got torch.float32"),
        (torch.tensor([0, 4]), r"in 0 … 3 .*got 0 … 4"),
        (torch.tensor([-1, 0]), "got -1 … 0"),
    ],
)
def test_labels_that_do_not_fit_are_refused(y, message):
    with pytest.raises(ValueError, match=message):
        build()(*images(tiny()), y)


def test_labels_for_an_unconditional_network_are_refused():
    with pytest.raises(ValueError, match=r"need model\.num_classes > 0"):
        build(num_classes=0)(*images(tiny()), torch.tensor([0, 1]))


# From the loss to the samples


class Seen(torch.nn.Module):
    """A network that keeps the labels it is given."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, x, t, y=None):
        self.seen.append(y)
        return self.a * x


@pytest.mark.parametrize(
    ("sde", "continuous"),
    [
        (sde_lib.VPSDE(N=50), True),
        (sde_lib.subVPSDE(N=50), True),
        (sde_lib.VESDE(N=50), True),
        (sde_lib.VPSDE(N=50), False),
        (sde_lib.VESDE(N=50), False),
    ],
)
def test_every_loss_and_step_hands_conditions_to_the_network(sde, continuous):
    net, y = Seen(), torch.tensor([0, 2])
    state = {
        "model": net,
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.0),
        "ema": ExponentialMovingAverage(net.parameters(), 0.9),
        "step": 0,
    }
    x = torch.rand(2, 1, 4, 4)
    for train in (True, False):
        step = losses.get_step_fn(sde, train, lambda *_, **__: None, continuous=continuous)
        step(state, x, y=y)
        step(state, x)
    assert net.seen[0] is y and net.seen[1] is None and net.seen[2] is y and net.seen[3] is None


def test_bound_conditions_reach_the_network_under_any_sampler_and_the_likelihood():
    sde, y = sde_lib.VPSDE(N=20, beta_max=5), torch.tensor([0, 2])
    net = Seen()
    score = utils.get_score_fn(sde, net, continuous=True)
    bound = score.with_conditions(y=y)
    x, t = torch.rand(2, 1, 4, 4), torch.tensor([0.3, 0.7])
    for face in (bound, bound.denoise, bound.noise, bound.velocity):
        face(x, t)
    shape, euler = (2, 1, 4, 4), sampling.get_predictor("euler_maruyama")
    pc = sampling.get_pc_sampler(
        sde, shape, euler, None, lambda x: x, 0.1, continuous=True, eps=1e-3, steps=3
    )
    assert pc(bound)[1] == 3
    sampling.get_ode_sampler(sde, shape, lambda x: x, rtol=0.1, atol=0.1)(bound)
    likelihood.get_likelihood_fn(sde, lambda x: x, rtol=0.1, atol=0.1)(bound, x)
    assert len(net.seen) > 10 and all(labels is y for labels in net.seen)
    assert score.nfe == 0 and bound.nfe == len(net.seen)
    other = torch.tensor([1, 1])
    bound(x, t, y=other)
    assert net.seen[-1] is other


def test_a_class_conditional_network_learns_its_classes():
    options = {"num_classes": 2, "label_dropout": 0.2, "num_channels": 1, "scale_by_sigma": True}
    config = tiny(embedding_type="fourier", **options)
    net, sde = utils.get_model("ncsnpp")(config), sde_lib.VESDE(1, 3, 20)
    ema = ExponentialMovingAverage(net.parameters(), 0.9)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    state = {"model": net, "optimizer": optimizer, "ema": ema, "step": 0}
    step = losses.get_step_fn(sde, True, lambda o, *_, **__: o.step(), reduce_mean=True)
    for _ in range(150):
        y = torch.randint(0, 2, (64,))
        step(state, y.float().reshape(-1, 1, 1, 1).expand(64, 1, 2, 2), y=y)  # black or white
    score = utils.get_score_fn(sde, net, continuous=True)
    x, t = 2 * torch.randn(256, 1, 2, 2), torch.full((256,), 0.6)
    found = [score.denoise(x, t, y=torch.full((256,), k)).mean().item() for k in range(2)]
    assert found[0] < score.denoise(x, t).mean().item() < found[1], found
    assert found[1] - found[0] > 0.5, found


def test_a_class_conditional_network_compiles_into_one_graph():
    net = trained(build()).eval()
    x, t = images(tiny())
    y = torch.tensor([0, CLASSES])
    with torch.no_grad():
        compiled = torch.compile(net, backend="eager", fullgraph=True)(x, t, y)
        torch.testing.assert_close(compiled, net(x, t, y))
