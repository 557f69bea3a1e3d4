"""``opdlab serve-teacher``: serve a local teacher to runs on this or other machines."""

from collections.abc import Sequence
from typing import get_args

import torch

from opdlab.cli.commands import COMMANDS, PlainParser
from opdlab.errors import UsageError, require
from opdlab.policies import LocalTeacher
from opdlab.policies.loading import DType, Quantization
from opdlab.policies.served.address import TOKEN_VARIABLE, access_token
from opdlab.policies.served.server import TeacherServer, check_host, serve


def parser() -> PlainParser:
    """Return the parser of ``opdlab serve-teacher``."""
    made = PlainParser(
        prog="opdlab serve-teacher",
        description=f"{COMMANDS['serve-teacher'].summary} Runs use it with model.teacher ServedTeacher and its url. "
        f"If the environment variable {TOKEN_VARIABLE} is set, requests must have the same token.",
        allow_abbrev=False,
    )
    made.add_argument("path", metavar="PATH", help="a folder, a hub id, or package://some.package/folder")
    made.add_argument("--host", default="127.0.0.1", help="address to listen at; only this machine by default")
    made.add_argument("--port", type=int, default=8700, help="8700; 0 for a free one")
    made.add_argument("--dtype", choices=get_args(DType), default="float32", help="of the weights; float32")
    made.add_argument("--device", help="such as cuda:1; a GPU if there is one by default")
    made.add_argument("--batch_size", type=int, default=32, help="rollouts scored at a time; 32")
    made.add_argument("--max_body_mib", type=int, default=64, help="size of the largest request, MiB; 64")
    made.add_argument("--revision", help="branch, tag or commit on the hub")
    made.add_argument("--attn_implementation", help="transformers' attention kernel")
    made.add_argument("--gguf_file", help="name of a GGUF file in PATH")
    made.add_argument("--quantization", choices=get_args(Quantization), help="keep the weights packed, on a GPU")
    made.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    return made


def serve_teacher(arguments: Sequence[str]) -> int:
    """Run ``opdlab serve-teacher`` until a signal ends it.

    Raises:
        UsageError: an argument is invalid, the model cannot be loaded, or the address cannot be used.
        Stopped: the signal.
    """
    options = vars(parser().parse_args(arguments))
    host, port, device = options.pop("host"), options.pop("port"), options.pop("device")
    size, path = options.pop("max_body_mib"), options.pop("path")
    token = access_token()
    check_host(host, token, TOKEN_VARIABLE)
    require(0 <= port < 1 << 16, f"port is {port}, but must be from 0 to 65535: 0 is a free one")
    require(size >= 1, f"max_body_mib is {size}, but must be at least 1")
    place = _device(device)
    teacher = LocalTeacher(path, **options)
    teacher.to(place)
    server = TeacherServer(teacher, path, options["batch_size"], token, size << 20)
    guarded = "with a token" if token is not None else "without a token"
    serve(server, host, port, lambda url: print(f"serving {path} on {place} at {url}, {guarded}", flush=True))
    return 0


def _device(name: str | None) -> torch.device:
    """Return the device of a name, or the best one, once a tensor has been there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0][:120]
        raise UsageError(f"device is '{name}', which this machine does not have ({said}): leave it out") from error
    return device
