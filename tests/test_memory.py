"""Memory that runs out is said in one line, with what to try; batches are chosen by it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import run_lib
import run_lib_likelihood
import run_lib_memory
import run_lib_state
from configs.validation import complete
from configs.vp import digits_ddpmpp_continuous
from models.ncsnpp import NCSNpp
from run_lib_memory import LARGEST, OutOfMemoryError, batch_that_fits, remedy_for_memory

ROOT = Path(__file__).resolve().parent.parent


def of_numpy() -> MemoryError:
    with pytest.raises(MemoryError) as error:
        np.zeros(2**50)
    return error.value


SAYINGS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 7 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    MemoryError(),
    of_numpy(),
]


@pytest.mark.parametrize("said", SAYINGS, ids=lambda e: type(e).__name__)
def test_whatever_says_that_memory_ran_out_becomes_one_error_with_the_remedy(said):
    with pytest.raises(OutOfMemoryError, match=r"sampling 8 needs more memory .* try 4"):  # noqa: SIM117
        with remedy_for_memory("a step", "try 2"), remedy_for_memory("sampling 8", "try 4"):
            raise said


def test_other_errors_pass():
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("no")):
        with pytest.raises(type(error), match=str(error)), remedy_for_memory("a step", "try 2"):
            raise error


def tiny(**changes):
    config = digits_ddpmpp_continuous.get_config()
    small = {"model.nf": 8, "model.num_res_blocks": 1, "model.num_scales": 30, "sampling.steps": 0}
    small |= {"training.batch_size": 12, "training.n_iters": 2, "training.snapshot_freq": 2}
    small |= {"training.num_snapshot_samples": 4, "eval.batch_size": 6, "eval.num_samples": 6}
    small |= {"eval.rtol": 1e-2, "eval.atol": 1e-2, "eval.begin_ckpt": -1, "eval.end_ckpt": -1}
    for key, value in {**small, **{k.replace("__", "."): v for k, v in changes.items()}}.items():
        section, name = key.split(".")
        config[section][name] = value
    return config


def advised(error) -> tuple[str, int]:
    key, value = re.search(r"--config\.(\S+)=(\d+)", str(error.value)).groups()
    return key, int(value)


def hungry(monkeypatch, most: int) -> None:
    """Let the network run out of memory on more than `most` images."""
    before = NCSNpp.forward

    def forward(network, x, *args, **kwargs):
        if len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
        return before(network, x, *args, **kwargs)

    monkeypatch.setattr(NCSNpp, "forward", forward)


def test_advice_for_training_leads_to_a_batch_that_fits(monkeypatch, tmp_path):
    hungry(monkeypatch, most=3)
    config, tried = tiny(training__snapshot_sampling=False), []
    for _ in range(3):
        try:
            run_lib.train(config, tmp_path)
            break
        except OutOfMemoryError as error:
            key, value = re.search(r"--config\.training\.(\w+)=(\d+)", str(error)).groups()
            config.training[key] = int(value)
            tried.append(int(value))
    assert tried == [2, 4]


def test_advice_for_one_image_a_step_is_not_a_smaller_batch():
    config = complete(tiny(training__batch_size=1))
    assert "grad_accumulation" not in run_lib_memory.remedy_in_training(config)
    assert "activation_checkpointing=True" in run_lib_memory.remedy_in_training(config)


def test_a_snapshot_that_does_not_fit_names_its_own_setting(monkeypatch, tmp_path):
    hungry(monkeypatch, most=3)
    config = tiny(training__grad_accumulation=4, training__snapshot_sampling=True)
    with pytest.raises(OutOfMemoryError, match="at a snapshot") as error:
        run_lib.train(config, tmp_path)
    assert advised(error) == ("training.num_snapshot_samples", 2)


def test_advice_for_samples_and_bits_leads_to_a_batch_that_fits(monkeypatch, tmp_path):
    run_lib.train(tiny(training__snapshot_sampling=False), tmp_path)
    hungry(monkeypatch, most=3)
    with pytest.raises(OutOfMemoryError) as error:
        run_lib.sample(tiny(), tmp_path, tmp_path / "a.npz", num=6)
    assert advised(error) == ("eval.batch_size", 3)
    run_lib.sample(tiny(eval__batch_size=3), tmp_path, tmp_path / "a.npz", num=6)
    bits = {"eval__enable_bpd": True, "eval__enable_loss": False, "eval__bpd_num_images": 6}
    bits["eval__enable_sampling"] = False
    with pytest.raises(OutOfMemoryError, match="likelihood of 6 images") as error:
        run_lib.evaluate(tiny(**bits), tmp_path)
    assert advised(error) == ("eval.batch_size", 3)
    run_lib.evaluate(tiny(eval__batch_size=3, **bits), tmp_path)


# --- batches chosen by memory --------------------------------------------------------------------


def test_the_batch_is_the_largest_power_of_two_that_fits(monkeypatch):
    config = complete(tiny())
    monkeypatch.setattr(run_lib_memory, "_needs", lambda config: (1000, 5000))
    for images, batch in ((0, 1), (1, 1), (2, 2), (3.9, 2), (4, 4), (700, 512), (10**9, LARGEST)):
        room = (5000 + 1000 * images) / run_lib_memory.SHARE + 1e-3
        monkeypatch.setattr(run_lib_memory, "_memory", lambda device, room=room: room)
        assert batch_that_fits(config) == batch


def test_needs_are_those_of_the_estimate_and_grow_with_the_network():
    small, weights = run_lib_memory._needs(complete(tiny()))
    large, more = run_lib_memory._needs(complete(tiny(model__nf=16)))
    assert 0 < small < large < 3 * small
    assert 0 < weights < more


def test_zero_images_a_batch_are_chosen_where_a_run_begins(monkeypatch):
    monkeypatch.setattr(run_lib_state, "batch_that_fits", lambda config: 64)
    assert run_lib_state.complete_here(tiny(eval__batch_size=0)).eval.batch_size == 64
    assert run_lib_state.complete_here(tiny()).eval.batch_size == 6
    with pytest.raises(ValueError, match="batch_size"):
        complete(tiny(eval__batch_size=-1))


def test_memory_is_what_is_free_and_each_process_has_its_part(monkeypatch):
    free = run_lib_memory._memory(torch.device("cpu"))
    assert 2**20 < free < 2**50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0.1 * free < run_lib_memory._memory(torch.device("cpu")) < 0.5 * free
    monkeypatch.setattr(run_lib_memory, "_host_memory", lambda free: iter([2.0**30, 2.0**28]))
    monkeypatch.setattr(run_lib_memory, "_address_space", lambda free: 0.0)
    assert run_lib_memory._memory(torch.device("cpu")) == 2**26


# --- memory that really runs out -----------------------------------------------------------------

LIMITED = """
import os, resource, sys
sys.path.insert(0, os.getcwd())
import torch, run_lib, main, models.estimate
torch.set_num_threads(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20,) * 2)
main.run()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux")
def test_a_training_in_too_little_memory_ends_with_one_line_that_says_what_to_try(tmp_path):
    arguments = ["--config", "configs/vp/digits_ddpmpp_continuous.py", "--mode", "train"]
    arguments += ["--workdir", str(tmp_path), "--config.training.batch_size=1400"]
    arguments += ["--config.data.workers=0", "--config.device=cpu"]
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    said = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 1 and len(said) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "training.batch_size=1400" in said[0] and "grad_accumulation=2" in said[0]
    assert "can't allocate memory" in said[0].lower()
    assert json.loads((tmp_path / "config.json").read_text())["training"]["batch_size"] == 1400


def test_bits_of_a_batch_are_told_apart_from_their_passes():
    # The remedy is of the images in a batch, not of all copies of an image.
    assert "batch_size=3" in run_lib_likelihood.remedy_in_evaluation(6)
    assert "least" in run_lib_likelihood.remedy_in_evaluation(1)
