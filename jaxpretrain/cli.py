"""What all commands share: reading flags, and turning our own errors into one line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxpretrain.build import ConfigError, nearest

OK, FAILED, USAGE = 0, 1, 2


@dataclass
class Flags:
    """`values`: the flags that were given; `overrides`: 'a.b=v' for each --config.a.b=v, in order."""

    values: dict[str, Any]
    overrides: list[str]

    def __getattr__(self, name: str) -> Any:
        return self.values.get(name)


def parse(
    argv: list[str], known: Mapping[str, str], switches: Mapping[str, str] | None = None, usage: str = ""
) -> Flags:
    """Reads `--name=value`, `--name value`, `--switch` and `--config.a.b=value`.

    Args:
        argv: the arguments after the program's name.
        known: flags that take a value, with their help.
        switches: flags that take none, with their help.
        usage: what `--help` prints above the flags.

    Raises:
        ConfigError: an unknown flag (naming the nearest one), a missing value.
    """
    switches = {**(switches or {}), "help": "show this and exit"}
    flags, rest = Flags({}, []), list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            raise ConfigError(f"Unexpected argument {argument!r}; flags start with --")
        if name in switches and not equals:
            flags.values[name] = True
            continue
        if name in switches:
            flags.values[name] = value.lower() in ("1", "true", "yes")
            continue
        if name not in known and not name.startswith("config."):
            raise ConfigError(f"Unknown flag --{name}.{nearest(name, [*known, *switches])}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{name} needs a value: --{name}=VALUE")
            value = rest.pop(0)
        if name.startswith("config."):
            flags.overrides.append(f"{name.removeprefix('config.')}={value}")
        else:
            flags.values[name] = value
    if flags.help:
        width = max(map(len, [*known, *switches])) + 4
        lines = [f"  --{name:<{width}}{text}" for name, text in {**known, **switches}.items()]
        print("\n".join([usage.strip(), "", *lines, f"  --{'config.a.b=v':<{width}}override one field of the config"]))
        raise SystemExit(OK)
    return flags


def positional(argv: list[str], known: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The arguments that are no flags, and all others: flags, and the values that follow those in `known` after a blank."""
    found: list[str] = []
    rest: list[str] = []
    value_next = False
    for argument in argv:
        (rest if argument.startswith("--") or value_next else found).append(argument)
        value_next = argument.startswith("--") and argument.removeprefix("--") in known
    return found, rest


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Runs a command. Mistakes in the call (ConfigError) give exit code 2, expected failures 1, each without a traceback.

    `JAXPRETRAIN_TRACEBACK=1` shows tracebacks all the same.
    """
    from absl import flags as absl_flags

    absl_flags.FLAGS.mark_as_parsed()  # grain's worker processes insist on it
    try:
        return main(sys.argv[1:] if argv is None else argv) or OK
    except (ConfigError, ExpectedFailure) as error:
        if os.environ.get("JAXPRETRAIN_TRACEBACK"):
            raise
        usage = isinstance(error, ConfigError)
        print(f"{'error' if usage else 'stopped'}: {error}", file=sys.stderr, flush=True)
        return USAGE if usage else FAILED
    except KeyboardInterrupt:
        print("stopped: interrupted", file=sys.stderr)
        return 130


class ExpectedFailure(RuntimeError):
    """A failure that needs no traceback: the message says what happened and what to do."""
