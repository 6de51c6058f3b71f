"""How a command reaches etcd: options, else variables of the environment, else a context of the
user's file.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import click
from click.core import ParameterSource

from engine_cli.contexts import CONFIG_VARIABLE, Contexts
from engine_cli.options import LOCATION_VARIABLE, TOKEN_VARIABLE, Seconds, debug_option
from engine_cli.runtime.hooks import VARIABLES as HOOK_VARIABLES
from engine_cli.suggestions import did_you_mean, suggesting
from engine_registry.errors import InvalidField
from engine_registry.etcd.config import MAX_TIMEOUT_S
from engine_registry.etcd.environment import VARIABLES as ETCD_VARIABLES
from engine_registry.telemetry.logs import fields

if TYPE_CHECKING:
    from engine_registry import Registry
    from engine_registry.etcd.config import EtcdConfig

log = logging.getLogger(__name__)
Command = TypeVar("Command", bound=Callable[..., Any])
Connect: TypeAlias = "Callable[[], AbstractContextManager[Registry]]"
PREFIX = "ENGINES_"
PASSWORD_VARIABLE = ETCD_VARIABLES["password"]
CONTEXT_VARIABLE = "ENGINES_CONTEXT"
_OPTIONS: dict[str, dict[str, Any]] = {
    "etcd": {
        "default": "127.0.0.1:2379",
        "metavar": "HOST:PORT[,…]",
        "help": "Where etcd is; several endpoints of one cluster with commas; https:// in front "
        "turns TLS on.",
    },
    "namespace": {"default": "", "metavar": "PREFIX", "help": "Put before every key in etcd."},
    "cacert": {"type": click.Path(), "help": "CA of etcd's certificate (turns TLS on)."},
    "cert": {"type": click.Path(), "help": "Client certificate."},
    "key": {"type": click.Path(), "help": "Key of the client certificate."},
    "user": {"help": f"etcd user; the password comes from {PASSWORD_VARIABLE} or a prompt."},
    "timeout": {
        "default": 5.0,
        "type": Seconds(min_open=True, max=MAX_TIMEOUT_S),
        "metavar": "S",
        "help": "Seconds that one call to etcd may take.",
    },
}
SOCKET_VARIABLES = [
    f"ENGINES_SOCKET_{name}" for name in ("TOKEN_FILE", "CERT", "KEY", "CACERT", "SAME_HOST")
]  # of the loader, which takes long to import
_PARAMETERS = {"etcd": "endpoints", "timeout": "timeout_s"}  # of the library, with other names
VARIABLES = {
    *ETCD_VARIABLES.values(),
    *(TOKEN_VARIABLE, LOCATION_VARIABLE, CONTEXT_VARIABLE, CONFIG_VARIABLE),
    *SOCKET_VARIABLES,
    *HOOK_VARIABLES,
}


def etcd_options(command: Command) -> Command:
    """Adds the options that say how to reach etcd; the command gets `connect`, for the block in
    which it needs a Registry.
    """

    @functools.wraps(command)
    def wrapped(etcd: dict[str, Any], **kwargs: Any) -> Any:
        return command(connect=functools.partial(_connected, etcd), **kwargs)

    return etcd_settings(wrapped)  # type: ignore[return-value]


def etcd_settings(command: Command) -> Command:
    """The same options; the command gets them as `etcd`, for `config_of`."""

    @functools.wraps(command)
    def wrapped(**kwargs: Any) -> Any:
        _warn_of_unknown(os.environ)
        before = _given_before_the_command(click.get_current_context())
        etcd = {name: kwargs.pop(name) for name in _OPTIONS} | before
        # no process that we start inherits it
        etcd["password"] = os.environ.pop(PASSWORD_VARIABLE, None)
        return command(etcd=etcd, **kwargs)

    decorated: Any = debug_option(wrapped)
    for name, settings in reversed(_OPTIONS.items()):
        decorated = click.option(
            f"--{name}",
            show_default=bool(settings.get("default")),
            envvar=ETCD_VARIABLES[_PARAMETERS.get(name, name)],
            show_envvar=True,
            **settings,
        )(decorated)
    return click.option(  # type: ignore[no-any-return]
        "--context",
        metavar="NAME",
        envvar=CONTEXT_VARIABLE,
        show_envvar=True,
        is_eager=True,
        expose_value=False,
        callback=_use_context,
        shell_complete=_complete_contexts,
        help="The context that has the defaults of the options below; see `engines context`.",
    )(decorated)


def options_before_the_command(group: Callable[[], None]) -> Callable[..., None]:
    """The same options before the name of a command, as people know it from kubectl. The commands
    look for them there.
    """

    @functools.wraps(group)
    def wrapped(**_: Any) -> None:
        group()

    decorated = click.option("--context", hidden=True)(wrapped)
    for name, settings in _OPTIONS.items():
        decorated = click.option(f"--{name}", hidden=True, **{**settings, "default": None})(
            decorated
        )
    return decorated


def _given_before_the_command(ctx: click.Context) -> dict[str, Any]:
    """Those that are not given after it as well."""
    before = ctx.find_root().params if ctx.parent is not None else {}
    return {
        name: before[name]
        for name in _OPTIONS
        if before.get(name) is not None
        and ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE
    }


def _use_context(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Its settings become the defaults of the options that are parsed after this one."""
    before = ctx.find_root().params.get("context") if ctx.parent is not None else None
    if before and ctx.get_parameter_source("context") is not ParameterSource.COMMANDLINE:
        value = before
    try:
        settings = Contexts.load(os.environ).settings(value)
    except InvalidField:
        if not ctx.resilient_parsing:  # as for a shell that completes a line
            raise
        return
    ctx.default_map = {**(ctx.default_map or {}), **settings}


