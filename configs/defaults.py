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
            "control": _control(),
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
        # name of the forward process: 'vesde', 'vpsde', 'subvpsde', 'cosine', 'edm', 'linear_ve',
        # 'rectified_flow', 'ouve', or a registered one
        "sde": "vesde",
        # what is minimised: '' = denoising score matching over all times, by the weights below, and
        # with 'velocity' flow matching; 'denoising' = at the one noise level sigma; 'explicit' (of
        # points, whose score is known), 'implicit', 'sliced'; 'annealed' = NCSN's over num_scales
        # levels; 'elbo', 'dequantization', 'classifier', or a registered one
        "objective": "",
        # the one noise level sigma/alpha of 'denoising', and of 'explicit', 'implicit' and 'sliced'
        # unless it is 0.0 = all times
        "sigma": 0.0,
        # random directions of 'sliced' for each image
        "slices": 1,
        # 'sliced': the square of the score in place of that of its part along each direction
        "variance_reduction": True,
        # the form of 'elbo': 'score', or 'implicit', by a vector-Jacobian product of the network
        "elbo_form": "score",
        # the power of sigma that weights the levels of 'annealed'
        "anneal_power": 2.0,
        # the trained score model that 'dequantization' trains a dequantizer on: the workdir of its
        # training, for the newest checkpoint, or a checkpoint in it
        "score_checkpoint": "",
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
        # steps between two losses on held-out images
        "eval_freq": 100,
        # images in that loss, always the same under the same noise; 0 = all. At snapshots the
        # loss on all of them is logged as well
        "eval_images": 1024,
        # steps between two saves of the resume checkpoint
        "snapshot_freq_for_preemption": 10000,
        # draw samples at each snapshot
        "snapshot_sampling": True,
        # samples drawn at each snapshot; 0 = min(batch_size, 64)
        "num_snapshot_samples": 0,
        # weight the loss by g(t)^2 (a bound on the likelihood) rather than by sigma(t)^2
        "likelihood_weighting": False,
        # another weight, for continuous times: 'dsm', 'likelihood', 'edm', 'min_snr', or an output
        # such as 'noise', 'v' or 'velocity' for its squared error; '' = the one above
        "weighting": "",
        # the signal-to-noise ratio above which 'min_snr' stops weighting higher
        "min_snr_gamma": 5.0,
        # mean over the numbers of a sample (True) or half their sum (False)
        "reduce_mean": False,
        # smallest time that training draws
        "eps": 1e-5,
        # distribution of the times: 'uniform', 'likelihood' (uniform in log-SNR, divided out of the
        # loss), 'lognormal' (of sigma/alpha; EDM), 'logitnormal' (of t/T), or a registered one
        "time_sampler": "uniform",
        # spread the times of a batch evenly over their distribution
        "stratified": False,
        # mean and standard deviation of 'lognormal' and 'logitnormal'; time_std 0.0 = the published
        # ones, -1.2 and 1.2 for 'lognormal', 0 and 1 for 'logitnormal'
        "time_mean": 0.0,
        "time_std": 0.0,
        # the time below which the density of 'likelihood' is constant
        "truncate": 0.0,
        # train parameters that the loss does not depend on at some steps, in several processes
        "find_unused_parameters": False,
        # go on in a workdir of other settings
        "force_workdir": False,
        # steps with a non-finite loss, each skipped, before the run stops with an error
        "max_nonfinite": 100,
        # 'fp32', 'tf32' (GPUs), 'bf16' (the network's products; all else in float32), or '' for
        # torch's own settings
        "precision": "fp32",
        # micro-batches that each process cuts its batch into: less memory, the same gradient
        "grad_accumulation": 1,
        # steps between two snapshots of the ema_profiles, for averages of any width; 0 = none
        "posthoc_freq": 0,
        # keep convolutions in channels-last memory: faster, the same numbers to rounding
        "channels_last": True,
        # compile the network: faster on GPUs, after half a minute or more
        "compile": False,
        # recompute activations in the backward pass: a sixth of their memory, a third more time
        "activation_checkpointing": False,
    }


def _sampling() -> dict:
    return {
        # the process to sample on, which may differ from that of the training; '' = the same
        "sde": "",
        # 'pc' (predictor-corrector), 'ode', 'langevin' (the corrector alone, at training.sigma),
        # 'dpm_solver_adaptive', 'gotta_go_fast', or another registered sampler
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
        # rho of 'karras': larger puts more times near the data
        "rho": 7.0,
        # time at which sampling ends; 0.0 = the SDE's own default
        "eps": 0.0,
        # the network's products: 'fp32', 'tf32' (GPUs), 'bf16' (faster, to three digits; the state
        # and the solver stay in float32), or '' for torch's own settings
        "precision": "",
        # keyword options of the predictor, or of the method where it is not 'pc': any keys, checked
        # by what takes them (on the command line, --config.sampling.solver="{'order': 3}")
        "solver": {},
        # guidance of the samples: 'classifier_free' (away from the unconditional score of the same
        # network), 'autoguidance' (away from a worse network), 'classifier' (towards classes, of
        # networks trained without them too), or '' = none
        "guidance": "",
        # its weight w: 0 is none
        "guidance_weight": 1.0,
        # the noise levels sigma/alpha, lowest and highest, within which it acts; () = all
        "guidance_interval": (),
        # the workdir, or a checkpoint in one, of the worse network or of the classifier
        "guidance_network": "",
    }


