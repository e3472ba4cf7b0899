"""Installation. The flat layout defeats auto-discovery, so modules and packages are named here."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
version = re.search(r'__version__ = "(.+)"', (here / "configs" / "__init__.py").read_text())
assert version is not None

# The site of docs/: Sphinx, Markdown and notebooks as pages, looks, formulas without a script.
DOCS = ["sphinx>=8.1", "myst-nb>=1.2", "furo>=2024.8.6", "latex2mathml>=3.77"]

setup(
    name="score-sde",
    version=version[1],
    description="Score-based generative modelling through stochastic differential equations",
    license="Apache-2.0",
    python_requires=">=3.10",
    # utils.py and datasets.py are doors for old code, used from a checkout: an installed
    # `datasets` would shadow another well-known package.
    py_modules=[
        "arguments",
        "checkpoints",
        "checkpoints_convert",
        "checkpoints_diffusers",
        "checkpoints_export",
        "checkpoints_flax",
        "checkpoints_import",
        "checkpoints_names",
        "controllable_generation",
        "controllable_generation_classes",
        "controllable_generation_loop",
        "controllable_generation_methods",
        "controllable_generation_posterior",
        "controllable_generation_projection",
        "controllable_generation_spectral",
        "controllable_generation_smc",
        "data_lib",
        "data_lib_batches",
        "data_lib_densities",
        "data_lib_files",
        "data_lib_index",
        "data_lib_lmdb",
        "data_lib_points",
        "data_lib_sources",
        "distributed",
        "divergence",
        "evaluation",
        "evaluation_features",
        "evaluation_inception",
        "evaluation_metrics",
        "evaluation_points",
        "evaluation_scales",
        "evaluation_stats",
        "files",
        "files_reading",
        "likelihood",
        "likelihood_bits",
        "likelihood_bounds",
        "likelihood_dequantization",
        "likelihood_family",
        "likelihood_objective",
        "likelihood_paths",
        "losses",
        "losses_classifier",
        "losses_implicit",
        "losses_optim",
        "losses_registry",
        "losses_step",
        "losses_weights",
        "main",
        "ode",
        "ode_adaptive",
        "ode_tableaus",
        "operators",
        "operators_base",
        "operators_sampling",
        "operators_fourier",
        "operators_tomography",
        "parametrization",
        "randomness",
        "run_lib",
        "run_lib_checks",
        "run_lib_control",
        "run_lib_control_inverse",
        "run_lib_control_job",
        "run_lib_control_tasks",
        "run_lib_dequantization",
        "run_lib_eval",
        "run_lib_images",
        "run_lib_pictures",
        "run_lib_gaps",
        "run_lib_guidance",
        "run_lib_journal",
        "run_lib_likelihood",
        "run_lib_memory",
        "run_lib_metrics",
        "run_lib_objectives",
        "run_lib_results",
        "run_lib_samples",
        "run_lib_shards",
        "run_lib_state",
        "run_lib_stats",
        "run_lib_toys",
        "run_lib_train",
        "run_lib_trained",
        "sampling",
        "sampling_grids",
        "sampling_langevin",
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
        "visualize_compare",
        "visualize_plane",
        "visualize_points",
        "visualize_report",
    ],
    packages=find_packages(include=["models", "models.*", "configs", "configs.*"]),
    # Lower bounds: what the corner `oldest` of .ci/matrix.py passes the tests with.
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",  # the public data sets
        "numpy>=1.26",
        "scipy>=1.11",  # the reference ODE solver
        "ml_collections>=1.1",
        "absl-py>=2.0",
        "tensorboard>=2.15",
        "clean-fid>=0.1.35",  # Inception features as the literature computes them
        "tqdm>=4.66",  # progress bars
        "matplotlib>=3.8",  # plots of the report
        "Pillow>=10.1",  # images in, grids and animations out
        "scikit-learn>=1.3",  # the embedded digits of the demo
    ],
    extras_require={
        "test": [
            *("pytest", "pytest-xdist", "ruff", "pyright[nodejs]", "build", "setuptools>=71"),
            *("diffusers", "msgpack", "safetensors"),  # formats of checkpoints
            *("torch-fidelity", "prdc"),  # the same metrics, by others
            "hypothesis",  # properties, over everything a caller may hand over
            "lmdb",
            *("nbclient", "nbformat", "ipykernel"),  # the notebooks are executed
            *DOCS,  # the site is built
        ],
        "docs": DOCS,
        "lsun": ["lmdb"],  # LSUN as its authors distribute it
        "export": ["safetensors"],
        "diffusers": ["diffusers", "safetensors"],
        "jax": ["msgpack"],  # checkpoints of score_sde in JAX; JAX itself is not needed
    },
    entry_points={"console_scripts": ["score-sde = main:run"]},
)
