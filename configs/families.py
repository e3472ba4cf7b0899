"""What the experiments of one SDE, or of one architecture, have in common.

Each function changes the config it is given and returns it, so that a config file reads as a
sentence: ``vp(ddpmpp(get_default_configs()))``. Configurations are typed Any: a ConfigDict gives
its attributes no useful type.
"""

from typing import Any

from configs import defaults


def published() -> Any:
    """Return the defaults plus the keys that score_sde ships and never reads."""
    config = on_best_device(defaults.get_default_configs())
    config.model.update(attention_type="ddpm", conv_size=3)
    return config


def on_best_device(config: Any) -> Any:
    """Replace a device of 'auto' by the first GPU, or by the CPU where there is none."""
    if config.device == "auto":
        import torch

        config.device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    return config


def ncsnpp(config: Any) -> Any:
    """NCSN++: FIR resampling and a residual input pyramid."""
    config.model.update(name="ncsnpp", fir=True, progressive_input="residual")
    return config


def ddpmpp(config: Any) -> Any:
    """DDPM++: NCSN++ without FIR resampling and without the input pyramid."""
    ncsnpp(config).model.update(fir=False, progressive_input="none")
    return config


def ve(config: Any) -> Any:
    """The VE SDE on data in [0, 1]: Fourier features, predictor and Langevin corrector."""
    config.training.update(sde="vesde", continuous=True, reduce_mean=False)
    config.sampling.update(method="pc", predictor="reverse_diffusion", corrector="langevin")
    config.data.centered = False
    config.model.update(scale_by_sigma=True, ema_rate=0.999, embedding_type="fourier")
    return config


def vp(config: Any) -> Any:
    """The VP SDE on data in [-1, 1]: positional embedding, predictor only."""
    config.training.update(sde="vpsde", continuous=True, reduce_mean=True)
    config.sampling.update(method="pc", predictor="euler_maruyama", corrector="none")
    config.data.centered = True
    config.model.update(scale_by_sigma=False, ema_rate=0.9999, embedding_type="positional")
    return config


def subvp(config: Any) -> Any:
    """The sub-VP SDE: the settings of the VP SDE."""
    vp(config).training.sde = "subvpsde"
    return config


def edm(config: Any) -> Any:
    """EDM (Karras et al. 2022) on data in [-1, 1]: preconditioned F, log-normal noise levels, and
    Heun's method on 18 times, which is 35 evaluations."""
    vp(config).training.update(sde="edm", weighting="edm", time_sampler="lognormal")
    config.sampling.update(predictor="heun", steps=18)
    config.model.update(parametrization="preconditioned", sigma_min=0.002, sigma_max=80.0)
    return config


