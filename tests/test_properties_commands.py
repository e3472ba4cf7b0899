"""The command line tells a mistake by one message with the remedy, without a traceback."""

import os
import subprocess
import sys

import pytest
from toys_processes import ROOT, Child

CONFIG = "configs/vp/digits_ddpmpp_continuous.py"
EXAMPLES = "python main.py --config"


def run_main(folder, words):
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv = ["main.py", *(word.replace("FOLDER", str(folder)) for word in words)]
    sys.stdout = sys.stderr  # one text
    import main

    main.run()


#: Words of the command line, and what the answer says.
MISTAKES = [
    ((), ("--mode is missing", "train", EXAMPLES)),
    ((f"--config={CONFIG}",), ("--mode is missing", EXAMPLES)),
    (("--mode=train",), ("--config", EXAMPLES)),
    (("--mode=train", "--workdir=FOLDER"), ("--config", EXAMPLES)),
    (("--mode=train", f"--config={CONFIG}"), ("--workdir", EXAMPLES)),
    (("--mode=eval", f"--config={CONFIG}"), ("--workdir", EXAMPLES)),
    (("--mode=sample", f"--config={CONFIG}"), ("--workdir", EXAMPLES)),
    (("--mode=control", f"--config={CONFIG}"), ("--workdir", EXAMPLES)),
    (("--mode=stats",), ("--config", EXAMPLES)),
    (("--mode=trian", f"--config={CONFIG}", "--workdir=FOLDER"), ("trian", "train")),
    (("--mode=", f"--config={CONFIG}", "--workdir=FOLDER"), ("train",)),
    (("--mode=train", "--workdri=FOLDER", f"--config={CONFIG}"), ("workdri", "workdir")),
    (("--mode=train", "--workdir=FOLDER", f"--cofnig={CONFIG}"), ("cofnig", "config")),
    (("--mode=train", "--workdir=FOLDER", f"--config={CONFIG}", "stray"), ("stray", "'='")),
    (
        ("--mode=train", "--workdir=FOLDER", f"--config={CONFIG}", "--config.optim.lrr=1"),
        ("config.optim.lrr", "did you mean config.optim.lr?"),
    ),
    (
        ("--mode=train", "--workdir=FOLDER", f"--config={CONFIG}", "--config.modle.nf=8"),
        ("config.modle.nf", "did you mean config.model.nf?"),
    ),
    (
        ("--mode=train", "--workdir=FOLDER", f"--config={CONFIG}", "--config.model=8"),
        ("config.model", "section"),
    ),
    (
        ("--mode=train", "--workdir=FOLDER", f"--config={CONFIG}", "--config.model.nf=eight"),
        ("model.nf", "eight"),
    ),
    (
        ("--mode=train", "--workdir=FOLDER", f"--config={CONFIG}", "--config.model.nf=-8"),
        ("config.model.nf", "-8"),
    ),
    (
        ("--mode=train", "--workdir=FOLDER", f"--config={CONFIG}", "--config.model.nf"),
        ("model.nf",),
    ),
    (
        ("--mode=train", "--workdir=FOLDER", f"--config={CONFIG}", "--config.data.dataset=digitz"),
        ("config.data.dataset", "digits"),
    ),
    (
        ("--mode=train", "--workdir=FOLDER", f"--config={CONFIG}", "--config.training.sde=vp"),
        ("training.sde", "vpsde"),
    ),
    (
        ("--mode=train", "--workdir=FOLDER", f"--config={CONFIG}", "--config.model.name=unet"),
        ("unet", "ncsnpp"),
    ),
    (
        (
            *("--mode=train", "--workdir=FOLDER", f"--config={CONFIG}"),
            *("--config.sampling.predictor=ddimm", "--config.sampling.corrector=none"),
        ),
        ("ddimm", "ddim"),
    ),
    (
        (
            *("--mode=train", "--workdir=FOLDER", f"--config={CONFIG}"),
            *("--config.sampling.predictor=ddim", "--config.sampling.corrector=none"),
            "--config.sampling.solver={'eta': 'x'}",
        ),
        ("eta", "'x'"),
    ),
    (("--mode=train", "--workdir=FOLDER", "--config=nowhere.py"), ("nowhere.py", "no such file")),
    (("--mode=train", "--workdir=FOLDER", "--config=configs"), ("configs", "no such file")),
    (("--mode=train", "--workdir=FOLDER", "--config="), ("--config",)),
    (("--mode=train", "--workdir=FOLDER", "--config"), ("--config",)),
    (("--mode=train", "--workdir=FOLDER", "--config=FOLDER/bad.py"), ("SyntaxError", "line 2")),
    (("--mode=train", "--workdir=FOLDER", "--config=FOLDER/none.py"), ("get_config",)),
    (("--mode=train", "--workdir=FOLDER", "--config=FOLDER/name.py"), ("NameError", "line 2")),
    (("--mode=train", "--workdir=FOLDER", "--config=FOLDER/empty.py"), ("get_config",)),
    (("--mode=train", "--workdir=FOLDER", "--config=FOLDER/three.py"), ("get_config",)),
    (("--mode=train", "--workdir=FOLDER", "--config=FOLDER/bytes.py"), ("bytes.py",)),
    (("--mode=train", "--workdir=FOLDER", "--config=FOLDER/text.md"), ("text.md",)),
    (("--mode=train", "--workdir=FOLDER", "--config=FOLDER/args.py"), ("get_config", "TypeError")),
    (("--mode=train", "--workdir=FOLDER", "--config=FOLDER/key.py"), ("config.optim.lrr", "lr?")),
    (("--config.optim.lr=1", "--mode=train", "--workdir=FOLDER"), ("--config",)),
    (("--mode=eval", "--workdir=FOLDER/nowhere", f"--config={CONFIG}"), ("nowhere",)),
    (("--mode=sample", "--workdir=FOLDER/nowhere", f"--config={CONFIG}"), ("nowhere",)),
    (("--mode=sample", "--workdir=FOLDER", f"--config={CONFIG}", "--num=0"), ("num",)),
    (("--mode=sample", "--workdir=FOLDER", f"--config={CONFIG}", "--num=x"), ("num", "x")),
    (("--mode=sample", "--workdir=FOLDER", f"--config={CONFIG}", "--first=-1"), ("first",)),
    (("--mode=control", "--workdir=FOLDER/nowhere", f"--config={CONFIG}"), ("nowhere",)),
    (("--mode=convert",), ("--input",)),
    (("--mode=convert", "--input=FOLDER/nowhere.pth", "--output=FOLDER/x.pth"), ("nowhere.pth",)),
    (("--mode=convert", "--input=FOLDER/bad.py", "--output=FOLDER/x.pth"), ("bad.py",)),
    (("--mode=convert", "--input=x", "--output=y", "--format=onnx"), ("onnx", "safetensors")),
]

