r"""Train, evaluate and sample score-based generative models, convert checkpoints.

    python main.py --config configs/vp/digits_ddpmpp_continuous.py --workdir runs/x --mode train
    python main.py --config configs/vp/digits_ddpmpp_continuous.py --workdir runs/x --mode eval \
        --config.eval.enable_bpd
    torchrun --nproc_per_node=8 main.py --config configs/ve/cifar10_ncsnpp_continuous.py \
        --workdir runs/y --mode train
    python main.py --config configs/vp/digits_ddpmpp_continuous.py --workdir runs/x --mode sample \
        --num 100 --output samples/
    python main.py --config configs/vp/digits_ddpmpp_continuous.py --workdir runs/x --mode control \
        --config.control.task=inpaint --config.control.mask=centre
    python main.py --config configs/ve/cifar10_ncsnpp_continuous.py --mode stats
    python main.py --mode convert --input checkpoint_24.pth --output ffhq --format diffusers \
        --config configs/ve/ffhq_ncsnpp_continuous.py

Any key of the configuration (configs/defaults.py) is set by --config.<key>=<value>.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import config_flags

from configs import __version__

FLAGS = flags.FLAGS
#: Of the processes that torchrun starts on this machine, not the first.
_LATER = os.environ.get("LOCAL_RANK", "0") != "0"
MODES = ("train", "eval", "sample", "control", "stats", "convert")

flags.DEFINE_boolean("version", False, "Print the version and end.")
flags.DEFINE_string("workdir", None, "The folder of the run: checkpoints, samples, logs, results.")
flags.DEFINE_enum("mode", None, MODES, "What to do.")
flags.DEFINE_string("eval_folder", "eval", "The folder inside workdir for results of eval.")
flags.DEFINE_string("input", None, "convert: the checkpoint to read, of any known format.")
flags.DEFINE_string(
    "output",
    None,
    "convert: where to write it; a folder for diffusers. sample: a folder for PNG files, a path in "
    ".png for a grid, in .npz for an array; workdir/samples/ckpt_<k>. control: a folder; "
    "workdir/control/<task>.",
)
flags.DEFINE_integer("num", 64, "sample: how many.")
flags.DEFINE_integer("first", 0, "sample: the number of the first; sample i is always the same.")
flags.DEFINE_integer("checkpoint", -1, "sample, control: of which checkpoint; -1 = newest.")
flags.DEFINE_integer("label", -1, "sample: the class of all; -1 = every class in turn.")
flags.DEFINE_float(
    "ema_width",
    0.0,
    "convert: relative width of the average to take from the run's ema/ snapshots.",
)
flags.DEFINE_enum(
    "format", "native", ["native", "score_sde", "safetensors", "diffusers"], "convert: to what."
)


def main(argv: list[str]) -> None:
    """Check the flags, and do what `--mode` says; errors end the program with their message."""
    if len(argv) > 1:
        _misused(
            f"stray arguments {argv[1:]}; write every value with '=', "
            "such as --config.eval.enable_bpd=False"
        )
    if FLAGS.version:
        print(__version__)
        return
    config = FLAGS.config
    if FLAGS.mode is None:
        _misused(f"--mode is missing; one of {', '.join(MODES)}")
    if FLAGS.mode != "convert" and config is None:
        _misused(f"--mode {FLAGS.mode} needs --config")
    if FLAGS.mode not in ("convert", "stats") and FLAGS.workdir is None:
        _misused(f"--mode {FLAGS.mode} needs --config and --workdir")
    try:
        _run(config)
    except (ValueError, OSError, FloatingPointError) as error:
        if FLAGS.verbosity > 0:
            raise
        _exit(error, started=True)
    except (MemoryError, RuntimeError) as error:
        from run_lib_memory import OutOfMemoryError, ran_out_of_memory  # late: --help stays fast

        if FLAGS.verbosity > 0 or not ran_out_of_memory(error):
            raise
        said = isinstance(error, OutOfMemoryError)
        _exit(error if said else MemoryError(f"{error}\n{_MEMORY_HINT}"), started=True)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


_MEMORY_HINT = (
    "use --config.training.grad_accumulation=2 (or more), --config.training.precision=bf16 or "
    "--config.training.activation_checkpointing; in evaluation, --config.eval.batch_size"
)


def _misused(message: str) -> NoReturn:
    if _LATER:
        _exit(ValueError(message))
    raise app.UsageError(message)


def _exit(error: Exception, started: bool = False) -> NoReturn:
    """End the program with the error's message; of several processes one says it.

    Before they have `started` to talk, every process of a machine reads the same command and
    files, and the machine's first one speaks.
    """
    if getattr(error, "reported_elsewhere", False) or (_LATER and not started):
        time.sleep(1)  # a launcher ends the others when the first one goes
        sys.exit(1)
    who = f"process {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    sys.exit(f"error: {who}{error}\n(the traceback is shown with --verbosity=1)")


def _run(config) -> None:
    if FLAGS.mode == "convert":
        from checkpoints_convert import convert  # late: --help stays fast

        width = FLAGS.ema_width
        print(convert(FLAGS.input, FLAGS.output, FLAGS.format, config, ema_width=width))
        return
    import run_lib

    if FLAGS.mode == "train":
        run_lib.train(config, FLAGS.workdir)
    elif FLAGS.mode == "eval":
        run_lib.evaluate(config, FLAGS.workdir, FLAGS.eval_folder)
    elif FLAGS.mode == "control":
        from run_lib_control import control

        control(config, FLAGS.workdir, FLAGS.output or "", checkpoint=FLAGS.checkpoint)
    elif FLAGS.mode == "stats":
        run_lib.statistics(config, FLAGS.workdir)
    else:
        run_lib.sample(
            config,
            FLAGS.workdir,
            FLAGS.output or "",
            num=FLAGS.num,
            first=FLAGS.first,
            checkpoint=FLAGS.checkpoint,
            label=FLAGS.label,
        )


def load_config(path: str):
    """The completed configuration of a file with get_config(): every known key is there, so that
    any of them can be overridden, also for a file that lists only some.

    Raises: ValueError for a file that is missing, that Python cannot run or that has no get_config,
      and for unknown keys.
    """
    from configs.validation import complete

    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--config {path}: there is no such file")
    name = f"config_{file.stem}"
    loader = importlib.machinery.SourceFileLoader(name, str(file))  # whatever the file's ending
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    sys.path.append(str(file.resolve().parent))  # for the modules beside it
    module = importlib.util.module_from_spec(spec)
    given = None
    try:
        loader.exec_module(module)
        if hasattr(module, "get_config"):
            given = module.get_config()
    except Exception as error:  # of the file's own
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)
        ]
        at = f" in line {lines[-1]}" if lines else ""
        raise ValueError(
            f"--config {path}: expected a Python file with get_config(), got "
            f"{type(error).__name__}{at}: {error}"
        ) from error
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config {path}: expected a file with get_config(), found none in it")
    return complete(given)


def _define_config(argv: list[str]) -> list[str]:
    """Define the flag --config by the file that argv names, and return argv without it."""
    rest, path, words = [argv[0]], None, iter(argv[1:])
    for word in words:
        if word in ("--config", "-config"):
            path = next(words, None)
        elif word.lstrip("-").startswith("config="):
            path = word.split("=", 1)[1]
        else:
            rest.append(word)
    if path is None:
        flags.DEFINE_string("config", None, "A file with get_config().")
        for word in rest:
            if word.lstrip("-").startswith(("config.", "noconfig.")):
                raise ValueError(f"{word}: expected --config FILE too, whose key this sets")
        return rest
    config = load_config(path)
    for word in rest:
        _check_key(word, config)
    config_flags.DEFINE_config_dict("config", config, lock_config=True, sys_argv=rest)
    return rest


def _check_key(word: str, config) -> None:
    from configs.validation import FREE, complete, flatten

    if not word.lstrip("-").startswith(("config.", "noconfig.")):
        return
    key = word.split("=")[0].split(".", 1)[1]
    if key not in dict(flatten(config)) and not f"{key}.".startswith(FREE):
        value: Any = 0
        for name in reversed(key.split(".")):
            value = {name: value}
        complete(value)  # raises, naming the nearest key


def _parse(argv: list[str]) -> list[str]:
    """absl's parser; what it refuses is said below the help, with its examples."""
    try:
        return FLAGS(argv)
    except BrokenPipeError:  # the help went into `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except flags.Error as error:
        if _LATER:
            _exit(error)
        app.usage(shorthelp=True, detailed_error=error)
        sys.exit(1)


def _speak_for_the_command() -> None:
    """The help of the installed command, whose own file says nothing, is that of this one."""
    sys.modules["__main__"].__doc__ = __doc__
    for flag in FLAGS.get_key_flags_for_module(__name__):
        FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def run() -> None:
    """Entry point of the installed command."""
    sys.path.insert(0, "")  # config files may import from the current folder
    try:
        argv = _define_config(sys.argv)
    except ValueError as error:
        _exit(error)
    _speak_for_the_command()
    try:
        app.run(main, argv, flags_parser=_parse)
    finally:  # an impatient Ctrl-C now ends the program, and prints no traceback of its cleaning
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    run()
