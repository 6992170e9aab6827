"""The command line, thin over functions that notebooks call.

Standard output is for the answer (the last line is the JSON summary of a run); everything else goes to standard error.
Exit codes: 0 done; 1 done, but too many images failed, a folder could not be listed, or the host lacks something; 2 a
mistake the message explains.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from helpers.config import Config, load_config, parse_assignments
from helpers.errors import TRAIN_REMEDY, ConfigError, RunError, UserError, explain
from helpers.redaction import Redacting, redact

if TYPE_CHECKING:
    import numpy as np

    from helpers.pipeline.results import ResultStore

log = logging.getLogger(__name__)

INTERRUPTED = 130  # what shells say of Ctrl-C
BUSY = 0.7  # the share of their time in which tasks on local files compute, at least, where nothing disturbs them


def main(arguments: list[str] | None = None) -> int:
    """Run one command, by default that of this process, and return its exit code."""
    options = _parser().parse_args(arguments)
    options.is_own_process = arguments is None
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for handler in logging.root.handlers:
        handler.addFilter(Redacting())
        if options.log_format == "json":
            handler.setFormatter(_JsonFormatter())
    logging.getLogger("helpers").setLevel(logging.INFO)
    try:
        config = load_config(options.profile, **parse_assignments(options.set))
        return options.command(options, config)
    except UserError as error:
        _tell(f"error: {error}")
    except OSError as error:
        # All but temporary files is explained where it is read or written, and their error has no name in it.
        _tell(f"error: {explain(error, redact(str(error.filename or 'temporary files (TMPDIR)')))}")
    except ModuleNotFoundError as error:
        _tell(f"error: a package is not installed ({error}): {TRAIN_REMEDY}")
    except KeyboardInterrupt:
        _tell(
            "stopped" + ("; what is finished is kept, and the same command goes on" if options.command is run else "")
        )
        return INTERRUPTED
    except Exception:
        _tell(redact(traceback.format_exc()))
        return 1
    return 2


def run(options: argparse.Namespace, config: Config) -> int:
    """The four stages over every image below `--source`."""
    import psutil

    from helpers.session import choose_mode, get_spark, is_sail, starting, with_mode

    may_change = config.spark.mode == "auto" and options.is_own_process
    command = [sys.executable, *sys.orig_argv[1:], "--set", "spark.mode=local"]
    start_again = partial(os.execve, sys.executable, command, dict(os.environ))  # before a session leaves variables
    uses = [options.source, options.output] if may_change else []
    chosen, config = choose_mode(config, *uses), with_mode(config, *uses)
    # Mistakes are told before Spark is up; its JVM starts beside the imports, which take as long.
    with starting(config):
        from helpers import pipeline
        from helpers.pipeline import sail
        from helpers.pipeline.results import ResultStore
        from helpers.tracking import registry

        models = [registry.pin(uri, config) for uri in options.model]  # an alias may move meanwhile
        task = pipeline.make_task(options.source, models, options.output, config)
        ResultStore(task.output).check()
    spark = get_spark(config)
    if may_change:
        log.info("spark.mode %s: %s", *chosen)
    started = time.time() - psutil.Process().create_time()
    with contextlib.ExitStack() as stack:
        if may_change and is_sail(spark):
            stack.enter_context(sail.within(config.inference.memory_megabytes, start_again))
        summary = pipeline.run(spark, options.source, models, options.output, config, started)
    too_many = summary.failed_of_all > config.max_failed_share * summary.images
    if too_many:
        _tell(
            f"error: {summary.failed_of_all} of {summary.images} images failed, more than the share "
            f"max_failed_share={config.max_failed_share} allows:"
        )
    for reason, count in summary.reasons():
        _tell(f"  {count} images: {reason}")
    if summary.unlisted:
        _tell(
            f"error: {summary.unlisted} folders could not be listed, so that images may be missing: the warnings above "
            "say which and why; mend them and run again, what is done is kept"
        )
    print(summary.to_json())
    return 1 if too_many or summary.unlisted else 0


def train(options: argparse.Namespace, config: Config) -> int:
    """A PyTorch program as the ranks of one training."""
    from helpers.session import get_spark
    from helpers.training import train_on_spark

    spark = get_spark(config)
    result = train_on_spark(spark, options.program, options.arguments, options.processes, use_gpu=options.gpu)
    print(json.dumps(result))
    return 0


def export(options: argparse.Namespace, config: Config) -> int:
    """A model of any kind to a model bundle."""
    from helpers.export import checks, conversion
    from helpers.export.registration import publish
    from helpers.storage import open_storage
    from helpers.tracking.mlflow import connect, server

    if bool(options.file) == bool(options.architecture):
        raise ConfigError("name a model's file with --file, or a network with --architecture")
    if options.alias and not options.register:
        raise ConfigError("--alias is of a registered model: name that with --register")
    if options.register:
        connect(config.tracking.mlflow)  # a mistake is told before the work
    if options.file and options.checkpoint:
        raise ConfigError("--checkpoint is of networks: a model's file has its weights")
    folder = options.images or options.calibration
    pictures = list(checks.load_pictures(open_storage(folder, config), config)) if folder else []
    converted = (
        conversion.convert_file(options.file, options.card, pictures)
        if options.file
        else conversion.convert(options.architecture, options.checkpoint, options.opset, options.card)
    )
    if (options.keep_onnx or options.onnx) and converted.onnx is None:
        raise ConfigError(
            "--keep-onnx and --onnx need a network, or an ONNX file that takes float32 [B, C, H, W] and has no outputs "
            "per stride"
        )
    if options.onnx and converted.onnx:
        options.onnx.write_bytes(converted.onnx.SerializeToString())
    calibration: Iterable[np.ndarray] = ()
    if options.calibration:
        source = open_storage(options.calibration, config)
        calibration = conversion.calibration_images(source, converted.architecture, config)
    target = open_storage(options.output, config)
    bundle = conversion.make_bundle(
        converted.model,
        converted.architecture,
        converted.file,
        target,
        options.precision,
        calibration,
        pictures=pictures,
        onnx=converted.onnx if options.keep_onnx else None,
    )
    answer = {"bundle": target.root, "model": bundle.manifest.model}
    if server(config.tracking.mlflow):
        version = publish(bundle, config, options.register, options.alias)
        answer |= {"registered": f"models:/{options.register}/{version}"} if version else {}
    print(json.dumps(answer))
    return 0


def plan(options: argparse.Namespace, config: Config) -> int:
    """What a run would take on other machines, from the records of runs that were made."""
    from helpers.pipeline.records import read_runs, read_tasks
    from helpers.planning.cost_model import fit
    from helpers.planning.planner import PARTS, Cluster, curve, plot_curve, predict

    try:
        cluster = Cluster(
            options.executors, options.cores, tuple(options.speed), options.executors_per_machine, options.price
        )
    except ValueError as error:
        raise ConfigError(f"no such cluster: {error}") from None
    if options.images < 1 or not 0 <= options.failure_rate < 1:
        raise ConfigError("--images must be at least 1, and --failure-rate at least 0 and below 1")
    model = fit(read_runs(options.records, config), read_tasks(options.records, config))
    others = {"image_bytes": options.image_bytes, "failure_rate": options.failure_rate}
    prediction = predict(model, options.images, cluster, options.partitions, **others)
    table = curve(model, options.images, cluster, **others)
    if options.plot:
        plot_curve(table, cluster.executors, cluster.price).savefig(options.plot, dpi=120)
    print(prediction.report())
    if model.computing < BUSY:
        log.warning(
            "the tasks of these records computed in only %.0f %% of their time: their storage was slow, or the machine "
            "did other work, and then a plan of them is wrong",
            100 * model.computing,
        )
    print(table.drop(columns=list(PARTS)).round(3).to_string(index=False))
    print(json.dumps(prediction.summary()))
    return 0


def history(options: argparse.Namespace, config: Config) -> int:
    """The runs that have changed the results of an output."""
    import pandas as pd

    store = _open_results(options.output, config)
    runs = store.history()
    if not runs:
        raise RunError(f"no run has results in {store.location}; name the --output of one")
    print(pd.DataFrame(runs).to_string(index=False, na_rep="-"))
    return 0


def report(options: argparse.Namespace, config: Config) -> int:
    """The page of an output's results."""
    from helpers.pipeline.report import make_report

    if not config.report:
        raise ConfigError("report is 0, so the page would have no image; set it to a number of images")
    against = _open_results(options.against, config) if options.against else None
    print(json.dumps({"report": make_report(_open_results(options.output, config), config, against)}))
    return 0


