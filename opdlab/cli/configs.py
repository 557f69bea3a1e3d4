"""``opdlab configs``: list the shipped configurations, and copy one to edit it."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from opdlab.cli.commands import COMMANDS, PlainParser, listing
from opdlab.cli.shipped import config_path, description, shipped_configs
from opdlab.errors import UsageError, require
from opdlab.files import replacing
from opdlab.yaml_files import read_yaml

_PIECE = "A piece:"  # begins the description of a configuration that others are needed for
_COPY = "opdlab configs copy NAME [FILE] [--flat]"


def configs_command(arguments: Sequence[str]) -> int:
    """Run ``opdlab configs``, and return the exit code.

    Raises:
        UsageError: an argument is unknown, or a copy would overwrite a file.
    """
    if arguments[:1] == ["copy"]:
        return _copy(arguments[1:])
    if arguments[:1] == ["list"]:  # as in `opdlab study list`
        arguments = arguments[1:]
    about = f"{COMMANDS['configs'].summary} `{_COPY}` writes one as a file, see `opdlab configs copy --help`."
    PlainParser(prog="opdlab configs", description=about).parse_args(arguments)
    print(listing({name: description(path) for name, path in shipped_configs().items()}))
    return 0


def _copy(arguments: Sequence[str]) -> int:
    about = "Write a configuration to a file, with its comments."
    parser = PlainParser(prog="opdlab configs copy", usage=_COPY, description=about)
    parser.add_argument("name", metavar="NAME", help="a shipped configuration, or a file")
    parser.add_argument("file", metavar="FILE", nargs="?", help="default: its name in the current folder")
    parser.add_argument("--flat", action="store_true", help="put in what it extends, and leave out the comments")
    given = parser.parse_intermixed_args(arguments)  # FILE may stand behind --flat
    path = Path(config_path(given.name))
    target = Path(given.file or path.name)
    if str(given.file).endswith("/") or target.is_dir():
        target /= path.name
    free = not target.exists() and not target.is_symlink()
    require(free, f"FILE is {target}, which exists: give another name after NAME, or remove it")
    text = _flat(given.name, str(path)) if given.flat else _with_full_names(path)
    try:
        with replacing(target) as file:
            file.write(text.encode())
    except OSError as error:
        raise UsageError(f"FILE is {target}, which cannot be written: {error.strerror}; give another one") from error
    quoted = shlex.quote(str(target))
    if description(path).startswith(_PIECE):
        print(f"wrote {target}; stack it on a configuration: opdlab fit -c quickstart -c {quoted}")
    else:
        print(f"wrote {target}; run it with: opdlab fit -c {quoted}")
    return 0


def _flat(name: str, path: str) -> str:
    """Return the text of a configuration with all keys of those that it extends."""
    from opdlab.cli.config_files import flattened  # here, because the parser needs Lightning
    from opdlab.cli.parsing import fit_parser

    heading = description(Path(path))
    keys = yaml.safe_dump(flattened(fit_parser(), path), sort_keys=False, allow_unicode=True, width=110)
    return f"# {name}, with all that it extends{f': {heading}' if heading else ''}.\n{keys}"


def _with_full_names(path: Path) -> str:
    """Return the text of a configuration whose ``extends`` also holds in another folder.

    A configuration extends files beside it by their names alone; a copy needs their full names.
    """
    from opdlab.cli.config_files import EXTENDS, extended_path

    text = path.read_text(encoding="utf-8")
    read_yaml(path)  # refuses what is not YAML
    shipped = {file.resolve(): name for name, file in shipped_configs().items()}
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    for value in (value for key, value in pairs if key.value == EXTENDS):
        for each in reversed(value.value if isinstance(value, yaml.SequenceNode) else [value]):
            meant = Path(extended_path(each.value, str(path))).resolve()
            # As JSON, which is YAML, because a path may hold characters of YAML.
            name = shipped.get(meant) or json.dumps(str(meant), ensure_ascii=False)
            text = text[: each.start_mark.index] + name + text[each.end_mark.index :]
    return text