def _complete_contexts(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    try:
        names = Contexts.load(os.environ).contexts
    except InvalidField:
        return []
    return [name for name in sorted(names) if name.startswith(incomplete)]


def _warn_of_unknown(environ: Mapping[str, str]) -> None:
    for variable in sorted(environ):
        if variable.startswith(PREFIX) and variable not in VARIABLES:
            hint = did_you_mean(variable, VARIABLES, most=1)
            log.warning(
                "%s means nothing to engines%s",
                variable,
                f": {hint}" if hint else "",
                extra=fields("variable_unknown", variable=variable),
            )


@contextmanager
def _connected(etcd: dict[str, Any]) -> Iterator[Registry]:
    with _connect(etcd) as registry, suggesting(registry):
        yield registry


def _connect(etcd: dict[str, Any]) -> Registry:
    from engine_registry import Registry

    return Registry.connect(etcd["etcd"], **_access(etcd))


def registry_of(ctx: click.Context, timeout_s: float) -> Registry:
    """Of a command line that is not complete yet. Asks for no password."""
    etcd = {name: ctx.params.get(name) for name in _OPTIONS} | _given_before_the_command(ctx)
    etcd |= {"timeout": timeout_s, "password": os.environ.get(PASSWORD_VARIABLE, "")}
    etcd |= {name: _OPTIONS[name]["default"] for name in ("etcd", "namespace") if not etcd[name]}
    return _connect(etcd)


def config_of(etcd: dict[str, Any]) -> EtcdConfig:
    """Asks for the password where one is needed. InvalidField where an option is not valid."""
    from engine_registry.etcd.config import EtcdConfig, parse_endpoints

    return EtcdConfig(parse_endpoints(etcd["etcd"]), **_access(etcd))


def _access(etcd: dict[str, Any]) -> dict[str, Any]:
    return {
        "namespace": etcd["namespace"],
        "timeout_s": etcd["timeout"],
        "cacert": etcd["cacert"],
        "cert": etcd["cert"],
        "key": etcd["key"],
        "user": etcd["user"],
        "password": _password(etcd["user"], etcd["password"]),
    }


def _password(user: str | None, given: str | None) -> str | None:
    from engine_registry.etcd.config import check_user

    if user is None:
        return None
    check_user(user)  # before it is shown in a prompt
    if given is not None:
        return given
    if not sys.stdin.isatty():
        raise click.UsageError(f"--user needs a password: set {PASSWORD_VARIABLE}")
    return str(click.prompt(f"etcd password of {user}", hide_input=True, err=True))