FILES = {
    "bad.py": "def get_config():\n    return {(\n",
    "none.py": "x = 3\n",
    "name.py": "def get_config():\n    return undefined_name\n",
    "empty.py": "",
    "three.py": "def get_config():\n    return 3\n",
    "bytes.py": "\x00\x01",
    "text.md": "# No Python\n\nat all\n",
    "args.py": "def get_config(x):\n    return {}\n",
    "key.py": "def get_config():\n    return {'optim': {'lrr': 1.0}}\n",
}


def test_every_mistake_is_told_by_one_message(tmp_path, cases):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    for words, expected in MISTAKES:
        code, _, text = Child(run_main, tmp_path, words).end()
        missing = [part for part in expected if part not in text]
        cases.hold(f"{words}: says {missing or 'all'}: {text[-600:]}", not missing)
        cases.hold(f"{words}: traceback: {text[-1500:]}", "Traceback" not in text)
        cases.hold(f"{words}: exit code {code}", code in (1, 2))
    assert not (tmp_path / "checkpoints-meta").exists()
    cases.done(3 * len(MISTAKES))


def give_up(folder):
    import torch

    import ode
    import run_lib

    def solve(*_, **__):
        ode.solve(lambda t, y: (-100 * y[0],), (torch.ones(1, 1),), 0, 1, max_nfe=20)

    run_lib.sample = solve
    run_main(folder, ["--mode=sample", "--workdir=FOLDER", f"--config={CONFIG}"])


def test_a_solver_that_gives_up_is_told_by_its_message(tmp_path):
    code, _, text = Child(give_up, tmp_path).end()
    assert code == 1
    assert "Raise max_nfe = 20" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("word", ["--help", "--helpshort", "-h"])
def test_help_shows_examples_and_flags(tmp_path, word):
    code, _, text = Child(run_main, tmp_path, [word]).end()
    assert code in (0, 1)
    for part in (EXAMPLES, "--workdir", "--mode", "--num", "configs/defaults.py"):
        assert part in text, text
    assert "Traceback" not in text


def test_help_may_go_to_a_reader_that_stops_early():
    command = [sys.executable, "main.py", "--helpfull"]
    with subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
