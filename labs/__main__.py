"""The commands of the labs: `python -m labs --help`."""

import argparse

from labs import ask, breaks, hangs, mystery, write

# Each has `add_commands(commands)`: it adds its subcommands, with `run` as the function of the parsed arguments that
# returns the exit code.
MODULES = [write, breaks, hangs, mystery, ask]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m labs", description="Labs: write it, break it, predict it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in MODULES:
        module.add_commands(commands)
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    raise SystemExit(main())