def results(options: argparse.Namespace, config: Config) -> int:
    """An output's results in the format of another tool."""
    from helpers.pipeline.exports import Selection, export_results

    selection = Selection(tuple(filter(None, (options.classes or "").split(","))), options.min_score, options.model)
    store = _open_results(options.output, config)
    print(json.dumps(export_results(store, options.format, options.to, selection, config)))
    return 0


def doctor(options: argparse.Namespace, config: Config) -> int:
    """What this host has, and the remedy for what it lacks."""
    from helpers.doctor import examine

    findings = examine(config)
    for finding in findings:
        print(finding)
    return 0 if all(finding.ok for finding in findings) else 1


def _open_results(output: str, config: Config) -> "ResultStore":
    from helpers.pipeline.catalog import open_results
    from helpers.pipeline.sources import TABLE
    from helpers.session import get_spark

    return open_results(get_spark(config) if output.startswith(TABLE) else None, output, config)


class _JsonFormatter(logging.Formatter):
    """One JSON object a line: when, how bad, who says it, and what."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        message = "\n".join(filter(None, (record.getMessage(), record.exc_text)))
        return json.dumps({"time": when, "level": record.levelname, "logger": record.name, "message": message})


def _tell(text: str) -> None:
    """Say something to the user on standard error, in the form of the log where that is JSON."""
    if any(isinstance(handler.formatter, _JsonFormatter) for handler in logging.root.handlers):
        log.error(text.removeprefix("error:").strip())
    else:
        print(text, file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Names options that it does not know without what follows them, which may be a secret."""

    def error(self, message: str) -> NoReturn:
        head, unknown, arguments = message.partition("unrecognized arguments: ")
        names = [part.partition("=")[0] for part in arguments.split() if part.startswith("--")]
        super().error(f"{head}{unknown}{' '.join(names) or 'a value without an option'}" if unknown else message)


