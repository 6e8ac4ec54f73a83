"""Offer a model over HTTP, to clients of OpenAI's interface (pip install 'opencola[serve]').

Texts are written together, block by block, and every setting of `opencola generate` is a field of a request. Ctrl-C
refuses what waits, ends what is begun, and leaves; pressed again, it leaves at once.

examples:
  opencola serve
  opencola serve --model runs/sft --port 8080 --max-batch 32
  OPENCOLA_API_KEY=secret opencola serve --host 0.0.0.0
"""

import importlib.util
import ipaddress
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro

from opencola.checkpoints.hub import from_pretrained, hash_model, is_repo_id, locate
from opencola.commands.terminal import Named
from opencola.errors import UserError
from opencola.layers.device import device
from opencola.paths import home
from opencola.ranges import Range, Size, check
from opencola.run import flags
from opencola.serve.admission import KEY, Admission
from opencola.serve.engine import Engine
from opencola.serve.requests import Limits
from opencola.version import __version__

NEEDED = ("fastapi", "uvicorn", "prometheus_client")
SWITCH = 5e-4
"""Seconds after which a thread of Python makes way for another: with 5e-3, its default, whoever is answered waits that
long for the engine at every system call."""


@dataclass(frozen=True)
class ServeFlags(Named):
    """What to offer, where, and how much of it at a time."""

    name: str = ""
    """What requests call the model; without it the folder's own name, or OWNER/NAME."""
    host: str = "127.0.0.1"
    """Address to listen at; this one is for programs of this machine alone, 0.0.0.0 is for all."""
    port: Annotated[int, Range(0, 65535)] = 8000
    """Port to listen at; 0: any that is free."""
    api_key: str = ""
    """What clients must send as `Authorization: Bearer KEY`, beside those that only look at / and /health. Other users
    of this machine can read flags: rather set OPENCOLA_API_KEY in the environment, which counts where this is empty."""
    limits: tyro.conf.OmitArgPrefixes[Limits] = field(default_factory=Limits)
    admission: tyro.conf.OmitArgPrefixes[Admission] = field(default_factory=Admission)
    threads: Size = 0
    """Threads to compute with; 0: as many as there are cores."""

    def __post_init__(self) -> None:
        check(self)


def command(argv: Sequence[str]) -> None:
    """Run `opencola serve`. Raises UserError, with what to do, where what it needs is not installed."""
    options: ServeFlags = flags.parse(ServeFlags, argv, prog="opencola serve", description=__doc__)
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        raise UserError("the server's packages are not installed: pip install 'opencola[serve]'")
    from opencola.serve.api import app
    from opencola.serve.server import Server, bound

    key = options.api_key or os.environ.get(KEY) or None
    place = bound(options.host, options.port)  # before the model is loaded, which may take long
    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer, sampling = from_pretrained(options.model)
    engine = Engine(model.to(device()), tokenizer, options.limits)
    name = options.name or name_of(options.model)
    api = app(
        engine,
        name,
        sampling,
        fingerprint=f"opencola-{__version__}-{hash_model(locate(options.model))[:16]}",
        api_key=key,
        admission=options.admission,
    )
    log()
    sys.setswitchinterval(SWITCH)
    host, port = place.getsockname()[:2]
    if key is None and not ipaddress.ip_address(host).is_loopback:
        print(f"anybody who reaches {host} can use this server: {KEY} asks them for a key", file=sys.stderr)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    Server(api, engine, ready=f"serving {name} at {url}").run([place])


def name_of(model: Path) -> str:
    """What a model is called where nothing else is said."""
    folder = home(model)
    return folder.resolve().name if folder.is_dir() or not is_repo_id(model.as_posix()) else model.as_posix()


def log() -> None:
    """Have the server's lines on stderr: requests as JSON, and what goes wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("opencola.serve").setLevel(logging.INFO)