def _eval() -> dict:
    return {
        # first and last numbered checkpoint to evaluate; -1 = the newest
        "begin_ckpt": 9,
        "end_ckpt": 26,
        # whose weights: 0 = the main average's (model.ema_rate); the decay or the relative width
        # (sigma_rel) of another one that the checkpoint holds
        "ema": 0.0,
        # images per batch; 0 = as many as fit into memory, a power of two up to 1024
        "batch_size": 1024,
        # compile the network of --mode eval and sample: '', 'default', or 'reduce-overhead' (CUDA
        # graphs, for small batches on a GPU); the first batch takes half a minute or more
        "compile": "",
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
        # how bits/dim is computed: 'ode' (probability flow), 'elbo' (of the reverse SDE), 'iw' (the
        # importance-weighted bound over iw_samples dequantisations), or several as 'ode+elbo'
        "likelihood": "ode",
        # the time of the data; 0.0 = where sampling on this process ends by default
        "likelihood_eps": 1e-5,
        # relative and absolute tolerance of the likelihood's ODE, and its solver
        "rtol": 1e-5,
        "atol": 1e-5,
        "ode_method": "dopri5",
        # trace estimator of the likelihood: 'Rademacher', 'Gaussian', 'hutch++' or 'exact', and its
        # probes for each image and repeat (products with the Jacobian an evaluation)
        "hutchinson_type": "Rademacher",
        "probes": 1,
        # times drawn for the ELBO of an image, and dequantisations for its 'iw', each repeat
        "elbo_points": 100,
        "iw_samples": 16,
        # dequantisation: 'uniform', or 'variational' by the trained dequantizer in this checkpoint
        # or workdir
        "dequantization": "uniform",
        "dequantizer": "",
        # report where the bits go: prior, eps, tolerance, trace, dequantisation, ODE against ELBO,
        # on the first gap_images images
        "gap_report": False,
        "gap_images": 64,
        # seconds to wait for the next checkpoint of the range; 0 = take those that are there
        "wait_s": 0,
        # keep every frame of the sampling's animation as a PNG file, in ckpt_<k>_frames/
        "keep_frames": False,
        # of points: draw the score, the marginals, the ways from noise and the log-density
        "figures": True,
        # draw each sample from a seed of its own, the same for any batch size and number of
        # processes. False: a seed per batch, for predictors that draw their own noise
        "seed_per_sample": True,
        # metrics of features: 'fid', 'kid', 'is' and 'prdc' (precision, recall, density, coverage);
        # () = none, distances on pixels alone, where they are few
        "metrics": (),
        # what the metrics see: 'legacy_tensorflow' (the paper's Inception), 'clean',
        # 'legacy_pytorch', 'pixels' (toy data), or a registered one
        "extractor": "legacy_tensorflow",
        # file of the extractor's weights; '' = none
        "inception_path": "",
        # let clean-fid download Inception's weights where there are none
        "download_inception": False,
        # reference statistics (.npz); '' = assets/stats/<data>_<size>_<extractor>.npz
        "stats": "",
        # features that --mode stats keeps in them for 'kid' and 'prdc', of images drawn by a seed
        "stats_features": 10000,
    }


def _control() -> dict:
    return {
        # what --mode control does: 'inpaint', 'colorize', 'superres', 'deblur', 'edit', 'class',
        # 'interpolate', or a measurement by its name in operators.py, such as 'mri'
        "task": "inpaint",
        # how samples are drawn given a measurement; '' = the task's own (docs/control.md)
        "method": "",
        # an image file, or a folder of them; '' = the first held-out images of the data set
        "image": "",
        # images taken of these, and samples for each
        "num_images": 4,
        "num_samples": 4,
        # of 'inpaint': a file, white where known and black where not, or the unknown part by name:
        # 'centre', 'left', 'top' or 'random'
        "mask": "centre",
        # the images are measurements themselves (True), or are to be measured here (False), which
        # keeps the truth to compare with
        "measured": False,
        # resize, crop and recolour images that do not fit the network (True) or refuse them
        "fit": False,
        # standard deviation of the measurement's noise, of pixels in [0, 1]
        "noise": 0.0,
        # keyword options of the measurement and of the method: any keys, checked by what takes them
        "operator": {},
        "options": {},
        # the class that 'class' draws; -1 = every class in turn
        "label": -1,
        # the workdir of a noise-conditional classifier; '' = guidance without one
        "classifier": "",
        # how strongly a class is asked for: of a classifier's gradient, or w of classifier-free
        "weight": 1.0,
        # where 'edit' starts, as a share of T: more changes more
        "strength": 0.5,
        # scale of the codes that 'interpolate' decodes
        "temperature": 1.0,
    }


