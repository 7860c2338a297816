"""The `react-fast` command. Every subcommand is a thin call; `info` needs no extra."""

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from .info import info_lines

# What the subcommands other than `info` import, by import name.
_TRAIN_EXTRA = (
    "typer", "rich", "pydantic", "yaml", "safetensors", "transformers", "accelerate", "gymnasium", "matplotlib",
)  # fmt: skip
_INSTALL = "install them with: pip install 'react-fast[train,tasks]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after the program's name; None: those of the process.
    Returns: 0; 2 for what the user can mend, told in one line; 130 after Ctrl-C.

    Warnings of this package are one line, too.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    missing = [name for name in _TRAIN_EXTRA if importlib.util.find_spec(name) is None]
    if missing and words[:1] == ["info"]:
        print("\n".join(_info("--integrations" in words)))
        return 0
    if missing:
        print(f"react-fast needs {', '.join(missing)}; {_INSTALL}", file=sys.stderr)
        return 2
    usual, warnings.formatwarning = warnings.formatwarning, _warning_line
    try:
        return _run(words)
    finally:
        warnings.formatwarning = usual


def _run(words: list[str]) -> int:
    import typer

    from .trainer.folder import UserError

    # Some releases of typer bring their own copy of click, so its base of all errors is taken from typer.
    usage_error: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
    try:
        code = _app()(args=words or ["--help"], standalone_mode=False) or 0
        return _fail("interrupted", 130) if code == 130 else code  # typer keeps Ctrl-C to itself
    except usage_error as error:
        return _fail(error.format_message(), error.exit_code or 2)
    except UserError as error:
        return _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)


_usual_line = warnings.formatwarning


def _warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parent):
        return f"react-fast: {' '.join(str(message).split())}\n"
    return _usual_line(message, category, filename, lineno, line)


def _fail(message: str, code: int) -> int:
    print(f"react-fast: {' '.join(message.split())}", file=sys.stderr)
    return code


def _app() -> Any:
    import typer
    from typer.core import TyperCommand

    class Train(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            from .trainer.help import show

            super().format_help(ctx, formatter)
            show()

    app = typer.Typer(
        name="react-fast",
        help="Reinforcement learning for action and causality tracking.",
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    anything = {"allow_extra_args": True, "ignore_unknown_options": True}

    @app.command(cls=Train, context_settings=anything)
    def train(
        context: typer.Context,
        config: str = typer.Option(None, help="YAML file with any of the keys; none: the defaults."),
        resume: str = typer.Option("none", help="auto: newest complete checkpoint; PATH: that one; none."),
        dry_run: bool = typer.Option(
            False, help="Print the resolved config, numbers of steps and tokens and the memory, then stop."
        ),
    ) -> None:
        """Train a policy. Any key of the config, all explained below, can be given as --key value or
        --section.key value."""
        from .trainer import dry_run as dry
        from .trainer import run

        resolved = run.read_config(config, context.args)
        dry.describe(resolved) if dry_run else run.run(resolved, resume=resume)

    @app.command()
    def applications(
        configs: Annotated[list[str], typer.Argument(help="YAML files of runs, as examples/*.yaml.")],
        out: str = typer.Option("runs/applications", help="Folder of the runs and of the table."),
        quick: bool = typer.Option(False, help="Tiny models and a few steps, to see that it works."),
    ) -> None:
        """Random policy, warm start, RL and RL with causal credit in one table. Resumes by itself."""
        from .trainer.applications import applications as make_table

        make_table(configs, out, quick=quick)

    @app.command(context_settings=anything)
    def evaluate(
        context: typer.Context,
        folder: str = typer.Argument(metavar="RUN"),
        best: bool = typer.Option(False, help="The checkpoint that trainer.best_by chose."),
    ) -> None:
        """Evaluate a run's newest checkpoint on its test records, sampled and greedy."""
        from .trainer import run

        run.evaluate(folder, context.args, best=best)

    @app.command()
    def explain(
        folder: str = typer.Argument(metavar="RUN"),
        text: str = typer.Option(..., help="The prompt to explain."),
        html: str = typer.Option(None, help="Write the explanation as one HTML page, too."),
        actions: str = typer.Option("token", help="What is taken away: token, word, sentence, line, step."),
        method: str = typer.Option(
            None, help="grad_x_input (if not given), saliency or integrated_gradients."
        ),
        samples: int = typer.Option(
            None, help="Continuations of each action, for intervals; none: one answer."
        ),
        chat: bool = typer.Option(False, help="The text is a user's message, for the chat template."),
    ) -> None:
        """Show which tokens of a prompt the answer hangs on: attribution, and what deleting each one does."""
        from .trainer.explain import explain as explain_text

        options: Any = {"actions": actions, "method": method, "samples": samples, "chat": chat}
        explain_text(folder, text, html=html, **options)

    @app.command()
    def report(folder: str = typer.Argument(metavar="RUN")) -> None:
        """Render a run's HTML report and curves again and list its files."""
        from .trainer import run

        run.report(folder)

    @app.command()
    def info(
        integrations: bool = typer.Option(
            False, help="What `react_fast.patch` replaces in which package, and whether it can here."
        ),
    ) -> None:
        """Versions, backends, instruction sets, threads, GPU."""
        typer.echo("\n".join(_info(integrations)))

    return app


def _info(integrations: bool) -> list[str]:
    if not integrations:
        return info_lines()
    from .integrations.table import table_lines

    return table_lines()


if __name__ == "__main__":
    sys.exit(main())
