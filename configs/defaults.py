"""Every configuration key, its default and its meaning.

The defaults describe the continuous NCSN++ with the VE SDE on CIFAR-10, so that they fit together.
No value is None or a list: neither can be overridden from the command line. Tables of numbers are
tuples, and an empty string, 0 or -1 stands for "choose for me" where the comment says so.
"""

from typing import Any

import ml_collections
from ml_collections import config_dict


def get_default_configs() -> Any:
    """Return a fresh, unlocked ConfigDict that holds every known key."""
    return ml_collections.ConfigDict(
        {
            "training": _training(),
            "sampling": _sampling(),
            "eval": _eval(),
            "data": _data(),
            "model": _model(),
            "optim": _optim(),
            # what a process, network or sampler of your own reads: any keys, never checked
            "extra": {},
            # seed of everything random: weights, data order, noise, samples
            "seed": 42,
            # 'auto' (the first GPU, else the CPU), a name such as 'cuda:1', or a torch.device
            "device": config_dict.FieldReference("auto", field_type=object),
        }
    )


def _training() -> dict:
    return {
        # name of the forward process: 'vesde', 'vpsde', 'subvpsde', or a registered one
        "sde": "vesde",
        # train on continuous times (True) or on the num_scales discrete ones (False)
        "continuous": True,
        # images per optimizer step, over all processes
        "batch_size": 128,
        # optimizer steps in all
        "n_iters": 1300001,
        # steps between two numbered checkpoints (and sample sheets)
        "snapshot_freq": 50000,
        # steps between two log lines
        "log_freq": 50,
        # steps between two losses on a held-out batch
        "eval_freq": 100,
        # steps between two saves of the resume checkpoint
        "snapshot_freq_for_preemption": 10000,
        # draw samples at each snapshot
        "snapshot_sampling": True,
        # samples drawn at each snapshot; 0 = min(batch_size, 64)
        "num_snapshot_samples": 0,
        # weight the loss by g(t)^2 (a bound on the likelihood) rather than by sigma(t)^2
        "likelihood_weighting": False,
        # mean over the numbers of a sample (True) or half their sum (False)
        "reduce_mean": False,
        # smallest time that training draws
        "eps": 1e-5,
        # steps with a non-finite loss, each skipped, before the run stops with an error
        "max_nonfinite": 100,
    }


def _sampling() -> dict:
    return {
        # 'pc' (predictor-corrector), 'ode', or another registered sampler
        "method": "pc",
        # name of the predictor; 'none' for corrector-only sampling
        "predictor": "reverse_diffusion",
        # name of the corrector; 'none' for predictor-only sampling
        "corrector": "langevin",
        # corrector steps per predictor step
        "n_steps_each": 1,
        # the corrector's signal-to-noise ratio r
        "snr": 0.16,
        # return the mean of the last step, without its noise
        "noise_removal": True,
        # integrate the probability-flow ODE (no noise) in the predictors that can
        "probability_flow": False,
        # times of the grid; 0 = the SDE's N
        "steps": 0,
        # spacing of the grid: 'uniform', 'quadratic', 'logsnr' or 'karras'
        "schedule": "uniform",
        # time at which sampling ends; 0.0 = the SDE's own default
        "eps": 0.0,
    }


def _eval() -> dict:
    return {
        # first and last numbered checkpoint to evaluate; -1 = the newest
        "begin_ckpt": 9,
        "end_ckpt": 26,
        # images per batch
        "batch_size": 1024,
        # compute the loss on the evaluation set
        "enable_loss": True,
        # draw samples and score them
        "enable_sampling": False,
        # samples drawn
        "num_samples": 50000,
        # compute bits/dim
        "enable_bpd": False,
        # the set whose bits/dim is computed: 'test' or 'train'
        "bpd_dataset": "test",
        # another name of bpd_dataset, which it replaces; '' = not given
        "dataset": "",
        # passes over the set, each with fresh dequantisation noise; 0 = 5 on test, 1 on train
        "bpd_repeats": 0,
        # images scored per pass, from the first; 0 = all
        "bpd_num_images": 0,
        # relative and absolute tolerance of the likelihood's ODE
        "rtol": 1e-5,
        "atol": 1e-5,
        # trace estimator of the likelihood: 'Rademacher', 'Gaussian' or another known one
        "hutchinson_type": "Rademacher",
    }