def _data() -> dict:
    return {
        # 'CIFAR10', 'SVHN', 'MNIST', 'FashionMNIST', 'CELEBA', 'digits' (scikit-learn's 8x8) or
        # 'folder' ('LSUN', 'FFHQ' and 'CelebAHQ' are read as folders, .zips or lmdbs too); or
        # points in the plane: 'swissroll', 'moons', 'rings', 'checkerboard', 'mixture',
        # 'eight_gaussians', 'image_density', or a registered set (configs/toy/)
        "dataset": "CIFAR10",
        # where the named data sets are looked for and downloaded to
        "root": "~/data",
        # download a named data set that is missing
        "download": False,
        # the folder, .zip or lmdb of images; '' = none
        "path": "",
        # a second one, for evaluation; '' = split path
        "eval_path": "",
        # part of path held out for evaluation where nothing else says which
        "eval_fraction": 0.1,
        # the scene of LSUN: path may hold SCENE_train_lmdb and SCENE_val_lmdb, or a folder SCENE
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
        # alpha of logit(alpha + (1 - 2 alpha) x) in place of that scale, such as 0.05; 0.0 = none
        "logit_alpha": 0.0,
        # mirror training images left-right at random
        "random_flip": True,
        # add uniform dequantisation noise to training images
        "uniform_dequantization": False,
        # points of a set of points to train on
        "num_points": 100_000,
        # of 'image_density': the image whose dark pixels are the data; '' = none
        "image": "",
        # … and the lightness, 0 to 1, below which a pixel is dark
        "image_threshold": 0.5,
        # images of a path are decoded once and kept where they take at most so many GiB
        "memory_gib": 2.0,
        # leave out images of a path that cannot be decoded: all are tried at the start, and a
        # warning counts and names them; else such a file ends the run, named
        "skip_corrupt": False,
        # processes that decode other images batch by batch; -1 = one per spare core, at most 8;
        # 0 = threads of the process that trains
        "workers": -1,
    }


def _model() -> dict:
    return {
        # name of a registered network
        "name": "ncsnpp",
        # what the output means: 'score', 'noise', 'data', 'v', 'velocity', 'drift' or
        # 'preconditioned' (EDM's F); '' = as score_sde does for this SDE
        "parametrization": "",
        # what the network is told of the time, with a parametrization: 't*999', 't', 'sigma',
        # 'lambda' or 'log_sigma/4'; '' = 'log_sigma/4' for 'preconditioned', else 't*999'
        "time_input": "",
        # standard deviation of the data that 'preconditioned' expects
        "sigma_data": 0.5,
        # smallest and largest noise level of 'vesde', 'edm', 'linear_ve' and 'ouve'
        "sigma_min": 0.01,
        "sigma_max": 50.0,
        # exponent of the noise levels of 'edm'
        "rho": 7.0,
        # stiffness of the pull of 'ouve' towards the observation
        "theta": 1.5,
        # beta(0) and beta(1) of the VP and sub-VP SDEs
        "beta_min": 0.1,
        "beta_max": 20.0,
        # N: discrete noise levels, and the default number of sampling steps
        "num_scales": 1000,
        # decay of the moving average of the weights; 0 = no averaging
        "ema_rate": 0.999,
        # decays of further averages, kept up beside it
        "ema_rates": (),
        # relative widths of power-function averages, such as (0.05, 0.1); () = none
        "ema_profiles": (),
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
        # of 'mlp': scale of random Fourier frequencies of the points; 0.0 = coordinates alone
        "coordinate_scale": 0.0,
        # of 'mlp': the gradient of a potential, so that the score is that of an energy
        "energy": False,
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
        # coupling layers of 'dequantizer', and bins of their splines
        "couplings": 6,
        "spline_bins": 8,
    }


def _optim() -> dict:
    return {
        # 'Adam' or 'AdamW'
        "optimizer": "Adam",
        # learning rate after the warm-up
        "lr": 2e-4,
        # Adam's first-moment decay and denominator offset
        "beta1": 0.9,
        "eps": 1e-8,
        # Adam's second-moment decay
        "beta2": 0.999,
        # L2 penalty with Adam, decay of the weights themselves with AdamW
        "weight_decay": 0.0,
        # steps over which the learning rate rises linearly; 0 = none
        "warmup": 5000,
        # what it does afterwards: 'constant', 'cosine' (to zero at n_iters) or 'inverse_sqrt'
        "schedule": "constant",
        # largest norm of the gradient; negative = no clipping
        "grad_clip": 1.0,
    }
