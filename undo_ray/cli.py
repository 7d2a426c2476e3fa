"""The command line: `undo-ray run`, `evaluate`, `plan`, `status`, `show`, `serve`, `grade` and `mini train-teacher`.

Nothing heavy is imported before the arguments and the recipe are known to be good.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from undo_ray import __version__, config
from undo_ray.types import UserError
from undo_ray.written import printable, secret_in


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, do, and return the exit code (see types.UserError; 130 after Ctrl-C)."""
    options = _parser().parse_args(arguments)
    try:
        options.do(options)
        return 0
    except UserError as error:
        print(f"undo-ray: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("undo-ray: stopped; the same command goes on from the last committed stage", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("undo-ray", description="Iterative distillation (UNDO, arXiv 2504.02521) on Ray.")
    parser.add_argument("--version", action="version", version=f"undo-ray {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a recipe to its end, or go on with it")
    evaluate = commands.add_parser("evaluate", help="measure one model on a recipe's tests, without any training")
    for command, do, name in ((run, _run, "<recipe name>"), (evaluate, _evaluate, "evaluate-<recipe name>")):
        command.add_argument("recipe", help="TOML file; every key is in docs/recipe.md")
        command.add_argument("--run-dir", metavar="DIR", help=f"path or URI of the run directory; default runs/{name}")
        command.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key, e.g. seed=1")
        command.add_argument("-v", "--verbose", action="store_true", help="let Ray, vLLM and transformers speak")
        command.set_defaults(do=do)
    evaluate.add_argument("--model", metavar="REF", help="hub id, directory or URI in place of the recipe's student.model")

    plan = commands.add_parser("plan", help="estimate what a recipe would cost on given GPUs, without any or from a pilot")
    plan.add_argument("recipe", help="TOML file")
    plan.add_argument("--gpus", metavar="KIND[:N]", help="e.g. H200:16, with replicas and workers to fill them; default: H100s")
    plan.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the recipe")
    plan.add_argument("--tokens", metavar="KEY=N", action="append", default=[], help="mean length of question, rationale, …")
    plan.add_argument("--shape", metavar="ROLE=DIR", action="append", default=[], help="folder with a model's config.json")
    plan.add_argument("--pilot", metavar="N", help="measure on this machine first: N questions through the recipe's stages")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.set_defaults(do=_plan)

    show = commands.add_parser("show", help="print the tables of finished runs beside each other")
    show.add_argument("run_dir", nargs="+", help="run directories")
    show.set_defaults(do=_show)

    status = commands.add_parser("status", help="say where a run is, from its run directory alone, while it runs too")
    status.add_argument("run_dir", help="path or URI of the run directory")
    status.add_argument("--json", action="store_true", help="print it as JSON")
    status.set_defaults(do=_status)

    serve = commands.add_parser("serve", help="put a run's best student behind an OpenAI-compatible API")
    serve.add_argument("run_dir", help="path or URI of the run directory; the run may still be in progress")
    serve.add_argument("--round", metavar="K", type=int, help="whose student; default: the best finished round on validation")
    serve.add_argument("--engine", choices=("vllm", "transformers"), help="default: the run's own for its student")
    serve.add_argument("--name", metavar="ID", default="student", help="what clients call the model (default: student)")
    serve.add_argument("--replicas", metavar="N", type=int, default=1, help="copies of the model (default: 1)")
    serve.add_argument("--max-replicas", metavar="M", type=int, help="scale from N up to M with the load; default: stay at N")
    serve.add_argument("--gpus", metavar="G", type=int, help="of each replica; default: as the run's student.engine has it")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    serve.add_argument("--port", type=int, default=8000, help="default: 8000")
    serve.add_argument(
        "--drain", metavar="SECONDS", type=float, default=30.0, help="for requests in flight at Ctrl-C or SIGTERM (default: 30)"
    )
    serve.add_argument("-v", "--verbose", action="store_true", help="let Ray, vLLM and transformers speak")
    serve.set_defaults(do=_serve)

    grade = commands.add_parser("grade", help="grade recorded responses, and compare with recorded verdicts")
    grade.add_argument("file", help="JSONL with `gold` (or `question_id`) and `response`, one row a line")
    grade.add_argument("--task", required=True, help="whose rule: gsm8k, math, mmlu_pro... or package.module:NAME")
    grade.add_argument(
        "--data", metavar="DIR", help="folder with the benchmarks: rows with a question_id find their options there"
    )
    grade.add_argument("--json", action="store_true", help="print the summary as JSON")
    grade.add_argument(
        "--show-disagreements", metavar="K", type=int, default=0, help="print K rows judged otherwise than recorded"
    )
    grade.set_defaults(do=_grade)

    mini = commands.add_parser("mini", help="the miniature world").add_subparsers(required=True, metavar="COMMAND")
    teacher = mini.add_parser("train-teacher", help="rebuild the small teacher from a seed and print its figures")
    teacher.add_argument("--seed", type=int, default=0)
    teacher.add_argument("--out", metavar="DIR", required=True)
    teacher.set_defaults(do=_train_teacher)
    return parser


def _run(options: argparse.Namespace) -> None:
    recipe, run_dir = _started(options, options.set)
    from undo_ray import loop, report
    from undo_ray.place import Place

    print(printable(report.table(loop.run(recipe, run_dir, options.verbose), title=f"\n{options.recipe}")))
    print(f"\nrun: {run_dir}    report: {(Place(run_dir) / 'report.json').uri}")


def _evaluate(options: argparse.Namespace) -> None:
    import json

    model = [f"student.model={json.dumps(options.model)}"] if options.model else []
    recipe, run_dir = _started(options, [*options.set, *model], "evaluate-")
    from undo_ray import loop, report

    print(printable(report.scores(loop.evaluate(recipe, run_dir, options.verbose))))
    print(f"\nrun: {run_dir}")


def _started(options: argparse.Namespace, changes: list[str], prefix: str = "") -> tuple[config.Recipe, str]:
    """(recipe, run directory) of a command that works."""
    recipe = config.load(options.recipe, changes)
    name = os.path.splitext(os.path.basename(options.recipe))[0]
    run_dir = options.run_dir or os.path.join("runs", prefix + name)
    if not options.verbose:
        _quiet()
    if reason := secret_in(run_dir):
        raise UserError(f"--run-dir {reason}")
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and "://" not in run_dir and not os.path.isabs(run_dir):
        raise UserError(f"--run-dir {run_dir}: a job's working directory is a temporary copy; give an absolute path or a URI")
    return recipe, run_dir


def _quiet() -> None:
    """Ray, vLLM and transformers read these when they are imported, here and in every worker."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "RAY_BACKEND_LOG_LEVEL": "fatal",
        "PYTHONWARNINGS": "ignore",
    }.items():
        os.environ.setdefault(name, value)


def _plan(options: argparse.Namespace) -> None:
    import json
    from functools import partial

    from undo_ray import plan

    recipe = config.load(options.recipe, options.set)
    pilot = None if options.pilot is None else partial(_pilot, recipe, options.pilot)
    found = plan.plan(recipe, options.gpus, options.tokens, options.shape, pilot)
    print(json.dumps(found, indent=2) if options.json else printable(plan.table(found, options.recipe)))


def _pilot(recipe: config.Recipe, count: str, kind: str) -> dict[str, Any]:
    """What `pilot.run` measures, on the Ray that a run would have."""
    _quiet()
    from functools import partial

    from undo_ray.plan import pilot

    small = pilot.small(recipe, count)
    from undo_ray import loop, placement

    small = loop.located(small, {})
    loop.start_ray(verbose=False)
    placement.check(placement.asked(small), partial(print, file=sys.stderr))
    return pilot.run(small, kind)


def _show(options: argparse.Namespace) -> None:
    from undo_ray import report

    print(printable("\n".join(report.table(report.read(path), title=f"\n{path}") for path in options.run_dir)))


def _status(options: argparse.Namespace) -> None:
    import json

    from undo_ray import status

    found = status.read(options.run_dir)
    print(json.dumps(found, indent=2) if options.json else printable(status.text(found)))


def _serve(options: argparse.Namespace) -> None:
    from dataclasses import fields

    from undo_ray import serve

    if not options.verbose:
        _quiet()

    def start_ray() -> None:
        from undo_ray import loop

        loop.start_ray(options.verbose)

    asked = serve.Asked(**{field.name: getattr(options, field.name) for field in fields(serve.Asked)})
    serve.run(options.run_dir, options.round, asked, start_ray)


def _grade(options: argparse.Namespace) -> int:
    import json

    from undo_ray import regrade

    summary, disagreements = regrade.regrade(options.task, options.file, options.data)
    shown = disagreements[: options.show_disagreements]
    if options.json:
        print(json.dumps({**summary, **({"disagreements": shown} if options.show_disagreements else {})}, indent=2))
    else:
        print(printable(regrade.table(summary, shown)))
    return 0


def _train_teacher(options: argparse.Namespace) -> None:
    from undo_ray.mini import teacher

    teacher.train(options.out, options.seed)
    print(teacher.figures(options.out))
