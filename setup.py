"""Installation. The flat layout defeats auto-discovery, so modules and packages are named here."""

from setuptools import find_packages, setup

setup(
    name="score-sde",
    version="0.1.0",
    description="Score-based generative modelling through stochastic differential equations",
    license="Apache-2.0",
    python_requires=">=3.10",
    # utils.py and datasets.py are doors for old code, used from a checkout: an installed
    # `datasets` would shadow another well-known package.
    py_modules=[
        "checkpoints",
        "checkpoints_convert",
        "checkpoints_diffusers",
        "checkpoints_export",
        "checkpoints_flax",
        "checkpoints_import",
        "checkpoints_names",
        "data_lib",
        "data_lib_batches",
        "data_lib_files",
        "data_lib_index",
        "data_lib_sources",
        "distributed",
        "divergence",
        "evaluation",
        "evaluation_features",
        "evaluation_inception",
        "evaluation_metrics",
        "evaluation_scales",
        "evaluation_stats",
        "likelihood",
        "likelihood_bits",
        "losses",
        "losses_optim",
        "losses_step",
        "losses_weights",
        "main",
        "ode",
        "parametrization",
        "randomness",
        "run_lib",
        "run_lib_checks",
        "run_lib_eval",
        "run_lib_journal",
        "run_lib_metrics",
        "run_lib_results",
        "run_lib_samples",
        "run_lib_shards",
        "run_lib_state",
        "run_lib_stats",
        "run_lib_train",
        "sampling",
        "sampling_grids",
        "sampling_loop",
        "sampling_noise",
        "sampling_ode",
        "sampling_steps",
        "sampling_wrappers",
        "sde_lib",
        "sde_lib_base",
        "sde_lib_paths",
        "sde_lib_times",
        "solvers",
        "solvers_adaptive",
        "solvers_base",
        "solvers_multistep",
        "visualize",
        "visualize_report",
    ],
    packages=find_packages(include=["models", "models.*", "configs", "configs.*"]),
    install_requires=[
        "torch>=2.6",
        "torchvision",  # the public data sets
        "numpy>=1.26",
        "scipy",  # the reference ODE solver
        "ml_collections",
        "absl-py",
        "tensorboard",
        "clean-fid",  # Inception features as the literature computes them
        "tqdm",  # progress bars
        "matplotlib",  # plots of the report
        "Pillow",  # images in, grids and animations out
        "scikit-learn",  # the embedded digits of the demo
    ],
    extras_require={
        "test": [
            *("pytest", "pytest-xdist", "ruff", "pyright[nodejs]", "build"),
            *("diffusers", "msgpack", "safetensors"),  # formats of checkpoints
            *("torch-fidelity", "prdc"),  # the same metrics, by others
            "lmdb",
        ],
        "lsun": ["lmdb"],  # LSUN as its authors distribute it
        "export": ["safetensors"],
        "diffusers": ["diffusers", "safetensors"],
        "jax": ["msgpack"],  # checkpoints of score_sde in JAX; JAX itself is not needed
    },
    entry_points={"console_scripts": ["score-sde = main:run"]},
)
