"""The command line: one module for each group of commands. Errors are shown as they are meant to be
read, without traceback.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import NoReturn

import typer

from fedark import __version__
from fedark.foundation.errors import FedarkError, InputError
from fedark.foundation.files import os_problem

__all__ = ["app", "main"]

_INTERRUPTED = 130  # 128 and the number of SIGINT

app = typer.Typer(
    name="fedark",
    help="Fine-tune a provider's model on data that nobody else may see.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        typer.echo(f"fedark {__version__}")
        raise typer.Exit


def _register() -> None:
    from fedark.cli import (
        aggregator,
        audit,
        bench,
        broker,
        check,
        compare,
        contract,
        demo,
        enclave,
        example,
        init,
        lease,
        ledger,
        log,
        model,
        node,
        plan,
        report,
        serve,
        simulate,
        taste,
        use,
        verify,
        withdraw,
    )

    app.add_typer(aggregator.app, name="aggregator")
    app.add_typer(node.app, name="node")
    app.add_typer(model.app, name="model")
    app.add_typer(enclave.app, name="enclave")
    app.add_typer(broker.app, name="broker")
    app.add_typer(contract.app, name="contract")
    app.add_typer(withdraw.app, name="withdraw")
    app.add_typer(lease.app, name="lease")
    app.add_typer(log.app, name="log")
    app.add_typer(ledger.app, name="ledger")
    app.add_typer(serve.app, name="key")
    app.command("serve")(serve.serve)
    app.command("predict")(use.predict)
    app.command("eval")(use.evaluate)
    app.command("merge")(use.merge)
    app.command("audit")(audit.audit)
    app.command("report")(report.report)
    app.command("verify")(verify.verify)
    app.command("bench")(bench.bench)
    app.command("example")(example.example)
    app.command("init")(init.init)
    app.command("check")(check.check)
    app.command("plan")(plan.plan)
    app.command("simulate")(simulate.simulate)
    app.command("compare")(compare.compare)
    app.command("taste")(taste.taste)
    app.command("demo")(demo.demo)


_register()


def main() -> None:
    """Entry point: exit status 0, 2 for wrong input, 1 for everything else that fedark refuses or
    fails at.
    """
    if not sys.warnoptions:  # what a library will change one day, nobody at a terminal can act on
        warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        app()
    except FedarkError as error:
        typer.echo(f"fedark: {error}", err=True)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except OSError as error:
        if error.filename is None:
            raise
        typer.echo(f"fedark: {os_problem(error)}", err=True)
        sys.exit(1)
    except SystemExit as end:
        if end.code != _INTERRUPTED:
            raise
        _stop()


def _stop() -> NoReturn:
    """Leave after an interrupt, which typer makes an exit. Commands have ended the processes that
    they started. Threads of a job may still be inside torch, and the interpreter's own end would
    abort beneath them.
    """
    typer.echo("fedark: stopped; nothing was left running.", err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_INTERRUPTED)