def _parser() -> argparse.ArgumentParser:
    shared = _Parser(add_help=False)
    shared.add_argument("--profile", help="a file in conf/ without its suffix; by default that of the host found")
    shared.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of conf/")
    shared.add_argument("--log-format", choices=("text", "json"), default="text", help="of standard error")
    parser = _Parser(prog="python -m helpers", description="Vision models over images on Spark.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace, Config], int]) -> Callable[..., argparse.Action]:
        """Add the command of a function, whose docstring is its help; what is returned adds its options."""
        added = commands.add_parser(name, parents=[shared], help=(function.__doc__ or "").rstrip("."))
        added.set_defaults(command=function)
        return added.add_argument

    add = command("run", run)
    source = "folder, container or archive of images and videos, a table, or cloudFiles:URI"
    add("--source", required=True, metavar="URI", help=source)
    add("--model", required=True, action="append", metavar="URI", help="bundle, or models:/NAME@ALIAS; may repeat")
    output = "where results go, as a Delta table in results/; or table:NAME"
    add("--output", required=True, metavar="URI", help=output)

    add = command("train", train)
    add("--processes", type=int, default=2, metavar="N", help="how many ranks; each takes a slot")
    add("--gpu", action="store_true", help="give each rank a GPU")
    add("program", metavar="PROGRAM", help="its file, on this machine")
    add("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS", help="of its command line")

    add = command("export", export)
    network = "a PyTorch network: a card in conf/cards, the .yaml of one, a YOLACT, torchvision:NAME or timm:NAME"
    add("--architecture", metavar="NAME", help=network)
    add("--checkpoint", type=Path, metavar="FILE", help="its state dictionary")
    add("--file", type=Path, metavar="FILE", help="or a model: .onnx, .xml, .tflite, .pb or .pt2")
    add("--card", type=Path, metavar="FILE", help="what the file or the library does not say, as YAML")
    add("--output", required=True, metavar="URI", help="where the bundle goes")
    precision = "of the weights; bf16 is fp16 weights and bfloat16 arithmetic"
    add("--precision", default="fp32", choices=("fp32", "fp16", "bf16", "int8"), help=precision)
    add("--calibration", metavar="URI", help="folder of images, for int8")
    add("--images", metavar="URI", help="folder of images for preview.png; by default --calibration's")
    add("--opset", type=int, default=18, help="of the ONNX graph in between, from 11; default 18")
    add("--onnx", type=Path, metavar="FILE", help="leave the ONNX graph there too")
    add("--keep-onnx", action="store_true", help="keep the ONNX graph in the bundle, for CUDA")
    add("--register", metavar="NAME", help="register it on the server of tracking.mlflow")
    add("--alias", metavar="ALIAS", help="of the registered version, such as champion")

    add = command("plan", plan)
    add("--records", required=True, action="append", metavar="URI", help="--output of a run; may repeat")
    add("--images", required=True, type=int, metavar="N", help="how many images")
    add("--executors", required=True, type=int, metavar="K", help="how many executors")
    add("--cores", type=int, default=1, metavar="C", help="tasks at once of each executor")
    speed = "of the executors in turn; 1: as the records'"
    add("--speed", type=speeds, default=[1.0], metavar="S[,S...]", help=speed)
    add("--executors-per-machine", type=int, default=1, metavar="M", help="executors that share a machine")
    add("--price", type=float, default=0.0, metavar="P", help="of one executor for an hour")
    add("--partitions", type=int, metavar="N", help="tasks; by default the best number")
    add("--image-bytes", type=float, metavar="B", help="of a mean image; by default the records'")
    add("--failure-rate", type=float, default=0.0, metavar="F", help="share of tasks' attempts that fail")
    add("--plot", metavar="FILE", help="draw time and cost against executors, as PNG or SVG")

    add = command("history", history)
    add("output", metavar="OUTPUT", help="--output of the runs")

    add = command("report", report)
    add("output", metavar="OUTPUT", help="--output of the runs")
    add("--against", metavar="OTHER", help="another output, to see what one finds and the other does not")

    add = command("results", results)
    add("output", metavar="OUTPUT", help="--output of the runs")
    add("--format", required=True, choices=("coco", "csv", "fiftyone", "labelme", "yolo"))
    add("--to", required=True, metavar="URI", help="a folder; of csv the file")
    add("--classes", metavar="NAME[,NAME...]", help="of these classes only, by label or number")
    add("--min-score", type=float, default=0.0, metavar="S", help="of predictions at least so probable")
    add("--model", metavar="NAME", help="of this model only, by its name or how that begins")

    command("doctor", doctor)
    return parser


def speeds(text: str) -> list[float]:
    """The value of `--speed`; a ValueError is argparse's to explain."""
    return [float(part) for part in text.split(",")]
