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