def edm_cifar10(config: Any) -> Any:
    """EDM's settings for CIFAR-10 (Karras et al. 2022, Table 7)."""
    batch = 512
    edm(config).training.update(batch_size=batch, n_iters=200_000_000 // batch)
    config.model.update(ch_mult=(2, 2, 2), dropout=0.13, ema_rate=0.5 ** (batch / 500_000))
    config.optim.update(lr=1e-3, warmup=10_000_000 // batch, grad_clip=-1.0)
    config.eval.update(begin_ckpt=1, end_ckpt=8)
    return config


def with_sigma_features(config: Any) -> Any:
    """Fourier features of ln(sigma)/4, EDM's time input, from a network that takes ln(sigma)
    itself: the frequencies of the scale 16 divided by 4."""
    config.model.update(embedding_type="fourier", time_input="sigma", fourier_scale=4.0)
    return config


def flow(config: Any) -> Any:
    """Rectified flow, the path of flow matching, on data in [-1, 1]: the velocity and its plain
    squared error, uniform times. Heun's method, in sigma/alpha, wants times even in log-SNR."""
    vp(config).training.update(sde="rectified_flow", weighting="velocity")
    config.sampling.update(predictor="heun", steps=18, schedule="logsnr")
    config.model.parametrization = "velocity"
    return config


def cosine_v(config: Any) -> Any:
    """v-prediction (Salimans & Ho 2022) on the cosine VP process, and DPM-Solver++(2M)."""
    vp(config).training.update(sde="cosine", weighting="v")
    config.sampling.update(predictor="dpmpp_2m", steps=20, schedule="logsnr")
    config.model.parametrization = "v"
    return config


def maximum_likelihood(config: Any, eps: float = 1e-5) -> Any:
    """ScoreFlow's objective (Song, Durkan, Murray & Ermon 2021): the weight g^2, which bounds the
    likelihood, times by importance sampling, even in log-SNR, down to eps; samples by the ODE."""
    config.training.update(likelihood_weighting=True, time_sampler="likelihood", eps=eps)
    config.sampling.update(method="ode", eps=max(eps, 1e-3))
    config.eval.update(enable_loss=False, enable_bpd=True, likelihood_eps=eps)
    return config


def dequantizer(config: Any) -> Any:
    """From a score model's settings those of a dequantizer, to be trained on it frozen, wherever
    --config.training.score_checkpoint says it is (Ho et al. 2019, Flow++)."""
    config.training.update(
        objective="dequantization",
        weighting="",
        likelihood_weighting=False,
        time_sampler="uniform",
        truncate=0.0,
        snapshot_sampling=False,
    )
    config.data.uniform_dequantization = False
    config.model.update(
        name="dequantizer", parametrization="", time_input="", nf=64, num_res_blocks=2
    )
    config.eval.update(enable_loss=True, enable_sampling=False, enable_bpd=False)
    return config


def scoreflow_dequantizer(config: Any) -> Any:
    """A dequantizer trained as ScoreFlow's: 300 thousand steps, an average of decay 0.99."""
    dequantizer(config).training.n_iters = 300001
    config.model.ema_rate = 0.99
    config.eval.update(begin_ckpt=-1, end_ckpt=-1)
    return config


def sdeflow(config: Any, debiased: bool = False) -> Any:
    """sdeflow (Huang, Lim & Courville 2021) on the VP SDE: the network is the drift a = g s, and
    learns by Adam with lr 1e-4, without warm-up, clipping, dropout or averaging.

    The plain objective is half the squared error weighted by sigma^2, at uniform times. `debiased`
    weighs it by g^2 and draws times from g^2/sigma^2, constant below t = 0.001.
    """
    vp(config).training.update(reduce_mean=False, weighting="", time_sampler="uniform")
    config.data.centered = False
    config.model.update(parametrization="drift", dropout=0.0, ema_rate=0.0)
    config.optim.update(lr=1e-4, warmup=0, grad_clip=-1.0)
    if debiased:
        config.training.update(likelihood_weighting=True, time_sampler="likelihood", truncate=1e-3)
    config.eval.update(begin_ckpt=-1, end_ckpt=-1, enable_bpd=True, likelihood="elbo")
    return config


def sdeflow_images(config: Any, debiased: bool = False) -> Any:
    """sdeflow on images: logits of dequantised pixels (alpha = 0.05), and DDPM's U-Net."""
    sdeflow(ddpm(config), debiased).data.update(logit_alpha=0.05, uniform_dequantization=True)
    return config


def sdeflow_mnist(config: Any, debiased: bool = False) -> Any:
    """sdeflow on MNIST: ten thousand steps of 64 images."""
    sdeflow_images(config, debiased).training.update(
        batch_size=64, n_iters=10000, snapshot_freq=5000, snapshot_freq_for_preemption=1000
    )
    config.data.update(dataset="MNIST", image_size=28, num_channels=1, random_flip=False)
    config.model.update(nf=32, ch_mult=(1, 2, 2), attn_resolutions=(16,))
    config.eval.update(batch_size=256)
    return config


def sdeflow_cifar10(config: Any, debiased: bool = False) -> Any:
    """sdeflow on CIFAR-10: a hundred thousand steps of 128 images."""
    sdeflow_images(config, debiased).training.update(
        batch_size=128, n_iters=100000, snapshot_freq=10000
    )
    config.model.update(nf=128, ch_mult=(1, 2, 2, 2), attn_resolutions=(16,))
    return config


def digits(config: Any) -> Any:
    """scikit-learn's 8 x 8 digits and a network of a million parameters: minutes on a CPU."""
    config.training.update(
        batch_size=64,
        n_iters=3600,
        snapshot_freq=3600,
        snapshot_freq_for_preemption=600,
        snapshot_sampling=False,
        eval_freq=200,
    )
    config.data.update(
        dataset="digits",
        image_size=8,
        num_channels=1,
        levels=17,
        random_flip=False,
        uniform_dequantization=True,
    )
    config.model.update(
        nf=32,
        ch_mult=(1, 2),
        num_res_blocks=2,
        attn_resolutions=(4,),
        dropout=0.0,
        ema_rate=0.998,
    )
    config.optim.update(lr=2e-3, warmup=200)
    config.eval.update(
        begin_ckpt=-1,
        end_ckpt=-1,
        batch_size=300,
        enable_loss=True,
        enable_sampling=True,
        enable_bpd=True,
        num_samples=300,
        extractor="pixels",
        bpd_repeats=1,
        rtol=1e-4,
        atol=1e-4,
    )
    return config


def points(config: Any, dataset: str) -> Any:
    """A set of points in the plane and a perceptron of 0.2 million parameters, told ln(sigma): less
    than a minute on two cores for training and evaluation together.

    The network is EDM's, preconditioned and trained on EDM's noise levels, on whichever process.
    """
    config.data.update(
        dataset=dataset,
        num_channels=2,
        image_size=1,
        centered=False,
        random_flip=False,
        uniform_dequantization=False,
    )
    config.model.update(
        name="mlp",
        nf=128,
        num_res_blocks=3,
        dropout=0.0,
        ema_rate=0.998,
        scale_by_sigma=False,
        conditional=True,
        parametrization="preconditioned",
        time_input="sigma",
        embedding_type="fourier",
        fourier_scale=0.5,
        sigma_data=1.0,
        sigma_min=0.005,
        sigma_max=10.0,
        init_scale=1.0,
    )
    config.training.update(
        weighting="edm",
        time_sampler="lognormal",
        batch_size=256,
        n_iters=2500,
        snapshot_freq=2500,
        snapshot_freq_for_preemption=2500,
        num_snapshot_samples=1000,
        log_freq=200,
        eval_freq=1000,
        reduce_mean=True,
        stratified=True,
    )
    config.optim.update(lr=2e-3, warmup=100, schedule="cosine")
    config.eval.update(
        begin_ckpt=-1,
        end_ckpt=-1,
        batch_size=2000,
        num_samples=10_000,
        enable_loss=True,
        enable_sampling=True,
        enable_bpd=True,
        elbo_points=50,
        rtol=1e-4,
        atol=1e-4,
    )
    if dataset == "image_density":  # a plain perceptron blurs what is small in a drawing
        config.model.coordinate_scale = 0.5
        config.training.batch_size = 512
    return config


def classifier(config: Any) -> Any:
    """From a score model's settings those of a noise-conditional classifier of ten classes."""
    config.training.update(
        objective="classifier", weighting="", likelihood_weighting=False, snapshot_sampling=False
    )
    config.model.update(name="classifier", parametrization="", time_input="", num_classes=10)
    config.eval.update(enable_loss=True, enable_sampling=False, enable_bpd=False)
    return config


def deep(config: Any) -> Any:
    """The deep variant: twice the residual blocks, fewer iterations."""
    config.model.num_res_blocks = 8
    config.training.n_iters = 950001
    return config


def ncsnpp_256(config: Any) -> Any:
    """NCSN++ with VE at 256 x 256 pixels: seven resolutions, skip pyramids on both sides."""
    ve(ncsnpp(config)).model.update(
        num_res_blocks=2,
        ch_mult=(1, 1, 2, 2, 2, 2, 2),
        progressive="output_skip",
        progressive_input="input_skip",
    )
    return config


def ncsnpp_1024(config: Any) -> Any:
    """NCSN++ with VE at 1024 x 1024 pixels: eight resolutions and a batch of 8."""
    ncsnpp_256(config).model.update(
        nf=16,
        ch_mult=(1, 2, 4, 8, 16, 32, 32, 32),
        num_res_blocks=1,
        sigma_max=1348.0,
        ema_rate=0.9999,
    )
    config.data.image_size = 1024
    config.training.batch_size = 8
    config.sampling.snr = 0.15
    config.eval.update(batch_size=1024, begin_ckpt=1)
    config.optim.amsgrad = False  # published and never read
    return config


def ddpm(config: Any) -> Any:
    """DDPM: its U-Net, which embeds times by sinusoids and never reads embedding_type."""
    config.model.update(name="ddpm", num_res_blocks=2, embedding_type="fourier")
    return config


def discrete_vp(config: Any) -> Any:
    """The VP SDE at its 1000 discrete times, as DDPM trains and samples."""
    vp(config).training.continuous = False
    config.sampling.predictor = "ancestral_sampling"
    config.model.num_scales = 1000
    return config


def ddpm_256(config: Any) -> Any:
    """DDPM at 256 x 256 pixels: six resolutions."""
    ddpm(discrete_vp(config)).model.ch_mult = (1, 1, 2, 2, 4, 4)
    config.optim.lr = 2e-5
    return config


def ncsn(config: Any) -> Any:
    """NCSN: ten noise levels, and annealed Langevin dynamics without a predictor."""
    ve(config).training.continuous = False
    config.sampling.update(predictor="none", corrector="ald", n_steps_each=100, snr=0.316)
    config.model.update(
        name="ncsn",
        normalization="InstanceNorm++",
        nonlinearity="elu",
        scale_by_sigma=False,
        sigma_max=1.0,
        num_scales=10,
        ema_rate=0.0,
        interpolation="bilinear",  # published and never read
    )
    config.optim.update(lr=1e-3, warmup=0, grad_clip=-1.0, amsgrad=False)  # amsgrad: never read
    return config


def techniques_124(config: Any, sigma_max: float, num_scales: int, snr: float) -> Any:
    """NCSNv2's techniques 1, 2 and 4: the largest noise level, how many, and the step size.

    Technique 3 is the network that divides by sigma, 5 the moving average of the weights.
    """
    config.model.update(sigma_max=sigma_max, num_scales=num_scales)
    config.sampling.update(n_steps_each=5, snr=snr)
    return config


def ncsnv2(config: Any) -> Any:
    """NCSNv2 for images of up to 64 pixels: a network that divides by sigma, and averaging."""
    ncsn(config).model.update(name="ncsnv2_64", scale_by_sigma=True, ema_rate=0.999)
    config.optim.lr = 1e-4
    return config
