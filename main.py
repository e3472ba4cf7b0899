"""The command line: train and evaluate score-based generative models.

    python main.py --config configs/vp/digits_ddpmpp_continuous.py --workdir runs/x --mode train
    python main.py --config configs/vp/digits_ddpmpp_continuous.py --workdir runs/x --mode eval \
        --config.eval.enable_bpd

Any key of the configuration is set by --config.<key>=<value>.
"""

from __future__ import annotations

import sys

from absl import app, flags
from ml_collections import config_flags

FLAGS = flags.FLAGS

config_flags.DEFINE_config_file("config", None, "A file with get_config().", lock_config=True)
flags.DEFINE_string("workdir", None, "The folder of the run: checkpoints, samples, logs, results.")
flags.DEFINE_enum("mode", None, ["train", "eval"], "What to do.")
flags.DEFINE_string("eval_folder", "eval", "The folder inside workdir for results of eval.")
flags.mark_flags_as_required(["config", "workdir", "mode"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(
            f"stray arguments {argv[1:]}; write every value with '=', "
            "such as --config.eval.enable_bpd=False"
        )
    import run_lib  # late: --help stays fast

    try:
        if FLAGS.mode == "train":
            run_lib.train(FLAGS.config, FLAGS.workdir)
        else:
            run_lib.evaluate(FLAGS.config, FLAGS.workdir, FLAGS.eval_folder)
    except (ValueError, FileNotFoundError, PermissionError, FloatingPointError) as error:
        if FLAGS.verbosity > 0:
            raise
        sys.exit(f"error: {error}\n(the traceback is shown with --verbosity=1)")


def run() -> None:
    """Entry point of the installed command."""
    app.run(main)


if __name__ == "__main__":
    run()
