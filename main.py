"""The command line: train and evaluate score-based generative models, convert checkpoints.

    python main.py --config configs/vp/digits_ddpmpp_continuous.py --workdir runs/x --mode train
    python main.py --config configs/vp/digits_ddpmpp_continuous.py --workdir runs/x --mode eval \
        --config.eval.enable_bpd
    python main.py --mode convert --input checkpoint_24.pth --output ffhq --format diffusers \
        --config configs/ve/ffhq_ncsnpp_continuous.py

Any key of the configuration is set by --config.<key>=<value>.
"""

from __future__ import annotations

import sys

from absl import app, flags
from ml_collections import config_flags

FLAGS = flags.FLAGS

config_flags.DEFINE_config_file("config", None, "A file with get_config().", lock_config=True)
flags.DEFINE_string("workdir", None, "The folder of the run: checkpoints, samples, logs, results.")
flags.DEFINE_enum("mode", None, ["train", "eval", "convert"], "What to do.")
flags.DEFINE_string("eval_folder", "eval", "The folder inside workdir for results of eval.")
flags.DEFINE_string("input", None, "convert: the checkpoint to read, of any known format.")
flags.DEFINE_string("output", None, "convert: where to write it; a folder for diffusers.")
flags.DEFINE_enum(
    "format", "native", ["native", "score_sde", "safetensors", "diffusers"], "convert: to what."
)
flags.mark_flag_as_required("mode")


@flags.multi_flags_validator(
    ["mode", "config", "workdir"], message="--mode train and eval need --config and --workdir."
)
def _has_a_run(values) -> bool:
    is_run = values["mode"] in ("train", "eval")
    return not is_run or None not in (values["config"], values["workdir"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(
            f"stray arguments {argv[1:]}; write every value with '=', "
            "such as --config.eval.enable_bpd=False"
        )
    try:
        _run()
    except (ValueError, FileNotFoundError, PermissionError, FloatingPointError) as error:
        if FLAGS.verbosity > 0:
            raise
        sys.exit(f"error: {error}\n(the traceback is shown with --verbosity=1)")


def _run() -> None:
    if FLAGS.mode == "convert":
        from checkpoints_convert import convert  # late: --help stays fast

        print(convert(FLAGS.input, FLAGS.output, FLAGS.format, FLAGS.config))
        return
    import run_lib

    if FLAGS.mode == "train":
        run_lib.train(FLAGS.config, FLAGS.workdir)
    else:
        run_lib.evaluate(FLAGS.config, FLAGS.workdir, FLAGS.eval_folder)


def run() -> None:
    """Entry point of the installed command."""
    app.run(main)


if __name__ == "__main__":
    run()
