"""One module a subcommand, imported by :mod:`llumsched.cli` when that subcommand runs.

A module ``llumsched/commands/NAME.py`` takes one of two forms:

* ``add_parser(subparsers)`` adds and returns the subcommand's parser, ``run(args) -> int`` does the
  work and returns the exit status;
* ``PASSTHROUGH = True`` with ``main(argv) -> int``, for a subcommand whose arguments another
  program parses (``serve`` hands them to vLLM): it receives what follows its name, untouched.

Neither form may import vLLM, Ray or torch at the top of the module, so that ``--help`` is quick and
works where they are not installed.
"""


class CommandError(Exception):
    """Error that stops a command: printed to its user as one line, with exit status 1."""