def _data() -> dict:
    return {
        # 'CIFAR10', 'SVHN', 'MNIST', 'FashionMNIST', 'CELEBA', 'digits' (scikit-learn's 8x8) or
        # 'folder' ('LSUN', 'FFHQ' and 'CelebAHQ' are read as folders too)
        "dataset": "CIFAR10",
        # where the named data sets are looked for and downloaded to
        "root": "~/data",
        # download a named data set that is missing
        "download": False,
        # the folder or .zip of images; '' = none
        "path": "",
        # a second folder or .zip, for evaluation; '' = split path
        "eval_path": "",
        # part of path held out for evaluation where nothing else says which
        "eval_fraction": 0.1,
        # the scene of LSUN, a sub-folder of path when there is one
        "category": "",
        # the original's TFRecord file: never opened, named in the error that says what to do
        "tfrecords_path": "",
        # height and width in pixels; other sizes are resized
        "image_size": 32,
        # 1 = grey, 3 = colour
        "num_channels": 3,
        # integer levels per channel: 0 ... levels - 1
        "levels": 256,
        # scale the network's input to [-1, 1] (True) or [0, 1] (False)
        "centered": False,
        # mirror training images left-right at random
        "random_flip": True,
        # add uniform dequantisation noise to training images
        "uniform_dequantization": False,
    }


def _model() -> dict:
    return {
        # name of a registered network
        "name": "ncsnpp",
        # what the output means; '' = as score_sde does for this SDE
        "parametrization": "",
        # smallest and largest noise level of the VE SDE
        "sigma_min": 0.01,
        "sigma_max": 50.0,
        # beta(0) and beta(1) of the VP and sub-VP SDEs
        "beta_min": 0.1,
        "beta_max": 20.0,
        # N: discrete noise levels, and the default number of sampling steps
        "num_scales": 1000,
        # decay of the moving average of the weights; 0 = no averaging
        "ema_rate": 0.999,
        # dropout rate
        "dropout": 0.1,
        # time embedding: 'fourier' (of log sigma) or 'positional'
        "embedding_type": "fourier",
        # scale of the random Fourier frequencies
        "fourier_scale": 16.0,
        # divide the output by sigma
        "scale_by_sigma": True,
        # condition on time
        "conditional": True,
        # classes of a class-conditional network; 0 = it takes no class labels
        "num_classes": 0,
        # share of the class labels dropped in training, for classifier-free guidance
        "label_dropout": 0.0,
        # normalisation layer
        "normalization": "GroupNorm",
        # activation: 'swish', 'elu', 'relu' or 'lrelu'
        "nonlinearity": "swish",
        # channels at full resolution
        "nf": 128,
        # multiple of nf at each resolution, from the finest
        "ch_mult": (1, 2, 2, 2),
        # residual blocks per resolution
        "num_res_blocks": 4,
        # resolutions with self-attention
        "attn_resolutions": (16,),
        # change resolution with a convolution rather than plain pooling
        "resamp_with_conv": True,
        # residual block: 'biggan' or 'ddpm'
        "resblock_type": "biggan",
        # filter with fir_kernel when changing resolution
        "fir": True,
        "fir_kernel": (1, 3, 3, 1),
        # divide each residual sum by sqrt(2)
        "skip_rescale": True,
        # output pyramid: 'none', 'output_skip' or 'residual'
        "progressive": "none",
        # input pyramid: 'none', 'input_skip' or 'residual'
        "progressive_input": "residual",
        # how the input pyramid joins: 'sum' or 'cat'
        "progressive_combine": "sum",
        # scale of the last layers' initial weights; 0 = nearly zero
        "init_scale": 0.0,
    }


def _optim() -> dict:
    return {
        # name of the optimizer
        "optimizer": "Adam",
        # learning rate after the warm-up
        "lr": 2e-4,
        # Adam's first-moment decay and denominator offset
        "beta1": 0.9,
        "eps": 1e-8,
        # L2 penalty
        "weight_decay": 0.0,
        # steps over which the learning rate rises linearly; 0 = none
        "warmup": 5000,
        # largest norm of the gradient; negative = no clipping
        "grad_clip": 1.0,
    }
