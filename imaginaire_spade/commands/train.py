"""Train a generator from a config: ``torchrun --nproc_per_node=K train.py --config C.yaml --logdir DIR``.

Starting the same command again continues from the newest checkpoint of the log dir. SIGTERM, SIGUSR1, SIGHUP (a closed
terminal) and Ctrl-C save and leave (exit codes 143, 138, 129 and 130); a mistake of the user's is one message and exit
code 2.
"""

import argparse
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from imaginaire_spade.cli import CommandParser, add_shared_flags
from imaginaire_spade.errors import UserError
from imaginaire_spade.processes import end_with_launcher, keep_large_buffers, one_writer

if TYPE_CHECKING:
    from imaginaire_spade.config import RunConfig


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--config", required=True, metavar="C.yaml", help="configuration of the run")
    parser.add_argument(
        "--logdir", type=Path, help="folder for everything the run writes (default: logs/NAME_OF_CONFIG)"
    )
    parser.add_argument(
        "--checkpoint", type=Path,
        help="continue this checkpoint, or the newest of this folder, if the log dir has none yet",
    )  # fmt: skip
    parser.add_argument("--init_from", type=Path, nargs="?", const=Path(), metavar="CHECKPOINT",
                        help="fine-tune: begin a new run with the weights of a checkpoint, a .safetensors file or a"
                        " log dir; the classes may be others (without a value: of --checkpoint)")  # fmt: skip
    parser.add_argument("--allow_changed_data", action="store_true",
                        help="continue a run although its data set or label table changed")  # fmt: skip
    parser.add_argument("--seed", type=int, help="override the config's seed")
    parser.add_argument(
        "--max_iterations",
        type=int,
        help="stop at this iteration, counted over the whole run; the schedule does not change",
    )
    parser.add_argument("--dry_run", action="store_true", help="check everything, measure one iteration, write nothing")
    parser.add_argument("--profile", action="store_true", help="trace iterations 6 to 10 into DIR/profile, then stop")
    add_shared_flags(parser, "--set", help="override a key (repeat)")
    add_shared_flags(parser, "--device", "--import", "--local-rank")
    return parser.parse_args()


def main() -> None:
    end_with_launcher()
    keep_large_buffers()
    arguments = parse_arguments()

    from imaginaire_spade.build import import_modules

    import_modules(arguments.imports)
    init_from, checkpoint = arguments.init_from, arguments.checkpoint
    if init_from is not None and (init_from == Path()) == (checkpoint is None):
        raise UserError("--init_from: write which checkpoint (and not --checkpoint as well)")
    if init_from == Path():
        init_from, checkpoint = checkpoint, None
    train(
        arguments.config, arguments.logdir, overrides=arguments.overrides, seed=arguments.seed,
        max_iterations=arguments.max_iterations, checkpoint=checkpoint, init_from=init_from, device=arguments.device,
        allow_changed_data=arguments.allow_changed_data, dry_run=arguments.dry_run, profiled=arguments.profile,
    )  # fmt: skip


def train(
    config: "str | Path | RunConfig",
    logdir: str | Path | None = None,
    *,
    overrides: Iterable[str] = (),
    seed: int | None = None,
    max_iterations: int | None = None,
    checkpoint: str | Path | None = None,
    init_from: str | Path | None = None,
    device: str = "auto",
    allow_changed_data: bool = False,
    dry_run: bool = False,
    profiled: bool = False,
) -> None:
    """Train a generator, as ``train.py`` does: to the end of the run, or on from the newest checkpoint of ``logdir``.

    Args:
        config: a YAML file, or what ``load_config`` gives.
        logdir: folder for everything the run writes. None: logs/NAME_OF_CONFIG.
        overrides: ``KEY=VALUE`` strings, and ``seed``: over a file's values, not over those of a ``RunConfig``.
        max_iterations: stop at this iteration, counted over the whole run.
        checkpoint: continue this one if ``logdir`` has none.
        init_from: fine-tune: begin with the weights of this one.
        device: "auto", "cpu", "cuda" or "mps".
        allow_changed_data: continue although the data set or its labels changed.
        dry_run: check everything, measure one iteration, print it, write nothing.
        profiled: trace iterations 6 to 10 into ``logdir``/profile, then stop.
    Raises:
        UserError: a mistake in the config, the data or the arguments, or another process writes in ``logdir``.
        SystemExit: a signal (Ctrl-C too) asked the run to stop; it has saved.
    """
    from imaginaire_spade import distributed
    from imaginaire_spade.build import build_losses, check_run, with_measured_range
    from imaginaire_spade.config import RunConfig
    from imaginaire_spade.config_files import load_config
    from imaginaire_spade.files import from_hub
    from imaginaire_spade.training.trackers import check_trackers

    # Everything a user can get wrong is checked before the process group exists: no rank waits for one that left.
    if not isinstance(config, RunConfig):
        logdir = logdir or Path("logs") / Path(config).stem
        config = load_config(config, overrides, extra={} if seed is None else {"seed": seed})
    logdir = Path(logdir or Path("logs") / config.data.name)
    config = with_measured_range(config)
    info = distributed.process_info_from_environment()
    where = distributed.choose_device(device, info)
    check_run(config, info.world_size, where)
    if info.is_main:  # which alone needs them
        check_trackers(config)
    objective = build_losses(config)  # finds out whether pretrained weights are there
    if max_iterations is not None and max_iterations < 1:
        raise UserError(f"--max_iterations {max_iterations}: must be at least 1")
    checkpoint = None if checkpoint is None else from_hub(Path(checkpoint), "--checkpoint")
    init_from = None if init_from is None else from_hub(Path(init_from), "--init_from")

    from imaginaire_spade.inference.choices import remembered
    from imaginaire_spade.training import loop, profile
    from imaginaire_spade.training.setup import prepare

    with ExitStack() as held:
        if info.is_main and not dry_run:
            held.enter_context(one_writer(logdir, "--logdir"))
        distributed.init_process_group(info, where, config.trainer.process_group_timeout_s)
        held.callback(distributed.leave_process_group)
        run = prepare(config, objective, info, where, max_iterations, remembered)
        if dry_run:
            text = profile.dry_run(run)
            if info.is_main:
                print(text)
        elif profiled:
            profile.profile(run, logdir)
        else:
            loop.train(run, logdir, checkpoint, allow_changed_data, init_from=init_from)
